"""The longest batch whose whole training step fits a memory, from a config alone.

At its peak a step holds::

    weights + optimizer + max(activations + head, backward)

    weights       all parameters and buffers; with 4-bit loading the linear layers of the body take
                  9/16 byte a weight (NF4, a float32 scale for every 64) and the rest its own dtype
    optimizer     AdamW: two states for every trained weight, in that weight's dtype, as torch keeps
                  them, or in a dtype that is named; none for frozen weights
    activations   what the layers keep for their backward when the head is called; with
                  checkpointing, the input of each layer
    head          from its call to the end of its backward. Stock: logits, their float32 copy, the
                  log-softmax and the gradients of both. Fused: the workspace that `plan --tokens`
                  shows. Both: the gradients of hidden states and of a trained head
    backward      most bytes at once while the layers run: activations that are left, gradients
                  made so far, temporaries of a layer, a layer that is recomputed, one unpacked
                  weight of 4-bit layers

Activations, the stock head and the backward are those of the model's own code on the meta device
(`meta_training`): every tensor of every operator counts from where it is made to where it is freed.
LoRA is PEFT's, on every linear layer but the head, which is frozen.

Attention counts as a flash kernel has it, without scores or mask, so that bytes depend on the
number of tokens and not on how they form sequences. (`sdpa` in transformers makes a mask for
sliding windows, `eager` scores for all models; a model that does not use the attention functions
of transformers counts as its code is, with one sequence.)

Not counted: the CUDA context and what fragmentation wastes, for which `RESERVE` of the memory is
kept; the workspace of cuBLAS (up to 32 MiB); the float32 copies and casts of autocast; temporaries
of an optimizer that is not fused; dropout that a config leaves out; what other ranks hold.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from hf_fused_head.benchmark.columns import gibibytes
from hf_fused_head.benchmark.estimate import HeadShape, estimate
from hf_fused_head.benchmark.meta_training import KINDS, MetaTraining, Training
from hf_fused_head.benchmark.model_configs import CONFIGS
from hf_fused_head.benchmark.terminal import Grid
from hf_fused_head.options import FLOAT_DTYPES

# How near a plan is to the peak that torch's allocator measures.
TOLERANCE = 0.10
# Share of the memory that is kept for the CUDA context and for fragmentation.
RESERVE = 0.05

_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def memory_bytes(text: str) -> int:
    """Bytes of a size such as "24GiB", "80 GB" or "512M".

    Raises:
        ValueError: If it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if found is None or (found[3] and not found[2]) or float(found[1]) == 0:
        raise ValueError(
            f"`--memory` must be a size above 0 with its unit, such as 24GiB, got {text!r}"
        )
    # GiB and G are binary, as tools for GPUs use them; GB is decimal.
    decimal = found[2] and not found[3] and text.strip()[-1] in "bB"
    return int(float(found[1]) * (1000 if decimal else 1024) ** _UNITS[found[2].upper()])


def read_config(source: str) -> Any:
    """The config of a workload's model, a hub name, a folder or a config file.

    Raises:
        ValueError: If there is no such config or it describes no causal model.
    """
    from hf_fused_head.patches.meta_model import config_from, config_of

    if source in CONFIGS:
        return config_from(*CONFIGS[source])
    if not Path(source).exists() and (
        source.endswith(".json") or source.startswith((".", "/", "~"))
    ):
        raise ValueError(f"there is no file {source}")
    return config_of(source)


class StepMemory:
    """The memory of one kind of training, with the stock head and with the fused one.

    Args:
        config: Of transformers.
        dtype: Of the weights.
        training: How the model is trained.
        **head_options: Keywords of `estimate.estimate` for the fused head: device, card,
            implementation, budget.
    """

    def __init__(
        self, config: Any, dtype: torch.dtype, training: Training, **head_options: Any
    ) -> None:
        self.training = training
        self._model = MetaTraining(config, dtype, training)
        sizes, capped = self._model.head_sizes, self._model.softcap
        self._shape = HeadShape(type(config).__name__, *sizes, dtype, capped)
        self._head_options = {"frozen_head": training.kind == "lora", **head_options}

    def parts(self, head: str, num_tokens: int) -> dict[str, int]:
        """Bytes of a step by what holds them, and `total_bytes`, the peak of them together."""
        model = self._model
        fused = head == "fused"
        parts = {
            "weight_bytes": model.weight_bytes,
            "optimizer_bytes": model.optimizer_bytes,
            "activation_bytes": model.activation_bytes(num_tokens),
            "head_bytes": (self._fused_bytes if fused else model.stock_head_bytes)(num_tokens),
            "backward_bytes": model.backward_bytes(num_tokens),
        }
        at_head = parts["activation_bytes"] + parts["head_bytes"]
        held = parts["weight_bytes"] + parts["optimizer_bytes"]
        return {"total_bytes": held + max(at_head, parts["backward_bytes"]), **parts}

    def longest(self, head: str, available_bytes: int) -> int:
        """The most tokens whose step fits, 0 if not even one does."""

        def fits(num_tokens: int) -> bool:
            return self.parts(head, num_tokens)["total_bytes"] <= available_bytes

        if not fits(1):
            return 0
        low, high = 1, 2
        while fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def _fused_bytes(self, num_tokens: int) -> int:
        """Workspace and gradients of the schedule that the planner chooses."""
        plan = estimate(self._shape, num_tokens, **self._head_options)
        chosen = next(option for option in plan.schedules if option.chosen)
        return chosen.workspace_bytes + chosen.gradient_bytes


