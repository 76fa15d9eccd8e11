"""FlopCounterMode counts the products that stock's matrix multiplications do."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from plain_head import plain_loss
from tiny_models import batch, build
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hf_fused_head import apply_patch, linear_cross_entropy

pytestmark = pytest.mark.newest


def flops(step: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


ONE_PRODUCT = 2 * 7 * 8 * 37


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trainable", [(), (0,), (1,), (0, 1)], ids=str)
def test_a_step_counts_as_torchs(trainable: tuple[int, ...], reduction: str) -> None:
    operands = torch.randn(7, 8), torch.randn(37, 8)
    for index in trainable:
        operands[index].requires_grad_()

    def step(loss: Callable[..., Tensor]) -> None:
        value = loss(*operands, torch.arange(7), reduction=reduction).sum()
        if trainable:
            value.backward()

    again = ONE_PRODUCT if trainable and reduction == "none" else 0  # Losses per token: 4 products.
    assert flops(lambda: step(plain_loss)) == ONE_PRODUCT * (1 + len(trainable))
    assert flops(lambda: step(linear_cross_entropy)) == ONE_PRODUCT * (1 + len(trainable)) + again


def with_adapter(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))


@pytest.mark.parametrize("prepare", [lambda model: model, with_adapter], ids=["plain", "lora"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_training_step_of_a_patched_model_counts_as_stocks(
    device: str, prepare: Callable[[nn.Module], nn.Module]
) -> None:
    stock = prepare(build("llama", tie_word_embeddings=False)).to(device)
    fused = apply_patch(copy.deepcopy(stock))
    inputs = batch(stock)
    counts = [flops(lambda m=model: m(**inputs).loss.backward()) for model in (stock, fused)]
    assert counts[0] == counts[1]


def test_the_head_is_counted_where_it_is() -> None:
    model = apply_patch(build("llama"))
    with FlopCounterMode(display=False) as counter:
        model(**batch(model)).loss.backward()
    (count,) = counter.get_flop_counts()["LlamaForCausalLM.lm_head"].values()
    assert count == 3 * 2 * 22 * 16 * 101


def test_a_counter_that_is_imported_after_the_first_loss_counts() -> None:
    """And nothing is imported for those who do not count."""
    program = """
        import sys
        import torch
        from hf_fused_head import linear_cross_entropy

        tensors = torch.randn(7, 8), torch.randn(37, 8), torch.arange(7)
        linear_cross_entropy(*tensors)
        assert "torch.utils.flop_counter" not in sys.modules
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            linear_cross_entropy(*tensors)
        print(counter.get_total_flops())
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(result.stdout) == ONE_PRODUCT
