"""Kernels of norm_rope: one launch forward, one backward, over runs of tokens and groups of heads.

A tile is TOKENS tokens of one head, held as the two halves a, b [TOKENS, HALF] of its channels that RoPE turns
together. Everything between a load and a store is float32. In the forward a program owns a block of tokens, so that it
can write their mean; in the backward every token looks up the gradient of its block's mean. There, with n = x r,
y = n gain turned, and the incoming gradient turned back to g:
    dx = r (g gain - n mean(g gain n)),    dgain = sum of g n, one float32 partial for each program.
Strides come divided by UNIT, their largest common power of two up to 8, so that the compiler sees how rows are aligned
whatever the head dimension.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (kernels are annotated for the compiler and called with plain numbers)

from dataclasses import dataclass
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 1024  # of a tile's halves: 8 for each thread of 4 warps, one 128-bit access for 16-bit types
ROWS = 128  # pairs of token and head for a program; tables stay in the cache over heads
ENOUGH = 1024  # programs; where there would be fewer, a program takes one head


@dataclass(frozen=True)
class Tiles:
    """How the work is cut: tokens of a tile, heads of a program, warps of a program."""

    tokens: int
    heads: int
    warps: int


def tiles_of(shape: torch.Size, block: int | None) -> Tiles:
    """The cut for qkv [B, N, 3, heads, D]; with `block` a program owns as many tokens, in several tiles if need be."""
    batch, tokens, _, heads, head_dim = shape
    half = triton.next_power_of_2(head_dim // 2)
    tile = max(1, ELEMENTS // half)
    if block is not None:
        tile = min(tile, triton.next_power_of_2(block))
    owned = block or tile
    each = max(1, min(heads, ROWS // owned))
    if batch * triton.cdiv(tokens, owned) * triton.cdiv(heads, each) < ENOUGH:
        each = 1
    threads = tile * half // max(4, gcd(8, head_dim // 2))  # of 4 elements where halves are not aligned for 8
    return Tiles(tile, each, min(max(threads // 32, 1), 8))


def forward(
    qkv: Tensor,
    gain_q: Tensor | None,
    gain_k: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    block: int | None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v [B, N, heads, D] and the pooled q, k [B, heads, blocks, D] float32; without `block` there are 0 blocks."""
    batch, tokens, _, heads, head_dim = qkv.shape
    tiles = tiles or tiles_of(qkv.shape, block)
    blocks = triton.cdiv(tokens, block) if block else 0
    outputs = [qkv.new_empty(batch, tokens, heads, head_dim) for _ in range(3)]
    pooled = [qkv.new_empty(batch, heads, blocks, head_dim, dtype=torch.float32) for _ in range(2)]
    unit, (strides,) = _in_units(qkv[:, :, 0])
    _forward[(_programs(qkv.shape, block, tiles),)](
        *(*qkv.unbind(2), gain_q, gain_k, cos, sin, *outputs, *pooled),
        *(strides, tokens, heads, tiles.heads, eps),
        **_constants(gain_q, gain_k, cos, head_dim, block, unit, tiles),
        POOLED=block is not None,
    )
    return outputs[0], outputs[1], outputs[2], pooled[0], pooled[1]


def backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dpooled_q: Tensor | None,
    dpooled_k: Tensor | None,
    qkv: Tensor,
    gain_q: Tensor | None,
    gain_k: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    block: int | None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of qkv, packed as it is and contiguous, and of the gains that there are.

    dq, dk, dv [B, N, heads, D] with a last stride of 1; dpooled [B, heads, blocks, D] float32, contiguous, or None.
    """
    _, tokens, _, heads, head_dim = qkv.shape
    tiles = tiles or tiles_of(qkv.shape, None)
    programs = _programs(qkv.shape, None, tiles)
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    gains = (gain_q, gain_k)
    parts = [None if gain is None else gain.new_empty(programs, head_dim, dtype=torch.float32) for gain in gains]
    unit, strides = _in_units(qkv[:, :, 0], dq, dk, dv)
    _backward[(programs,)](
        *(dq, dk, dv, dpooled_q, dpooled_k, *qkv[:, :, :2].unbind(2), gain_q, gain_k, cos, sin, dqkv, *parts),
        *(*strides, tokens, heads, tiles.heads, eps),
        **_constants(gain_q, gain_k, cos, head_dim, block, unit, tiles),
        POOLED_Q=block is not None and dpooled_q is not None,
        POOLED_K=block is not None and dpooled_k is not None,
    )
    dgain_q, dgain_k = (
        None if gain is None or part is None else part.sum(0).to(gain.dtype)
        for gain, part in zip(gains, parts, strict=True)
    )
    return dqkv, dgain_q, dgain_k


def _programs(shape: torch.Size, block: int | None, tiles: Tiles) -> int:
    batch, tokens, _, heads, _ = shape
    return batch * triton.cdiv(tokens, block or tiles.tokens) * triton.cdiv(heads, tiles.heads)


def _in_units(*tensors: Tensor) -> tuple[int, list[tuple[int, ...]]]:
    """The common power of two, up to 8, of the strides of batch, token and head; and those strides divided by it."""
    strides = [x.stride()[:3] for x in tensors]
    unit = gcd(8, *(stride for three in strides for stride in three))
    return unit, [tuple(stride // unit for stride in three) for three in strides]


def _constants(
    gain_q: Tensor | None,
    gain_k: Tensor | None,
    cos: Tensor | None,
    head_dim: int,
    block: int | None,
    unit: int,
    tiles: Tiles,
) -> dict[str, int | bool]:
    return {
        "D": head_dim,
        "HALF": triton.next_power_of_2(head_dim // 2),
        "TOKENS": tiles.tokens,
        "BLOCK": block or tiles.tokens,
        "NORM_Q": gain_q is not None,
        "NORM_K": gain_k is not None,
        "ROPE": cos is not None,
        "UNIT": unit,
        "num_warps": tiles.warps,
    }


@triton.jit
def _owned(tokens, heads, each, BLOCK: tl.constexpr):
    """Batch entry, block of tokens, first head and number of heads of this program; a block's heads are neighbours."""
    groups, blocks = tl.cdiv(heads, each), tl.cdiv(tokens, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    first = program % groups * each
    return program // groups // blocks, program // groups % blocks, first, tl.minimum(each, heads - first)


@triton.jit
def _tile(block, start, tokens, BLOCK: tl.constexpr, TOKENS: tl.constexpr):
    """The first token of the tile that begins `start` tokens into a block, and which of its tokens there are."""
    first = block * BLOCK + start
    place = tl.arange(0, TOKENS)
    return first, (place < BLOCK - start) & (place < tokens - first)


@triton.jit
def _columns(D: tl.constexpr, HALF: tl.constexpr):
    """Channels of the first half, and which there are: [HALF] each."""
    column = tl.arange(0, HALF)
    return column, column < D // 2


@triton.jit
def _length(block, tokens, BLOCK: tl.constexpr):
    """Tokens of a block; the last may have fewer, one beyond it counts as 1, by which to divide."""
    return tl.maximum(tl.minimum(BLOCK, tokens - block * BLOCK), 1)


@triton.jit
def _pool(batch, head, heads, block, tokens, D: tl.constexpr, BLOCK: tl.constexpr):
    """Where the mean over a block begins."""
    return ((batch * heads + head) * tl.cdiv(tokens, BLOCK) + block) * D


@triton.jit
def _rows(first, apart, UNIT: tl.constexpr, TOKENS: tl.constexpr):
    """Where the rows of a tile begin, given the first and how far apart they are, both in units: [TOKENS, 1]."""
    return first * UNIT + tl.arange(0, TOKENS)[:, None].to(tl.int64) * apart * UNIT


@triton.jit
def _head(batch, token, head, strides, UNIT: tl.constexpr, TOKENS: tl.constexpr):
    """Where the rows of a head begin from a token on: [TOKENS, 1]."""
    first = batch * strides[0] + token * strides[1] + head * strides[2]
    return _rows(first, strides[1], UNIT, TOKENS)


@triton.jit
def _load(X, mask, D: tl.constexpr):
    """Both halves of the channels, from pointers to the first."""
    return tl.load(X, mask=mask, other=0.0), tl.load(X + D // 2, mask=mask, other=0.0)


@triton.jit
def _store(X, a, b, mask, D: tl.constexpr):
    tl.store(X, a.to(X.dtype.element_ty), mask=mask)
    tl.store(X + D // 2, b.to(X.dtype.element_ty), mask=mask)


@triton.jit
def _gain(GAIN, column, inside, D: tl.constexpr, NORM: tl.constexpr):
    """Both halves of a gain, [HALF] each; 1 where there is none."""
    if NORM:
        a, b = _load(GAIN + column, inside, D)
        return a.to(tl.float32), b.to(tl.float32)
    else:
        return 1.0, 1.0


@triton.jit
def _tables(COS, SIN, token, column, mask, D: tl.constexpr, TOKENS: tl.constexpr, ROPE: tl.constexpr):
    """Cosine and sine of the angles, [TOKENS, HALF] each."""
    if ROPE:
        at = _rows(token, 1, D // 2, TOKENS) + column
        return tl.load(COS + at, mask=mask, other=0.0), tl.load(SIN + at, mask=mask, other=0.0)
    else:
        return 1.0, 0.0


@triton.jit
def _inverse_rms(a, b, eps, D: tl.constexpr):
    return tl.rsqrt(tl.sum(a * a + b * b, axis=1) / D + eps)[:, None]


@triton.jit
def _place(a, b, gain_a, gain_b, cos, sin, eps, D: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr):
    """Queries or keys normed and turned."""
    a, b = a.to(tl.float32), b.to(tl.float32)
    if NORM:
        r = _inverse_rms(a, b, eps, D)
        a, b = a * r * gain_a, b * r * gain_b
    if ROPE:
        a, b = a * cos - b * sin, a * sin + b * cos
    return a, b


@triton.jit
def _add_pooled(
    a, b, DPOOLED, batch, head, heads, token, tokens, column, mask,
    D: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    """The gradient of rows a, b and, shared by the tokens of a block, that of its mean."""
    a, b = a.to(tl.float32), b.to(tl.float32)
    if POOLED:
        block = (token + tl.arange(0, TOKENS)[:, None]) // BLOCK
        length = _length(block, tokens, BLOCK)
        pooled_a, pooled_b = _load(DPOOLED + _pool(batch, head, heads, block, tokens, D, BLOCK) + column, mask, D)
        a, b = a + pooled_a / length, b + pooled_b / length
    return a, b


@triton.jit
def _turn_back(a, b, cos, sin, ROPE: tl.constexpr):
    if ROPE:
        a, b = a * cos + b * sin, b * cos - a * sin
    return a, b


@triton.jit
def _norm_back(a, b, x_a, x_b, gain_a, gain_b, sum_a, sum_b, eps, D: tl.constexpr, NORM: tl.constexpr):
    """Gradient of rows x from that of the normed rows, a, b; and the running sums of the gain's gradient."""
    if NORM:
        x_a, x_b = x_a.to(tl.float32), x_b.to(tl.float32)
        r = _inverse_rms(x_a, x_b, eps, D)
        n_a, n_b = x_a * r, x_b * r
        sum_a, sum_b = sum_a + a * n_a, sum_b + b * n_b
        a, b = a * gain_a, b * gain_b
        mean = tl.sum(a * n_a + b * n_b, axis=1)[:, None] / D
        a, b = r * (a - n_a * mean), r * (b - n_b * mean)
    return a, b, sum_a, sum_b


@triton.jit
def _forward(
    XQ, XK, XV, GAIN_Q, GAIN_K, COS, SIN, Q, K, V, POOLED_Q, POOLED_K,
    strides, tokens, heads, each, eps,
    D: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    NORM_Q: tl.constexpr, NORM_K: tl.constexpr, ROPE: tl.constexpr, POOLED: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    batch, block, first, number = _owned(tokens, heads, each, BLOCK)
    column, inside = _columns(D, HALF)
    gain_qa, gain_qb = _gain(GAIN_Q, column, inside, D, NORM_Q)
    gain_ka, gain_kb = _gain(GAIN_K, column, inside, D, NORM_K)
    for i in range(number):
        head = first + i
        sum_qa = tl.zeros([TOKENS, HALF], tl.float32)
        sum_qb, sum_ka, sum_kb = sum_qa, sum_qa, sum_qa
        for start in range(0, BLOCK, TOKENS):
            token, there = _tile(block, start, tokens, BLOCK, TOKENS)
            mask = there[:, None] & inside
            x = _head(batch, token, head, strides, UNIT, TOKENS) + column
            out = _rows((batch * tokens + token) * heads + head, heads, D, TOKENS) + column

            # All loads before the first store, which none could pass: they are what there is to wait for.
            q_a, q_b = _load(XQ + x, mask, D)
            k_a, k_b = _load(XK + x, mask, D)
            v_a, v_b = _load(XV + x, mask, D)
            cos, sin = _tables(COS, SIN, token, column, mask, D, TOKENS, ROPE)

            q_a, q_b = _place(q_a, q_b, gain_qa, gain_qb, cos, sin, eps, D, NORM_Q, ROPE)
            k_a, k_b = _place(k_a, k_b, gain_ka, gain_kb, cos, sin, eps, D, NORM_K, ROPE)
            _store(Q + out, q_a, q_b, mask, D)
            _store(K + out, k_a, k_b, mask, D)
            _store(V + out, v_a, v_b, mask, D)
            sum_qa, sum_qb, sum_ka, sum_kb = sum_qa + q_a, sum_qb + q_b, sum_ka + k_a, sum_kb + k_b
        if POOLED:
            length = _length(block, tokens, BLOCK)
            pool = _pool(batch, head, heads, block, tokens, D, BLOCK) + column
            _store(POOLED_Q + pool, tl.sum(sum_qa, 0) / length, tl.sum(sum_qb, 0) / length, inside, D)
            _store(POOLED_K + pool, tl.sum(sum_ka, 0) / length, tl.sum(sum_kb, 0) / length, inside, D)


@triton.jit
def _backward(
    DQ, DK, DV, DPOOLED_Q, DPOOLED_K, XQ, XK, GAIN_Q, GAIN_K, COS, SIN, DQKV, DGAIN_Q, DGAIN_K,
    strides, strides_q, strides_k, strides_v, tokens, heads, each, eps,
    D: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    NORM_Q: tl.constexpr, NORM_K: tl.constexpr, ROPE: tl.constexpr,
    POOLED_Q: tl.constexpr, POOLED_K: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    batch, tile, first, number = _owned(tokens, heads, each, TOKENS)
    token, there = _tile(tile, 0, tokens, TOKENS, TOKENS)
    column, inside = _columns(D, HALF)
    mask = there[:, None] & inside
    gain_qa, gain_qb = _gain(GAIN_Q, column, inside, D, NORM_Q)
    gain_ka, gain_kb = _gain(GAIN_K, column, inside, D, NORM_K)
    sum_qa = tl.zeros([TOKENS, HALF], tl.float32)
    sum_qb, sum_ka, sum_kb = sum_qa, sum_qa, sum_qa
    for i in range(number):
        head = first + i
        x = _head(batch, token, head, strides, UNIT, TOKENS) + column
        out = DQKV + _rows((batch * tokens + token) * 3 * heads + head, 3 * heads, D, TOKENS) + column

        # All loads before the first store, as in the forward.
        q_a, q_b = _load(DQ + _head(batch, token, head, strides_q, UNIT, TOKENS) + column, mask, D)
        k_a, k_b = _load(DK + _head(batch, token, head, strides_k, UNIT, TOKENS) + column, mask, D)
        v_a, v_b = _load(DV + _head(batch, token, head, strides_v, UNIT, TOKENS) + column, mask, D)
        xq_a, xq_b = _load(XQ + x, mask, D) if NORM_Q else (0.0, 0.0)
        xk_a, xk_b = _load(XK + x, mask, D) if NORM_K else (0.0, 0.0)
        cos, sin = _tables(COS, SIN, token, column, mask, D, TOKENS, ROPE)

        q_a, q_b = _add_pooled(
            q_a, q_b, DPOOLED_Q, batch, head, heads, token, tokens, column, mask, D, BLOCK, TOKENS, POOLED_Q
        )
        k_a, k_b = _add_pooled(
            k_a, k_b, DPOOLED_K, batch, head, heads, token, tokens, column, mask, D, BLOCK, TOKENS, POOLED_K
        )
        q_a, q_b = _turn_back(q_a, q_b, cos, sin, ROPE)
        k_a, k_b = _turn_back(k_a, k_b, cos, sin, ROPE)
        q_a, q_b, sum_qa, sum_qb = _norm_back(q_a, q_b, xq_a, xq_b, gain_qa, gain_qb, sum_qa, sum_qb, eps, D, NORM_Q)
        k_a, k_b, sum_ka, sum_kb = _norm_back(k_a, k_b, xk_a, xk_b, gain_ka, gain_kb, sum_ka, sum_kb, eps, D, NORM_K)
        _store(out, q_a, q_b, mask, D)
        _store(out + heads * D, k_a, k_b, mask, D)
        _store(out + 2 * heads * D, v_a, v_b, mask, D)
    part = tl.program_id(0).to(tl.int64) * D + column
    if NORM_Q:
        _store(DGAIN_Q + part, tl.sum(sum_qa, 0), tl.sum(sum_qb, 0), inside, D)
    if NORM_K:
        _store(DGAIN_K + part, tl.sum(sum_ka, 0), tl.sum(sum_kb, 0), inside, D)
