"""Cascade pruning (SpAtten, arXiv:2012.09852, sections III-A and III-B): which keys say it, and what a layer computes.

A token that later layers leave out of everything (attention, prompt, MLP) is put back before the head by the last
value it had; a head that is left out puts out zero. What was left out once stays out. Loads without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import PositiveInt, model_validator

from stgen.attention.pattern import Chosen, KeepRatio, Remade
from stgen.attention.patterns import leaves
from stgen.attention.reuse import Uses
from stgen.attention.spec import AttentionMixer, Linear, OffByOne, PolyLogits
from stgen.schedules import check_schedules
from stgen.section import Section


class Pruning(Section):
    tokens: KeepRatio = 1.0
    """Share of a clip's tokens that the last layer computes, at least one: those that were attended the most so far.
    The others keep the value they had. For joint layout and full pattern."""
    heads: KeepRatio = 1.0
    """Share of the heads that the last layer computes, at least one: those that put out the most so far. The others put
    out zero, which saves their maps but not their part of the projections."""
    first: PositiveInt = 1
    """The first layer that leaves something out, counted from 0; the layers before it show what matters."""
    course: Literal["linear", "at_once"] = "linear"
    """linear: each layer from the first on leaves out a little more, down to the shares; at_once: the first does it all,
    and only layers before it make the extra pass that ranks tokens."""

    @model_validator(mode="after")
    def _schedules_fit(self):
        check_schedules(self)
        return self

    @property
    def is_exact(self) -> bool:
        """Whether nothing is ever left out."""
        return self.tokens == 1 and self.heads == 1


@dataclass(frozen=True)
class Stage:
    """What one layer computes."""

    tokens: int
    heads: int
    ranks_tokens: bool  # a later layer leaves some of them out
    ranks_heads: bool


def stages(keys: Pruning, depth: int, tokens: int, heads: int) -> list[Stage]:
    """What each layer computes of a clip's `tokens` and of the `heads`; the schedules of `keys` are settled."""
    n = [_kept(tokens, _share(keys, keys.tokens, layer, depth)) for layer in range(depth)]
    h = [_kept(heads, _share(keys, keys.heads, layer, depth)) for layer in range(depth)]
    return [Stage(n[i], h[i], n[-1] < n[i], h[-1] < h[i]) for i in range(depth)]


def _share(keys: Pruning, last: float, layer: int, depth: int) -> float:
    """Share that a layer keeps where the last one keeps the share `last`."""
    if layer < keys.first:
        return 1.0
    return last if keys.course == "at_once" else 1 - (1 - last) * (layer - keys.first + 1) / (depth - keys.first)


def _kept(number: int, share: float) -> int:
    return max(1, int(share * number + 1e-9))  # what a float lacks to the next whole number is not meant


def check_pruning(keys: Pruning, uses: Uses, heads: int, front: int) -> None:
    """Raise ValueError, one sentence that says what to write instead, where the plan leaves pruning without a meaning.

    heads: of a layer; front: tokens of every sequence that are none of a clip's, such as registers.
    """
    depth = len(uses)
    if keys.is_exact:
        return
    if keys.first >= depth:
        raise ValueError(
            f"pruning.first: {keys.first} is no layer of the plan, which has 0 to {depth - 1}; layers before it show what "
            "may be left out, so it is 1 or more"
        )
    if keys.tokens != 1 and front:
        raise ValueError(
            "pruning.tokens: registers and the token of time would be ranked among the clip's; write registers: 0 and "
            "modulation: adaln"
        )
    flat = [use for layer in uses for term in layer for branch in term for use in branch]
    if keys.heads != 1 and not any(use.has_map for use in flat):
        raise ValueError("pruning.heads: no mixer of the plan has heads; write heads: 1")
    for use in flat:
        where = f"in mixers.{use.name}"
        if use.has_map:
            _check_mixer(use.keys, where, shares_layer=use.heads < heads)
        if keys.tokens != 1:
            _check_tokens(use, where)
        if keys.heads != 1 and use.has_map:
            _check_heads(use.keys, where)


def _check_mixer(mixer: AttentionMixer, where: str, shares_layer: bool) -> None:
    if shares_layer:
        raise ValueError(f"pruning: all heads of a layer are ranked alike, but | shares them out {where}; write > or +")
    if mixer.heads:
        raise ValueError(
            f"pruning: all heads of a layer are ranked alike, but they differ {where}; leave heads out there"
        )
    if mixer.memory.kind != "none":
        raise ValueError(
            f"pruning: memory {mixer.memory.kind} {where} is carried by places that may be left out; write memory: none there"
        )
    if mixer.reuse.what != "none":
        raise ValueError(
            f"pruning: {mixer.reuse.what} of an earlier layer belongs to tokens and heads that may be left out since; "
            f"write reuse: none {where}"
        )


def _check_tokens(use: Any, where: str) -> None:
    if not use.has_map:
        raise ValueError(
            f"pruning.tokens: {use.keys.kind} {where} runs along whole sequences, which have holes where tokens are left "
            "out; write a plan of attention alone"
        )
    if use.keys.layout != "joint":
        raise ValueError(
            f"pruning.tokens: tokens are left out of a clip one by one, so sequences of layout {use.keys.layout} {where} "
            "would differ in length; write layout: joint"
        )
    if kinds := [part.kind for part in leaves(use.keys.pattern) if part.kind != "full"]:
        raise ValueError(
            f"pruning.tokens: the tokens that are left lie in no grid or blocks for {kinds[0]} {where}; write pattern: full"
        )
    if isinstance(use.keys.normaliser, Linear | PolyLogits):
        raise ValueError(
            f"pruning.tokens: tokens are ranked by a map of scores, of which {use.keys.normaliser.kind} {where} makes "
            "something else; write normaliser: softmax, off_by_one, relu, relu2 or poly"
        )


def _check_heads(mixer: AttentionMixer, where: str) -> None:
    kinds = [part.kind for part in leaves(mixer.pattern) if isinstance(part, Chosen | Remade)]
    if kinds:
        raise ValueError(
            f"pruning.heads: {kinds[0]} {where} chooses for every head; write a pattern of positions, such as full or local"
        )
    if mixer.sink.kind != "none" or isinstance(mixer.normaliser, OffByOne | PolyLogits | Linear):
        what = f"sink {mixer.sink.kind}" if mixer.sink.kind != "none" else f"normaliser {mixer.normaliser.kind}"
        raise ValueError(
            f"pruning.heads: {what} {where} holds numbers of every head; write sink: none and normaliser: softmax, relu, "
            "relu2 or poly"
        )
