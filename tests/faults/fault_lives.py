"""Runs that are watched step by step and die at chosen moments, in processes forked from one that has imported everything.

A run of 20 steps over three epochs. What each step drew, read and computed is kept line by line in a trace, so that a run
that was cut anywhere is compared with one that was not in all that matters, not in its last loss only.

Started as a program this file is the parent of such lives: orders come as JSON lines on stdin, what became of each goes
to stdout.
"""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import fault_runs
import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook

from stgen import checkpoint, cli, progress, step

STEPS = 20
LONGEST = 180  # seconds of a life, after which something hangs
RUN = (
    "run.device=cpu", "log.wandb=disabled", "data.num_frames=2", "codec.patch_size=[2,8,8]", "data.crop=random",
    "train.num_train_epochs=3", "train.gradient_accumulation_steps=2", "text.caption_dropout=0.3", "checkpoint.steps=2",
)  # fmt: skip
VIDEOS = 26  # three epochs of these are 19.5 batches of four


def arguments(home: Path, folder: Path, *overrides: str) -> list[str]:
    """What `train.py` is told for the run in home/run."""
    return fault_runs.arguments(home, folder, *RUN, *overrides)


# ------------------------------------------------------------------------------------------------------- what is compared


def digest(*tensors: torch.Tensor) -> str:
    """A hash of the bits of tensors."""
    bits = hashlib.sha256()
    for tensor in tensors:
        bits.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return bits.hexdigest()[:16]


@contextmanager
def traced(path: Path, fate: "Fate | None" = None) -> Iterator[None]:
    """Within it every step adds a line to `path`: clips, captions, noise, times, loss, norm, rates, and the weights after it.

    Every save adds one when it is done. fate: is told when saves begin and end, when steps end, and when
    all is saved.
    """
    draws: list[dict] = []
    updates: list[dict] = []
    draw, advance, save = step.draw, progress.Progress.advance, checkpoint.save
    enter, leave = (fate.enter, fate.leave) if fate else (lambda scope: None, lambda scope: None)

    def noted_draw(cfg, objective, batch, *rest):
        noise, times, captions = draw(cfg, objective, batch, *rest)
        seen = {"noise": digest(noise), "times": digest(times), "latents": digest(batch.latents)}
        draws.append({"files": batch.files, "captions": captions, **seen})
        return noise, times, captions

    def noted_update(optimizer, *_):
        groups = optimizer.param_groups
        weights = digest(*(parameter for group in groups for parameter in group["params"]))
        updates.append({"lr": [group["lr"] for group in groups], "weights": weights})

    def noted_advance(self, loss, norm, *rest):
        leave("step")
        advance(self, loss, norm, *rest)
        add({"step": self.step, "loss": loss, "norm": norm, "draws": draws[:], "updates": updates[:]})
        draws.clear()
        updates.clear()
        enter("step")

    def noted_save(*args, **kwargs):
        enter("save")
        try:
            folder = save(*args, **kwargs)
        finally:
            leave("save")
        saved = int(folder.name.split("-")[1])
        add({"saved": saved})
        if saved == STEPS:
            enter("end")
        return folder

    def add(line: dict) -> None:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(step, "draw", noted_draw)
        patched.setattr(progress.Progress, "advance", noted_advance)
        patched.setattr(checkpoint, "save", noted_save)
        hook = register_optimizer_step_post_hook(noted_update)
        enter("step")
        try:
            yield
        finally:
            leave("step")
            leave("end")
            hook.remove()


def lines(path: Path, key: str) -> list[dict]:
    """The lines of a trace that have a key; one that a death cut short is none."""
    found = path.read_text().splitlines() if path.exists() else []
    return [line for line in map(_parsed, found) if key in line]


def _parsed(text: str) -> dict:
    try:
        return json.loads(text)
    except ValueError:
        return {}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.stem}/{key}": t for file in sorted(folder.glob("*.safetensors")) for key, t in load_file(file).items()
    }


