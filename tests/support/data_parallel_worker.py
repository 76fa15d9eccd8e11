"""Run by test_data_parallel.py in two processes: patched models under an engine against one."""

from __future__ import annotations

import functools
import sys
import tempfile
from collections import Counter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from causal_loss import in_float64
from data_parallel import ENGINES, MICRO_BATCHES, base_of, descend
from oracle import assert_close_as_torch
from peft import LoraConfig, get_peft_model
from tiny_models import batch, build
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from trains_like import assert_gradients_close

from hf_fused_head import apply_patch, patch_report, remove_patch


class Case(NamedTuple):
    """One way to shard, to train and to patch a model.

    Attributes:
        engine: Who shards it: a key of `ENGINES`.
        head: Where the head goes, for the engine to read.
        training: "full", "lora", "dora" or "saved" (the head in PEFT's `modules_to_save`).
        order: When it is patched: "first", before "adapters" or "last", after the engine.
        tied: Whether the head shares its weight with the embeddings.
        half: Whether products run in bfloat16.
        memory_budget_mib: Of the patch.
    """

    engine: str
    head: str
    training: str = "full"
    order: str = "first"
    tied: bool = False
    half: bool = False
    memory_budget_mib: float | None = None


# Room for two tokens at a time.
MANY_CHUNKS_MIB = 0.004
CASES = [
    Case("ddp", "whole"),
    Case("ddp", "whole", order="last", tied=True),
    Case("ddp", "whole", "lora"),
    Case("ddp", "whole", "lora", "adapters"),
    Case("ddp", "whole", "saved", "last"),
    Case("fsdp1", "root"),
    Case("fsdp1", "root", order="last", tied=True),
    Case("fsdp1", "own", order="last"),
    Case("fsdp1", "own", "lora"),
    Case("fsdp1", "own", "saved", "adapters"),
    Case("fsdp1", "own", "dora", memory_budget_mib=MANY_CHUNKS_MIB),
    Case("fsdp1", "parts", "lora", "last", memory_budget_mib=MANY_CHUNKS_MIB),
    Case("fsdp2", "root", tied=True),
    Case("fsdp2", "root", order="last", tied=True, half=True),
    Case("fsdp2", "root", "lora", "last"),
    Case("fsdp2", "root", "saved"),
    Case("fsdp2", "own"),
    Case("fsdp2", "own", order="last", half=True),
    Case("fsdp2", "own", "lora"),
    Case("fsdp2", "own", "lora", "last", half=True),
    Case("fsdp2", "own", "dora", "last", half=True, memory_budget_mib=MANY_CHUNKS_MIB),
    Case("fsdp2", "parts", "lora", memory_budget_mib=MANY_CHUNKS_MIB),
    Case("fsdp2", "own", "saved", "adapters"),
    Case("fsdp2", "own", "saved", "last", half=True),
    Case("fsdp2", "accelerate"),
    Case("fsdp2", "accelerate", order="last", tied=True),
    Case("fsdp2", "accelerate", "lora", "adapters"),
    Case("fsdp2", "accelerate", "saved", "last"),
    Case("deepspeed", "zero2"),
    Case("deepspeed", "zero2", "lora", "last"),
    Case("deepspeed", "zero3"),
    Case("deepspeed", "zero3", order="last", tied=True),
    Case("deepspeed", "zero3", "lora", "adapters"),
    Case("deepspeed", "zero3", "saved", "last"),
]
# Of these every loss of a longer training is compared.
LONG = [
    Case("ddp", "whole"),
    Case("fsdp1", "root"),
    Case("fsdp2", "root", tied=True),
    Case("fsdp2", "own", order="last", half=True),
    Case("deepspeed", "zero2"),
    Case("deepspeed", "zero3"),
]
STEPS = 20


