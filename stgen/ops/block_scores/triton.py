"""Selection of blocks on Triton: pools, their scores, the best of each row, and lists of them, without sorting.

A row of scores stays in registers. Scores are mapped to uint32 in the same order, and the least value that is kept is
found bit by bit from the highest: 32 passes over the row that count what is not below a trial value (or sum its softmax
weights), whatever the row holds. Of scores equal to that value the first are kept, by a running sum over their places.
Every place of a list is that sum over what is kept, so lists are ascending; nothing is added atomically.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TOP, MASS, ABOVE = (tl.constexpr(i) for i in range(3))
RULES = ("top", "mass", "above")

LOG2_E = tl.constexpr(1.4426950408889634)
SCORES = 64  # rows and columns of a tile of scores
DEPTH = 16  # of it taken at once
COLUMN = 32  # blocks of a tile whose lists are transposed


@triton.jit
def _pool_kernel(
    x, filled, out, x_strides, filled_strides, heads, groups, filled_heads, places, blocks, block,
    D: tl.constexpr, VEC: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Mean [S, heads, blocks, D] over the filled places of each block; 0 where there are none."""
    sequence_head, number = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    sequence, head = (sequence_head // heads).to(tl.int64), (sequence_head % heads).to(tl.int64)
    x += sequence * (x_strides[0] * VEC) + head * (x_strides[1] * VEC)  # so that the compiler knows what divides them
    filled += (sequence % groups) * filled_strides[0] + (head % filled_heads) * filled_strides[1]
    d, last = tl.arange(0, BLOCK_D), tl.minimum(number * block + block, places)
    total, counts = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_N,), tl.int32)
    for start in range(number * block, last, BLOCK_N):
        place = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        used = (place < last) & (tl.load(filled + place * filled_strides[2], mask=place < last, other=0) != 0)
        mask = used[:, None] & (d < D)[None, :]
        total += tl.sum(
            tl.load(x + place[:, None] * (x_strides[2] * VEC) + d[None, :], mask=mask, other=0.0).to(tl.float32), 0
        )
        counts += used.to(tl.int32)
    mean = total / tl.maximum(tl.sum(counts, 0), 1).to(tl.float32)
    tl.store(out + tl.program_id(0).to(tl.int64) * D + d, mean, mask=d < D)


@triton.jit
def _score_kernel(
    q, k, out, rows, columns, row_tiles, column_tiles, scale, D: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr
):
    """scale q k^T of contiguous q [S * heads, rows, D] and k [S * heads, columns, D]."""
    program = tl.program_id(0)
    sequence_head = (program // (row_tiles * column_tiles)).to(tl.int64)
    row = program // column_tiles % row_tiles * TILE + tl.arange(0, TILE)
    column = program % column_tiles * TILE + tl.arange(0, TILE)
    q, k = q + sequence_head * rows * D, k + sequence_head * columns * D
    acc = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, D, DEPTH):
        d = start + tl.arange(0, DEPTH)
        a = tl.load(q + row[:, None] * D + d[None, :], mask=(row < rows)[:, None] & (d < D)[None, :], other=0.0)
        b = tl.load(
            k + column[:, None] * D + d[None, :], mask=(column < columns)[:, None] & (d < D)[None, :], other=0.0
        )
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    at = sequence_head * rows * columns + row[:, None] * columns + column[None, :]
    tl.store(out + at, acc * scale, mask=(row < rows)[:, None] & (column < columns)[None, :])


