"""The keys of an attention mixer, and which of their pairs have no meaning.

Every rule that can be judged without the sizes of a model is judged here, when a config loads, one sentence each.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from stgen.attention.pattern import Bits, Extent3D, KeepRatio, Offset3D, PatternError, WholeNumber
from stgen.attention.patterns import AllOf, AnyOf, Chosen, Pattern, PatternKeys, Remade, leaves
from stgen.attention.patterns.causal import Causal
from stgen.attention.patterns.full import Full
from stgen.attention.patterns.recent import Recent
from stgen.schedules import check_schedules
from stgen.section import Section

# --------------------------------------------------------------------------------------------------------- normalisers


class Softmax(Section):
    kind: Literal["softmax"] = "softmax"
    """exp, divided by its sum."""


class OffByOne(Section):
    kind: Literal["off_by_one"] = "off_by_one"
    """Softmax with 1 more in the denominator, so that a query may attend to nothing."""


class Relu(Section):
    kind: Literal["relu"] = "relu"
    """max(0, score), divided by the number of keys that may be attended: true zeros."""


class Relu2(Section):
    kind: Literal["relu2"] = "relu2"
    """max(0, score) squared, divided by the number of keys that may be attended."""


class Poly(Section):
    kind: Literal["poly"] = "poly"
    """Softmax whose exponential is a shift of the exponent and a cubic (SAS of TurboAttention, arXiv:2412.08585)."""
    base: Literal[2, "e"] = 2
    """2: powers of two with an integer maximum, exact under online softmax; e: the published coefficients."""
    cut: Annotated[float, Field(lt=0)] | None = None
    """Scores this far below the row's maximum count as zero; null: never. The published value is -6."""


class Linear(Section):
    kind: Literal["linear"] = "linear"
    """phi(q) (phi(k)^T v), divided by phi(q) sum phi(k): cost grows with the number of tokens, not with its square."""
    features: Literal["elu", "relu", "favor", "learned"] = "elu"
    """phi: elu + 1 (arXiv:2006.16236), relu, positive random features of the exponential (arXiv:2009.14794), or a
    learned projection kept positive."""
    size: PositiveInt | None = None
    """favor and learned: number of features; null takes the head dimension."""
    redraw_steps: NonNegativeInt = 0
    """favor: draw new random features every so many training steps; 0 keeps the first."""

    @model_validator(mode="after")
    def _keys_of_features(self):
        if self.size is not None and self.features not in ("favor", "learned"):
            raise ValueError(f"size belongs to features favor and learned; {self.features} has those of the head")
        if self.redraw_steps and self.features != "favor":
            raise ValueError(f"redraw_steps belongs to features favor, not to {self.features}")
        return self


class PolyLogits(Section):
    kind: Literal["poly_logits"] = "poly_logits"
    """Softmax of a cubic of the clamped scores, over the best of them. Looks at every pair and holds them all."""
    coefficients: tuple[float, float, float, float] = (0.0, 1.0, 0.0, 0.0)
    """Of 1, s, s^2 and s^3."""
    clamp: PositiveFloat = 10.0
    """Scores are cut to [-clamp, clamp] first."""
    ratio: KeepRatio = 1.0
    """Share of the allowed keys that a query keeps, those with the largest results; at least one."""
    learned: bool = False
    """Train the coefficients, each head its own."""

    @model_validator(mode="after")
    def _schedules_fit(self):
        check_schedules(self)
        return self


Normaliser = Softmax | OffByOne | Relu | Relu2 | Poly | PolyLogits | Linear

# --------------------------------------------------------------------------------------------------------------- sinks


class NoSink(Section):
    kind: Literal["none"] = "none"
    """No sink."""


class LogitSink(Section):
    kind: Literal["logit"] = "logit"
    """A score per head that takes mass and carries no value."""
    value: float = 0.0
    """The score, or where it starts when learned."""
    learned: bool = True
    """Train the score."""


class TokenSink(Section):
    kind: Literal["tokens"] = "tokens"
    """Learned keys and values that every query of the head sees."""
    count: PositiveInt = 4
    """How many; at most as many as a sequence has places."""


Sink = NoSink | LogitSink | TokenSink

# -------------------------------------------------------------------------------------------------------------- memory


class NoMemory(Section):
    kind: Literal["none"] = "none"
    """Nothing is carried from frames to later ones."""


class Infini(Section):
    kind: Literal["infini"] = "infini"
    """Frames are cut into segments that attend themselves and read a memory of all before them, whose size does not grow
    (Infini-attention, arXiv:2404.07143)."""
    segment: PositiveInt
    """Frames of a segment, in tokens; divides the clip."""
    delta: bool = False
    """Write only what the memory does not yield for a key already (the delta rule)."""
    truncate: NonNegativeInt | None = None
    """Segments that gradient flows back through at most: the memory is handed on without gradient after every
    truncate + 1 segments; null: through all."""


