"""Run what of a plan is not done: each run is a process of its own, `stgen train` and then `stgen.lab.ablate` to measure.

What is done is read off the disk alone, so that the runner may be killed anywhere and started again.
"""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stgen import shapes
from stgen.lab.forecast import Forecast, duration
from stgen.lab.plan import Job, Options, Plan, environment, write
from stgen.lab.study import StudyError

STOP_SECONDS = 60.0  # that runs have to save themselves when the runner is stopped
TRUST = 0.05  # share of what is left that must be done before its pace corrects the prediction
REASON_LINES = 5  # of a failed run's log that are told
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def run(plan: Plan, options: Options) -> list[Job]:
    """Run what is not done; returns the runs that failed. Ctrl-C and SIGTERM let the running ones save themselves.

    Raises KeyboardInterrupt after that.
    """
    todo = [job for job in plan.jobs(options.folder, options.only) if not job.done]
    for job in todo:
        job.prepare()
    _render(todo)
    return _Runner(plan, options, todo).run() if todo else []


def _render(todo: Sequence[Job]) -> None:
    """Render the built-in shapes of each seed that is still to be trained; what is there stays."""
    for job in {job.seed: job for job in todo if job.shares_data and not job.trained}.values():
        data = job.row.cfg.data
        shapes.write_folder(
            job.data,
            clips=data.shapes.clips,
            held_out=data.shapes.held_out,
            held_out_seed=data.shapes.held_out_seed,
            motion=data.shapes.motion,
            num_frames=data.num_frames,
            height=data.height,
            width=data.width,
            seed=job.seed,
        )


@dataclass(frozen=True)
class _Child:
    """A run's process."""

    job: Job
    trains: bool  # or measures
    process: subprocess.Popen


class _Runner:
    """Keeps as many processes going as there are slots, and tells how far they are."""

    def __init__(self, plan: Plan, options: Options, todo: Sequence[Job]):
        self.plan, self.options, self.waiting = plan, options, list(todo)
        self.running: dict[int, _Child] = {}  # by slot
        self.planned = len(plan.jobs(options.folder, options.only))
        self.failed: list[Job] = []
        guess = Forecast(plan, options.folder)
        self.weights = {job: guess.seconds(job.row) or 1.0 for job in todo}

    def run(self) -> list[Job]:
        with _terminable(), self._bar() as bar:
            try:
                while self.waiting or self.running:
                    self._fill()
                    time.sleep(0.2)
                    for slot in list(self.running):
                        self._reap(slot, bar)
                    self._show(bar)
            finally:
                self._stop()
        return self.failed

    def _fill(self) -> None:
        """Give free slots runs that no other process holds."""
        for slot in range(self.options.slots):
            job = next((job for job in self.waiting if slot not in self.running and not job.held), None)
            if job is not None:
                self.waiting.remove(job)
                self.running[slot] = self._spawn(job, slot)

    def _spawn(self, job: Job, slot: int) -> _Child:
        """Start what the run needs next."""
        trains = not job.trained
        what = ["stgen", "train", str(job.beside(".yaml"))] if trains else ["stgen.lab.ablate", str(job.folder)]
        devices = self.options.devices
        with job.beside(".log").open("ab") as log:
            process = subprocess.Popen(
                launched(self.options.launcher, [sys.executable, "-m", *what], job),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(self.plan.threads, devices[slot % len(devices)] if devices else None),
                start_new_session=True,  # Ctrl-C reaches the runner alone, which then stops the runs
                preexec_fn=_end_with_parent,
            )
        return _Child(job, trains, process)

    def _reap(self, slot: int, bar: tqdm) -> None:
        """Take note of a process that ended; one that trained goes on to be measured in the same slot."""
        child = self.running[slot]
        job, code = child.job, child.process.poll()
        if code is None:
            return
        if code == 0 and child.trains and job.trained and not job.done:
            self.running[slot] = self._spawn(job, slot)
            return
        del self.running[slot]
        if code == 0 and job.done:
            bar.write(f"{job.name}: {_outcome(job)}")
            return
        write(job.beside(".failed"), _reason(child, code))
        self.failed.append(job)
        bar.write(f"{job.name} failed: {_reason(child, code).splitlines()[0]}")

    def _bar(self) -> tqdm:
        return tqdm(
            total=sum(self.weights.values()),
            initial=sum(weight * job.share for job, weight in self.weights.items()),
            smoothing=0.0,
            miniters=0,
            mininterval=1.0 if sys.stderr.isatty() else 60.0,
            bar_format="{desc} |{bar}| {elapsed} gone{postfix}",
        )

    def _show(self, bar: tqdm) -> None:
        """Move the bar: by predicted seconds, of a run under way by the share of its steps."""
        now = [child.job for child in self.running.values()]
        ended = len(self.weights) - len(self.waiting) - len(now)
        left = sum(self.weights[job] * (1 - job.share) for job in (*self.waiting, *now))
        before = self.planned - len(self.weights)
        bar.set_description_str(f"{before + ended} of {self.planned} runs", refresh=False)
        told = [f"{duration(self._seconds_left(bar, left))} left"]
        told += [f"{job.name} {'measuring' if job.trained else f'{job.share:.0%}'}" for job in now]
        told += ["waiting for a process of an earlier start to end"] * (not now and bool(self.waiting))
        bar.set_postfix_str("; ".join(told), refresh=False)
        bar.update(sum(self.weights.values()) - left - bar.n)

    def _seconds_left(self, bar: tqdm, left: float) -> float:
        """The prediction of what is left, corrected by how it has held since the start."""
        done, slots = bar.n - bar.initial, min(self.options.slots, len(self.running) + len(self.waiting)) or 1
        pace = bar.format_dict["elapsed"] * slots / done if done > TRUST * left else 1.0
        return left / slots * pace

    def _stop(self) -> None:
        """End what still runs, politely at first, so that it saves: it is not done, but has not failed."""
        for child in self.running.values():
            _signal(child.process, signal.SIGTERM)
        until = time.monotonic() + STOP_SECONDS
        for child in self.running.values():
            try:
                child.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                _signal(child.process, signal.SIGKILL)
                child.process.wait()


