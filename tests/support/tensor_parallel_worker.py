"""Run by test_tensor_parallel.py, one process a rank: patched sharded models against one."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensor_parallel_mixes
import torch
import torch.distributed as dist
from ranks import refused, run_cases
from tensor_parallel_models import (
    assert_as_one_process,
    assert_vocabulary_parallel,
    gathered,
    loaded,
    mesh,
    results,
    whole,
)
from tiny_models import VOCAB_SIZE, batch, build
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from hf_fused_head import UnsupportedModelError, apply_patch, last_stats, patch_report, remove_patch

CASES: dict[str, Callable[[], None]] = dict(tensor_parallel_mixes.CASES)


def case(function: Callable[[], None]) -> Callable[[], None]:
    """Names a case after its function."""
    CASES[function.__name__] = function
    return function


def parallelized(order: str, plan: Any) -> None:
    for family in ("llama", "gemma2", "phi"):
        stock = build(family, tie_word_embeddings=False)
        model = copy.deepcopy(stock)
        if order == "before":
            apply_patch(model)
        parallelize_module(model, mesh(), {"lm_head": plan})
        if order == "after":
            apply_patch(model)
        assert_as_one_process(model, stock)
        assert_vocabulary_parallel(model)


for _order in ("before", "after"):
    CASES[f"parallelize_module-{_order}"] = lambda order=_order: parallelized(order, gathered())


@case
def every_option_of_a_patch() -> None:
    stock = build("llama", tie_word_embeddings=False)
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "stats": ("accuracy", "entropy")}
    one = apply_patch(copy.deepcopy(stock), **options)
    model = apply_patch(parallelize_module(stock, mesh(), {"lm_head": gathered()}), **options)
    inputs = batch(one)
    losses = [m(**inputs, num_items_in_batch=17).loss for m in (model, one)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for (name, parameter), other in zip(model.named_parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(whole(parameter.grad), other.grad, msg=name)
    for ours, alone in zip(last_stats(model), last_stats(one), strict=True):
        torch.testing.assert_close(ours, alone)


@case
def a_frozen_head() -> None:
    stock = build("llama", tie_word_embeddings=False)
    stock.lm_head.requires_grad_(False)
    model = parallelize_module(copy.deepcopy(stock), mesh(), {"lm_head": gathered()})
    apply_patch(model)
    inputs = batch(stock)
    for each in (model, stock):
        each(**inputs).loss.backward()
    for (name, parameter), other in zip(model.named_parameters(), stock.parameters(), strict=True):
        if name != "lm_head.weight":
            torch.testing.assert_close(parameter.grad, other.grad, msg=name)
    if model.lm_head.weight.grad is not None:
        raise AssertionError("the frozen head has a gradient")


def loaded_with_a_plan(family: str) -> None:
    """With `tp_plan="auto"` attention, mlp and head are spread over the ranks."""
    stock, model = loaded(family, vocab_size=104)
    on_instance = model.lm_head.__dict__["forward"]
    unpatched = results(model, batch(stock))
    apply_patch(model)
    assert_as_one_process(model, stock, torch_results=unpatched)
    assert_vocabulary_parallel(model)
    remove_patch(model)
    if model.lm_head.__dict__["forward"] is not on_instance:
        raise AssertionError("remove_patch has not put the head's forward back")
    if type(model.lm_head) is not nn.Linear or patch_report(model).fused:
        raise AssertionError("remove_patch has left something")


for _family in ("llama", "gemma2", "qwen3"):
    CASES[f"tp_plan-{_family}"] = lambda family=_family: loaded_with_a_plan(family)


def logits_stay(model: Any) -> None:
    """Without labels, in generation and when read, logits are those of the model unpatched."""
    inputs = batch(model)
    ids = inputs["input_ids"]
    model.eval()
    with torch.no_grad():
        plain, labelled = model(ids).logits, model(**inputs).logits
    trained = model(**inputs).logits
    text = model.generate(ids, max_new_tokens=4, do_sample=False)
    apply_patch(model)
    with torch.no_grad():
        ours, ours_labelled = model(ids).logits, model(**inputs).logits
        torch.testing.assert_close(ours, plain, rtol=0, atol=0)
        torch.testing.assert_close(ours_labelled + 0, labelled, rtol=0, atol=0)
    torch.testing.assert_close(model(**inputs).logits + 0, trained, rtol=0, atol=0)
    if not torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), text):
        raise AssertionError("generate gives another text")


@case
def logits_and_generate_are_unchanged_with_a_plan() -> None:
    logits_stay(loaded("gemma2", vocab_size=104)[1])


@case
def logits_and_generate_are_unchanged_with_parallelize_module() -> None:
    model = build("llama", tie_word_embeddings=False)
    logits_stay(parallelize_module(model, mesh(), {"lm_head": gathered()}))


@case
def plans_that_leave_the_logits_cut_are_refused() -> None:
    model = build("llama", tie_word_embeddings=False)
    apply_patch(parallelize_module(model, mesh(), {"lm_head": ColwiseParallel()}))
    with refused(UnsupportedModelError, "the plan of the head must gather its output"):
        model(**batch(model))


@case
def heads_cut_in_another_way_are_refused() -> None:
    ranks = dist.get_world_size()
    square = init_device_mesh(mesh().device_type, (1, ranks))
    for places, where in (
        ([Shard(1)], mesh()),
        ([Replicate()], mesh()),
        ([Replicate(), Shard(0)], square),
    ):
        model = apply_patch(build("llama", tie_word_embeddings=False))
        whole_weight = model.lm_head.weight.detach()
        cut = torch.distributed.tensor.distribute_tensor(whole_weight, where, places)
        model.lm_head.weight = nn.Parameter(cut)
        with refused(UnsupportedModelError, "must be a DTensor with placement Shard(0) on a mesh"):
            model(**batch(model))


@case
def other_forwards_of_transformers_are_refused() -> None:
    """A head with the plan "colwise", whose logits stay cut, is named at apply_patch."""
    _, model = loaded("llama", vocab_size=104)
    style_of = transformers_styles()
    model.lm_head.__dict__.pop("forward")
    style_of["colwise"].install_forward(model.lm_head, mesh())
    with refused(UnsupportedModelError, "there is a forward on the head"):
        apply_patch(model)


def transformers_styles() -> Any:
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    return ALL_PARALLEL_STYLES


@case
def a_label_out_of_range_is_an_error_on_every_rank() -> None:
    model = build("llama", tie_word_embeddings=False)
    apply_patch(parallelize_module(model, mesh(), {"lm_head": gathered()}))
    inputs = batch(model)
    inputs["labels"][0, 5] = VOCAB_SIZE
    with refused(ValueError, f"`target` must hold class ids in [0, {VOCAB_SIZE})"):
        model(**inputs)


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen = sys.argv[4:] or list(CASES)
    every = {**CASES, **tensor_parallel_mixes.SLOW}
    run_cases(every, int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), chosen)