def state(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds beside tensors, without what the clock, W&B, the place and other limits have to do with."""
    content = json.loads((folder / checkpoint.STATE).read_text())
    for key in ("seconds", "wandb_id", "recent"):
        content["progress"].pop(key, None)
    for section in ("run", "data", "checkpoint"):
        content["config"].pop(section)
    return content


def assert_same_checkpoint(found: Path, expected: Path) -> None:
    left, right = tensors(found), tensors(expected)
    assert left.keys() == right.keys() and len(right) > 60, left.keys() ^ right.keys()
    different = [
        name for name in right if left[name].dtype != right[name].dtype or not torch.equal(left[name], right[name])
    ]
    assert not different, f"{found}: {different}"
    assert state(found) == state(expected)


def metrics(run: Path) -> list[dict]:
    """metrics.jsonl without what the clock has to do with."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in rows]


class Whole:
    """A run that nothing happened to: its folder with a checkpoint of every step, its trace, and its folder of videos."""

    def __init__(self, home: Path, folder: Path):
        self.folder, self.run, self.trace = folder, home / "run", home / "trace.jsonl"
        self.steps = {line["step"]: line for line in lines(self.trace, "step")}
        assert [*self.steps] == [*range(1, STEPS + 1)]

    def assert_same_steps(self, trace: Path, first: int = 1) -> int:
        """Every step in a trace was that of this run, bit by bit; returns how many there are."""
        found = lines(trace, "step")
        for line in found:
            assert line == self.steps[line["step"]], (line, self.steps[line["step"]])
        assert {*range(first, STEPS + 1)} <= {line["step"] for line in found}
        return len(found)

    def assert_same_end(self, run: Path) -> None:
        """A finished run left what this one did: last checkpoint, lines of metrics, and the pipeline's weights."""
        assert_same_checkpoint(run / f"checkpoint-{STEPS}", self.run / f"checkpoint-{STEPS}")
        assert metrics(run) == metrics(self.run)
        for part in ("transformer", "text_encoder", "codec"):
            left, right = tensors(run / "final" / part), tensors(self.run / "final" / part)
            assert left.keys() == right.keys() and right and all(torch.equal(left[key], right[key]) for key in right)


# ------------------------------------------------------------------------------------------------------------------ deaths


class Fate:
    """What meets a life within its number-th `save`, between the ends of its steps `number` and number + 1 (`step`), or after
    the last save (`end`, 1).

    signals: sent one by one from the event-th thing on that Python does there (calls and returns, of C too), the next ones a
    hundred such later. file_size: no file may grow beyond so many bytes there; what would is refused as on a full disk, or
    is the end if `deadly`, in the midst of a write. What was on the stack when a signal was sent is written to `told`.
    """

    def __init__(self, told: Path, where: str = "step", number: int | None = None, event: int = 0, signals: Sequence[int] = (),
                 file_size: int | None = None, deadly: bool = False):  # fmt: skip
        self.told, self.where, self.number, self.event, self.signals = told, where, number, event, list(signals)
        self.file_size, self.deadly = file_size, deadly
        self.seen = {"save": 0, "step": -1, "end": 0}  # before the end of the first step is step 0

    def enter(self, scope: str) -> None:
        self.seen[scope] += 1
        if scope != self.where or self.seen[scope] != self.number:
            return
        if self.file_size is not None:
            if self.deadly:
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # which Python ignores
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.file_size, resource.RLIM_INFINITY))
        else:
            self.count = 0
            sys.setprofile(self._event)

    def leave(self, scope: str) -> None:
        if scope == self.where:
            sys.setprofile(None)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def _event(self, frame, _kind: str, _argument) -> None:
        self.count += 1
        if self.signals and self.count >= self.event:
            stack = []
            while frame:
                stack.append(frame.f_code.co_name)
                frame = frame.f_back
            number, self.event = self.signals.pop(0), self.event + 100
            with self.told.open("a") as file:
                file.write(json.dumps({"signal": number, "stack": stack}) + "\n")
            os.kill(os.getpid(), number)


TOUCHES = {"mkdir", "open", "write", "fsync", "rename", "unlink", "rmdir", "chmod", "serialize_file"}


@contextmanager
def at_touch(number: int, blow: Callable[[str], None]) -> Iterator[list[str]]:
    """Within it `blow` is called with the name of the number-th call by which Python touches the disk, warnings aside, before
    that is made, which it is not if `blow` raises; gives the names of those so far."""
    touches: list[str] = []

    def look(frame, kind: str, called) -> None:
        if kind == "c_call" and called.__name__ in TOUCHES and frame.f_globals["__name__"] != "logging":
            touches.append(called.__name__)
            if len(touches) == number:
                blow(called.__name__)

    sys.setprofile(look)
    try:
        yield touches
    finally:
        sys.setprofile(None)


def save_once(order: dict[str, Any]) -> None:
    """Save what the checkpoint `content` holds as one of `step`, and be killed at the touch-th touch of the disk."""
    loaded = checkpoint.load(order["content"])
    with at_touch(order["touch"], lambda _: os.kill(os.getpid(), signal.SIGKILL)):
        checkpoint.save(order["run"], order["step"], loaded.tensors, loaded.state, order["limit"])


def live(order: dict[str, Any]) -> None:
    """One life: train as told under a trace, and meet one's fate; ends the process as `train.py` would."""
    said = os.open(order["said"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which is not set where tests run in the background
    signal.alarm(LONGEST)
    fate = Fate(Path(order["told"]), **order.get("fate", {}))
    code: int | str | None = 1
    try:
        with traced(Path(order["trace"]), fate):
            cli.train(order["arguments"])
    except SystemExit as end:
        code = end.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1 if code else 0)


CHILDREN = {"live": live, "save_once": save_once}


def serve() -> None:
    """Fork a child for every order, wait for its end, and tell it."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 70
            try:
                CHILDREN[order["child"]](order)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        if (seconds := order.get("seconds")) is not None:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)


class Nursery:
    """The parent of lives, in a process of its own: it has no threads, whose locks a child would inherit held."""

    def __init__(self):
        root = Path(__file__).parents[2]
        environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
        )

    def child(self, **order: Any) -> int:
        """How a child ended: its exit code, or the number of the signal that ended it, negative."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def life(self, home: Path, arguments: Sequence[str], **order: Any) -> int:
        """The same of a run; `home` gets its trace, what it said, and what it told of its end."""
        files = {"said": "said.txt", "told": "told.jsonl", "trace": "trace.jsonl"}
        paths = {key: str(home / name) for key, name in files.items()}
        return self.child(child="live", arguments=list(arguments), **paths, **order)


@cache
def nursery() -> Nursery:
    """One for all tests; it ends with them, as its stdin does."""
    return Nursery()


@cache
def uninterrupted(base: Path) -> Whole:
    """One for all tests too, in the folder in which all of theirs lie."""
    home, folder = base / "uninterrupted", base / "uninterrupted-videos"
    home.mkdir()
    folder.mkdir()
    fault_runs.write_videos(folder, VIDEOS)
    code = nursery().life(home, arguments(home, folder, "checkpoint.steps=1", "checkpoint.total_limit=99"))
    assert code == 0, (home / "said.txt").read_text()
    return Whole(home, folder)


if __name__ == "__main__":
    serve()
