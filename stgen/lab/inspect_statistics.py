"""What heads attend in fact: statistics of their maps on real clips, at several noise levels.

A hook on each mixer sees the queries and keys that it is given; the forward pass knows nothing of it. Where all of a
map would be too much, some sequences and some query rows are looked at, the same ones in every layer of a layout, so
that maps can be compared.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from stgen.attention.attend import Heads, Mixer
from stgen.attention.layout import Layout, places
from stgen.attention.pattern import Sites
from stgen.attention.patterns import is_fixed
from stgen.attention.reuse import Kept, Use
from stgen.attention.selection import frame_of, predicate
from stgen.lab.inspect_masks import Chosen, mixers_of, runs_of, support_rows
from stgen.model import VideoTransformer
from stgen.objective import Objective
from stgen.ops.dense_attention.reference import attention_map_reference
from stgen.ops.support import Support
from stgen.step import generator
from stgen.tokens import Grid

MAP_ENTRIES = 1 << 20  # weights of one mixer's map that are looked at, on one clip at one time
ALL_ENTRIES = 1 << 27  # and of all mixers at all times together, which are held to be compared
QUERY_ROWS = 256  # queries of a sequence that are looked at, at most
MOST = 0.9  # of the mass, of which `keys` counts the keys
FROM_FRAMES = 3  # a sequence of so many frames has a first frame worth a statistic

# ------------------------------------------------------------------------------------------------------------- samples


@dataclass(frozen=True, eq=False)
class Sample:
    """The sequences and queries of a layout that are looked at; tokens in raster order, whatever the layout's own is."""

    ids: Tensor  # [s, n] number of each token in the clip; that of the clip's tokens where a sequence has fewer
    order: Tensor  # [s, n] its place in the layout's sequence
    where: Tensor  # [s, n, 3] its frame, row and column
    there: Tensor  # [s, n] whether there is one
    sequences: Tensor  # [s] numbers of the sequences
    rows: Tensor  # [r] the queries, as positions in the n
    words: str  # how much of all this is, "" for everything

    @staticmethod
    def of(layout: Layout, grid: Grid, heads: int, entries: int, device: torch.device) -> "Sample":
        """At most `entries` weights of all heads, drawn by a seed that depends on the layout's sizes alone."""
        where, filled = places(layout, grid, device)  # [sequences, places, 3], [sequences, places]
        n = int(filled.sum(1).max())
        ids = (where @ where.new_tensor([grid.h * grid.w, grid.w, 1])).masked_fill(~filled, grid.tokens)
        order = ids.argsort(dim=1, stable=True)[:, :n]
        queries = max(1, min(n, QUERY_ROWS, entries // (heads * n)))
        count = max(1, min(len(ids), entries // (heads * n * queries)))
        g = generator("inspect", len(ids), n)
        sequences = torch.randperm(len(ids), generator=g)[:count].sort().values.to(device)
        rows = torch.randperm(n, generator=g)[:queries].sort().values.to(device)
        words = [f"{count} of {len(ids)} sequences"] if count < len(ids) else []
        words += [f"{queries} of {n} queries of each"] if queries < n else []
        order = order[sequences]
        ids, filled = (x[sequences].gather(1, order) for x in (ids, filled))
        where = where[sequences].gather(1, order.unsqueeze(-1).expand(-1, -1, 3))
        return Sample(ids, order, where, filled, sequences, rows, " and ".join(words))

    def tokens(self, folded: Tensor) -> Tensor:
        """Of folded queries or keys [sequences, heads, places, D] those looked at: [s, heads, n, D]."""
        index = self.order[:, None, :, None].expand(-1, folded.shape[1], -1, folded.shape[3])
        return folded[self.sequences].gather(2, index)

    def same(self, other: "Sample") -> bool:
        """Whether maps of the two are maps of the same tokens."""
        return all(
            torch.equal(a, b)
            for a, b in ((self.ids, other.ids), (self.sequences, other.sequences), (self.rows, other.rows))
        )


@dataclass(frozen=True)
class Maps:
    """The rows of a mixer's maps that are looked at. Heads without a map of tokens have no weights."""

    weights: Tensor  # [s, heads, r, n] as attention applies them to the values
    allowed: Tensor  # [s, heads, r, n] keys that may be attended
    sink: Tensor  # [s, heads, r] mass of sink tokens and of the logit
    registers: Tensor  # [s, heads, r] mass of registers
    valid: Tensor  # [s, r] queries that are tokens

    @staticmethod
    def join(parts: Sequence["Maps"]) -> "Maps":
        """Runs of heads side by side."""

        def joined(name: str) -> Tensor:
            return torch.cat([getattr(part, name) for part in parts], dim=1)

        return Maps(joined("weights"), joined("allowed"), joined("sink"), joined("registers"), parts[0].valid)

    @property
    def shares(self) -> tuple[Tensor, Tensor]:
        """The weights divided by their sum, [s, heads, r, n], and which rows have any, [s, heads, r]."""
        total = self.weights.sum(-1)
        alive = (total > 0) & self.valid[:, None]
        return self.weights / total.masked_fill(~alive, 1).unsqueeze(-1), alive


def map_rows(heads: Heads, q: Tensor, k: Tensor, grid: Grid, sample: Sample, taken: Support | None = None) -> Maps:
    """The rows of `sample` of the map that `heads` make of q, k [1, registers + N, heads, D]; see `Heads.map`.

    `taken` is the support of an earlier layer. Linear attention has the map that its features imply.
    """
    folded = [heads.layout.fold(x[:, heads.registers :].float(), grid) for x in (q, k)]
    queries, keys = (sample.tokens(x) for x in folded)  # [s, heads, n, D]
    queries, count = queries[:, :, sample.rows], len(keys)
    own = [] if heads.sink.k is None else [heads.sink.k.float().expand(count, -1, -1, -1)]
    shared = k[:, : heads.registers].float().transpose(1, 2).expand(count, -1, -1, -1)
    sinks = sum(x.shape[2] for x in own)
    keys = torch.cat([*own, shared, keys], dim=2)  # sink tokens, registers, tokens
    mask = _allowed(heads, folded, grid, sample, taken).expand(-1, heads.group.count, -1, -1)
    weights = _weights(heads, queries, keys, pad(mask, (sinks + heads.registers, 0), value=True))
    sink, registers, tokens = weights.split([sinks, heads.registers, mask.shape[-1]], dim=-1)
    mass = sink.sum(-1)
    if heads.features is None and heads.sink.logit(queries) is not None:
        mass = mass + 1 - weights.sum(-1)
    return Maps(tokens, mask, mass, registers.sum(-1), sample.there[:, sample.rows])


def no_map(heads: Heads, sample: Sample) -> Maps:
    """In the place of heads that attend keys of their own."""
    shape = (len(sample.ids), heads.group.count, len(sample.rows))
    weights, rest = sample.ids.new_zeros(*shape, sample.ids.shape[1]), sample.ids.new_zeros(shape)
    valid = sample.there[:, sample.rows]
    return Maps(weights.float(), weights.bool(), rest.float(), rest.float(), valid)


def _weights(heads: Heads, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """[s, heads, r, D] queries on [s, heads, m, D] keys -> [s, heads, r, m]."""
    if heads.features is None:
        return attention_map_reference(q, k, mask, heads.normaliser, heads.sink.logit(q))
    products = heads.features(q, True) @ heads.features(k, False).transpose(-1, -2) * mask
    return products / products.sum(-1, keepdim=True).clamp(min=torch.finfo(products.dtype).tiny)


def _allowed(heads: Heads, folded: list[Tensor], grid: Grid, sample: Sample, taken: Support | None) -> Tensor:
    """[s, heads or 1, r, n]: which of the tokens the queries may attend."""
    both = sample.there[:, None, sample.rows, None] & sample.there[:, None, None]  # [s, 1, r, n]
    if taken is None and is_fixed(heads.selection.pattern):
        frame = frame_of(heads.layout, heads.use.keys.block, grid, heads.use.layer)
        block = sample.order // math.prod(frame.block)
        places = torch.cat([sample.where, block.unsqueeze(-1)], dim=-1)  # [s, n, 4]
        q, k = places[:, sample.rows].unsqueeze(2), places.unsqueeze(1)
        kept = predicate(heads.selection.pattern, Sites(*q.unbind(-1)), Sites(*k.unbind(-1)), frame)
        return both & kept.expand(both[:, 0].shape).unsqueeze(1)
    support = heads.selection(*folded, grid) if taken is None else taken
    length = folded[0].shape[2]
    rows = support.queries - length + sample.order[:, sample.rows]
    kept = support_rows(support.unordered(), sample.sequences % support.groups, rows)[..., -length:]
    return both & kept.gather(-1, sample.order[:, None, None].expand(*kept.shape[:3], -1))


# ------------------------------------------------------------------------------------------------------------ measures


def measure(maps: Maps, sample: Sample, grid: Grid) -> dict[str, Tensor]:
    """Means over the rows looked at, one number a head [heads] unless said; NaN where there is nothing to measure.

    entropy, entropy_share: of a row in nats, and divided by that of an even row.
    frames, rows, columns, in_frame: distance attended along each axis and within the frame (Euclidean), in tokens;
        `even_...` what it would be if every allowed key weighed the same.
    sink, registers: share of the mass on sink tokens and the logit, and on registers.
    keys: share of the allowed keys that hold MOST of the mass.
    hub, even_hub: mass that the median query gives to the key that gathers most in its sequence, and an even share.
    first, even_first: mass that the median query of a later frame gives to the first frame, and the even share.
    within_frames, within_rows, within_columns: mass up to each distance, [heads, distances].
    hub_at: how often each token of the clip is that key, [heads, N].
    """
    p, alive = maps.shares
    count = maps.allowed.sum(-1)  # [s, heads, r]
    even = maps.allowed / count.clamp(min=1).unsqueeze(-1)

    def mean(x: Tensor, where: Tensor = alive) -> Tensor:
        return (x * where).sum((0, 2)) / where.sum((0, 2))

    distance = (sample.where[:, sample.rows, None] - sample.where[:, None]).abs().unsqueeze(1)  # [s, 1, r, n, 3]
    total = maps.weights.sum(-1) + maps.sink + maps.registers
    total = total.masked_fill(total == 0, 1)
    entropy = -p.xlogy(p).sum(-1)
    choice = alive & (count > 1)
    ranked = p.sort(dim=-1, descending=True).values.cumsum(-1)
    needed = ((ranked < MOST).sum(-1) + 1).minimum(count)
    result = {
        "entropy": mean(entropy),
        "entropy_share": mean(entropy / count.clamp(min=2).log(), choice),
        "keys": mean(needed / count.clamp(min=1), choice),
        "sink": mean(maps.sink / total, maps.valid[:, None] & (count > 0)),
        "registers": mean(maps.registers / total, maps.valid[:, None] & (count > 0)),
    }
    in_frame = distance[..., 1:].double().square().sum(-1).sqrt().float()
    for axis, name in enumerate(("frames", "rows", "columns")):
        result[name] = mean((p * distance[..., axis]).sum(-1))
        result[f"even_{name}"] = mean((even * distance[..., axis]).sum(-1))
        reach = p.new_zeros(*p.shape[:3], (grid.t, grid.h, grid.w)[axis])
        reach.scatter_add_(-1, distance[..., axis].expand_as(p), p)
        result[f"within_{name}"] = mean(reach.cumsum(-1), alive.unsqueeze(-1))
    result |= {"in_frame": mean((p * in_frame).sum(-1)), "even_in_frame": mean((even * in_frame).sum(-1))}
    return result | _hub(p, even, alive, sample, grid) | _first_frame(p, even, alive, sample)


def _hub(p: Tensor, even: Tensor, alive: Tensor, sample: Sample, grid: Grid) -> dict[str, Tensor]:
    """The key that gathers most in each sequence, over all its queries."""
    best = (p * alive.unsqueeze(-1)).sum(2).argmax(-1)  # [s, heads]
    index = best[:, :, None, None].expand(-1, -1, p.shape[2], 1)
    share, fair = p.gather(-1, index).squeeze(-1), even.gather(-1, index).squeeze(-1)  # [s, heads, r]
    sees = alive & (fair > 0)
    at = p.new_zeros(p.shape[1], grid.tokens + 1)
    at.scatter_add_(1, sample.ids.gather(1, best).T, alive.any(-1).T.to(p))
    return {"hub": _median(share, sees), "even_hub": _median(fair, sees), "hub_at": at[:, :-1]}


def _first_frame(p: Tensor, even: Tensor, alive: Tensor, sample: Sample) -> dict[str, Tensor]:
    frame = sample.where[..., 0]  # [s, n]
    first = (frame == frame.amin(1, keepdim=True))[:, None, None]  # of the sequence, [s, 1, 1, n]
    later = alive & ~first[:, :, 0, sample.rows]
    later = later if int(frame.max()) + 1 >= FROM_FRAMES else later & False
    share, fair = (p * first).sum(-1), (even * first).sum(-1)
    return {"first": _median(share, later), "even_first": _median(fair, later)}


def _median(x: Tensor, where: Tensor) -> Tensor:
    """Over sequences and queries: [s, heads, r] -> [heads]."""
    return x.masked_fill(~where, math.nan).transpose(0, 1).flatten(1).nanmedian(-1).values


def similarity(a: Maps, b: Maps) -> Tensor:
    """1 - total variation of the rows of two maps, a mean over the rows: [heads]; 1 for equal maps, 0 for disjoint."""
    (p, alive), (other, too) = a.shares, b.shares
    both = alive & too
    return ((1 - (p - other).abs().sum(-1) / 2) * both).sum((0, 2)) / both.sum((0, 2))


# ----------------------------------------------------------------------------------------------------------- the study


@dataclass
class UseStatistics:
    """What was measured of one use of a mixer."""

    use: Use
    runs: list[Heads]
    sample: Sample | None  # None where there is nothing to measure
    note: str  # why, or of which heads there is nothing
    values: dict[str, Tensor] = field(default_factory=dict)  # as `measure`, with the times before: [times, ...]

    @property
    def name(self) -> str:
        return f"{self.use.layer} {self.use.name}"

    def mean(self, name: str) -> Tensor:
        """Over times: [heads, ...]."""
        return self.values[name].nanmean(0)


@dataclass
class Study:
    """What was measured of a model."""

    grid: Grid
    times: list[float]
    uses: list[UseStatistics]  # in the order of the plan
    between_layers: Tensor  # [uses, uses, heads] similarity, NaN where maps cannot be compared
    between_times: Tensor  # [uses, times, times] similarity, a mean over heads
    examples: dict[int, Chosen]  # queries and keys of the first clip at the middle time, by number of the use


@dataclass(frozen=True)
class ClipIn:
    """One clip as the model takes it."""

    latents: Tensor  # [1, C, t, h, w]
    noise: Tensor
    prompt: Tensor  # [1, L, text width]
    prompt_mask: Tensor


def study(
    transformer: VideoTransformer,
    objective: Objective,
    grid: Grid,
    clips: Sequence[ClipIn],
    times: Sequence[float],
    done: Callable[[], Any] = lambda: None,
) -> Study:
    """Statistics of every self-attention map on `clips`, each at every one of `times`; `done` is called after each pass.

    The model should be in evaluation mode, on the device of the clips.
    """
    mixers = mixers_of(transformer)
    entries = max(1, min(MAP_ENTRIES, ALL_ENTRIES // (max(1, len(mixers)) * len(times))))
    uses = [_prepared(mixer, grid, entries, clips[0].latents.device) for mixer in mixers]
    watched = {i: Watched(mixers[i], one.runs, one.sample) for i, one in enumerate(uses) if one.sample is not None}
    tally, examples = _Tally(), {}
    for clip in clips:
        held: list[dict[int, Maps]] = []
        for i, t in enumerate(times):
            with watching(watched, grid) as seen:
                forward_at(transformer, objective, clip, t)
            _add_pass(tally, watched, grid, i, seen.maps)
            held.append(seen.maps)
            if i == len(times) // 2:
                examples = examples or seen.chosen
            done()
        _add_times(tally, held)
    heads = max(one.use.heads for one in uses)
    layers, steps = (
        torch.full((len(uses), len(uses), heads), math.nan),
        torch.full((len(uses), *2 * [len(times)]), math.nan),
    )
    for key, values in tally.means().items():
        match key:
            case "values", use, i:
                for name, value in values.items():
                    uses[use].values.setdefault(name, value.new_zeros(len(times), *value.shape))[i] = value
            case "layers", a, b:
                layers[a, b, : uses[a].use.heads] = layers[b, a, : uses[a].use.heads] = values["similarity"]
            case "times", use, i, j:
                steps[use, i, j] = steps[use, j, i] = values["similarity"].nanmean()
    return Study(grid, list(times), uses, layers, steps, examples)


def _prepared(mixer: Mixer, grid: Grid, entries: int, device: torch.device) -> UseStatistics:
    use, runs = mixer.use, runs_of(mixer)
    if use.takes in ("map", "output"):
        return UseStatistics(use, runs, None, f"{use.takes} of an earlier layer")
    without = [run for run in runs if run.remade is not None]
    note = f"no map of tokens ({without[0].group.pattern.kind} makes keys of its own)" if without else ""
    if len(without) == len(runs):
        return UseStatistics(use, runs, None, note)
    return UseStatistics(use, runs, Sample.of(runs[0].layout, grid, use.heads, entries, device), note)


def forward_at(transformer: VideoTransformer, objective: Objective, clip: ClipIn, t: float) -> Tensor:
    """What the model puts out for a clip at time t, without gradients."""
    level = torch.full((1,), t, device=clip.latents.device)
    z = objective.add_noise(clip.latents, clip.noise, level)
    with torch.no_grad():
        return transformer(z, objective.model_time(level), clip.prompt, clip.prompt_mask, return_dict=False)[0]


def _add_pass(tally: "_Tally", watched: Mapping[int, "Watched"], grid: Grid, time: int, maps: dict[int, Maps]) -> None:
    """Measures of a pass, and how alike its layers are that look at the same tokens with as many heads."""
    for i, own in maps.items():
        tally.add(("values", i, time), measure(own, watched[i].sample, grid))
        for j, other in maps.items():
            alike = own.weights.shape[1] == other.weights.shape[1] and watched[i].sample.same(watched[j].sample)
            if j <= i and alike:
                tally.add(("layers", i, j), {"similarity": similarity(own, other)})


def _add_times(tally: "_Tally", held: Sequence[dict[int, Maps]]) -> None:
    """How alike the maps of a layer are at two times of a clip."""
    for i, first in enumerate(held):
        for j, second in enumerate(held[: i + 1]):
            for use in first:
                tally.add(("times", use, i, j), {"similarity": similarity(first[use], second[use])})


class _Tally:
    """Means of what is added under the same key, without the NaN."""

    def __init__(self):
        self._found: dict[tuple, list[dict[str, Tensor]]] = {}

    def add(self, key: tuple, values: dict[str, Tensor]) -> None:
        self._found.setdefault(key, []).append({name: value.float().cpu() for name, value in values.items()})

    def means(self) -> dict[tuple, dict[str, Tensor]]:
        return {
            key: {name: torch.stack([one[name] for one in group]).nanmean(0) for name in group[0]}
            for key, group in self._found.items()
        }


# --------------------------------------------------------------------------------------------------------------- hooks


@dataclass(frozen=True)
class Watched:
    """A mixer whose maps are looked at."""

    mixer: Mixer
    runs: list[Heads]
    sample: Sample

    def maps(self, q: Tensor, k: Tensor, grid: Grid, taken: Kept | None) -> Maps:
        """Of q, k [1, registers + N, heads, D], or with what it takes from an earlier layer."""
        takes, parts = self.mixer.use.takes, []
        if taken is not None and takes == "kv":
            assert taken.k is not None
            k = taken.k
        for number, run in enumerate(self.runs):
            own = slice(run.group.first, run.group.first + run.group.count)
            support = taken.supports[number] if taken is not None and takes == "support" else None
            if run.remade is not None:
                parts.append(no_map(run, self.sample))
            else:
                parts.append(map_rows(run, q[:, :, own], k[:, :, own], grid, self.sample, support))
        return Maps.join(parts)


@dataclass(frozen=True)
class Seen:
    """What the hooks saw in a pass, by number of the use."""

    maps: dict[int, Maps] = field(default_factory=dict)
    chosen: dict[int, Chosen] = field(default_factory=dict)  # of mixers whose pattern is chosen from the data


@contextmanager
def watching(watched: Mapping[int, Watched], grid: Grid) -> Iterator[Seen]:
    """Within it a forward pass leaves the maps of the watched mixers in what it yields."""
    seen = Seen()

    def hook(i: int, args: tuple, kwargs: Mapping[str, Any]) -> None:
        one = watched[i]
        given = dict(zip(("q", "k", "v", "grid", "carry"), args, strict=False)) | dict(kwargs)
        source = one.mixer.use.source
        seen.maps[i] = one.maps(given["q"], given["k"], grid, None if source is None else given["carry"][source])
        if given["k"] is not None and not all(is_fixed(run.group.pattern) for run in one.runs):
            registers = one.runs[0].registers
            seen.chosen[i] = (given["q"][:, registers:].cpu(), given["k"][:, registers:].cpu())

    handles = [
        one.mixer.register_forward_pre_hook(lambda _, args, kwargs, i=i: hook(i, args, kwargs), with_kwargs=True)
        for i, one in watched.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
