"""The public contract: names, argument names, and docstrings that say what the signature says."""

from __future__ import annotations

import inspect
import re

import pytest

import hf_fused_head

LOSS_TENSORS = ["input", "linear_weight", "target"]
LOSS_KEYWORDS = [
    "linear_bias", "weight", "reduction", "ignore_index", "label_smoothing", "logit_scale",
    "softcap", "z_loss", "num_items", "impl", "memory_budget_mib", "process_group",
]  # fmt: skip
PAIR_TENSORS = ["student", "student_weight", "teacher", "teacher_weight"]
PAIR_KEYWORDS = [
    "temperature", "beta", "mask", "reduction", "num_items", "student_bias", "student_logit_scale",
    "student_softcap", "teacher_bias", "teacher_logit_scale", "teacher_softcap", "impl",
    "memory_budget_mib", "process_group",
]  # fmt: skip
SIGNATURES = {
    "linear_cross_entropy": [*LOSS_TENSORS, *LOSS_KEYWORDS, "options"],
    "linear_cross_entropy_with_stats": [*LOSS_TENSORS, *LOSS_KEYWORDS, "options"],
    "linear_kl_div": [*PAIR_TENSORS, *PAIR_KEYWORDS],
    "linear_kl_div_with_stats": [*PAIR_TENSORS, *PAIR_KEYWORDS],
    "sparse_kl_div": [
        "log_probs", "teacher_log_probs", "beta", "tail", "mask", "reduction", "num_items",
    ],
    "apply_patch": [
        "model", "impl", "memory_budget_mib", "label_smoothing", "z_loss", "stats", "strict",
    ],
    "remove_patch": ["model"],
    "patch_report": ["model"],
    "last_stats": ["model"],
    "supported_models": [],
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(hf_fused_head.__all__))
def test_every_public_name_exists_and_is_documented(name: str) -> None:
    value = getattr(hf_fused_head, name)
    if callable(value):
        assert inspect.getdoc(value), f"{name} has no docstring"


def test_dir_lists_the_public_names() -> None:
    assert set(hf_fused_head.__all__) <= set(dir(hf_fused_head))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = hf_fused_head.no_such_name


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_signatures_are_those_of_the_contract(name: str) -> None:
    parameters = inspect.signature(getattr(hf_fused_head, name)).parameters
    assert list(parameters) == SIGNATURES[name]
    positional = {*LOSS_TENSORS, *PAIR_TENSORS, "log_probs", "teacher_log_probs", "model"}
    for parameter in parameters.values():
        keyword_only = parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert keyword_only == (parameter.name not in positional), parameter


@pytest.mark.parametrize(
    "name", ["linear_cross_entropy", "linear_kl_div", "sparse_kl_div", "apply_patch"]
)
def test_the_docstring_names_every_argument_and_no_other(name: str) -> None:
    value = getattr(hf_fused_head, name)
    document = inspect.getdoc(value) or ""
    after = document.split("Args:\n", 1)[1]
    section = re.split(r"\n(?:Returns|Raises|References|Shape):", after)[0]
    documented = re.findall(r"^ {4}(\w+)(?: \(.*\))?:", section, flags=re.MULTILINE)
    assert documented == list(inspect.signature(value).parameters)


def test_the_drop_in_has_the_order_and_names_of_torch() -> None:
    import torch

    torch_version = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if torch_version is None:
        pytest.skip("torch.nn.functional.linear_cross_entropy exists from torch 2.13 on")
    ours = list(inspect.signature(hf_fused_head.linear_cross_entropy).parameters)
    theirs = list(inspect.signature(torch_version).parameters)
    assert ours[:3] == theirs[:3]
    assert set(theirs) <= set(ours)


def test_a_call_of_torchs_function_with_its_defaults_spelled_out() -> None:
    import torch

    torch_version = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if torch_version is None:
        pytest.skip("torch.nn.functional.linear_cross_entropy exists from torch 2.13 on")
    parameters = list(inspect.signature(torch_version).parameters.values())[3:]
    defaults = {parameter.name: parameter.default for parameter in parameters}
    hidden, weight, target = torch.randn(4, 8), torch.randn(5, 8), torch.tensor([0, 4, -100, 2])
    ours = hf_fused_head.linear_cross_entropy(hidden, weight, target, **defaults)
    torch.testing.assert_close(ours, torch_version(hidden, weight, target, **defaults))
