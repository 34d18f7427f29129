"""Training while Weights & Biases is dead, dying or gone, and while the disk is full: the same losses, every line, whole
checkpoints, and an end in time. The servers are fakes on this machine; nothing leaves it."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import fault_runs
import pytest
from fault_runs import write_videos

from stgen import checkpoint, logger, schema
from stgen import train as story
from stgen.logger import LogError, Logger
from stgen.train import TrainingError, train

ROOT = Path(__file__).parents[2]
STEPS = ("train.max_train_steps=6", "checkpoint.steps=2")
KEYS = ("global_step", "train/loss", "train/grad_norm", "train/lr")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_videos(tmp_path_factory.mktemp("videos"))


def make(home: Path, folder: Path, *overrides: str) -> schema.Config:
    return fault_runs.make(home, folder, *STEPS, *overrides)


def rows(run: Path) -> list[tuple]:
    """Step, loss, norm and rate of each line that has them."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line[key] for key in KEYS) for line in lines if KEYS[1] in line]


@pytest.fixture(scope="module")
def calm(tmp_path_factory, folder):
    """The rows of a run without W&B and without faults."""
    home = tmp_path_factory.mktemp("calm")
    train(make(home, folder))
    found = rows(home / "run")
    assert [row[0] for row in found] == [1, 2, 3, 4, 5, 6]
    return found


# ---------------------------------------------------------------------------------------------- the disk, while logging


class FullDisk:
    """A file on a disk that is full between two writes; of the first that does not fit it takes a part, as disks do."""

    def __init__(self, file, first: int, last: float):
        self.file, self.first, self.last, self.writes = file, first, last, 0

    def write(self, data: bytes) -> int:
        self.writes += 1
        if self.writes == self.first:
            return self.file.write(data[: len(data) // 2])
        if self.first < self.writes <= self.last:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.fixture
def full(monkeypatch):
    """Makes the disk under metrics.jsonl full from one write to another."""

    def fill(first: int, last: float) -> None:
        honest = logger._Lines.__init__

        def init(lines, path):
            honest(lines, path)
            lines._file = FullDisk(lines._file, first, last)

        monkeypatch.setattr(logger._Lines, "__init__", init)

    return fill


def test_a_disk_full_for_a_while_costs_no_line(tmp_path, folder, calm, full, caplog):
    full(3, 3)  # the third line does not fit, nor is it tried again before the fourth
    with caplog.at_level(logging.WARNING):
        train(make(tmp_path, folder, "checkpoint.steps=6"))
    assert rows(tmp_path / "run") == calm
    (warning,) = [record.getMessage() for record in caplog.records if "metrics.jsonl" in record.getMessage()]
    assert "No space left on device; its lines wait in memory" in warning


def test_a_disk_that_stays_full_stops_the_run_at_its_next_checkpoint(tmp_path, folder, calm, full, monkeypatch, figure):
    full(3, float("inf"))
    with pytest.raises(LogError) as stop:
        train(make(tmp_path, folder))
    said = str(stop.value)
    for part in (
        "run/metrics.jsonl: no space left on device",
        "2 lines could not be written",
        "make room and go on with",
    ):
        assert part in said, said
    assert len(said.splitlines()) == 1
    assert rows(tmp_path / "run") == calm[:2]  # whole lines, none of a step beyond the checkpoint's half-written
    assert checkpoint.resolve(tmp_path / "run", "latest").step == 2
    monkeypatch.undo()  # there is room again
    train(make(tmp_path, folder, "run.resume_from_checkpoint=latest"))
    assert rows(tmp_path / "run") == calm
    figure("disk full while logging: stopped in one line, checkpoint whole, metrics complete after the resume")


@pytest.mark.parametrize(
    ("module", "name"), [(story.checkpoint, "save_file"), (story.config, "dump"), (story.validation, "finish")]
)
def test_a_full_disk_anywhere_is_one_line_and_leaves_whole_checkpoints(tmp_path, folder, monkeypatch, module, name):
    calls = {"save_file": 8, "dump": 1, "finish": 1}[name]  # of save_file: within the second checkpoint
    honest = getattr(module, name)

    def fail(*args, **kwargs):
        fail.calls += 1
        if fail.calls == calls:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "run" / "x"))
        return honest(*args, **kwargs)

    fail.calls = 0
    monkeypatch.setattr(module, name, fail)
    with pytest.raises((TrainingError, checkpoint.CheckpointError)) as stop:
        train(make(tmp_path, folder))
    assert "no space left on device" in str(stop.value).lower() and len(str(stop.value).splitlines()) == 1
    assert not list((tmp_path / "run").glob(".checkpoint-*"))
    found = checkpoint.resolve(tmp_path / "run", "latest")
    assert (found.step if found else None) == {"save_file": 2, "dump": None, "finish": 6}[name]


