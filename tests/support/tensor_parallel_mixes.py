"""Cases of tensor_parallel_worker.py: tensor parallelism beside what else is done to a model."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import peft
import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator, ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate_on_cpu import pretend_gpus
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from ranks import refused
from tensor_parallel_models import (
    assert_as_one_process,
    assert_vocabulary_parallel,
    gathered,
    loaded,
    mesh,
    results,
    whole,
)
from tiny_models import batch, build
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from hf_fused_head import UnsupportedModelError, apply_patch, patch_report, remove_patch

CASES: dict[str, Callable[[], None]] = {}


def case(function: Callable[[], None]) -> Callable[[], None]:
    """Names a case after its function."""
    CASES[function.__name__] = function
    return function


# A length that all ranks share evenly, as a cut sequence has to have.
LENGTH = 12


def sequence_parallel(stock: Any, where: Any, local: bool, head: Any) -> Any:
    """A patched copy whose last norm sees a part of the sequence on each rank.

    Args:
        stock: The model.
        where: The mesh.
        local: Whether the norm hands on a plain tensor.
        head: The plans of the head, one after the other.
    """
    model = copy.deepcopy(stock)
    cut = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1))
    norm = SequenceParallel(use_local_output=local)
    for name, plan in (("model.norm", cut), ("model.norm", norm), *head):
        parallelize_module(model, where, {name: plan})
    return apply_patch(model)


def cut_by_colwise(stock: Any, local: bool) -> Any:
    head = ("lm_head", gathered(input_layouts=Shard(1)))
    return sequence_parallel(stock, mesh(), local, [head])


def cut_by_prepare(stock: Any) -> Any:
    """`PrepareModuleInput` gathers, in the place of `ColwiseParallel`."""
    gather = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())
    return sequence_parallel(stock, mesh(), False, [("lm_head", gather), ("lm_head", gathered())])


def cut_by_nobody(stock: Any) -> Any:
    """No hook on the head: it gets a DTensor as the norm leaves it."""
    where = mesh()
    model = sequence_parallel(stock, where, False, [])
    rows = distribute_tensor(model.lm_head.weight.detach(), where, [Shard(0)])
    model.lm_head.weight = nn.Parameter(rows)
    return model


def cut_sequence(prepare: Callable[[Any], Any]) -> None:
    """Loss and gradients of one process; dX is reduced once, in the scattering of its parts."""
    stock = build("llama", tie_word_embeddings=False)
    model = prepare(stock)
    assert_as_one_process(model, stock, length=LENGTH)
    inputs = batch(stock, length=LENGTH)
    with hidden_sums(stock) as elements:
        loss = model(**inputs).loss
        # Not before: its own hooks on modules would stand between the gathering and the head.
        with CommDebugMode() as backward:
            loss.backward()
    counts = Counter({op.__name__: count for op, count in backward.get_comm_counts().items()})
    if counts["reduce_scatter_tensor"] != 1 or counts["all_reduce"] or elements:
        raise AssertionError(f"backward {dict(counts)}, sums of {elements} elements")


@case
def a_cut_sequence_in_bfloat16() -> None:
    """The parts of dX are rounded before they are summed, as torch rounds them."""
    stock = build("llama", tie_word_embeddings=False).bfloat16()
    model = remove_patch(cut_by_colwise(stock, local=False))
    unpatched = results(model, batch(stock, length=LENGTH))
    assert_as_one_process(apply_patch(model), stock, LENGTH, torch_results=unpatched)


@contextmanager
def hidden_sums(model: Any) -> Iterator[list[int]]:
    """The elements of every sum over ranks of matrices with a column for each hidden one."""
    elements: list[int] = []
    reduce = dist.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.dim() == 2 and tensor.shape[1] == model.config.hidden_size:
            elements.append(tensor.numel())
        return reduce(tensor, *args, **kwargs)

    dist.all_reduce = all_reduce
    try:
        yield elements
    finally:
        dist.all_reduce = reduce


for _name, _prepare in (
    ("colwise", functools.partial(cut_by_colwise, local=False)),
    ("colwise, local", functools.partial(cut_by_colwise, local=True)),
    ("prepare", cut_by_prepare),
    ("no hook", cut_by_nobody),
):
    CASES[f"sequence-{_name}"] = functools.partial(cut_sequence, _prepare)


@case
def a_whole_sequence_takes_one_sum() -> None:
    """The counting of `cut_sequence` sees the sum that belongs to replicated hidden states."""
    stock = build("llama", tie_word_embeddings=False)
    model = apply_patch(parallelize_module(stock, mesh(), {"lm_head": gathered()}))
    inputs = batch(model, length=LENGTH)
    with hidden_sums(model) as elements:
        model(**inputs).loss.backward()
    num_valid = int((inputs["labels"][:, 1:] != -100).sum())
    if sum(elements) != num_valid * model.config.hidden_size:
        raise AssertionError(elements)


def adapted(model: Any, **options: Any) -> Any:
    """A LoRA model, moved off its start: the same one every time and on every rank."""
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **options))
    for parameter in (p for p in model.parameters() if p.requires_grad):
        noise = torch.randn(parameter.shape) * 0.1
        if isinstance(parameter, DTensor):
            layout = parameter.device_mesh, parameter.placements
            noise = distribute_tensor(noise, *layout, src_data_rank=None)
        parameter.data.add_(noise)
    return model


ADAPTERS = {
    "body": ({"target_modules": ["q_proj", "o_proj"]}, ""),
    "head": ({"target_modules": ["lm_head", "q_proj"]}, ".base_layer"),
    # A copy of the head of its own.
    "saved": (
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        ".modules_to_save.default",
    ),
}


def adapters(name: str, order: str) -> None:
    """LoRA on a model whose head is spread, before that or after."""
    options, inner = ADAPTERS[name]
    stock = build("llama", tie_word_embeddings=False)
    model = copy.deepcopy(stock)
    if order == "after":
        model = adapted(parallelize_module(model, mesh(), {"lm_head": gathered()}), **options)
    else:
        plan = {f"base_model.model.lm_head{inner}": gathered()}
        model = parallelize_module(adapted(model, **options), mesh(), plan)
    apply_patch(model)
    assert_as_one_process(model, adapted(stock, **options))
    if name != "head":
        assert_vocabulary_parallel(model)


for _name in ADAPTERS:
    for _order in ("before", "after"):
        CASES[f"lora-{_name}-{_order}"] = functools.partial(adapters, _name, _order)


def adapters_with_a_plan(name: str) -> None:
    """LoRA on a model that transformers has spread; PEFT cuts its factors as the plan says."""
    options, _ = ADAPTERS[name]
    stock, model = loaded("llama", vocab_size=104)
    model = adapted(model, **options)
    try:
        unpatched = results(model, batch(stock))
    except RuntimeError:
        # PEFT 0.21.2 makes factors that fit transformers 5.17's plan; an older one, and any with
        # 5.23, fails in the stock model.
        fits = Version(transformers.__version__) < Version("5.18")
        if fits and Version(peft.__version__) >= Version("0.21.2"):
            raise
        return
    assert_as_one_process(apply_patch(model), adapted(stock, **options), torch_results=unpatched)


for _name in ("body", "head"):
    CASES[f"lora-{_name}-tp_plan"] = functools.partial(adapters_with_a_plan, _name)


@case
def adapters_on_a_head_with_a_cut_sequence_are_refused() -> None:
    """PEFT's layer takes no DTensor; the stock forward fails too."""
    stock = build("llama", tie_word_embeddings=False)
    model = adapted(cut_by_colwise(stock, local=False), **ADAPTERS["head"][0])
    with refused(UnsupportedModelError, "must be whole on every rank, got a DTensor with"):
        model(**batch(stock, length=LENGTH))


