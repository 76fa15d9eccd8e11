"""What a head costs before it runs: memory and passes, stock and fused, from shapes alone."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hf_fused_head.benchmark.columns import mebibytes
from hf_fused_head.benchmark.terminal import Grid
from hf_fused_head.benchmark.workloads import WORKLOADS
from hf_fused_head.engines.select import HOW, Choice, product_on, resolve_impl
from hf_fused_head.options import FLOAT_DTYPES
from hf_fused_head.planning.cards import Card, card_named, card_of_type, too_old
from hf_fused_head.planning.problem import DEFAULT_MEMORY_BUDGET_MIB, Problem, budget_bytes
from hf_fused_head.planning.schedule import schedules


@dataclass(frozen=True)
class HeadShape:
    """The head of a model.

    Attributes:
        name: What the caller asked for.
        hidden_size: H, columns of the head.
        vocab_size: V, rows of the head.
        dtype: Dtype of the weights, as the source states it.
        softcap: Whether the logits are capped.
    """

    name: str
    hidden_size: int
    vocab_size: int
    dtype: torch.dtype
    softcap: bool = False


@dataclass(frozen=True)
class Option:
    """One way to run the head; `schedule` is "stock" for the head that stores its logits.

    `fits` says whether the workspace is within the memory budget.
    """

    schedule: str
    chosen: bool
    passes: float
    workspace_bytes: int
    gradient_bytes: int
    chunk_tokens: int
    vocab_window: int
    fits: bool
    reason: str


@dataclass(frozen=True)
class Estimate:
    """Every way to run one head on one batch."""

    shape: HeadShape
    num_tokens: int
    impl: str
    impl_reason: str
    stock: Option
    schedules: list[Option]

    def document(self) -> dict:
        """The content of the JSON file: the head, the stock cost, and one record a schedule."""
        shape = self.shape
        return {
            "model": shape.name,
            "num_tokens": self.num_tokens,
            "hidden_size": shape.hidden_size,
            "vocab_size": shape.vocab_size,
            "dtype": str(shape.dtype).removeprefix("torch."),
            "impl": self.impl,
            "impl_reason": self.impl_reason,
            "stock_logits_bytes": stock_logits_bytes(shape, self.num_tokens),
            "stock": asdict(self.stock),
            "schedules": [asdict(option) for option in self.schedules],
        }


def read_shape(source: str, dtype: torch.dtype | None = None) -> HeadShape:
    """The head of a built-in workload, a config file, a model folder, or a model of the hub.

    Args:
        source: Name or path.
        dtype: Of the weights; None for what the source states, bfloat16 where it states nothing.

    Raises:
        ValueError: If there is no such source or it describes no causal head.
    """
    if source in WORKLOADS:
        workload = WORKLOADS[source]
        stated = getattr(torch, workload.dtype)
        return HeadShape(source, workload.hidden_size, workload.vocab_size, dtype or stated)
    path = Path(source)
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        config = _read(file)
        sizes = _plain_sizes(file, config)
        if sizes is not None:
            _check_causal_head(source, config)
            return HeadShape(source, *sizes[:2], dtype or sizes[2] or torch.bfloat16)
    elif path.is_dir() or file.suffix == ".json" or source.startswith((".", "/", "~")):
        raise ValueError(f"there is no file {file}")
    # A config that leaves sizes to the defaults of its class, nests them, or renames them.
    from hf_fused_head.patches.head_shape import head_size

    hidden_size, vocab_size, stated = head_size(source)
    return HeadShape(source, hidden_size, vocab_size, dtype or stated or torch.bfloat16)


def _read(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not a JSON file: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} is not a model config: it holds no object")
    return config


def _plain_sizes(file: Path, config: dict[str, Any]) -> tuple[int, int, torch.dtype | None] | None:
    """Sizes that the file states at its top level; None if it does not."""
    hidden_size, vocab_size = config.get("hidden_size"), config.get("vocab_size")
    if not isinstance(hidden_size, int) or not isinstance(vocab_size, int):
        return None
    if hidden_size < 1 or vocab_size < 1:
        raise ValueError(f"{file} must state positive sizes, got {hidden_size} and {vocab_size}")
    stated = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return hidden_size, vocab_size, stated if stated in FLOAT_DTYPES else None


def _check_causal_head(source: str, config: dict[str, Any]) -> None:
    """Refuses an encoder, where transformers is there to know the model's type."""
    if "model_type" in config and importlib.util.find_spec("transformers") is not None:
        from hf_fused_head.patches.head_shape import check_causal_head

        check_causal_head(source, config)


def stock_logits_bytes(shape: HeadShape, num_tokens: int) -> int:
    """The logits that the stock head returns, [tokens, vocab] in the dtype of the model."""
    return num_tokens * shape.vocab_size * shape.dtype.itemsize


