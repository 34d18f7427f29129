"""Tensors kept in a folder, many to a file: safetensors shards, each with a JSON file that says what lies in it.

    FOLDER/stgen-cache.json  clips-3f2a….safetensors  clips-3f2a….json  text-77b0….safetensors  text-77b0….json

A shard is written under a hidden name, flushed and renamed, and its JSON file last: without one it is not there. So a
writer may be killed at any moment and loses the shard it was filling, no more; and several processes, or machines that
share the folder, write side by side, since every shard has a random name of its own.
"""

import json
import os
import secrets
import shutil
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stgen.section import Section

FORMAT = 1
MARKER = "stgen-cache.json"
MAX_JSON = 256 * 2**20  # bytes of a JSON file that is read whole
SHARD_BYTES, SHARD_SECONDS = 256 * 2**20, 60.0  # a shard is closed at this size, and at this age
OPEN_FILES = 64  # mapped at once by a reader
ABANDONED = 3600.0  # seconds after which a file without its JSON belongs to no living writer


class CacheError(Exception):
    """A cache that cannot be written, read or used; one sentence that says what to do."""


class _Index(Section):
    """The JSON file of a shard. Whoever wrote it, nothing is read that is not of this form."""

    format: int
    kind: str
    recipe: dict[str, Any]
    bytes: NonNegativeInt
    entries: list[dict[str, Any]]


@dataclass(frozen=True)
class Shard:
    """One file of tensors, named "0", "1", … in the order of its entries."""

    path: Path  # of the safetensors file
    recipe: dict[str, Any]  # how all of its tensors were made
    entries: list[dict[str, Any]]  # what each of them is
    bytes: int


# ---------------------------------------------------------------------------------------------------------- writing


def prepare(folder: Path) -> None:
    """Make a cache folder, or enter one. Raises CacheError for a folder that holds anything else or another format."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / MARKER).exists():
            # Names that begin with a dot are another machine's marker being written, or the system's.
            if any(entry.name != MARKER and not entry.name.startswith(".") for entry in folder.iterdir()):
                raise CacheError(
                    f"data.cache_dir: {folder} is no cache: it holds files but no {MARKER}; name a new folder"
                )
            _replace(folder / MARKER, json.dumps({"format": FORMAT}).encode())
    except OSError as error:
        raise CacheError(f"data.cache_dir: {folder} cannot be written: {_reason(error)}; choose another") from None
    _check_marker(folder)
    _sweep(folder)


class Writer:
    """Adds tensors of one kind and recipe to a cache, shard by shard; `close` or leaving a `with` finishes the last."""

    def __init__(self, folder: Path, kind: str, recipe: Mapping[str, Any]):
        self.folder, self.kind, self.recipe = folder, kind, dict(recipe)
        self._tensors: list[Tensor] = []
        self._entries: list[dict[str, Any]] = []
        self._size, self._since = 0, 0.0

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def add(self, tensor: Tensor, entry: dict[str, Any]) -> None:
        """Keep `tensor` with what it is, in the narrowest format that loses nothing. Raises CacheError if the disk refuses."""
        if not self._entries:
            self._size, self._since = 0, time.monotonic()
        self._tensors.append(narrow(tensor.detach().cpu()).contiguous())
        self._entries.append(entry)
        self._size += self._tensors[-1].nbytes
        if self._size >= SHARD_BYTES or time.monotonic() - self._since >= SHARD_SECONDS:
            self.close()

    def close(self) -> None:
        """Write what was added since the last shard."""
        if not self._entries:
            return
        path = self.folder / f"{self.kind}-{secrets.token_hex(8)}.safetensors"
        size = save(path, {str(i): tensor for i, tensor in enumerate(self._tensors)})
        index = {"format": FORMAT, "kind": self.kind, "recipe": self.recipe, "bytes": size, "entries": self._entries}
        try:
            _replace(path.with_suffix(".json"), json.dumps(index).encode())
        except OSError as error:
            path.unlink(missing_ok=True)
            raise _refused(self.folder, error, self._size) from None
        self._tensors, self._entries = [], []


def save(path: Path, tensors: Mapping[str, Tensor]) -> int:
    """Write a safetensors file that is whole or absent; its bytes. Raises CacheError if the disk refuses."""
    draft = path.with_name(f".{secrets.token_hex(4)}-{path.name}")
    try:
        save_file(dict(tensors), draft)
        size = _flush(draft)
        os.replace(draft, path)
        return size
    except (OSError, SafetensorError) as error:
        draft.unlink(missing_ok=True)
        raise _refused(path.parent, error, sum(tensor.nbytes for tensor in tensors.values())) from None


def publish(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """`save`, unless another process or machine was first, whose file then stays."""
    draft = path.with_name(f".{secrets.token_hex(4)}-{path.name}")
    save(draft, tensors)
    try:
        os.link(draft, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def narrow(tensor: Tensor) -> Tensor:
    """The tensor in bfloat16 or float16 where that is exact, as it is for what a network computed in them."""
    for dtype in (torch.bfloat16, torch.float16):
        if tensor.dtype == torch.float32 and torch.equal(tensor.to(dtype).float(), tensor):
            return tensor.to(dtype)
    return tensor


def remove(shard: Shard) -> None:
    """Delete a shard, its JSON file first, so that no reader finds half of it."""
    shard.path.with_suffix(".json").unlink(missing_ok=True)
    shard.path.unlink(missing_ok=True)


def _replace(path: Path, content: bytes) -> None:
    draft = path.with_name(f".{secrets.token_hex(4)}-{path.name}")
    try:
        draft.write_bytes(content)
        _flush(draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _flush(path: Path) -> int:
    """Wait until a file is on disk; its size."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def _refused(folder: Path, error: Exception, needed: int) -> CacheError:
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    return CacheError(
        f"{folder}: cannot be written: {_reason(error)} ({needed} bytes needed, {free} bytes free); what was cached before "
        "stays: make room and start again"
    )