@case
def a_forward_of_another_head_is_refused() -> None:
    """A copy of a head keeps the forward that transformers put on it, which runs the original."""
    _, model = loaded("llama", vocab_size=104)
    forward = model.lm_head.__dict__["forward"]
    model.lm_head = nn.Linear(16, 104, bias=False)
    model.lm_head.forward = forward
    with refused(UnsupportedModelError, "there is a forward on the head"):
        apply_patch(model)


@case
def tied_embeddings_with_a_plan() -> None:
    stock, model = loaded("llama", vocab_size=104, tie_word_embeddings=True)
    assert_tied(apply_patch(model), stock)


@case
def tied_embeddings_with_parallelize_module() -> None:
    stock = build("llama", tie_word_embeddings=True)
    rows = RowwiseParallel(input_layouts=Replicate())
    model = copy.deepcopy(stock)
    parallelize_module(model, mesh(), {"model.embed_tokens": rows, "lm_head": gathered()})
    # Each plan has made a parameter of its own.
    model.lm_head.weight = model.model.embed_tokens.weight
    assert_tied(apply_patch(model), stock)


def assert_tied(model: Any, stock: Any) -> None:
    if model.lm_head.weight is not model.model.embed_tokens.weight:
        raise AssertionError("the model is not tied")
    assert_as_one_process(model, stock)
    assert_vocabulary_parallel(model)


