"""What measured maps suggest for the config. Each rule has its threshold here, and says the number that met it."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from stgen.attention.patterns.full import Full
from stgen.attention.spec import LogitSink, NoSink, OffByOne, head_range
from stgen.lab.inspect_statistics import Study, UseStatistics

ALIKE = 0.9  # similarity of maps from which a later layer may take the earlier one's
LOCAL_MASS = 0.95  # mass that a local box must hold,
LOCAL_KEYS = 0.5  # while it has at most so many of the keys
HUB_MASS = 0.3  # mass that the median query gives to one and the same key,
HUB_TIMES = 4  # and how many times an even share that must be
FIRST_MASS, FIRST_TIMES = 0.5, 2  # the same for the first frame
EVEN = 0.98  # entropy as a share of its maximum from which a map is almost even,
EVEN_KEYS = 4  # where a sequence has at least so many keys
UNUSED = 0.01  # mass below which a sink does nothing

THRESHOLDS = (
    f"a map is shared from a similarity of {ALIKE:g} (1 - total variation, mean over rows and heads); a head is local if "
    f"a box with at most {LOCAL_KEYS:.0%} of the keys holds {LOCAL_MASS:.0%} of its mass; a sink is missing if the median "
    f"query gives one and the same key of its sequence {HUB_MASS:.0%} of its mass and {HUB_TIMES} times an even share (the "
    f"first frame: {FIRST_MASS:.0%} and {FIRST_TIMES} times); a map is almost even from {EVEN:.0%} of the largest entropy "
    f"(sequences of {EVEN_KEYS} keys or more); a sink is unused below {UNUSED:.0%} of the mass"
)


def advice(study: Study) -> list[str]:
    """One sentence for each suggestion, naming layer, mixer and heads."""
    found = list(_shared_maps(study))
    for one in study.uses:
        if one.values:
            for rule in (_local, _missing_sink, _even, _unused_sink):
                found += rule(one, study)
    return found


# --------------------------------------------------------------------------------------------------------- shared maps


def _shared_maps(study: Study) -> Iterator[str]:
    for name in dict.fromkeys(one.use.name for one in study.uses):
        own = [i for i, one in enumerate(study.uses) if one.use.name == name and _may_share(one)]
        if len(own) < 2:
            continue
        if every := _period(own, study):
            lowest = min(_alike(study, own[i - i % every], own[i]) for i in range(len(own)) if i % every)
            yield (
                f"mixer {name}: within every {every} of its layers ({_layers(study, own)}) the maps are alike, lowest "
                f'similarity {lowest:.2f}; write "reuse: {{what: map, every: {every}}}" in model.mixers.{name}'
            )
            continue
        for a, b in pairwise(own):
            if (alike := _alike(study, a, b)) >= ALIKE:
                first, second = study.uses[a].use.layer, study.uses[b].use.layer
                yield (
                    f"layers {first} and {second}, {name}: similarity {alike:.2f}; give layer {second} a mixer of its "
                    f'own with the keys of {name} and "reuse: {{what: map, source: {first}}}"'
                )


def _may_share(one: UseStatistics) -> bool:
    """It computes a map, and nothing that a map could not replace."""
    return bool(
        one.values
        and not one.note
        and one.use.keys.reuse.what == "none"
        and all(run.features is None for run in one.runs)
    )


def _period(own: Sequence[int], study: Study) -> int | None:
    """The largest `every` under which each layer's map is like the one that it would take."""
    for every in range(len(own), 1, -1):
        if all(_alike(study, own[i - i % every], own[i]) >= ALIKE for i in range(len(own)) if i % every):
            return every
    return None


def _alike(study: Study, a: int, b: int) -> float:
    """Mean over heads; 0 where maps cannot be compared."""
    value = float(study.between_layers[a, b].nanmean())
    return 0.0 if math.isnan(value) else value


