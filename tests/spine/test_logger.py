"""The metrics file, and Weights & Biases in all the ways it can fail."""

import json
import logging
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from stgen import logger
from stgen.logger import Logger, redact

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    """No key, no server: neither from the environment nor from the user's netrc."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def lines(run_dir):
    """The lines of metrics.jsonl, refused if they use the NaN that JSON lacks."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    text = (run_dir / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def run(code, timeout=90, **environment):
    """Run code in a new process; returns (its output, seconds)."""
    start = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert process.returncode == 0, process.stdout
    return process.stdout, time.monotonic() - start


def test_metrics_file(tmp_path):
    record = Logger(tmp_path / "run", {}, mode="disabled")
    record.log(3, {"train/loss": torch.tensor(0.5), "train/lr": np.float32(0.25), "list": [1, (2, "é")], "none": None})
    assert lines(tmp_path / "run") == [  # readable before finish: every line is flushed
        {"global_step": 3, "train/loss": 0.5, "train/lr": 0.25, "list": [1, [2, "é"]], "none": None}
    ]
    record.log(4, {"global_step": 99, "a": True})
    record.finish()
    assert list(lines(tmp_path / "run")[1].items()) == [("global_step", 4), ("a", True)]
    assert record.where == "W&B disabled"


def test_disabled_does_not_import_wandb(tmp_path):
    code = f"""
import sys
from stgen.logger import Logger
record = Logger({str(tmp_path)!r}, {{}}, mode="disabled")
record.log(1, {{"a": 1}}); record.summary({{"a": 1}}); record.videos(1, "v", [("a.mp4", "a")]); record.finish()
print([name for name in ("wandb", "torch") if name in sys.modules])
"""
    assert run(code)[0] == "[]\n"


def test_odd_values_are_dropped_with_one_warning(tmp_path, caplog):
    record = Logger(tmp_path, {}, mode="disabled")
    odd = {"object": object(), 5: 1, "array": np.zeros(3), "inner": {2: 1}, "deep": [object()]}
    with caplog.at_level(logging.WARNING):
        for step in range(2):
            record.log(step, {**odd, "loss": 1.0})
    assert lines(tmp_path) == [{"global_step": step, "loss": 1.0} for step in range(2)]
    (warning,) = caplog.records
    assert all(name in warning.getMessage() for name in ("'object'", "5", "'array'", "'inner'", "'deep'"))


def test_non_finite_values_and_broken_text_are_valid_json(tmp_path):
    record = Logger(tmp_path, {}, mode="disabled")
    record.log(1, {"a": math.nan, "b": math.inf, "c": [torch.tensor(-math.inf)], "d": "\udc80\n"})
    (line,) = lines(tmp_path)
    assert line == {"global_step": 1, "a": "NaN", "b": "Infinity", "c": ["-Infinity"], "d": "\udc80\n"}
    assert float(line["c"][0]) == -math.inf and math.isnan(float(line["a"]))


def test_resumed_file_equals_that_of_an_uninterrupted_run(tmp_path):
    def log(folder, steps, **kwargs):
        record = Logger(folder, {}, mode="disabled", **kwargs)
        for step in steps:
            record.log(step, {"loss": 1 / (1 + step)})
        record.finish()

    log(tmp_path / "whole", range(10))
    log(tmp_path / "cut", range(7))
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"global_step": 7, "lo')
    log(tmp_path / "cut", range(5, 10), resume_step=4)
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    log(tmp_path / "cut", [10])  # no step to resume from: all lines stay
    assert [line["global_step"] for line in lines(tmp_path / "cut")] == [*range(11)]
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["metrics.jsonl"]


def test_media_are_listed(tmp_path):
    record = Logger(tmp_path, {}, mode="disabled")
    record.videos(2, "validation/videos", [(tmp_path / "samples" / "a.mp4", "0: a cat"), ("/elsewhere/b.mp4", "b")])
    record.image(2, "sheet", tmp_path / "sheet.png")
    videos, image = lines(tmp_path)
    assert videos["validation/videos"] == [
        {"path": "samples/a.mp4", "caption": "0: a cat"},
        {"path": "/elsewhere/b.mp4", "caption": "b"},
    ]
    assert image == {"global_step": 2, "sheet": "sheet.png"}


def test_redaction():
    config = {
        "api_key": "k1",
        "hub": {"hf-token": "k2", "url": "https://me:k3@host/x"},
        "list": [{"PASSWORD": "k4"}],
        "tokens": {"patch_size": (1, 1, 1)},
        "max_tokens": 7,
        "secret": None,
        "path": Path("a/b"),
    }
    clean = redact(config)
    assert not any(secret in json.dumps(clean) for secret in ("k1", "k2", "k3", "k4"))
    assert clean["tokens"] == {"patch_size": [1, 1, 1]} and clean["max_tokens"] == 7
    assert clean["secret"] is None and clean["path"] == "a/b" and clean["hub"]["url"] == "https://[redacted]@host/x"


