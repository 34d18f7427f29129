"""Checkpoints that are whole or absent: safetensors and JSON with a SHA-256 manifest, never pickle.

    run/checkpoint-1000/  model.safetensors  ema.safetensors  …  state.json  manifest.json

A checkpoint is written to a hidden temporary folder, flushed to disk and renamed; only then are older ones removed. So
`checkpoint-N` always holds the files of one step, and the newest one that verifies is where a run continues.
"""

import hashlib
import json
import logging
import os
import random
import re
import secrets
import shutil
import signal
import stat
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stgen import shards

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
MAX_JSON = 256 * 2**20  # bytes of a JSON file that is read whole
Entry = dict[str, Any]  # {size, sha256} of a file
log = logging.getLogger(__name__)


class CheckpointError(Exception):
    """A checkpoint cannot be written, read or used; the message names the file or the keys."""


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint holds: tensors by group and name, on the CPU."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    path: Path


# ---------------------------------------------------------------------------------------------------------- saving


def save(
    run_dir: str | Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: dict, total_limit: int,
    beside: Callable[[Path], dict[str, Entry]] = lambda _: {},
) -> Path:  # fmt: skip
    """Write `run_dir/checkpoint-{step}` and keep the newest `total_limit` checkpoints; returns its folder.

    tensors: by group, each of which becomes `{group}.safetensors`; state: anything JSON can hold.
    beside: called with the temporary folder, to put more safetensors files there; gives what `write` does (`stgen.saving`).
    A checkpoint of the same step is replaced. One of a later step, left by a run that has since gone back to an earlier
    step, would be taken for the newest: it is renamed to `abandoned-checkpoint-N`.
    Raises CheckpointError (disk full and the like) naming the path, the bytes needed and the bytes free; the temporary
    folder is then gone and earlier checkpoints are as they were.
    """
    run_dir = Path(run_dir)
    final = run_dir / f"checkpoint-{step}"
    with _draft(final, tensors) as temporary:
        _recover(run_dir)
        _write(temporary, step, tensors, state, beside(temporary))
        with _later_aside(run_dir, step):
            _publish(temporary, final)
    _prune(run_dir, total_limit)
    return final


def dump(
    folder: str | Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: dict,
    beside: Callable[[Path], dict[str, Entry]] = lambda _: {},
) -> Path:  # fmt: skip
    """Write a checkpoint under another name than checkpoint-N: none that `latest` finds and none that is removed.

    A run starts from it when it is named: `run.resume_from_checkpoint=FOLDER`. Raises CheckpointError as `save` does.
    """
    folder = Path(folder)
    with _draft(folder, tensors) as temporary:
        _write(temporary, step, tensors, state, beside(temporary))
        _publish(temporary, folder)
    return folder


