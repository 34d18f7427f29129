"""How friendly trained attention is to low bits: what rounding its map, queries, keys and values costs, head by head.

On real clips at several noise levels each mixer attends once more with the queries, keys and values of its pass, one of
them rounded as `model.mixers.NAME.approximate` (form integer) would: to whole multiples of a step, one for each
sequence and head, the largest magnitude having the largest number of the bits. Maps are also rounded by the steps of
their rows. Which keys are attended stays as it was; only for the prediction, where all layers round, it may change.
"""

import json
import math
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor
from tqdm import tqdm

from stgen.attention.approximate import Approximation, integers
from stgen.attention.attend import Heads, Mixer
from stgen.attention.spec import Approximate
from stgen.lab import quantisation_report as report
from stgen.lab.inspect import InspectError, clips_of, device_of, load_run, make_folder
from stgen.lab.inspect_masks import mixers_of, runs_of
from stgen.lab.inspect_statistics import ALL_ENTRIES, ClipIn, forward_at
from stgen.lab.quantisation_report import BITS, PARTS, RunErrors, UseErrors
from stgen.model import VideoTransformer
from stgen.objective import Objective
from stgen.ops.support import Support
from stgen.tokens import Grid, grid_of

TOGETHER = {"map": ("map",), "qkv": ("q", "k", "v"), "all": PARTS}  # what is rounded in every layer for the prediction


def quantise(args: Namespace) -> dict[str, Any]:
    """`stgen quantise`: measure, print, write quantisation.json and .png, log; returns what the JSON holds.

    Raises InspectError for what is no run, or one whose attention cannot be measured.
    """
    diffusers.utils.logging.disable_progress_bar()
    device, names = device_of(args.device), _names(args.runs)
    times = [(i + 0.5) / args.times for i in range(args.times)]
    runs, files = [], {}
    for target, name in zip(args.runs, names, strict=True):
        pipeline, cfg, home = load_run(target, args.weights)
        if not cfg.model.pruning.is_exact:
            raise InspectError(f"{target}: model.pruning leaves tokens and heads out of maps; give a run without it")
        pipeline.to(device)
        pipeline.transformer.eval()
        clips, files[name], _ = clips_of(cfg, home, pipeline, args.clips, args.seed, device)
        grid = grid_of(tuple(clips[0].latents.shape[2:]), cfg.tokens.patch_size)
        with tqdm(total=len(clips) * len(times), desc=f"rounding {name}", unit="pass") as bar:
            runs.append(measure(name, pipeline.transformer, pipeline.objective, grid, clips, times, bar.update))
    out = args.output_dir or args.runs[0] / "quantisation"
    make_folder(out)
    compared, drawn = report.compare(runs), report.draw(runs, out / "quantisation.png")
    about = {"weights": args.weights, "clips": files, "times": times, "seed": args.seed}
    result = {**about, "runs": report.as_json(runs), "compared": compared}
    (out / "quantisation.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\nmeasured on {args.clips} clips of each run at {len(times)} times, in float32\n{report.in_words(runs)}")
    if compared:
        print(f"\n{report.compared_in_words(compared, runs)}")
    print(f"\nevery head: {out / 'quantisation.json'}\npicture: {drawn}")
    report.log(args, out, runs, drawn)
    return result


def _names(targets: Sequence[Path]) -> list[str]:
    """The folders' own names, with their parents' where two are alike."""
    whole = [target.resolve() for target in targets]
    if len(set(whole)) < len(whole):
        raise InspectError("one of the runs is given twice; give each once")
    short = [path.name for path in whole]
    return short if len(set(short)) == len(short) else ["/".join(path.parts[-2:]) for path in whole]


# ----------------------------------------------------------------------------------------------------------- measuring


def measure(
    name: str,
    transformer: VideoTransformer,
    objective: Objective,
    grid: Grid,
    clips: Sequence[ClipIn],
    times: Sequence[float],
    done: Callable[[], Any] = lambda: None,
) -> RunErrors:
    """Errors on `clips`, each at every one of `times`; `done` is called after each pass.

    The model should be in evaluation mode, on the device of the clips.
    """
    mixers = mixers_of(transformer)
    uses = [_use(mixer, grid) for mixer in mixers]
    sums, predicted = [_Sums(mixer.use.heads) for mixer in mixers], _Sums(1)
    for clip in clips:
        for t in times:
            with _watching(mixers, uses, sums):
                exact = forward_at(transformer, objective, clip, t)[:, None]  # [1, 1, ...]: as of one head
            for (key, parts), bits in ((one, bits) for one in TOGETHER.items() for bits in BITS):
                with rounding([run for mixer in mixers for run in runs_of(mixer)], parts, bits):
                    found = forward_at(transformer, objective, clip, t)[:, None]
                predicted.add_error(f"{key}/int{bits}", found, exact)
            done()
    for one, found in zip(uses, sums, strict=True):
        one.values = found.values()
    return RunErrors(name, uses, {key: float(value) for key, value in predicted.values().items()})