def test_mode_follows_key_netrc_and_environment(monkeypatch, tmp_path):
    assert logger._mode("auto") == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key\n")
    assert logger._mode("auto") == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example:8080")
    assert logger._mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert logger._mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert logger._mode("auto") == "disabled"
    assert logger._mode("offline") == "offline"


OFFLINE = """
import random, sys
from pathlib import Path
import numpy as np
from stgen.logger import Logger
run_dir = Path(sys.argv[1])
random.seed(0); np.random.seed(0)
record = Logger(run_dir, {"api_key": "k" * 40, "model": {"width": 7}}, project="p", run_id="abcd1234")
(run_dir / "a.mp4").write_bytes(b"not decoded")
record.log(1, {"loss": 0.5, "odd": object(), "nan": float("nan")})
record.videos(1, "validation/videos", [(run_dir / "a.mp4", "0: a cat")])
record.summary({"loss": 0.5})
print(record.where)
record.finish()
print(record.where, random.random(), np.random.rand())
"""


def test_offline(tmp_path):
    code = f"import sys; sys.argv[1:] = [{str(tmp_path)!r}]\n{OFFLINE}"
    output, _ = run(code, WANDB_API_KEY="", HOME=str(tmp_path / "home"))
    (folder,) = (tmp_path / "wandb").glob("offline-run-*-abcd1234")
    assert output.count(f"wandb sync {folder}") == 2
    assert "W&B is off" not in output
    random.seed(0), np.random.seed(0)
    assert output.split()[-2:] == [str(random.random()), str(np.random.rand())]  # the run's own draws are untouched
    assert [path.read_bytes() for path in folder.rglob("*.mp4")] == [b"not decoded"]
    (log,) = folder.glob("run-abcd1234.wandb")
    assert b"validation/videos" in log.read_bytes() and b"kkkk" not in log.read_bytes()
    assert [list(line) for line in lines(tmp_path)] == [
        ["global_step", "loss", "nan"],
        ["global_step", "validation/videos"],
    ]


KILLED_CORE = """
import os, signal, sys, time
from pathlib import Path
from stgen.logger import Logger
record = Logger(sys.argv[1], {}, mode="offline")
record.log(0, {"a": 0})
for child in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
    try:
        processes = child.read_text().split()
    except FileNotFoundError:  # a thread that ended meanwhile
        continue
    for process in processes:
        if "wandb" in Path(f"/proc/{process}/comm").read_text():
            os.kill(int(process), signal.SIGKILL)
            print("killed")
time.sleep(0.3)
for step in range(1, 20):
    record.log(step, {"a": step})
    time.sleep(0.01)
record.finish()
print(record.where)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the service process through /proc")
def test_killed_service_costs_one_warning_and_no_step(tmp_path):
    output, seconds = run(f"import sys; sys.argv[1:] = [{str(tmp_path)!r}]\n{KILLED_CORE}")
    assert "killed" in output
    assert output.count("W&B is off for the rest of this run") == 1
    assert "W&B disabled" in output.splitlines()[-1]
    assert [line["global_step"] for line in lines(tmp_path)] == [*range(20)]
    assert seconds < 30


class FakeWandb:
    """Stands in for the package: `fail` names what raises, `hang` what never returns."""

    def __init__(self, fail=(), hang=()):
        self.fail, self.hang, self.modes, self.logged = fail, hang, [], []
        self.settings = type("", (), {"mode": "offline", "sync_dir": "folder"})

    def Settings(self, **_):
        return None

    def init(self, mode, **_):
        self.modes.append(mode)
        self.do(f"init {mode}")
        return self

    def do(self, name):
        while name in self.hang:
            time.sleep(0.05)
        if name in self.fail:
            raise ConnectionError(name)

    def define_metric(self, *_, **__):
        pass

    def log(self, metrics):
        self.do("log")
        self.logged.append(metrics)

    def finish(self):
        self.do("finish")

    def teardown(self):
        self.do("teardown")


@pytest.mark.parametrize(
    "mode, fake, modes, where, warnings",
    [
        ("online", {"fail": ["init online"]}, ["online", "offline"], "wandb sync folder", ["logging offline"]),
        ("online", {"fail": ["init online", "init offline"]}, ["online", "offline"], "disabled", ["offline", "is off"]),
        ("offline", {"fail": ["init offline"]}, ["offline"], "disabled", ["is off"]),
        ("offline", {"fail": ["log"]}, ["offline"], "disabled", ["is off"]),
        ("offline", {"fail": ["finish"]}, ["offline"], "disabled", ["is off"]),
        ("offline", {"hang": ["init offline"]}, ["offline"], "disabled", ["has not started", "calls are waiting"]),
        ("offline", {"hang": ["log"]}, ["offline"], "disabled", ["calls are waiting"]),
        ("offline", {"hang": ["finish"]}, ["offline"], "disabled", ["did not finish"]),
        ("offline", {"hang": ["finish", "teardown"]}, ["offline"], "disabled", ["did not finish"]),
    ],
)
def test_failing_or_hanging_wandb_never_stops_the_run(
    tmp_path, monkeypatch, caplog, mode, fake, modes, where, warnings
):
    wandb = FakeWandb(**fake)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(logger, "START_SECONDS", 0.3)
    monkeypatch.setattr(logger, "FINISH_SECONDS", 0.3)
    monkeypatch.setattr(logger, "QUEUE_LENGTH", 5)
    start = time.monotonic()
    with caplog.at_level(logging.WARNING):
        record = Logger(tmp_path, {}, mode=mode)
        for step in range(20):
            record.log(step, {"a": step})
            time.sleep(0.002)
        record.finish()
    wandb.hang = ()  # lets the threads end
    assert time.monotonic() - start < 3
    assert wandb.modes == modes
    assert where in record.where
    assert [line["global_step"] for line in lines(tmp_path)] == [*range(20)]
    assert len(caplog.records) == len(warnings)
    assert all(part in record.getMessage() for part, record in zip(warnings, caplog.records, strict=True))


UNREACHABLE = """
import socket, sys, os, time
from stgen.logger import Logger
if sys.argv[2] == "silent":  # accepts connections and never answers
    server = socket.socket(); server.bind(("127.0.0.1", 0)); server.listen(50)
    os.environ["WANDB_BASE_URL"] = "http://127.0.0.1:%d" % server.getsockname()[1]
