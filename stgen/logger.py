"""What a run reports: metrics.jsonl, always, and Weights & Biases, as long as it works.

metrics.jsonl is the record: one JSON object a line, `global_step` first, the keys of W&B. W&B runs on a thread of its
own, so that an outage neither stops nor slows training.
"""

import contextlib
import errno
import json
import logging
import math
import netrc
import os
import queue
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

Mode = Literal["auto", "online", "offline", "disabled"]

START_SECONDS = 15.0  # training waits no longer than this for W&B to start
INIT_SECONDS = 10.0  # of which the server may take so much before offline is tried
FINISH_SECONDS = 30.0  # the end of a run waits no longer than this for W&B
UPLOAD_SECONDS = 20.0  # of which W&B may spend so much on what is not uploaded yet
QUEUE_LENGTH = 10_000  # calls that may wait for W&B before it is given up
# What a disk may refuse at any moment: no room, no quota, a limit on files, read-only, no right, broken.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
SECRETS = {"key", "apikey", "token", "auth", "password", "passwd", "passphrase", "secret", "secrets", "credentials"}

log = logging.getLogger(__name__)


class LogError(Exception):
    """metrics.jsonl cannot be written; one sentence with the file, the reason and what to do."""


class Logger:
    """The metrics of one run.

    mode: `auto` is online where an API key is found (WANDB_API_KEY or netrc), else offline; WANDB_MODE overrides it.
    run_id: the W&B id of the run to continue; a new one is drawn if None.
    resume_step: the step of the checkpoint that the run continues from. Lines of later steps are removed, so that the
    file becomes that of an uninterrupted run; hence log all of a step before saving its checkpoint. None keeps all.
    done: that step was the last. What it logged beside training tells of the end, which the run comes to again: removed too.
    """

    def __init__(
        self,
        run_dir: str | Path,
        config: Mapping[str, Any],
        *,
        mode: Mode = "auto",
        project: str = "stgen",
        group: str | None = None,
        name: str | None = None,
        job_type: Literal["train", "sample", "inspect", "quantise", "ablate"] = "train",
        run_id: str | None = None,
        resume_step: int | None = None,
        done: bool = False,
    ):
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.run_id = run_id or secrets.token_hex(4)
        self._dropped = False
        path = self.run_dir / "metrics.jsonl"
        _keep_lines(path, resume_step, done)
        self._lines = _Lines(path)
        self._remote = None
        chosen = _mode(mode)
        if chosen != "disabled":
            self._remote = _Remote(
                chosen,
                dir=str(self.run_dir),
                config=redact(config),
                project=project,
                group=group,
                name=name or self.run_dir.resolve().name,
                job_type=job_type,
                id=self.run_id,
                resume="allow",
            )

    @property
    def where(self) -> str:
        """Where the run can be seen, as a sentence."""
        return self._remote.where if self._remote else "W&B disabled"

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record metrics of a step: numbers, strings, lists and dicts of them; others are dropped, with one warning."""
        metrics = self._plain(metrics)
        self._line(step, metrics)
        self._call(lambda wandb, run: run.log({"global_step": step, **metrics}))

    def videos(self, step: int, key: str, videos: Sequence[tuple[str | Path, str]]) -> None:
        """Record mp4 files with their captions; the files must stay as they are."""
        self._line(step, {key: [{"path": self._relative(path), "caption": caption} for path, caption in videos]})
        self._call(
            lambda wandb, run: run.log(
                {
                    "global_step": step,
                    key: [wandb.Video(str(path), caption=_caption(text), format="mp4") for path, text in videos],
                }
            )
        )

    def image(self, step: int, key: str, path: str | Path) -> None:
        """Record an image file."""
        self._line(step, {key: self._relative(path)})
        self._call(lambda wandb, run: run.log({"global_step": step, key: wandb.Image(str(path))}))

    def table(self, step: int, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Rows of a table."""
        self._line(step, {key: {"columns": list(columns), "rows": [list(row) for row in rows]}})
        self._call(
            lambda wandb, run: run.log({"global_step": step, key: wandb.Table(columns=list(columns), data=list(rows))})
        )

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set the W&B summary of the run; writes no file."""
        values = self._plain(values)
        self._call(lambda wandb, run: run.summary.update(values))

    def settle(self) -> None:
        """Have every line on disk, those too that it refused before. Raises LogError if it still refuses."""
        self._lines.settle()

    def finish(self) -> None:
        """Close the file and W&B; waits at most 30 s for the latter. Nothing can be logged afterwards."""
        self._lines.close()
        if self._remote:
            self._remote.finish()

    def _line(self, step: int, metrics: Mapping[str, Any]) -> None:
        line = {"global_step": step, **{key: value for key, value in metrics.items() if key != "global_step"}}
        self._lines.add(json.dumps(_speakable(line), ensure_ascii=False, allow_nan=False))

    def _call(self, function: Callable[[Any, Any], Any]) -> None:
        if self._remote:
            self._remote.call(function)

    def _plain(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """The metrics as plain Python values, without those that JSON cannot hold."""
        plain, odd = {}, []
        for key, value in metrics.items():
            try:
                plain[_name(key)] = _value(value)
            except (TypeError, ValueError, RuntimeError):
                odd.append(f"{key!r} ({type(value).__name__})")
        if odd and not self._dropped:
            self._dropped = True
            log.warning("metrics that cannot be logged are dropped: %s", ", ".join(odd))
        return plain

    def _relative(self, path: str | Path) -> str:
        """The path as seen from the run folder, if it lies in it."""
        path, folder = Path(path).resolve(), self.run_dir.resolve()
        return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


class _Lines:
    """A file that lines are added to. Those that the disk refuses wait and are written, whole and in order, with a later
    one: a disk that is full for a while costs no line and no step."""

    def __init__(self, path: Path):
        self._path, self._waiting, self._warned = path, [], False
        self._file = path.open("ab", buffering=0)

    def add(self, line: str) -> None:
        self._waiting.append(line.encode("utf-8", "backslashreplace") + b"\n")  # so written, JSON reads it back
        try:
            self._write()
        except OSError as error:
            if not self._warned:
                self._warned = True
                log.warning("%s: %s; its lines wait in memory and are tried again", self._path, error.strerror)

    def settle(self) -> None:
        """Raises LogError while lines are refused."""
        try:
            self._write()
        except OSError as error:
            raise LogError(
                f"{self._path}: {(error.strerror or str(error)).lower()}; {len(self._waiting)} lines could not be written. "
                "Checkpoints written before are whole: make room and go on with run.resume_from_checkpoint=latest"
            ) from None

    def close(self) -> None:
        """Try once more what is waiting, and close the file whether that helps or not."""
        if self._file.closed:
            return
        try:
            self._write()
        except OSError as error:
            log.warning("%s: %s; its last %d lines are lost", self._path, error.strerror, len(self._waiting))
        with contextlib.suppress(OSError):
            self._file.close()

    def _write(self) -> None:
        """Add what is waiting; what a full disk took of a line is taken back, so that no half line stays."""
        while self._waiting:
            size = os.fstat(self._file.fileno()).st_size
            try:
                if self._file.write(self._waiting[0]) != len(self._waiting[0]):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with contextlib.suppress(OSError):
                    os.truncate(self._file.fileno(), size)
                raise
            self._waiting.pop(0)


class _Remote:
    """W&B on its own thread: calls wait in a queue, and the first that fails or a queue that fills up ends it."""

    def __init__(self, mode: str, **init: Any):
        self.where = "W&B disabled"
        self._alive = True
        self._ready = threading.Event()
        self._queue: queue.Queue[Callable[[Any, Any], Any] | None] = queue.Queue(QUEUE_LENGTH)
        self._thread = threading.Thread(target=self._work, args=(mode, init), name="wandb", daemon=True)
        self._thread.start()
        if not self._ready.wait(START_SECONDS):
            self.where = "W&B did not start"
            log.warning("W&B has not started within %.0f s; training goes on, its calls wait", START_SECONDS)

    def call(self, function: Callable[[Any, Any], Any] | None) -> None:
        """Have `function(wandb, run)` called when its turn comes; None ends the run."""
        if self._alive:
            try:
                self._queue.put_nowait(function)
            except queue.Full:
                self._give_up(f"{QUEUE_LENGTH} calls are waiting for it")

    def finish(self) -> None:
        if self._alive:
            self.call(None)
            self._thread.join(FINISH_SECONDS)
            if self._thread.is_alive():
                self._give_up(f"it did not finish within {FINISH_SECONDS:.0f} s")

    def _work(self, mode: str, init: dict[str, Any]) -> None:
        run = None
        # W&B's own telemetry would hold up the end of the process by 20 s if the server does not answer.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            import wandb

            run = _start(wandb, mode, init)
            if self._alive:
                self.where = _where(run)
            self._ready.set()
            while self._alive and (function := self._queue.get()):
                function(wandb, run)
            folder, began = run.settings.sync_dir, time.monotonic()
            run.finish()
            if self._alive and time.monotonic() - began >= UPLOAD_SECONDS:  # W&B itself says nothing of it
                self.where += f" (not all of it arrived; upload the rest with: wandb sync {folder})"
        except BaseException as error:  # even SystemExit, which must not end the thread unsaid
            self._give_up(_one_line(error))
        finally:
            self._ready.set()

    def _give_up(self, reason: str) -> None:
        if self._alive:
            self._alive = False
            self.where = f"W&B disabled ({reason})"
            log.warning("W&B is off for the rest of this run, metrics.jsonl goes on: %s", reason)
            _teardown()


def _start(wandb: Any, mode: str, init: dict[str, Any]) -> Any:
    """A W&B run, offline if online fails."""
    settings = wandb.Settings(
        console="off",
        silent=True,
        save_code=False,
        disable_code=True,
        init_timeout=INIT_SECONDS,
        finish_timeout=UPLOAD_SECONDS,
    )
    try:
        run = wandb.init(mode=mode, settings=settings, **init)
    except Exception as error:
        if mode == "offline":
            raise
        log.warning("W&B cannot be reached, logging offline: %s", _one_line(error))
        _teardown()
        run = wandb.init(mode="offline", settings=settings, **init)
    run.define_metric("global_step")
    run.define_metric("*", step_metric="global_step")
    return run


def _where(run: Any) -> str:
    if run.settings.mode == "online":
        return f"W&B: {run.url}"
    folder = run.settings.sync_dir
    return f"W&B offline in {folder}; upload it with: wandb sync {folder}"


def _teardown() -> None:
    """Part with W&B's service process, which would else keep the end of this process waiting for a dead server."""

    def teardown() -> None:
        with contextlib.suppress(Exception):
            sys.modules["wandb"].teardown()

    thread = threading.Thread(target=teardown, name="wandb teardown", daemon=True)
    thread.start()
    thread.join(1.0)  # enough for the message; the process then ends by itself


