"""Which rows of a support are taken together.

A row is a block of queries of one head of one sequence. Rows are sorted by how many key blocks they have, so that those
of a chunk are of almost one length; a chunk has as many as stay in cache and repay the calls made for it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stgen.ops.support import ALL, SOME, Support

# Bytes of a chunk's scores: at least and at most. Between them a sixteenth of all scores, since the memory of a chunk is
# fresh at each call, and fresh pages cost; see the sweep in benchmarks/sparse_attention.py.
CHUNK_BYTES = {"cpu": (3 << 19, 5 << 20)}
ELSEWHERE = (1 << 27, 1 << 27)


@dataclass(frozen=True)
class Chunk:
    """R rows with up to L key blocks each; places beyond a row's count repeat its first block and hide it."""

    rows: slice  # of the sorted rows
    blocks: Tensor  # [R * L] key blocks, numbered (sequence, head, key block)
    pairs: Tensor  # [R * L] places in the support's flattened table
    places: slice  # of its blocks among those of all chunks
    masks: Tensor | None  # [R * L] which of the plan's masks hides keys; None where no key is hidden


@dataclass(frozen=True)
class Plan:
    order: Tensor | None  # [rows] rows (sequence, head, query block) as sorted; None where that is their own order
    filled: int  # rows, the first ones as sorted, that have a key block
    chunks: list[Chunk]  # those of most blocks first, so that their scratch memory need not grow
    masks: Tensor  # [masks, block queries, block keys] bool, true where a key is hidden
    key_blocks: int  # of all heads and sequences

    @staticmethod
    def of(support: Support, sequences: int, heads: int, itemsize: int) -> "Plan":
        """The chunks of all rows that have a key block, made once for a support; `itemsize` is the bytes of a score."""
        pair = itemsize * support.block[0] * support.block[1]  # bytes of a pair of blocks
        pairs = int(support.counts.sum()) * sequences * heads // (support.groups * support.heads)
        least, most = CHUNK_BYTES.get(support.device.type, ELSEWHERE)
        most = min(max(pairs * pair // 16, least), most) // pair
        key = (Plan, sequences, heads, most)
        if key not in support.memo:
            support.memo[key] = Plan._made(support, sequences, heads, most)
        return support.memo[key]

    @staticmethod
    def _made(support: Support, sequences: int, heads: int, most: int) -> "Plan":
        groups, own_heads, nq, nk = support.table.shape
        table_row = torch.arange(groups * own_heads * nq, device=support.device).view(groups, own_heads, nq)
        table_row = table_row.repeat(sequences // groups, 1, 1).expand(sequences, heads, nq).flatten()  # [rows]
        counts, order = support.counts.flatten()[table_row].sort(descending=True, stable=True)
        chunks = _chunks(support, table_row[order], order // nq * nk, counts, most)
        chunks = sorted(chunks, key=lambda chunk: len(chunk.blocks), reverse=True)
        order = None if bool((order[1:] > order[:-1]).all()) else order
        return Plan(order, int((counts > 0).sum()), chunks, _masks(support), sequences * heads * nk)

    @property
    def pairs(self) -> int:
        """Pairs of blocks that the chunks compute."""
        return sum(len(chunk.blocks) for chunk in self.chunks)

    @cached_property
    def incoming(self) -> tuple[Tensor, Tensor]:
        """Places sorted by key block [pairs], and where each key block's begin [key blocks]."""
        blocks = torch.cat([chunk.blocks for chunk in sorted(self.chunks, key=lambda chunk: chunk.places.start)])
        blocks, order = blocks.sort(stable=True)
        return order, torch.searchsorted(blocks, torch.arange(self.key_blocks, device=blocks.device))

    def blank(self, like: Tensor) -> Tensor:
        """For what the chunks write of each sorted row: zeros where there is no chunk."""
        rows = torch.empty_like(like)
        rows[self.filled :].zero_()
        return rows

    def sort(self, rows: Tensor) -> Tensor:
        return rows if self.order is None else rows.index_select(0, self.order)

    def unsort(self, rows: Tensor) -> Tensor:
        return rows if self.order is None else torch.empty_like(rows).index_copy_(0, self.order, rows)


def _chunks(support: Support, table_rows: Tensor, key_rows: Tensor, counts: Tensor, most: int) -> Iterator[Chunk]:
    """Of sorted rows: their row in the table, the first key block of their head and their count."""
    lists, numbers, nk = support.lists.flatten(0, 2), _mask_numbers(support), support.table.shape[-1]
    whole, hidden, place = len(support.bits), len(support.bits) + 2, 0
    for rows, longest in _slices(counts.tolist(), most):
        blocks = lists[table_rows[rows], :longest]  # [R, L]
        beyond = torch.arange(longest, device=support.device) >= counts[rows, None]
        blocks = torch.where(beyond, blocks[:, :1], blocks)
        pairs = table_rows[rows, None] * nk + blocks
        masks = numbers[pairs].masked_fill(beyond, hidden).flatten()
        blocks = (key_rows[rows, None] + blocks).flatten()
        places = slice(place, place := place + len(blocks))
        yield Chunk(rows, blocks, pairs.flatten(), places, masks if (masks != whole).any() else None)


def _slices(counts: list[int], most: int) -> Iterator[tuple[slice, int]]:
    """Runs of rows and their longest: of about `most` key blocks, no row shorter than three quarters of the longest."""
    first = 0
    while first < len(counts) and (longest := counts[first]):
        rows = max(1, most // longest)
        if 4 * (len(counts) - first) <= 5 * rows:
            rows = len(counts) - first  # rather than a last chunk of few rows
        fit = counts[first : first + rows]
        number = next((i for i, count in enumerate(fit) if 4 * count < 3 * longest), len(fit))
        yield slice(first, first + number), longest
        first += number


def _masks(support: Support) -> Tensor:
    """One mask for each SOME block, then one that hides nothing, one for the last block of keys where it is ragged, and
    one that hides all.
    """
    places = torch.arange(support.block[1], device=support.device)
    last = support.keys - (support.table.shape[-1] - 1) * support.block[1]
    further = torch.stack([places < 0, places >= last, places >= 0])  # [3, block keys]
    return torch.cat([~support.bits, further[:, None].expand(-1, support.block[0], -1)])


def _mask_numbers(support: Support) -> Tensor:
    """The mask of each pair of blocks: the flattened table, int64."""
    numbers = torch.where(support.table == SOME, support.slots, len(support.bits))
    if support.keys % support.block[1]:
        numbers[..., -1] += (support.table[..., -1] == ALL).to(numbers.dtype)
    return numbers.flatten()