start = time.monotonic()
record = Logger(sys.argv[1], {})
print("started", time.monotonic() - start, record.where)
record.log(1, {"a": 1})
start = time.monotonic()
record.finish()
print("finished", time.monotonic() - start)
"""


@pytest.mark.slow
@pytest.mark.parametrize("server", ["refusing", "silent"])
def test_unreachable_server_delays_the_start_by_less_than_15_s(tmp_path, server):
    output, seconds = run(
        f"import sys; sys.argv[1:] = [{str(tmp_path)!r}, {server!r}]\n{UNREACHABLE}",
        WANDB_BASE_URL="http://127.0.0.1:9",
        WANDB_API_KEY="f" * 40,
        HOME=str(tmp_path / "home"),
    )
    said = {line.split()[0]: line for line in output.splitlines()}
    assert float(said["started"].split()[1]) < 15
    assert "wandb sync" in said["started"]
    assert output.count("W&B cannot be reached, logging offline") == 1
    assert lines(tmp_path) == [{"global_step": 1, "a": 1}]
    assert float(said["finished"].split()[1]) < 5
    assert seconds < 30  # the end of the process included


DYING = """
import http.server, json, os, sys, threading, time
from stgen.logger import Logger
dead = threading.Event()

class Server(http.server.BaseHTTPRequestHandler):
    \"""Answers what wandb.init asks, until it is dead.\"""

    def do_POST(self):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        if dead.is_set():
            time.sleep(300)
        project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
        bucket = {"id": "x", "name": "abcd1234", "config": "{}", "project": project, "historyLineCount": 0}
        answer = {"viewer": {"id": "v", "entity": "e", "flags": "{}"}, "upsertBucket": {"bucket": bucket}}
        body = json.dumps({"data": answer}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST

    def log_message(self, *_):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
server.daemon_threads = True
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["WANDB_BASE_URL"] = f"http://127.0.0.1:{server.server_port}"
record = Logger(sys.argv[1], {}, run_id="abcd1234")
print("where", record.where)
dead.set()
slowest = 0.0
for step in range(50):
    start = time.monotonic()
    record.log(step, {"a": step})
    slowest = max(slowest, time.monotonic() - start)
start = time.monotonic()
record.finish()
print("slowest", slowest, "finished", time.monotonic() - start)
"""


@pytest.mark.slow
def test_server_that_dies_mid_run_delays_the_end_by_at_most_30_s(tmp_path):
    output, seconds = run(
        f"import sys; sys.argv[1:] = [{str(tmp_path)!r}]\n{DYING}",
        WANDB_API_KEY="f" * 40,
        HOME=str(tmp_path / "home"),
    )
    assert "where W&B: http://127.0.0.1" in output
    slowest, finished = (float(output.split(f"{word} ")[1].split()[0]) for word in ("slowest", "finished"))
    assert slowest < 0.1
    assert finished < 31
    assert seconds < 40
    assert [line["global_step"] for line in lines(tmp_path)] == [*range(50)]
