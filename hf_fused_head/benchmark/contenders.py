"""Who is compared: each contender is a function from a batch to loss and gradients.

The adapters of other projects are written from their documented interfaces. A contender that
cannot run says why and stays in the table.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_fused_head.benchmark.accuracy import Result
from hf_fused_head.benchmark.workloads import IGNORE_INDEX, Batch
from hf_fused_head.engines.select import Choice, resolve_impl, triton_obstacle
from hf_fused_head.functional import linear_cross_entropy
from hf_fused_head.planning.cards import card_of
from hf_fused_head.planning.problem import Problem, budget_bytes
from hf_fused_head.planning.schedule import Schedule, plan, schedules

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MODES = ("fwd", "fwd+bwd", "frozen")

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Step = Callable[[], Result]


# What a contender may die of without ending the run: its row says what it was.
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


class Unavailable(Exception):
    """A contender cannot run here; the message says why, `status` is the table's entry."""

    def __init__(self, reason: str, status: str = "unavailable") -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Entrant:
    """A contender ready to be entered into a case.

    Attributes:
        name: Label in the table.
        about: One line for people.
        prepare: Takes batch and mode, gives the function that is timed; raises `Unavailable`.
        impl: Ours only: the implementation that is asked for.
        budget_mib: Ours only: the workspace it may use; None for the default.
        group: Ours only: the ranks that share the vocabulary; None for a whole head.
    """

    name: str
    about: str
    prepare: Callable[[Batch, str], Step]
    impl: str | None = None
    budget_mib: int | None = None
    group: ProcessGroup | None = None

    @property
    def is_ours(self) -> bool:
        """Whether it is this project's head, which must pass every check."""
        return self.impl is not None


def _by_autograd(make_loss: Callable[[Batch], Loss]) -> Callable[[Batch, str], Step]:
    """The step of a contender that is a differentiable loss of (hidden, weight, labels)."""

    def prepare(batch: Batch, mode: str) -> Step:
        loss_function = make_loss(batch)

        def step() -> Result:
            if mode == "fwd":
                with torch.no_grad():
                    return Result(
                        loss_function(batch.hidden, batch.weight, batch.labels), None, None
                    )
            hidden = batch.hidden.detach().requires_grad_(True)
            weight = batch.weight.detach().requires_grad_(mode == "fwd+bwd")
            loss = loss_function(hidden, weight, batch.labels)
            loss.backward()
            return Result(loss.detach(), hidden.grad, weight.grad)

        return step

    return prepare


def require(module: str, package: str, device: torch.device) -> None:
    """Whether another project's kernels can run.

    Raises:
        Unavailable: If it is not installed, or the device is no GPU.
    """
    if importlib.util.find_spec(module) is None:
        raise Unavailable(f"pip install {package}", status="not installed")
    if device.type != "cuda":
        raise Unavailable("needs CUDA")


def ours(
    impl: str = "auto", budget_mib: int | None = None, group: ProcessGroup | None = None
) -> Entrant:
    """Our head with one implementation and one budget; with a group, of its rank's rows."""

    def make_loss(batch: Batch) -> Loss:
        if impl.startswith("triton"):
            obstacle = triton_obstacle(batch.hidden.device.type, batch.hidden.dtype)
            if obstacle is not None:
                raise Unavailable(obstacle)
        options: Any = {"impl": impl, "memory_budget_mib": budget_mib, "process_group": group}
        return lambda hidden, weight, labels: linear_cross_entropy(
            hidden, weight, labels, **options
        )

    name = "ours" if impl == "auto" else f"ours:{impl.removeprefix('triton:')}"
    name += "" if budget_mib is None else f"@{budget_mib}"
    return Entrant(name, "this project's head", _by_autograd(make_loss), impl, budget_mib, group)


def _stock_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX)


