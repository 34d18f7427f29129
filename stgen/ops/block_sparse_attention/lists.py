"""Lists of the block pairs of a support, as kernels read them: of each query block its key blocks, and the transpose.

A list holds the whole blocks first, then the partial ones, each ascending; it grows with the pairs kept, not with the
table. Lists stand one after the other (`first` from cumulative sums) or at equal distances: kernels read `first` and the
counts alone, so a selector that keeps k blocks everywhere may write its own without counting.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from stgen.ops.support import ALL, SOME, Support

RAGGED = ALL + 1  # code of a block pair that is whole but for the keys beyond the last


class Lists(NamedTuple):
    """Of each row (group, head, block of queries or of keys) the blocks it meets."""

    first: Tensor  # [groups, heads, rows] int64: where the row's list begins
    whole: Tensor  # [groups, heads, rows] int32: how many blocks need no mask
    count: Tensor  # [groups, heads, rows] int32: how many blocks in all
    blocks: Tensor  # [pairs] int32
    slots: Tensor  # [pairs] int32: where a partial block lies in `bits`; -1 where only the keys' end cuts it

    def row_of_pair(self) -> Tensor:
        """The row of each pair of lists that stand one after the other: [pairs] int64."""
        rows = torch.arange(self.count.numel(), device=self.count.device)
        return rows.repeat_interleave(self.count.flatten(), output_size=len(self.blocks))


class BlockLists(NamedTuple):
    """Of queries, of keys, and which pairs of places the partial blocks keep."""

    by_query: Lists
    by_key: Lists
    bits: Tensor  # [partial blocks, block queries, words] int32: 32 keys in a word, the first in the lowest bit
    block: tuple[int, int]

    @staticmethod
    def of(support: Support) -> "BlockLists":
        """Made once for a support, of its table and bits: an order of queries or keys does not matter."""
        if BlockLists not in support.memo:
            support.memo[BlockLists] = _made(support)
        return support.memo[BlockLists]

    def tensors(self) -> list[Tensor]:
        """All of them; `from_tensors` puts them together again."""
        return [*self.by_query, *self.by_key, self.bits]

    @staticmethod
    def from_tensors(tensors: Sequence[Tensor], block: Sequence[int]) -> "BlockLists":
        return BlockLists(Lists(*tensors[:5]), Lists(*tensors[5:10]), tensors[10], (block[0], block[1]))


def _made(support: Support) -> BlockLists:
    codes = support.table
    if support.keys % support.block[1]:
        codes = codes.clone()
        codes[..., -1].masked_fill_(codes[..., -1] == ALL, RAGGED)
    partial = (codes.flatten() == SOME).nonzero().flatten()  # flattened pairs in the order of `bits`
    by_query, by_key = _lists(codes), _lists(codes.transpose(2, 3))
    nq, nk = codes.shape[2:]
    query_row, key_row = by_query.row_of_pair(), by_key.row_of_pair()
    slot = _slots(codes, partial, query_row * nk + by_query.blocks)
    slot_by_key = _slots(codes, partial, (key_row // nk * nq + by_key.blocks) * nk + key_row % nk)
    lists = by_query._replace(slots=slot), by_key._replace(slots=slot_by_key)
    return BlockLists(*lists, _words(support.bits), support.block)


def _lists(codes: Tensor) -> Lists:
    """Of a table [groups, heads, rows, blocks] of codes; the slots are left empty."""
    width, flat = codes.shape[3], codes.flatten()
    whole, count = ((codes == ALL).sum(-1), (codes != 0).sum(-1))  # [groups, heads, rows]
    first = (count.flatten().cumsum(0) - count.flatten()).view_as(count)
    pair = flat.nonzero().flatten()  # [pairs], ascending: row by row
    row, is_whole = pair // width, flat[pair] == ALL
    before = is_whole.cumsum(0) - is_whole.long()  # whole pairs of this row and those before it
    before -= (whole.flatten().cumsum(0) - whole.flatten())[row]
    behind = whole.flatten()[row] + torch.arange(len(pair), device=pair.device) - first.flatten()[row] - before
    place = first.flatten()[row] + torch.where(is_whole, before, behind)
    blocks = torch.empty_like(pair).scatter_(0, place, pair % width).int()
    return Lists(first, whole.int(), count.int(), blocks, blocks[:0])


def _slots(codes: Tensor, partial: Tensor, pair: Tensor) -> Tensor:
    """Of pairs of blocks, given by their place in the flattened table: [pairs] int32."""
    return torch.where(codes.flatten()[pair] == SOME, torch.searchsorted(partial, pair), -1).int()


def _words(bits: Tensor) -> Tensor:
    """[..., keys] bool -> [..., words] int32."""
    bits = pad(bits, (0, -bits.shape[-1] % 32)).unflatten(-1, (-1, 8)).view(torch.uint8)
    octets = torch.zeros(bits.shape[:-1], dtype=torch.uint8, device=bits.device)
    for place in range(8):
        octets |= bits[..., place] << place
    return octets.view(torch.int32)
