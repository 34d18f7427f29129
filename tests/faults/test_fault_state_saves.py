"""A save that is cut off or refused at each of its touches of the disk, and rotation: a whole checkpoint is always there.

The tensors are those of a real run: weights, averages, moments, random states and codec.
"""

import errno
import os
import random
import shutil
import signal
from pathlib import Path

import fault_lives
import pytest
from fault_lives import STEPS, arguments, assert_same_checkpoint, at_touch, nursery

from stgen import checkpoint
from stgen.checkpoint import CheckpointError

EARLIER, LATER = 10, 20  # steps of the run whose content is saved


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return fault_lives.uninterrupted(tmp_path_factory.getbasetemp())


SITUATIONS = {  # what is there, and as which step the content of step 20 is saved; one is kept
    "next": ({EARLIER}, LATER),
    "replaces": ({EARLIER}, EARLIER),
    "goes back": ({EARLIER, 15}, 12),
}


def lay(run: Path, whole: fault_lives.Whole, situation: str) -> int:
    """A run folder as the situation wants it; the step that is to be saved."""
    shutil.rmtree(run, ignore_errors=True)
    there, step = SITUATIONS[situation]
    for number in there:
        loaded = checkpoint.load(whole.run / f"checkpoint-{number}")
        checkpoint.save(run, number, loaded.tensors, loaded.state, 2)
    return step


def judge(run: Path, whole: fault_lives.Whole, situation: str) -> str:
    """`old` or `new`, whichever is found whole, tensor by tensor; anything else fails."""
    there, step = SITUATIONS[situation]
    found = checkpoint.resolve(run, "latest")
    assert found is not None
    content = LATER if found.state == state_of(whole, LATER) else found.step
    assert content == LATER or found.step in there
    assert content != LATER or found.step == step
    assert_same_checkpoint(found.path, whole.run / f"checkpoint-{content}")
    return "new" if content == LATER else "old"


def state_of(whole: fault_lives.Whole, step: int) -> dict:
    return checkpoint.load(whole.run / f"checkpoint-{step}").state


def touches(run: Path, whole: fault_lives.Whole, situation: str) -> list[str]:
    """The touches of the disk of a save that nothing happens to."""
    step, loaded = lay(run, whole, situation), checkpoint.load(whole.run / f"checkpoint-{LATER}")
    with at_touch(0, print) as seen:
        checkpoint.save(run, step, loaded.tensors, loaded.state, 1)
    return seen