@triton.jit
def _ordered(score):
    """uint32 in the order of the scores; both zeros are equal, and no score is 0."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.uint32, bitcast=True)
    return bits ^ tl.where((bits >> 31) != 0, 0xFFFFFFFF, 0x80000000)


@triton.jit
def _least_kept(key, weight, enough):
    """The largest value such that the keys not below it weigh `enough`; 0 if all of them do not."""
    least, bit = tl.full((), 0, tl.uint32), tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        trial = least | bit
        reached = tl.sum(tl.where(key >= trial, weight, tl.zeros_like(weight)), 0) >= enough
        least = tl.where(reached, trial, least)
        bit = bit >> 1
    return least


@triton.jit
def _before(flag):
    """How many flags stand before each place of a row."""
    flag = flag.to(tl.int32)
    return tl.cumsum(flag, 0) - flag


@triton.jit
def _kept(key, score, usable, count, share, RULE: tl.constexpr):
    """Which of the usable scores of a row a rule keeps."""
    if RULE == TOP:
        least = _least_kept(key, usable.to(tl.int32), count)
        above, tie = usable & (key > least), usable & (key == least)
        return above | (tie & (_before(tie) < count - tl.sum(above.to(tl.int32), 0)))
    top = tl.max(tl.where(usable, score, float("-inf")), 0)
    weight = tl.where(usable, tl.exp2((score - tl.where(top == float("-inf"), 0.0, top)) * LOG2_E), 0.0)
    whole = tl.sum(weight, 0)
    if RULE == MASS:
        enough = share * whole
        least = _least_kept(key, weight, enough)
        above, tie = usable & (key > least), usable & (key == least)
        each = tl.max(tl.where(tie, weight, 0.0), 0)
        heavier = tl.sum(tl.where(above, weight, 0.0), 0)
        return above | (tie & (heavier + _before(tie).to(tl.float32) * each < enough))
    best = usable & (key == tl.max(key, 0))
    return (usable & (weight / tl.where(whole == 0.0, 1.0, whole) >= share)) | (best & (_before(best) == 0))


@triton.jit
def _select_kernel(
    scores, allowed, counts, kept, number, lists, allowed_strides, heads, groups, allowed_heads, rows, columns, width,
    share, RULE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """kept [S, heads, rows, columns], number [S, heads, rows] of kept blocks, and their lists [S, heads, rows, width],
    ascending, then filled with the first."""
    program = tl.program_id(0).to(tl.int64)
    sequence, head, row = program // rows // heads, program // rows % heads, program % rows
    column = tl.arange(0, BLOCK)
    inside = column < columns
    allowed += (sequence % groups) * allowed_strides[0] + (head % allowed_heads) * allowed_strides[1]
    usable = inside & (tl.load(allowed + row * allowed_strides[2] + column, mask=inside, other=0) != 0)
    score = tl.load(scores + program * columns + column, mask=inside, other=0.0)
    key = tl.where(usable, _ordered(score), 0)
    count = tl.load(counts + program) if RULE == TOP else 0
    keep = _kept(key, score, usable, tl.minimum(count, width), share, RULE)
    tl.store(kept + program * columns + column, keep, mask=inside)
    found = tl.sum(keep.to(tl.int32), 0)
    tl.store(number + program, found)
    first = tl.min(tl.where(keep, column, BLOCK), 0)
    lists += program * width
    tl.store(lists + _before(keep), column, mask=keep & (_before(keep) < width))
    tl.store(lists + column, tl.where(found == 0, 0, first), mask=(column >= found) & (column < width))


@triton.jit
def _transpose_kernel(kept, number, lists, rows, columns, tiles, width, COLUMN: tl.constexpr, ROW: tl.constexpr):
    """Of each column of kept [S * heads, rows, columns] the rows that keep it, ascending, then filled with the first."""
    sequence_head = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.program_id(0) % tiles * COLUMN + tl.arange(0, COLUMN)
    kept += sequence_head * rows * columns
    at = lists + (sequence_head * columns + column)[None, :] * width
    found, first = tl.zeros((COLUMN,), tl.int32), tl.full((COLUMN,), 0, tl.int32)
    for start in range(0, rows, ROW):
        row = start + tl.arange(0, ROW)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        keep = tl.load(kept + row.to(tl.int64)[:, None] * columns + column[None, :], mask=mask, other=0) != 0
        flag = keep.to(tl.int32)
        place = found[None, :] + tl.cumsum(flag, 0) - flag
        tl.store(at + place, tl.zeros_like(place) + row[:, None], mask=keep & (place < width))
        first = tl.where(found == 0, tl.min(tl.where(keep, row[:, None], rows), 0), first)
        found += tl.sum(flag, 0)
    first = tl.where(found == 0, 0, first)
    for start in range(0, width, ROW):
        place = start + tl.arange(0, ROW)
        empty = (place[:, None] >= found[None, :]) & (place < width)[:, None] & (column < columns)[None, :]
        tl.store(at + place[:, None], tl.zeros((ROW, COLUMN), tl.int32) + first[None, :], mask=empty)
    tl.store(number + sequence_head * columns + column, found, mask=column < columns)


# --------------------------------------------------------------------------------------------------------- launchers


def pool(x: Tensor, filled: Tensor, block: int) -> Tensor:
    """Means over the filled places of blocks: x [S, heads, n, D], filled [groups, heads or 1, n] bool -> [S, heads,
    blocks, D] float32."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    (sequences, heads, places, depth), blocks = x.shape, -(-x.shape[2] // block)
    out = x.new_empty(sequences, heads, blocks, depth, dtype=torch.float32)
    wide = triton.next_power_of_2(depth)
    groups, filled_heads = filled.shape[:2]
    vec, rows = 8 if all(s % 8 == 0 for s in x.stride()[:3]) else 1, min(8192 // wide, triton.next_power_of_2(block))
    constants: dict[str, Any] = {"D": depth, "VEC": vec, "BLOCK_D": wide, "BLOCK_N": rows}
    _pool_kernel[(sequences * heads * blocks,)](
        x,
        filled,
        out,
        tuple(s // vec for s in x.stride()[:3]),
        filled.stride(),
        heads,
        groups,
        filled_heads,
        places,
        blocks,
        block,
        **constants,
    )
    return out


def scores(q: Tensor, k: Tensor) -> Tensor:
    """D^-0.5 q k^T of pooled q [S, heads, rows, D] and k [S, heads, columns, D], float32."""
    q, k = q.contiguous(), k.contiguous()
    (sequences, heads, rows, depth), columns = q.shape, k.shape[2]
    out = q.new_empty(sequences, heads, rows, columns)
    row_tiles, column_tiles = -(-rows // SCORES), -(-columns // SCORES)
    constants: dict[str, Any] = {"D": depth, "TILE": SCORES, "DEPTH": DEPTH, "num_warps": 4, "maxnreg": 128}
    _score_kernel[(sequences * heads * row_tiles * column_tiles,)](
        q, k, out, rows, columns, row_tiles, column_tiles, depth**-0.5, **constants
    )
    return out


def select(
    scores: Tensor, allowed: Tensor, counts: Tensor | None, rule: str, share: float, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What a rule keeps of scores [S, heads, rows, columns]: the kept table, how many of each row, and their lists.

    allowed [groups, heads or 1, rows, columns] bool; counts [S, heads, rows] int32 and at most `width` for the rule
    `top`; share of the mass for `mass`, of a block's weight for `above`.
    """
    scores, allowed = scores.contiguous(), allowed if allowed.stride(-1) == 1 else allowed.contiguous()
    (sequences, heads, rows, columns), (groups, allowed_heads) = scores.shape, allowed.shape[:2]
    kept = torch.empty_like(scores, dtype=torch.bool)
    number = scores.new_empty(sequences, heads, rows, dtype=torch.int32)
    lists = scores.new_empty(sequences, heads, rows, width, dtype=torch.int32)
    block = triton.next_power_of_2(columns)
    constants: dict[str, Any] = {"RULE": RULES.index(rule), "BLOCK": block, "num_warps": min(8, max(1, block // 512))}
    _select_kernel[(sequences * heads * rows,)](
        scores, allowed, number if counts is None else counts.contiguous(), kept, number, lists,
        allowed.stride()[:3], heads, groups, allowed_heads, rows, columns, width, share, **constants,
    )  # fmt: skip
    return kept, number, lists


def transpose(kept: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """How many rows keep each column of kept [S, heads, rows, columns], and their lists [S, heads, columns, width]."""
    kept = kept.contiguous()
    sequences, heads, rows, columns = kept.shape
    number = kept.new_empty(sequences, heads, columns, dtype=torch.int32)
    lists = kept.new_empty(sequences, heads, columns, width, dtype=torch.int32)
    tiles = -(-columns // COLUMN)
    constants: dict[str, Any] = {"COLUMN": COLUMN, "ROW": min(64, max(16, triton.next_power_of_2(rows)))}
    _transpose_kernel[(sequences * heads * tiles,)](kept, number, lists, rows, columns, tiles, width, **constants)
    return number, lists
