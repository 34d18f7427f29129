"""Block-sparse attention in Triton: programs walk the list of blocks of their rows.

Forward: a program has a tile of queries of one head and takes its key blocks in turn, with the online softmax of
FlashAttention-2 (arXiv:2307.08691, section 3.1): whole blocks without a mask, then partial ones. Levels of poly are
whole powers of two, so rescaling is exact; poly_e and a cut cannot be rescaled: there a first pass finds the level.

Backward, by row with delta = dO . O - dMass mass: dS = f' / mass (dO V^T - delta), dQ = scale dS K, dK = scale dS^T Q,
dV = (f / mass)^T dO. Deterministic: dQ over the lists of queries, then dK and dV over those of keys, seven products.
Fast: everything over the lists of keys, dQ by atomic additions, five products.

Scores are in units of the normaliser's kind: powers of two for softmax and poly.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from stgen.ops.block_sparse_attention.lists import BlockLists
from stgen.ops.normaliser import Normaliser
from stgen.ops.normaliser.triton import POLY, RELU, RELU2, kernel_kind, level_of, slope_of, unit, weight_of

# ------------------------------------------------------------------------------------------------ what kernels are given


class View(NamedTuple):
    """[S, heads, length, D] of any strides but the last, which is 1."""

    x: Tensor | TensorDescriptor
    strides: tuple[int, ...]  # of sequence, head and row, in units of Constants.VECTOR
    length: int


class Sizes(NamedTuple):
    heads: int
    groups: int  # of the support; sequence s takes group s % groups
    table_heads: int  # of the support, 1 or heads


class Constants(NamedTuple):
    """What a kernel is compiled for; each a tl.constexpr then, since triton 3.6 takes no plain number out of a tuple."""

    KIND: int
    CUT: float
    D: int
    WIDTH: int  # D padded to a power of two
    SCALE: float  # of the scores, D^-0.5
    VECTOR: int  # what divides all strides, so that the compiler knows
    SHARED: int  # heads of queries that share one of keys
    BQ: int  # block of the support
    BK: int
    TQ: int  # tile, which divides the block
    TK: int
    RAGGED_Q: bool  # whether the last block is cut by the end
    RAGGED_K: bool
    PARTIAL: bool  # whether there may be partial blocks
    FOLDED: bool  # softmax of 16 bits: in the backward the level holds the mass too, which float32 would notice
    DESCRIBED: bool  # loads by tensor descriptors, not pointers
    STAGES: int


# -------------------------------------------------------------------------------------------------------------- parts


@triton.jit
def _place(tiles, heads):
    """Tile, sequence and head of this program. The tiles of a head follow one another: they share its keys in cache."""
    program = tl.program_id(0)
    row = program // tiles
    return program % tiles, (row // heads).to(tl.int64), row % heads


@triton.jit
def _table_row(block, blocks, sequence, head, sizes):
    """The row of a support's table or lists, int64."""
    return (sequence % sizes.groups * sizes.table_heads + head % sizes.table_heads) * blocks + block


@triton.jit
def _list(lists, row):
    """Pointers to a row's blocks and to their slots, how many are whole and how many there are."""
    first = tl.load(lists.first + row)
    return lists.blocks + first, lists.slots + first, tl.load(lists.whole + row), tl.load(lists.count + row)


@triton.jit
def _places(x, sequence, head, row, ROWS: tl.constexpr, c: tl.constexpr):
    """Pointers [ROWS, WIDTH]; what may exceed 2^31 is added up beforehand."""
    base = sequence * x.strides[0] + head.to(tl.int64) * x.strides[1] + row.to(tl.int64) * x.strides[2]
    within = tl.arange(0, ROWS)[:, None] * (x.strides[2] * c.VECTOR) + tl.arange(0, c.WIDTH)[None, :]
    return x.x + base * c.VECTOR + within


@triton.jit
def _inside(row, length, ROWS: tl.constexpr, c: tl.constexpr):
    return (row + tl.arange(0, ROWS)[:, None] < length) & (tl.arange(0, c.WIDTH)[None, :] < c.D)


@triton.jit
def _tile(x, sequence, head, row, ROWS: tl.constexpr, RAGGED: tl.constexpr, c: tl.constexpr):
    """Rows from `row` on: [ROWS, WIDTH], zeros outside."""
    if c.DESCRIBED:
        return x.x.load([sequence.to(tl.int32), head, row, 0]).reshape(ROWS, c.WIDTH)
    else:
        places = _places(x, sequence, head, row, ROWS, c)
        if RAGGED or c.D < c.WIDTH:
            return tl.load(places, mask=_inside(row, x.length, ROWS, c), other=0.0)
        else:
            return tl.load(places)


