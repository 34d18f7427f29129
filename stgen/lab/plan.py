"""What the runs of a study are: cells with sizes and steps, their seeds, and how far each has come on the disk.

    FOLDER/plan.json               the plan
           data/seed-0/            built-in shapes, rendered once a seed and read by all cells
           cells/NAME/seed-0.yaml  the config of a run: `stgen train` repeats it
           cells/NAME/seed-0.log   what it printed; seed-0.failed: why it failed
           cells/NAME/seed-0/      its run folder

A run with measures.json is done, one with summary.json has to be measured, any other is trained on from its newest
checkpoint, bit by bit as if nothing had happened. A folder keeps what it began with: threads, and speeds once measured.
"""

import fcntl
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stgen import config, schema
from stgen.flops import readable
from stgen.lab import budget
from stgen.lab.results import Budget
from stgen.lab.study import LIMITS, Study, StudyError
from stgen.lab.study import Cell as Variant

SAVES = 10  # a run saves at least so often
FREE = ("run.output_dir", "run.resume_from_checkpoint", "log.", "checkpoint.")  # keys that do not shape a run


@dataclass(frozen=True)
class Options:
    """How to run, beside what to run."""

    folder: Path
    jobs: int = 1
    devices: Sequence[str] = ()  # of CUDA, shared out in turn
    threads: int | None = None  # of a run; None: the cores shared by the jobs, or what the folder began with
    launcher: str | None = None  # a command line with {command} in it
    only: Sequence[str] = ()  # names of cells
    overrides: Sequence[str] = ()  # that made study and cells what they are, for the record

    @property
    def slots(self) -> int:
        """Runs at once."""
        return max(self.jobs, len(self.devices))


@dataclass(frozen=True, eq=False)
class Row:
    """A cell of the plan, as plan.json holds it."""

    name: str
    slug: str
    changes: Mapping[str, Any]
    solved: Mapping[str, Any]
    steps: int | None
    parameters: int
    flops_per_step: float
    dense_flops_per_step: float
    mismatch: float
    config: Mapping[str, Any]  # resolved, with sizes and steps; seed and folders are the base's
    speed: Mapping[str, float] | None  # measured seconds of a step and of a forward pass over one clip

    @property
    def cfg(self) -> schema.Config:
        return schema.Config.model_validate_json(json.dumps(self.config))


@dataclass(frozen=True, eq=False)
class Plan:
    """What will run, and how fast it was found to be."""

    study: str
    about: str
    text: str
    base: str
    match: str
    adjust: Sequence[str]
    seeds: Sequence[int]
    threads: int
    rows: tuple[Row, ...]
    startup: float = 0.0  # seconds until a process has loaded everything
    wandb: str | None = None  # id of the summary run

    @property
    def budget(self) -> Budget:
        return Budget(self.match, tuple(self.adjust), _budget_words(self))  # type: ignore[arg-type]

    def save(self, folder: Path) -> None:
        write(folder / "plan.json", json.dumps({**vars(self), "rows": [vars(row) for row in self.rows]}, indent=1))

    def jobs(self, folder: Path, only: Sequence[str] = ()) -> "list[Job]":
        """All runs, seed by seed, so that what is there early compares all cells."""
        rows = [row for row in self.rows if not only or row.name in only]
        return [Job(self, row, seed, folder.resolve()) for seed in self.seeds for row in rows]


def recorded(folder: Path, study: str) -> Plan | None:
    """The plan that a folder holds; None for a folder that is new. Raises StudyError for any other folder."""
    if folder.exists() and not folder.is_dir():
        raise StudyError(f"{folder} is a file; name a folder as --output_dir")
    if not folder.exists() or all(path.name == ".lock" for path in folder.iterdir()):
        return None
    found = parsed(folder / "plan.json")
    if not found:
        raise StudyError(f"{folder} holds something else (no plan.json); name another --output_dir")
    if found.get("study") != study:
        raise StudyError(f"{folder} holds the study {found.get('study')}, not {study}; name another --output_dir")
    try:
        return Plan(**{**found, "rows": tuple(Row(**row) for row in found["rows"])})
    except (TypeError, KeyError):
        raise StudyError(f"{folder} is of another version of stgen; name another --output_dir") from None


# ---------------------------------------------------------------------------------------------------------- planning


