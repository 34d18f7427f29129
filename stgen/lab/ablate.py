"""`stgen ablate`: plan a study, run what is not done yet, compare and tell."""

import fcntl
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from stgen.lab import forecast, plan, report, runner, statistics
from stgen.lab.plan import Job, Options, Plan, parsed
from stgen.lab.results import Cell, Results, Run
from stgen.lab.study import Cell as Variant
from stgen.lab.study import Study, StudyError
from stgen.logger import Logger


def ablate(path: Path, study: Study, cells: Sequence[Variant], options: Options) -> int:
    """Print the plan, run what is missing, write the report. Returns 1 if a run failed, else 0.

    Raises StudyError for a match that cannot be had and for a folder that holds something else or is in use.
    """
    made = planned(path, study, cells, options)
    with _held(options.folder):
        made.save(options.folder)
        failed = runner.run(made, options)
        if failed:
            print(runner.failures(failed), file=sys.stderr)
        tell(made, options.folder)
    return 1 if failed else 0


def planned(path: Path, study: Study, cells: Sequence[Variant], options: Options) -> Plan:
    """The plan, printed. Raises StudyError."""
    if options.launcher is not None:
        runner.check_launcher(options.launcher)
    made = plan.make(path, study, cells, options, plan.recorded(options.folder, path.stem))
    print(forecast.told(made, options))
    return made


def retell(path: Path, folder: Path) -> None:
    """The report of what a folder holds, made anew. Raises StudyError."""
    made = plan.recorded(folder, path.stem)
    if made is None:
        raise StudyError(f"{folder} holds no results of {path.stem} yet; leave --report out")
    tell(made, folder)


def tell(made: Plan, folder: Path) -> None:
    """Write the report, and the summary run of the study's W&B group."""
    results = collect(made, folder)
    if results.comparison is None:
        print(f"no run in {folder} is done yet; there is nothing to report")
        return
    page = report.write(results, folder)
    print(f"report         {page}\nW&B            {_log(results, made, folder)}")


def collect(made: Plan, folder: Path) -> Results:
    """What the folder holds of the plan, compared."""
    jobs = made.jobs(folder)
    cells = tuple(
        Cell(
            row.name, row.changes, tuple(_run(job) for job in jobs if job.row is row), row.solved, row.steps,
            row.parameters, row.flops_per_step, row.dense_flops_per_step, row.mismatch,
        )
        for row in made.rows
    )  # fmt: skip
    env = next((parsed(run.folder / "env.json") for cell in cells for run in cell.done), {})
    machine = {key: env[key] for key in ("device", "threads", "python", "packages") if key in env}
    compared = statistics.compare(cells)
    return Results(made.study, made.about, made.text, made.base, made.budget, cells, compared, machine)


def _run(job: Job) -> Run:
    if job.done:
        return Run(job.seed, job.folder, "done", measures=job.measures)
    if job.beside(".failed").exists():
        return Run(job.seed, job.folder, "failed", job.beside(".failed").read_text(encoding="utf-8").rstrip())
    return Run(job.seed, job.folder, "missing", "not finished yet" if job.folder.exists() else "not begun yet")


def _log(results: Results, made: Plan, folder: Path) -> str:
    """The summary run of the study's W&B group, with table and pictures, written anew; returns where it is."""
    base = made.rows[0].cfg
    logger = Logger(
        folder,
        {"study": made.text, "budget": made.budget.words, "base": base.model_dump(mode="json")},
        mode=base.log.wandb,
        project=base.log.project,
        group=base.log.group or made.study,
        name=f"{made.study}-summary",
        job_type="ablate",
        run_id=made.wandb,
        resume_step=-1,
    )
    replace(made, wandb=logger.run_id).save(folder)
    columns = ("cell", "measure", "mean", "spread", "difference", "low", "high", "p", "place")
    logger.table(0, "study/table", columns, _rows(results))
    for picture in sorted(folder.glob("plots/*.png")):
        logger.image(0, f"study/{picture.stem}", picture)
    logger.finish()
    return logger.where


def _rows(results: Results) -> list[list[Any]]:
    """A row for each cell and measure, best cells first."""
    assert results.comparison is not None
    beside = {(one.cell, one.measure): one for one in results.comparison.differences}
    rows = []
    for measure, ranking in results.comparison.rankings.items():
        for place in ranking:
            one = beside.get((place.cell, measure))
            paired = [one.mean, one.low, one.high, one.p] if one else [None] * 4
            places = f"{place.best}-{place.worst}" if place.best < place.worst else str(place.best)
            rows.append([place.cell, measure, place.mean, place.spread, *paired, places])
    return rows


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Make the folder and hold it for this runner. Raises StudyError when another one has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StudyError(f"{folder}: another stgen ablate is at work there; wait for it to end") from None
        yield


if __name__ == "__main__":  # the second half of a run: measure it
    from stgen.lab.measure import measure

    measure(Path(sys.argv[1]), progress=print)
