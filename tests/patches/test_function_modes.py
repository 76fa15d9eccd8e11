"""A function mode may replace what the stock forward calls, and is refused unless it is torch's."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import batch, build
from torch import nn
from torch.overrides import TorchFunctionMode

from hf_fused_head import UnsupportedModelError, apply_patch
from hf_fused_head.patches.lazy_logits import LazyLogits

pytestmark = pytest.mark.newest


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Scaling(TorchFunctionMode):
    """Multiplies what one function computes."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return 2 * result if func is self.function else result


@pytest.mark.parametrize("function", [nn.functional.cross_entropy, nn.functional.linear])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_function_mode_that_may_replace_the_loss_or_the_head_is_refused(
    compiled: bool, function: Any, fresh_compiler: None
) -> None:
    stock = build("llama", tie_word_embeddings=False)
    strict, mild = (apply_patch(copy.deepcopy(stock), strict=strict) for strict in (True, False))
    inputs = batch(stock)
    if compiled:
        strict.compile()
    before = strict(**inputs).loss
    with Scaling(function):
        with pytest.raises(UnsupportedModelError, match="function mode Scaling is active"):
            strict(**inputs)
        with pytest.warns(UserWarning, match="stays stock.*function mode Scaling"):
            loss = mild(**inputs).loss
        assert torch.equal(loss, stock(**inputs).loss) and loss.item() != before.item()


def test_torchs_own_function_modes_change_nothing() -> None:
    model = apply_patch(build("llama"))
    with torch.device("cpu"):
        assert isinstance(model(**batch(model)).logits, LazyLogits)
