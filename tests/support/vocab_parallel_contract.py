"""Cases of vocab_parallel_worker.py: errors that every rank raises, what is sent, the module."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist
from plain_head import NAMES, Problem, by_plain, results
from ranks import refused
from torch import Tensor, nn
from vocab_parallel_checks import IMPLS, by_shard, halves_of, rows_of, sizes_of

from hf_fused_head import LinearCrossEntropyLoss
from hf_fused_head import linear_cross_entropy as fused_loss
from hf_fused_head.benchmark.wire import given_bytes, sent

CASES: dict[str, Callable[[], None]] = {}


def case(function: Callable[[], None]) -> Callable[[], None]:
    """Names a case after its function."""
    CASES[function.__name__] = function
    return function


@case
def a_label_out_of_range_is_an_error_on_every_rank() -> None:
    tensors = Problem().tensors(torch.float32)
    tensors["target"][1, 4] = 37
    for impl in IMPLS:
        with refused(ValueError, "[0, 37) or ignore_index=-100, got 37 at position (1, 4)"):
            by_shard(Problem(), halves_of(37), impl)(tensors)


@case
def a_rank_without_rows_is_an_error_on_every_rank() -> None:
    tensors = Problem().tensors(torch.float32)
    sizes = [37, *[0] * (dist.get_world_size() - 1)]
    with refused(ValueError, "at least one row on every rank of `process_group`, got none on rank"):
        by_shard(Problem(), sizes, "torch")(tensors)


@case
def ranks_that_differ_are_an_error_on_every_rank() -> None:
    rank, loss = dist.get_rank(), by_shard(Problem(), halves_of(37), "torch")
    tensors = Problem().tensors(torch.float32)
    tensors["target"][0, 0] = rank
    with refused(RuntimeError, "`target` must be the same on every rank"):
        loss(tensors)
    tensors = Problem(shape=(3, 7 + rank)).tensors(torch.float32)
    with refused(RuntimeError, "`input` must be the same on every rank"):
        loss(tensors)
    tensors = Problem().tensors(torch.float32)
    tensors["hidden"].requires_grad_(rank == 0)
    tensors["weight"].requires_grad_()
    with refused(RuntimeError, "tensors that require grad"):
        loss(tensors)
    for option in ({"logit_scale": 1.0 + rank}, {"label_smoothing": 0.1 + 0.8 * rank}):
        tensors = Problem().tensors(torch.float32)
        tensors["weight"].requires_grad_()
        loss = by_shard(Problem().with_options(**option), halves_of(37), "torch")
        with refused(RuntimeError, "options of the loss must be the same on every rank"):
            loss(tensors)


@case
def an_error_on_one_rank_is_an_error_on_every_rank() -> None:
    """What only one rank has to raise, at the door or later, the others hear of."""
    for error, text, wrong in (
        (TypeError, "`target` must be int64", {"target": Tensor.int}),
        (TypeError, "`linear_weight` must have the dtype", {"weight": Tensor.double}),
        (ValueError, "`input` must have shape", {"hidden": lambda hidden: hidden[..., 1:]}),
    ):
        tensors = Problem().tensors(torch.float32)
        loss = by_shard(Problem(), halves_of(37), "torch")
        with first_rank_raises(error, text) as here:
            loss({n: wrong[n](t) if here and n in wrong else t for n, t in tensors.items()})
        # The next loss meets ranks that are in step.
        torch.testing.assert_close(loss(tensors), by_plain(Problem())(tensors))
    tensors = Problem().tensors(torch.float32)
    for option in ({"label_smoothing": 2.0}, {"softcap": -1.0}, {"reduction": "median"}):
        with first_rank_raises(ValueError, f"`{next(iter(option))}` must") as here:
            problem = Problem().with_options(**option) if here else Problem()
            by_shard(problem, halves_of(37), "torch")(tensors)
    for error, text, impl in (
        (ValueError, "`impl` must be one of", "fastest"),
        (NotImplementedError, "`impl` must support the inputs", "triton"),
    ):
        wide = Problem().tensors(torch.float64)
        with first_rank_raises(error, text) as here:
            by_shard(Problem(), halves_of(37), impl if here else "torch")(wide)


@contextmanager
def first_rank_raises(error: type[Exception], text: str) -> Iterator[bool]:
    """Whether this is the rank that has to raise `error`; the others raise that it did."""
    here = dist.get_rank() == 0
    expected = (error, text) if here else (RuntimeError, "got an error on rank 0")
    with refused(*expected):
        yield here


@case
def a_cuda_graph_with_a_group_is_refused() -> None:
    loss, tensors = by_shard(Problem(), halves_of(37), "torch"), Problem().tensors(torch.float32)
    with (
        mock.patch.object(torch.cuda, "is_initialized", lambda: True),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True),
        refused(NotImplementedError, "must be None while a CUDA graph is captured, got a group of"),
    ):
        loss(tensors)


@case
def class_weights_of_the_shard_alone_are_refused() -> None:
    tensors = Problem(class_weight=True).tensors(torch.float32)
    tensors["class_weight"] = tensors["class_weight"][:5]
    with refused(ValueError, "`weight` must have shape (37,), got (5,)"):
        by_shard(Problem(), halves_of(37), "torch")(tensors)


@case
def a_group_is_a_process_group() -> None:
    with refused(TypeError, "`process_group` must be a torch.distributed.ProcessGroup or None"):
        fused_loss(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2).long(), process_group="tp")


@case
def a_group_of_one_rank_is_no_sharding() -> None:
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    tensors = Problem().tensors(torch.float32)
    arguments = tensors["hidden"], tensors["weight"], tensors["target"]
    ours = fused_loss(*arguments, process_group=alone)
    torch.testing.assert_close(ours, fused_loss(*arguments), rtol=0, atol=0)


@case
def the_module_takes_the_group() -> None:
    tensors = Problem(bias=False).tensors(torch.float32)
    module = LinearCrossEntropyLoss(process_group=dist.group.WORLD, softcap=5.0)
    rows = rows_of(halves_of(37))
    ours = module(tensors["hidden"], tensors["weight"][rows], tensors["target"])
    whole_loss = LinearCrossEntropyLoss(softcap=5.0)
    expected = whole_loss(tensors["hidden"], tensors["weight"], tensors["target"])
    torch.testing.assert_close(ours, expected)


@case
def a_copy_of_the_module_shares_the_group() -> None:
    tensors = Problem(bias=False).tensors(torch.float32)
    arguments = tensors["hidden"], tensors["weight"][rows_of(halves_of(37))], tensors["target"]
    module = LinearCrossEntropyLoss(process_group=dist.group.WORLD, weight=torch.rand(37))
    twin = copy.deepcopy(nn.ModuleList([module]))[0]
    if twin.process_group is not dist.group.WORLD or twin.weight is module.weight:
        raise AssertionError("the copy has another group or the same class weights")
    torch.testing.assert_close(twin(*arguments), module(*arguments), rtol=0, atol=0)
    compiled = torch.compile(twin, fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), module(*arguments))
    with refused(TypeError, "`process_group` must be None in a LinearCrossEntropyLoss that is"):
        pickle.dumps(module)


@case
def it_compiles_without_a_break() -> None:
    problem = Problem().with_options(z_loss=0.1)
    loss = by_shard(problem, sizes_of(37), "torch")
    compiled = torch.compile(loss, fullgraph=True)
    tensors = problem.tensors(torch.float32)
    ours, eager = results(compiled, tensors, None), results(loss, tensors, None)
    for name, value in ours.items():
        torch.testing.assert_close(value, eager[name])


@case
def the_forward_sends_at_most_8_bytes_a_token() -> None:
    for impl in sorted({"torch", *IMPLS} - {"reference"}):
        bytes_sent(impl)


def bytes_sent(impl: str) -> None:
    problem = Problem(shape=(200,), ignored=0)
    tensors = problem.tensors(torch.float32)
    loss = by_shard(problem, halves_of(37), impl)
    with sent() as forward:
        loss(tensors)
    leaves = {name: tensors[name].requires_grad_() for name in NAMES}
    with sent() as both:
        torch.autograd.grad(loss(tensors), list(leaves.values()))
    agreement, *others = forward
    if given_bytes(others) > 8 * 200 or agreement.given_bytes > 80:
        raise AssertionError(f"forward sent {forward}")
    if given_bytes(both) != given_bytes(forward) + 200 * problem.hidden_size * 4:
        raise AssertionError(f"forward and backward sent {both}")
