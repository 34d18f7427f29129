"""Linear attention on Triton: a sum over keys that queries read, forward and backward.

With features q [F], k [F] and values v [D], and for each segment of queries the state M = sum_j k_j v_j^T [F, D] and
z = sum_j k_j [F]:

    num = q M,  mass = q · z,  out = num / mass
    g = dout / mass,  c = -(dout · num) / mass^2
    dq = g M^T + c z,   dM = sum_i q_i g_i^T,  dz = sum_i q_i c_i
    dk = v dM^T + dz,   dv = k dM

so the backward pass sums over queries what keys read, by the same kernel. States of block-causal attention are running
sums over ranges (see `cut.py`). The delta rule of Infini-attention (arXiv:2404.07143, section 2.1.2) adds u = v - a with
a = k M / (k · z) in the place of v; its states follow one another in a loop. With R the gradient of the state after a
range, M and z the state before it:

    du = k R,  dv = du,  h = -du / (k · z),  e = (du · a) / (k · z)
    dk = u R^T + h M^T + e z + dz,   R += dM + sum_j k_j h_j^T,  dz += sum_j k_j e_j

States are float32. Products of float32 inputs are exact (ieee). Inputs of 16 bits are multiplied as they are, and with a
state or a weight as the sum of two bfloat16: rounded to one it would be the largest error where dout · num is close to
what it is subtracted from, and float16 would overflow.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from stgen.ops.linear_attention.cut import Cut

Memory = tuple[Tensor, Tensor]  # M [S, heads, states, F, D], z [S, heads, states, F], float32

PROGRAMS = 528  # that a sum over all keys is split into, about: four for each multiprocessor of an H200
SPLIT = 256  # keys of a split at least
CLASSES = (torch.bfloat16, torch.float16, torch.float32)
TILES = {  # rows and columns of D of a tile, for up to 64 features and for more, so that nothing spills
    "sum": ((128, 64), (128, 64), (64, 32), (64, 32), (32, 64), (16, 16)),
    "scaled sum": ((64, 32), (64, 32), (64, 32), (64, 32), (32, 64), (16, 16)),
    "delta": ((64, 32), (64, 32), (64, 32), (16, 32), (32, 32), (32, 16)),
    "delta backward": ((64, 32), (64, 16), (64, 32), (16, 32), (32, 32), (16, 32)),
    "read": ((64, 32), (64, 32), (64, 32), (64, 16), (32, 32), (16, 16)),
    "read backward": ((64, 32), (32, 32), (64, 16), (32, 32), (32, 16), (16, 16)),
    "keys backward": ((64, 16), (32, 32), (32, 32), (32, 32), (16, 16), (16, 16)),
    "keys backward of delta": ((32, 32), (16, 32), (32, 32), (16, 16), (32, 32), (16, 16)),
    "within": ((32, 32), (32, 16), (32, 16), (32, 16), (32, 32), (32, 16)),  # as long as a segment, WITHIN, or longer
}
SCAN = 1024  # entries of a state that a program adds up


@triton.jit
def _halves(x):
    """x as the sum of two bfloat16, to 16 bits and in the range of float32."""
    high = x.to(tl.bfloat16)
    return high, (x.to(tl.float32) - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _product(a, b, acc, EXACT: tl.constexpr):
    """acc + a b in float32."""
    if EXACT:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif a.dtype == b.dtype and a.dtype != tl.float32:
        return tl.dot(a, b, acc)
    else:
        a_high, a_low = _halves(a)
        b_high, b_low = _halves(b)
        if a.dtype != tl.bfloat16:
            acc = tl.dot(a_low, b_high, acc)
        if b.dtype != tl.bfloat16:
            acc = tl.dot(a_high, b_low, acc)
        return tl.dot(a_high, b_high, acc)


@triton.jit
def _tile(x, stride, rows, inside, columns, WIDTH: tl.constexpr):
    """Rows of x [rows, WIDTH], zeros where not inside."""
    mask = inside[:, None] & (columns < WIDTH)[None, :]
    return tl.load(x + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _put(x, stride, rows, inside, columns, value, WIDTH: tl.constexpr):
    """What _tile reads, written in the type of x."""
    mask = inside[:, None] & (columns < WIDTH)[None, :]
    tl.store(x + rows[:, None] * stride + columns[None, :], value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _state(state, number, f, d, F: tl.constexpr, D: tl.constexpr):
    """State `number` of [.., F, D]: [BLOCK_F, columns d]."""
    mask = (f < F)[:, None] & (d < D)[None, :]
    return tl.load(state + number.to(tl.int64) * (F * D) + f[:, None] * D + d[None, :], mask=mask, other=0.0)


@triton.jit
def _put_state(state, number, f, d, value, F: tl.constexpr, D: tl.constexpr):
    mask = (f < F)[:, None] & (d < D)[None, :]
    tl.store(state + number.to(tl.int64) * (F * D) + f[:, None] * D + d[None, :], value, mask=mask)


@triton.jit
def _total(total, number, f, F: tl.constexpr):
    """z of state `number`: [BLOCK_F]."""
    return tl.load(total + number.to(tl.int64) * F + f, mask=f < F, other=0.0)


@triton.jit
def _head(x, strides, sequence_head, heads, VEC: tl.constexpr):
    """Where the rows of a head begin; strides are in units of VEC, which the compiler then knows to divide them."""
    sequence, head = (sequence_head // heads).to(tl.int64), (sequence_head % heads).to(tl.int64)
    return x + sequence * (strides[0] * VEC) + head * (strides[1] * VEC)


@triton.jit
def _range(number, prefix, size, rows):
    """First row of a range and the one after its last."""
    first = tl.where(number == 0, 0, prefix + (number - 1) * size)
    return tl.minimum(first, rows), tl.minimum(prefix + number * size, rows)


@triton.jit
def _shown(mask, stride, sequence_head, heads, rows, inside, MASKED: tl.constexpr):
    """The rows inside that the key mask shows."""
    if MASKED:
        mask += (sequence_head // heads).to(tl.int64) * stride
        return inside & (tl.load(mask + rows, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _inverse(mass):
    """1 / mass, and 0 where there is none."""
    return tl.where(mass == 0.0, 0.0, 1.0 / tl.where(mass == 0.0, 1.0, mass))


@triton.jit
def _sum_kernel(
    k, v, scale, weight, mask, state, total, k_strides, v_strides, mask_s, heads, rows, prefix, size, ranges,
    F: tl.constexpr, D: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    SCALED: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Of each range: M = sum k v^T and z = sum k; SCALED: M = sum k (scale v)^T and z = sum weight k."""
    sequence_head, number = tl.program_id(0) // ranges, tl.program_id(0) % ranges
    f, d = tl.arange(0, BLOCK_F), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    k, v = _head(k, k_strides, sequence_head, heads, VEC), _head(v, v_strides, sequence_head, heads, VEC)
    first, last = _range(number, prefix, size, rows)
    acc, z = tl.zeros((BLOCK_F, BLOCK_D), tl.float32), tl.zeros((BLOCK_F,), tl.float32)
    for start in range(first, last, BLOCK_N):
        row = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        inside = _shown(mask, mask_s, sequence_head, heads, row, row < last, MASKED)
        x, y = _tile(k, k_strides[2] * VEC, row, inside, f, F), _tile(v, v_strides[2] * VEC, row, inside, d, D)
        if SCALED:
            at = sequence_head.to(tl.int64) * rows + row
            y = y.to(tl.float32) * tl.load(scale + at, mask=inside, other=0.0)[:, None]
            z += tl.sum(x.to(tl.float32) * tl.load(weight + at, mask=inside, other=0.0)[:, None], 0)
        else:
            z += tl.sum(x.to(tl.float32), 0)
        acc = _product(tl.trans(x), y, acc, EXACT)
    _put_state(state, tl.program_id(0), f, d, acc, F, D)
    if tl.program_id(1) == 0:
        tl.store(total + tl.program_id(0).to(tl.int64) * F + f, z, mask=f < F)


