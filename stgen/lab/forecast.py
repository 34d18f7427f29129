"""How long a study takes, and its plan as a table."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from stgen.flops import readable
from stgen.lab.plan import Options, Plan, Row
from stgen.lab.tables import table

MEASURED_NOISES, MEASURED_CLIPS = 8, 64  # what measuring samples: for each held-out prompt; of other folders in all


class Forecast:
    """Seconds that runs take: of a cell with finished ones their mean; of others what a few timed steps foretell."""

    def __init__(self, plan: Plan, folder: Path):
        self._plan = plan
        self._took: dict[str, list[float]] = {}
        for job in plan.jobs(folder):
            if job.done:
                self._took.setdefault(job.row.name, []).append(job.seconds)
        both = [
            (fmean(self._took[row.name]), told)
            for row in plan.rows
            if row.name in self._took and (told := foretold(plan, row))
        ]
        self._factor = sum(took for took, _ in both) / sum(told for _, told in both) if both else 1.0

    def seconds(self, row: Row) -> float | None:
        """Of one run of the cell, measuring included; None where nothing is known."""
        if took := self._took.get(row.name):
            return fmean(took)
        told = foretold(self._plan, row)
        return told * self._factor if told else None

    @property
    def words(self) -> str:
        """What the prediction rests on."""
        count = sum(map(len, self._took.values()))
        if not count:
            return (
                "Predicted from three timed steps of each cell, the clips it will sample and the time to start a process; "
                "decoding videos and whatever else this machine does come on top."
            )
        return (
            f"Predicted from {count} finished run{'s' * (count > 1)}, and for cells without one from three timed steps "
            f"x {self._factor:.2f}, which is what the finished ones took of theirs."
        )


def foretold(plan: Plan, row: Row) -> float | None:
    """Seconds of one run by the timed steps: training, and the clips of its validations, its end and its measuring."""
    if row.speed is None or row.steps is None:
        return None
    cfg = row.cfg
    validate, held_out = cfg.validation, cfg.data.shapes.held_out if cfg.data.train_data_dir is None else 0
    rounds = 2 + (row.steps // validate.steps if validate.steps else 0)
    clips = rounds * len(validate.prompts or range(4)) + 2 * validate.judged_noises * held_out
    clips += 2 * (validate.judged_noises or MEASURED_NOISES) * held_out or MEASURED_CLIPS
    passes = clips * validate.num_inference_steps * (2 if validate.guidance_scale > 1 else 1)
    return 2 * plan.startup + row.steps * row.speed["step"] + passes * row.speed["forward"]


def told(plan: Plan, options: Options) -> str:
    """The plan as a table, and how long it takes."""
    guess = Forecast(plan, options.folder)
    head = ("cell", "parameters", "FLOP a step", "if dense", "steps", "FLOP in all", "mismatch", "a run", "changes")
    missing = [job for job in plan.jobs(options.folder, options.only) if not job.done]
    seconds = sum(guess.seconds(job.row) or 0.0 for job in missing) / options.slots
    count = len(plan.jobs(options.folder, options.only))
    of = f" of {', '.join(options.only)}" if options.only else f" ({len(plan.rows)} cells x {len(plan.seeds)} seeds)"
    done = f", {count - len(missing)} of them done" if len(missing) < count else ""
    return "\n".join(
        [
            *filter(None, [plan.about]),
            plan.budget.words,
            "",
            table([head, *(_line(row, guess) for row in plan.rows)]),
            "",
            f"{count} runs{of}{done}; about {duration(seconds)} with {options.slots} at once, {plan.threads} "
            f"thread{'s' * (plan.threads > 1)} each.",
            guess.words,
        ]
    )


def _line(row: Row, guess: Forecast) -> tuple[str, ...]:
    seconds = guess.seconds(row)
    return (
        row.name,
        readable(row.parameters),
        readable(row.flops_per_step),
        readable(row.dense_flops_per_step),
        str(row.steps or "?"),
        readable(row.steps * row.flops_per_step) if row.steps else "?",
        f"{100 * row.mismatch:+.2f} %" if row.changes else "-",
        duration(seconds) if seconds else "?",
        ", ".join([f"{key} {_short(value)}" for key, value in row.changes.items()])
        + "".join(f" [{key} {_short(value)}]" for key, value in row.solved.items()),
    )


def _short(value: Any) -> str:
    text = json.dumps(round(value, 3) if isinstance(value, float) else value, ensure_ascii=False).replace('"', "")
    return text if len(text) <= 60 else text[:59] + "…"


def duration(seconds: float) -> str:
    """90 s, 25 min, 3.4 h"""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