def _layers(study: Study, uses: Sequence[int]) -> str:
    return "layers " + ", ".join(str(study.uses[i].use.layer) for i in uses)


# ---------------------------------------------------------------------------------------------------------- each layer


def _local(one: UseStatistics, study: Study) -> Iterator[str]:
    extents = one.runs[0].layout.extents(study.grid)
    spanned = sum(extent > 1 for extent in extents)
    within = [one.mean(f"within_{axis}") for axis in ("frames", "rows", "columns")]  # each [heads, distances]
    radii = {}
    for head in _heads(one, lambda run: isinstance(run.group.pattern, Full) and run.features is None):
        # What the axes leave out together is at most the sum of what each leaves out.
        radius = [
            0 if extent == 1 else _first_at_least(shares[head], 1 - (1 - LOCAL_MASS) / spanned)
            for shares, extent in zip(within, extents, strict=True)
        ]
        keys = math.prod(min(2 * r + 1, extent) / extent for r, extent in zip(radius, extents, strict=True))
        if keys <= LOCAL_KEYS:
            radii[head] = radius
    if radii:
        radius = [max(axis) for axis in zip(*radii.values(), strict=True)]
        yield (
            f"layer {one.use.layer}, {one.use.name}, {_named(radii)}: at least {LOCAL_MASS:.0%} of the mass lies within "
            f'{_radius_words(radius)}; write "{_keys(one, radii, f"pattern: {{kind: local, radius: {radius}}}")}"'
        )


def _missing_sink(one: UseStatistics, study: Study) -> Iterator[str]:
    without = _heads(
        one, lambda run: isinstance(run.group.sink, NoSink) and not isinstance(run.group.normaliser, OffByOne)
    )
    hub, even = one.mean("hub"), one.mean("even_hub")
    heads = [h for h in without if hub[h] >= HUB_MASS and hub[h] >= HUB_TIMES * even[h]]
    if heads:
        yield (
            f"layer {one.use.layer}, {one.use.name}, {_named(heads)}: the median query gives {_range(hub, heads)} of its "
            f"mass to one key of its sequence, whatever the query{_hub_words(one, study, heads)}; "
            f'write "{_keys(one, heads, _sink_words(one, heads))}"'
        )
    first, even = one.mean("first"), one.mean("even_first")
    heads = [h for h in without if h not in heads and first[h] >= FIRST_MASS and first[h] >= FIRST_TIMES * even[h]]
    if heads:
        yield (
            f"layer {one.use.layer}, {one.use.name}, {_named(heads)}: the median query of a later frame gives "
            f'{_range(first, heads)} of its mass to the first frame; write "{_keys(one, heads, _sink_words(one, heads))}", '
            "and if a sparse pattern is meant, keep {kind: global, frames: 1} in it"
        )


def _even(one: UseStatistics, study: Study) -> Iterator[str]:
    share = one.mean("entropy_share")
    if math.prod(one.runs[0].layout.extents(study.grid)) < EVEN_KEYS:
        return
    heads = [h for h in _heads(one, lambda run: run.features is None) if share[h] >= EVEN]
    if heads:
        linear = f'try "{_keys(one, heads, "normaliser: {kind: linear}")}", or fewer heads'
        yield (
            f"layer {one.use.layer}, {one.use.name}, {_named(heads)}: maps are almost even (entropy {_range(share, heads)} "
            f"of the largest), a mean over the keys; {linear if _may_be_linear(one, heads) else 'try fewer heads'}"
        )


def _may_be_linear(one: UseStatistics, heads: Sequence[int]) -> bool:
    """Whether linear attention is defined with the other keys of the mixer."""
    keys = one.use.keys
    plain = keys.order == "raster" and keys.reuse.what not in ("map", "support")
    groups = [_run(one, h).group for h in heads]
    return plain and all(isinstance(g.pattern, Full) and not isinstance(g.sink, LogitSink) for g in groups)


