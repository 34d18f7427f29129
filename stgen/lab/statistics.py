"""How the cells of a study compare, and how sure that is. Loads without torch.

All cells of a seed see the same clips, noise, times and captions, so that a seed is a block and cells are compared
within it (randomised blocks: value = cell + block + rest). What is left of a cell after taking out cell and block means
tells how much it scatters. Each seed also draws its own held-out clips, so that the scatter over seeds holds both the
luck of training and the luck of the clips; that of clips within a seed need not be added. Where there is one seed the
clips are the blocks, and the interval speaks of clips alone.

Three seeds say little of one cell's scatter, but all cells together say much: each cell's variance is drawn towards their
mean as if that rested on PRIOR more degrees of freedom (the moderated t of Smyth 2004, doi:10.2202/1544-6115.1027, with a
weight that is fixed and low, because a weight learnt from few cells trusts the mean too much where one cell scatters more
than the rest). With two cells all this is the paired t test. Several comparisons are corrected by Holm's method (Scand. J.
Statist. 6, 1979): with the base for each cell, and of all pairs for a ranking.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from stgen.lab.results import Cell, Comparison, Difference, Measure, Ranked, Run

LEVEL = 0.05
PRIOR = 4.0  # degrees of freedom that the cells' common variance counts for
FEW = 4  # cells below which there is no common variance to speak of
MEASURES = (
    Measure("held-out loss", ("held_out", "mean"), lower_is_better=True),
    Measure("held-out prompts right", ("accuracy", "held_out"), lower_is_better=False),
    Measure("seen prompts right", ("accuracy", "seen"), lower_is_better=False),
    Measure("Fréchet distance", ("frechet", "value"), lower_is_better=True),
    Measure("MMD", ("mmd", "value"), lower_is_better=True),
)
OTHER_LOSS = ("codec.", "objective.", "data.")  # a change of these makes the loss one of something else


def compare(cells: Sequence[Cell]) -> Comparison | None:
    """Differences to the first cell and rankings by every measure; None as long as no run is done."""
    differences, rankings, found, over = [], {}, [], set()
    for measure in MEASURES:
        judged = [cell for cell in cells if _fits(cell, measure) and _by_seed(cell, measure)]
        if not judged:
            continue
        found.append(measure)
        pairs = _Pairs(judged, measure)
        if judged[0] is cells[0]:
            differences += _to_base(pairs)
        rankings[measure.name] = _ranking(pairs)
        over |= pairs.over
    return Comparison(tuple(found), tuple(differences), rankings, _method(over)) if found else None


def _to_base(pairs: "_Pairs") -> list[Difference]:
    """Each cell less the first."""
    others = range(1, len(pairs.cells))
    corrected = holm([pairs[i, 0].p for i in others])
    return [
        Difference(
            pairs.cells[i].name, pairs.measure.name, one.mean, *one.interval, p, p is not None and p < LEVEL,
            one.pairs, one.over,
        )
        for i, p in zip(others, corrected, strict=True)
        if (one := pairs[i, 0])
    ]  # fmt: skip


def _ranking(pairs: "_Pairs") -> tuple[Ranked, ...]:
    """Cells, best first by their paired difference to the first cell."""
    count, sign = len(pairs.cells), 1 if pairs.measure.lower_is_better else -1
    every = list(combinations(range(count), 2))
    corrected = dict(zip(every, holm([pairs[pair].p for pair in every]), strict=True))
    sure = {pair for pair, p in corrected.items() if p is not None and p < LEVEL}

    def beats(i: int, j: int) -> bool:
        return (min(i, j), max(i, j)) in sure and sign * pairs[i, j].mean < 0

    order = sorted(range(count), key=lambda i: sign * pairs[i, 0].mean)
    return tuple(
        Ranked(
            pairs.cells[i].name,
            pairs.measure.name,
            float(np.mean(values := list(_by_seed(pairs.cells[i], pairs.measure).values()))),
            float(np.std(values, ddof=1)) if len(values) > 1 else None,
            1 + sum(beats(j, i) for j in order),
            count - sum(beats(i, j) for j in order),
            tuple(pairs.cells[j].name for j in order if j != i and (min(i, j), max(i, j)) not in sure),
        )
        for i in order
    )


def _method(over: set[str]) -> str:
    """What was done, for a reader of the report."""
    seeds = (
        "Cells are compared within each seed, where all see the same clips, noise and times; intervals (95 %, of each "
        "difference by itself) are over seeds, each with its own held-out clips, by a t test in which each cell's variance is "
        "drawn towards the mean of all (Smyth 2004)."
    )
    clips = "With one seed intervals are over its held-out clips and say nothing about another seed."
    holm = (
        "Verdicts are corrected for the number of comparisons (Holm, 5 %): two cells that share places in a ranking are not "
        "distinguishable."
    )
    return " ".join([seeds] * ("seeds" in over) + [clips] * ("clips" in over) + [holm])


# ------------------------------------------------------------------------------------------------------------- pairing


def _fits(cell: Cell, measure: Measure) -> bool:
    """Whether the cell's number means what the base's does."""
    return measure.path[0] != "held_out" or not any(key.startswith(OTHER_LOSS) for key in cell.changes)


def _number(run: Run, measure: Measure) -> float | None:
    value: Any = run.measures
    for step in measure.path:
        value = value.get(step) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) else None


def _by_seed(cell: Cell, measure: Measure) -> dict[int, float]:
    found = {run.seed: _number(run, measure) for run in cell.done}
    return {seed: value for seed, value in found.items() if value is not None}


def _by_clip(cell: Cell, seed: int, measure: Measure) -> tuple[Any, list[float]] | None:
    """Which clips are held out and the loss of each; None for other measures, which have no number for each clip."""
    run = next((run for run in cell.done if run.seed == seed), None)
    if measure.path != ("held_out", "mean") or run is None or run.measures is None:
        return None
    held_out = run.measures["held_out"]
    return held_out.get("clips", len(held_out["per_clip"])), [float(np.mean(bins)) for bins in held_out["per_clip"]]


@dataclass(frozen=True)
class _Pair:
    """One cell less another."""

    mean: float
    error: float | None  # standard error; None where nothing tells it
    freedom: float
    pairs: int
    over: Any  # "seeds" or "clips"

    @property
    def p(self) -> float | None:
        return None if self.error is None else two_sided(self.mean / self.error, self.freedom)

    @property
    def interval(self) -> tuple[float | None, float | None]:
        if self.error is None:
            return None, None
        half = self.error * quantile(1 - LEVEL / 2, self.freedom)
        return self.mean - half, self.mean + half


class _Pairs:
    """All pairs of cells by a measure. Cells that have every seed of the first are judged together, others two by two."""

    def __init__(self, cells: Sequence[Cell], measure: Measure):
        self.cells, self.measure = cells, measure
        self.over: set[str] = set()
        self._seeds = [_by_seed(cell, measure) for cell in cells]
        self._whole = [i for i, found in enumerate(self._seeds) if found.keys() == self._seeds[0].keys()]
        self._together = self._blocks(self._whole)

    def __getitem__(self, pair: tuple[int, int]) -> _Pair:
        i, j = pair
        if i in self._whole and j in self._whole:
            (blocks, over), rows = self._together, (self._whole.index(i), self._whole.index(j))
        else:
            (blocks, over), rows = self._blocks([i, j]), (0, 1)
        mean, error, freedom = blocks.difference(*rows)
        self.over |= set() if error is None else {over}
        return _Pair(mean, error, freedom, blocks.values.shape[1], over)

    def _blocks(self, rows: Sequence[int]) -> "tuple[Blocks, str]":
        """The cells' numbers by seed, those seeds that all have; by clip if that is one seed."""
        seeds = [seed for seed in self._seeds[rows[0]] if all(seed in self._seeds[i] for i in rows)]
        if len(seeds) == 1:
            clips = [found for i in rows if (found := _by_clip(self.cells[i], seeds[0], self.measure))]
            if len(clips) == len(rows) and all(which == clips[0][0] for which, _ in clips):
                return Blocks(np.array([losses for _, losses in clips])), "clips"
        if seeds:
            return Blocks(np.array([[self._seeds[i][seed] for seed in seeds] for i in rows])), "seeds"
        return Blocks(np.array([[np.mean(list(self._seeds[i].values()))] for i in rows])), "seeds"  # nothing in common