UNUSABLE = {  # run folder -> what is said of it
    "/proc/nowhere/run": "cannot be made or written to",
    "{home}/file/run": "cannot be made or written to: not a directory",
    "{home}/file": "is a file; name a folder",
    "{home}/" + "x" * 300: "cannot be made or written to: file name too long",
    "/dev/null": "is a file; name a folder",
}


@pytest.mark.parametrize("path", UNUSABLE)
def test_a_run_folder_that_cannot_be_is_told_with_its_key(tmp_path, folder, path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"run\.output_dir") as stop:
        train(make(tmp_path, folder, f"run.output_dir={path.format(home=tmp_path)}"))
    assert UNUSABLE[path] in str(stop.value) and len(str(stop.value).splitlines()) == 1


def test_lines_written_in_parts_are_whole(tmp_path):
    """As many lines as the disk likes to refuse, in any order of refusals: none is lost, doubled or cut."""
    record = Logger(tmp_path, {}, mode="disabled")
    honest = record._lines._file
    for step in range(60):
        record._lines._file = FullDisk(honest, 1, 1) if step % 3 else FullDisk(honest, 0, step % 5)
        record.log(step, {"words": "é" * (step % 7)})
    record._lines._file = honest
    record.settle()
    record.finish()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["global_step"] for line in lines] == [*range(60)]


# ---------------------------------------------------------------------------------------------------- W&B, in a process

RUN = """
import http.server, json, os, signal, socket, sys, threading, time
from pathlib import Path
from stgen import config, logger, schema
from stgen import train as story

fault, wait, arguments = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
for name, seconds in wait.items():
    setattr(logger, name, seconds)
gone = threading.Event()

class Server(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        if gone.is_set():
            time.sleep(300)
        project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
        bucket = {"id": "x", "name": "run", "config": "{}", "project": project, "historyLineCount": 0}
        body = json.dumps({"data": {"viewer": {"id": "v", "entity": "e", "flags": "{}"}, "upsertBucket": {"bucket": bucket}}})
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    do_GET = do_PUT = do_POST

    def log_message(self, *_):
        pass

def serve():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_port

def kill_core():
    for child in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        try:
            for process in child.read_text().split():
                if "wandb" in Path(f"/proc/{process}/comm").read_text():
                    os.kill(int(process), signal.SIGKILL)
                    print("KILLED", flush=True)
        except OSError:
            pass  # a thread or process that ended meanwhile

if fault == "silent":  # accepts connections and never answers
    mute = socket.socket()
    mute.bind(("127.0.0.1", 0))
    mute.listen(50)
    os.environ["WANDB_BASE_URL"] = "http://127.0.0.1:%d" % mute.getsockname()[1]
if fault == "gone at the end":
    os.environ["WANDB_BASE_URL"] = "http://127.0.0.1:%d" % serve()
honest, marks = story.accumulate, {}

def accumulate(cfg, forward, parts, objective, batch, step):
    marks.setdefault("first step", time.monotonic())
    if step == 3 and fault == "core killed":
        kill_core()
    if step == 3 and fault == "gone at the end":
        gone.set()
    return honest(cfg, forward, parts, objective, batch, step)

class Timed(logger.Logger):
    def __init__(self, *args, **kwargs):
        begun = time.monotonic()
        super().__init__(*args, **kwargs)
        marks["start"] = time.monotonic() - begun

    def finish(self):
        begun = time.monotonic()
        super().finish()
        marks.setdefault("finish", time.monotonic() - begun)
        marks["where"] = self.where

story.accumulate, story.Logger = accumulate, Timed
if __name__ == "__main__":
    cfg = config.load(arguments[0], arguments[1:], schema.Config)
    story.train(cfg)
    (cfg.output_dir / "marks.json").write_text(json.dumps({**marks, "ended": time.time()}))
"""
SHORT = {"START_SECONDS": 8.0, "INIT_SECONDS": 1.0, "FINISH_SECONDS": 6.0}
FAULTS = {  # fault: (what is said of W&B at the end, mode, environment)
    "dead at start": ("offline", "auto", {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "f" * 40}),
    "core killed": ("W&B disabled", "offline", {}),
    "gone at the end": ("not all of it arrived; upload the rest with: wandb sync", "auto", {"WANDB_API_KEY": "f" * 40}),
    "silent": ("offline", "auto", {"WANDB_API_KEY": "f" * 40}),
}