class Ring(Section):
    kind: Literal["ring"] = "ring"
    """A frame sees the first frames and the last ones before it (StreamingLLM, arXiv:2309.17453); streaming keeps no
    others. Needs a causal pattern."""
    sinks: NonNegativeInt = 1
    """First frames, in tokens."""
    window: PositiveInt
    """Last frames, in tokens, one's own among them."""


Memory = NoMemory | Infini | Ring


# --------------------------------------------------------------------------------------------------------- approximate


class Approximate(Section):
    qk_topk: WholeNumber = 0
    """Channels of each query and key that enter their product, the largest by magnitude; 0 takes all."""
    quantise: list[Literal["q", "k", "v", "map"]] = []
    """What is rounded to few bits, straight-through: queries, keys, values, the map (which is then made whole)."""
    form: Literal["integer", "fixed"] = "integer"
    """integer: whole multiples of a step for each sequence and head; fixed: so many bits behind the point."""
    bits: Bits = 8
    """How many bits; a schedule may lower them over training."""

    @model_validator(mode="after")
    def _schedules_fit(self):
        check_schedules(self)
        if len(set(self.quantise)) < len(self.quantise):
            raise ValueError(f"quantise names one of {self.quantise} twice; name each once")
        return self

    @property
    def is_exact(self) -> bool:
        """Whether nothing is left out."""
        return self.qk_topk == 0 and not self.quantise


# --------------------------------------------------------------------------------------------------------------- reuse


class Reuse(Section):
    what: Literal["none", "map", "kv", "support", "output"] = "none"
    """Taken from an earlier layer: the map (its weights, with this layer's values), keys and values, the support
    (which keys are attended), or the heads' output."""
    every: Annotated[int, Field(ge=2)] | None = None
    """Of every so many uses of the mixer the first computes and the others take from it; null: 2, unless source is given."""
    source: NonNegativeInt | None = None
    """Take from this layer instead, counted from 0; layers up to it compute for themselves."""

    @model_validator(mode="after")
    def _where_from(self):
        if self.what == "none" and (self.every is not None or self.source is not None):
            raise ValueError("every and source say where to take from; add what: map, kv, support or output")
        if self.every is not None and self.source is not None:
            raise ValueError("give every (uses of this mixer) or source (a layer), not both")
        return self

    @property
    def period(self) -> int:
        return self.every or 2


# --------------------------------------------------------------------------------------------------------------- heads


class HeadKeys(Section):
    """What some heads do otherwise; null takes the mixer's own."""

    pattern: PatternKeys | None = None
    """Which keys these heads attend."""
    normaliser: Annotated[Normaliser, Field(discriminator="kind")] | None = None
    """How these heads turn scores into weights."""
    sink: Annotated[Sink, Field(discriminator="kind")] | None = None
    """The sink of these heads."""


@dataclass(frozen=True)
class HeadGroup:
    """Neighbouring heads of a mixer that do the same."""

    first: int
    count: int
    pattern: Pattern
    normaliser: Normaliser
    sink: Sink


PLAIN_LAYOUTS = ("joint", "spatial", "temporal", "height", "width")


