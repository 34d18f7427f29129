"""Support: which keys each query may attend, kept as blocks.

A sequence of n queries and one of m keys are cut into blocks of `block` places; the last may be ragged. A table says of
each pair of blocks whether none, some or all of its pairs of places are kept, and the bits of those in between are
stored. Nothing of size n x m is built, except by `dense()`, which is the definition, and what goes through it: `|`, `&`
and `join` of supports with an order.

The places of the blocks may hold queries and keys in another order than their own: places that keep the same keys then
share blocks (the sorting of Reformer, arXiv:2001.04451, section 2), and the pairs kept fill few blocks instead of
being strewn over all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

NONE, SOME, ALL = 0, 1, 2  # what a pair of blocks keeps of the pairs of places that it has

BUILD_PAIRS = 1 << 24  # pairs of places that `from_predicate` looks at together; bounds its memory


@dataclass(frozen=True, eq=False)
class Support:
    """The set S(i) of every query i.

    `groups` sequences have a support of their own; sequence s of a batch uses group s % groups. `heads` is 1 where all
    heads share it. `bias`, where there is one, is added to the scores of a pair of blocks: a learned selector hands in
    zeros whose gradient reaches its scores (straight-through).

    Place p of the query blocks holds query query_order[..., p]; keys likewise. An order is a permutation, None where
    every query or key stands at its own place. What is said of blocks (`table`, `bits`, `lists`) is said of the sorted
    sequences, what is said of queries and keys (`dense`, `per_query`, `attended`) is in their own order.

    Raises:
        ValueError: an order and a bias together.
    """

    queries: int  # n
    keys: int  # m
    block: tuple[int, int]  # places of a query block and of a key block
    table: Tensor  # [groups, heads, query blocks, key blocks] int8: NONE, SOME or ALL
    bits: Tensor  # [number of SOME, block queries, block keys] bool, in the order of torch.nonzero(table == SOME)
    bias: Tensor | None = None  # [groups, heads, query blocks, key blocks]
    query_order: Tensor | None = None  # [groups, heads, n] int64
    key_order: Tensor | None = None  # [groups, heads, m] int64
    memo: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)  # what implementations derive from it

    def __post_init__(self):
        if self.is_ordered and self.bias is not None:
            raise ValueError("a support with query_order or key_order takes no bias; give one of the two")

    # ------------------------------------------------------------------------------------------------ construction

    @staticmethod
    def from_mask(mask: Tensor, block: tuple[int, int]) -> "Support":
        """From a dense bool mask [groups, heads, n, m]."""
        (bq, bk), (n, m) = block, mask.shape[-2:]
        cut = pad(mask, (0, -m % bk, 0, -n % bq)).unflatten(-1, (-1, bk)).unflatten(2, (-1, bq))
        cut = cut.transpose(3, 4)  # [groups, heads, query blocks, key blocks, block queries, block keys]
        table = codes(cut.sum((-2, -1)), n, m, block)
        return Support(n, m, block, table, cut[table == SOME])

    @staticmethod
    def from_predicate(
        allows: Callable[[Tensor], Tensor],
        queries: int,
        keys: int,
        block: tuple[int, int],
        groups: int = 1,
        device: torch.device | str = "cpu",
    ) -> "Support":
        """From a predicate on rows: allows(i [a]) -> bool [groups, a, m], asked for a few blocks of rows at a time."""
        rows = block[0] * max(1, BUILD_PAIRS // (groups * keys * block[0]))
        every = torch.arange(queries, device=device)
        return Support.join([Support.from_mask(allows(i)[:, None], block) for i in every.split(rows)], dim=2)

    @staticmethod
    def from_blocks(kept: Tensor, queries: int, keys: int, block: tuple[int, int]) -> "Support":
        """From a bool table of the block pairs that are kept whole: [groups, heads, query blocks, key blocks]."""
        bits = torch.zeros(0, *block, dtype=torch.bool, device=kept.device)
        return Support(queries, keys, block, kept.to(torch.int8) * ALL, bits)

    @staticmethod
    def full(queries: int, keys: int, block: tuple[int, int], device: torch.device | str = "cpu") -> "Support":
        """Every query attends every key."""
        shape = (1, 1, -(-queries // block[0]), -(-keys // block[1]))
        return Support.from_blocks(torch.ones(shape, dtype=torch.bool, device=device), queries, keys, block)

    @staticmethod
    def join(parts: Sequence["Support"], dim: int) -> "Support":
        """Supports side by side along the queries (dim 2) or the keys (dim 3); all but the last fill their blocks.

        The result has no order.
        """
        parts = [part.unordered() for part in parts]
        table = torch.cat([part.table for part in parts], dim)
        slots, first = [], 0
        for part in parts:
            slots.append(part.slots + first)
            first += len(part.bits)
        bits = torch.cat([part.bits for part in parts])[torch.cat(slots, dim)[table == SOME]]
        queries = sum(part.queries for part in parts) if dim == 2 else parts[0].queries
        keys = sum(part.keys for part in parts) if dim == 3 else parts[0].keys
        return Support(queries, keys, parts[0].block, table, bits)

    # ---------------------------------------------------------------------------------------------------- reading

    @property
    def groups(self) -> int:
        return self.table.shape[0]

    @property
    def heads(self) -> int:
        return self.table.shape[1]

    @property
    def device(self) -> torch.device:
        return self.table.device

    @property
    def is_ordered(self) -> bool:
        """Whether queries or keys have an order other than their own."""
        return self.query_order is not None or self.key_order is not None

    @property
    def of_sorted(self) -> "Support":
        """The support of the sorted queries and keys: the same blocks, without an order."""
        return replace(self, query_order=None, key_order=None) if self.is_ordered else self

    @cached_property
    def kept(self) -> Tensor:
        """The block pairs that are computed: [groups, heads, query blocks, key blocks] bool."""
        return self.table != NONE

    @cached_property
    def counts(self) -> Tensor:
        """Key blocks of each query block: [groups, heads, query blocks] int64."""
        return self.kept.sum(-1)

    @cached_property
    def lists(self) -> Tensor:
        """Key blocks of each query block, ascending: [groups, heads, query blocks, longest] int64.

        Places of a row beyond its count hold blocks that are not kept.
        """
        return self.kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., : int(self.counts.max())]

    @cached_property
    def slots(self) -> Tensor:
        """Where in `bits` a SOME block lies (other entries mean nothing): as `table`, int64."""
        return (self.table == SOME).flatten().cumsum(0).view(self.table.shape) - 1

    def dense(self) -> Tensor:
        """The mask itself: [groups, heads, n, m] bool."""
        g, h, nq, nk = self.table.shape
        cut = self._cut(torch.ones_like(self.kept)).view(g, h, nq, nk, *self.block).transpose(3, 4)
        mask = cut.flatten(4, 5).flatten(2, 3)[..., : self.queries, : self.keys]
        return unsort(unsort(mask, self.query_order).mT, self.key_order).mT

    def attended(self) -> Tensor:
        """Keys that some query attends: [groups, heads, m] bool."""
        seen = (self.table == ALL).any(2).unsqueeze(-1).repeat(1, 1, 1, self.block[1]).to(torch.int64)
        group, head, _, column = torch.nonzero(self.table == SOME).unbind(1)
        seen.index_put_((group, head, column), self.bits.any(1).to(torch.int64), accumulate=True)
        return unsort(seen.flatten(2)[..., : self.keys] > 0, self.key_order)

    def per_query(self) -> Tensor:
        """How many keys each query attends: [groups, heads, n] int64."""
        whole = ((self.table == ALL) * _places(self.keys, self.block[1], self.table)).sum(-1)
        number = whole.unsqueeze(-1).repeat(1, 1, 1, self.block[0])
        group, head, row, _ = torch.nonzero(self.table == SOME).unbind(1)
        number.index_put_((group, head, row), self.bits.sum(-1), accumulate=True)
        return unsort(number.flatten(2)[..., : self.queries], self.query_order)

    def density(self) -> tuple[float, float]:
        """Share of the pairs of places that is kept, and share of the pairs of blocks that is computed."""
        return float(self.per_query().double().mean()) / self.keys, float(self.kept.double().mean())

    # -------------------------------------------------------------------------------------------------- combining

    def unordered(self) -> "Support":
        """The same pairs in blocks of the queries' and keys' own order; built from the dense mask if there is another."""
        return Support.from_mask(self.dense(), self.block) if self.is_ordered else self

    def __or__(self, other: "Support") -> "Support":
        """Union: a pair is kept where either keeps it. The result has no order."""
        a, b = self._alike(other), other._alike(self)
        settled = torch.where((a.table == ALL) | (b.table == ALL), ALL, NONE)
        return a._combined(b, settled, (settled == NONE) & (a.kept | b.kept), torch.logical_or)

    def __and__(self, other: "Support") -> "Support":
        """Intersection: a pair is kept where both keep it. The result has no order."""
        a, b = self._alike(other), other._alike(self)
        settled = torch.where((a.table == ALL) & (b.table == ALL), ALL, NONE)
        return a._combined(b, settled, (settled == NONE) & a.kept & b.kept, torch.logical_and)

    def expand(self, groups: int, heads: int) -> "Support":
        """The same with a table for each of `groups` sequences and `heads` heads."""
        if (groups, heads) == (self.groups, self.heads):
            return self
        times = (groups // self.groups, heads // self.heads)
        table, slots = self.table.repeat(*times, 1, 1), self.slots.repeat(*times, 1, 1)
        bias = None if self.bias is None else self.bias.repeat(*times, 1, 1)
        orders = (None if x is None else x.repeat(*times, 1) for x in (self.query_order, self.key_order))
        return Support(self.queries, self.keys, self.block, table, self.bits[slots[table == SOME]], bias, *orders)

    def transpose(self) -> "Support":
        """Queries and keys exchanged."""
        table = self.table.transpose(-1, -2)
        bits = self.bits[self.slots.transpose(-1, -2)[table == SOME]].transpose(-1, -2)
        bias = None if self.bias is None else self.bias.transpose(-1, -2)
        block = (self.block[1], self.block[0])
        return Support(self.keys, self.queries, block, table, bits, bias, self.key_order, self.query_order)

    def extended(self, queries: int, keys: int, present: Tensor | None = None) -> "Support":
        """With `queries` places before the queries that attend every key, and `keys` places before the keys that every
        query attends: global tokens have both, sinks the latter. Whole blocks are added, their surplus places empty.

        `present` [groups, m] bool: the keys that are no padding, for the added queries; None takes all.
        """
        (bq, bk), (g, h) = self.block, self.table.shape[:2]
        rows, columns = -(-queries // bq) * bq, -(-keys // bk) * bk
        added, grown = torch.arange(columns, device=self.device) < keys, self.of_sorted
        if columns:
            left = Support.from_mask(added.expand(g, h, self.queries, columns), self.block)
            grown = Support.join([left, grown], dim=3)
        if rows:
            own = torch.ones(1, self.keys, dtype=torch.bool, device=self.device) if present is None else present
            own = sort(own.repeat(g // len(own), 1)[:, None].expand(g, h, self.keys), self.key_order)
            seen = torch.cat([added.expand(g, h, columns), own], dim=-1)  # [groups, heads, columns + m]
            added = torch.arange(rows, device=self.device) < queries
            grown = Support.join([Support.from_mask(added[:, None] & seen[:, :, None], self.block), grown], dim=2)
        bias = None if self.bias is None else pad(self.bias, (columns // bk, 0, rows // bq, 0))
        orders = _behind(rows, self.query_order), _behind(columns, self.key_order)
        return replace(grown, bias=bias, query_order=orders[0], key_order=orders[1])

    def _cut(self, where: Tensor) -> Tensor:
        """Bits of the pairs of blocks that the bool table `where` names: [number, block queries, block keys]."""
        table = self.table[where]
        cut = (table == ALL)[:, None, None].repeat(1, *self.block)
        cut[table == SOME] = self.bits[self.slots[where & (self.table == SOME)]]
        return cut

    def _combined(self, other: "Support", settled: Tensor, unsure: Tensor, combine: Callable) -> "Support":
        """`settled` where a pair of blocks is decided; where it is `unsure`, the combined bits decide."""
        bits = combine(self._cut(unsure), other._cut(unsure))
        _, _, row, column = torch.nonzero(unsure).unbind(1)
        rows, columns = (_places(n, b, bits) for n, b in zip((self.queries, self.keys), self.block, strict=True))
        inside_q = torch.arange(self.block[0], device=self.device) < rows[row][:, None]  # [number, block queries]
        inside_k = torch.arange(self.block[1], device=self.device) < columns[column][:, None]
        bits &= inside_q[:, :, None] & inside_k[:, None]
        kept = bits.sum((1, 2))
        code = SOME + (kept == rows[row] * columns[column]).to(torch.int8)
        code = code.masked_fill(kept == 0, NONE)
        table = settled.to(torch.int8)
        table[unsure] = code
        biases = [s.bias for s in (self, other) if s.bias is not None]
        bias = sum(biases[1:], biases[0]) if biases else None
        return replace(self, table=table, bits=bits[code == SOME], bias=bias)

    def _alike(self, other: "Support") -> "Support":
        """This support with as many groups and heads as it takes to stand beside `other`."""
        if (self.queries, self.keys, self.block) != (other.queries, other.keys, other.block):
            raise ValueError(
                f"supports of {self.queries} x {self.keys} places in blocks {self.block} and of {other.queries} x "
                f"{other.keys} in {other.block} cannot be combined"
            )
        return self.unordered().expand(max(self.groups, other.groups), max(self.heads, other.heads))


def sort(x: Tensor, order: Tensor | None) -> Tensor:
    """What `order` puts at each place: [S, heads, n, ...] -> the same shape, differentiable.

    `order` [groups, heads or 1, n] int64 is a permutation, sequence s takes group s % groups; None leaves x as it is.
    """
    if order is None:
        return x
    first = torch.arange(0, x.shape[:3].numel(), x.shape[2], device=x.device).view(*x.shape[:2], 1)
    rows = first + order.repeat(len(x) // len(order), 1, 1)  # [S, heads, n], in x.flatten(0, 2)
    return x.flatten(0, 2).index_select(0, rows.flatten()).view(x.shape)


def unsort(x: Tensor, order: Tensor | None) -> Tensor:
    """What `sort` did undone."""
    if order is None:
        return x
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return sort(x, torch.empty_like(order).scatter_(-1, order, places))


def _behind(added: int, order: Tensor | None) -> Tensor | None:
    """The order of a sequence that has `added` places before those of `order`."""
    if order is None:
        return None
    first = torch.arange(added, device=order.device).expand(*order.shape[:2], added)
    return torch.cat([first, order + added], dim=-1)


def codes(kept: Tensor, queries: int, keys: int, block: tuple[int, int]) -> Tensor:
    """The table, from how many pairs of places each pair of blocks keeps: [..., query blocks, key blocks]."""
    whole = _places(queries, block[0], kept)[:, None] * _places(keys, block[1], kept)
    return (SOME + (kept == whole).to(torch.int8)).masked_fill(kept == 0, NONE)


def _places(length: int, block: int, like: Tensor) -> Tensor:
    """Places of each block of a sequence: [blocks] int64; the last may have fewer than `block`."""
    return (length - torch.arange(0, length, block, device=like.device)).clamp(max=block)
