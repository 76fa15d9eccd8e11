"""Data parallel engines on two processes: everything is as on one, and as in a stock model."""

from __future__ import annotations

import pytest
import torch
from data_parallel import needs_deepspeed
from places import ON_TWO_DEVICES
from tiny_models import batch, build
from two_processes import assert_worker_passes

from hf_fused_head import UnsupportedModelError, apply_patch, patch_report

pytestmark = pytest.mark.newest


@pytest.mark.parametrize("place", ON_TWO_DEVICES)
def test_engines_train_evaluate_resume_and_unpatch(place: str) -> None:
    """Every way to shard, to train and to patch: see `CASES` of the worker."""
    assert_worker_passes("data_parallel_worker.py", "ddp", "fsdp1", "fsdp2", place=place)


@needs_deepspeed
def test_deepspeed_trains_evaluates_resumes_and_unpatches() -> None:
    """The same of ZeRO-2 and ZeRO-3."""
    assert_worker_passes("data_parallel_worker.py", "deepspeed")


class PreBackward(torch.autograd.Function):
    """What ZeRO-3 leaves on every module; here it only notes that it has run."""

    ran = 0

    @staticmethod
    def forward(ctx, output: torch.Tensor) -> torch.Tensor:
        return output.detach()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        PreBackward.ran += 1
        return grad


def test_the_backward_of_a_partitioned_head_begins_with_its_gathering() -> None:
    """ZeRO-3 finds no tensor in what the head returns, so its hook is put on the loss."""
    model = apply_patch(build("llama", tie_word_embeddings=False, num_hidden_layers=1))
    model.lm_head.weight.ds_numel = 1
    model.lm_head.pre_bwd_fn = PreBackward
    model(**batch(model)).loss.backward()
    assert PreBackward.ran == 1


def test_a_partitioned_head_without_that_hook_is_refused() -> None:
    """Its backward would meet an empty weight."""
    model = apply_patch(build("llama", tie_word_embeddings=False, num_hidden_layers=1))
    model.lm_head.weight.ds_numel = 1
    with pytest.raises(UnsupportedModelError, match=r"ZeRO-3.*deepspeed\.initialize"):
        model(**batch(model))
    assert not patch_report(model).fused