class AttentionMixer(Section):
    kind: Literal["attention"] = "attention"
    """Self-attention."""
    layout: Literal["joint", "spatial", "temporal", "height", "width", "window"] = "joint"
    """Which tokens share a sequence."""
    size: Extent3D | None = None
    """Window layout: frames, rows and columns of a window, in tokens."""
    shift: Offset3D = (0, 0, 0)
    """Window layout: offset of the windows in every second layer that uses this mixer."""
    order: Literal["raster", "tile"] = "raster"
    """How tokens lie in a sequence: frame by frame and row by row, or tile by tile of `block` tokens."""
    block: Extent3D = (4, 4, 4)
    """Blocks in which sparse patterns are kept and computed: frames x rows x columns under order tile, runs of as many
    tokens under raster; cut to the sequence."""
    pattern: PatternKeys = Full()
    """Which keys of its sequence a query attends. A list is a union, {all: [...]} an intersection."""
    normaliser: Annotated[Normaliser, Field(discriminator="kind")] = Softmax()
    """How scores become weights."""
    sink: Annotated[Sink, Field(discriminator="kind")] = NoSink()
    """Mass that goes to no token."""
    reuse: Reuse = Reuse()
    """What is taken from an earlier layer."""
    approximate: Approximate = Approximate()
    """What is left out of the numbers: small channels, low bits."""
    memory: Annotated[Memory, Field(discriminator="kind")] = NoMemory()
    """What is carried from frames to later ones, so that videos longer than a training clip can be sampled chunk by chunk."""
    heads: dict[str, HeadKeys] = {}
    """Heads that differ, by number within the mixer's share: `"0-3": {...}` or `"5": {...}`."""

    @model_validator(mode="after")
    def _has_meaning(self):
        _check_window(self)
        ranges = [range(a, b + 1) for a, b in map(head_range, self.heads)]
        for i, one in enumerate(ranges):
            if any(set(one) & set(other) for other in ranges[:i]):
                raise ValueError(f"heads: {list(self.heads)[i]!r} names heads that another entry has named")
        if "map" in self.approximate.quantise and self.reuse.what == "map":
            raise ValueError(
                "approximate: a map that is taken from an earlier layer is rounded there; leave map out here"
            )
        if not self.heads:  # else the model judges what its heads do in the end
            check_heads(self, self.pattern, self.normaliser, self.sink)
        for text, keys in self.heads.items():
            try:
                check_heads(self, *(getattr(keys, k) or getattr(self, k) for k in ("pattern", "normaliser", "sink")))
            except ValueError as error:
                raise ValueError(f"heads.{text}.{error}") from None
        return self

    def head_groups(self, share: int) -> list[HeadGroup]:
        """The mixer's `share` heads as runs that do the same. Raises ValueError for a head that is not there."""
        owner: list[HeadKeys | None] = [None] * share
        for text, keys in self.heads.items():
            first, last = head_range(text)
            if last >= share:
                raise ValueError(f"heads: {text!r} names head {last}, but the mixer has {share} (0 to {share - 1})")
            owner[first : last + 1] = [keys] * (last + 1 - first)
        groups: list[HeadGroup] = []
        for i in range(share):
            if i and owner[i] is owner[i - 1]:
                continue
            count = next((j for j in range(i, share) if owner[j] is not owner[i]), share) - i
            keys = ("pattern", "normaliser", "sink")
            pattern, normaliser, sink = (getattr(owner[i], k, None) or getattr(self, k) for k in keys)
            groups.append(HeadGroup(i, count, self._remembered(pattern), normaliser, sink))
        return groups

    def _remembered(self, pattern: Pattern) -> Pattern:
        """A pattern within what the memory keeps."""
        if not isinstance(self.memory, Ring):
            return pattern
        return AllOf(all=[Recent(sinks=self.memory.sinks, window=self.memory.window), pattern])