def _mode(mode: Mode) -> str:
    if mode != "auto":
        return mode
    if (wanted := os.environ.get("WANDB_MODE")) in ("online", "offline", "disabled"):
        return wanted
    return "online" if os.environ.get("WANDB_API_KEY") or _in_netrc() else "offline"


def _in_netrc() -> bool:
    """Whether netrc holds a key for the W&B server."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def redact(value: Any, key: str = "") -> Any:
    """The config without secrets: values of keys such as `api_key` or `hf_token`, passwords and keys within URLs, and the
    values of environment variables that are named so, wherever they were copied to."""
    if value is not None and _is_secret(key):
        return "[redacted]"
    if isinstance(value, Mapping):
        return {str(name): redact(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact(inner) for inner in value]
    if isinstance(value, str | os.PathLike):
        return _redacted(str(value))
    return value


def _redacted(text: str) -> str:
    text = re.sub(r"://[^/@\s]+@", "://[redacted]@", text)
    text = re.sub(r"(?i)([?&;]([\w-]+)=)[^&;#\s]+", lambda m: m[1] + "[redacted]" if _is_secret(m[2]) else m[0], text)
    text = re.sub(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{6,}", r"\1 [redacted]", text)
    for name, own in os.environ.items():
        if len(own) >= 8 and own in text and _is_secret(name):
            text = text.replace(own, "[redacted]")
    return text


def _is_secret(name: str) -> bool:
    return bool(SECRETS & set(re.split(r"[^a-z]+", name.lower())))


def _keep_lines(path: Path, last_step: int | None, done: bool) -> None:
    """Remove lines of steps after `last_step`, of it too what tells of the end if it was the last, and what a kill left
    half-written, in one atomic rewrite."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _is_kept(line, last_step, done)]
    if kept != lines:
        temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
        temporary.write_bytes(b"".join(kept))
        temporary.replace(path)


def _is_kept(line: bytes, last_step: int | None, done: bool) -> bool:
    try:
        metrics = json.loads(line)
        step = metrics["global_step"]
        of_the_end = done and step == last_step and "train/loss" not in metrics
        return line.endswith(b"\n") and (last_step is None or step <= last_step) and not of_the_end
    except (ValueError, KeyError, TypeError):
        return False


def _caption(text: str) -> str:
    """A caption as a page can show it: one line of at most 300 characters, without markup or signs that cannot be shown."""
    shown = "".join(c if c.isprintable() else " " for c in text[:300].replace("<", "‹").replace(">", "›"))
    return " ".join(shown.split())


def _name(key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(f"{key!r} is not a name")
    return key


def _value(value: Any) -> Any:
    """A plain Python value; one-element tensors and arrays become numbers. Raises TypeError or ValueError."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {_name(key): _value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_value(inner) for inner in value]
    if hasattr(value, "item"):
        return _value(value.item())
    raise TypeError(f"{type(value).__name__} cannot be logged")


def _speakable(value: Any) -> Any:
    """NaN and infinities, which JSON lacks, as the strings "NaN", "Infinity" and "-Infinity"; float() reads them."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _speakable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_speakable(inner) for inner in value]
    return value


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
