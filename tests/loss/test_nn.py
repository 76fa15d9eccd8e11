"""The module is the function with its options fixed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from plain_head import Problem

from hf_fused_head import LinearCrossEntropyLoss, linear_cross_entropy


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "none", "ignore_index": 3},
        {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 2.0, "logit_scale": 0.5},
        {"impl": "reference", "memory_budget_mib": 4},
    ],
)
def test_the_module_equals_the_function(options: dict) -> None:
    tensors = Problem(class_weight=True, options=options).tensors(torch.float32)
    module = LinearCrossEntropyLoss(weight=tensors["class_weight"], **options)
    call = (tensors["hidden"], tensors["weight"], tensors["target"])
    ours = module(*call, linear_bias=tensors["bias"], num_items=5)
    plain = linear_cross_entropy(
        *call,
        linear_bias=tensors["bias"],
        num_items=5,
        weight=tensors["class_weight"],
        **options,
    )
    assert torch.equal(ours, plain)


def test_class_weights_follow_the_module() -> None:
    module = LinearCrossEntropyLoss(weight=torch.ones(5)).double()
    assert module.weight is not None
    assert module.weight.dtype == torch.float64
    assert list(module.state_dict()) == ["weight"]


def test_bad_options_are_refused_when_the_module_is_made() -> None:
    with pytest.raises(ValueError, match="`label_smoothing` must lie in"):
        LinearCrossEntropyLoss(label_smoothing=2.0)


def test_the_module_shows_what_differs_from_the_default() -> None:
    assert repr(LinearCrossEntropyLoss()) == "LinearCrossEntropyLoss()"
    assert "softcap=30.0" in repr(LinearCrossEntropyLoss(softcap=30.0))


def test_the_module_can_be_copied_and_pickled() -> None:
    module = LinearCrossEntropyLoss(softcap=30.0)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.options == module.options