@contextmanager
def _draft(final: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> Iterator[Path]:
    """A temporary folder beside `final`, gone if writing it fails; what the disk refuses is told with the bytes needed."""
    temporary = final.with_name(f".{final.name}.tmp-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise refusal(final, error, tensors) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def refusal(final: Path, error: Exception, tensors: Mapping[str, Mapping[str, Tensor]]) -> CheckpointError:
    """What the disk said to writing `tensors` to the checkpoint `final`, as a sentence."""
    needed = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
    return CheckpointError(
        f"cannot write {final}: {error} ({needed} bytes needed, {_free(final.parent)} bytes free); "
        f"earlier checkpoints are intact"
    )


def write(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Entry]:
    """A file of each group, flushed to disk; what the manifest says of each. Raises OSError or SafetensorError."""
    for group, named in tensors.items():
        save_file(_plain(named), folder / f"{group}.safetensors")
    return {f"{group}.safetensors": _entry(folder / f"{group}.safetensors") for group in tensors}


def _write(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: dict, others: dict[str, Entry]
) -> None:
    """All files of a checkpoint beside `others`, which are there, the manifest last, each flushed to disk.

    Safetensors keeps its files to their owner; here they are for whom those are that Python writes.
    """
    files = {**others, **write(folder, tensors)}
    (folder / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    files[STATE] = _entry(folder / STATE)
    manifest = {"format": FORMAT, "step": step, "files": dict(sorted(files.items()))}
    (folder / MANIFEST).write_text(_render(manifest), encoding="utf-8")
    rights = stat.S_IMODE((folder / MANIFEST).stat().st_mode)
    for path in folder.iterdir():
        with suppress(OSError):  # some shared disks know no rights
            path.chmod(rights)
    _fsync(folder / MANIFEST)
    _fsync(folder)


def _entry(path: Path) -> Entry:
    """Size and hash of a file, which is flushed to disk."""
    _fsync(path)
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _plain(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors of which no two share storage: others are refused by safetensors."""
    plain, seen = {}, set()
    for name, tensor in named.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return plain


def _publish(temporary: Path, final: Path) -> None:
    """Rename the finished folder into place; a checkpoint of the same step steps aside until that is on disk."""
    aside = final.with_name(f".{final.name}.old-{secrets.token_hex(4)}") if final.exists() else None
    if aside:
        final.rename(aside)
    try:
        temporary.rename(final)
        _fsync(final.parent)
    except OSError:
        if aside and not final.exists():
            aside.rename(final)
        raise
    if aside:
        shutil.rmtree(aside, ignore_errors=True)


def _recover(run_dir: Path) -> None:
    """Finish a replacement that was cut off: a checkpoint that stepped aside returns if no new one took its place."""
    for aside in run_dir.glob(".checkpoint-*.old-*"):
        final = run_dir / aside.name.split(".")[1]
        if final.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            _try(aside.rename, final)


@contextmanager
def _later_aside(run_dir: Path, step: int) -> Iterator[None]:
    """Within it and after it checkpoints of steps after `step` are called `abandoned-…`: they belong to a course the run has
    left. If it fails they are what they were, for one of them may be the only whole one."""
    moved = []
    try:
        for path in [path for number, path in _numbered(run_dir).items() if number > step]:
            aside = run_dir / f"abandoned-{path.name}"
            shutil.rmtree(aside, ignore_errors=True)
            log.warning("%s is of a later step than the one being saved (%d): renamed to %s", path, step, aside.name)
            path.rename(aside)
            moved.append((aside, path))
        yield
    except BaseException:
        for aside, path in moved:
            _try(aside.rename, path)
        raise


def _prune(run_dir: Path, total_limit: int) -> None:
    """Remove complete checkpoints beyond the newest `total_limit`, and temporary folders that a kill left behind.

    The newest is the one just written and hashed. What cannot be removed is left for the next time.
    """
    complete = [path for path in _numbered(run_dir).values() if _complete(path)]
    for path in complete[max(total_limit, 1) :]:
        # Renamed first, so that a kill half-way does not leave a checkpoint-N with files missing.
        _try(path.rename, run_dir / f".{path.name}.tmp-{secrets.token_hex(4)}")
    for stale in run_dir.glob(".checkpoint-*.tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)


def _complete(folder: Path) -> bool:
    """Whether every file is there at its size; the cheap part of verifying."""
    try:
        _check_sizes(folder, _manifest(folder))
    except CheckpointError:
        return False
    return True


def _try(action, *arguments) -> None:
    try:
        action(*arguments)
    except OSError as error:
        log.warning("%s", error)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _free(run_dir: Path) -> int | str:
    try:
        return shutil.disk_usage(run_dir).free
    except OSError:
        return "unknown"


# --------------------------------------------------------------------------------------------------------- loading


def load(path: str | Path, hashes: bool = True) -> Loaded:
    """Read a checkpoint folder after verifying every file against the manifest; without `hashes`, which another process
    has verified, by its size alone.

    Raises CheckpointError naming the file that is missing, cut or changed.
    """
    folder = Path(path)
    manifest = _manifest(folder)
    _check_sizes(folder, manifest)
    for name, entry in manifest["files"].items() if hashes else ():
        if _read(folder / name, _sha256) != entry["sha256"]:
            raise CheckpointError(f"{folder / name}: content differs from what was saved (SHA-256)")
    groups = [folder / name for name in manifest["files"] if name.endswith(".safetensors")]
    files = {file.stem: _read(file, load_file) for file in groups}
    tensors = _read(folder, lambda _: shards.joined(files))
    state = _read(folder / STATE, lambda file: json.loads(file.read_text(encoding="utf-8")))
    if not isinstance(state, dict):
        raise CheckpointError(f"{folder / STATE}: holds no JSON object")
    return Loaded(manifest["step"], tensors, state, folder)


def resolve(run_dir: str | Path, which: str) -> Loaded | None:
    """The checkpoint that a run starts from, or None to start afresh.

    which: `none`; `latest`, the newest one in `run_dir` that verifies, with one warning if newer ones do not; or the
    path of a checkpoint folder or of a run folder (its newest). `latest` where there is no checkpoint yet gives None,
    so that the same command starts a run and continues it. Raises CheckpointError if there are checkpoints but none is
    whole, or if a path holds none.
    """
    if which == "none":
        return None
    if which == "latest":
        return _newest(Path(run_dir))
    path = Path(which)
    if not path.exists():
        _recover(path.parent)
    if _numbered(path) and not (path / MANIFEST).exists():
        return _newest(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint folder")
    return load(path)


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    """Load a state dict strictly; `name` says whose it is.

    Raises one CheckpointError listing every missing, unexpected and misshapen key; the module is then unchanged.
    """
    check_tensors(module.state_dict(), tensors, name)
    module.load_state_dict(dict(tensors))


def check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], name: str) -> None:
    """Raise one CheckpointError listing every missing, unexpected and misshapen key of `found`, and fractions for counts."""
    faults = [f"{key} is missing" for key in expected if key not in found]
    faults += [f"{key} is unexpected" for key in found if key not in expected]
    faults += [
        f"{key} has shape {list(found[key].shape)}, not {list(tensor.shape)}"
        for key, tensor in expected.items()
        if key in found and found[key].shape != tensor.shape
    ]
    faults += [
        f"{key} has type {_kind(found[key])}, not {_kind(tensor)}"
        for key, tensor in expected.items()
        if key in found and found[key].is_floating_point() != tensor.is_floating_point()
    ]
    if faults:
        raise CheckpointError(f"{name}: this checkpoint holds another architecture: {'; '.join(faults)}")


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _newest(run_dir: Path) -> Loaded | None:
    _recover(run_dir)
    faults = []
    for path in _numbered(run_dir).values():
        try:
            loaded = load(path)
        except CheckpointError as error:
            faults.append(str(error))
            continue
        if faults:
            log.warning("%s; continuing from %s", "; ".join(faults), path)
        return loaded
    if faults:
        raise CheckpointError(f"no checkpoint in {run_dir} is whole: {'; '.join(faults)}")
    return None


def _numbered(run_dir: Path) -> dict[int, Path]:
    """The folders checkpoint-N by N, newest first."""
    matches = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in run_dir.glob("checkpoint-*")]
    return dict(sorted(((int(match[1]), path) for match, path in matches if match and path.is_dir()), reverse=True))


def _render(manifest: dict) -> str:
    """The manifest as text, its own SHA-256 in the last key; equal manifests give equal bytes."""
    body = json.dumps(manifest, sort_keys=True)
    return json.dumps({**manifest, "sha256": hashlib.sha256(body.encode()).hexdigest()}, indent=1)


def _manifest(folder: Path) -> dict:
    """The manifest of a checkpoint folder. Raises CheckpointError unless every byte of it is as written."""
    path = folder / MANIFEST
    if not stat.S_ISREG(_read(path, lambda file: file.lstat()).st_mode):
        raise CheckpointError(f"{path}: not a regular file")
    text = _read(path, lambda file: file.read_bytes())
    try:
        manifest = json.loads(text)
        del manifest["sha256"]
        whole = _render(manifest).encode() == text
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise CheckpointError(f"{path}: not the manifest that was saved")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {str(manifest.get('format'))[:80]}, this version reads {FORMAT}")
    _check_entries(path, manifest)
    return manifest


def _check_entries(path: Path, manifest: dict) -> None:
    """A manifest may be anyone's, with its hash in order: the step and the files must be such as `save` writes."""
    step, files = manifest.get("step"), manifest.get("files")
    if type(step) is not int or not 0 <= step < 2**53:
        raise CheckpointError(f"{path}: step {str(step)[:80]!r} is no number of steps")
    if not isinstance(files, dict) or STATE not in files:
        raise CheckpointError(f"{path}: names no {STATE}")
    for name, entry in files.items():
        if not re.fullmatch(r"state\.json|[\w-]+\.safetensors", name):
            raise CheckpointError(
                f"{path}: names {name[:80]!r}, which is outside the checkpoint folder or no file of a checkpoint"
            )
        if (
            not isinstance(entry, dict)
            or type(entry.get("size")) is not int
            or not isinstance(entry.get("sha256"), str)
        ):
            raise CheckpointError(f"{path}: {name}: size and sha256 are wanted")


def _check_sizes(folder: Path, manifest: dict) -> None:
    for name, entry in manifest["files"].items():
        status = _read(folder / name, lambda file: file.lstat())
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would not end, and a link may lead anywhere
            raise CheckpointError(f"{folder / name}: not a regular file; put the file itself there, not a link")
        if status.st_size != entry["size"]:
            raise CheckpointError(f"{folder / name}: {status.st_size} bytes, {entry['size']} were saved")


def _read(path: Path, reader):
    """`reader(path)`, its errors as one CheckpointError that names the file."""
    try:
        if path.suffix == ".json" and path.lstat().st_size > MAX_JSON:
            raise ValueError(f"larger than {MAX_JSON} bytes")
        return reader(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except (OSError, ValueError, TypeError, RecursionError, MemoryError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {error}") from error


# --------------------------------------------------------------------------------------------------- random states


def random_state() -> dict[str, Tensor]:
    """The states of torch's generators (CPU and each CUDA device), of `numpy.random` and of `random`, as integers."""
    state = {"torch": torch.get_rng_state(), "numpy": _numpy_state(), "python": _python_state()}
    if torch.cuda.is_available():
        state |= {f"cuda.{index}": value for index, value in enumerate(torch.cuda.get_rng_state_all())}
    return state


def restore_random_state(tensors: Mapping[str, Tensor]) -> None:
    """Put back what `random_state` gave; CUDA devices that are more or fewer than then are named in one warning.

    Raises CheckpointError if a state is missing or is none, or if there is one of something else.
    """
    known = {"torch", "numpy", "python"}
    if missing := known - set(tensors):
        raise CheckpointError(f"random states missing: {', '.join(sorted(missing))}")
    if odd := [name for name in tensors if name not in known and not re.fullmatch(r"cuda\.\d{1,4}", name)]:
        raise CheckpointError(f"random states of what has none: {', '.join(name[:80] for name in sorted(odd)[:5])}")
    try:
        torch.set_rng_state(tensors["torch"])
        *key, position, has_gauss, gauss = tensors["numpy"].tolist()
        np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), position, has_gauss, _double(gauss)))
        version, *words, has_gauss, gauss = tensors["python"].tolist()
        random.setstate((version, tuple(words), _double(gauss) if has_gauss else None))
    except (RuntimeError, TypeError, ValueError, IndexError, OverflowError, struct.error) as error:
        raise CheckpointError(f"random states: not those of a generator: {error}") from None
    saved = {name for name in tensors if name.startswith("cuda.")}
    present = {f"cuda.{index}" for index in range(torch.cuda.device_count())}
    for name in saved & present:
        torch.cuda.set_rng_state(tensors[name], int(name.removeprefix("cuda.")))
    if saved != present:
        log.warning("random states saved for %d CUDA devices, %d are here", len(saved), len(present))


def _numpy_state() -> Tensor:
    state: Any = np.random.get_state(legacy=False)
    key, position = state["state"]["key"], state["state"]["pos"]
    return torch.tensor([*key.tolist(), position, state["has_gauss"], _bits(state["gauss"])], dtype=torch.int64)


def _python_state() -> Tensor:
    version, words, gauss = random.getstate()
    return torch.tensor([version, *words, gauss is not None, _bits(gauss or 0.0)], dtype=torch.int64)


def _bits(number: float) -> int:
    """The 64 bits of a double as an integer."""
    return struct.unpack("<q", struct.pack("<d", number))[0]


def _double(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]


# --------------------------------------------------------------------------------------------------------- signals


class StopSignals:
    """Within it SIGTERM and SIGINT only set `requested` to the signal's name: the loop ends its step, saves and stops.

    A SIGINT after the first signal raises KeyboardInterrupt, except within `protected()`, so that no save is cut off.
    Outside the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self):
        self.requested: str | None = None
        self._protected = 0
        self._previous = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not set from Python
        self._previous.clear()

    @contextmanager
    def protected(self) -> Iterator[None]:
        """Within it no signal raises."""
        self._protected += 1
        try:
            yield
        finally:
            self._protected -= 1

    def _handle(self, number: int, _frame) -> None:
        again = self.requested is not None and number == signal.SIGINT
        self.requested = self.requested or signal.Signals(number).name
        if again and not self._protected:
            raise KeyboardInterrupt