def run_under(fault: str, home: Path, folder: Path, wait: dict[str, float]) -> dict:
    """Train in a process under a fault of W&B; how long it waited for it, and what it said."""
    where, mode, given = FAULTS[fault]
    (home / "story.py").write_text(RUN)
    arguments = fault_runs.arguments(home, folder, *STEPS, f"log.wandb={mode}")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment = {**clean, "PYTHONPATH": str(ROOT), "HOME": str(home), "NETRC": str(home / "netrc"), **given}
    command = [sys.executable, str(home / "story.py"), fault, json.dumps(wait), json.dumps(arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    end = time.time()
    assert done.returncode == 0, done.stderr[-3000:]
    assert fault != "core killed" or "KILLED" in done.stdout
    marks = json.loads((home / "run" / "marks.json").read_text())
    return {**marks, "exit": end - marks["ended"], "said": done.stderr, "expected": where}


def check(fault: str, home: Path, folder: Path, calm: list[tuple], wait: dict[str, float]) -> str:
    found = run_under(fault, home, folder, wait)
    assert rows(home / "run") == calm  # every line, and the same losses
    assert found["expected"] in found["where"], found["where"]
    assert "Traceback" not in found["said"]
    assert (home / "run" / "final" / "model_index.json").is_file()
    assert (
        found["start"] < 15 and found["finish"] + found["exit"] < 31
    )  # the promise; a bare wandb takes 90 s and for ever
    return f"W&B {fault}: start {found['start']:.1f} s, end {found['finish'] + found['exit']:.1f} s, same losses, every line"


@pytest.mark.parametrize("fault", ["dead at start", "core killed"])
def test_an_outage_changes_no_loss_and_loses_no_line(tmp_path, folder, calm, fault, figure):
    """With shorter waits than the real ones."""
    figure(check(fault, tmp_path, folder, calm, SHORT) + " (shorter waits)")


def test_a_start_that_takes_longer_than_training_waits_loses_no_call(tmp_path, monkeypatch, caplog):
    """On a busy machine W&B may be ready late; what was logged meanwhile reaches it then."""
    ready, logged = threading.Event(), []

    class Late:
        settings = SimpleNamespace(mode="offline", sync_dir="folder")

        def Settings(self, **_):
            return None

        def init(self, **_):
            assert ready.wait(30)
            return self

        def log(self, metrics):
            logged.append(metrics["global_step"])

        def define_metric(self, *_, **__): ...

        def finish(self): ...

    monkeypatch.setitem(sys.modules, "wandb", Late())
    monkeypatch.setattr(logger, "START_SECONDS", 0.05)
    with caplog.at_level(logging.WARNING):
        record = Logger(tmp_path, {}, mode="offline")
    assert record.where == "W&B did not start" and "training goes on" in caplog.text
    for step in range(5):
        record.log(step, {"a": 1})
    assert not logged
    ready.set()
    record.finish()
    assert logged == [0, 1, 2, 3, 4] and record.where.startswith("W&B offline in folder")


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_an_outage_delays_start_and_end_by_no_more_than_promised(tmp_path, folder, calm, fault, figure):
    figure(check(fault, tmp_path, folder, calm, {}))


def test_a_killed_process_leaves_whole_lines(tmp_path):
    """SIGKILL between any two writes: each line of the file is JSON, and a resume goes on behind the last."""
    code = f"""
from stgen.logger import Logger
record = Logger({str(tmp_path)!r}, {{}}, mode="disabled")
step = 0
while True:
    record.log(step, {{"loss": 1 / (1 + step)}})
    step += 1
"""
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})
    path = tmp_path / "metrics.jsonl"
    while not path.exists() or path.stat().st_size < 20_000:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    Logger(tmp_path, {}, mode="disabled").finish()  # drops what a kill may have cut
    steps = [json.loads(line)["global_step"] for line in path.read_text().splitlines()]
    assert steps == [*range(len(steps))] and len(steps) > 100