def _prepare_floor(batch: Batch, mode: str) -> Step:
    """The products alone, on the tokens that count, into buffers made beforehand."""
    hidden = batch.hidden
    if batch.num_valid < len(hidden):
        hidden = hidden[batch.labels != IGNORE_INDEX]
    weight = batch.weight
    logits = hidden.new_empty(len(hidden), len(weight))  # [N, V]
    dhidden = torch.empty_like(hidden)  # [N, H]
    dweight = torch.empty_like(weight) if mode == "fwd+bwd" else None  # [V, H]
    no_loss = hidden.new_full((), float("nan"))

    def step() -> Result:
        # The logits take the place of their gradient: a product with either costs the same.
        torch.mm(hidden, weight.t(), out=logits)
        if mode != "fwd":
            torch.mm(logits, weight, out=dhidden)
        if dweight is not None:
            torch.mm(logits.t(), hidden, out=dweight)
        return Result(no_loss, None, None)

    return step


def _compiled_loss(batch: Batch) -> Loss:
    if batch.hidden.device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise Unavailable("needs a C++ compiler")
    # The cache belongs to the function: after eight cases it would silently run uncompiled.
    torch.compiler.reset()
    return torch.compile(_stock_loss, dynamic=False)


def _torch_loss(batch: Batch) -> Loss:
    function = getattr(F, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options is None:
        raise Unavailable(f"not in torch {torch.__version__}")
    return lambda hidden, weight, labels: function(
        hidden, weight, labels, ignore_index=IGNORE_INDEX, options=options()
    )


def _liger_loss(batch: Batch, accum_dtype: torch.dtype | None = None) -> Loss:
    require("liger_kernel", "liger-kernel", batch.hidden.device)
    module = importlib.import_module("liger_kernel.transformers")
    criterion = module.LigerFusedLinearCrossEntropyLoss(
        ignore_index=IGNORE_INDEX, accum_dtype=accum_dtype
    )
    return lambda hidden, weight, labels: criterion(weight, hidden, labels)


def _cce_loss(batch: Batch, filter_eps: str | None = "high") -> Loss:
    require("cut_cross_entropy", "cut-cross-entropy", batch.hidden.device)
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda hidden, weight, labels: function(
        hidden, weight, labels, ignore_index=IGNORE_INDEX, filter_eps=filter_eps
    )


def trl_loss(device: torch.device) -> Loss:
    """TRL's head on a GPU; `Unavailable` without."""
    require("trl", "trl", device)
    function = importlib.import_module("trl.kernels").ChunkedLogProbFunction

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        kept = labels != IGNORE_INDEX
        # No bias, temperature 1, tiles of 32768 columns as TRL 1.16's own head asks for, no cap,
        # scale 1, and none of the optional statistics.
        outputs = function.apply(
            hidden[kept], weight, None, labels[kept], 1.0, 32768, None, 1.0, ()
        )
        return -outputs[0].sum() / kept.sum()

    return loss


def _quack_loss(batch: Batch) -> Loss:
    require("quack", "quack-kernels", batch.hidden.device)
    if batch.hidden.dtype != torch.bfloat16:
        raise Unavailable("needs bfloat16")
    if torch.cuda.get_device_capability(batch.hidden.device)[0] < 9:
        raise Unavailable("needs compute capability 9.0")
    if len(batch.weight) % 128:
        raise Unavailable(f"needs a vocabulary that 128 divides, got {len(batch.weight)}")
    function = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    # Its default, 4096 tokens, where 0.6.5 can tell them from the hidden size; else twice as many.
    chunk_size = 4096 if batch.hidden.shape[1] != 4096 else 8192
    return lambda hidden, weight, labels: function(
        hidden, weight, labels, chunk_size=chunk_size, ignore_index=IGNORE_INDEX
    )


# Distributions whose versions the header of a result names.
PEER_PACKAGES = ("liger-kernel", "cut-cross-entropy", "trl", "quack-kernels")
FLOOR = Entrant("floor", "the bare matrix products", _prepare_floor)
_OTHERS = {
    entrant.name: entrant
    for entrant in (
        FLOOR,
        Entrant(
            "stock", "linear, float32 upcast, cross_entropy", _by_autograd(lambda _: _stock_loss)
        ),
        Entrant("compile", "torch.compile of stock", _by_autograd(_compiled_loss)),
        Entrant("torch", "F.linear_cross_entropy, chunked", _by_autograd(_torch_loss)),
        Entrant("liger", "Liger Kernel", _by_autograd(_liger_loss)),
        Entrant(
            "liger-fp32",
            "Liger Kernel, float32 accumulation",
            _by_autograd(lambda batch: _liger_loss(batch, torch.float32)),
        ),
        Entrant("cce", "Cut Cross-Entropy, its default filter", _by_autograd(_cce_loss)),
        Entrant(
            "cce-exact",
            "Cut Cross-Entropy, no filter",
            _by_autograd(lambda batch: _cce_loss(batch, None)),
        ),
        Entrant(
            "trl", "TRL's fused head", _by_autograd(lambda batch: trl_loss(batch.hidden.device))
        ),
        Entrant("quack", "QuACK", _by_autograd(_quack_loss)),
    )
}
OUR_IMPLS = {
    "ours": "auto",
    "ours:triton": "triton",
    "ours:epilogue": "triton:epilogue",
    "ours:tile": "triton:tile",
    "ours:torch": "torch",
    "ours:reference": "reference",
}
CONTENDERS = (*OUR_IMPLS, *_OTHERS)
DEFAULT_CONTENDERS = ("floor", "ours", *(name for name in _OTHERS if name != "floor"))


def entrants(names: list[str], budgets_mib: list[int]) -> list[Entrant]:
    """Entrants by name; ours once a budget.

    Args:
        names: Of `CONTENDERS`; `ours[:impl]@MIB` sets a budget of its own.
        budgets_mib: For ours without one of its own; empty for the default.

    Raises:
        ValueError: If a name or a budget is not known, or there is none.
    """
    if not names:
        raise ValueError(f"`contender` must be one of {', '.join(CONTENDERS)}, got none")
    found: list[Entrant] = []
    for name in names:
        base, _, budget = name.partition("@")
        if name in _OTHERS:
            found.append(_OTHERS[name])
        elif base not in OUR_IMPLS:
            raise ValueError(
                f"`contender` must be one of {', '.join(CONTENDERS)}, got {name!r}: "
                "ours takes a budget as in ours@4096"
            )
        elif budget:
            found.append(ours(OUR_IMPLS[base], _budget(budget)))
        else:
            found.extend(ours(OUR_IMPLS[base], mib) for mib in budgets_mib or [None])
    return list({entrant.name: entrant for entrant in found}.values())


def _budget(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"`contender` must name a budget in whole MiB, got {text!r}: ours@4096")
    return int(text)


def choice_of(entrant: Entrant, batch: Batch) -> Choice:
    """The implementation that ours uses for the batch."""
    hidden = batch.hidden
    return resolve_impl(entrant.impl or "auto", hidden.device, hidden.dtype)


def schedule_of(entrant: Entrant, batch: Batch, mode: str) -> Schedule | None:
    """The schedule that ours will follow for the batch; None for other contenders."""
    if entrant.impl is None:
        return None
    return plan(_problem(entrant, batch, mode))


def every_schedule(entrant: Entrant, batch: Batch, mode: str) -> list[Entrant]:
    """Ours once for every schedule that some budget leads to; other contenders as they are."""
    if entrant.impl is None:
        return [entrant]
    try:
        problem = _problem(entrant, batch, mode)
    except NotImplementedError:
        return [entrant]
    chosen = {}
    for candidate in schedules(problem):
        budget = max(1, -(-candidate.workspace_bytes // 2**20))
        schedule = plan(replace(problem, budget_bytes=budget_bytes(budget)))
        key = (schedule.name, schedule.chunk_tokens, schedule.vocab_window)
        chosen.setdefault(key, ours(entrant.impl, budget))
    return [replace(entry, name=f"{entry.name} {name}") for (name, _, _), entry in chosen.items()]


def _problem(entrant: Entrant, batch: Batch, mode: str) -> Problem:
    hidden, choice = batch.hidden, choice_of(entrant, batch)
    return Problem(
        num_tokens=batch.num_valid,
        hidden_size=hidden.shape[1],
        vocab_size=len(batch.weight),
        dtype=hidden.dtype,
        impl=choice.impl,
        product=choice.product,
        card=card_of(hidden.device),
        grad_hidden=mode != "fwd",
        grad_weight=mode == "fwd+bwd",
        sums_hidden=entrant.group is not None and entrant.group.size() > 1,
        budget_bytes=budget_bytes(entrant.budget_mib),
    )
