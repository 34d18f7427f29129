"""A folder of videos as training clips: found, captioned, probed, and read in an order that only the seed decides.

Captions come from metadata.jsonl or metadata.csv at any level (a column file_name, video or path and a column text,
caption or prompt; names resolve against the metadata file), else from a sidecar name.txt, else are empty.
What cannot be used is recorded with its reason; nothing is skipped in silence.
"""

import copy
import csv
import hashlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import re
import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from stgen import video

FILE_COLUMNS = ("file_name", "video", "path")
CAPTION_COLUMNS = ("text", "caption", "prompt")
METADATA = ("metadata.jsonl", "metadata.csv")
MAX_CAPTION = 2**20  # bytes of a sidecar
MAX_METADATA = 2**31  # bytes of a metadata file
LEADS_OUT = "is a link that leads out of the folder; its words are not read: put the file itself there"
REPLACEMENTS = 20  # videos tried in place of one that cannot be read

Key = tuple[int, int]  # (index, epoch)


class DataError(RuntimeError):
    """Stops the run: one sentence that says what to do."""


@dataclass(frozen=True)
class Sample:
    path: Path
    caption: str
    info: video.Info


class Reject(NamedTuple):
    path: str  # relative to the folder; `metadata.csv:3` for a line of metadata
    reason: str


# ---------------------------------------------------------------------------------------------------- finding videos


@dataclass
class _Found:
    videos: list[str] = field(default_factory=list)  # relative to the root, with forward slashes
    metadata: list[str] = field(default_factory=list)
    captions: dict[str, str] = field(default_factory=dict)
    rejects: list[Reject] = field(default_factory=list)


def captions(root: str | Path) -> dict[Path, str]:
    """Every video below `root`, in order, with its caption ("" where it has none); opens no video.

    Raises DataError if there is no such folder or its metadata cannot be understood.
    """
    found = _find(Path(root))
    return {Path(root, name): found.captions.get(name, "") for name in found.videos}


def _find(root: Path) -> _Found:
    if not root.is_dir():
        raise DataError(f"data.train_data_dir: there is no folder {root}; give one that holds videos")
    found = _Found()
    _walk(root, "", found, set())
    found.videos.sort()
    for name in sorted(found.metadata):
        _read_metadata(root, name, found)
    for name in found.videos:
        if name not in found.captions:
            _read_sidecar(root, name, found)
    return found


def _walk(root: Path, folder: str, found: _Found, seen: set[tuple[int, int]]) -> None:
    """Collect the videos and metadata files below root/folder; each real folder once, so that links cannot loop."""
    try:
        status = (root / folder).stat()
        entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
    except OSError as error:
        found.rejects.append(Reject(folder, f"folder cannot be read: {error.strerror}"))
        return
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    for entry in entries:
        name = f"{folder}/{entry.name}" if folder else entry.name
        if entry.name.startswith("."):
            continue
        if _is_folder(entry):
            if _holds_frames(root / name):
                found.videos.append(name)
            else:
                _walk(root, name, found, seen)
        elif entry.name in METADATA and entry.is_file():
            found.metadata.append(name)
        elif entry.name.lower().endswith(video.SUFFIXES):
            found.videos.append(name)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that points to itself
        return False


def _holds_frames(folder: Path) -> bool:
    try:
        return bool(video.frame_files(folder))
    except OSError:
        return False  # walking into it records why


