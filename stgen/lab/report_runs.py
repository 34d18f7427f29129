"""Existing runs as the results of a study: `stgen report RUN [RUN ...]`."""

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from stgen import config, schema, shapes
from stgen.lab import report, statistics
from stgen.lab.measure import MeasureError, Protocol, measured
from stgen.lab.results import Budget, Cell, Results, Run

# Keys in which two runs may differ and be the same but for the seed.
OWN = (
    "run", "log", "checkpoint", "validation", "data.train_data_dir", "data.dataloader_num_workers", "data.decode_timeout",
    "data.cache",
)  # fmt: skip


def report_runs(runs: Sequence[Path], folder: Path, protocol: Protocol, tell: Callable[[str], Any] = print) -> Path:
    """Measure the runs that are not measured yet, and write their report into `folder`; returns report.html.

    Raises MeasureError, BuildError, FeatureError.
    """
    return report.write(results_of(runs, protocol, tell), folder)


def results_of(runs: Sequence[Path], protocol: Protocol, tell: Callable[[str], Any] = print) -> Results:
    """The runs as cells, the first the base; runs that differ in nothing but the seed are one cell.

    Raises MeasureError for two runs of one seed that do not differ.
    """
    configs = [_config(run) for run in runs]
    groups: dict[str, list[int]] = {}
    for i, cfg in enumerate(configs):
        groups.setdefault(json.dumps([_own_less(cfg), _data(runs[i], cfg)], sort_keys=True), []).append(i)
    for group in groups.values():
        _check_seeds([runs[i] for i in group], [configs[i].run.seed for i in group])
    found = [
        Run(cfg.run.seed, run, "done", measures=_measured(run, protocol, tell))
        for run, cfg in zip(runs, configs, strict=True)
    ]
    names = _names([[runs[i] for i in group] for group in groups.values()])
    cells = []
    mixers = {name for cfg in configs for name in (*cfg.model.mixers, *cfg.model.mixer_names)}
    for name, group in zip(names, groups.values(), strict=True):
        changes = _changes(_own_less(configs[0], mixers), _own_less(configs[group[0]], mixers))
        if _data(runs[group[0]], configs[group[0]]) != _data(runs[0], configs[0]):
            changes["data.train_data_dir"] = str(configs[group[0]].data.train_data_dir or runs[group[0]] / "data")
        cells.append(Cell(name, changes, tuple(found[i] for i in group)))
    title = "Runs compared" if len(cells) > 1 else cells[0].name
    budget = Budget(words="Nothing was matched: each run is as it was trained.")
    return Results(title, "", "", "", budget, tuple(cells), statistics.compare(cells), _machine(runs[0]))


def _config(run: Path) -> schema.Config:
    if not (run / "config.yaml").is_file():
        raise MeasureError(f"{run} is no run folder; it holds no config.yaml")
    return config.load(run / "config.yaml", [], schema.Config)


def _measured(run: Path, protocol: Protocol, tell: Callable[[str], Any]) -> dict[str, Any]:
    return measured(run, protocol=protocol, progress=lambda what: tell(f"{run}: {what}"))


def _own_less(cfg: schema.Config, mixers: Iterable[str] = ()) -> dict[str, Any]:
    """The config without keys in which two runs may differ and be the same; `mixers` beside its own with their defaults."""
    tree = cfg.model_dump(mode="json")
    tree["model"]["mixers"] = {name: _mixer(cfg, name) for name in {*cfg.model.mixers, *cfg.model.mixer_names, *mixers}}
    return _without(tree, "")


def _mixer(cfg: schema.Config, name: str) -> dict[str, Any] | None:
    """What a plan would mean by the name; None if nothing."""
    try:
        return cfg.model.mixer(name).model_dump(mode="json")
    except ValueError:
        return None


def _without(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
    kept = {key: one for key, one in tree.items() if not f"{prefix}{key}.".startswith(tuple(f"{own}." for own in OWN))}
    return {key: _without(one, f"{prefix}{key}.") if isinstance(one, dict) else one for key, one in kept.items()}


def _changes(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys whose value is another; a section of another kind counts as one value, without what it leaves open."""
    found = {}
    for key in before | after:
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict) and old.get("kind") == new.get("kind"):
            found |= _changes(old, new, f"{prefix}{key}.")
        elif old != new:
            found[prefix + key] = {k: v for k, v in new.items() if v is not None} if isinstance(new, dict) else new
    return found


def _data(run: Path, cfg: schema.Config) -> str:
    """What tells the data of two runs apart, but for the seed that rendered them."""
    root = Path(cfg.data.train_data_dir or run / "data")
    try:
        recipe = json.loads((root / shapes.MARKER).read_text()).get("recipe", {})
        return json.dumps({key: one for key, one in recipe.items() if key != "seed"})
    except (OSError, ValueError):
        return str(root.resolve()) if cfg.data.train_data_dir else "shapes"


def _check_seeds(runs: Sequence[Path], seeds: Sequence[int]) -> None:
    for i, seed in enumerate(seeds):
        if seed in seeds[:i]:
            raise MeasureError(
                f"{runs[i]} and {runs[seeds.index(seed)]} are runs of one config and seed; leave one out"
            )


def _names(groups: Sequence[Sequence[Path]]) -> list[str]:
    """Of each cell what its folders have in common, with as much of the path before as tells the cells apart."""
    paths = [_common([path.resolve() for path in group]) for group in groups]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(group[0]) for group in groups]


def _common(paths: Sequence[Path]) -> Path:
    """`a/window` of a/window-0 and a/window-1, `a/window` of a/window/seed-0 and a/window/seed-1."""
    same = itertools.takewhile(
        lambda letters: len(set(letters)) == 1, zip(*(path.name for path in paths), strict=False)
    )
    name = "".join(letters[0] for letters in same)
    name = name.rstrip("-_. ") if len(paths) > 1 else name
    return paths[0].parent if name == "seed" else paths[0].with_name(name or paths[0].name)


def _machine(run: Path) -> dict[str, Any]:
    """Of the first run."""
    try:
        found = json.loads((run / "env.json").read_text())
    except (OSError, ValueError):
        return {}
    packages = found.get("packages", {})
    return {key: found[key] for key in ("device", "threads") if key in found} | {
        key: packages[key] for key in ("torch",) if packages.get(key)
    }