def estimate(
    shape: HeadShape,
    num_tokens: int,
    *,
    device_type: str,
    card: str | None = None,
    impl: str = "auto",
    frozen_head: bool = False,
    per_token: bool = False,
    memory_budget_mib: int | None = None,
    shared_hidden: bool = False,
) -> Estimate:
    """The stock head beside every schedule of the fused one.

    Args:
        shape: The head.
        num_tokens: Tokens of a step whose label counts.
        device_type: "cuda" or "cpu".
        card: Name of a card that need not be here; None for a device of that type.
        impl: As in `linear_cross_entropy`.
        frozen_head: Whether the head gets no gradient.
        per_token: Whether the upstream gradient arrives per token (`reduction="none"`).
        memory_budget_mib: As in `linear_cross_entropy`.
        shared_hidden: Whether the head is one rank's rows of a larger one.

    Raises:
        ValueError: If there is no such `impl`, or no such card is known.
        NotImplementedError: If the named `impl` does not support device or dtype.
    """
    record = card_of_type(device_type) if card is None else card_named(card)
    choice = _choice(impl, record, shape.dtype, known=card is not None)
    problem = Problem(
        num_tokens=num_tokens,
        hidden_size=shape.hidden_size,
        vocab_size=shape.vocab_size,
        dtype=shape.dtype,
        impl=choice.impl,
        card=record,
        product=choice.product,
        grad_weight=not frozen_head,
        per_token=per_token,
        softcap=shape.softcap,
        sums_hidden=shared_hidden,
        budget_bytes=budget_bytes(memory_budget_mib),
    )
    candidates = schedules(problem)
    chosen = candidates[0]
    options = [
        Option(
            candidate.name,
            candidate == chosen,
            candidate.passes,
            candidate.workspace_bytes,
            candidate.gradient_bytes,
            candidate.chunk_tokens,
            candidate.vocab_window,
            candidate.fits,
            candidate.reason,
        )
        for candidate in candidates
    ]
    stock = _stock(shape, num_tokens, chosen.gradient_bytes, frozen_head, memory_budget_mib)
    return Estimate(shape, num_tokens, choice.name, choice.reason, stock, options)


def _choice(impl: str, card: Card, dtype: torch.dtype, known: bool) -> Choice:
    """What `impl` means on a card; one that was named, or is not here, cannot be asked itself."""
    here = not known and (card.device_type != "cuda" or torch.cuda.is_available())
    if not here and impl in ("auto", "triton") and dtype != torch.float64:
        obstacle = too_old(card, dtype)
        if obstacle is not None and impl == "triton":
            raise NotImplementedError(
                f"`impl` must support the card, got 'triton': {obstacle}; use impl='auto'"
            )
        if obstacle is not None:
            return Choice("torch", f"the Triton kernels cannot be used: {obstacle}")
        product = product_on(card, dtype)
        what = f"{card.name}, which need not be here: {HOW[product]}"
        return Choice("triton", f"planned for {what}", product)
    return resolve_impl(impl, card.device_type, dtype)


def _stock(
    shape: HeadShape,
    num_tokens: int,
    gradient_bytes: int,
    frozen_head: bool,
    memory_budget_mib: int | None,
) -> Option:
    # At the peak, in backward, three float32 copies are alive: the log-softmax that was saved, the
    # gradient that reaches it, and the gradient that leaves it.
    workspace_bytes = 3 * 4 * num_tokens * shape.vocab_size
    mib = DEFAULT_MEMORY_BUDGET_MIB if memory_budget_mib is None else memory_budget_mib
    fits = workspace_bytes <= mib * 2**20
    return Option(
        schedule="stock",
        chosen=False,
        passes=2.0 if frozen_head else 3.0,
        workspace_bytes=workspace_bytes,
        gradient_bytes=gradient_bytes,
        chunk_tokens=num_tokens,
        vocab_window=shape.vocab_size,
        fits=fits,
        reason="stores the logits; log-softmax and two gradients in float32 at the peak; "
        f"{'within' if fits else 'more than'} the budget of {mib:,.1f} MiB",
    )


def headline(content: dict) -> str:
    """Model, batch and implementation of a document in one line."""
    return (
        f"{content['model']}: {content['num_tokens']} tokens, hidden {content['hidden_size']}, "
        f"vocabulary {content['vocab_size']}, {content['dtype']}; "
        f"stock logits {mebibytes(content['stock_logits_bytes'])} MiB; "
        f"impl {content['impl']}: {content['impl_reason']}"
    )


def rank_line(rank: dict) -> str:
    """What one rank of many has beside its schedules, in one line; see `scaling`."""

    def mib(*names: str) -> str:
        return mebibytes(sum(rank[f"{name}_bytes"] for name in names))

    return (
        f"one of {rank['ranks']} ranks: {rank['rows']} rows, {rank['tokens']} tokens; holds "
        f"{mib('held_weight')} MiB of weights and {mib('held_gradient')} MiB of their gradient, "
        f"gathers {mib('gathered_weight')} MiB; sends in a step "
        f"{mib('sent_vocabulary')} MiB for the vocabulary, "
        f"{mib('sent_weight', 'sent_gradient')} MiB for weights and gradient"
    )


def table(content: dict) -> Grid:
    """The stock head and every schedule of a document, for a terminal."""
    columns = (
        "schedule",
        "chosen",
        "passes",
        "workspace MiB",
        "gradients MiB",
        "chunk tokens",
        "vocab window",
        "fits",
        "reason",
    )
    rows = [
        [
            option["schedule"],
            "yes" if option["chosen"] else "",
            f"{option['passes']:.2f}",
            mebibytes(option["workspace_bytes"]),
            mebibytes(option["gradient_bytes"]),
            str(option["chunk_tokens"]),
            str(option["vocab_window"]),
            "yes" if option["fits"] else "no",
            option["reason"],
        ]
        for option in (content["stock"], *content["schedules"])
    ]
    words = ("schedule", "chosen", "fits", "reason")
    return Grid("one training step of the head", columns, rows, words=words)
