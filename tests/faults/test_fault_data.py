"""Folders in which anything may lie, workers that die, hang or cannot say what happened, and 2 000 reads: training goes on
with what is good in the order it would have had, or ends in time and names the file."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import fault_monsters
import fault_runs
import fault_videos
import pytest
import torch
from fault_monsters import MONSTERS
from fault_videos import ROOT

from stgen import dataset, video
from stgen.train import train

EARLY = {name: monster for name, monster in MONSTERS.items() if monster.reason and not monster.late}
LATE = {name: monster for name, monster in MONSTERS.items() if monster.late}


# ---------------------------------------------------------------------------------------------------------- monsters


READ = """
import hashlib, json, signal, sys
from stgen.dataset import StepSampler, VideoFolder, loader

signal.signal(signal.SIGALRM, signal.SIG_DFL)
signal.alarm(120)
found = VideoFolder(sys.argv[1], num_frames=4, height=16, width=16, max_reject_fraction=1, progress=False)
plan = StepSampler(range(len(found)), 1, 0)
batches = iter(loader(found, plan, int(sys.argv[2]), 60))
seen = []
for step in range(2 * len(found)):
    batch = next(batches)
    mark = hashlib.md5(batch["frames"].numpy().tobytes()).hexdigest()
    seen.append([found.name(plan.samples(step)[0][0]), batch["path"][0], mark, batch["rejects"]])
names = [found.name(i) for i in range(len(found))]
print(json.dumps({"names": names, "rejects": found.rejects, "seen": seen}))
"""


def read_all(folder: Path, workers: int = 0) -> dict:
    """What a process of its own makes of a folder: names, rejects, and two epochs of (planned, read, mark, rejects)."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", READ, str(folder), str(workers)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr[-3000:])
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Good videos with all monsters among them, and the same without those that are refused at once."""
    home = tmp_path_factory.mktemp("monsters")
    fault_runs.write_videos(home / "all")
    for name, monster in MONSTERS.items():
        monster.make(home / "all" / name)
    shutil.copytree(home / "all", home / "good", symlinks=True, ignore=lambda folder, names: {*names} & {*EARLY})
    return home / "all", home / "good"


def test_monsters_are_refused_once_and_the_good_keep_their_order(folders, figure):
    told, calm = read_all(folders[0]), read_all(folders[1])
    reasons = dict(told["rejects"])
    assert Counter(path for path, _ in told["rejects"]) == Counter([*EARLY])
    wrong = {name: reasons[name] for name, monster in EARLY.items() if not re.search(monster.reason, reasons[name])}
    assert not wrong, wrong
    assert all("\n" not in reason and len(reason) < 300 for reason in reasons.values())
    assert not calm["rejects"]
    good = sorted({*MONSTERS} - {*EARLY} | {f"{i}.mp4" for i in range(6)})
    assert told["names"] == calm["names"] == good
    assert told["seen"] == calm["seen"]  # the same clips, one by one, and the same in place of those refused late
    for planned, read, _, rejects in told["seen"]:
        if planned in LATE:
            assert planned == rejects[0][0] and re.search(LATE[planned].reason, rejects[0][1]) and read not in LATE
        else:
            assert planned == read and not rejects
    figure(
        "monsters refused once with a reason; nothing followed, no hang, the good in their order",
        len(EARLY) + len(LATE),
    )
    figure("odd but whole videos read", len(MONSTERS) - len(EARLY) - len(LATE))


def test_training_among_monsters_is_training_without_them(folders, tmp_path, figure):
    losses = []
    for folder, workers in zip(folders, (2, 0), strict=True):
        home = tmp_path / folder.name
        home.mkdir()
        given = ["train.max_train_steps=14", "data.max_reject_fraction=1", f"data.dataloader_num_workers={workers}"]
        cfg = fault_runs.make(home, folder, *given)
        train(cfg)
        losses.append([json.loads(line).get("train/loss") for line in (cfg.output_dir / "metrics.jsonl").open()])
        rejects = [json.loads(line)["path"] for line in (cfg.output_dir / "rejects.jsonl").open()]
        assert len(rejects) == len({*rejects}) and {*rejects} <= {*EARLY, *LATE}
        assert folder != folders[0] or {*EARLY} <= {*rejects}
    assert losses[0] == losses[1] and len(losses[0]) >= 14
    figure("training steps among monsters, each loss that of the folder without them", 14)


def test_a_playlist_of_urls_connects_nowhere(tmp_path):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.setblocking(False)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/a"
        scripts = [fault_monsters.PLAYLIST.format(address), f"ffconcat version 1.0\nfile '{address}'\n"]
        for number, script in enumerate(scripts):
            for suffix in (".mp4", ".mkv", ".gif"):
                (tmp_path / f"{number}{suffix}").write_text(script)
                with pytest.raises(video.VideoError):
                    video.probe(tmp_path / f"{number}{suffix}")
        with pytest.raises(BlockingIOError):
            server.accept()


def test_a_file_that_may_not_be_read_says_so():
    """Also where the tests run as root, who may read everything."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = fault_monsters.clip(Path(folder) / "a.mp4")
        path.chmod(0)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)
            with pytest.raises(video.VideoError, match="Permission denied"):
                video.probe(path)
        finally:
            os.seteuid(user)


@pytest.mark.parametrize("bad", [3, 20])
def test_a_folder_of_bad_files_stops_at_once_with_counts(tmp_path, bad):
    fault_runs.write_videos(tmp_path, 20 - bad)
    for number in range(bad):
        (tmp_path / f"bad{number}.mp4").write_text("no video\n" * 99)
    begun = time.monotonic()
    counts = f"{bad} of 20 entries cannot be used" if bad < 20 else "20 were found and refused"
    with pytest.raises(dataset.DataError, match=counts):
        dataset.VideoFolder(tmp_path, num_frames=4, height=16, width=16, max_reject_fraction=0.1)
    assert time.monotonic() - begun < 5  # the promise; it takes a twentieth of it


