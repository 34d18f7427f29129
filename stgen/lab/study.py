"""A study: a base config, what is varied of it, and what is held equal, in one YAML file. Loads without torch.

about: Which pattern loses least?     # a sentence for the report
base: base.yaml                       # beside the study
axes:
  model.mixers.joint.pattern:         # a key of the config
    full: full                        # a name for each value
    local: {kind: local, radius: 2}
variants:
  local and linear:                   # several keys at once
    model.plan: spatial temporal
    model.mixers.spatial.normaliser: linear
seeds: [0, 1, 2]
match: flops                          # none, steps, params, flops or time
adjust: [model.mlp.ratio]             # what may change for it
steps: 1000                           # of the base
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from stgen import config, schema
from stgen.section import Section

BASE = "base"
LIMITS = ("train.max_train_steps", "train.max_train_seconds", "train.num_train_epochs")
OURS = ("run.output_dir", "run.resume_from_checkpoint", "log.name", "checkpoint.total_limit")  # set by the runner


class StudyError(ValueError):
    """A study that cannot be run; one sentence that says what to change."""


class Study(Section):
    base: str
    """Config that every cell starts from, a path beside the study."""
    about: str = ""
    """What the study asks, in a sentence for the report."""
    axes: dict[str, dict[str, Any]] = {}
    """For each key of the config its values by name; a cell differs from the base in one of them."""
    grid: bool = False
    """Every combination of the axes' values instead of one change at a time."""
    variants: dict[str, dict[str, Any]] = {}
    """Further cells by name, each with the keys that it changes and their values."""
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)] = [0, 1, 2]
    """Every cell is trained once with each; a seed decides data, order, noise, times, dropout and initial weights."""
    match: Literal["none", "steps", "params", "flops", "time"] = "steps"
    """What cells have in common: nothing, the base's steps, its steps and parameters, its FLOPs, or its seconds."""
    adjust: list[Literal["model.depth", "model.width", "model.mlp.ratio"]] = []
    """Keys that the solver may change so that a cell has the base's parameters (params) or FLOPs a step (flops)."""
    tolerance: PositiveFloat = 0.05
    """Share by which parameters, or FLOPs a step, may still differ after solving; more is an error."""
    steps: PositiveInt | None = None
    """Optimiser steps of the base; null: train.max_train_steps of its config."""
    seconds: PositiveFloat | None = None
    """Training seconds of every cell under match time; null: what the base takes for its steps."""

    @model_validator(mode="after")
    def _makes_sense(self):
        if not any(self.axes.values()) and not self.variants:
            raise ValueError("axes and variants are empty: name at least one change of the base")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: one is given twice")
        solved = self.match in ("params", "flops")
        if self.match == "params" and not self.adjust:
            raise ValueError("match: params needs keys that may change; write adjust: [model.mlp.ratio], say")
        if self.adjust and not solved:
            raise ValueError(f"adjust: match {self.match} changes no key; leave adjust out, or match params or flops")
        if len(set(self.adjust)) < len(self.adjust):
            raise ValueError("adjust: a key is given twice")
        if self.seconds is not None and (self.match != "time" or self.steps is not None):
            raise ValueError("seconds: they are a budget of match time, in place of steps; leave one of them out")
        return self


@dataclass(frozen=True)
class Cell:
    """One config of a study: the base, whose `changes` are empty, or a variant of it."""

    name: str
    changes: Mapping[str, Any]  # dotted key -> value, as the study writes them
    cfg: schema.Config
    path: Path  # of the base config
    overrides: tuple[str, ...] = ()  # of the caller, for all cells alike

    @property
    def key(self) -> str:
        """The key that a one-key variant changes; empty for the base."""
        return next(iter(self.changes), "")

    @property
    def value(self) -> Any:
        """What `key` is changed to."""
        return self.changes.get(self.key)

    @property
    def slug(self) -> str:
        """The name as a folder."""
        return re.sub(r"[^\w.+-]+", "-", self.name).strip("-.").lower()

    def but(self, changes: Mapping[str, Any]) -> schema.Config:
        """The cell's config with further changes. Raises ConfigError for one that is refused."""
        written = [f"{key}={json.dumps(value)}" for key, value in {**self.changes, **changes}.items()]
        return config.load(self.path, [*self.overrides, *written], schema.Config)


