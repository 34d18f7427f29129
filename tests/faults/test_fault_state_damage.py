"""Bits that flip, files that are cut, missing or of another model, in the checkpoints of a real run: each is found and named.

What is damaged by chance is passed over, with one warning, for the checkpoint before. What is whole but does not fit, its
hashes in order, is refused by the names of its keys.
"""

import hashlib
import json
import logging
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fault_lives
import fault_runs
import pytest
import torch
from fault_lives import RUN, STEPS, assert_same_checkpoint
from safetensors.torch import load_file, save_file

from stgen import checkpoint
from stgen.checkpoint import CheckpointError
from stgen.train import train

BEFORE = STEPS - 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return fault_lives.uninterrupted(tmp_path_factory.getbasetemp())


@pytest.fixture
def run(tmp_path, whole) -> Path:
    """A run folder with its last two checkpoints and its metrics."""
    folder = tmp_path / "run"
    for step in (BEFORE, STEPS):
        shutil.copytree(whole.run / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    shutil.copy(whole.run / "metrics.jsonl", folder)
    return folder


# ------------------------------------------------------------------------------------------------- damaged by chance


def flipped(chance: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    changed[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def cut(chance: random.Random, content: bytes) -> bytes:
    return content[: chance.randrange(len(content))]


def grown(chance: random.Random, content: bytes) -> bytes:
    return content + chance.randbytes(chance.choice([1, 8, 4096]))


def emptied(chance: random.Random, content: bytes) -> bytes:
    """As many zeros, as a file has whose blocks never reached the disk."""
    return bytes(len(content))


@contextmanager
def damaged(file: Path, content: bytes | None) -> Iterator[None]:
    """The file with another content, or without the file; then as it was."""
    original = file.read_bytes()
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(original)


def assert_passed_over(run: Path, file: Path, caplog) -> None:
    """The checkpoint before is found, with one warning of one line that names the file."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        found = checkpoint.resolve(run, "latest")
    assert found is not None and found.step == BEFORE
    (record,) = caplog.records
    said = record.getMessage()
    assert str(file) in said and f"continuing from {run / f'checkpoint-{BEFORE}'}" in said
    assert len(said.splitlines()) == 1


HARM: dict[str, tuple[Callable[[random.Random, bytes], bytes], int]] = {  # how, and how often in the long run
    "bit flips": (flipped, 400),
    "truncations": (cut, 50),
    "files that have grown": (grown, 20),
    "files of zeros": (emptied, 7),
}


@pytest.mark.parametrize("long", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("harm", HARM)
def test_damage_is_found_named_and_passed_over_with_one_warning(run, whole, harm, long, caplog, figure):
    change, count = HARM[harm]
    chance, count = random.Random(harm), count if long else max(count // 20, 2)
    files = sorted((run / f"checkpoint-{STEPS}").iterdir())
    for i in range(count):
        # By turns of every file, and of the bytes of all: most of these are moments of the optimiser.
        weights = [file.stat().st_size for file in files]
        file = files[i % len(files)] if i % 2 else chance.choices(files, weights)[0]
        with damaged(file, change(chance, file.read_bytes())):
            assert_passed_over(run, file, caplog)
    assert_same_checkpoint(run / f"checkpoint-{STEPS}", whole.run / f"checkpoint-{STEPS}")
    found = checkpoint.resolve(run, "latest")
    assert found is not None and found.step == STEPS
    figure(f"{harm}: found, file named, the checkpoint before used with one warning", count)


def test_each_missing_file_is_named_and_passed_over_with_one_warning(run, caplog, figure):
    files = sorted((run / f"checkpoint-{STEPS}").iterdir())
    assert {"manifest.json", "state.json", "model.safetensors"} < {file.name for file in files}
    for file in files:
        with damaged(file, None):
            assert_passed_over(run, file, caplog)
    figure("missing files: found, file named, the checkpoint before used with one warning", len(files))


def test_a_run_goes_on_from_the_checkpoint_before_and_is_the_same(run, whole, caplog, capfd):
    """As a user meets it: the warning is seen without anything being set up, and the damaged one is replaced."""
    with (run / f"checkpoint-{STEPS}" / "optimizer.safetensors").open("r+b") as file:
        file.seek(50_000)
        file.write(b"x")
    caplog.clear()
    with fault_lives.traced(run.parent / "trace.jsonl"):
        train(config(run, whole, "run.resume_from_checkpoint=latest"))
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1 and "optimizer.safetensors: content differs from what was saved" in warnings[0]
    assert f"resumed from {run / f'checkpoint-{BEFORE}'}" in "".join(capfd.readouterr())
    whole.assert_same_steps(run.parent / "trace.jsonl", first=BEFORE + 1)
    whole.assert_same_end(run)


def test_where_nothing_is_whole_every_fault_is_told_and_nothing_is_begun_anew(run, whole):
    (run / f"checkpoint-{STEPS}" / "ema.safetensors").unlink()
    (run / f"checkpoint-{BEFORE}" / "state.json").write_bytes(b"")
    kept = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError) as refusal:
        train(config(run, whole, "run.resume_from_checkpoint=latest"))
    for part in (f"no checkpoint in {run} is whole", "ema.safetensors: missing", "state.json: 0 bytes"):
        assert part in str(refusal.value)
    assert (run / "metrics.jsonl").read_bytes() == kept


def config(run: Path, whole: fault_lives.Whole, *overrides: str):
    return fault_runs.make(run.parent, whole.folder, *RUN, f"run.output_dir={run}", *overrides)


# ------------------------------------------------------------------------------------------- whole, but of another model


def sealed(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a file, and the manifest with them."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    path = file.with_name(checkpoint.MANIFEST)
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    data = file.read_bytes()
    manifest["files"][file.name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(checkpoint._render(manifest))


def misshape(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[key] = torch.zeros(*tensors[key].shape, 3, dtype=tensors[key].dtype)


def retype(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[key] = tensors[key].to(torch.int32 if tensors[key].is_floating_point() else torch.float32)


KEYS: dict[str, tuple[Callable[[dict[str, torch.Tensor], str], object], str]] = {
    "missing": (lambda tensors, key: tensors.pop(key), "{key} is missing"),
    "extra": (lambda tensors, key: tensors.update({f"{key}2": torch.zeros(2)}), "{key}2 is unexpected"),
    "misshapen": (misshape, "{key} has shape"),
    "of another type": (retype, "{key} has type"),
    "renamed": (lambda tensors, key: tensors.update({f"{key}.old": tensors.pop(key)}), "{key} is missing"),
}


@pytest.mark.parametrize("count", [2, pytest.param(16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", KEYS)
def test_keys_that_do_not_fit_are_named(run, whole, fault, count, figure):
    """All of a file's faults in one line, and nothing is trained."""
    change, words = KEYS[fault]
    chance = random.Random(fault)
    folder = run / f"checkpoint-{STEPS}"
    for i in range(count):
        group = ("model", "ema", "optimizer", "codec")[i % 4]
        file = folder / f"{group}.safetensors"
        original = {path: path.read_bytes() for path in (file, folder / checkpoint.MANIFEST)}
        keys = chance.sample(sorted(load_file(file)), chance.choice([1, 1, 3]))
        sealed(file, lambda tensors, keys=keys: [change(tensors, key) for key in keys])
        with pytest.raises(CheckpointError) as refusal:
            train(config(run, whole, "run.resume_from_checkpoint=latest"))
        said = str(refusal.value)
        for key in keys:
            assert words.format(key=key) in said, said
        assert said.startswith(f"{group}: ") and len(said.splitlines()) == 1
        for path, content in original.items():
            path.write_bytes(content)
    figure("keys that are missing, extra, misshapen, of another type or renamed: refused by name", count)


@pytest.mark.parametrize(("fault", "words"), [("missing", "random states missing: {key}"), ("extra", "{key}2"),
                                              ("misshapen", "random states"), ("of another type", "random states")])  # fmt: skip
@pytest.mark.parametrize("key", ["torch", "numpy", "python"])
def test_random_states_that_do_not_fit_are_named(run, whole, key, fault, words, figure):
    sealed(run / f"checkpoint-{STEPS}" / "random.safetensors", lambda tensors: KEYS[fault][0](tensors, key))
    with pytest.raises(CheckpointError) as refusal:
        checkpoint.restore_random_state(checkpoint.load(run / f"checkpoint-{STEPS}").tensors["random"])
    assert words.format(key=key) in str(refusal.value) and len(str(refusal.value).splitlines()) == 1
    figure("keys that are missing, extra, misshapen, of another type or renamed: refused by name")