def _unused_sink(one: UseStatistics, study: Study) -> Iterator[str]:
    share = one.mean("sink")
    heads = [h for h in _heads(one, lambda run: not isinstance(run.group.sink, NoSink)) if share[h] < UNUSED]
    if heads:
        kind = "logit" if isinstance(_run(one, heads[0]).group.sink, LogitSink) else "tokens"
        yield (
            f"layer {one.use.layer}, {one.use.name}, {_named(heads)}: the sink ({kind}) takes {_range(share, heads)} of "
            f'the mass; write "{_keys(one, heads, "sink: {kind: none}")}"'
        )


# --------------------------------------------------------------------------------------------------------------- words


def _run(one: UseStatistics, head: int):
    """The heads module that a head of the mixer belongs to."""
    return next(run for run in one.runs if run.group.first <= head < run.group.first + run.group.count)


def _heads(one: UseStatistics, suits: Callable) -> list[int]:
    """Heads that have a map and whose run `suits`."""
    return [h for h in range(one.use.heads) if _run(one, h).remade is None and suits(_run(one, h))]


def _named(heads) -> str:
    heads = list(heads)
    return ("head " if len(heads) == 1 else "heads ") + ", ".join(map(str, heads))


def _keys(one: UseStatistics, heads, words: str) -> str:
    """The key as it stands in the mixer: for all of its heads, or below `heads`."""
    heads = list(heads)
    if len(heads) == one.use.heads and len(one.runs) == 1:
        return words
    there = [
        text for text in one.use.keys.heads if set(heads) & set(range(head_range(text)[0], head_range(text)[1] + 1))
    ]
    split = f"  # and split the entry of {', '.join(there)}" if there else ""
    return "heads: {" + ", ".join(f"'{text}': {{{words}}}" for text in _ranges(heads)) + "}" + split


def _ranges(heads: list[int]) -> list[str]:
    """[0, 1, 2, 5] -> ["0-2", "5"]."""
    starts = [h for h in heads if h - 1 not in heads]
    ends = [h for h in heads if h + 1 not in heads]
    return [f"{a}-{b}" if a != b else f"{a}" for a, b in zip(starts, ends, strict=True)]


def _sink_words(one: UseStatistics, heads: Sequence[int]) -> str:
    """A logit where the normaliser has a mass for it, else tokens."""
    kinds = {_run(one, h).group.normaliser.kind for h in heads}
    return "sink: {kind: logit}" if kinds <= {"softmax", "poly"} else "sink: {kind: tokens}"


def _hub_words(one: UseStatistics, study: Study, heads: Sequence[int]) -> str:
    """Where that key lies most often, along the axes on which keys of a sequence differ."""
    grid, extents = study.grid, one.runs[0].layout.extents(study.grid)
    number = one.mean("hub_at")[list(heads)].sum(0).view(grid.t, grid.h, grid.w)
    fixed = [axis for axis in range(3) if extents[axis] == 1]
    number = number.sum(fixed, keepdim=True) if fixed else number
    share = float(number.max() / number.sum())
    at = [int(i) for i in (number == number.max()).nonzero()[0]]
    names = [
        f"{name} {i}" for name, i, extent in zip(("frame", "row", "column"), at, extents, strict=True) if extent > 1
    ]
    return f" (in {share:.0%} of the sequences {', '.join(names)})"


def _radius_words(radius: Sequence[int]) -> str:
    return "{} frames, {} rows and {} columns".format(*radius)


def _range(values: Tensor, heads: Sequence[int]) -> str:
    low, high = float(values[list(heads)].min()), float(values[list(heads)].max())
    return f"{low:.1%}" if f"{low:.1%}" == f"{high:.1%}" else f"{low:.1%} to {high:.1%}"


def _first_at_least(shares: Tensor, wanted: float) -> int:
    """The first place of an ascending row that reaches `wanted`; the last where rounding keeps it below."""
    return int((shares < wanted).sum().clamp(max=len(shares) - 1))