def read(path: Path, overrides: Sequence[str] = ()) -> Study:
    """The study as it is written, with those of the overrides that are keys of a study. Raises ConfigError."""
    return config.load(path, [one for one in overrides if _root(one) in Study.model_fields], Study)


def load(path: Path, overrides: Sequence[str]) -> list[Cell]:
    """The cells of a study, the base first.

    overrides: key=value, of the study (`steps=50`) or of the config of every cell (`train.train_batch_size=8`).
    Raises ConfigError for a file that cannot be read or a value that the config refuses, StudyError for two names of
    one config and for names and keys that cannot be used.
    """
    study = read(path, overrides)
    base_path, ours = path.parent / study.base, [one for one in overrides if _root(one) not in Study.model_fields]
    _check_keys("override", [one.partition("=")[0] for one in ours], study)
    cells = [Cell(BASE, {}, config.load(base_path, ours, schema.Config), base_path, tuple(ours))]
    for where, name, changes, drop in _changes(study):
        _check_keys(f"{path}: {where}", changes, study)
        cell = _cell(f"{name} of {path}", name, changes, cells[0])
        if twin := next((other for other in cells if other.cfg == cell.cfg), None):
            if drop and twin.name == BASE:
                continue  # of a grid: the base stands for it
            raise StudyError(f"{path}: {where}: {name} is the same config as {twin.name}; leave it out")
        if twin := next((other for other in cells if other.slug == cell.slug), None):
            raise StudyError(f"{path}: {where}: {name} and {twin.name} would share a folder; rename one of them")
        if not cell.slug:
            raise StudyError(f"{path}: {where}: {name!r} cannot name a folder; write a letter or a digit")
        cells.append(cell)
    return cells


def _root(override: str) -> str:
    return override.partition("=")[0].partition(".")[0]


def _changes(study: Study) -> Iterator[tuple[str, str, dict[str, Any], bool]]:
    """(place in the file, name, changes, whether it goes if it is the base) of every cell but the base."""
    axes = {key: values for key, values in study.axes.items() if values}
    if study.grid:
        for names in itertools.product(*axes.values()) if axes else ():
            changes = {key: axes[key][name] for key, name in zip(axes, names, strict=True)}
            yield "grid", " x ".join(names), changes, True
    else:
        for key, values in axes.items():
            for name, value in values.items():
                yield f"axes.{key}", name, {key: value}, False
    for name, changes in study.variants.items():
        yield "variants", name, changes, False


def _check_keys(where: str, keys: Iterable[str], study: Study) -> None:
    """Raise StudyError for keys that the runner or the budget sets."""
    for key in keys:
        if key == "run.seed":
            raise StudyError(f"{where}: run.seed is set for every run; list the seeds under seeds")
        if key in OURS:
            raise StudyError(f"{where}: {key} is set for every run by the runner; leave it out")
        if key in LIMITS and study.match != "none":
            raise StudyError(f"{where}: {key} is set by match {study.match}; write steps, or match: none to vary it")
        if key in study.adjust:
            raise StudyError(f"{where}: {key} may be changed by adjust, too; take it out of one of them")


def _cell(place: str, name: str, changes: dict[str, Any], base: Cell) -> Cell:
    cell = Cell(name, changes, base.cfg, base.path, base.overrides)
    try:
        return Cell(name, changes, cell.but({}), base.path, base.overrides)
    except config.ConfigError as error:
        raise config.ConfigError([f"{line} in cell {place}" for line in error.errors]) from None