def launched(launcher: str | None, command: Sequence[str], job: Job) -> list[str]:
    """The command as the launcher has it: the word `{command}` becomes its words; within a word it becomes its text.

    `{name}` becomes a name for the run. Raises StudyError for a launcher that has no place for the command.
    """
    if launcher is None:
        return list(command)
    check_launcher(launcher)
    words: list[str] = []
    for word in shlex.split(launcher):
        word = word.replace("{name}", f"{job.row.slug}-seed{job.seed}")
        words += command if word == "{command}" else [word.replace("{command}", shlex.join(command))]
    return words


def check_launcher(launcher: str) -> None:
    """Raise StudyError for a template that cannot start anything."""
    try:
        shlex.split(launcher)
    except ValueError as error:
        raise StudyError(f"--launcher: {error} in {launcher!r}") from None
    if "{command}" not in launcher:
        raise StudyError(f"--launcher: {launcher!r} has no {{command}}; write 'srun --gpus=1 {{command}}', say")


def _end_with_parent() -> None:
    """In the child: be told to save and end when the runner dies, however that happens (Linux)."""
    if LIBC is not None:
        LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _signal(process: subprocess.Popen, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


@contextmanager
def _terminable() -> Iterator[None]:
    """Within it SIGTERM ends as Ctrl-C does."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _reason(child: _Child, code: int) -> str:
    """Why a run failed, in a line, and the last lines of its log."""
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
    text = child.job.beside(".log").read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    lines = [line for line in text.splitlines() if line.strip()][-REASON_LINES:]
    first = f"{'training' if child.trains else 'measuring'} {how}: {lines[-1] if lines else 'it printed nothing'}"
    return "\n".join([first, *lines]) + "\n"


def _outcome(job: Job) -> str:
    loss, right = job.measures.get("held_out") or {}, job.measures.get("accuracy") or {}
    words = [f"held-out loss {loss['mean']:.4f}"] if "mean" in loss else []
    words += [f"{right['held_out']:.0%} of held-out prompts right"] if right.get("held_out") is not None else []
    return ", ".join([*words, duration(job.seconds)])


def failures(failed: Sequence[Job]) -> str:
    """What failed and why, in the last words of each log."""
    told = []
    for job in failed:
        lines = job.beside(".failed").read_text(encoding="utf-8").rstrip().splitlines()
        log = Path(os.path.relpath(job.beside(".log")))
        told += [f"failed: {job.name}: {lines[0]}", *(f"    {line}" for line in lines[1:]), f"    (all of it: {log})"]
    return "\n".join(told)
