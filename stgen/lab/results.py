"""What a study found, as plain data: `stgen ablate` fills it, `statistics` compares it, `report` tells it.

Loads without torch. The base is the first cell. Nothing here is computed: a field that nobody knows is None.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Run:
    """One training of a cell."""

    seed: int
    folder: Path
    status: Literal["done", "failed", "missing"]
    reason: str = ""  # why it failed or is missing, in a line; for a failure the last lines of its log follow
    measures: Mapping[str, Any] | None = None  # what measures.json holds; None unless done


@dataclass(frozen=True)
class Cell:
    """One config of the study and its runs, one a seed. Costs are those of the plan, before anything was measured."""

    name: str
    changes: Mapping[str, Any]  # dotted key -> value as the study writes it; empty for the base
    runs: tuple[Run, ...]
    solved: Mapping[str, Any] = field(default_factory=dict)  # dotted key -> value that the budget solver chose
    steps: int | None = None
    parameters: int | None = None
    flops_per_step: float | None = None  # executed, a mean over the run's steps
    dense_flops_per_step: float | None = None  # if every query attended every key of its sequence
    mismatch: float | None = None  # of the matched quantity, relative to the base: 0.01 is 1 % above it

    @property
    def done(self) -> tuple[Run, ...]:
        """The runs that have been measured."""
        return tuple(run for run in self.runs if run.status == "done")


@dataclass(frozen=True)
class Budget:
    """What was held equal between the cells."""

    match: Literal["none", "steps", "params", "flops", "time"] = "none"
    adjust: tuple[str, ...] = ()  # keys that the solver was allowed to change
    words: str = ""  # a sentence for the reader: what each cell spends, and whether that can be repeated


@dataclass(frozen=True)
class Difference:
    """A cell less the base, paired. The interval is None where nothing tells how sure the difference is."""

    cell: str
    measure: str  # a name of Comparison.measures
    mean: float
    low: float | None  # 95 % interval of this one difference
    high: float | None
    p: float | None  # two-sided, corrected by Holm for the number of cells compared with the base
    distinguishable: bool  # p < 0.05
    pairs: int  # seeds, or held-out clips where there is one seed
    paired_over: Literal["seeds", "clips"]


@dataclass(frozen=True)
class Ranked:
    """A cell's place by a measure. Cells that are not distinguishable share places: `best` to `worst` is the range."""

    cell: str
    measure: str
    mean: float  # over seeds
    spread: float | None  # standard deviation over seeds; None with one seed
    best: int  # 1 + the number of cells that are surely better
    worst: int  # number of cells less those that are surely worse
    tied: tuple[str, ...]  # cells that it is not distinguishable from, best first


@dataclass(frozen=True)
class Measure:
    """A number of each run that cells are compared by."""

    name: str  # "held-out loss"
    path: tuple[str, ...]  # where measures.json holds it: ("held_out", "mean")
    lower_is_better: bool


@dataclass(frozen=True)
class Comparison:
    """How the cells compare."""

    measures: tuple[Measure, ...]  # those that at least one run holds, the main one first
    differences: tuple[Difference, ...]  # of every measure and every cell beside the base
    rankings: Mapping[str, tuple[Ranked, ...]]  # measure's name -> cells, best first
    method: str  # how intervals and rankings were made, in words for the reader


@dataclass(frozen=True)
class Results:
    """A study and what came of it."""

    name: str
    about: str  # the study's own words on what it asks
    text: str  # the study file, whole
    base: str  # path of the base config
    budget: Budget
    cells: tuple[Cell, ...]  # the base first
    comparison: Comparison | None = None  # `statistics.compare(cells)`; None until a run is done
    machine: Mapping[str, Any] = field(default_factory=dict)  # device, threads a cell, versions
