"""From a pattern, its unions and intersections to the support of a layout's sequences.

What depends on positions alone is built once for a grid and kept; what is chosen from queries and keys is chosen anew,
among the keys that the fixed patterns allow.
"""

import math
from collections.abc import Iterator
from functools import reduce
from operator import and_, or_
from typing import Any

import torch
from torch import Tensor, nn

from stgen.attention.layout import Layout, places
from stgen.attention.numbers import Numbers
from stgen.attention.pattern import Chosen, Fixed, Frame, Pattern, PatternError, Setting, Sites
from stgen.attention.patterns import AllOf, AnyOf, is_fixed, leaves
from stgen.attention.patterns.causal import Causal
from stgen.attention.patterns.full import Full
from stgen.ops.support import Support
from stgen.tokens import Grid

EVERY = Full()


class Selection(nn.Module):
    """The support of a pattern under a layout, for all heads that share them.

    Before the places of a sequence lie `registers` global tokens, and before its keys the rows of `sinks`; both in
    whole blocks of their own.
    """

    def __init__(self, pattern: Pattern, layout: Layout, setting: Setting, registers: int, sinks: int):
        super().__init__()
        self.layout, self.setting, self.registers, self.sinks = layout, setting, registers, sinks
        self.numbers = Numbers(causal_outside(pattern))
        self._pattern = self.pattern
        self.choosers = [leaf.chooser(setting) for leaf in leaves(self._pattern) if isinstance(leaf, Chosen)]
        self.learned = nn.ModuleList(chooser for chooser in self.choosers if isinstance(chooser, nn.Module))
        self._known: dict[tuple[Grid, torch.device, str, bool], Support] = {}

    @property
    def pattern(self) -> Pattern:
        """The pattern with its scheduled numbers as they are now."""
        return self.numbers.now

    @torch.compiler.disable  # lists of blocks have sizes that depend on the data
    def forward(self, q: Tensor, k: Tensor, grid: Grid) -> Support:
        """Queries and keys [S, heads, n, D] of folded sequences, without registers -> the support with all."""
        pattern = self.pattern
        if is_fixed(pattern):
            return self.fixed(pattern, grid, q.device, extended=True)
        self._settle(pattern)
        allowed = self.fixed(EVERY, grid, q.device)
        return self._extended(self._choose(pattern, q, k, allowed, grid, iter(self.choosers)), grid)

    def _settle(self, pattern: Pattern) -> None:
        """Tell the choosers of numbers that have changed."""
        if pattern is self._pattern:
            return
        self._pattern = pattern
        chosen = [leaf for leaf in leaves(pattern) if isinstance(leaf, Chosen)]
        for i, leaf in enumerate(chosen):
            chooser: Any = self.choosers[i]
            if chooser in self.learned:
                chooser.become(leaf)
            else:
                self.choosers[i] = leaf.chooser(self.setting)

    def _extended(self, support: Support, grid: Grid) -> Support:
        if self.registers:
            _, filled = places(self.layout, grid, support.device)  # [groups, n]
            support = support.extended(self.registers, self.registers, filled)
        return support.extended(0, self.sinks) if self.sinks else support

    def _choose(
        self, pattern: Pattern, q: Tensor, k: Tensor, allowed: Support, grid: Grid, choosers: Iterator
    ) -> Support:
        """The support of `pattern` within `allowed`; choosers come in the order of the pattern's leaves."""
        if is_fixed(pattern):
            return allowed & self.fixed(pattern, grid, q.device)
        if isinstance(pattern, AnyOf):
            # A fixed part may be empty, such as `global` whose frames have fallen to 0: what is chosen is not.
            parts = [
                allowed & self.fixed(part, grid, q.device, may_be_empty=True)
                if is_fixed(part)
                else self._choose(part, q, k, allowed, grid, choosers)
                for part in pattern.any
            ]
            return reduce(or_, parts)
        if isinstance(pattern, AllOf):
            fixed = [self.fixed(part, grid, q.device) for part in pattern.all if is_fixed(part)]
            allowed = reduce(and_, fixed, allowed)
            chosen = [part for part in pattern.all if not is_fixed(part)]
            return reduce(and_, [self._choose(part, q, k, allowed, grid, choosers) for part in chosen])
        return next(choosers)(q, k, allowed)

    def fixed(
        self,
        pattern: Pattern,
        grid: Grid,
        device: torch.device | str,
        extended: bool = False,
        may_be_empty: bool = False,
    ) -> Support:
        """The support of a pattern of positions among the places that hold a token, built once for a grid."""
        key = (grid, torch.device(device), pattern.model_dump_json(), extended)
        if key not in self._known:
            support = build(pattern, self.layout, self.setting.tile, grid, self.setting.layer, device)
            if not support.kept.any() and not may_be_empty:
                raise PatternError(
                    f"pattern: {pattern.kind} leaves no query a key on the grid {grid}; does it name tokens of that grid?"
                )
            self._known[key] = self._extended(support, grid) if extended else support
        return self._known[key]

    # ------------------------------------------------------------------------------------------------------- cost

    def density(self, grid: Grid, setting: Setting) -> tuple[float, float]:
        """Share of the pairs of tokens kept and of the pairs of blocks computed; about, where the data choose."""
        return self._about(self.pattern, grid, setting, 0), self._about(self.pattern, grid, setting, 1)

    def _about(self, pattern: Pattern, grid: Grid, setting: Setting, which: int) -> float:
        """Parts of a union and of an intersection are taken as independent where the data choose."""
        if is_fixed(pattern):
            own, every = (self.fixed(p, grid, "cpu", extended=True) for p in (pattern, EVERY))
            return own.density()[1] if which else own.density()[0] / every.density()[0]
        if isinstance(pattern, AnyOf):
            return 1 - math.prod(1 - self._about(part, grid, setting, which) for part in pattern.any)
        if isinstance(pattern, AllOf):
            return math.prod(self._about(part, grid, setting, which) for part in pattern.all)
        assert isinstance(pattern, Chosen)
        return pattern.shares(setting)[which]

    def choosing_flops(self, setting: Setting) -> int:
        """Operations of choosing for one sequence."""
        return sum(leaf.choosing_flops(setting) for leaf in leaves(self.pattern) if isinstance(leaf, Chosen))