class Collectives(TorchDispatchMode):
    """Counts what goes over the wire, by name; the one of torch puts hooks on every module."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def tiny(case: Case, patch_when: str = "never", seed: int = 0) -> nn.Module:
    """A Llama in the adapters of the case, none of them zero; patched on the way or not."""
    model: Any = build("llama", seed, tie_word_embeddings=case.tied, num_hidden_layers=1)
    if patch_when == "first":
        apply_patch(model, memory_budget_mib=case.memory_budget_mib)
    if case.training != "full":
        torch.manual_seed(seed + 5)
        lora = case.training in ("lora", "dora")
        config = LoraConfig(
            r=4,
            target_modules=["q_proj", "lm_head"] if lora else ["q_proj"],
            modules_to_save=None if lora else ["lm_head"],
            init_lora_weights=False,
            use_dora=case.training == "dora",
        )
        model = get_peft_model(model, config)
    if patch_when == "adapters":
        apply_patch(model, memory_budget_mib=case.memory_budget_mib)
    return model


def sharded(case: Case, patch: bool = True, seed: int = 0) -> Any:
    """The model of the case in its engine."""
    model = tiny(case, case.order if patch else "never", seed)
    engine = ENGINES[case.engine](model, case.head, case.half)
    if patch and case.order == "last":
        apply_patch(engine.model, memory_budget_mib=case.memory_budget_mib)
    return engine


def micro_batches(model: Any, rank: int) -> list[dict[str, Any]]:
    """What a process trains on; no two of them have as many tokens, and one of them has none."""
    lengths = [7 + 4 * rank + 2 * index for index in range(MICRO_BATCHES)]
    parts = [batch(base_of(model), length=n, seed=rank * 10 + n) for n in lengths]
    if rank == 1:
        parts[0]["labels"].fill_(-100)
    return parts


def count_of(parts: list[dict[str, Any]]) -> int:
    """The tokens with loss."""
    return sum(int((part["labels"][:, 1:] != -100).sum()) for part in parts)


def passes(engine: Any, parts: list[dict[str, Any]], count: int) -> tuple[Tensor, Any]:
    """The loss of all micro-batches on this process, and the collectives that they took."""
    losses = []
    with Collectives() as collectives:
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            with engine.accumulating() if not last else torch.enable_grad():
                loss = engine.run(**part, num_items_in_batch=count).loss
                # Engines average over the processes what is a sum here.
                engine.backward(loss * dist.get_world_size())
                losses.append(loss.detach())
    return torch.stack(losses).sum(), collectives.counts


def trains_like_one_process(case: Case) -> None:
    """Loss, gradients, collectives, a step, evaluation, a checkpoint, and the way back."""
    stock = tiny(case)
    truth = in_float64(stock)
    everyone = [micro_batches(stock, rank) for rank in range(dist.get_world_size())]
    count = sum(map(count_of, everyone))
    rank = dist.get_rank()
    mine = everyone[rank]
    engine, plain = sharded(case), sharded(case, patch=False)
    loss, collectives = passes(engine, mine, count)
    plain_loss, plain_collectives = passes(plain, mine, count)
    report = patch_report(engine.model)
    assert report.fused, report.reason
    # Where the parts of a LoRA layer are gathered in forwards of their own, the layer runs in
    # chunks of tokens, with a gather for each of them.
    by_parts = case.head == "parts" or (case.head == "zero3" and case.training == "lora")
    assert ("in chunks" in report.kernel) == (by_parts or case.training == "dora")
    assert by_parts or collectives == plain_collectives, (collectives, plain_collectives)
    true_loss, one_loss = (
        [sum(one_process(model, part, count) for part in parts) for parts in everyone][rank]
        for model in (truth, stock)
    )
    # In float32 stock's own distance is that of one process; bfloat16 has its own in the engine.
    arithmetic = torch.bfloat16 if case.half else torch.float32
    assert_close = functools.partial(assert_close_as_torch, arithmetic=arithmetic)
    assert_close("loss", loss, plain_loss if case.half else one_loss, true_loss)
    expected = plain.gradients() if case.half else gradients_of(stock)
    assert_gradients_close(engine.gradients(), expected, gradients_of(truth))

    for trained in (engine, plain):
        trained.step()
    for model in (truth, stock):
        descend(model)
    after = loss_of(engine, mine[1])
    one_after, true_after = (model.eval()(**mine[1]).loss for model in (stock, truth))
    reference = loss_of(plain, mine[1]) if case.half else one_after
    assert_close("loss after a step", after, reference, true_after)

    with tempfile.TemporaryDirectory() as folder:
        folders = [folder]
        dist.broadcast_object_list(folders)
        resumed = sharded(case, seed=1)
        assert loss_of(resumed, mine[1]) != after
        resumed.load(engine.save(folders[0]))
        assert loss_of(resumed, mine[1]) == after
        dist.barrier()

    remove_patch(engine.model)
    assert not patch_report(engine.model).fused
    names = [[type(m).__name__ for m in one.model.modules()] for one in (engine, plain)]
    assert names[0] == names[1]
    assert_close("loss without patch", loss_of(engine, mine[1]), reference, true_after)
    output = engine.run(**mine[1])
    assert type(output.logits) is Tensor
    engine.backward(output.loss)


def losses_stay_those_of_one_process(case: Case) -> None:
    """Over many steps nothing drifts apart; in bfloat16 no further than the stock model does."""
    stock = tiny(case)
    truth = in_float64(stock)
    everyone = [micro_batches(stock, rank) for rank in range(dist.get_world_size())]
    count = sum(map(count_of, everyone))
    engines = [sharded(case), sharded(case, patch=False)]
    losses: list[list[Tensor]] = [[], [], [], []]
    for _ in range(STEPS):
        for kept, engine in zip(losses, engines, strict=False):
            loss, _ = passes(engine, everyone[dist.get_rank()], count)
            dist.all_reduce(loss)
            kept.append(loss)
            engine.step()
        for kept, model in zip(losses[2:], (stock, truth), strict=True):
            parts = [part for parts in everyone for part in parts]
            kept.append(sum(one_process(model, part, count) for part in parts))
            descend(model)
    ours, plain, alone, true = map(torch.stack, losses)
    assert true[-1] < true[0] - 1, f"less than a nat was learned: {true}"
    arithmetic = torch.bfloat16 if case.half else torch.float32
    reference = plain if case.half else alone
    assert_close_as_torch(f"losses of {STEPS} steps", ours, reference, true, arithmetic)


def one_process(model: Any, part: dict[str, Any], count: int) -> Tensor:
    """The loss without any engine, its gradients left behind."""
    loss = model(**part, num_items_in_batch=count).loss
    loss.backward()
    return loss.detach()


def gradients_of(model: nn.Module) -> dict[str, Tensor | None]:
    """By name."""
    return {name: p.grad for name, p in model.named_parameters()}


def loss_of(engine: Any, part: dict[str, Any]) -> Tensor:
    """In evaluation."""
    engine.model.eval()
    with torch.no_grad():
        return engine.run(**part).loss


def main(*engines: str) -> None:
    """All cases of some engines."""
    ENGINES[engines[0]].start()
    for case in CASES:
        if case.engine in engines:
            if dist.get_rank() == 0:
                print(case, flush=True)
            trains_like_one_process(case)
            if case in LONG:
                losses_stay_those_of_one_process(case)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
