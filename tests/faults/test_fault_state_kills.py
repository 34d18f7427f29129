"""kill -9 anywhere in a run, its resumes included: what goes on is the run that was not killed, bit by bit.

One run is killed, resumed and killed again until it is done, then the next begins. After every kill the newest checkpoint
must hold what the uninterrupted run held at its step, and no step may ever differ from that run's, those made twice included.
"""

import random
import signal
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import fault_lives
import pytest
from fault_lives import STEPS, arguments, assert_same_checkpoint, lines, nursery

from stgen import checkpoint

SAVE, STEP = 31_000, 12_000  # about as many things Python does in a save, and from one step to the next without one


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return fault_lives.uninterrupted(tmp_path_factory.getbasetemp())


@dataclass
class Death:
    """kind: `save`, within one; `write`, in the midst of a write of one; `step`, between two steps or before the first;
    `clock`, after so many seconds. order: what the nursery is told of it; workers: of the data, in the life that ends so."""

    kind: str
    order: dict = field(default_factory=dict)
    workers: int = 0

    def hasten(self) -> None:
        """Come in half the time, or at half the size: the life was over before."""
        for times in (self.order, self.order.get("fate", {})):
            for key in {"seconds", "event", "file_size"} & {*times}:
                times[key] = times[key] / 2 if key == "seconds" else times[key] // 2

    @property
    def code(self) -> int:
        return -signal.SIGXFSZ if self.kind == "write" else -signal.SIGKILL


def deaths(counts: dict[str, int], seed: int) -> list[Death]:
    """As many of each kind, seeded, in an order that is seeded too."""
    chance = random.Random(seed)
    kill = {"signals": [signal.SIGKILL]}

    def one(kind: str) -> Death:
        match kind:
            case "save":
                fate = {"where": "save", "number": chance.choice([1, 1, 2]), "event": chance.randrange(SAVE), **kill}
            case "write":
                fate = {"where": "save", "number": 1, "file_size": chance.randrange(100_000), "deadly": True}
            case "clock":
                return Death(kind, {"seconds": chance.uniform(0.1, 2.0)})
            case _:
                fate = {"where": "step", "number": chance.randrange(4), "event": chance.randrange(STEP), **kill}
                workers = 0 if kind == "step" else chance.choice([1, 2])
                return Death(kind, {"fate": fate}, workers)
        return Death(kind, {"fate": fate})

    drawn = [one(kind) for kind, count in counts.items() for _ in range(count)]
    chance.shuffle(drawn)
    return drawn


class Run:
    """A run that is resumed as often as it dies."""

    def __init__(self, home: Path, whole: fault_lives.Whole):
        home.mkdir()
        self.home, self.run, self.whole = home, home / "run", whole

    def live(self, death: Death) -> int:
        """The next life; how it ended."""
        own = ("checkpoint.total_limit=2", f"data.dataloader_num_workers={death.workers}")
        told = arguments(self.home, self.whole.folder, "run.resume_from_checkpoint=latest", *own)
        return nursery().life(self.home, told, **death.order)

    def said(self) -> str:
        return (self.home / "said.txt").read_text()[-3000:]

    def assert_sound(self) -> None:
        """What a death left: a newest checkpoint that is whole, and no older than the last that a save had returned from."""
        found = checkpoint.resolve(self.run, "latest")
        saved = [line["saved"] for line in lines(self.home / "trace.jsonl", "saved")]
        assert (found.step if found else 0) >= max(saved, default=0)
        if found:
            assert_same_checkpoint(found.path, self.whole.run / found.path.name)
        self.whole.assert_same_steps(self.home / "trace.jsonl", first=STEPS + 1)

    def assert_done(self) -> None:
        """Every step, the end and all files are those of the run that nothing happened to.

        Nothing is left lying about but what the last save was still to remove when it was killed: no save comes after it.
        """
        self.whole.assert_same_steps(self.home / "trace.jsonl")
        self.whole.assert_same_end(self.run)
        assert {path.name.split("-")[0] for path in self.run.glob(".*")} <= {".lock", ".checkpoint"}
        assert all(path.name.startswith(".checkpoint-16.tmp-") for path in self.run.glob(".checkpoint-*"))
        assert {path.name for path in self.run.glob("checkpoint-*")} - {"checkpoint-16"} == {
            "checkpoint-18",
            "checkpoint-20",
        }


SOME = {"save": 3, "write": 1, "step": 1, "clock": 1}
FIFTY = {"save": 22, "write": 6, "step": 10, "clock": 8, "step with workers": 4}


@pytest.mark.parametrize("counts", [SOME, pytest.param(FIFTY, marks=pytest.mark.slow)], ids=["some", "fifty"])
def test_a_run_killed_anywhere_goes_on_as_if_it_had_not_been(tmp_path, whole, counts, figure):
    began, died, left = time.monotonic(), Counter(), deaths(counts, 11)
    runs = [Run(tmp_path / "0", whole)]
    while left:
        death = left[-1]
        code = runs[-1].live(death)
        if code == 0:  # it was done before its death came, which waits for the next
            runs[-1].assert_done()
            runs.append(Run(tmp_path / str(len(runs)), whole))
            death.hasten()
            continue
        assert code == death.code, (death, runs[-1].said())
        if death.kind == "save":
            assert "noted_save" in lines(runs[-1].home / "told.jsonl", "stack")[-1]["stack"]
        runs[-1].assert_sound()
        died[left.pop().kind.split()[0]] += 1
    assert runs[-1].live(Death("none")) == 0, runs[-1].said()
    runs[-1].assert_done()
    inside = died["save"] + died["write"]
    figure("deaths by kill -9 (and by SIGXFSZ, in mid-write): resumed bit by bit", died.total())
    figure("... of them inside a save", inside)
    assert died.total() == sum(counts.values()) and inside >= 0.4 * died.total()
    print(f"{died} in {len(runs)} runs, {time.monotonic() - began:.0f} s")


@pytest.mark.slow
def test_a_killed_trainer_takes_its_workers_along(tmp_path, whole, figure):
    """Or each restart of a run that is killed for want of memory leaves more of them behind."""
    run = Run(tmp_path / "run", whole)
    said = run.home / "said.txt"
    assert run.live(Death("step", {"fate": {"where": "step", "number": 3, "signals": [signal.SIGKILL]}}, 2)) < 0
    deadline = time.monotonic() + 60
    while (left := writing_to(said)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
    figure("workers of a killed trainer: gone")


def writing_to(file: Path) -> list[str]:
    """Processes whose words go to a file, as those of a trainer's workers go where its own go."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/2"):
        with suppress(OSError):  # it has ended meanwhile
            if link.readlink() == file:
                found.append(link.parts[2])
    return found
