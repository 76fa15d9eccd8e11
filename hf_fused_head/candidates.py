"""Logits of a few classes of every token, gathered: for the log-probabilities of K candidates.

A head's pass makes one logit a token and the log-sum-exp of all. The other candidates' logits are
dot products with their own rows of the head, and their gradients are sums over those rows alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from hf_fused_head.autograd import refuse_second_derivative
from hf_fused_head.distributed.vocab_parallel import VocabShard
from hf_fused_head.engines.protocol import Needs
from hf_fused_head.ops import HeadArguments, kept_rows
from hf_fused_head.options import accumulation_dtype
from hf_fused_head.records import flatten, schema_of, unflatten

# Memory for gathered rows: this part of the budget, as long as it holds one token's.
_BUDGET_PARTS = 8


def candidate_products(head: HeadArguments, needs: Needs) -> Tensor:
    """Products of hidden states and bias with the candidates' rows, 0 where they do not count.

    Args:
        head: The head, with candidates [T, K] as its labels and no scale of rows.
        needs: Which gradients may be asked for.

    Returns:
        [T, K] in the dtype of the statistics: logits before scale and softcap.
    """
    if not needs.any():
        return _candidate_products(*flatten(head.detached()))
    parameters = (*head.inputs, *head.weights, head.bias)
    return _CandidateProducts.apply(tuple(head[3:]), needs, len(head.inputs), *parameters)


class _CandidateProducts(Function):
    """Keeps the operands; the gradients are sums over the candidates' rows."""

    @staticmethod
    def forward(
        ctx: Any, rest: tuple[Any, ...], needs: Needs, pairs: int, *parameters: Any
    ) -> Tensor:
        """`parameters` are inputs, weights and bias, `rest` a head's other fields."""
        ctx.rest, ctx.needs, ctx.pairs = rest, needs, pairs
        ctx.has_bias = parameters[-1] is not None
        ctx.save_for_backward(*(t for t in parameters if t is not None))
        return _candidate_products(*flatten(_head(parameters, pairs, rest)))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        """As many gradients as parameters, in their dtypes."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            refuse_second_derivative()
        saved = list(ctx.saved_tensors)
        head = _head(saved if ctx.has_bias else [*saved, None], ctx.pairs, ctx.rest)
        grads = _candidate_grads(*flatten(head, ctx.needs), upstream)
        wanted = [*ctx.needs.inputs, *ctx.needs.weights, ctx.needs.bias]
        kept = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
        return None, None, None, *kept


def _head(parameters: Any, pairs: int, rest: tuple[Any, ...]) -> HeadArguments:
    *matrices, bias = parameters
    return HeadArguments(list(matrices[:pairs]), list(matrices[pairs:]), bias, *rest)


@torch.library.custom_op(
    "hf_fused_head::candidate_products",
    mutates_args=(),
    schema=f"({schema_of(head=HeadArguments)}) -> Tensor",
)
def _candidate_products(*arguments: Any) -> Tensor:
    (head,) = unflatten(arguments, HeadArguments)
    shard = head.shard("candidates")
    columns, here = _own_columns(head, shard)
    products = columns.new_empty(columns.shape, dtype=accumulation_dtype(head.inputs[0].dtype))
    for rows in _blocks(head):
        total = torch.zeros_like(products[rows])
        for hidden, weight in zip(head.inputs, head.weights, strict=True):
            gathered = weight[columns[rows]].to(products.dtype)
            total += (gathered * hidden[rows, None].to(products.dtype)).sum(dim=-1)
        if head.bias is not None:
            total += head.bias[columns[rows]].to(products.dtype)
        products[rows] = torch.where(here[rows], total, 0.0)
    return shard.sum(products)


@_candidate_products.register_fake
def _(*arguments: Any) -> Tensor:
    (head,) = unflatten(arguments, HeadArguments)
    dtype = accumulation_dtype(head.inputs[0].dtype)
    return torch.empty(head.labels.shape, dtype=dtype, device=head.labels.device)


@torch.library.custom_op(
    "hf_fused_head::candidate_grads",
    mutates_args=(),
    schema=f"({schema_of(head=HeadArguments, needs=Needs)}, Tensor upstream) -> Tensor[]",
)
def _candidate_grads(*arguments: Any) -> list[Tensor]:
    *values, upstream = arguments
    head, needs = unflatten(values, HeadArguments, Needs)
    shard = head.shard("candidates", *needs)
    columns, here = _own_columns(head, shard)
    upstream = torch.where(here, upstream, 0.0)
    dtype = upstream.dtype
    dinputs, dweights = [], []
    for index, (hidden, weight) in enumerate(zip(head.inputs, head.weights, strict=True)):
        dhidden, dweight = hidden.new_empty(0), weight.new_empty(0)
        if needs.inputs[index]:
            total = torch.empty(hidden.shape, dtype=dtype, device=hidden.device)
            for rows in _blocks(head):
                gathered = weight[columns[rows]].to(dtype)
                total[rows] = (gathered * upstream[rows, :, None]).sum(dim=1)
            dhidden = shard.sum_hidden(total).to(hidden.dtype)
        if needs.weights[index]:
            dweight = _weight_gradient(head, hidden, weight, columns, upstream)
        dinputs.append(dhidden)
        dweights.append(dweight)
    first = head.inputs[0]
    dbias = first.new_empty(0)
    if needs.bias and head.bias is not None:
        total = torch.zeros(head.bias.shape, dtype=dtype, device=first.device)
        total.index_add_(0, columns.reshape(-1), upstream.reshape(-1))
        dbias = total.to(head.bias.dtype)
    return [*dinputs, *dweights, dbias]


@_candidate_grads.register_fake
def _(*arguments: Any) -> list[Tensor]:
    head, needs = unflatten(arguments[:-1], HeadArguments, Needs)
    return head.empty_grads(torch.empty, needs, widen=False)


def _weight_gradient(
    head: HeadArguments, hidden: Tensor, weight: Tensor, columns: Tensor, upstream: Tensor
) -> Tensor:
    """The candidates' terms of a weight's gradient: window by window, in float32."""
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    num_tokens, num_candidates = columns.shape
    tokens = torch.arange(num_tokens, device=columns.device).repeat_interleave(num_candidates)
    flat, factors = columns.reshape(-1), upstream.reshape(-1)
    step = _rows_within(head, weight.shape[1])
    for first in range(0, weight.shape[0], step):
        part = result[first : first + step]
        total = torch.zeros(part.shape, dtype=upstream.dtype, device=part.device)
        inside = ((flat >= first) & (flat < first + step) & (factors != 0)).nonzero()[:, 0]
        for entries in inside.split(step):
            terms = factors[entries, None] * hidden[tokens[entries]].to(upstream.dtype)
            total.index_add_(0, flat[entries] - first, terms)
        part.copy_(total)
    return result


def _own_columns(head: HeadArguments, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """The candidates' rows of this rank's head, [T, K], 0 where there is none, and where they are.

    Raises:
        ValueError: If a candidate that counts is no class.
    """
    local_vocab_size = head.weights[0].shape[0]
    kept_rows(head.labels, head.ignore_index, shard.total(local_vocab_size))
    columns = shard.columns_of(head.labels, local_vocab_size)
    here = (head.labels != head.ignore_index) & (columns >= 0) & (columns < local_vocab_size)
    return torch.where(here, columns, 0), here


def _blocks(head: HeadArguments) -> Iterator[slice]:
    """Tokens whose gathered rows are held at once: a part of the budget."""
    num_tokens, num_candidates = head.labels.shape
    width = max(weight.shape[1] for weight in head.weights)
    step = _rows_within(head, num_candidates * width)
    for start in range(0, num_tokens, step):
        yield slice(start, min(start + step, num_tokens))


def _rows_within(head: HeadArguments, width: int) -> int:
    """Rows of a matrix of so many columns that a part of the budget holds, at least one."""
    row_bytes = width * accumulation_dtype(head.inputs[0].dtype).itemsize
    return max(head.budget_bytes // (_BUDGET_PARTS * row_bytes), 1)