@triton.jit
def _scan_kernel(x, states, width, tiles, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """x [S * heads, states, width]: each state becomes the sum of those up to it; REVERSE: of those from it on."""
    column = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    at = x + (tl.program_id(0) // tiles).to(tl.int64) * states * width + column
    if REVERSE:
        at += (states - 1) * width
    carry = tl.zeros((BLOCK,), tl.float32)
    for _ in range(states):
        carry += tl.load(at, mask=column < width, other=0.0)
        tl.store(at, carry, mask=column < width)
        if REVERSE:
            at -= width
        else:
            at += width


@triton.jit
def _place(tiles, parts):
    """Sequence and head, number of the part, and tile of this program; programs of a head follow one another."""
    program = tl.program_id(0)
    return program // (parts * tiles), program // tiles % parts, program % tiles


@triton.jit
def _weights(q, k, queries, keys, shown_q, shown_k, chunk, EXACT: tl.constexpr):
    """Which pairs of places of a segment are seen, and their weights: [BLOCK_N, BLOCK_N]."""
    acc = tl.zeros((q.shape[0], k.shape[0]), tl.float32)
    seen = (keys // chunk)[None, :] <= (queries // chunk)[:, None]
    seen = seen & shown_q[:, None] & shown_k[None, :]
    return seen, tl.where(seen, _product(q, tl.trans(k), acc, EXACT), 0.0)


@triton.jit
def _read_kernel(
    q, k, v, mask, state, total, out,
    q_strides, k_strides, v_strides, mask_s,
    heads, queries, size, segments, tiles, prefix, first, states, chunk,
    F: tl.constexpr, D: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    WITHIN: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """out [S, heads, n, D], contiguous: what a tile of a segment reads of its state, and of itself where WITHIN."""
    sequence_head, segment, tile = _place(tiles, segments)
    if segment * size + tile * BLOCK_N >= queries:
        return
    place = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row = (segment * size + place).to(tl.int64)
    inside = (place < size) & (row < queries)
    f = tl.arange(0, BLOCK_F)
    q_tile = _tile(_head(q, q_strides, sequence_head, heads, VEC), q_strides[2] * VEC, row, inside, f, F)
    number = sequence_head * states + segment + first
    mass = tl.sum(q_tile.to(tl.float32) * _total(total, number, f, F)[None, :], 1)
    if WITHIN:
        shown = _shown(mask, mask_s, sequence_head, heads, prefix + row, inside, MASKED)
        k_tile = _tile(_head(k, k_strides, sequence_head, heads, VEC), k_strides[2] * VEC, prefix + row, shown, f, F)
        _, w = _weights(q_tile, k_tile, place, place, inside, shown, chunk, EXACT)
        mass += tl.sum(w, 1)
    inverse = _inverse(mass)
    for column in range(0, D, BLOCK_D):
        d = column + tl.arange(0, BLOCK_D)
        num = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        num = _product(q_tile, _state(state, number, f, d, F, D), num, EXACT)
        if WITHIN:
            v_tile = _tile(
                _head(v, v_strides, sequence_head, heads, VEC), v_strides[2] * VEC, prefix + row, shown, d, D
            )
            num = _product(w, v_tile, num, EXACT)
        _put(out + sequence_head.to(tl.int64) * queries * D, D, row, inside, d, num * inverse[:, None], D)


@triton.jit
def _read_backward_kernel(
    q, k, v, mask, state, total, d_out, d_q, scale, weight,
    q_strides, k_strides, v_strides, g_strides, mask_s,
    heads, queries, size, segments, tiles, prefix, first, states, chunk,
    F: tl.constexpr, D: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    WITHIN: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """dq [S, heads, n, F], and for the sums over queries scale = 1 / mass and weight = c [S, heads, n]."""
    sequence_head, segment, tile = _place(tiles, segments)
    if segment * size + tile * BLOCK_N >= queries:
        return
    place = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row = (segment * size + place).to(tl.int64)
    inside = (place < size) & (row < queries)
    f = tl.arange(0, BLOCK_F)
    q_tile = _tile(_head(q, q_strides, sequence_head, heads, VEC), q_strides[2] * VEC, row, inside, f, F)
    number = sequence_head * states + segment + first
    z = _total(total, number, f, F)
    mass = tl.sum(q_tile.to(tl.float32) * z[None, :], 1)
    if WITHIN:
        shown = _shown(mask, mask_s, sequence_head, heads, prefix + row, inside, MASKED)
        k_tile = _tile(_head(k, k_strides, sequence_head, heads, VEC), k_strides[2] * VEC, prefix + row, shown, f, F)
        seen, w = _weights(q_tile, k_tile, place, place, inside, shown, chunk, EXACT)
        mass += tl.sum(w, 1)
        dw = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    inverse = _inverse(mass)
    dot = tl.zeros((BLOCK_N,), tl.float32)  # dout · num
    dq = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
    for column in range(0, D, BLOCK_D):
        d = column + tl.arange(0, BLOCK_D)
        m = _state(state, number, f, d, F, D)
        g = _tile(_head(d_out, g_strides, sequence_head, heads, VEC), g_strides[2] * VEC, row, inside, d, D)
        num = _product(q_tile, m, tl.zeros((BLOCK_N, BLOCK_D), tl.float32), EXACT)
        if WITHIN:
            v_tile = _tile(
                _head(v, v_strides, sequence_head, heads, VEC), v_strides[2] * VEC, prefix + row, shown, d, D
            )
            num = _product(w, v_tile, num, EXACT)
            dw = _product(g, tl.trans(v_tile), dw, EXACT)
        dot += tl.sum(g.to(tl.float32) * num, 1)
        dq = _product(g, tl.trans(m), dq, EXACT)
    c = -(dot * inverse) * inverse
    dq = dq * inverse[:, None] + c[:, None] * z[None, :]
    if WITHIN:
        dw = tl.where(seen, dw * inverse[:, None] + c[:, None], 0.0)
        dq = _product(dw, k_tile, dq, EXACT)
    at = sequence_head.to(tl.int64) * queries
    _put(d_q + at * F, F, row, inside, f, dq, F)
    tl.store(scale + at + row, inverse, mask=inside)
    tl.store(weight + at + row, c, mask=inside)


@triton.jit
def _keys_backward_kernel(
    q, k, v, mask, state, total, d_state, d_total, d_out, scale, weight, d_k, d_v,
    q_strides, k_strides, v_strides, g_strides, mask_s,
    heads, queries, keys, size, ranges, tiles, prefix, states, chunk,
    F: tl.constexpr, D: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    WITHIN: tl.constexpr, DELTA: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """dk [S, heads, m, F] and dv [S, heads, m, D] of a tile of a range, from the gradient of its state."""
    sequence_head, number, tile = _place(tiles, ranges)
    start, last = _range(number, prefix, size, keys)
    if start + tile * BLOCK_N >= last:
        return
    place = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row = (start + place).to(tl.int64)
    inside = row < last
    shown = _shown(mask, mask_s, sequence_head, heads, row, inside, MASKED)
    f = tl.arange(0, BLOCK_F)
    k_tile = _tile(_head(k, k_strides, sequence_head, heads, VEC), k_strides[2] * VEC, row, shown, f, F)
    after = sequence_head * states + number
    dk = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
    if WITHIN:  # range r > 0 is the segment of queries r - 1
        query = row - prefix
        known = inside & (query >= 0)
        q_tile = _tile(_head(q, q_strides, sequence_head, heads, VEC), q_strides[2] * VEC, query, known, f, F)
        seen, w = _weights(q_tile, k_tile, place, place, known, shown, chunk, EXACT)
        at = sequence_head.to(tl.int64) * queries + query
        inverse, c = tl.load(scale + at, mask=known, other=0.0), tl.load(weight + at, mask=known, other=0.0)
        dw = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    if DELTA:
        z = _total(total, after - 1, f, F)
        inverse = _inverse(tl.sum(k_tile.to(tl.float32) * z[None, :], 1))
    e = tl.zeros((BLOCK_N,), tl.float32)
    for column in range(0, D, BLOCK_D):
        d = column + tl.arange(0, BLOCK_D)
        r = _state(d_state, after, f, d, F, D)
        v_tile = _tile(_head(v, v_strides, sequence_head, heads, VEC), v_strides[2] * VEC, row, shown, d, D)
        dv = _product(k_tile, r, tl.zeros((BLOCK_N, BLOCK_D), tl.float32), EXACT)
        if WITHIN:
            g = _tile(_head(d_out, g_strides, sequence_head, heads, VEC), g_strides[2] * VEC, query, known, d, D)
            dw = _product(g, tl.trans(v_tile), dw, EXACT)
            dv = _product(tl.trans(w), g.to(tl.float32) * inverse[:, None], dv, EXACT)
        if DELTA:
            m = _state(state, after - 1, f, d, F, D)
            a = _product(k_tile, m, tl.zeros((BLOCK_N, BLOCK_D), tl.float32), EXACT) * inverse[:, None]
            dk = _product(v_tile.to(tl.float32) - a, tl.trans(r), dk, EXACT)
            dk = _product(-dv * inverse[:, None], tl.trans(m), dk, EXACT)
            e = e + tl.sum(dv * a, 1) * inverse
        else:
            dk = _product(v_tile, tl.trans(r), dk, EXACT)
        dv = tl.where(shown[:, None], dv, 0.0)
        _put(d_v + sequence_head.to(tl.int64) * keys * D, D, row, inside, d, dv, D)
    if WITHIN:
        dw = tl.where(seen, dw * inverse[:, None] + c[:, None], 0.0)
        dk = _product(tl.trans(dw), q_tile, dk, EXACT)
    if DELTA:
        dk += e[:, None] * z[None, :]
    dk = tl.where(shown[:, None], dk + _total(d_total, after, f, F)[None, :], 0.0)
    _put(d_k + sequence_head.to(tl.int64) * keys * F, F, row, inside, f, dk, F)


@triton.jit
def _delta_kernel(
    k, v, state, total, k_strides, v_strides, heads, rows, size, states,
    F: tl.constexpr, D: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    EXACT: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """States by the delta rule, one after the other; state 0 is given."""
    sequence_head, number = tl.program_id(0), tl.program_id(0) * states
    f, d = tl.arange(0, BLOCK_F), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    k, v = _head(k, k_strides, sequence_head, heads, VEC), _head(v, v_strides, sequence_head, heads, VEC)
    m, z = _state(state, number, f, d, F, D), _total(total, number, f, F)
    for segment in range(states - 1):
        next_m, next_z = m, z
        last = tl.minimum(segment * size + size, rows)
        for start in range(segment * size, last, BLOCK_N):
            row = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
            k_tile, v_tile = (
                _tile(k, k_strides[2] * VEC, row, row < last, f, F),
                _tile(v, v_strides[2] * VEC, row, row < last, d, D),
            )
            inverse = _inverse(tl.sum(k_tile.to(tl.float32) * z[None, :], 1))
            a = _product(k_tile, m, tl.zeros((BLOCK_N, BLOCK_D), tl.float32), EXACT) * inverse[:, None]
            next_m = _product(tl.trans(k_tile), v_tile.to(tl.float32) - a, next_m, EXACT)
            next_z += tl.sum(k_tile.to(tl.float32), 0)
        m, z, number = next_m, next_z, number + 1
        _put_state(state, number, f, d, m, F, D)
        if tl.program_id(1) == 0:
            tl.store(total + number.to(tl.int64) * F + f, z, mask=f < F)


@triton.jit
def _delta_backward_kernel(
    k, state, total, d_state, d_total, k_strides, heads, rows, size, states,
    F: tl.constexpr, D: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    EXACT: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """d_state holds what reads of each state add to its gradient, and becomes the gradient; d_total [S, heads, states,
    tiles of D, F] becomes a tile's part of the sums of e k over all ranges behind each state."""
    sequence_head, parts, part = tl.program_id(0), tl.num_programs(1), tl.program_id(1)
    f, d = tl.arange(0, BLOCK_F), part * BLOCK_D + tl.arange(0, BLOCK_D)
    k = _head(k, k_strides, sequence_head, heads, VEC)
    number = sequence_head * states + states - 1
    r, dz = _state(d_state, number, f, d, F, D), tl.zeros((BLOCK_F,), tl.float32)
    tl.store(d_total + (number.to(tl.int64) * parts + part) * F + f, dz, mask=f < F)
    for i in range(states - 1):
        number -= 1
        m, z, next_r = _state(state, number, f, d, F, D), _total(total, number, f, F), r
        first = (states - 2 - i) * size
        last = tl.minimum(first + size, rows)
        for start in range(first, last, BLOCK_N):
            row = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
            k_tile = _tile(k, k_strides[2] * VEC, row, row < last, f, F)
            inverse = _inverse(tl.sum(k_tile.to(tl.float32) * z[None, :], 1))
            zeros = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            du = _product(k_tile, r, zeros, EXACT) * inverse[:, None]
            a = _product(k_tile, m, zeros, EXACT) * inverse[:, None]
            next_r = _product(tl.trans(k_tile), -du, next_r, EXACT)
            dz += tl.sum(k_tile.to(tl.float32) * tl.expand_dims(tl.sum(du * a, 1), 1), 0)
        r = next_r + _state(d_state, number, f, d, F, D)
        _put_state(d_state, number, f, d, r, F, D)
        tl.store(d_total + (number.to(tl.int64) * parts + part) * F + f, dz, mask=f < F)


# --------------------------------------------------------------------------------------------------------- launchers


def forward(phi_q: Tensor, phi_k: Tensor, v: Tensor, key_mask: Tensor | None, cut: Cut) -> tuple[Tensor, Memory]:
    """What each query reads of the states and, where `cut` says so, of its own segment, and those states.

    phi_q [S, heads, n, F], phi_k [S, heads, m, F], v [S, heads, m, D], key_mask [S, m] bool -> [S, heads, n, D] in the
    type of v.
    """
    phi_q, phi_k, v = _rows(phi_q), _rows(phi_k), _rows(v)
    key_mask = None if key_mask is None else _rows(key_mask)
    memory = _summed(phi_k, v, None, key_mask, cut.prefix, cut.size, cut.ranges)
    _scan(memory)
    return _read(phi_q, phi_k, v, key_mask, memory, cut), memory


def backward(
    d_out: Tensor, phi_q: Tensor, phi_k: Tensor, v: Tensor, key_mask: Tensor | None, memory: Memory, cut: Cut
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of phi_q, phi_k and v."""
    d_out, phi_q, phi_k, v = (_rows(x) for x in (d_out, phi_q, phi_k, v))
    key_mask = None if key_mask is None else _rows(key_mask)
    d_q, scales = _read_backward(d_out, phi_q, phi_k, v, key_mask, memory, cut)
    d_memory = _summed(phi_q, d_out, scales, None, *_queries_of(cut))
    _scan(d_memory, reverse=True)
    d_k, d_v = _keys_backward(d_out, phi_q, phi_k, v, key_mask, memory, d_memory, scales, cut, delta=False)
    return d_q, d_k, d_v


def forward_memory(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, memory: Memory | None, segment: int, delta: bool
) -> tuple[Tensor, Memory]:
    """What each segment reads of the states before it, and all states: the incoming one ([S, heads, F, D] and
    [S, heads, F]; None: zeros) and that after each segment."""
    phi_q, phi_k, v = _rows(phi_q), _rows(phi_k), _rows(v)
    cut = Cut.of_memory(phi_q.shape[2], segment)
    if delta:
        states = _delta(phi_k, v, memory, cut)
    else:
        states = _summed(phi_k, v, None, None, cut.prefix, cut.size, cut.ranges)
        if memory is not None:
            _put_in(states, 0, memory)
        _scan(states)
    return _read(phi_q, phi_k, v, None, states, cut), states


def backward_memory(
    d_out: Tensor, d_last: Memory, phi_q: Tensor, phi_k: Tensor, v: Tensor, states: Memory, segment: int, delta: bool
) -> tuple[Tensor, Tensor, Tensor, Memory]:
    """Gradients of phi_q, phi_k, v and the incoming state, from those of the output and the outgoing state."""
    d_out, phi_q, phi_k, v = (_rows(x) for x in (d_out, phi_q, phi_k, v))
    cut = Cut.of_memory(phi_q.shape[2], segment)
    d_q, scales = _read_backward(d_out, phi_q, phi_k, v, None, states, cut)
    d_states = _summed(phi_q, d_out, scales, None, *_queries_of(cut))  # nothing reads the last
    _put_in(d_states, -1, d_last)
    if delta:
        d_states = _delta_backward(phi_k, v, states, d_states, cut)
    else:
        _scan(d_states, reverse=True)
    d_k, d_v = _keys_backward(d_out, phi_q, phi_k, v, None, states, d_states, scales, cut, delta)
    return d_q, d_k, d_v, (d_states[0][:, :, 0].clone(), d_states[1][:, :, 0].clone())


def _put_in(states: Memory, number: int, memory: Memory) -> None:
    for all_of_them, given in zip(states, memory, strict=True):
        all_of_them[:, :, number] = given


def _queries_of(cut: Cut) -> tuple[int, int, int]:
    """Prefix, size and number of ranges of queries, so that the sum of those from r on is what reads key range r."""
    prefix = cut.size if cut.first == 0 else 0  # the state before a range is read by the segments behind it
    return prefix, cut.size, cut.ranges


def _rows(x: Tensor) -> Tensor:
    """x with last axis of stride 1, which kernels take for granted; the others may be any."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _power(n: int) -> int:
    """The least power of two from n on that a product of tiles takes."""
    return max(16, triton.next_power_of_2(n))


def _constants(kernel: str, rows: int, vec: int, k: Tensor, v: Tensor, **flags: bool) -> dict[str, Any]:
    """What a kernel is compiled for."""
    features, head_dim, exact = k.shape[-1], v.shape[-1], torch.float32 in (k.dtype, v.dtype)
    wide, kind = features > 64, torch.float32 if exact else k.dtype
    most, columns = TILES[kernel][2 * CLASSES.index(kind) + wide]
    return {
        "F": features,
        "D": head_dim,
        "EXACT": exact,
        "VEC": vec,
        "BLOCK_F": _power(features),
        "BLOCK_D": min(columns, _power(head_dim)),
        "BLOCK_N": min(most, _power(rows)),
        "num_warps": 8 if exact or wide else 4,
        "num_stages": 1,
        **flags,
    }


def _masked(mask: Tensor | None, k: Tensor) -> tuple[Tensor, int]:
    """The key mask and its stride, or anything for a kernel that takes none."""
    return (k, 0) if mask is None else (mask, mask.stride(0))


def _vec(*tensors: Tensor) -> int:
    """Elements loaded at once: what divides all strides."""
    return 8 if all(stride % 8 == 0 for x in tensors for stride in x.stride()[:3]) else 1


def _strides(x: Tensor, vec: int) -> tuple[int, ...]:
    """Of sequences, heads and rows, in units of vec."""
    return tuple(stride // vec for stride in x.stride()[:3])


def _summed(
    k: Tensor, v: Tensor, scales: tuple[Tensor, Tensor] | None, mask: Tensor | None, prefix: int, size: int, ranges: int
) -> Memory:
    """Sums over each range; one range of all rows is split over programs."""
    sequences, heads, rows, _ = k.shape
    parts = ranges
    if ranges == 1:
        parts = max(1, min(-(-PROGRAMS // (sequences * heads)), rows // SPLIT))
        prefix = size = -(-rows // parts)
    (state, total), (scale, weight), (mask_, mask_s) = _empty(k, v, parts), scales or (k, k), _masked(mask, k)
    vec = _vec(k, v)
    kernel = "sum" if scales is None else "scaled sum"
    constants = _constants(kernel, rows, vec, k, v, SCALED=scales is not None, MASKED=mask is not None)
    _sum_kernel[(sequences * heads * parts, -(-v.shape[-1] // constants["BLOCK_D"]))](
        k, v, scale, weight, mask_, state, total, _strides(k, vec), _strides(v, vec), mask_s, heads, rows, prefix, size, parts,
        **constants,
    )  # fmt: skip
    return (state, total) if ranges > 1 else (state.sum(2, keepdim=True), total.sum(2, keepdim=True))


def _empty(k: Tensor, v: Tensor, states: int) -> Memory:
    sequences, heads, _, features = k.shape
    state = k.new_empty(sequences, heads, states, features, v.shape[-1], dtype=torch.float32)
    return state, k.new_empty(sequences, heads, states, features, dtype=torch.float32)


def _scan(memory: tuple[Tensor, ...], reverse: bool = False) -> None:
    """Running sums over the states, in place; from the last one back if `reverse`."""
    constants: dict[str, Any] = {"REVERSE": reverse, "BLOCK": SCAN}
    for x in memory:
        sequences, heads, states = x.shape[:3]
        width = x[0, 0, 0].numel()
        tiles = -(-width // SCAN)
        if states > 1:
            _scan_kernel[(sequences * heads * tiles,)](x, states, width, tiles, **constants)


def _delta(k: Tensor, v: Tensor, memory: Memory | None, cut: Cut) -> Memory:
    """States by the delta rule."""
    sequences, heads, rows, _ = k.shape
    states = _empty(k, v, cut.ranges)
    _put_in(states, 0, memory or (k.new_zeros(()), k.new_zeros(())))
    vec = _vec(k, v)
    constants = _constants("delta", cut.size, vec, k, v)
    _delta_kernel[(sequences * heads, -(-v.shape[-1] // constants["BLOCK_D"]))](
        k, v, *states, _strides(k, vec), _strides(v, vec), heads, rows, cut.size, cut.ranges, **constants
    )
    return states


def _delta_backward(k: Tensor, v: Tensor, states: Memory, d_states: Memory, cut: Cut) -> Memory:
    """Gradients of the states, from what reads of each add to them."""
    sequences, heads, rows, features = k.shape
    vec = _vec(k)
    constants = _constants("delta backward", cut.size, vec, k, v)
    parts = -(-v.shape[-1] // constants["BLOCK_D"])
    behind = k.new_empty(sequences, heads, cut.ranges, parts, features, dtype=torch.float32)
    d_state, d_total = d_states
    _delta_backward_kernel[(sequences * heads, parts)](
        k, *states, d_state, behind, _strides(k, vec), heads, rows, cut.size, cut.ranges, **constants
    )
    _scan((d_total,), reverse=True)
    return d_state, d_total + behind.sum(3)


def _read(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, memory: Memory, cut: Cut) -> Tensor:
    sequences, heads, queries, _ = q.shape
    out, (mask_, mask_s) = v.new_empty(sequences, heads, queries, v.shape[-1]), _masked(mask, k)
    kernel = "within" if cut.chunk else "read"
    vec = _vec(q, k, v)
    constants = _constants(kernel, cut.size, vec, k, v, WITHIN=cut.chunk > 0, MASKED=mask is not None)
    tiles = -(-cut.size // constants["BLOCK_N"])
    _read_kernel[(sequences * heads * cut.segments * tiles,)](
        q, k, v, mask_, *memory, out, _strides(q, vec), _strides(k, vec), _strides(v, vec), mask_s,
        heads, queries, cut.size, cut.segments, tiles, cut.prefix, cut.first, memory[0].shape[2], cut.chunk, **constants,
    )  # fmt: skip
    return out


def _read_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, memory: Memory, cut: Cut
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """dq, and 1 / mass and c of each query."""
    sequences, heads, queries, _ = q.shape
    d_q, (mask_, mask_s) = torch.empty_like(q, memory_format=torch.contiguous_format), _masked(mask, k)
    scale, weight = (q.new_empty(sequences, heads, queries, dtype=torch.float32) for _ in range(2))
    kernel = "within" if cut.chunk else "read backward"
    vec = _vec(q, k, v, d_out)
    constants = _constants(kernel, cut.size, vec, k, v, WITHIN=cut.chunk > 0, MASKED=mask is not None)
    tiles = -(-cut.size // constants["BLOCK_N"])
    _read_backward_kernel[(sequences * heads * cut.segments * tiles,)](
        q, k, v, mask_, *memory, d_out, d_q, scale, weight,
        _strides(q, vec), _strides(k, vec), _strides(v, vec), _strides(d_out, vec), mask_s,
        heads, queries, cut.size, cut.segments, tiles, cut.prefix, cut.first, memory[0].shape[2], cut.chunk, **constants,
    )  # fmt: skip
    return d_q, (scale, weight)


def _keys_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, memory: Memory, d_memory: Memory,
    scales: tuple[Tensor, Tensor], cut: Cut, delta: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (sequences, heads, queries, _), keys = q.shape, k.shape[2]
    d_k, d_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    mask_, mask_s = _masked(mask, k)
    longest = max(cut.prefix, cut.size if cut.ranges > 1 else 0)
    kernel = "within" if cut.chunk else "keys backward of delta" if delta else "keys backward"
    vec = _vec(q, k, v, d_out)
    constants = _constants(kernel, longest, vec, k, v, WITHIN=cut.chunk > 0, DELTA=delta, MASKED=mask is not None)
    tiles = -(-longest // constants["BLOCK_N"])
    _keys_backward_kernel[(sequences * heads * cut.ranges * tiles,)](
        q, k, v, mask_, *memory, *d_memory, d_out, *scales, d_k, d_v,
        _strides(q, vec), _strides(k, vec), _strides(v, vec), _strides(d_out, vec), mask_s,
        heads, queries, keys, cut.size, cut.ranges, tiles, cut.prefix, d_memory[0].shape[2], cut.chunk, **constants,
    )  # fmt: skip
    return d_k, d_v