@dataclass(frozen=True)
class Request:
    """What `plan --memory` was asked.

    Attributes:
        model: Name or path of a config.
        memory_bytes: Of the card.
        dtype: Of the weights; None for what the config states, bfloat16 where it states nothing.
        kinds: "full", "lora"; empty for those that are possible.
        checkpointing: Whether layers are recomputed in the backward.
        optimizer_dtype: Of AdamW's states; None for that of each trained weight.
        load_in_4bit: Whether the linear layers of the body are quantised, which LoRA alone can be.
        lora_rank: Of the adapters.
    """

    model: str
    memory_bytes: int
    dtype: torch.dtype | None
    kinds: Sequence[str]
    checkpointing: bool
    optimizer_dtype: torch.dtype | None
    load_in_4bit: bool
    lora_rank: int

    @property
    def trainings(self) -> list[Training]:
        """The kinds of training to plan."""
        possible = KINDS[1:] if self.load_in_4bit else KINDS
        options = self.checkpointing, self.optimizer_dtype, self.load_in_4bit, self.lora_rank
        return [Training(kind, *options) for kind in self.kinds or possible]

    @cached_property
    def config(self) -> Any:
        """Of transformers."""
        return read_config(self.model)

    @property
    def weight_dtype(self) -> torch.dtype:
        """That of the weights."""
        stated = self.config.get_text_config().dtype or self.config.dtype
        return self.dtype or (stated if stated in FLOAT_DTYPES else torch.bfloat16)

    def document(self) -> dict[str, Any]:
        """The content of the JSON file, with no records yet."""
        return {
            "model": self.model,
            "dtype": _name(self.weight_dtype),
            "memory_bytes": self.memory_bytes,
            "available_bytes": int(self.memory_bytes * (1 - RESERVE)),
            "checkpointing": self.checkpointing,
            "optimizer_dtype": self.optimizer_dtype and _name(self.optimizer_dtype),
            "load_in_4bit": self.load_in_4bit,
            "lora_rank": self.lora_rank,
            "records": [],
        }

    def records(self, training: Training, head_options: dict[str, Any]) -> list[dict[str, Any]]:
        """The longest batch with the stock head and with the fused one.

        Where not even one token fits `max_tokens` is 0, and the bytes are those of one.
        """
        step = StepMemory(self.config, self.weight_dtype, training, **head_options)
        available = self.document()["available_bytes"]
        records = []
        for head in ("stock", "fused"):
            longest = step.longest(head, available)
            found = {"head": head, "training": training.kind, "max_tokens": longest}
            records.append({**found, "fits": longest > 0, **step.parts(head, max(1, longest))})
        return records


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def headline(content: dict) -> str:
    """Model, memory and how it is trained, in a line."""
    states = content["optimizer_dtype"] or "the weights' dtype"
    layers = "recomputed in the backward" if content["checkpointing"] else "kept for the backward"
    packed = ", body in 4 bits" if content["load_in_4bit"] else ""
    size = gibibytes(content["memory_bytes"])
    return (
        f"{content['model']}, {content['dtype']}{packed}: {size} GiB, {RESERVE:.0%} of it kept for "
        f"the CUDA context and fragmentation; activations {layers}; AdamW with states in {states}; "
        f"LoRA of rank {content['lora_rank']}"
    )


def table(content: dict) -> Grid:
    """The records of a document, for a terminal."""
    columns = (
        *("head", "training", "fits", "max tokens", "total", "weights", "AdamW"),
        *("saved", "at head", "backward"),
    )
    rows = [
        [
            record["head"],
            record["training"],
            "yes" if record["fits"] else "no",
            f"{record['max_tokens']:,}" if record["fits"] else "-",
            *(
                gibibytes(record[f"{part}_bytes"])
                for part in ("total", "weight", "optimizer", "activation", "head", "backward")
            ),
        ]
        for record in content["records"]
    ]
    title = "longest batch whose training step fits; GiB, saved: activations at the head's call"
    return Grid(title, columns, rows, words=("head", "training", "fits"), keys=2)
