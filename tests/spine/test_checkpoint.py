"""Checkpoints under kills, flipped bits, cuts, full disks and signals."""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from stgen import checkpoint
from stgen.checkpoint import CheckpointError, StopSignals, load, load_into, resolve, save

REPOSITORY = Path(__file__).resolve().parents[2]


def content(step):
    """Tensors and state from which the step can be read back."""
    return {
        "model": {"weight": torch.full((4, 5), float(step)), "scalar": torch.tensor(step)},
        "ema": {"weight": torch.full((7,), -float(step))},
    }, {"step": step, "note": "é"}


def write(run_dir, *steps, limit=10):
    for step in steps:
        save(run_dir, step, *content(step), limit)
    return run_dir / f"checkpoint-{steps[-1]}"


def names(run_dir):
    return sorted(path.name for path in run_dir.iterdir())


def is_of_step(loaded, step):
    tensors, state = content(step)
    same = all(torch.equal(loaded.tensors[g][n], t) for g, named in tensors.items() for n, t in named.items())
    return loaded.step == step and loaded.state == state and loaded.tensors.keys() == tensors.keys() and same


def python(code, *arguments, **kwargs):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], env=environment, text=True, **kwargs)


def test_round_trip(tmp_path):
    folder = write(tmp_path, 3)
    assert names(folder) == ["ema.safetensors", "manifest.json", "model.safetensors", "state.json"]
    assert is_of_step(load(folder), 3)