def _sweep(folder: Path) -> None:
    """Remove what writers left that were killed while they wrote."""
    whole = {path.stem for path in folder.glob("*-*.json")}
    drafts = [*folder.glob(".*-*.safetensors"), *folder.glob(".*-*.json")]
    halves = [
        path for kind in ("clips", "text") for path in folder.glob(f"{kind}-*.safetensors") if path.stem not in whole
    ]
    for path in [*drafts, *halves]:
        try:
            if time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink()
        except OSError:
            continue  # another process was faster, or may alone


# ---------------------------------------------------------------------------------------------------------- reading


def shards(folder: Path, kind: str) -> Iterator[Shard]:
    """The whole shards of a kind, oldest first; one whose file is absent or cut short is passed over.

    Raises CacheError for a folder that holds no cache, and naming a JSON file that is not ours.
    """
    if not folder.is_dir():
        raise CacheError(f"data.cache_dir: there is no cache at {folder}")
    _check_marker(folder)
    found = sorted(folder.glob(f"{kind}-*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    for path in found:
        index, file = _index(path), path.with_suffix(".safetensors")
        if file.is_file() and not file.is_symlink() and file.stat().st_size == index.bytes:
            yield Shard(file, index.recipe, index.entries, index.bytes)


def _check_marker(folder: Path) -> None:
    try:
        marker = json.loads((folder / MARKER).read_bytes()[:1000])
    except FileNotFoundError:
        raise CacheError(f"data.cache_dir: {folder} is no cache: it holds no {MARKER}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CacheError(f"data.cache_dir: {folder / MARKER} cannot be read: {_reason(error)}") from None
    if marker != {"format": FORMAT}:
        raise CacheError(f"data.cache_dir: {folder} was written by another version of stgen; name a new folder")


def _index(path: Path) -> _Index:
    try:
        if path.is_symlink() or path.stat().st_size > MAX_JSON:
            raise CacheError(f"{path}: a link, or larger than {MAX_JSON} bytes; remove it")
        # The json module takes names of files that are not UTF-8, pydantic's parser does not.
        return _Index.model_validate(json.loads(path.read_bytes()), strict=True)
    except (OSError, ValueError, RecursionError):
        raise CacheError(
            f"{path}: cannot be read as the index of a shard; remove it and its .safetensors file"
        ) from None


class Reader:
    """Tensors of shards, mapped from disk, a few files at a time."""

    def __init__(self):
        self._open: OrderedDict[Path, Any] = OrderedDict()

    def __call__(self, path: Path, number: int) -> Tensor:
        """Tensor `number` of a shard, as float32. Raises CacheError if the file does not hold it."""
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt")
                if len(self._open) > OPEN_FILES:
                    self._open.popitem(last=False)
            self._open.move_to_end(path)
            return self._open[path].get_tensor(str(number)).float()
        except (OSError, SafetensorError) as error:
            raise CacheError(
                f"{path}: damaged ({_reason(error)}); remove it and its .json file, then run stgen data cache again"
            ) from None


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
