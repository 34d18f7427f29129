"""SIGTERM, Ctrl-C and Ctrl-C again, at chosen moments of steps and saves: the run is saved and ends, and nothing is torn.

A first signal lets the step end, saves and says how to go on; a second Ctrl-C ends a step at once but never a save.
"""

import random
import signal
from pathlib import Path

import fault_lives
import pytest
from fault_lives import STEPS, arguments, assert_same_checkpoint, lines, nursery

from stgen import checkpoint

INT, TERM = signal.SIGINT, signal.SIGTERM


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return fault_lives.uninterrupted(tmp_path_factory.getbasetemp())


def told(home: Path, whole: fault_lives.Whole, *overrides: str) -> list[str]:
    return arguments(home, whole.folder, "run.resume_from_checkpoint=latest", "checkpoint.steps=4", *overrides)


def assert_goes_on(home: Path, whole: fault_lives.Whole, *overrides: str) -> None:
    """The newest checkpoint is the uninterrupted run's of that step, and so is what a resume makes of it."""
    found = checkpoint.resolve(home / "run", "latest")
    if found:
        assert_same_checkpoint(found.path, whole.run / found.path.name)
    assert not [*(home / "run").glob(".checkpoint-*")]
    assert nursery().life(home, told(home, whole, *overrides)) == 0, (home / "said.txt").read_text()
    whole.assert_same_steps(home / "trace.jsonl")
    whole.assert_same_end(home / "run")


def moments(cases: dict[str, tuple[int, ...]], short: set[str], count: int = 8) -> list:
    """Each list of signals at as many seeded moments: (signals, scope, its number, the event in it); but a few are slow."""
    chance, drawn = random.Random(1), []
    for name, signals in cases.items():
        for i in range(count):
            where = "save" if i % 2 else "step"
            number = chance.randrange(1, 4 if where == "save" else 17)
            event = chance.randrange(1, 18_000 if where == "save" else 9_000)
            marks = [] if f"{name}-{where}" in short and i < 2 else pytest.mark.slow
            drawn.append(pytest.param(signals, where, number, event, marks=marks, id=f"{name}-{where}-{i}"))
    return drawn


@pytest.mark.parametrize(
    ("signals", "where", "number", "event"), moments({"once": (TERM,), "thrice": (TERM,) * 3}, {"thrice-save"})
)
def test_sigterm_is_saved_and_the_run_goes_on(tmp_path, whole, signals, where, number, event, figure):
    """However often: a scheduler that asks again does not make it worse."""
    fate = {"where": where, "number": number, "event": event, "signals": signals}
    assert nursery().life(tmp_path, told(tmp_path, whole), fate=fate) == 128 + TERM, (tmp_path / "said.txt").read_text()
    last = max(line["step"] for line in lines(tmp_path / "trace.jsonl", "step"))
    saved = lines(tmp_path / "trace.jsonl", "saved")[-1]["saved"]
    said = (tmp_path / "said.txt").read_text()
    assert saved == last < STEPS
    assert (
        f"stopped by SIGTERM at step {last}; everything is saved in {tmp_path / 'run' / f'checkpoint-{last}'}" in said
    )
    assert "run.resume_from_checkpoint=latest" in said and "Traceback" not in said
    assert_goes_on(tmp_path, whole)
    figure("SIGTERM in a step or a save: the step ended and was saved, resumed bit by bit")


CTRL_C = {"twice": (INT, INT), "after SIGTERM": (TERM, INT), "often": (INT,) * 4}


@pytest.mark.parametrize(("signals", "where", "number", "event"), moments(CTRL_C, {"twice-save", "twice-step"}))
def test_a_second_ctrl_c_ends_a_step_at_once_but_never_a_save(tmp_path, whole, signals, where, number, event, figure):
    fate = {"where": where, "number": number, "event": event, "signals": signals}
    code = nursery().life(tmp_path, told(tmp_path, whole), fate=fate)
    said, sent = (tmp_path / "said.txt").read_text(), lines(tmp_path / "told.jsonl", "signal")
    assert "Traceback" not in said, said
    in_saves = ["noted_save" in line["stack"] for line in sent]
    if all(in_saves):  # the save was finished, the run ended as after one signal
        assert code == 128 + signals[0] and "everything is saved in" in said, said
    else:
        assert code in (130, 128 + signals[0]), said
    if where == "save":
        assert in_saves[0]
        saved = [line["saved"] for line in lines(tmp_path / "trace.jsonl", "saved")]
        assert saved[-1] == 4 * number, "the save that the signals met"
    assert_goes_on(tmp_path, whole)
    figure("Ctrl-C twice and more, in a step or a save: no save torn, resumed bit by bit")


@pytest.mark.parametrize(
    ("event", "number_sent"),
    [
        pytest.param(event, number, marks=[] if (event, number) == (20_000, signal.SIGKILL) else pytest.mark.slow)
        for event in (10, 5_000, 12_000, 20_000, 28_000)
        for number in (TERM, INT, signal.SIGKILL)
    ],
)
def test_a_run_that_is_ended_after_its_last_save_finishes_when_it_is_resumed(
    tmp_path, whole, event, number_sent, figure
):
    """While the last clips are sampled and the pipeline is written: no step is made again, no line of metrics twice."""
    fate = {"where": "end", "number": 1, "event": event, "signals": [number_sent]}
    code = nursery().life(tmp_path, told(tmp_path, whole), fate=fate)
    heard = number_sent == INT or (number_sent == TERM and event == 10)  # then the loop has not ended yet, and listens
    assert code == (128 + number_sent if heard else -number_sent), (tmp_path / "said.txt").read_text()
    assert lines(tmp_path / "trace.jsonl", "saved")[-1]["saved"] == STEPS
    assert_goes_on(tmp_path, whole)
    assert len(lines(tmp_path / "trace.jsonl", "step")) == STEPS
    figure("ended while the last clips and the pipeline were made: finished by a resume, every line once")
