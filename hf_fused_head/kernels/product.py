"""A tile of logits in registers: raster order, products, bias, scale and softcap."""

from __future__ import annotations

import triton
import triton.language as tl

from hf_fused_head.kernels.arguments import MatrixPair

LOG2E = tl.constexpr(1.4426950408889634)
# tanh(x) = x + x^3 (a0 + a1 x^2 + ...), fitted for |x| below the limit; 8e-8 off in float32.
_SMALL = tl.constexpr(0.625)
_TANH_0 = tl.constexpr(-0.33333287133484774)
_TANH_1 = tl.constexpr(0.13331561137604925)
_TANH_2 = tl.constexpr(-0.053748442015715166)
_TANH_3 = tl.constexpr(0.020664723683180144)
_TANH_4 = tl.constexpr(-0.005731194759831765)


@triton.jit
def tile_position(tile, num_tiles_t, num_tiles_v, GROUP_T: tl.constexpr):
    """Linear tile number to (pid_t, pid_v): `GROUP_T` row tiles share a weight tile in L2."""
    tiles_per_group = GROUP_T * num_tiles_v
    group = tile // tiles_per_group
    first_t = group * GROUP_T
    rows = min(num_tiles_t - first_t, GROUP_T)
    within = tile % tiles_per_group
    return first_t + within % rows, within // rows


@triton.jit
def accumulate_product(
    acc,
    pair,
    offs_t,
    offs_v,
    num_tokens,
    local_vocab_size,
    BLOCK_H: tl.constexpr,
    EVEN_H: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Adds `hidden[offs_t] @ weight[offs_v].T` of a `MatrixPair` to `acc`.

    Offsets outside the matrices read row 0. `EVEN_H` states that `BLOCK_H` divides the pair's size;
    `UPCAST` multiplies in float32, which the interpreter needs.
    """
    pair = MatrixPair(*pair)
    rows_t = tl.where(offs_t < num_tokens, offs_t, 0).to(tl.int64)
    rows_v = tl.where(offs_v < local_vocab_size, offs_v, 0).to(tl.int64)
    offs_h = tl.arange(0, BLOCK_H)
    hidden_ptrs = pair.hidden + rows_t[:, None] * pair.stride_hidden_t + offs_h[None, :]
    weight_ptrs = pair.weight + rows_v[None, :] * pair.stride_weight_v + offs_h[:, None]
    for start in range(0, pair.size, BLOCK_H):
        if EVEN_H:
            hidden = tl.load(hidden_ptrs + start)
            weight = tl.load(weight_ptrs + start)
        else:
            inside = start + offs_h < pair.size
            hidden = tl.load(hidden_ptrs + start, mask=inside[None, :], other=0.0)
            weight = tl.load(weight_ptrs + start, mask=inside[:, None], other=0.0)
        if UPCAST:
            hidden = hidden.to(tl.float32)
            weight = weight.to(tl.float32)
        acc = tl.dot(hidden, weight, acc, input_precision="ieee")
    return acc


@triton.jit
def tanh_and_slope(x, EXACT: tl.constexpr):
    """Hyperbolic tangent and its derivative, both from one exponential, which never overflows.

    The tangent is exact to float32's absolute rounding; if `EXACT`, which float32 operands need,
    also where that is coarser than the tangent's own digits, near zero. The derivative is
    `4 d / (1 + d)^2` with `d = exp(-2|x|)`: `1 - tanh^2` has no digit left where the tangent rounds
    to one.
    """
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    inverse = 1.0 / (1.0 + decay)
    magnitude = (1.0 - decay) * inverse
    if EXACT:
        square = x * x
        series = _TANH_2 + square * (_TANH_3 + square * _TANH_4)
        series = square * (_TANH_0 + square * (_TANH_1 + square * series))
        near = tl.abs(x)
        magnitude = tl.where(near < _SMALL, near + near * series, magnitude)
    return tl.where(x < 0, -magnitude, magnitude), 4.0 * decay * inverse * inverse


@triton.jit
def logits_of(acc, offs_v, local_vocab_size, logit_options, EXACT: tl.constexpr):
    """Logits of a tile of accumulated products, and the derivative of the softcap there.

    The factor of a row is not applied. `EXACT` is for float32 operands.
    Without a softcap the second value is a placeholder that must not be used.
    """
    logits = acc
    if logit_options.bias is not None:
        bias = tl.load(logit_options.bias + offs_v, mask=offs_v < local_vocab_size, other=0.0)
        logits += bias.to(tl.float32)[None, :]
    if logit_options.logit_scale is not None:
        logits *= logit_options.logit_scale
    slope = logits
    if logit_options.softcap is not None:
        # One division a tile, not one an element.
        tangent, slope = tanh_and_slope(logits * (1.0 / logit_options.softcap), EXACT)
        logits = logit_options.softcap * tangent
    return logits, slope