def build(
    pattern: Pattern, layout: Layout, block: tuple[int, int, int], grid: Grid, layer: int, device: torch.device | str
) -> Support:
    """The support of a fixed pattern for the sequences of one clip; nothing of size n x n is held at once."""
    where, filled = places(layout, grid, device)  # [groups, n, 3], [groups, n]
    frame = frame_of(layout, block, grid, layer)
    per_block = math.prod(frame.block)
    number = torch.arange(where.shape[1], device=device) // per_block  # block of each place

    def sites(at: Tensor, axis: int) -> Sites:
        t, h, w = (x.unsqueeze(axis) for x in where[:, at].unbind(-1))
        return Sites(t, h, w, number[at].unsqueeze(0).unsqueeze(axis))

    every = torch.arange(where.shape[1], device=device)
    keys = sites(every, 1)  # [groups, 1, n]

    def allows(rows: Tensor) -> Tensor:
        both = filled[:, rows, None] & filled[:, None]
        return both & predicate(pattern, sites(rows, 2), keys, frame)

    n = where.shape[1]
    return Support.from_predicate(allows, n, n, (per_block, per_block), len(where), device)


def across(pattern: Pattern, queries: Tensor, keys: Tensor, frame: Frame, block: int) -> Support:
    """The support of a fixed pattern from queries at [groups, n, 3] to keys at [groups, m, 3] (frame, row, column), in
    blocks of `block` places each; no query attends a key of a frame below 0. The pattern may not go by blocks."""

    def sites(where: Tensor, axis: int) -> Sites:
        t, h, w = (x.unsqueeze(axis) for x in where.unbind(-1))
        return Sites(t, h, w, torch.zeros_like(t))

    at, present = sites(keys.clamp(min=0), 1), keys[:, None, :, 0] >= 0

    def allows(rows: Tensor) -> Tensor:
        return present & predicate(pattern, sites(queries[:, rows], 2), at, frame)

    return Support.from_predicate(allows, queries.shape[1], keys.shape[1], (block, block), len(queries), queries.device)


def frame_of(layout: Layout, block: tuple[int, int, int], grid: Grid, layer: int) -> Frame:
    """What the patterns of a layer may know of the sequences."""
    t, h, w = (min(a, b) for a, b in zip(block, layout.extents(grid), strict=True))
    blocks = -(-layout.sequence(grid)[1] // (t * h * w))
    return Frame((grid.t, grid.h, grid.w), (t, h, w), blocks, layer)


def predicate(pattern: Pattern, q: Sites, k: Sites, frame: Frame) -> Tensor:
    """The predicate of a fixed pattern, union or intersection."""
    match pattern:
        case AnyOf(any=parts):
            return reduce(or_, [predicate(part, q, k, frame) for part in parts])
        case AllOf(all=parts):
            return reduce(and_, [predicate(part, q, k, frame) for part in parts])
        case Fixed():
            return pattern.allows(q, k, frame)
    raise TypeError(f"{pattern.kind} is no fixed pattern")


def causal_outside(pattern: Pattern) -> Pattern:
    """The pattern with `causal`, wherever it stands, binding all of it: no union can leak the future."""
    if not any(isinstance(leaf, Causal) for leaf in leaves(pattern)):
        return pattern
    rest = _without_causal(pattern)
    return AllOf(all=[Causal()] if rest is None else [Causal(), rest])


def _without_causal(pattern: Pattern) -> Pattern | None:
    match pattern:
        case Causal():
            return None
        case AnyOf(any=parts):
            kept = [part for part in map(_without_causal, parts) if part is not None]
            return AnyOf(any=kept) if kept else None
        case AllOf(all=parts):
            kept = [part for part in map(_without_causal, parts) if part is not None]
            return AllOf(all=kept) if kept else None
    return pattern