def _use(mixer: Mixer, grid: Grid) -> UseErrors:
    """What there is to measure of it."""
    use, runs = mixer.use, runs_of(mixer)
    kinds, note = " + ".join(dict.fromkeys(run.group.normaliser.kind for run in runs)), ""
    sequences, places = runs[0].layout.sequence(grid) if runs else (0, 0)
    remade = [run.group.pattern.kind for run in runs if run.remade is not None]
    if use.takes in ("map", "output"):
        kinds, note = "", f"{use.takes} of an earlier layer"
    elif mixer.memory is not None:
        kinds, note = "", "attention with a memory is not measured"
    elif (weights := use.heads * sequences * places**2) > ALL_ENTRIES:
        kinds, note = "", f"a map of {weights} weights is too large to be made whole"
    elif remade:
        note = f"{remade[0]} makes keys of its own, so there is no map of tokens"
        kinds = "" if len(remade) == len(runs) else kinds
    elif any(run.features is not None for run in runs):
        note = "linear attention has no map; its queries, keys and values are rounded"
    return UseErrors(use.layer, use.name, kinds, note)


@contextmanager
def rounding(runs: Sequence[Heads], parts: Sequence[str], bits: int) -> Iterator[list[Approximation]]:
    """Within it these heads round these parts, and no others, to so many bits; those without a map leave that out."""
    before, instead = [run.approximation for run in runs], []
    for run in runs:
        own = run.use.keys.approximate if run.approximation is None else run.approximation.numbers.now
        here: Any = [part for part in parts if part != "map" or _has_map(run)]
        instead.append(Approximation(Approximate(qk_topk=own.qk_topk, quantise=here, bits=bits)))
    try:
        for run, approximation in zip(runs, instead, strict=True):
            run.approximation = approximation
        yield instead
    finally:
        for run, approximation in zip(runs, before, strict=True):
            run.approximation = approximation


def _has_map(run: Heads) -> bool:
    return run.features is None and run.remade is None and run.use.takes not in ("map", "output")


