"""Which rows of a support are taken together.

A row is a block of queries of one head of one sequence. Rows are sorted by how many key blocks they have, so that those
of a chunk are of almost one length, and a chunk has as many as stay in cache.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stgen.ops.support import ALL, SOME, Support

CHUNK = {"cpu": 1 << 19}  # scores of a chunk; see the sweep in benchmarks/sparse_attention.py
CHUNK_ELSEWHERE = 1 << 26


@dataclass(frozen=True)
class Chunk:
    """R rows with up to L key blocks each; places beyond a row's count repeat its first block and hide it."""

    rows: Tensor  # [R], numbered (sequence, head, query block)
    blocks: Tensor  # [R * L] key blocks, numbered (sequence, head, key block)
    pairs: Tensor  # [R * L] places in the support's flattened table
    masks: Tensor | None  # [R * L] which of the plan's masks hides keys; None where no key is hidden


@dataclass(frozen=True)
class Plan:
    chunks: list[Chunk]
    masks: Tensor  # [masks, block queries, block keys] bool, true where a key is hidden


def plan(support: Support, sequences: int, heads: int) -> Plan:
    """The chunks of all rows that have a key block, longest first."""
    return Plan(list(_chunks(support, sequences, heads)), _masks(support))


def _chunks(support: Support, sequences: int, heads: int) -> Iterator[Chunk]:
    groups, own_heads, nq, nk = support.table.shape
    table_row = torch.arange(groups * own_heads * nq, device=support.device).view(groups, own_heads, nq)
    table_row = table_row.repeat(sequences // groups, 1, 1).expand(sequences, heads, nq).flatten()  # [rows]
    counts = support.counts.flatten()[table_row]
    order = counts.argsort(descending=True, stable=True)
    lengths = counts[order].tolist()
    lists, numbers = support.lists.flatten(0, 2), _mask_numbers(support)
    whole, hidden = len(support.bits), len(support.bits) + 2
    first = 0
    while first < len(lengths) and (longest := lengths[first]):
        rows = order[first : first + _together(lengths, first, support)]
        blocks = lists[table_row[rows], :longest]  # [R, L]
        beyond = torch.arange(longest, device=support.device) >= counts[rows, None]
        blocks = torch.where(beyond, blocks[:, :1], blocks)
        pairs = table_row[rows, None] * nk + blocks
        masks = numbers[pairs].masked_fill(beyond, hidden).flatten()
        blocks = rows[:, None] // nq * nk + blocks
        yield Chunk(rows, blocks.flatten(), pairs.flatten(), masks if (masks != whole).any() else None)
        first += len(rows)


def _together(lengths: list[int], first: int, support: Support) -> int:
    """How many rows to take from `first`: as many as fit, none shorter than three quarters of the longest."""
    longest = lengths[first]
    most = max(1, CHUNK.get(support.device.type, CHUNK_ELSEWHERE) // (longest * support.block[0] * support.block[1]))
    fit = lengths[first : first + most]
    return next((i for i, length in enumerate(fit) if 4 * length < 3 * longest), len(fit))


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
