"""A study: a base config and what is varied of it, in one YAML file.

base: base.yaml                      # beside the study
axes:
  model.mixers.joint.pattern:        # a key of the config
    full: full                       # a name for each value
    local: {kind: local, radius: 2}
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stgen import config, schema
from stgen.section import Section


class StudyError(ValueError):
    """A study that cannot be run; one sentence that says what to change."""


class Study(Section):
    base: str
    """Config that every cell starts from, a path beside the study."""
    axes: dict[str, dict[str, Any]]
    """For each key of the config its values by name; a cell differs from the base in one of them."""


@dataclass(frozen=True)
class Cell:
    """One config of a study; `key` is empty for the base itself."""

    name: str
    key: str
    value: Any
    cfg: schema.Config


def read(path: Path) -> Study:
    """The study as it is written. Raises ConfigError."""
    return config.load(path, [], Study)


def load(path: Path, overrides: list[str]) -> list[Cell]:
    """The cells of a study, the base first; `overrides` (key=value) hold for all of them.

    Raises ConfigError for a file that cannot be read or a value that the config refuses, StudyError for two names of
    one config.
    """
    study = read(path)
    base_path = path.parent / study.base
    base = config.load(base_path, overrides, schema.Config)
    cells = [Cell("base", "", None, base)]
    for key, values in study.axes.items():
        for name, value in values.items():
            cfg = config.load(base_path, [*overrides, f"{key}={json.dumps(value)}"], schema.Config)
            if twin := next((cell.name for cell in cells if cell.cfg == cfg), None):
                raise StudyError(f"{path}: axes.{key}: {name} is the same config as {twin}; leave it out")
            cells.append(Cell(name, key, value, cfg))
    return cells