@contextmanager
def _watching(mixers: Sequence[Mixer], uses: Sequence[UseErrors], sums: Sequence["_Sums"]) -> Iterator[None]:
    """Within it a forward pass adds the errors of every mixer that can be measured."""

    def hook(mixer: Mixer, args: tuple, kwargs: dict[str, Any]) -> None:
        given = dict(zip(("q", "k", "v", "grid", "carry"), args, strict=False)) | kwargs
        with torch.no_grad():
            _add_pass(mixer, given, sums[mixers.index(mixer)])

    with ExitStack() as stack:
        for mixer, use in zip(mixers, uses, strict=True):
            if use.normaliser:
                stack.callback(mixer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _add_pass(mixer: Mixer, given: dict[str, Any], sums: "_Sums") -> None:
    """The errors of a pass in which the mixer is given q, k, v [1, registers + N, heads, D], a grid and a carry."""
    use, q, k, v, grid = mixer.use, *(given[name] for name in ("q", "k", "v", "grid"))
    taken = None if use.source is None else given["carry"][use.source]
    if taken is not None and use.takes == "kv":
        k, v = taken.k, taken.v
    for i, run in enumerate(runs_of(mixer)):
        if run.remade is not None:
            continue
        own = slice(run.group.first, run.group.first + run.group.count)
        qkv, support = [x[:, :, own] for x in (q, k, v)], None
        if taken is not None and use.takes == "support":
            support = taken.supports[i]
        with rounding([run], (), BITS[0]):
            exact, support = run(*qkv, grid, support)
        _Pass(run, qkv, grid, support, exact, sums, own).add()


@dataclass(frozen=True)
class _Pass:
    """What heads that do the same were given in a pass, and what they make of it without rounding."""

    run: Heads
    qkv: list[Tensor]  # [1, registers + N, heads, D] each
    grid: Grid
    support: Support | None
    exact: Tensor  # [1, registers + N, heads, D]
    sums: "_Sums"
    own: slice  # of the mixer's heads

    def add(self) -> None:
        """Round each part to each number of bits, and add what that costs."""
        for part in PARTS if _has_map(self.run) else PARTS[1:]:
            for bits in BITS:
                with rounding([self.run], (part,), bits) as [approximation], _seen(approximation, part) as pairs:
                    out, _ = self.run(*self.qkv, self.grid, self.support)
                [(value, rounded)] = pairs
                self._add_costs(f"{part}/int{bits}", value, rounded, out)
                if part == "map":
                    self._add_rounded_map(bits, value, rounded)
            self._add_mean(f"largest/{part}", self._of_tokens(value).abs().amax((-2, -1)))
            if part == "map":
                self._add_map(value)

    def _add_costs(self, name: str, value: Tensor, rounded: Tensor, out: Tensor) -> None:
        """Of folded q, k or v [S, heads, n, D] or a map [S, heads, n, m], and of the output [1, N, heads, D] after it."""
        self.sums.add_error(name, self._of_tokens(rounded), self._of_tokens(value), self.own)
        self.sums.add_error(f"{name}/output", out.transpose(1, 2), self.exact.transpose(1, 2), self.own)

    def _add_rounded_map(self, bits: int, weights: Tensor, rounded: Tensor) -> None:
        by_rows = integers(weights.unsqueeze(-2), bits, signed=False).squeeze(-2)
        self._add_costs(f"rows/int{bits}", weights, by_rows, self.run.apply_map(by_rows, self.qkv[2], self.grid))
        self._add_mean(f"zeros/int{bits}", self._between_tokens(rounded) == 0, self._allowed(weights))

    def _add_map(self, weights: Tensor) -> None:
        allowed, own = self._allowed(weights), self._between_tokens(weights)
        self._add_mean("zeros", own == 0, allowed)
        count, square = (own * allowed != 0).sum((-2, -1)), (own * allowed).square().sum((-2, -1))  # [S, heads]
        peak = (own * allowed).amax((-2, -1)) / (square / count.clamp(min=1)).sqrt().masked_fill(count == 0, 1)
        self._add_mean("peak", peak, count > 0)

    def _add_mean(self, name: str, x: Tensor, where: Tensor | None = None) -> None:
        self.sums.add_mean(name, x, torch.ones_like(x, dtype=torch.bool) if where is None else where, self.own)

    def _of_tokens(self, x: Tensor) -> Tensor:
        """The rows of folded sequences x [S, heads, n, ...] that are tokens; 0 where a place holds none."""
        x, there = x[:, :, -self._places :], self._there(x)
        return x if there is None else x * there.unsqueeze(-1)

    def _between_tokens(self, weights: Tensor) -> Tensor:
        """A map [..., n, m] without registers and the sink: [..., n, n]."""
        return weights[..., -self._places :, -self._places :]

    def _allowed(self, weights: Tensor) -> Tensor:
        """[S, heads, n, n]: which weights between a sequence's tokens may be other than 0."""
        there, own = self._there(weights), self._between_tokens(weights)
        if self.support is not None:
            mask = self._between_tokens(self.support.unordered().dense())  # [groups, heads or 1, n, n]
            return mask.repeat(len(own) // len(mask), 1, 1, 1).expand_as(own)
        if there is None:
            return torch.ones_like(own, dtype=torch.bool)
        return (there.unsqueeze(-1) & there.unsqueeze(-2)).expand_as(own)

    def _there(self, x: Tensor) -> Tensor | None:
        """[S, 1, n] which places of the folded sequences x hold a token; None where all do."""
        mask = self.run.layout.key_mask(self.grid, x.device)
        return None if mask is None else mask.repeat(len(x) // len(mask), 1)[:, None]

    @property
    def _places(self) -> int:
        return self.run.layout.sequence(self.grid)[1]


@contextmanager
def _seen(approximation: Approximation, part: str) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The values of a part before and after they are rounded within it."""
    pairs: list[tuple[Tensor, Tensor]] = []

    def hook(_: Approximation, args: tuple[Tensor, str], out: Tensor) -> None:
        if args[1] == part:
            pairs.append((args[0], out))

    handle = approximation.register_forward_hook(hook)
    try:
        yield pairs
    finally:
        handle.remove()


class _Sums:
    """What is added under a name, head by head: errors, as roots of sums of squares, and means."""

    def __init__(self, heads: int):
        self.heads = heads
        self._errors: dict[str, Tensor] = {}  # [2, heads]: above and below the line
        self._means: dict[str, Tensor] = {}

    def add_error(self, name: str, found: Tensor, exact: Tensor, own: slice = slice(None)) -> None:
        """[S, heads, ...] each."""
        self._add(self._errors, name, torch.stack([found - exact, exact]).double().square(), own)

    def add_mean(self, name: str, x: Tensor, where: Tensor, own: slice) -> None:
        """x [S, heads, ...] where `where`, of the same shape, says so."""
        self._add(self._means, name, torch.stack([x * where, where]).double(), own)

    def _add(self, sums: dict[str, Tensor], name: str, both: Tensor, own: slice) -> None:
        both = both.sum((1, *range(3, both.ndim))).cpu()  # [2, heads of `own`]
        sums.setdefault(name, torch.zeros(2, self.heads, dtype=torch.float64))[:, own] += both

    def values(self) -> dict[str, Tensor]:
        """By name [heads]; NaN where nothing was added, or nothing but zeros."""
        errors = {name: _ratio(sums).sqrt() for name, sums in self._errors.items()}
        return errors | {name: _ratio(sums) for name, sums in self._means.items()}


def _ratio(sums: Tensor) -> Tensor:
    return sums[0] / sums[1].masked_fill(sums[1] == 0, math.nan)
