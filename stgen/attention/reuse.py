"""Reuse: what a layer takes from an earlier one instead of computing it.

map: the weights of the earlier layer, applied to this layer's values (LazyFormer, arXiv:2102.12702); kv: its keys and
values (cross-layer attention, arXiv:2405.12981); support: which keys are attended; output: what its heads put out.

This file loads without torch: a config that takes from where there is nothing is refused when it loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from stgen.attention.plan import Layer
from stgen.attention.spec import AttentionMixer

if TYPE_CHECKING:
    from torch import Tensor

    from stgen.ops.support import Support


@dataclass(frozen=True)
class Use:
    """One place of the plan at which a mixer stands."""

    number: int  # counted over the whole plan; what `source` and the carry go by
    layer: int
    name: str
    keys: Any  # of the mixer: an AttentionMixer, or those of a mixer without a map
    heads: int  # the mixer's share
    turn: int  # how often the plan has used this mixer before
    source: int | None = None  # the use that it takes `keys.reuse.what` from
    source_layer: int | None = None
    lends: frozenset[str] = frozenset()  # what later uses take from it

    @property
    def has_map(self) -> bool:
        return isinstance(self.keys, AttentionMixer)

    @property
    def takes(self) -> str:
        return "none" if self.source is None else self.keys.reuse.what

    @property
    def shift(self) -> tuple[int, int, int]:
        """A window's shift holds for every second layer that uses the mixer."""
        return self.keys.shift if self.turn % 2 else (0, 0, 0)


@dataclass(frozen=True)
class Kept:
    """What a use leaves for later ones, as far as they take it."""

    k: Tensor | None = None  # [B, N, heads, D] after norm and RoPE
    v: Tensor | None = None
    output: Tensor | None = None  # [B, N, heads, D]
    maps: list[Tensor] = field(default_factory=list)  # one per run of like heads: [S, heads, n, m]
    supports: list[Support | None] = field(default_factory=list)  # likewise
    memory: Any = None  # what a stream remembers of earlier frames; before a use has run, what it is to go on from


Carry = Mapping[Any, Any]  # a Kept by the number of its use; what pruning has left by `cascade.PRUNED`

Uses = tuple[tuple[tuple[tuple[Use, ...], ...], ...], ...]  # layers of terms of branches of uses


def place(layers: tuple[Layer, ...], mixers: Mapping[str, Any], heads: int) -> Uses:
    """Every use of a mixer in the plan, with what it takes and lends.

    Raises ValueError, in one sentence, for a reuse that has nowhere to take from.
    """
    uses: list[Use] = []
    for i, layer in enumerate(layers):
        for term in layer.terms:
            for branch in term.branches:
                for name in branch:
                    turn = sum(use.name == name for use in uses)
                    uses.append(Use(len(uses), i, name, mixers[name], heads // len(branch), turn))
    for i, use in enumerate(uses):
        if (source := _source(use, uses, len(layers))) is not None:
            uses[i] = replace(use, source=source.number, source_layer=source.layer)
    _check_some_take(uses)
    for use in list(uses):
        if use.source is not None:
            lender = uses[use.source]
            uses[use.source] = replace(lender, lends=lender.lends | {use.takes})
    flat = iter(uses)
    return tuple(
        tuple(tuple(tuple(next(flat) for _ in branch) for branch in term.branches) for term in layer.terms)
        for layer in layers
    )


def _source(use: Use, uses: list[Use], depth: int) -> Use | None:
    """The use that this one takes from, None where it computes for itself."""
    if not use.has_map:
        return None
    reuse = use.keys.reuse
    if reuse.what == "none":
        return None
    if reuse.source is None:
        first = use.turn - use.turn % reuse.period
        same = [other for other in uses if other.name == use.name]
        return None if use.turn == first else _fit(use, same[first])
    if reuse.source >= depth:
        raise ValueError(
            f"mixers.{use.name}.reuse: source {reuse.source} is no layer of the plan, which has 0 to {depth - 1}"
        )
    if use.layer <= reuse.source:
        return None
    there = [other for other in uses if other.layer == reuse.source and other.has_map]
    if not there:
        raise ValueError(
            f"mixers.{use.name}.reuse: layer {reuse.source} has no attention to take from; name one that has"
        )
    alike = [o for o in there if o.name == use.name] or [o for o in there if o.keys.layout == use.keys.layout] or there
    return _fit(use, alike[0])


def _fit(use: Use, source: Use) -> Use:
    """`source`, if what it has suits `use`."""
    what, key = use.keys.reuse.what, f"mixers.{use.name}.reuse"
    if source.heads != use.heads:
        raise ValueError(
            f"{key}: {what} of {source.heads} heads in layer {source.layer} cannot serve {use.heads} in layer {use.layer}; "
            "name a source with as many"
        )
    if source.source is not None:
        raise ValueError(
            f"{key}: {source.name} of layer {source.layer} takes from an earlier layer itself; name that one"
        )
    if what not in ("map", "support"):
        return source
    if source.shift != use.shift:
        raise ValueError(
            f"{key}: layers {source.layer} and {use.layer} shift their windows differently, so a {what} of one does "
            "not fit the other; write kv or output, or leave the shift out"
        )
    ours, theirs = (other.keys.model_dump(exclude={"reuse"}) for other in (use, source))
    if differing := [name for name, value in ours.items() if theirs[name] != value]:
        raise ValueError(
            f"{key}: a {what} belongs to its mixer, but {use.name} of layer {use.layer} and {source.name} of layer "
            f"{source.layer} differ in {differing[0]}; write kv or output, or make them alike"
        )
    return source


def _check_some_take(uses: list[Use]) -> None:
    for use in uses:
        if (
            use.has_map
            and use.keys.reuse.what != "none"
            and not any(o.source is not None for o in uses if o.name == use.name)
        ):
            reuse = use.keys.reuse
            reason = f"after layer {reuse.source}" if reuse.source is not None else "often enough"
            raise ValueError(
                f"mixers.{use.name}.reuse: no layer takes from another, since the plan does not use {use.name} {reason}"
            )