def make(path: Path, study: Study, cells: Sequence[Variant], options: Options, old: Plan | None) -> Plan:
    """The plan of a study; threads and speeds are taken from the folder's earlier one.

    Raises StudyError for a match that cannot be had, and where the folder holds runs of another config.
    """
    threads = _threads(options, old)
    known = {_digest(row.config): row.speed for row in old.rows if row.speed} if old else {}
    watch = _Stopwatch(known, threads, old.startup if old else 0.0)
    with tqdm(total=len(cells), desc="planning", unit="cell", leave=False) as bar:
        planned = budget.plan(study, path, cells, watch.all, bar.update)
    watch([one.cfg for one in planned if not options.only or one.cell.name in options.only])
    rows = tuple(
        Row(
            one.cell.name, one.cell.slug, one.cell.changes, one.solved, one.steps, one.cost.parameters,
            one.cost.executed, one.cost.dense, one.mismatch, cfg, watch.known.get(_digest(cfg)),
        )
        for one in planned if (cfg := one.cfg.model_dump(mode="json"))
    )  # fmt: skip
    said = f"\n# and on the command line: {shlex.join(options.overrides)}\n" if options.overrides else ""
    plan = Plan(
        path.stem, study.about, path.read_text(encoding="utf-8") + said, str(cells[0].path), study.match, study.adjust,
        study.seeds, threads, rows, watch.startup, old.wandb if old else None,
    )  # fmt: skip
    for job in plan.jobs(options.folder):
        job.check()
    return plan


def _threads(options: Options, old: Plan | None) -> int:
    """Threads of a run: how a CPU splits a sum decides its last bits, so a folder keeps the number it began with."""
    if old is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return options.threads or max(1, cores // options.slots)
    if options.threads not in (None, old.threads):
        raise StudyError(
            f"--threads {options.threads}: {options.folder} was begun with {old.threads} a run, and with another number "
            "the last bits would differ; leave it out, or name another --output_dir"
        )
    return old.threads


def _budget_words(plan: Plan) -> str:
    base = plan.rows[0]
    steps = f"{base.steps} steps" if base.steps else "its own limit"
    total = f", {readable(base.steps * base.flops_per_step, 'FLOP')}" if base.steps else ""
    solved = f" ({', '.join(plan.adjust)} changed for it where need be)" if plan.adjust else ""
    return {
        "none": "Nothing is matched: every cell trains as its config says.",
        "steps": f"Every cell trains for {steps}; parameters and FLOPs differ.",
        "params": f"Every cell trains for {steps} and has the base's number of parameters{solved}; FLOPs differ.",
        "flops": f"Every cell executes what the base does in {steps}{total}, sparsity counted{solved}; numbers of steps "
        "follow from it.",
        "time": "Every cell trains for as many steps as would take equal seconds at the speed of a few timed steps. Not "
        "repeatable: another machine, or this one on another day, gives other numbers of steps.",
    }[plan.match]


class _Stopwatch:
    """Speeds of configs on this machine, measured in a process with as many threads as a run has; known ones are kept."""

    def __init__(self, known: Mapping[str, Any], threads: int, startup: float):
        self.known, self.threads, self.startup = dict(known), threads, startup

    def __call__(self, cfgs: Sequence[schema.Config]) -> list[Mapping[str, float] | None]:
        digests = [_digest(cfg.model_dump(mode="json")) for cfg in cfgs]
        new = {digest: cfg for digest, cfg in zip(digests, cfgs, strict=True) if digest not in self.known}
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, f"{digest}.yaml") for digest in new]
            for file, cfg in zip(files, new.values(), strict=True):
                file.write_text(config.dump(cfg), encoding="utf-8")
            self.known |= dict(zip(new, self._measured(files), strict=True))
        return [self.known[digest] for digest in digests]

    def all(self, cfgs: Sequence[schema.Config]) -> list[budget.Speed]:
        """Every speed, for a budget that rests on them. Raises StudyError where one could not be measured."""
        found = [budget.Speed(**speed) for speed in self(cfgs) if speed]
        if len(found) < len(cfgs):
            raise StudyError("match: time rests on the speed of every cell, and one could not be timed (see above)")
        return found

    def _measured(self, files: Sequence[Path]) -> Iterator[Mapping[str, float] | None]:
        if not files:
            return
        command = [sys.executable, "-m", "stgen.lab.budget", *map(str, files)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment(self.threads)
        ) as child:
            assert child.stdout is not None
            began = time.monotonic()
            child.stdout.readline()
            self.startup = time.monotonic() - began
            bar = tqdm(files, desc="timing a few steps", unit="cell", leave=False)
            for _ in bar:
                said = parsed(child.stdout.readline()) or {"failure": "its process ended"}
                if "failure" in said:
                    bar.write(f"a cell could not be timed: {said['failure']}")
                yield None if "failure" in said else said


