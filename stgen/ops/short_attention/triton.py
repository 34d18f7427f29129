"""Kernels of attention within boxes: whole rows at once, read and written where the tokens lie.

A program holds GROUP items, an item being one head of one sequence; HEADS neighbouring heads of a sequence come first,
so that what it reads of a token is one run of memory, and programs that follow each other read neighbouring runs. Its
tensors are [items, places, ...]. Heads of an odd width are two tiles side by side (72 = 64 + 16, of which 8 are
hidden), so everything that spans a head is a tuple of one or two tensors. Rows of a sink are a tile of their own
before the keys.

The backward computes the weights again from q and k, and all gradients in one pass:

    P = w / mass;  dP = dO v' + dMap;  delta = sum P dP - dLSE (0 where the mass is a count)
    dS = f' / mass (dP - delta);  dq = dS k / sqrt(D);  dk = dS' q / sqrt(D);  dv = P' dO
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver

from stgen.ops.boxes import Boxes
from stgen.ops.normaliser import Normaliser
from stgen.ops.normaliser.triton import RELU, RELU2, kernel_kind, level_of, slope_of, unit, weight_of

# ------------------------------------------------------------------------------------------------------------- places


@triton.jit
def _items(turn, group, sequences, GROUP: tl.constexpr, HEADS: tl.constexpr):
    """Sequence and head of each item, and whether it exists, in a turn of sequences and a group of heads."""
    if GROUP == 1:
        return turn, group.to(tl.int64), turn + tl.arange(0, 1) < sequences
    else:
        item = tl.arange(0, GROUP)
        sequence = turn * (GROUP // HEADS) + item // HEADS
        return sequence, (group * HEADS + item % HEADS).to(tl.int64), sequence < sequences


@triton.jit
def _each(x, GROUP: tl.constexpr):
    """A number of each item, made to go with numbers of places."""
    if GROUP == 1:
        return x
    else:
        return x[:, None]


@triton.jit
def _column(x):
    """Numbers of rows, made to go with tiles."""
    return tl.expand_dims(x, -1)


@triton.jit
def _places(
    sequence, exists, grid, counts,
    SIZE: tl.constexpr, SHIFT: tl.constexpr, PARTIAL: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Video of each item, [items]; the token at each of its places and whether there is one, [items, N]."""
    place = tl.arange(0, N)
    boxes = counts[0] * counts[1] * counts[2]
    box = sequence % boxes
    t = _each(box // (counts[1] * counts[2]) * SIZE[0] - SHIFT[0], GROUP) + place // (SIZE[1] * SIZE[2])
    h = _each(box // counts[2] % counts[1] * SIZE[1] - SHIFT[1], GROUP) + place // SIZE[2] % SIZE[1]
    w = _each(box % counts[2] * SIZE[2] - SHIFT[2], GROUP) + place % SIZE[2]
    there = _each(exists, GROUP) & (place < SIZE[0] * SIZE[1] * SIZE[2])
    if PARTIAL:
        there = there & (t >= 0) & (t < grid[0]) & (h >= 0) & (h < grid[1]) & (w >= 0) & (w < grid[2])
    return (sequence // boxes).to(tl.int64), ((t * grid[1] + h) * grid[2] + w).to(tl.int64), there


@triton.jit
def _rows(video, token, head, strides, VEC: tl.constexpr, GROUP: tl.constexpr):
    """Where the rows of items begin, in elements: [items, N]; strides of video, token and head are in VECs."""
    return (_each(video * strides[0] + head * strides[2], GROUP) + token * strides[1]) * VEC


@triton.jit
def _sink_rows(head, SINKS: tl.constexpr, D: tl.constexpr, M: tl.constexpr, GROUP: tl.constexpr):
    """Where the rows of sinks begin, [items, M], and which exist, [M]."""
    row = tl.arange(0, M)
    return (_each(head * SINKS, GROUP) + row) * D, row < SINKS


@triton.jit
def _sink_parts(
    sequence, head, exists, heads, SINKS: tl.constexpr, D: tl.constexpr, M: tl.constexpr, GROUP: tl.constexpr
):
    """Where the items' parts of the gradient of sink rows begin in [S, heads, SINKS, D], and which are of it."""
    rows, given = _sink_rows(sequence.to(tl.int64) * heads + head, SINKS, D, M, GROUP)
    return rows, _each(exists, GROUP) & given


@triton.jit
def _row_numbers(sequence, head, exists, heads, PLACES: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr):
    """Where the rows of [S, heads, places] lie, and which are of it: [items, N]."""
    row = tl.arange(0, N)
    return _each((sequence.to(tl.int64) * heads + head) * PLACES, GROUP) + row, _each(exists, GROUP) & (row < PLACES)


@triton.jit
def _cells(
    sequence, head, exists, strides,
    FIRST: tl.constexpr, SHAPE: tl.constexpr, N: tl.constexpr, M: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Where the cells of a map lie, from column FIRST on, and which are of its SHAPE: [items, N, M]."""
    row, column = tl.arange(0, N), tl.arange(0, M)
    start = _each(sequence.to(tl.int64) * strides[0] + head * strides[1], GROUP) + row.to(tl.int64) * strides[2]
    at = _column(start) + (FIRST + column).to(tl.int64) * strides[3]
    return at, _column(_each(exists, GROUP) & (row < SHAPE[0])) & (column < SHAPE[1])


# -------------------------------------------------------------------------------------------------------- tiles of D


@triton.jit
def _load(ptr, rows, there, D: tl.constexpr, PARTS: tl.constexpr):
    """Rows of D as a tuple of tiles, zero where nothing is."""
    i = tl.arange(0, PARTS[0])
    first = tl.load(ptr + _column(rows) + i, mask=_column(there) & (i < D), other=0.0)
    if len(PARTS) == 1:
        return (first,)
    else:
        j = PARTS[0] + tl.arange(0, PARTS[1])
        return first, tl.load(ptr + _column(rows) + j, mask=_column(there) & (j < D), other=0.0)


@triton.jit
def _store(ptr, rows, there, x, D: tl.constexpr, PARTS: tl.constexpr):
    i = tl.arange(0, PARTS[0])
    tl.store(ptr + _column(rows) + i, x[0].to(ptr.dtype.element_ty), mask=_column(there) & (i < D))
    if len(PARTS) > 1:
        j = PARTS[0] + tl.arange(0, PARTS[1])
        tl.store(ptr + _column(rows) + j, x[1].to(ptr.dtype.element_ty), mask=_column(there) & (j < D))


@triton.jit
def _over_width(x, y):
    """x y': sums over the width of heads."""
    result = tl.dot(x[0], tl.trans(y[0]), input_precision="ieee")
    if len(x) > 1:
        result += tl.dot(x[1], tl.trans(y[1]), input_precision="ieee")
    return result


@triton.jit
def _over_places(p, x):
    """p x: sums over places, with p rounded to the type of x."""
    p = p.to(x[0].dtype)
    if len(x) == 1:
        return (tl.dot(p, x[0], input_precision="ieee"),)
    else:
        return tl.dot(p, x[0], input_precision="ieee"), tl.dot(p, x[1], input_precision="ieee")


@triton.jit
def _over_queries(p, x, TURNED: tl.constexpr):
    """p' x: sums over the rows of p, which is rounded to the type of x."""
    p = p.to(x[0].dtype)
    if len(x) == 1:
        return (_transposed_dot(p, x[0], TURNED),)
    else:
        return _transposed_dot(p, x[0], TURNED), _transposed_dot(p, x[1], TURNED)


@triton.jit
def _transposed_dot(p, x, TURNED: tl.constexpr):
    """p' x; TURNED as (x' p)'.

    Triton 3.4 to 3.7 compile products of Hopper's warp groups wrongly whose first factor is transposed in registers
    (flash-linear-attention, issue 640); x is transposed in shared memory.
    """
    if TURNED:
        return tl.trans(tl.dot(tl.trans(x), p, input_precision="ieee"))
    else:
        return tl.dot(tl.trans(p), x, input_precision="ieee")


@triton.jit
def _plus(x, y):
    if len(x) == 1:
        return (x[0] + y[0],)
    else:
        return x[0] + y[0], x[1] + y[1]


@triton.jit
def _times(x, factor):
    if len(x) == 1:
        return (x[0] * factor,)
    else:
        return x[0] * factor, x[1] * factor


@triton.jit
def _cast(x, like):
    if len(x) == 1:
        return (x[0].to(like[0].dtype),)
    else:
        return x[0].to(like[0].dtype), x[1].to(like[0].dtype)


# ------------------------------------------------------------------------------------------------------------ weights


@triton.jit
def _visible(
    mask_ptr, strides, sequence, head, exists, there, SHAPE: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr
):
    """Which keys each query sees: [items, N or 1, N]."""
    visible = tl.expand_dims(there, -2)
    if mask_ptr is not None:
        at, within = _cells(sequence, head, exists, strides, 0, SHAPE, N, N, GROUP)
        visible = visible & (tl.load(mask_ptr + at, mask=within, other=0) != 0)
    return visible


@triton.jit
def _scores(q, k, visible, scale, KIND: tl.constexpr):
    """Scores in units of the kind, -inf where hidden."""
    return tl.where(visible, _over_width(q, k) * (scale * unit(KIND)), float("-inf"))


@triton.jit
def _weigh(s, f, sink, SINKS: tl.constexpr, KIND: tl.constexpr, CUT: tl.constexpr):
    """Level and mass [items, N] of rows with scores s of keys, f of the sink's rows and `sink` of its logit."""
    top = tl.max(s, -1)
    if SINKS > 0:
        top = tl.maximum(top, tl.max(f, -1))
    level = level_of(tl.maximum(top, sink), KIND)
    if KIND == RELU or KIND == RELU2:
        mass = tl.sum(tl.where(s > float("-inf"), 1.0, 0.0), -1) + SINKS
    else:
        mass = tl.sum(weight_of(s, _column(level), KIND, CUT), -1) + weight_of(sink, level, KIND, CUT)
        if SINKS > 0:
            mass += tl.sum(weight_of(f, _column(level), KIND, CUT), -1)
    return level, mass


@triton.jit
def _share(mass, there):
    """1 / mass, and 0 of rows without keys or without a token: [items, N]."""
    kept = there & (mass > 0)
    return tl.where(kept, 1.0 / tl.where(kept, mass, 1.0), 0.0)


@triton.jit
def _sink_logit(sink_ptr, head, KIND: tl.constexpr, GROUP: tl.constexpr):
    """Scores of the sink in units of the kind, -inf where there is none: [items, 1]."""
    if sink_ptr is None:
        return tl.full((1,), float("-inf"), tl.float32)
    else:
        return _each(tl.load(sink_ptr + head).to(tl.float32) * unit(KIND), GROUP)


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, sink_ptr, sink_k_ptr, sink_v_ptr, mask_ptr, out_ptr, map_ptr, lse_ptr,
    q_strides, k_strides, v_strides, mask_strides, out_strides, map_strides,
    sequences, heads, grid, counts, scale,
    SIZE: tl.constexpr, SHIFT: tl.constexpr, PARTIAL: tl.constexpr, PLACES: tl.constexpr, SINKS: tl.constexpr,
    D: tl.constexpr, VEC: tl.constexpr, KIND: tl.constexpr, CUT: tl.constexpr,
    PARTS: tl.constexpr, N: tl.constexpr, M: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    groups = heads // HEADS
    turn, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    sequence, head, exists = _items(turn, group, sequences, GROUP, HEADS)
    video, token, there = _places(sequence, exists, grid, counts, SIZE, SHIFT, PARTIAL, N, GROUP)
    q = _load(q_ptr, _rows(video, token, head, q_strides, VEC, GROUP), there, D, PARTS)
    k = _load(k_ptr, _rows(video, token, head, k_strides, VEC, GROUP), there, D, PARTS)
    v = _load(v_ptr, _rows(video, token, head, v_strides, VEC, GROUP), there, D, PARTS)
    visible = _visible(mask_ptr, mask_strides, sequence, head, exists, there, (PLACES, PLACES), N, GROUP)
    s = _scores(q, k, visible, scale, KIND)
    f = s
    rows, given = _sink_rows(head, SINKS, D, M, GROUP)
    if SINKS > 0:
        sink_k = _cast(_load(sink_k_ptr, rows, given, D, PARTS), q)
        f = _scores(q, sink_k, tl.expand_dims(given, -2), scale, KIND)
    level, mass = _weigh(s, f, _sink_logit(sink_ptr, head, KIND, GROUP), SINKS, KIND, CUT)
    share = _column(_share(mass, there))
    p = weight_of(s, _column(level), KIND, CUT) * share
    out = _over_places(p, v)
    if map_ptr is not None:
        at, within = _cells(sequence, head, exists, map_strides, SINKS, (PLACES, PLACES), N, N, GROUP)
        tl.store(map_ptr + at, p.to(map_ptr.dtype.element_ty), mask=within)
    if SINKS > 0:
        pf = weight_of(f, _column(level), KIND, CUT) * share
        out = _plus(out, _over_places(pf, _cast(_load(sink_v_ptr, rows, given, D, PARTS), q)))
        if map_ptr is not None:
            at, within = _cells(sequence, head, exists, map_strides, 0, (PLACES, SINKS), N, M, GROUP)
            tl.store(map_ptr + at, pf.to(map_ptr.dtype.element_ty), mask=within)
    _store(out_ptr, _rows(video, token, head, out_strides, VEC, GROUP), there, out, D, PARTS)
    if lse_ptr is not None:
        at, within = _row_numbers(sequence, head, exists, heads, PLACES, N, GROUP)
        kept = there & (mass > 0)
        lse = tl.log(tl.where(kept, mass, 1.0)) + level * (1.0 / unit(KIND))
        tl.store(lse_ptr + at, tl.where(kept, lse, float("-inf")), mask=within)


@triton.jit
def _attend_backward(
    q_ptr, k_ptr, v_ptr, sink_ptr, sink_k_ptr, sink_v_ptr, mask_ptr, d_out_ptr, d_map_ptr, d_lse_ptr,
    dq_ptr, dk_ptr, dv_ptr, d_sink_ptr, d_sink_k_ptr, d_sink_v_ptr,
    q_strides, k_strides, v_strides, mask_strides, d_out_strides, d_map_strides, d_strides,
    sequences, heads, grid, counts, scale,
    SIZE: tl.constexpr, SHIFT: tl.constexpr, PARTIAL: tl.constexpr, PLACES: tl.constexpr, SINKS: tl.constexpr,
    D: tl.constexpr, VEC: tl.constexpr, KIND: tl.constexpr, CUT: tl.constexpr,
    PARTS: tl.constexpr, N: tl.constexpr, M: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr,
    TURNED: tl.constexpr,
):  # fmt: skip
    groups = heads // HEADS
    turn, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    sequence, head, exists = _items(turn, group, sequences, GROUP, HEADS)
    video, token, there = _places(sequence, exists, grid, counts, SIZE, SHIFT, PARTIAL, N, GROUP)
    q = _load(q_ptr, _rows(video, token, head, q_strides, VEC, GROUP), there, D, PARTS)
    k = _load(k_ptr, _rows(video, token, head, k_strides, VEC, GROUP), there, D, PARTS)
    v = _load(v_ptr, _rows(video, token, head, v_strides, VEC, GROUP), there, D, PARTS)
    g = _load(d_out_ptr, _rows(video, token, head, d_out_strides, VEC, GROUP), there, D, PARTS)
    # The weights, as in the forward.
    visible = _visible(mask_ptr, mask_strides, sequence, head, exists, there, (PLACES, PLACES), N, GROUP)
    s = _scores(q, k, visible, scale, KIND)
    f, sink_k = s, k
    rows, given = _sink_rows(head, SINKS, D, M, GROUP)
    if SINKS > 0:
        sink_k = _cast(_load(sink_k_ptr, rows, given, D, PARTS), q)
        f = _scores(q, sink_k, tl.expand_dims(given, -2), scale, KIND)
    sink = _sink_logit(sink_ptr, head, KIND, GROUP)
    level, mass = _weigh(s, f, sink, SINKS, KIND, CUT)
    share = _column(_share(mass, there))
    # Their gradients, and what of these the mass takes back.
    w = weight_of(s, _column(level), KIND, CUT)
    p = w * share
    dp = _over_width(g, v)
    if d_map_ptr is not None:
        at, within = _cells(sequence, head, exists, d_map_strides, SINKS, (PLACES, PLACES), N, N, GROUP)
        dp += tl.load(d_map_ptr + at, mask=within & _column(there), other=0.0).to(tl.float32)
    delta = tl.sum(p * dp, -1)
    wf, dpf = w, dp
    if SINKS > 0:
        wf = weight_of(f, _column(level), KIND, CUT)
        dpf = _over_width(g, _cast(_load(sink_v_ptr, rows, given, D, PARTS), q))
        if d_map_ptr is not None:
            at, within = _cells(sequence, head, exists, d_map_strides, 0, (PLACES, SINKS), N, M, GROUP)
            dpf += tl.load(d_map_ptr + at, mask=within & _column(there), other=0.0).to(tl.float32)
        delta += tl.sum(wf * share * dpf, -1)
    if d_lse_ptr is not None:
        at, within = _row_numbers(sequence, head, exists, heads, PLACES, N, GROUP)
        delta -= tl.load(d_lse_ptr + at, mask=within & there, other=0.0)
    if KIND == RELU or KIND == RELU2:
        delta = tl.zeros_like(delta)
    # Through the scores.
    ds = slope_of(s, _column(level), w, KIND, CUT) * share * (dp - _column(delta))
    dq = _over_places(ds, k)
    if SINKS > 0:
        df = slope_of(f, _column(level), wf, KIND, CUT) * share * (dpf - _column(delta))
        dq = _plus(dq, _over_places(df, sink_k))
        parts, given = _sink_parts(sequence, head, exists, heads, SINKS, D, M, GROUP)
        _store(d_sink_k_ptr, parts, given, _times(_over_queries(df, q, TURNED), scale), D, PARTS)
        _store(d_sink_v_ptr, parts, given, _over_queries(wf * share, g, TURNED), D, PARTS)
    if sink_ptr is not None:
        slope = slope_of(sink, level, weight_of(sink, level, KIND, CUT), KIND, CUT)
        parts, given = _row_numbers(sequence, head, exists, heads, PLACES, N, GROUP)
        tl.store(d_sink_ptr + parts, -slope * _share(mass, there) * delta, mask=given)
    d_rows = _rows(video, token, head, d_strides, VEC, GROUP)
    _store(dq_ptr, d_rows, there, _times(dq, scale), D, PARTS)
    _store(dk_ptr, d_rows, there, _times(_over_queries(ds, q, TURNED), scale), D, PARTS)
    _store(dv_ptr, d_rows, there, _over_queries(p, g, TURNED), D, PARTS)


@triton.jit
def _apply(
    map_ptr, v_ptr, sink_v_ptr, out_ptr, map_strides, v_strides, out_strides, sequences, heads, grid, counts,
    SIZE: tl.constexpr, SHIFT: tl.constexpr, PARTIAL: tl.constexpr, PLACES: tl.constexpr, SINKS: tl.constexpr,
    D: tl.constexpr, VEC: tl.constexpr,
    PARTS: tl.constexpr, N: tl.constexpr, M: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    groups = heads // HEADS
    turn, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    sequence, head, exists = _items(turn, group, sequences, GROUP, HEADS)
    video, token, there = _places(sequence, exists, grid, counts, SIZE, SHIFT, PARTIAL, N, GROUP)
    v = _load(v_ptr, _rows(video, token, head, v_strides, VEC, GROUP), there, D, PARTS)
    at, within = _cells(sequence, head, exists, map_strides, SINKS, (PLACES, PLACES), N, N, GROUP)
    out = _over_places(tl.load(map_ptr + at, mask=within, other=0.0), v)
    if SINKS > 0:
        rows, given = _sink_rows(head, SINKS, D, M, GROUP)
        at, within = _cells(sequence, head, exists, map_strides, 0, (PLACES, SINKS), N, M, GROUP)
        p = tl.load(map_ptr + at, mask=within, other=0.0)
        out = _plus(out, _over_places(p, _cast(_load(sink_v_ptr, rows, given, D, PARTS), v)))
    _store(out_ptr, _rows(video, token, head, out_strides, VEC, GROUP), there, out, D, PARTS)


@triton.jit
def _apply_backward(
    map_ptr, v_ptr, sink_v_ptr, d_out_ptr, d_map_ptr, dv_ptr, d_sink_v_ptr,
    map_strides, v_strides, d_out_strides, d_map_strides, dv_strides, sequences, heads, grid, counts,
    SIZE: tl.constexpr, SHIFT: tl.constexpr, PARTIAL: tl.constexpr, PLACES: tl.constexpr, SINKS: tl.constexpr,
    D: tl.constexpr, VEC: tl.constexpr,
    PARTS: tl.constexpr, N: tl.constexpr, M: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr,
    TURNED: tl.constexpr,
):  # fmt: skip
    groups = heads // HEADS
    turn, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    sequence, head, exists = _items(turn, group, sequences, GROUP, HEADS)
    video, token, there = _places(sequence, exists, grid, counts, SIZE, SHIFT, PARTIAL, N, GROUP)
    v = _load(v_ptr, _rows(video, token, head, v_strides, VEC, GROUP), there, D, PARTS)
    g = _load(d_out_ptr, _rows(video, token, head, d_out_strides, VEC, GROUP), there, D, PARTS)
    at, within = _cells(sequence, head, exists, map_strides, SINKS, (PLACES, PLACES), N, N, GROUP)
    p = tl.load(map_ptr + at, mask=within, other=0.0)
    _store(dv_ptr, _rows(video, token, head, dv_strides, VEC, GROUP), there, _over_queries(p, g, TURNED), D, PARTS)
    at, within = _cells(sequence, head, exists, d_map_strides, SINKS, (PLACES, PLACES), N, N, GROUP)
    tl.store(d_map_ptr + at, _over_width(g, v).to(d_map_ptr.dtype.element_ty), mask=within)
    if SINKS > 0:
        rows, given = _sink_rows(head, SINKS, D, M, GROUP)
        at, within = _cells(sequence, head, exists, map_strides, 0, (PLACES, SINKS), N, M, GROUP)
        p = tl.load(map_ptr + at, mask=within, other=0.0)
        parts, given = _sink_parts(sequence, head, exists, heads, SINKS, D, M, GROUP)
        _store(d_sink_v_ptr, parts, given, _over_queries(p, g, TURNED), D, PARTS)
        dp = _over_width(g, _cast(_load(sink_v_ptr, rows, given, D, PARTS), g))
        at, within = _cells(sequence, head, exists, d_map_strides, 0, (PLACES, SINKS), N, M, GROUP)
        tl.store(d_map_ptr + at, dp.to(d_map_ptr.dtype.element_ty), mask=within)


# ---------------------------------------------------------------------------------------------------------- launchers


# What bf16 tiles compile to, without spills (registers per thread, KiB of shared memory, programs that fit on a
# multiprocessor of 65536 registers and 228 KiB); triton 3.9 for sm_90, and 3.6 where it differs by more than a few:
#
# | places x width | group, warps | forward | backward |
# |---|---|---|---|
# | 16 x 64 | 4, 4 | 56, 16, 9 | 72, 24, 7 |
# | 16 x 72 | 4, 4 | 72, 20, 7 | 93, 30, 5 |
# | 16 x 128 | 2, 2 | 96, 16, 10 | 128, 24, 8 |
# | 32 x 64 | 2, 2 | 95, 16, 10 (106, 16, 8) | 180, 24, 4 |
# | 32 x 72 | 2, 2 | 106, 20, 8 (128, 20, 8) | 178, 30, 4 |
# | 32 x 128 | 1, 4 | 64, 16, 8 | 106, 24, 4 (86, 40, 5) |
# | 64 x 64 | 1, 4 | 80, 24, 6 | 111, 32, 4 |
# | 64 x 72 | 1, 4 | 82, 30, 5 | 158, 42, 3 |
# | 64 x 128 | 1, 4 | 124, 48, 4 | 163, 64, 3 |
# | 128 x 64 | 1, 8 | 111, 48, 2 | 160, 80, 1 |
# | 128 x 128 | 1, 8 | 124, 96, 2 | 204, 128, 1 |
#
# Backwards that do not fit: float32 from 64 places on (kilobytes spilled); before Hopper 128 places (124 B at width 64,
# 1.8 KB at 128) and 64 with rows of a sink (44 B). Products of [items, ...] with fewer items than warps are done by
# every warp in 3.6.


class Tiles(NamedTuple):
    """What a program works on, and with how many warps."""

    group: int
    warps: int


def tiles_of(places: int, width: int, itemsize: int, sinks: int) -> Tiles:
    """For tiles of `places` x `width` elements. Products of [items, places, ...] give each item a warp."""
    if itemsize == 4:  # multiplied and added without tensor cores, in more registers
        return Tiles(2, 4) if places == 16 and width <= 80 else Tiles(1, 4 if places == 16 or width <= 80 else 8)
    if places >= 64:
        return Tiles(1, places // 16)
    if sinks or (width > 80 and places == 32):
        return Tiles(1, 4)
    if width > 80:
        return Tiles(2, 2)
    return Tiles(4, 4) if places == 16 else Tiles(2, 2)


def width_parts(width: int) -> tuple[int, ...]:
    """Powers of two, 16 at least, that cover the width of a head: one, or two where they are less together."""
    whole = max(16, triton.next_power_of_2(width))
    first = whole // 2
    rest = max(16, triton.next_power_of_2(width - first)) if width > first else whole
    return (first, rest) if first >= 16 and first + rest < whole else (whole,)


def forward(
    q: Tensor, k: Tensor, v: Tensor, boxes: Boxes, normaliser: Normaliser,
    sink: Tensor | None = None, sink_k: Tensor | None = None, sink_v: Tensor | None = None, mask: Tensor | None = None,
    with_map: bool = False, with_lse: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Output [B, N, heads, D], map [S, heads, n, sinks + n] and LSE [S, heads, n], None where not asked for."""
    call = _Call.of(q, boxes, sink_k)
    out = q.new_empty(q.shape)
    weights = q.new_empty(call.map_shape) if with_map else None
    lse = q.new_empty(call.map_shape[:3], dtype=torch.float32) if with_lse else None
    mask, vec = call.spread(mask), _vec(q, k, v, out)
    _attend[call.programs](
        q, k, v, _whole(sink), _whole(sink_k), _whole(sink_v), mask, out, weights, lse,
        *(_strides(x, vec) for x in (q, k, v)), _strides(mask), _strides(out, vec), _strides(weights),
        call.sequences, call.heads, boxes.grid, boxes.counts, q.shape[3] ** -0.5,
        VEC=vec, **call.shape, **kernel_kind(normaliser), num_warps=call.tiles.warps, num_stages=1,
    )  # fmt: skip
    return out, weights, lse


def backward(
    d_out: Tensor, d_map: Tensor | None, d_lse: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, boxes: Boxes, normaliser: Normaliser,
    sink: Tensor | None = None, sink_k: Tensor | None = None, sink_v: Tensor | None = None, mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of q, k and v side by side [B, N, 3, heads, D], and float32 ones of sink, sink_k and sink_v."""
    call = _Call.of(q, boxes, sink_k)
    d_qkv = q.new_empty(*q.shape[:2], 3, *q.shape[2:])
    dq, dk, dv = d_qkv.unbind(2)
    d_sink = None if sink is None else sink.new_empty(call.map_shape[:3], dtype=torch.float32)
    d_sink_k, d_sink_v = call.parts(sink_k), call.parts(sink_v)
    plain = normaliser.kind == "softmax" and all(x is None for x in (d_map, d_lse, sink, mask))
    mask, vec = call.spread(mask), _vec(q, k, v, d_out, dq)
    _attend_backward[call.programs](
        q, k, v, _whole(sink), _whole(sink_k), _whole(sink_v), mask, d_out, d_map, _whole(d_lse),
        dq, dk, dv, d_sink, d_sink_k, d_sink_v,
        *(_strides(x, vec) for x in (q, k, v)), _strides(mask), _strides(d_out, vec), _strides(d_map), _strides(dq, vec),
        call.sequences, call.heads, boxes.grid, boxes.counts, q.shape[3] ** -0.5,
        VEC=vec, TURNED=_turned(call.tiles), **call.shape, **kernel_kind(normaliser), num_warps=call.tiles.warps, num_stages=1,
        maxnreg=_most_registers(call.tiles, q.shape[3], plain),
    )  # fmt: skip
    return d_qkv, None if d_sink is None else d_sink.sum((0, 2)), _summed(d_sink_k), _summed(d_sink_v)


def apply_forward(weights: Tensor, v: Tensor, boxes: Boxes, sink_v: Tensor | None = None) -> Tensor:
    """P v of a map [S, heads, n, sinks + n]: [B, N, heads, D]."""
    call = _Call.of(v, boxes, sink_v)
    out = v.new_empty(v.shape)
    vec = _vec(v, out)
    _apply[call.programs](
        weights, v, _whole(sink_v), out, _strides(weights), _strides(v, vec), _strides(out, vec),
        call.sequences, call.heads, boxes.grid, boxes.counts,
        VEC=vec, **call.shape, num_warps=call.tiles.warps, num_stages=1,
    )  # fmt: skip
    return out


def apply_backward(
    d_out: Tensor, weights: Tensor, v: Tensor, boxes: Boxes, sink_v: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of a map, of v, and in float32 of sink_v."""
    call = _Call.of(v, boxes, sink_v)
    d_weights, dv, d_sink_v = weights.new_empty(weights.shape), v.new_empty(v.shape), call.parts(sink_v)
    vec = _vec(v, d_out, dv)
    _apply_backward[call.programs](
        weights, v, _whole(sink_v), d_out, d_weights, dv, d_sink_v,
        _strides(weights), _strides(v, vec), _strides(d_out, vec), _strides(d_weights), _strides(dv, vec),
        call.sequences, call.heads, boxes.grid, boxes.counts,
        VEC=vec, TURNED=_turned(call.tiles), **call.shape, num_warps=call.tiles.warps, num_stages=1,
    )  # fmt: skip
    return d_weights, dv, _summed(d_sink_v)


class _Call(NamedTuple):
    """What launches of one shape have in common."""

    sequences: int
    heads: int
    map_shape: tuple[int, int, int, int]
    tiles: Tiles
    shape: dict[str, Any]  # constants of the kernels

    @staticmethod
    def of(x: Tensor, boxes: Boxes, sinks: Tensor | None) -> "_Call":
        videos, _, heads, width = x.shape
        count = 0 if sinks is None else sinks.shape[1]
        parts, places = width_parts(width), _tile(boxes.places)
        tiles = tiles_of(places, sum(parts), x.element_size(), count)
        shape = {
            "SIZE": boxes.size, "SHIFT": boxes.shift, "PARTIAL": boxes.is_cut, "PLACES": boxes.places, "SINKS": count,
            "D": width, "PARTS": parts, "N": places, "M": _tile(count),
            "GROUP": tiles.group, "HEADS": math.gcd(heads, tiles.group),
        }  # fmt: skip
        sequences = videos * boxes.count
        return _Call(sequences, heads, (sequences, heads, boxes.places, count + boxes.places), tiles, shape)

    @property
    def programs(self) -> tuple[int]:
        heads = self.shape["HEADS"]
        return (-(-self.sequences // (self.tiles.group // heads)) * (self.heads // heads),)

    def parts(self, x: Tensor | None) -> Tensor | None:
        """Room for the parts of the gradient of sink rows x, one of each sequence: [S, *x.shape] float32."""
        return None if x is None else x.new_empty(self.sequences, *x.shape, dtype=torch.float32)

    def spread(self, mask: Tensor | None) -> Tensor | None:
        """A mask's bytes with the strides of [S, heads, n, n]."""
        places = self.map_shape[2]
        return None if mask is None else mask.expand(self.sequences, self.heads, places, places).view(torch.uint8)


def _turned(tiles: Tiles) -> bool:
    """Whether products with a transposed map are turned around: those of plain matrices on Hopper (see the kernel)."""
    return tiles.group == 1 and _architecture() == 90


def _most_registers(tiles: Tiles, width: int, plain: bool) -> int | None:
    """For a thread of the backward. At 16 x 64 on Ampere, where shared memory admits six programs, the compiler of triton
    3.6 spills to fit a seventh; 80 registers are those of six. What is not `plain` takes more."""
    return 80 if plain and tiles.group == 4 and width == 64 and _architecture() == 80 else None


def _architecture() -> int | str:
    return 90 if knobs.runtime.interpret else driver.active.get_current_target().arch  # type: ignore


def _tile(n: int) -> int:
    return max(16, triton.next_power_of_2(n))


def _whole(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _summed(parts: Tensor | None) -> Tensor | None:
    return None if parts is None else parts.sum(0)


def _vec(*tensors: Tensor) -> int:
    """Elements that one access may take together: 16 bytes if all strides are multiples of that, else less."""
    return math.gcd(16 // tensors[0].element_size(), *(s for x in tensors for s in x.stride()[:3]))


def _strides(x: Tensor | None, vec: int | None = None) -> tuple[int, ...] | None:
    """Strides of rows in `vec`s where that is given, else of elements."""
    if x is None:
        return None
    return x.stride() if vec is None else tuple(s // vec for s in x.stride()[:3])