def fully_sharded(replicas: int, head_alone: bool) -> None:
    """FSDP2 over replicas with a batch each, a head that tensor parallelism has cut inside."""
    size = (replicas, dist.get_world_size() // replicas)
    grid = init_device_mesh(torch.get_default_device().type, size, mesh_dim_names=("dp", "tp"))
    stock = build("llama", tie_word_embeddings=False)
    model = copy.deepcopy(stock)
    parallelize_module(model, grid["tp"], {"lm_head": gathered()})
    apply_patch(model)
    for unit in (*model.model.layers, *([model.lm_head] if head_alone else [])):
        fully_shard(unit, mesh=grid["dp"])
    fully_shard(model, mesh=grid["dp"])
    batches = [batch(stock, seed=seed) for seed in range(replicas)]
    losses = [stock(**each).loss for each in batches]
    torch.stack(losses).mean().backward()
    loss = model(**batches[grid["dp"].get_local_rank()]).loss
    loss.backward()
    torch.testing.assert_close(loss, losses[grid["dp"].get_local_rank()])
    for (name, parameter), other in zip(model.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(whole(parameter.grad), other.grad, msg=name)
    spread = f"vocabulary parallel on {size[1]} ranks"
    if (spread in str(patch_report(model))) != (size[1] > 1):
        raise AssertionError(str(patch_report(model)))


@case
def fully_sharded_over_every_grid() -> None:
    """All ways to lay the ranks out in two dimensions."""
    ranks = dist.get_world_size()
    for replicas in (count for count in range(1, ranks + 1) if ranks % count == 0):
        for head_alone in (False, True):
            fully_sharded(replicas, head_alone)


@case
def accelerate_prepares_a_model_with_a_plan() -> None:
    """Two steps of it are those of one process."""
    stock, model = loaded("llama", vocab_size=104)
    # One by one: torch steps no list in which some parameters are DTensors, as in stock's plan.
    alone, optimizer = (
        torch.optim.SGD(each.parameters(), lr=0.1, foreach=False) for each in (stock, model)
    )
    pretend_gpus()
    spread = ParallelismConfig(tp_size=dist.get_world_size())
    accelerator = Accelerator(parallelism_config=spread)
    model, optimizer = accelerator.prepare(apply_patch(model), optimizer)
    for _ in range(2):
        torch.testing.assert_close(results(model, batch(stock)), results(stock, batch(stock)))
        optimizer.step()
        alone.step()
    assert_vocabulary_parallel(model)
    AcceleratorState._reset_state(reset_partial_state=True)


def compiled(prepare: Callable[[Any], Any], backend: str) -> None:
    """The whole model is one graph."""
    torch._dynamo.reset()
    # One layer: each rank compiles every kernel of it.
    stock = build("llama", tie_word_embeddings=False, num_hidden_layers=1)
    model = torch.compile(prepare(stock), backend=backend, fullgraph=True)
    assert_as_one_process(model, stock, length=LENGTH)


def cut_head(stock: Any) -> Any:
    return apply_patch(parallelize_module(copy.deepcopy(stock), mesh(), {"lm_head": gathered()}))


SLOW: dict[str, Callable[[], None]] = {}
"""Run where they are asked for by name."""

for _name, _prepare in (
    ("compiled", cut_head),
    ("compiled-sequence", functools.partial(cut_by_colwise, local=False)),
):
    CASES[_name] = functools.partial(compiled, _prepare, "inductor")
    SLOW[f"{_name}-aot_eager"] = functools.partial(compiled, _prepare, "aot_eager")