def points(count: int, stride: int) -> range:
    """Every stride-th touch from 1 on; all where it is 1."""
    return range(1 if stride == 1 else stride // 2, count + 1, stride)


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("stride", [13, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "every"])
def test_a_save_killed_at_any_touch_of_the_disk_is_whole_or_absent(tmp_path, whole, situation, stride, figure):
    run, outcomes = tmp_path / "run", []
    at = points(len(touches(run, whole, situation)), stride)
    for touch in at:
        step = lay(run, whole, situation)
        content = str(whole.run / f"checkpoint-{LATER}")
        order = {"content": content, "run": str(run), "step": step, "limit": 1, "touch": touch}
        assert nursery().child(child="save_once", **order) == -signal.SIGKILL
        outcomes.append(judge(run, whole, situation))
        loaded = checkpoint.load(whole.run / f"checkpoint-{STEPS}")
        checkpoint.save(run, 30, loaded.tensors, loaded.state, 1)  # the next clears what the kill left
        left = {path.name for path in run.iterdir()}
        assert left - {"abandoned-checkpoint-15"} == {"checkpoint-30"}, touch
    assert outcomes == sorted(outcomes, reverse=True) and {*outcomes} == {"old", "new"}, outcomes
    figure("kill -9 at each touch of the disk by a save: old or new, whole", len(at))


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "every"])
def test_a_disk_full_at_any_touch_leaves_a_whole_checkpoint_and_no_draft(tmp_path, whole, situation, stride, figure):
    run, refused = tmp_path / "run", 0
    loaded = checkpoint.load(whole.run / f"checkpoint-{LATER}")
    needed = sum(t.numel() * t.element_size() for group in loaded.tensors.values() for t in group.values())

    def refuse(_name: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    at = points(len(touches(run, whole, situation)), stride)
    for touch in at:
        step = lay(run, whole, situation)
        try:
            with at_touch(touch, refuse):
                checkpoint.save(run, step, loaded.tensors, loaded.state, 1)
        except CheckpointError as error:
            refused += 1
            said = str(error)
            for part in (
                f"cannot write {run / f'checkpoint-{step}'}",
                "No space left",
                f"{needed} bytes needed",
                "bytes free",
            ):
                assert part in said, said
            assert len(said.splitlines()) == 1
            judge(run, whole, situation)
            assert not [*run.glob(".*.tmp-*")], touch
        else:  # what was refused was the removal of an old one, which is left to the next save
            assert judge(run, whole, situation) == "new"
    assert refused > len(at) // 2
    figure(
        "disk full at each touch of the disk by a save: told in one line, a whole checkpoint, no draft left", len(at)
    )


SIZES = (
    0,
    2_500,
    20_000,
    54_000,
    60_000,
    90_000,
    100_000,
    108_000,
    112_000,
    113_000,
)  # the largest file has 113,128 bytes


@pytest.mark.parametrize(
    "size", [pytest.param(size, marks=[] if size == 60_000 else pytest.mark.slow) for size in SIZES]
)
def test_a_run_whose_disk_is_full_ends_in_one_line_and_goes_on_when_there_is_room(tmp_path, whole, size, figure):
    """Refused by the system itself, part of a file written."""
    told = arguments(tmp_path, whole.folder, "run.resume_from_checkpoint=latest", "checkpoint.total_limit=1")
    code = nursery().life(tmp_path, told, fate={"where": "save", "number": 4, "file_size": size})
    said = (tmp_path / "said.txt").read_text()
    last = said.strip().splitlines()[-1]
    assert code == 1 and last.startswith("error: ") and "Traceback" not in said, said
    for part in ("run/checkpoint-8: ", "File too large", "bytes needed", "earlier checkpoints are intact"):
        assert part in last, last
    run = tmp_path / "run"
    assert [path.name for path in run.glob("*checkpoint-*")] == ["checkpoint-6"]
    assert_same_checkpoint(run / "checkpoint-6", whole.run / "checkpoint-6")
    assert nursery().life(tmp_path, told) == 0
    whole.assert_same_steps(tmp_path / "trace.jsonl")
    whole.assert_same_end(run)
    figure("disk full in mid-file, in a run: one line with path and bytes, the one before loads, resumed bit by bit")


@pytest.mark.parametrize("count", [12, pytest.param(120, marks=pytest.mark.slow)])
def test_rotation_never_takes_the_last_good_checkpoint(tmp_path, whole, count, figure):
    """Saves that succeed, are refused, replace and go back, among damage to what is there: never from something to nothing."""
    chance, run, kept = random.Random(7), tmp_path / "run", 0
    contents = {step: checkpoint.load(whole.run / f"checkpoint-{step}") for step in (5, 10, 15, 20)}

    def refuse(_name: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    step = 0
    for _ in range(count):
        before = newest(run)
        loaded = contents[chance.choice([*contents])]
        step = max(1, step + chance.choice([5, 5, 5, 0, -5]))
        try:
            with at_touch(chance.choice([0, chance.randrange(1, 60)]), refuse):
                checkpoint.save(run, step, loaded.tensors, loaded.state, chance.choice([1, 1, 2, 3]))
        except CheckpointError:
            assert newest(run) is not None or before is None
            kept += before is not None
        else:
            after = newest(run)
            assert after is not None and after.step == step and after.state == loaded.state
        if len([*run.glob("checkpoint-*")]) > 1 and chance.random() < 0.5:  # as long as another is left
            damage(chance, max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])))
    assert kept >= count // 10
    figure("saves under rotation, refusals and damage: what was good before was there after", count)


def test_a_checkpoint_that_stepped_aside_is_found_by_its_name(tmp_path, whole):
    """A kill between the two renames of a replacement; the user then names the checkpoint instead of `latest`."""
    lay(tmp_path / "run", whole, "next")
    folder = tmp_path / "run" / f"checkpoint-{EARLIER}"
    folder.rename(folder.with_name(f".{folder.name}.old-0123"))
    found = checkpoint.resolve(tmp_path, str(folder))
    assert found is not None and found.path == folder
    assert_same_checkpoint(folder, whole.run / folder.name)


@pytest.mark.parametrize(("mask", "rights"), [(0o022, 0o644), (0o007, 0o660)])
def test_the_files_of_a_checkpoint_are_for_whom_the_umask_says(tmp_path, whole, mask, rights):
    """Safetensors would keep the weights from all but their owner, on a disk that is shared."""
    before = os.umask(mask)
    try:
        lay(tmp_path / "run", whole, "next")
    finally:
        os.umask(before)
    files = [*(tmp_path / "run" / f"checkpoint-{EARLIER}").iterdir()]
    assert len(files) == 7 and {file.stat().st_mode & 0o777 for file in files} == {rights}


def newest(run: Path) -> checkpoint.Loaded | None:
    """What a run would go on from, None if nothing is whole."""
    try:
        return checkpoint.resolve(run, "latest")
    except CheckpointError:
        return None


def damage(chance: random.Random, folder: Path) -> None:
    """One bit of one file, or its end, or all of it."""
    file = chance.choice(sorted(folder.iterdir()))
    data = bytearray(file.read_bytes())
    match chance.choice(["bit", "end", "file"]):
        case "bit":
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            file.write_bytes(data)
        case "end":
            file.write_bytes(data[: chance.randrange(len(data))])
        case "file":
            file.unlink()