def head_range(text: str) -> tuple[int, int]:
    """ "0-3" -> (0, 3), "5" -> (5, 5). Raises ValueError for anything else."""
    found = re.fullmatch(r"\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if first > last:
        raise ValueError(f'heads: {text!r} is no range of heads; write "0-3" or "5"')
    return first, last


# ------------------------------------------------------------------------------------------------ pairs without meaning


def _check_window(mixer: AttentionMixer) -> None:
    if mixer.layout == "window" and mixer.size is None:
        raise ValueError("layout window needs size: [frames, rows, columns] of a window, in tokens")
    if mixer.layout != "window" and (mixer.size is not None or any(mixer.shift)):
        raise ValueError(f"size and shift belong to layout window, not to {mixer.layout}")
    if mixer.size is not None and any(s >= n for s, n in zip(mixer.shift, mixer.size, strict=True)):
        raise ValueError(f"shift {list(mixer.shift)} must be smaller than size {list(mixer.size)} on every axis")


def check_heads(mixer: AttentionMixer, pattern: Pattern, normaliser: Normaliser, sink: Sink) -> None:
    """Raise ValueError, one sentence that says what to write instead, for a choice of rooms without meaning."""
    parts = leaves(pattern)
    _check_pattern(mixer, pattern, parts)
    if isinstance(sink, LogitSink) and isinstance(normaliser, Relu | Relu2 | Linear):
        raise ValueError(
            f"sink: a logit is mass in a softmax, but {normaliser.kind} divides by "
            f"{'a sum of features' if isinstance(normaliser, Linear) else 'the number of keys'}; write kind: tokens"
        )
    if isinstance(sink, LogitSink) and isinstance(normaliser, OffByOne):
        raise ValueError("sink: off_by_one is softmax with a logit sink fixed at 0; write normaliser: softmax")
    if isinstance(normaliser, Linear) and "map" in mixer.approximate.quantise:
        raise ValueError("approximate: linear attention has no map to quantise; leave map out")
    if isinstance(normaliser, Linear):
        if other := [part.kind for part in parts if not isinstance(part, Full | Causal)]:
            raise ValueError(
                f"normaliser: linear sums over all keys and cannot leave out those that {other[0]} does; write pattern: "
                "full or causal, or narrow the layout to a window"
            )
        causal = any(isinstance(part, Causal) for part in parts)
        if mixer.order != "raster" and causal:
            raise ValueError("order: causal linear attention sums frame by frame; write raster")
        if normaliser.features == "favor" and causal:
            raise ValueError(
                "normaliser: favor scales keys by the largest of a sequence, future ones included; under causal write "
                "features: elu, relu or learned"
            )
    _check_reuse(mixer.reuse, parts, normaliser)
    _check_memory(mixer, parts, normaliser)


def _check_pattern(mixer: AttentionMixer, pattern: Pattern, parts: list[Pattern]) -> None:
    causal = any(isinstance(part, Causal) for part in parts)
    if causal and mixer.approximate.quantise and mixer.approximate.form == "integer":
        raise ValueError(
            "approximate: integers are scaled by the largest number of a sequence, future ones included; under causal write "
            "form: fixed"
        )
    for part in parts:
        if isinstance(part, Remade) and len(parts) + isinstance(pattern, AnyOf) > 1:
            raise ValueError(f"pattern: {part.kind} makes keys of its own and stands alone, not in a list or in all")
        if part.needs_tiles and mixer.layout == "window":
            raise ValueError(
                f"pattern: {part.kind} moves over the tiles of a clip, not of a window; write another layout"
            )
        if part.needs_tiles and mixer.order != "tile":
            raise ValueError(f"pattern: {part.kind} moves over tiles of tokens; write order: tile")
        if causal and isinstance(part, Chosen) and part.sees_all_queries:
            raise ValueError(f"pattern: {part.kind} looks at all queries of a clip, so causal would leak the future")
        if causal and isinstance(part, Chosen) and part.by_blocks and (mixer.order, mixer.block[0]) != ("tile", 1):
            raise ValueError(
                f"pattern: {part.kind} pools whole blocks, and blocks of several frames would leak the future under "
                "causal; write order: tile and block: [1, rows, columns]"
            )


def _check_reuse(reuse: Reuse, parts: list[Pattern], normaliser: Normaliser) -> None:
    if reuse.what in ("map", "support") and isinstance(normaliser, Linear):
        raise ValueError(f"reuse: linear attention has no {reuse.what}; write what: kv or output")
    if reuse.what in ("map", "support") and isinstance(parts[0], Remade):  # which stands alone
        raise ValueError(
            f"reuse: {parts[0].kind} attends keys of its own, so its {reuse.what} fits no other layer; write kv"
        )
    if reuse.what == "support" and all(isinstance(part, Full) for part in parts):
        raise ValueError("reuse: full attention has no support to reuse; write what: map, kv or output")


def _check_memory(mixer: AttentionMixer, parts: list[Pattern], normaliser: Normaliser) -> None:
    memory = mixer.memory
    if isinstance(memory, NoMemory):
        return
    if mixer.layout not in ("joint", "temporal"):
        what = "is cut in time already" if mixer.layout == "window" else "has no time to remember"
        raise ValueError(f"memory: layout {mixer.layout} {what}; write memory: none, or layout: joint or temporal")
    if mixer.reuse.what not in ("none", "output"):
        raise ValueError(
            f"memory: {memory.kind} keeps what a layer has computed itself, not the {mixer.reuse.what} of an earlier one; "
            "write reuse: none or output"
        )
    if isinstance(memory, Infini):
        if tiled := [part.kind for part in parts if part.needs_tiles]:
            raise ValueError(
                f"pattern: {tiled[0]} moves over the tiles of a clip, not of a segment; write another one, or memory: ring"
            )
        return
    if not any(isinstance(part, Causal) for part in parts):
        other = next((part.kind for part in parts if not isinstance(part, Recent)), None)
        reason = f"keeps the frames before one's own, but {other} looks at later ones"
        if other is None:
            reason = "has sinks and a window of its own, which recent would say a second time"
        raise ValueError(f"memory: ring {reason}; write pattern: causal, or {{all: [causal, ...]}}")
    if isinstance(normaliser, Linear):
        raise ValueError(
            "memory: linear attention sums over all keys and cannot leave out those that a ring does; write memory: infini, "
            "or another normaliser"
        )


def check_segment(memory: Memory, frames: int) -> None:
    """Raise PatternError unless the segments of a memory divide a clip of `frames` frames of tokens."""
    if isinstance(memory, Infini) and frames % memory.segment:
        raise PatternError(
            f"memory: segments of {memory.segment} frames do not divide the {frames} frames of tokens of a clip; write a "
            f"segment that does, such as {max(n for n in range(1, memory.segment + 1) if frames % n == 0)}"
        )
