"""The divergence of two heads as one opaque torch operator, with a fake.

Tokens that do not count are dropped here before an engine sees them, and put back after; the
schedule is planned here. The derivative is attached in `divergence.autograd`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_fused_head.distributed.vocab_parallel import WHOLE, Terms, VocabShard, agree
from hf_fused_head.engines import reference_divergence
from hf_fused_head.engines.protocol import DivergenceEngine, DivergenceNeeds, HeadPair, Operands
from hf_fused_head.engines.select import Choice
from hf_fused_head.engines.torch_engine import divergence as torch_divergence
from hf_fused_head.options import accumulation_dtype
from hf_fused_head.planning.cards import card_of
from hf_fused_head.planning.divergence import DivergenceProblem, plan_divergence
from hf_fused_head.planning.schedule import Schedule
from hf_fused_head.records import flatten, schema_of, unflatten
from hf_fused_head.run_record import note_engine, note_schedule


class PairArguments(NamedTuple):
    """Two heads, as the operator takes them first; the temperature is in scales and softcaps."""

    student: Tensor  # [T, H]
    student_weight: Tensor  # [local V, H]
    student_bias: Tensor | None  # [local V]
    teacher: Tensor  # [T, H']
    teacher_weight: Tensor  # [local V, H']
    teacher_bias: Tensor | None  # [local V]
    mask: Tensor | None  # [T], bool
    beta: float
    student_scale: float
    student_softcap: float | None
    teacher_scale: float
    teacher_softcap: float | None
    impl: str
    budget_bytes: int
    group: str  # name of a process group; "" for heads on one rank

    @property
    def dtype(self) -> torch.dtype:
        """Of logits, sums and losses."""
        dtypes = self.student.dtype, self.teacher.dtype
        wide = torch.float64 in map(accumulation_dtype, dtypes)
        return torch.float64 if wide else torch.float32

    def kept_rows(self) -> Tensor | None:
        """The tokens that count, int64; None for all. One wait for the device with a mask."""
        if self.mask is None:
            return None
        rows = self.mask.nonzero()[:, 0]
        return None if rows.shape[0] == self.mask.shape[0] else rows

    def shard(self, *wanted: Any) -> VocabShard:
        """This rank's shard of both heads; ranks that mean different divergences all raise."""
        if not self.group:
            return WHOLE
        hidden = self.student, self.teacher
        biases = self.student_bias, self.teacher_bias
        mask = self.mask
        if mask is None:
            mask = torch.zeros(0, dtype=torch.bool, device=self.student.device)
        terms = Terms(
            input=[(tuple(t.shape), t.dtype) for t in hidden],
            weight=self.mask is not None,
            linear_bias=[bias is not None for bias in biases],
            options=self[7:-1],
            wanted=wanted,
        )
        rows = self.student_weight.shape[0]
        return agree(self.group, rows, mask.long(), terms, names=_NAMES)

    def heads(self, rows: Tensor | None, shard: VocabShard) -> HeadPair:
        """What an engine takes: matrices with a stride of 1, at the tokens that count."""
        student = _operands(
            rows,
            self.student,
            self.student_weight,
            self.student_bias,
            self.student_scale,
            self.student_softcap,
            shard,
        )
        teacher = _operands(
            rows,
            self.teacher,
            self.teacher_weight,
            self.teacher_bias,
            self.teacher_scale,
            self.teacher_softcap,
            shard,
        )
        return HeadPair(student, teacher, self.beta, self.dtype)

    def schedule(self, heads: HeadPair, needs: DivergenceNeeds, keep_half: bool) -> Schedule:
        """The plan for these heads."""
        num_tokens = heads.student.inputs[0].shape[0]
        problem = DivergenceProblem(
            num_tokens=num_tokens,
            vocab_size=heads.student.shard.largest(self.student_weight.shape[0]),
            student_size=self.student.shape[1],
            teacher_size=self.teacher.shape[1],
            student_dtype=self.student.dtype,
            teacher_dtype=self.teacher.dtype,
            dtype=self.dtype,
            impl=self.impl,
            card=card_of(self.student.device),
            grad_hidden=needs.student,
            grad_weight=needs.weight or needs.bias,
            softcap=self.student_softcap is not None,
            mixture=0 < self.beta < 1,
            widened=keep_half and self.student.dtype == torch.float16,
            budget_bytes=self.budget_bytes,
        )
        schedule = plan_divergence(problem)
        note_schedule(schedule)
        return schedule

    def empty(
        self, make: Callable[..., Tensor], needs: DivergenceNeeds, keep_half: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Results, made by `torch.empty` or `torch.zeros`; [0] where not needed."""
        device, num_tokens = self.student.device, self.student.shape[0]
        per_token = make(num_tokens, dtype=self.dtype, device=device)
        entropy = make(num_tokens if needs.entropy else 0, dtype=self.dtype, device=device)
        half = keep_half and self.student.dtype == torch.float16
        dtype = torch.float32 if half else self.student.dtype
        shapes = self.student.shape, self.student_weight.shape, self.student_weight.shape[:1]
        grads = [
            make(shape if need else (0,), dtype=dtype, device=device)
            for shape, need in zip(shapes, needs[:3], strict=True)
        ]
        return per_token, entropy, grads


class Upstream(NamedTuple):
    """What the gradients are those of."""

    row_weight: Tensor  # [T], the factor of each token in the sum; [0] without gradients
    keep_half: bool  # float16 gradients stay in float32, for a loss scale that arrives later


# What the ranks of a group must agree on, for messages; the last is what `agree` takes as labels.
_NAMES = (
    "shape and dtype of `student` and `teacher`",
    "presence of `mask`",
    "presence of `student_bias` and `teacher_bias`",
    "options of the divergence",
    "tensors that require grad and wanted statistics",
    "`mask`",
)
_ENGINES: dict[str, DivergenceEngine] = {
    "reference": reference_divergence,
    "torch": torch_divergence,
}


def _operands(
    rows: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    shard: VocabShard,
) -> Operands:
    kept = hidden if rows is None else hidden.index_select(0, rows)
    matrices = [t if 1 in t.stride() else t.contiguous() for t in (kept, weight)]
    return Operands(matrices[:1], matrices[1:], bias, None, scale, softcap, shard)


@torch.library.custom_op(
    "hf_fused_head::divergence",
    mutates_args=(),
    schema=f"({schema_of(heads=PairArguments, upstream=Upstream, needs=DivergenceNeeds)})"
    " -> (Tensor per_token, Tensor entropy, Tensor[] grads)",
)
def _divergence(*arguments: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    pair, upstream, needs = unflatten(arguments, PairArguments, Upstream, DivergenceNeeds)
    note_engine(Choice(pair.impl, f"impl={pair.impl!r} computes the divergence on any device"))
    shard = pair.shard(*needs)
    rows = pair.kept_rows()
    num_tokens = pair.student.shape[0]
    if num_tokens == 0 or (rows is not None and rows.shape[0] == 0):
        note_schedule(None)
        return pair.empty(torch.zeros, needs, upstream.keep_half)
    heads = pair.heads(rows, shard)
    row_weight = upstream.row_weight
    if rows is not None and row_weight.shape[0]:
        row_weight = row_weight.index_select(0, rows)
    schedule = pair.schedule(heads, needs, upstream.keep_half)
    # An operator's body runs under the caller's autocast, which would round its products.
    with torch.autocast(pair.student.device.type, enabled=False):
        per_token, entropy, grads = _ENGINES[pair.impl].divergence(
            heads, row_weight, needs, schedule, upstream.keep_half
        )
    if rows is None:
        return per_token, entropy, grads
    dstudent, *others = grads
    per_token, entropy, dstudent = (
        value.new_zeros((num_tokens, *value.shape[1:])).index_copy_(0, rows, value)
        if value.shape[0]
        else value
        for value in (per_token, entropy, dstudent)
    )
    return per_token, entropy, [dstudent, *others]


@_divergence.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    pair, upstream, needs = unflatten(arguments, PairArguments, Upstream, DivergenceNeeds)
    return pair.empty(torch.empty, needs, upstream.keep_half)


def divergence(
    pair: PairArguments, upstream: Upstream, needs: DivergenceNeeds
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The divergence and entropy per token, 0 where masked, and the gradients of a weighted sum.

    Args:
        pair: Both heads.
        upstream: The weights of the sum.
        needs: Which gradients, and whether the entropy; the others are [0].
    """
    return _divergence(*flatten(pair, upstream, needs))