def test_tensors_that_share_storage_or_are_strided(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": base, "b": base, "view": base[1:], "strided": base.t(), "empty": base[:0], "none": base[:0]}
    loaded = load(save(tmp_path, 1, {"model": tensors, "nothing": {}}, {}, 1)).tensors
    assert all(torch.equal(loaded["model"][name], tensor) for name, tensor in tensors.items())
    assert loaded["nothing"] == {}


def test_newest_are_kept(tmp_path):
    write(tmp_path, 9, 10, 11, 100, limit=2)
    assert names(tmp_path) == ["checkpoint-100", "checkpoint-11"]


def test_pruning_does_not_count_incomplete_checkpoints(tmp_path):
    write(tmp_path, 1, 2)
    (tmp_path / "checkpoint-2" / "ema.safetensors").unlink()
    write(tmp_path, 3, limit=2)
    assert {"checkpoint-1", "checkpoint-3"} <= set(names(tmp_path))


def test_same_step_is_replaced(tmp_path):
    write(tmp_path, 1, 2)
    tensors, state = content(2)
    save(tmp_path, 2, tensors, {**state, "note": "second"}, 2)
    assert load(tmp_path / "checkpoint-2").state["note"] == "second"
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_a_replacement_cut_off_between_its_renames_is_undone(tmp_path):
    write(tmp_path, 1, 2)
    (tmp_path / "checkpoint-2").rename(tmp_path / ".checkpoint-2.old-0123")
    assert is_of_step(resolve(tmp_path, "latest"), 2)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_checkpoints_of_a_course_that_was_left_are_set_aside(tmp_path):
    write(tmp_path, 10, 20, 30)
    write(tmp_path, 15)
    assert resolve(tmp_path, "latest").step == 15
    assert names(tmp_path) == ["abandoned-checkpoint-20", "abandoned-checkpoint-30", "checkpoint-10", "checkpoint-15"]


def test_stale_temporary_folders_are_removed(tmp_path):
    (tmp_path / ".checkpoint-5.tmp-dead").mkdir()
    (tmp_path / ".checkpoint-5.tmp-dead" / "model.safetensors").write_bytes(b"half")
    write(tmp_path, 6)
    assert names(tmp_path) == ["checkpoint-6"]


def test_resolve(tmp_path, caplog):
    run = tmp_path / "run"
    assert resolve(run, "none") is None
    assert resolve(run, "latest") is None
    write(run, 1, 2)
    assert resolve(run, "none") is None
    assert is_of_step(resolve(run, "latest"), 2)
    assert is_of_step(resolve(tmp_path, str(run / "checkpoint-1")), 1)
    assert is_of_step(resolve(tmp_path, str(run)), 2)
    assert not caplog.records
    for path in ("absent", "."):
        with pytest.raises(CheckpointError, match=str(tmp_path)):
            resolve(run, str(tmp_path / path))


def test_latest_falls_back_with_one_warning(tmp_path, caplog):
    write(tmp_path, 1, 2, 3)
    (tmp_path / "checkpoint-3" / "ema.safetensors").write_bytes(b"")
    (tmp_path / "checkpoint-2" / "state.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert is_of_step(resolve(tmp_path, "latest"), 1)
    (record,) = caplog.records
    assert "checkpoint-3/ema.safetensors" in record.getMessage()
    assert "checkpoint-2/state.json" in record.getMessage()
    (tmp_path / "checkpoint-1" / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"checkpoint-1/manifest\.json"):
        resolve(tmp_path, "latest")


def damaged(folder, file, change):
    """The error that loading raises after `change` of one file's bytes; the file is put back."""
    path = folder / file
    whole = path.read_bytes()
    path.write_bytes(change(whole))
    try:
        with pytest.raises(CheckpointError) as caught:
            load(folder)
    finally:
        path.write_bytes(whole)
    return str(caught.value)


FILES = ["ema.safetensors", "manifest.json", "model.safetensors", "state.json"]


@pytest.mark.parametrize("file", FILES)
def test_every_flipped_bit_is_found_and_its_file_named(tmp_path, file):
    folder = write(tmp_path, 7)
    size = (folder / file).stat().st_size
    for position in random.Random(0).sample(range(8 * size), 60):

        def flip(whole, position=position):
            changed = bytearray(whole)
            changed[position // 8] ^= 1 << position % 8
            return bytes(changed)

        assert file in damaged(folder, file, flip), position
    assert is_of_step(load(folder), 7)


@pytest.mark.parametrize("file", FILES)
def test_cut_and_missing_files_are_named(tmp_path, file):
    folder = write(tmp_path, 7)
    for end in (0, 1, 7, (folder / file).stat().st_size // 2, -1):
        assert file in damaged(folder, file, lambda whole, end=end: whole[:end])
    assert file in damaged(folder, file, lambda whole: whole + b" ")
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=f"{file}: missing"):
        load(folder)


def test_a_manifest_cannot_point_outside(tmp_path):
    folder = write(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"]["../secret"] = {"size": 0, "sha256": ""}
    (folder / "manifest.json").write_text(checkpoint._render(manifest))
    with pytest.raises(CheckpointError, match="outside"):
        load(folder)


KILLS = """
import itertools, os, random, signal, sys, time
from pathlib import Path
import torch
from stgen.checkpoint import resolve, save

run, kills = Path(sys.argv[1]), int(sys.argv[2])

def save_step(step):
    big = {f"w{i}": torch.full((200_000,), float(step)) for i in range(5)}
    save(run, step, {"model": big, "ema": big}, {"step": step}, 1)

torch.set_num_threads(1)
began = time.monotonic()
save_step(1)
lasts = time.monotonic() - began  # here and now; a busy machine takes long
chance, step, inside = random.Random(1), 1, 0
for _ in range(kills):
    child = os.fork()
    if child == 0:
        for later in itertools.count(step + 1):
            save_step(later)
    time.sleep(lasts * (0.5 + 3 * chance.random()))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    inside += any(run.glob(".checkpoint-*"))
    loaded = resolve(run, "latest")
    assert loaded.step >= step and loaded.state == {"step": loaded.step}
    assert {t.unique().item() for group in loaded.tensors.values() for t in group.values()} == {loaded.step}
    step = loaded.step
print(inside, step)
"""


def test_kill_inside_a_save(tmp_path):
    """The saver spends nearly all of its time in `save`; with a limit of 1 there is no spare checkpoint to fall on."""
    process = python(KILLS, tmp_path, 12, stdout=subprocess.PIPE)
    inside, step = map(int, process.communicate()[0].split())
    assert inside >= 6
    assert step > 1


CRASHES = """
import os, shutil, sys
from pathlib import Path
import torch
from stgen.checkpoint import resolve, save

run, step = Path(sys.argv[1]), int(sys.argv[2])
TOUCHES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}

def write(value, step):
    save(run, step, {"model": {"w": torch.full((9,), value)}, "ema": {"w": torch.full((9,), value)}}, {"v": value}, 1)

def crash_at(point):
    \"""Save in a child that dies at the point-th file operation; returns whether it came so far.\"""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] != 0
    seen = 0
    def hook(event, _):
        nonlocal seen
        seen += event in TOUCHES
        if seen > point:
            os._exit(9)
    sys.addaudithook(hook)
    write(2.0, step)
    os._exit(0)

torch.set_num_threads(1)
point, values = 0, []
while True:
    shutil.rmtree(run, ignore_errors=True)
    write(1.0, 1)
    crashed = crash_at(point)
    loaded = resolve(run, "latest")
    (value,) = {t.unique().item() for group in loaded.tensors.values() for t in group.values()}
    assert loaded.state == {"v": value}, point
    values.append(value)
    if not crashed:
        break
    write(3.0, 2)
    assert [path.name for path in run.iterdir()] == ["checkpoint-2"], point
    point += 1
assert values == sorted(values) and values[0] == 1.0 and values[-1] == 2.0, values
print(point)
"""


@pytest.mark.parametrize("step", [2, 1], ids=["next", "replaced"])
def test_crash_at_every_file_operation_of_a_save(tmp_path, step):
    """Old or new, never a mix, never nothing; and the next save leaves nothing behind."""
    process = python(CRASHES, tmp_path / "run", step, stdout=subprocess.PIPE)
    assert int(process.communicate()[0]) > 15


def test_disk_full_leaves_the_previous_checkpoint(tmp_path):
    write(tmp_path, 1)
    code = f"""
import resource, torch
from stgen.checkpoint import CheckpointError, save
tensors = {{"model": {{"w": torch.zeros(1000)}}, "ema": {{"w": torch.zeros(100_000)}}}}
for limit in (0, 100, 3000, 200_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        save({str(tmp_path)!r}, 2, tensors, {{}}, 1)
    except CheckpointError as error:
        assert "checkpoint-2" in str(error) and "404000 bytes needed" in str(error) and "bytes free" in str(error)
        assert len(str(error).splitlines()) == 1
        print("refused")
"""
    process = python(code, stdout=subprocess.PIPE)
    assert process.communicate()[0] == "refused\n" * 4
    assert process.returncode == 0
    assert names(tmp_path) == ["checkpoint-1"]
    assert is_of_step(resolve(tmp_path, "latest"), 1)


def test_a_failure_while_replacing_puts_the_old_one_back(tmp_path, monkeypatch):
    write(tmp_path, 1)
    rename = Path.rename

    def fail(self, target):
        if ".tmp-" in self.name:
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(CheckpointError, match="no "):
        write(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-1"]
    assert is_of_step(load(tmp_path / "checkpoint-1"), 1)


def test_state_that_json_cannot_hold_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        save(tmp_path, 1, {}, {"step": object()}, 1)
    assert names(tmp_path) == []


def test_load_into_lists_every_key():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    tensors = {key: value + 1 for key, value in before.items()}
    tensors["2.weight"] = tensors.pop("1.weight")
    tensors["0.bias"] = torch.ones(4)
    with pytest.raises(CheckpointError, match="another architecture") as caught:
        load_into(module, tensors, "transformer")
    for part in ("transformer", "1.weight is missing", "2.weight is unexpected", "0.bias has shape [4], not [3]"):
        assert part in str(caught.value)
    assert all(torch.equal(module.state_dict()[key], value) for key, value in before.items())
    load_into(module, {key: value + 1 for key, value in before.items()}, "transformer")
    assert torch.equal(module[0].bias, before["0.bias"] + 1)


def draw():
    return [torch.randn(3).tolist(), np.random.randn(3).tolist(), [random.gauss(0, 1) for _ in range(3)]]


def test_random_states_go_on_where_they_were(tmp_path):
    draw()  # an odd number of Gaussian draws: the second of a pair is kept in the state
    state = checkpoint.random_state()
    assert not any(tensor.is_floating_point() for tensor in state.values())
    folder = save(tmp_path, 1, {"random": state}, {}, 1)
    expected = draw()
    assert draw() != expected
    checkpoint.restore_random_state(load(folder).tensors["random"])
    assert draw() == expected
    del state["numpy"]
    with pytest.raises(CheckpointError, match="numpy"):
        checkpoint.restore_random_state(state)


def test_stop_signals():
    previous = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == "SIGTERM"
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == "SIGINT"
        with stop.protected():
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert previous == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_stop_signals_outside_the_main_thread():
    seen = []

    def enter():
        with StopSignals() as stop, stop.protected():
            seen.append(stop.requested)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [None]


def test_a_copied_checkpoint_loads(tmp_path):
    shutil.copytree(write(tmp_path, 4), tmp_path / "elsewhere")
    assert is_of_step(resolve(tmp_path, str(tmp_path / "elsewhere")), 4)