# ----------------------------------------------------------------------------------------------------------- variances


class Blocks:
    """Numbers of cells (rows) in blocks (columns) that all cells share: [cells, blocks]."""

    def __init__(self, values: np.ndarray):
        self.values = values
        cells, blocks = values.shape
        self.freedom = (blocks - 1) * (cells - 1) / cells if cells > 1 else 0.0  # of each row's variance
        self.variances = np.full(cells, np.nan)
        if self.freedom > 0:
            rest = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()  # [cells, blocks]
            self.variances = (rest**2).sum(1) / self.freedom  # [cells], of one number
            if cells >= FEW:
                drawn = PRIOR * self.variances.mean() + self.freedom * self.variances
                self.variances, self.freedom = drawn / (PRIOR + self.freedom), PRIOR + self.freedom

    def difference(self, i: int, j: int) -> tuple[float, float | None, float]:
        """(mean, standard error, degrees of freedom) of row i less row j; no error where nothing scatters."""
        mean = float(np.mean(self.values[i] - self.values[j]))
        a, b = float(self.variances[i]), float(self.variances[j])
        if i == j or not a + b > 0:
            return mean, None, 0.0
        freedom = self.freedom * (a + b) ** 2 / (a * a + b * b)  # Satterthwaite
        most = (self.values.shape[0] - 1) * (self.values.shape[1] - 1)
        return mean, math.sqrt((a + b) / self.values.shape[1]), min(freedom, most)


def holm(p: Sequence[float | None]) -> list[float | None]:
    """P values corrected for their number, step by step; None stays None and does not count."""
    known = sorted((value, i) for i, value in enumerate(p) if value is not None)
    corrected: list[float | None] = [None] * len(p)
    highest = 0.0
    for rank, (value, i) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * value))
        corrected[i] = highest
    return corrected


# ------------------------------------------------------------------------------------------------------- distributions


def two_sided(t: float, freedom: float) -> float:
    """Probability of Student's t beyond |t| on either side."""
    return _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))


def quantile(share: float, freedom: float) -> float:
    """The t below which Student's distribution has `share` > 1/2 of its mass."""
    low, high = 0.0, 1.0
    while two_sided(high, freedom) > 2 * (1 - share):
        low, high = high, 2 * high
    for _ in range(50):  # bisection
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, freedom) > 2 * (1 - share) else (low, middle)
    return high


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised I_x(a, b) by its continued fraction (DLMF 8.17.22), from the side on which that converges fast."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    value = 1.0
    for m in range(20 + 2 * math.isqrt(int(max(a, b))), 0, -1):  # from the inside out; so many terms settle it
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m - 1) * (a + b + m - 1) * x / ((a + 2 * m - 2) * (a + 2 * m - 1))
        value = 1 + odd / (1 + even / value)
    return front / (a * value)