@triton.jit
def _put(x, value, sequence, head, row, ROWS: tl.constexpr, c: tl.constexpr):
    places = _places(x, sequence, head, row, ROWS, c)
    tl.store(places, value.to(x.x.dtype.element_ty), mask=_inside(row, x.length, ROWS, c))


@triton.jit
def _product(a, b):
    return tl.dot(a, tl.trans(b), input_precision="ieee")


@triton.jit
def _word(words, number: tl.constexpr, slot, left, c: tl.constexpr):
    """Of each row of a tile, which of 32 keys are kept: [TQ] int32; the keys end after `left`."""
    word = tl.load(words + number, mask=slot + tl.zeros([c.TQ], tl.int32) >= 0, other=-1)
    if c.RAGGED_K:
        left = tl.minimum(tl.maximum(left - number * 32, 0), 32)
        word = word & ((1 << left.to(tl.int64)) - 1).to(tl.int32)
    return word


@triton.jit
def _masked(s, bits, slot, row, block, column, keys, KEY_AXIS: tl.constexpr, c: tl.constexpr):
    """Scores of a tile from places `row` and `column` of a partial block on, with -inf where a key is hidden.

    A row of the block has 32 keys in a word; tiles have at most 64 keys. Keys lie along KEY_AXIS of s. Words are shifted
    in two steps, since a thread has the same `columns % 8` all along: it need not keep a mask for each column.
    """
    rows, columns = row + tl.arange(0, c.TQ), tl.expand_dims(tl.arange(0, c.TK), 1 - KEY_AXIS)
    words = bits + (slot.to(tl.int64) * c.BQ + rows) * tl.cdiv(c.BK, 32) + column // 32
    left = keys - block * c.BK - column // 32 * 32
    word = tl.expand_dims(_word(words, 0, slot, left, c), KEY_AXIS)
    if c.TK > 32:
        second = tl.expand_dims(_word(words, 1, slot, left, c), KEY_AXIS)
        word, columns = tl.where(columns < 32, word, second), columns % 32
    else:
        columns += column % 32
    return tl.where((word >> columns % 8 >> columns // 8 * 8) & 1 != 0, s, float("-inf"))


@triton.jit
def _step(pairs, i, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Of the i-th tile of a list: block, place in the block, slot."""
    blocks, slots, _, _ = pairs
    entry = i // (BLOCK // TILE)
    return tl.load(blocks + entry), i * TILE - entry * BLOCK, tl.load(slots + entry)


@triton.jit
def _of_block(x, block, column, here, MASKED: tl.constexpr, c: tl.constexpr):
    """Keys or values [TK, WIDTH] from place `column` of a block; a ragged block is a partial one."""
    head = here[1] // c.SHARED
    return _tile(x, here[0], head, block * c.BK + column, c.TK, MASKED and c.RAGGED_K, c)


@triton.jit
def _scores(queries, keys, block, column, slot, pairs, here, length, MASKED: tl.constexpr, c: tl.constexpr):
    """Scores [TQ, TK] in units of the kind, -inf where a key is hidden; there are `length` keys in all."""
    s = _product(queries, keys) * (c.SCALE * unit(c.KIND))
    bits, bias = pairs[2], pairs[3]
    if bias is not None:
        s += tl.load(bias + block).to(tl.float32) * unit(c.KIND)
    if MASKED:
        s = _masked(s, bits, slot, here[2], block, column, length, 1, c)
    return s


# ------------------------------------------------------------------------------------------------------------- forward


@triton.jit
def _raw_level(top, KIND: tl.constexpr):
    """The level of rows from their largest score, -inf where that is -inf."""
    if KIND == POLY:
        return tl.ceil(top)
    else:
        return top


@triton.jit
def _top(top, begin, end, queries, k, pairs, here, MASKED: tl.constexpr, c: tl.constexpr):
    """The largest score of rows so far and of the blocks from `begin` to `end` of their list."""
    for i in tl.range(begin * (c.BK // c.TK), end * (c.BK // c.TK), num_stages=c.STAGES):
        block, column, slot = _step(pairs, i, c.BK, c.TK)
        keys = _of_block(k, block, column, here, MASKED, c)
        s = _scores(queries, keys, block, column, slot, pairs, here, k.length, MASKED, c)
        top = tl.maximum(top, tl.max(s, 1))
    return top


@triton.jit
def _attend(
    sums, level, mass, begin, end, queries, k, v, pairs, here, MASKED: tl.constexpr, RESCALE: tl.constexpr,
    c: tl.constexpr,
):  # fmt: skip
    """Sums of weighted values [TQ, WIDTH], level (-inf where no key was met) and mass, with those of further blocks."""
    for i in tl.range(begin * (c.BK // c.TK), end * (c.BK // c.TK), num_stages=c.STAGES):
        block, column, slot = _step(pairs, i, c.BK, c.TK)
        keys = _of_block(k, block, column, here, MASKED, c)
        values = _of_block(v, block, column, here, MASKED, c)
        s = _scores(queries, keys, block, column, slot, pairs, here, k.length, MASKED, c)
        if RESCALE:
            raised = tl.maximum(level, _raw_level(tl.max(s, 1), c.KIND))
            shrink = tl.exp2(level - level_of(raised, c.KIND))
            sums, mass, level = sums * shrink[:, None], mass * shrink, raised
        weight = weight_of(s, level_of(level, c.KIND)[:, None], c.KIND, c.CUT)
        if c.KIND == RELU or c.KIND == RELU2:
            mass += tl.sum(tl.where(s == float("-inf"), 0.0, 1.0), 1) if MASKED else c.TK
        else:
            mass += tl.sum(weight, 1)
        sums = tl.dot(weight.to(values.dtype), values, sums, input_precision="ieee")
    return sums, level, mass


@triton.jit
def _forward(
    q, k, v, sink, bias, lists, bits, out, level_out, mass_out, sizes, TWO_PASS: tl.constexpr, c: tl.constexpr
):
    """A tile of the output, and level and mass [S, heads, n] of its rows."""
    RESCALE: tl.constexpr = not TWO_PASS and not (c.KIND == RELU or c.KIND == RELU2)
    tile, sequence, head = _place(tl.cdiv(q.length, c.TQ), sizes.heads)
    start = tile * c.TQ
    table_row = _table_row(start // c.BQ, tl.cdiv(q.length, c.BQ), sequence, head, sizes)
    blocks, slots, whole, count = _list(lists, table_row)
    if bias is not None:
        bias += table_row * tl.cdiv(k.length, c.BK)
    pairs, here = (blocks, slots, bits, bias), (sequence, head, start % c.BQ)
    queries = _tile(q, sequence, head, start, c.TQ, c.RAGGED_Q, c)

    level = tl.full([c.TQ], float("-inf"), tl.float32)
    if sink is not None:
        logit = tl.load(sink + head).to(tl.float32) * unit(c.KIND)
        level = tl.maximum(level, logit)
    if TWO_PASS:
        level = _top(level, 0, whole, queries, k, pairs, here, False, c)
        if c.PARTIAL:
            level = _top(level, whole, count, queries, k, pairs, here, True, c)
    level = _raw_level(level, c.KIND)
    mass = tl.zeros([c.TQ], tl.float32)
    if sink is not None:
        mass += weight_of(logit, level_of(level, c.KIND), c.KIND, c.CUT)
    sums = tl.zeros([c.TQ, c.WIDTH], tl.float32)
    sums, level, mass = _attend(sums, level, mass, 0, whole, queries, k, v, pairs, here, False, RESCALE, c)
    if c.PARTIAL:
        sums, level, mass = _attend(sums, level, mass, whole, count, queries, k, v, pairs, here, True, RESCALE, c)

    _put(out, sums / tl.where(mass == 0, 1.0, mass)[:, None], sequence, head, start, c.TQ, c)
    rows = start + tl.arange(0, c.TQ)
    of_head = (sequence * sizes.heads + head) * q.length
    tl.store(level_out + of_head + rows, level_of(level, c.KIND), mask=rows < q.length)
    tl.store(mass_out + of_head + rows, mass, mask=rows < q.length)


# ------------------------------------------------------------------------------------------------------------ backward


@triton.jit
def _rows(out, d_out, sink, level, mass, d_mass, rows_out, d_sink, heads, c: tl.constexpr):
    """What the backward needs of each row: level (with the mass if FOLDED), 1 / mass, delta; the gradient of the sink."""
    tile, sequence, head = _place(tl.cdiv(out.length, c.TQ), heads)
    start = tile * c.TQ
    rows = start + tl.arange(0, c.TQ)
    inside = rows < out.length
    rows += (sequence * heads + head) * out.length
    row_level, row_mass = tl.load(level + rows, mask=inside, other=0.0), tl.load(mass + rows, mask=inside, other=0.0)
    inverse = tl.where(row_mass == 0, 0.0, 1.0 / tl.where(row_mass == 0, 1.0, row_mass))
    delta = tl.zeros([c.TQ], tl.float32)
    if c.KIND != RELU and c.KIND != RELU2:
        o = _tile(out, sequence, head, start, c.TQ, c.RAGGED_Q, c).to(tl.float32)
        d_o = _tile(d_out, sequence, head, start, c.TQ, c.RAGGED_Q, c).to(tl.float32)
        delta = tl.sum(o * d_o, 1)
        if d_mass is not None:
            delta -= tl.load(d_mass + rows, mask=inside, other=0.0) * row_mass
    if sink is not None:
        logit = tl.load(sink + head).to(tl.float32) * unit(c.KIND)
        slope = slope_of(logit, row_level, weight_of(logit, row_level, c.KIND, c.CUT), c.KIND, c.CUT)
        tl.store(d_sink + rows, -slope * inverse * delta, mask=inside)
    if c.FOLDED:
        row_level += tl.log2(tl.where(row_mass == 0, 1.0, row_mass))
    level_out, inverse_out, delta_out = rows_out
    tl.store(level_out + rows, row_level, mask=inside)
    tl.store(inverse_out + rows, inverse, mask=inside)
    tl.store(delta_out + rows, delta, mask=inside)


@triton.jit
def _of_rows(rows, first, start, length, c: tl.constexpr):
    """Level, 1 / mass and delta of a tile of queries: [TQ] each, zeros outside."""
    level, inverse, delta = rows
    places = first + start + tl.arange(0, c.TQ)
    if c.RAGGED_Q:
        inside = start + tl.arange(0, c.TQ) < length
        level = tl.load(level + places, mask=inside, other=0.0)
        inverse = tl.load(inverse + places, mask=inside, other=0.0)
        return level, inverse, tl.load(delta + places, mask=inside, other=0.0)
    else:
        return tl.load(level + places), tl.load(inverse + places), tl.load(delta + places)


@triton.jit
def _weigh(s, level, inverse, c: tl.constexpr):
    """f / mass and f' / mass"""
    weight = weight_of(s, level, c.KIND, c.CUT)
    slope = slope_of(s, level, weight, c.KIND, c.CUT)
    if not c.FOLDED:
        weight, slope = weight * inverse, slope * inverse
    return weight, slope


@triton.jit
def _collect_queries(
    d_q, begin, end, queries, d_o, of_rows, k, v, pairs, here, d_bias, MASKED: tl.constexpr, c: tl.constexpr
):
    """dQ / scale [TQ, WIDTH] so far and of the blocks from `begin` to `end` of the list."""
    level, inverse, delta = of_rows
    for i in tl.range(begin * (c.BK // c.TK), end * (c.BK // c.TK), num_stages=c.STAGES):
        block, column, slot = _step(pairs, i, c.BK, c.TK)
        keys = _of_block(k, block, column, here, MASKED, c)
        values = _of_block(v, block, column, here, MASKED, c)
        s = _scores(queries, keys, block, column, slot, pairs, here, k.length, MASKED, c)
        _, slope = _weigh(s, level[:, None], inverse[:, None], c)
        d_s = slope * (_product(d_o, values) - delta[:, None])
        if d_bias is not None:
            tl.store(d_bias + (block * c.BK + column) // c.TK, tl.sum(tl.sum(d_s, 1), 0))
        d_q = tl.dot(d_s.to(keys.dtype), keys, d_q, input_precision="ieee")
    return d_q


@triton.jit
def _queries(q, k, v, bias, lists, bits, d_out, rows, d_q, d_bias, sizes, c: tl.constexpr):
    """dQ of a tile of queries, and of each tile of scores the gradient of its bias [S, heads, tiles, tiles]."""
    tile, sequence, head = _place(tl.cdiv(q.length, c.TQ), sizes.heads)
    start = tile * c.TQ
    query_blocks, key_blocks = tl.cdiv(q.length, c.BQ), tl.cdiv(k.length, c.BK)
    table_row = _table_row(start // c.BQ, query_blocks, sequence, head, sizes)
    blocks, slots, whole, count = _list(lists, table_row)
    of_head = sequence * sizes.heads + head
    if bias is not None:
        bias += table_row * key_blocks
        d_bias += (of_head * (query_blocks * (c.BQ // c.TQ)) + tile) * (key_blocks * (c.BK // c.TK))
    pairs, here = (blocks, slots, bits, bias), (sequence, head, start % c.BQ)
    queries = _tile(q, sequence, head, start, c.TQ, c.RAGGED_Q, c)
    d_o = _tile(d_out, sequence, head, start, c.TQ, c.RAGGED_Q, c)
    of_rows = _of_rows(rows, of_head * q.length, start, q.length, c)
    sums = tl.zeros([c.TQ, c.WIDTH], tl.float32)
    sums = _collect_queries(sums, 0, whole, queries, d_o, of_rows, k, v, pairs, here, d_bias, False, c)
    if c.PARTIAL:
        sums = _collect_queries(sums, whole, count, queries, d_o, of_rows, k, v, pairs, here, d_bias, True, c)
    _put(d_q, sums * c.SCALE, sequence, head, start, c.TQ, c)


@triton.jit
def _collect_keys(
    d_k, d_v, begin, end, keys, values, q, d_out, rows, pairs, here, keys_in_all, d_q, d_bias, MASKED: tl.constexpr,
    c: tl.constexpr,
):  # fmt: skip
    """dK / scale and dV [TK, WIDTH] so far and of the blocks from `begin` to `end` of the list; adds up dQ if given."""
    sequence, head, of_head, block_k, column, first = here
    _, _, bits, bias = pairs
    key_blocks = tl.cdiv(keys_in_all, c.BK)
    for i in tl.range(begin * (c.BQ // c.TQ), end * (c.BQ // c.TQ), num_stages=c.STAGES):
        block, row, slot = _step(pairs, i, c.BQ, c.TQ)
        start = block * c.BQ + row
        queries = _tile(q, sequence, head, start, c.TQ, c.RAGGED_Q, c)
        s = _product(keys, queries) * (c.SCALE * unit(c.KIND))  # [TK, TQ]
        d_o = _tile(d_out, sequence, head, start, c.TQ, c.RAGGED_Q, c)
        level, inverse, delta = _of_rows(rows, of_head * q.length, start, q.length, c)
        if bias is not None:
            s += tl.load(bias + first + block.to(tl.int64) * key_blocks).to(tl.float32) * unit(c.KIND)
        if MASKED:
            s = _masked(s, bits, slot, row, block_k, column, keys_in_all, 0, c)
        weight, slope = _weigh(s, level[None, :], inverse[None, :], c)
        d_v = tl.dot(weight.to(d_o.dtype), d_o, d_v, input_precision="ieee")
        d_s = slope * (_product(values, d_o) - delta[None, :])
        d_s_low = d_s.to(queries.dtype)
        d_k = tl.dot(d_s_low, queries, d_k, input_precision="ieee")
        if d_q is not None:
            part = tl.trans(tl.dot(tl.trans(keys), d_s_low, input_precision="ieee")) * c.SCALE  # [TQ, WIDTH]
            places = d_q + (of_head * q.length + start) * c.D
            places += tl.arange(0, c.TQ)[:, None] * c.D + tl.arange(0, c.WIDTH)[None, :]
            if c.RAGGED_Q or c.D < c.WIDTH:
                tl.atomic_add(places, part, mask=_inside(start, q.length, c.TQ, c), sem="relaxed")
            else:
                tl.atomic_add(places, part, sem="relaxed")
            if bias is not None:
                tile = of_head * (tl.cdiv(q.length, c.BQ) * (c.BQ // c.TQ)) + start // c.TQ
                tile = tile * (key_blocks * (c.BK // c.TK)) + (block_k * c.BK + column) // c.TK
                tl.store(d_bias + tile, tl.sum(tl.sum(d_s, 1), 0))
    return d_k, d_v


@triton.jit
def _keys(q, k, v, bias, lists, bits, d_out, rows, d_q, d_k, d_v, d_bias, sizes, c: tl.constexpr):
    """dK and dV of a tile of keys; with d_q [S, heads, n, D] float32 also that, added up, and the bias's gradient."""
    tile, sequence, head_k = _place(tl.cdiv(k.length, c.TK), sizes.heads // c.SHARED)
    start = tile * c.TK
    block, column = start // c.BK, start % c.BK
    query_blocks, key_blocks = tl.cdiv(q.length, c.BQ), tl.cdiv(k.length, c.BK)
    keys = _tile(k, sequence, head_k, start, c.TK, c.RAGGED_K, c)
    values = _tile(v, sequence, head_k, start, c.TK, c.RAGGED_K, c)
    sums_k = tl.zeros([c.TK, c.WIDTH], tl.float32)
    sums_v = tl.zeros([c.TK, c.WIDTH], tl.float32)
    for member in range(c.SHARED):
        head = head_k * c.SHARED + member
        blocks, slots, whole, count = _list(lists, _table_row(block, key_blocks, sequence, head, sizes))
        first = _table_row(0, query_blocks, sequence, head, sizes) * key_blocks + block
        pairs = (blocks, slots, bits, bias)
        here = (sequence, head, sequence * sizes.heads + head, block, column, first)
        sums_k, sums_v = _collect_keys(
            sums_k, sums_v, 0, whole, keys, values, q, d_out, rows, pairs, here, k.length, d_q, d_bias, False, c
        )
        if c.PARTIAL:
            sums_k, sums_v = _collect_keys(
                sums_k, sums_v, whole, count, keys, values, q, d_out, rows, pairs, here, k.length, d_q, d_bias, True, c
            )
    _put(d_k, sums_k * c.SCALE, sequence, head_k, start, c.TK, c)
    _put(d_v, sums_v, sequence, head_k, start, c.TK, c)


# ----------------------------------------------------------------------------------------------------- configurations


# Compiled for bf16, softmax, partial blocks, 16 heads x 128, 40960 places (tests/kernels/launches_*.py) by triton 3.9, and
# by 3.6 where its registers are other by more than a few; nothing spills, and nothing of this has run on a GPU. At
# 64 x 64 four programs share an SM and hide each other's latency: one stage is enough.
#
# | blocks | kernel | target, loads | tile, warps, stages | registers | shared | programs per SM |
# |---|---|---|---|---|---|---|
# | 64 x 64 | forward | sm_90 descriptors | 64 x 64, 4, 1 | 126 | 48 KiB | 4 |
# | 128 x 64 | forward | sm_90 descriptors | 128 x 64, 8, 2 | 149 | 97 KiB | 1 |
# | 64 x 64 | queries | sm_90 descriptors | 64 x 64, 4, 1 | 160 (192) | 64 KiB | 3 |
# | 64 x 64 | keys | sm_90 descriptors | 32 x 64, 4, 2 | 211 (224) | 65 KiB | 2 |
# | 64 x 64 | fast | sm_90 descriptors | 32 x 64, 4, 2 | 240 (255) | 81 KiB | 2 |
# | 64 x 64 | forward | sm_80 pointers | 64 x 64, 4, 2 | 228 | 57 KiB | 2 |
# | 64 x 64 | queries | sm_80 pointers | 64 x 32, 4, 2 | 166 | 52 KiB | 3 |
# | 64 x 64 | keys | sm_80 pointers | 32 x 64, 4, 2 | 254 | 53 KiB | 2 |
# | 64 x 64 | fast | sm_80 pointers | 16 x 64, 4, 2 | 254 | 64 KiB | 2 |


class Config(NamedTuple):
    """A tile, which divides the block, and how it is computed."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None  # at most; given, the compiler spills none to have fewer

    @property
    def options(self) -> dict[str, int | None]:
        return {"num_warps": self.warps, "maxnreg": self.registers}


def config(
    kernel: str, block: tuple[int, int], width: int, itemsize: int, described: bool, lean: bool, ragged: bool
) -> Config:
    """Of the kernel `forward`, `rows`, `queries`, `keys` or `fast`, by what decides about registers.

    Args:
        block: of the support; width: the padded head dimension; described: by tensor descriptors.
        lean: no polynomials, bias or shared heads; ragged: the last block of keys is cut.
    """
    bq, bk = block
    of_keys, wide = kernel in ("keys", "fast"), width == 128
    if itemsize == 4:  # products by FMA, whose operands take registers
        tile = 16 if wide else 32
        if wide or (of_keys and width == 64):
            return Config(min(bq, tile), min(bk, tile), 8, 1, 168)
        return Config(min(bq, tile), min(bk, tile), 4, 1)
    if kernel == "rows":
        return Config(min(bq, 64), min(bk, 64), min(bq, 64) // (8 if wide else 16), 1)
    if kernel == "forward" and bq == 128:
        return Config(128, min(bk, 64), 8, 2)
    if of_keys:
        tile = 32
        if described and not wide:
            tile = 64
        elif wide and kernel == "fast" and not (described and lean):
            tile = 16
        return Config(min(bq, tile), min(bk, 64), min(bk, 64) // 16 * (1 if lean or not wide else 2), 2)
    queries, keys = min(bq, 64), min(bk, 32 if kernel == "queries" and wide and not described else 64)
    limit = 128 if kernel == "forward" and described and lean and not ragged and queries == keys == 64 else None
    return Config(queries, keys, queries // 16, 1 if described else 2, limit)


# ------------------------------------------------------------------------------------------------------------ launches


def describable(x: Tensor) -> bool:
    """Whether tensor descriptors can load [S, heads, n, D]: 16-bit numbers, strides of whole 16 bytes."""
    aligned = all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])
    return aligned and x.element_size() == 2 and x.stride(3) == 1 and x.data_ptr() % 16 == 0 and x.numel() > 0


@dataclass(frozen=True)
class _Problem:
    """What all kernels of a call are given."""

    q: Tensor
    k: Tensor
    v: Tensor
    lists: BlockLists
    normaliser: Normaliser
    has_bias: bool
    described: bool
    vector: int  # of all strides

    @staticmethod
    def of(
        q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, normaliser: Normaliser, bias: Tensor | None,
        descriptors: bool, *others: Tensor,
    ) -> "_Problem":  # fmt: skip
        """`others` are read as q is."""
        read = (q, k, v, *others)
        described = descriptors and all(map(describable, read))
        vector = 16 // q.element_size()
        strides = [stride for x in read for stride, size in zip(x.stride()[:3], x.shape, strict=False) if size > 1]
        whole = all(stride % vector == 0 for stride in (q.shape[3], *strides))  # what is written is dense in rows of D
        return _Problem(q, k, v, lists, normaliser, bias is not None, described, vector if whole else 1)

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.q.shape[1], *self.lists.by_query.first.shape[:2])

    def config(self, kernel: str) -> Config:
        lean = not (self.normaliser.kind.startswith("poly") or self.has_bias or self.q.shape[1] > self.k.shape[1])
        width, ragged = _width(self.q), self.k.shape[2] % self.lists.block[1] != 0
        return config(kernel, self.lists.block, width, self.q.element_size(), self.described, lean, ragged)

    def constants(self, how: Config) -> Constants:
        (bq, bk), (n, width), m = self.lists.block, self.q.shape[2:], self.k.shape[2]
        values = Constants(
            **kernel_kind(self.normaliser),  # type: ignore[arg-type]
            D=width,
            WIDTH=_width(self.q),
            SCALE=width**-0.5,
            VECTOR=self.vector,
            SHARED=self.q.shape[1] // self.k.shape[1],
            BQ=bq,
            BK=bk,
            TQ=how.queries,
            TK=how.keys,
            RAGGED_Q=n % bq != 0,
            RAGGED_K=m % bk != 0,
            PARTIAL=len(self.lists.bits) > 0 or m % bk != 0,
            FOLDED=self.normaliser.kind == "softmax" and self.q.element_size() == 2,
            DESCRIBED=self.described,
            STAGES=how.stages,
        )
        return Constants(*map(tl.constexpr, values)) if isinstance(_forward, triton.JITFunction) else values

    def view(self, x: Tensor, rows: int) -> View:
        """What a kernel loads in tiles of so many rows."""
        block = [1, 1, rows, _width(x)]
        loaded = TensorDescriptor(x, list(x.shape), list(x.stride()), block) if self.described else x
        return View(loaded, self.strides(x), x.shape[2])

    def written(self, x: Tensor) -> View:
        return View(x, self.strides(x), x.shape[2])

    def strides(self, x: Tensor) -> tuple[int, ...]:
        return tuple(stride // self.vector for stride in x.stride()[:3])

    def views(self, how: Config, *of_queries: Tensor) -> list[View]:
        """Of q and what lies as it does, then of k and v."""
        return [*(self.view(x, how.queries) for x in of_queries), *(self.view(x, how.keys) for x in (self.k, self.v))]


def _width(q: Tensor) -> int:
    """D as products take it."""
    return max(16, triton.next_power_of_2(q.shape[3]))


def _tiles(x: Tensor, rows: int) -> tuple[int]:
    """The grid: tiles of so many rows of [S, heads, n, D]."""
    return (x.shape[0] * x.shape[1] * triton.cdiv(x.shape[2], rows),)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    normaliser: Normaliser,
    sink: Tensor | None = None,
    bias: Tensor | None = None,
    descriptors: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [S, heads, n, D], level and mass [S, heads, n] float32.

    Args:
        q, k, v: [S, heads, n or m, D] with 1 as last stride; the heads of k and v divide those of q.
        lists: of a support of n queries and m keys, its groups a divisor of S, its heads 1 or q's.
        sink: [heads].
        bias: [groups, support's heads, query blocks, key blocks] contiguous.
        descriptors: load by tensor descriptors where `describable`; for sm_90 and newer.
    """
    problem = _Problem.of(q, k, v, lists, normaliser, bias, descriptors)
    how, out = problem.config("forward"), torch.empty_like(q)
    level, mass = (q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(2))
    two_pass = tl.constexpr(normaliser.kind == "poly_e" or normaliser.cut is not None)
    _forward[_tiles(q, how.queries)](
        *problem.views(how, q), sink, bias, lists.by_query, lists.bits, problem.written(out), level, mass, problem.sizes,
        two_pass, problem.constants(how), **how.options,
    )  # fmt: skip
    return out, level, mass


def backward(
    d_out: Tensor,
    d_mass: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    level: Tensor,
    mass: Tensor,
    lists: BlockLists,
    normaliser: Normaliser,
    sink: Tensor | None = None,
    bias: Tensor | None = None,
    fast: bool = False,
    descriptors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, sink and bias from those of the output [S, heads, n, D] and of the mass [S, heads, n].

    `fast` adds up the gradient of q in whatever order programs finish.
    """
    problem = _Problem.of(q, k, v, lists, normaliser, bias, descriptors, d_out, out)
    rows, d_sink = _of_all_rows(problem, d_out, d_mass, out, level, mass, sink)
    if fast:
        d_q = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        d_k, d_v, d_bias = _of_all_keys(problem, d_out, rows, bias, d_q)
        d_q = torch.empty_like(q).copy_(d_q)
    else:
        d_q, d_bias = _of_all_queries(problem, d_out, rows, bias)
        d_k, d_v, _ = _of_all_keys(problem, d_out, rows, bias, None)
    return d_q, d_k, d_v, d_sink, d_bias


Rows = tuple[Tensor, ...]  # level, 1 / mass and delta, each [S, heads, n] float32


def _of_all_rows(
    problem: _Problem,
    d_out: Tensor,
    d_mass: Tensor | None,
    out: Tensor,
    level: Tensor,
    mass: Tensor,
    sink: Tensor | None,
) -> tuple[Rows, Tensor | None]:
    how = problem.config("rows")
    rows = level.new_empty(3, *level.shape).unbind(0)
    d_sink = None if sink is None else torch.empty_like(level)
    _rows[_tiles(out, how.queries)](
        problem.written(out), problem.written(d_out), sink, level, mass, d_mass, rows, d_sink, out.shape[1],
        replace(problem, described=False).constants(how), **how.options,
    )  # fmt: skip
    return rows, None if d_sink is None or sink is None else d_sink.sum((0, 2)).to(sink.dtype)


def _of_all_queries(problem: _Problem, d_out: Tensor, rows: Rows, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    how, lists = problem.config("queries"), problem.lists
    d_q, d_bias = torch.empty_like(problem.q), _d_bias(problem, how, bias)
    q, d_o, k, v = problem.views(how, problem.q, d_out)
    _queries[_tiles(problem.q, how.queries)](
        q, k, v, bias, lists.by_query, lists.bits, d_o, rows, problem.written(d_q), d_bias, problem.sizes,
        problem.constants(how), **how.options,
    )  # fmt: skip
    return d_q, _summed(d_bias, bias)


def _of_all_keys(
    problem: _Problem, d_out: Tensor, rows: Rows, bias: Tensor | None, d_q: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    how, lists = problem.config("keys" if d_q is None else "fast"), problem.lists
    d_k, d_v = torch.empty_like(problem.k), torch.empty_like(problem.v)
    d_bias = None if d_q is None else _d_bias(problem, how, bias)
    q, d_o, k, v = problem.views(how, problem.q, d_out)
    _keys[_tiles(problem.k, how.keys)](
        q, k, v, bias, lists.by_key, lists.bits, d_o, rows, d_q, problem.written(d_k), problem.written(d_v), d_bias,
        problem.sizes, problem.constants(how), **how.options,
    )  # fmt: skip
    return d_k, d_v, _summed(d_bias, bias)


def _d_bias(problem: _Problem, how: Config, bias: Tensor | None) -> Tensor | None:
    """For the bias's gradient, by tile of scores: zeros [S, heads, tiles of queries, tiles of keys], as kernels skip
    what is not kept.
    """
    if bias is None:
        return None
    (bq, bk), (nq, nk) = problem.lists.block, bias.shape[2:]
    shape = (*problem.q.shape[:2], nq * (bq // how.queries), nk * (bk // how.keys))
    return bias.new_zeros(shape, dtype=torch.float32)


def _summed(d_bias: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """Over tiles of a block, sequences of a group and heads that share a table: like the bias."""
    if d_bias is None or bias is None:
        return None
    groups, heads, nq, nk = bias.shape
    parts = d_bias.view(
        -1, groups, d_bias.shape[1] // heads, heads, nq, d_bias.shape[2] // nq, nk, d_bias.shape[3] // nk
    )
    return parts.sum((0, 2, 5, 7)).to(bias.dtype)