def _digest(cfg: Mapping[str, Any]) -> str:
    """Names all that decides the speed of a config: not how long it runs, under which seed or into which folder."""
    train = {key: value for key, value in cfg["train"].items() if f"train.{key}" not in LIMITS}
    parts = {"train": train, **{key: cfg[key] for key in ("data", "codec", "text", "tokens", "model", "objective")}}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def environment(threads: int, device: str | None = None) -> dict[str, str]:
    """Of a child process."""
    visible = {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
    quiet = {"TQDM_MININTERVAL": "30"}  # its bars go into a file
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), **quiet, **visible}


# ------------------------------------------------------------------------------------------------------------ a run


@dataclass(frozen=True)
class Job:
    """One run of the plan: a cell and a seed."""

    plan: Plan
    row: Row
    seed: int
    home: Path  # FOLDER, absolute

    @property
    def name(self) -> str:
        return f"{self.row.name}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.home / "cells" / self.row.slug / f"seed-{self.seed}"

    def beside(self, suffix: str) -> Path:
        """A file beside the run folder, that of its config, say: `.yaml`."""
        return self.folder.with_name(self.folder.name + suffix)

    @property
    def trained(self) -> bool:
        return bool(parsed(self.folder / "summary.json"))

    @property
    def done(self) -> bool:
        return self.trained and bool(self.measures)

    @property
    def measures(self) -> dict[str, Any]:
        return parsed(self.folder / "measures.json")

    @property
    def seconds(self) -> float:
        """What a run that is done took: two processes, training and measuring."""
        trained = parsed(self.folder / "summary.json")["seconds"]["total"]
        return trained + (self.measures.get("seconds") or 0.0) + 2 * self.plan.startup

    @property
    def share(self) -> float:
        """How far training has come, by the last line of its metrics."""
        with suppress(OSError, ValueError, IndexError, KeyError):
            with (self.folder / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
                last = file.read().splitlines()[-1]
            return json.loads(last)["global_step"] / (self.row.steps or 10**9)
        return 0.0

    @property
    def held(self) -> bool:
        """Whether a process trains into the run folder: one that outlived its runner, as `stgen train` locks it."""
        try:
            with (self.folder / ".lock").open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False

    @property
    def shares_data(self) -> bool:
        """Whether it reads the built-in shapes that all cells of a seed read."""
        data = self.row.config["data"]
        return data["train_data_dir"] is None and data == self.plan.rows[0].config["data"]

    @property
    def data(self) -> Path:
        """Where the built-in shapes of the seed lie."""
        return self.home / "data" / f"seed-{self.seed}"

    @property
    def cfg(self) -> schema.Config:
        """The config of the run. It always resumes: without a checkpoint that is a start."""
        cfg = self.row.cfg
        every = min(cfg.checkpoint.steps, max(1, (self.row.steps or cfg.checkpoint.steps) // SAVES))
        changes = {
            "run": {"seed": self.seed, "output_dir": str(self.folder), "resume_from_checkpoint": "latest"},
            "data": {"train_data_dir": str(self.data)} if self.shares_data else {},
            "checkpoint": {"steps": every, "total_limit": 1},
            "log": {"group": cfg.log.group or self.plan.study, "name": f"{self.row.slug}-seed{self.seed}"},
        }
        return cfg.model_copy(update={key: getattr(cfg, key).model_copy(update=new) for key, new in changes.items()})

    def check(self) -> None:
        """Raise StudyError if the folder holds this run under another config."""
        if not self.folder.exists() or not self.beside(".yaml").exists():
            return
        free = (*FREE, "data.train_data_dir") if self.shares_data else FREE  # the folder may have moved
        try:
            changed = config.differences(config.load(self.beside(".yaml"), [], schema.Config), self.cfg)
        except config.ConfigError as error:
            changed = [f"now refused: {error.errors[0]}"]
        if changed := [line for line in changed if not line.startswith(free)]:
            shown = "; ".join(changed[:3]) + " …" * (len(changed) > 3)
            raise StudyError(
                f"{self.folder} is of another config ({shown}); give the changed cell another name, or name another "
                "--output_dir"
            )

    def prepare(self) -> None:
        """Write the config of the run, and forget that it failed before."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.beside(".failed").unlink(missing_ok=True)
        write(self.beside(".yaml"), config.dump(self.cfg))


# --------------------------------------------------------------------------------------------------------------- files


def parsed(source: Path | str) -> dict[str, Any]:
    """A JSON object; empty where there is none, or half of one."""
    try:
        found = json.loads(source.read_text(encoding="utf-8") if isinstance(source, Path) else source)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