# ----------------------------------------------------------------------------------------------------------- workers

STORY = """
import ctypes, os, signal, time
from stgen import cli, dataset

VICTIM, FAULT = os.environ["STORY_VICTIM"], os.environ["STORY_FAULT"]
honest = dataset.VideoFolder._frames

class Odd(Exception):
    def __reduce__(self):
        raise TypeError("cannot be pickled")

def frames(self, index, generator):
    if dataset.get_worker_info() and self.name(index) == VICTIM:
        open(os.environ["STORY_MARK"], "a").close()
        if FAULT == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if FAULT == "segfault":
            ctypes.string_at(0)
        if FAULT == "stuck":
            time.sleep(3600)
        if FAULT == "stuck in C":
            ctypes.PyDLL(None).sleep(3600)  # holds the lock of the interpreter
        raise Odd("what cannot be pickled")
    return honest(self, index, generator)

dataset.VideoFolder._frames = frames
if __name__ == "__main__":
    cli.train()
"""
LIMIT = 25  # seconds for a batch; a busy machine takes some of them to start the workers
FAULTS = [
    "killed",
    *(pytest.param(f, marks=pytest.mark.slow) for f in ("segfault", "unpicklable", "stuck", "stuck in C")),
]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_worker_that_fails_ends_training_in_time_and_names_the_file(tmp_path, fault, figure):
    fault_runs.write_videos(tmp_path / "videos")
    (tmp_path / "story.py").write_text(STORY)
    given = [
        "log.wandb=disabled",
        "data.dataloader_num_workers=2",
        f"data.decode_timeout={LIMIT}",
        "train.max_train_steps=40",
    ]
    arguments = fault_runs.arguments(tmp_path, tmp_path / "videos", *given)
    mark = tmp_path / "mark"
    told = {"STORY_VICTIM": "3.mp4", "STORY_FAULT": fault, "STORY_MARK": str(mark)}
    environment = {**os.environ, **told, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "story.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)  # or it hangs
    took = time.time() - mark.stat().st_mtime
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    last = done.stderr.strip().splitlines()[-1]
    assert "no batch for step" in last and "3.mp4" in last.split("videos of that batch")[0], last
    of_it = f", {LIMIT} s of it data.decode_timeout" if fault.startswith("stuck") else ""
    figure(f"worker {fault}: training had ended {took:.1f} s later{of_it}, and named the file")


class Slow(dataset.VideoFolder):
    def _frames(self, index, generator):
        time.sleep(1.5 if index == 2 else 0)
        return super()._frames(index, generator)


def test_a_batch_may_take_longer_than_a_look_at_the_workers(tmp_path, monkeypatch):
    """Looking fails by an error of the loader, after which it must go on as if nothing had been."""
    monkeypatch.setattr(dataset, "POLL", 0.2)
    fault_runs.write_videos(tmp_path, 4)
    size = {"num_frames": 4, "height": 16, "width": 16}
    plan = dataset.StepSampler(range(4), 2, 0)
    batches = iter(dataset.loader(Slow(tmp_path, **size), plan, 2, 100))
    calm = iter(dataset.loader(dataset.VideoFolder(tmp_path, **size), plan, 0, 100))
    for _ in range(5):
        slow, quick = next(batches), next(calm)
        assert slow["path"] == quick["path"] and torch.equal(slow["frames"], quick["frames"])


# ------------------------------------------------------------------------------------------------------------- leaks

DECODE = """
import gc, json, os, random, sys, threading
import torch
from stgen import video

torch.set_num_threads(1)
paths, reads, warm = sys.argv[3:], int(sys.argv[1]), int(sys.argv[2])

def now():
    gc.collect()
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return [int(status["VmRSS"].split()[0]) / 1024, len(os.listdir("/proc/self/fd")), int(status["Threads"])]

chance, told, good = random.Random(0), [], 0
for number in range(reads + 1):
    if number in (warm, reads):
        told.append(now())
    path = paths[number % len(paths)]
    try:
        good += len(video.read(path, chance.randrange(36), 8).frames) == 8
    except video.VideoError:
        pass
print(json.dumps([good, *told]))
"""


@pytest.mark.parametrize(("reads", "warm"), [(400, 150), pytest.param(2600, 600, marks=pytest.mark.slow)])
def test_memory_files_and_threads_stay_flat(tmp_path, reads, warm, figure):
    """Reads of every kind of video, from the start and from within, whole ones and damaged ones in turn."""
    paths = []
    for kind in fault_videos.KINDS:
        path = fault_videos.write(tmp_path / kind.file, kind, fault_videos.pictures())
        data = path.read_bytes()
        cut = path.with_name(f"cut-{path.name}")
        cut.write_bytes(data[: len(data) * 3 // 4])
        noisy = path.with_name(f"noisy-{path.name}")
        noisy.write_bytes(data[: len(data) // 2] + bytes(64) + data[len(data) // 2 + 64 :])
        paths += [str(path), str(cut), str(path), str(noisy)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", DECODE, str(reads), str(warm), *paths]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    good, (before, *counts), (after, *later) = json.loads(done.stdout)
    assert reads / 2 <= good < reads
    assert later == counts  # descriptors and threads
    assert after - before < 20, (before, after)  # MiB
    figure(
        f"reads after which memory has grown by {after - before:.1f} MiB, descriptors and threads by none", reads - warm
    )