def _read_sidecar(root: Path, name: str, found: _Found) -> None:
    path = root / name
    sidecar = path.with_name(path.name + ".txt") if path.is_dir() else path.with_suffix(".txt")
    if not sidecar.is_file():  # a FIFO called x.txt would never end
        return
    place = sidecar.relative_to(root).as_posix()
    if _leads_out(root, sidecar, path):
        found.rejects.append(Reject(place, LEADS_OUT))
        return
    if sidecar.stat().st_size > MAX_CAPTION:
        found.rejects.append(Reject(place, f"holds more than {MAX_CAPTION} bytes, too many for a caption"))
        return
    try:
        found.captions[name] = _clean(sidecar.read_text("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        found.rejects.append(Reject(place, f"cannot be read as UTF-8 text: {error}"))


def _leads_out(root: Path, file: Path, of: Path) -> bool:
    """Whether a text is a link to somewhere that is neither in the folder nor beside the video, or text, `of` whose it is.

    Captions are learned, logged and passed on: in a folder from elsewhere a link must not make one of a private file.
    """
    real = file.resolve()
    beside = {file.parent.resolve(), of.resolve().parent if of != file else file.parent.resolve()}
    return not real.is_relative_to(root.resolve()) and real.parent not in beside


def _read_metadata(root: Path, name: str, found: _Found) -> None:
    """Add the captions of one metadata file; a row that cannot be used is rejected with its line."""
    known, folder = set(found.videos), os.path.dirname(name)
    if _leads_out(root, root / name, root / name):
        found.rejects.append(Reject(name, LEADS_OUT))
        return
    if (root / name).stat().st_size > MAX_METADATA:
        raise DataError(f"{root / name} holds more than {MAX_METADATA} bytes; cut it into one file a folder")
    try:
        for line, row in _rows(root / name, name):
            reason = _use_row(row, f"{name}:{line}", folder, known, found.captions)
            if reason:
                found.rejects.append(Reject(f"{name}:{line}", reason))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{root / name} cannot be read ({error}); save it again as UTF-8") from None


def _rows(path: Path, name: str) -> Iterator[tuple[int, dict]]:
    """(line, row) of a metadata file; a row is {} if its line is not a JSON object."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            reader = csv.DictReader(file)
            for columns in (FILE_COLUMNS, CAPTION_COLUMNS):
                if not _column(reader.fieldnames or (), columns, f"{name}:1"):
                    raise DataError(f"{name}:1: no column is called {' or '.join(columns)}; rename one")
            yield from ((reader.line_num, row) for row in reader)
            return
        for line, text in enumerate(file, 1):
            if text.strip():
                yield line, _json_object(text)


def _json_object(text: str) -> dict:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def _column(names: Iterable[str], choices: tuple[str, ...], where: str) -> str | None:
    present = [choice for choice in choices if choice in names]
    if len(present) > 1:
        raise DataError(f"{where}: columns {' and '.join(present)} mean the same; keep one of them")
    return present[0] if present else None


def _use_row(row: dict, where: str, folder: str, known: set[str], captions: dict[str, str]) -> str | None:
    """Put the row's caption into `captions`; the reason if it cannot be used."""
    file_column, caption_column = _column(row, FILE_COLUMNS, where), _column(row, CAPTION_COLUMNS, where)
    if not file_column or not caption_column:
        return f"is not a row with one of {', '.join(FILE_COLUMNS)} and one of {', '.join(CAPTION_COLUMNS)}"
    name, caption = row[file_column], row[caption_column]
    if not isinstance(name, str) or not name:
        return f"{file_column} is not a file name"
    if not isinstance(caption, str | None):
        return f"{caption_column} is not text"
    # Only a name that the walk found is ever opened, so a row cannot point anywhere else.
    target = os.path.normpath(os.path.join(folder, name)).replace(os.sep, "/")
    if reason := _refusal(name, target, known):
        return reason
    if target in captions:
        return f"{name} has a caption already; keep one row a video"
    captions[target] = _clean(caption or "")
    return None


def _refusal(name: str, target: str, known: set[str]) -> str | None:
    if os.path.isabs(name) or re.match(r"[A-Za-z]:[\\/]", name):
        return f"{name} is an absolute path; only paths inside the folder are read"
    if "://" in name:
        return f"{name} is a URL; only files inside the folder are read"
    if target == ".." or target.startswith("../"):
        return f"{name} leaves the folder"
    if target not in known:
        return f"{name}: there is no such video in the folder"
    return None


def _clean(caption: str) -> str:
    """Without outer blanks, and without halves of characters, which no tokenizer or file takes."""
    return caption.strip().encode("utf-8", "replace").decode("utf-8")


# --------------------------------------------------------------------------------------------------------- the clips


class VideoFolder(Dataset):
    """The clips of a folder of videos. `dataset[index, epoch]` is a pure function of its arguments and the files.

    samples     what can be used, in an order that is the same on every machine
    rejects     what cannot, with reasons
    uncaptioned how many samples have an empty caption

    num_frames, height, width: size of a clip. fps: its rate; None keeps each file's own. crop: "center" or "random".
    clip: "start" or "random", the span of a longer video. Raises DataError if there is no usable video, or if more
    than max_reject_fraction of the folder cannot be used.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        num_frames: int,
        height: int,
        width: int,
        fps: float | None = None,
        crop: str = "center",
        clip: str = "random",
        seed: int = 0,
        max_reject_fraction: float = 0.5,
        progress: bool = True,
    ):
        self.root, self.seed, self.fps, self.crop, self.clip = Path(root), seed, fps, crop, clip
        self.num_frames, self.height, self.width = num_frames, height, width
        found = _find(self.root)
        self.samples: list[Sample] = []
        self.rejects = found.rejects
        self._probe_all(found, progress)
        self._check_usable(max_reject_fraction)
        self.uncaptioned = sum(not sample.caption for sample in self.samples)
        self.pool: Sequence[int] = range(len(self.samples))

    def __len__(self) -> int:
        return len(self.samples)

    def within(self, indices: Sequence[int]) -> "VideoFolder":
        """The same dataset, replacing unreadable videos by those of `indices` only: a split stays a split."""
        other = copy.copy(self)
        other.pool = tuple(indices)
        return other

    def name(self, index: int) -> str:
        """The path of a sample relative to the folder."""
        return self.samples[index].path.relative_to(self.root).as_posix()

    def __getitem__(self, key: Key) -> dict[str, Any]:
        """{frames: uint8 [3, T, H, W], caption, path, rejects: [(path, reason)] met in this call}.

        A video that cannot be read is replaced by one drawn from (seed, index, epoch). Raises RuntimeError, plain
        so that it can leave a worker process, when 20 others cannot be read either, or something else goes wrong.
        """
        try:
            return self._first_readable(*key)
        except RuntimeError:
            raise
        except Exception as error:
            raise RuntimeError(f"{self.name(key[0])}: {type(error).__name__}: {error}") from None

    def _first_readable(self, index: int, epoch: int) -> dict[str, Any]:
        rejects = []
        for attempt, candidate in enumerate(self._candidates(index, epoch)):
            try:
                frames = self._frames(candidate, _generator(self.seed, index, epoch, attempt))
            except video.VideoError as error:
                rejects.append(Reject(self.name(candidate), error.reason))
                continue
            caption = self.samples[candidate].caption
            return {"frames": frames, "caption": caption, "path": self.name(candidate), "rejects": rejects}
        tried = "; ".join(f"{path}: {reason}" for path, reason in rejects)
        raise RuntimeError(f"none of {len(rejects)} videos can be read any more: {tried}")

    def _candidates(self, index: int, epoch: int) -> Iterator[int]:
        yield index
        others = [other for other in self.pool if other != index]
        order = torch.randperm(len(others), generator=_generator(self.seed, index, epoch, "replacement"))
        yield from (others[i] for i in order[:REPLACEMENTS].tolist())

    def _frames(self, index: int, generator: torch.Generator) -> torch.Tensor:
        """One clip of a video: uint8 [3, T, H, W]."""
        sample = self.samples[index]
        free = sample.info.frames - self._span(sample.info)
        start = _draw(free, generator) if self.clip == "random" else 0
        clip = video.read(sample.path, start, self.num_frames, self._step(sample.info))
        frames = fit(clip.frames, self.height, self.width, generator if self.crop == "random" else None)
        return frames.transpose(0, 1).contiguous()  # [3, T, H, W]

    def _step(self, info: video.Info) -> float:
        return info.fps / self.fps if self.fps else 1.0

    def _span(self, info: video.Info) -> int:
        """Source frames that a clip reaches over."""
        return video.offsets(self.num_frames, self._step(info))[-1] + 1

    def _probe_all(self, found: _Found, progress: bool) -> None:
        """Sort the videos found into samples and rejects."""
        paths = [self.root / name for name in found.videos]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            probed = pool.map(self._probe, paths)
            bar = tqdm(probed, "reading video headers", len(paths), delay=1, disable=not progress, leave=False)
            for name, path, result in zip(found.videos, paths, bar, strict=True):
                if isinstance(result, str):
                    self.rejects.append(Reject(name, result))
                else:
                    self.samples.append(Sample(path, found.captions.get(name, ""), result))

    def _probe(self, path: Path) -> video.Info | str:
        """What the video is, or why it cannot be used."""
        try:
            info = video.probe(path)
        except video.VideoError as error:
            return error.reason
        needed = self._span(info)
        if info.frames < needed:
            return f"has {info.frames} frames at {info.fps:g} fps; a clip needs {needed} (data.num_frames, data.fps)"
        return info

    def _check_usable(self, max_reject_fraction: float) -> None:
        bad, good = len(self.rejects), len(self.samples)
        reasons = "; ".join(f"{path}: {reason}" for path, reason in self.rejects[:3])
        if not good:
            why = f"{bad} were found and refused, first {reasons}" if bad else f"none of {' '.join(video.SUFFIXES)}"
            raise DataError(
                f"{self.root} holds no usable video ({why}); put videos there or change data.train_data_dir"
            )
        if bad > max_reject_fraction * (bad + good):
            raise DataError(
                f"{self.root}: {bad} of {bad + good} entries cannot be used ({reasons}); "
                f"mend them or raise data.max_reject_fraction above {max_reject_fraction:g}"
            )


def fit(frames: torch.Tensor, height: int, width: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Scale [T, 3, h, w] until it just covers height x width, then cut: [T, 3, H, W].

    The aspect is kept. The cut is in the centre, or where `generator` puts it.
    """
    from torchvision.transforms.v2 import functional as transforms  # two seconds to import, and only workers need it

    scale = max(height / frames.shape[-2], width / frames.shape[-1])
    size = [max(height, round(frames.shape[-2] * scale)), max(width, round(frames.shape[-1] * scale))]
    if size != list(frames.shape[-2:]):
        frames = transforms.resize(frames, size, antialias=True)
    if generator is None:
        return transforms.center_crop(frames, [height, width])
    top, left = _draw(size[0] - height, generator), _draw(size[1] - width, generator)
    return transforms.crop(frames, top, left, height, width)


def _generator(*key: int | str) -> torch.Generator:
    """A generator that depends on `key` alone: not on the process, the worker or the order of calls."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _draw(largest: int, generator: torch.Generator) -> int:
    """A whole number from 0 to `largest`, both included."""
    return int(torch.randint(largest + 1, (), generator=generator)) if largest > 0 else 0


# ---------------------------------------------------------------------------------------------------- order of clips


def split(count: int, held_out: int, seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(training, held-out) indices of `count` samples, ascending; at most a tenth is held out."""
    order = torch.randperm(count, generator=_generator(seed, "split")).tolist()
    held = min(held_out, count // 10)
    return tuple(sorted(order[held:])), tuple(sorted(order[:held]))


class StepSampler:
    """Which clips make up the batch of a step: a pure function, so a run resumes at any step.

    Epochs are seeded permutations laid end to end; batches run on across their borders and drop nothing.
    Iterating gives the batches of start_step, start_step + 1, … for ever, as a DataLoader's batch_sampler.
    """

    def __init__(self, indices: Sequence[int], batch_size: int, seed: int, start_step: int = 0):
        if not indices:
            raise DataError("there is no video to train on; add videos or lower data.held_out_clips")
        self.indices, self.batch_size, self.seed, self.start_step = tuple(indices), batch_size, seed, start_step

    def samples(self, step: int) -> list[Key]:
        """The (index, epoch) pairs of a step, counted from 0."""
        first = step * self.batch_size
        return [self._at(position) for position in range(first, first + self.batch_size)]

    def __iter__(self) -> Iterator[list[Key]]:
        return map(self.samples, count(self.start_step))

    def _at(self, position: int) -> Key:
        epoch, place = divmod(position, len(self.indices))
        return self.indices[_permutation(len(self.indices), self.seed, epoch)[place]], epoch


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(count, generator=_generator(seed, "epoch", epoch)).tolist()


# -------------------------------------------------------------------------------------------------------- the loader


class _NamedLoader(DataLoader):
    """A DataLoader whose errors say which step and which videos were being read."""

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        batches, sampler, dataset = (
            super().__iter__(),
            cast(StepSampler, self.batch_sampler),
            cast(VideoFolder, self.dataset),
        )
        for step in count(sampler.start_step):
            try:
                batch = next(batches)
            except RuntimeError as error:
                names = ", ".join(dataset.name(index) for index, _ in sampler.samples(step))
                reason = str(error).strip().splitlines()[-1]  # of a worker, after its traceback
                raise DataError(f"no batch for step {step}: {reason}; videos of that batch: {names}") from None
            yield batch


def loader(dataset: VideoFolder, sampler: StepSampler, num_workers: int, timeout: float) -> DataLoader:
    """Batches {frames: uint8 [B, 3, T, H, W], caption, path: [str], rejects: [(path, reason)]} of the sampler's steps.

    Endless. Unreadable videos are replaced from the sampler's indices only. Raises RuntimeError naming the videos if
    a worker dies or needs more than `timeout` seconds for a batch; without workers there is no time limit.
    """
    # A generator of its own: left to itself a DataLoader draws its base seed from the run's, once more after a resume.
    options: dict[str, Any] = {"generator": torch.Generator()}
    if num_workers:
        # The trainer has threads (OpenMP, CUDA, loggers) whose locks a forked child would inherit, held for ever.
        # A fork server has none, and imports the heavy modules once, while the trainer builds its model.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torchvision.transforms.v2", "av", __name__])
        multiprocessing.forkserver.ensure_running()
        options |= {"multiprocessing_context": context, "timeout": timeout, "worker_init_fn": _start_worker}
    dataset = dataset.within(sampler.indices)
    return _NamedLoader(dataset, batch_sampler=sampler, num_workers=num_workers, collate_fn=collate, **options)


def _start_worker(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; what to do about it is the trainer's decision alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # (DataLoader has already set the worker's threads to one)


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples of VideoFolder -> one batch: frames stacked, strings listed, rejects joined."""
    return {
        "frames": torch.stack([sample["frames"] for sample in samples]),  # [B, 3, T, H, W]
        "caption": [sample["caption"] for sample in samples],
        "path": [sample["path"] for sample in samples],
        "rejects": [reject for sample in samples for reject in sample["rejects"]],
    }


def write_rejects(path: str | Path, rejects: Iterable[tuple[str, str]]) -> None:
    """Append {"path", "reason"} lines to a JSON-lines file, each path once however often it is met."""
    path = Path(path)
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    known = {_json_object(line).get("path") for line in lines}
    with open(path, "a", encoding="utf-8") as file:
        for name, reason in rejects:
            if name not in known:
                file.write(json.dumps({"path": name, "reason": reason}) + "\n")
                known.add(name)
