"""A folder of videos as training clips: probed, given the size that suits each, and read as the seed alone decides.

What the folder holds is found by `stgen.listing`; the order of clips is `stgen.samplers`. What cannot be used is
recorded with its reason; nothing is skipped in silence.
"""

import copy
import json
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

from stgen import samplers, video
from stgen.listing import DataError, Entry, Found, Moment, Reject, find, json_object
from stgen.listing import captions as captions
from stgen.members import Member
from stgen.samplers import Key, Sampler, data_generator
from stgen.samplers import StepSampler as StepSampler
from stgen.samplers import split as split
from stgen.sizes import Size, best

REPLACEMENTS = 20  # videos tried in place of one that cannot be read
POLL = 3.0  # seconds after which a worker's death is noticed


@dataclass(frozen=True)
class Sample:
    """A clip, or what clips are drawn from: the frames from `first` up to `last`, not included, of a file."""

    path: Path | Member
    caption: str
    info: video.Info  # of the whole file
    name: str  # unlike all others; of a whole file its path relative to the folder
    size: int  # which of the folder's sizes its clips have
    first: int
    last: int
    weight: float = 1.0
    held_out: bool | None = None  # as metadata says; None where it says nothing


# --------------------------------------------------------------------------------------------------------- the clips


class VideoFolder(Dataset):
    """The clips of a folder of videos. `dataset[index, epoch]` is a pure function of its arguments and the files.

    samples     what can be used, in an order that is the same on every machine
    rejects     what cannot, with reasons
    uncaptioned how many samples have an empty caption
    sizes       sizes of clips; each sample has the one that suits it best

    num_frames, height, width: size of a clip, where `sizes` does not give several. Images are clips where a size has
    one frame. fps: frames per second of a clip; None keeps each file's own. crop: "center" or "random". clip: "start" or
    "random", the span of a longer video. found: what there is; None looks below `root`. Raises DataError if there is no
    usable video, or if more than max_reject_fraction of the folder cannot be used.
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
        sizes: Sequence[Size] = (),
        found: Found | None = None,
    ):
        self.root, self.seed, self.fps, self.crop, self.clip = Path(root), seed, fps, crop, clip
        self.sizes = tuple(sizes) or (Size(num_frames, height, width),)
        found = find(self.root) if found is None else found
        self.samples: list[Sample] = []
        self.rejects = found.rejects
        names = found.videos
        if any(size.num_frames == 1 for size in self.sizes):
            names = sorted(found.videos + found.images)
        elif sizes:
            reason = "is an image; add a bucket of num_frames: 1 to data.buckets"
            self.rejects += [Reject(name, reason) for name in found.images]
        self._probe_all(found.entries(self.root, names), progress)
        self._check_usable(max_reject_fraction, len(found.images))
        self._leave_out_weightless()
        self.uncaptioned = sum(not sample.caption for sample in self.samples)
        self.pool: Sequence[int] = range(len(self.samples))
        self.reading: Any = ()  # for each worker process the sample it reads, or -1; `loader` shares it with them

    def __len__(self) -> int:
        return len(self.samples)

    def within(self, indices: Sequence[int]) -> "VideoFolder":
        """The same dataset, replacing unreadable videos by those of `indices` only: a split stays a split."""
        other = copy.copy(self)
        other.pool = tuple(indices)
        return other

    def name(self, index: int) -> str:
        """The name of a sample: its path relative to the folder, and its span where metadata gives one."""
        return self.samples[index].name

    def identity(self, index: int) -> str:
        """Its name and what metadata says of it: all that decides the order of clips and what is held out."""
        sample = self.samples[index]
        weight = "" if sample.weight == 1 else f" x{sample.weight!r}"
        return sample.name + weight + {None: "", True: " held out", False: " train"}[sample.held_out]

    @property
    def rate(self) -> float:
        """Frames per second of a clip: as asked, else of the first video."""
        rates = (sample.info.fps for sample in self.samples if not video.is_image(sample.path))
        return self.fps or next(rates, video.FOLDER_FPS)

    def by_size(self, indices: Iterable[int]) -> list[list[int]]:
        """The samples of each size, in their order."""
        groups: list[list[int]] = [[] for _ in self.sizes]
        for index in indices:
            groups[self.samples[index].size].append(index)
        return groups

    def split(self, held_out: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(training, held-out) indices, ascending: as metadata says, or if it says nothing, `held_out` drawn by the seed.

        Of several sizes each gives its share, and at most a tenth.
        """
        if any(sample.held_out is not None for sample in self.samples):
            held = tuple(i for i, sample in enumerate(self.samples) if sample.held_out)
            if len(held) == len(self):
                raise DataError(f"{self.root}: the column split holds every usable clip out; write train for some")
            return tuple(sorted({*range(len(self))} - {*held})), held
        train, held = [], []
        for group in self.by_size(range(len(self))):
            share = round(held_out * len(group) / len(self))
            for chosen, places in zip((train, held), samplers.split(len(group), share, self.seed), strict=True):
                chosen += [group[place] for place in places]
        return tuple(sorted(train)), tuple(sorted(held))

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
        for attempt, candidate in enumerate(self.candidates(index, epoch)):
            try:
                with self.noted(candidate):
                    frames = self._frames(candidate, data_generator(self.seed, index, epoch, attempt))
            except video.VideoError as error:
                rejects.append(Reject(self.name(candidate), error.reason))
                continue
            caption = self.samples[candidate].caption
            return {"frames": frames, "caption": caption, "path": self.name(candidate), "rejects": rejects}
        tried = "; ".join(f"{path}: {reason}" for path, reason in rejects)
        raise RuntimeError(f"none of {len(rejects)} videos can be read any more: {tried}")

    def frames(self, index: int, epoch: int) -> torch.Tensor:
        """The clip itself, uint8 [3, T, H, W], as `dataset[index, epoch]` has it. Raises VideoError: no other stands for it."""
        return self._frames(index, data_generator(self.seed, index, epoch, 0))

    @contextmanager
    def noted(self, index: int) -> Iterator[None]:
        """Within it the trainer can see what this worker reads, should it die or never come back."""
        worker = get_worker_info()
        if worker is None or not self.reading:
            yield
            return
        self.reading[worker.id] = index
        try:
            yield
        finally:
            self.reading[worker.id] = -1

    def candidates(self, index: int, epoch: int) -> Iterator[int]:
        """The sample itself, then those that may stand for it should it not be readable."""
        yield index
        size = self.samples[index].size
        others = [other for other in self.pool if other != index and self.samples[other].size == size]
        order = torch.randperm(len(others), generator=data_generator(self.seed, index, epoch, "replacement"))
        yield from (others[i] for i in order[:REPLACEMENTS].tolist())

    def _frames(self, index: int, generator: torch.Generator) -> torch.Tensor:
        """One clip of a video: uint8 [3, T, H, W]."""
        sample = self.samples[index]
        size = self.sizes[sample.size]
        free = sample.last - sample.first - self.span(sample.info, size)
        start = sample.first + (_draw(free, generator) if self.clip == "random" else 0)
        clip = video.read(sample.path, start, size.num_frames, self._step(sample.info))
        frames = fit(clip.frames, size.height, size.width, generator if self.crop == "random" else None)
        return frames.transpose(0, 1).contiguous()  # [3, T, H, W]

    def _step(self, info: video.Info) -> float:
        return info.fps / self.fps if self.fps else 1.0

    def span(self, info: video.Info, size: Size) -> int:
        """Source frames that a clip reaches over."""
        return video.offsets(size.num_frames, self._step(info))[-1] + 1

    def _probe_all(self, entries: list[Entry], progress: bool) -> None:
        """Sort the clips found into samples and rejects."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            probed = pool.map(self._probe, entries)
            bar = tqdm(probed, "reading video headers", len(entries), delay=1, disable=not progress, leave=False)
            for entry, result in zip(entries, bar, strict=True):
                if isinstance(result, str):
                    self.rejects.append(Reject(entry.name, result))
                else:
                    self.samples.append(result)

    def _probe(self, entry: Entry) -> Sample | str:
        """What the video is, or why it cannot be used."""
        try:
            info = video.probe(entry.path)
        except video.VideoError as error:
            return error.reason
        row = entry.row
        first = _frame_of(row.start, info, 0)
        last = min(info.frames, _frame_of(row.end, info, info.frames))
        spans = [self.span(info, size) for size in self.sizes]
        size = best(info, self.sizes, [span <= last - first for span in spans])
        if size is not None:
            return Sample(entry.path, row.caption, info, entry.name, size, first, last, row.weight, row.held_out)
        key = "data.buckets" if len(self.sizes) > 1 else "data.num_frames"
        length = f"has {info.frames} frames at {info.fps:g} fps"
        length += f", {max(0, last - first)} of them between start and end" if row.span else ""
        return f"{length}; a clip needs {min(spans)} ({key}, data.fps)"

    def _check_usable(self, max_reject_fraction: float, images: int) -> None:
        bad, good = len(self.rejects), len(self.samples)
        reasons = "; ".join(f"{path}: {reason}" for path, reason in self.rejects[:3])
        if not good:
            why = f"{bad} were found and refused, first {reasons}" if bad else f"none of {' '.join(video.SUFFIXES)}"
            why += f"; {images} images train as clips of one frame, data.num_frames: 1" if images and not bad else ""
            raise DataError(
                f"{self.root} holds no usable video ({why}); put videos there or change data.train_data_dir"
            )
        if bad > max_reject_fraction * (bad + good):
            raise DataError(
                f"{self.root}: {bad} of {bad + good} entries cannot be used ({reasons}); "
                f"mend them or raise data.max_reject_fraction above {max_reject_fraction:g}"
            )

    def _leave_out_weightless(self) -> None:
        """Record clips of weight 0, which metadata leaves out, beside the rejects."""
        left_out = [sample.name for sample in self.samples if not sample.weight]
        self.rejects += [Reject(name, "has weight 0 in metadata") for name in left_out]
        self.samples = [sample for sample in self.samples if sample.weight]
        if not self.samples:
            raise DataError(f"{self.root}: every clip has weight 0; give some a weight above it in metadata")


def _frame_of(moment: Moment | None, info: video.Info, default: int) -> int:
    return default if moment is None else moment.frame(info.fps)


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


def _draw(largest: int, generator: torch.Generator) -> int:
    """A whole number from 0 to `largest`, both included."""
    return int(torch.randint(largest + 1, (), generator=generator)) if largest > 0 else 0


# -------------------------------------------------------------------------------------------------------- the loader


class NamedLoader(DataLoader):
    """A DataLoader whose errors say which step and which videos were being read.

    folder: whose videos are read; keys(step): which of them for a step, counted from `first`; limit: seconds that a batch
    may take. Workers are children of the fork server, so that no signal tells of their end: it is noticed when
    `timeout`, which is shorter, has passed.
    """

    def __init__(
        self,
        items: Dataset,
        folder: VideoFolder,
        keys: Callable[[int], Sequence[Key]],
        first: int = 0,
        *,
        limit: float,
        **options: Any,
    ):
        self.folder, self.keys, self.first, self.limit = folder, keys, first, limit
        super().__init__(items, **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        for step in count(self.first):
            try:
                batch = self._next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                names = ", ".join(self.folder.name(index) for index, _ in self.keys(step))
                reading = ", ".join(self.folder.name(index) for index in self.folder.reading if index >= 0)
                reason = str(error).strip().splitlines()[-1]  # of a worker, after its traceback
                reason += f"; being read then: {reading}" if reading else ""
                for worker in getattr(batches, "_workers", ()):  # one that still starts would tell of it at length
                    worker.kill()
                raise DataError(f"no batch for step {step}: {reason}; videos of that batch: {names}") from None
            yield batch

    def _next(self, batches: Iterator[Any]) -> Any:
        """The next batch, asked for again as long as there is time and nothing but time is the matter."""
        began = time.monotonic()
        while True:
            try:
                return next(batches)
            except RuntimeError as error:
                if "DataLoader timed out" not in str(error):
                    raise
                if time.monotonic() - began >= self.limit:
                    raise RuntimeError(f"timed out after {self.limit:g} seconds (data.decode_timeout)") from None


def loader(dataset: VideoFolder, sampler: Sampler, num_workers: int, timeout: float) -> DataLoader:
    """Batches {frames: uint8 [B, 3, T, H, W], caption, path: [str], rejects: [(path, reason)]} of the sampler's steps.

    Endless. Unreadable videos are replaced from the sampler's indices only. Raises RuntimeError naming the videos if
    a worker dies or needs more than `timeout` seconds for a batch; without workers there is no time limit.
    """
    dataset, options = watched(dataset.within(sampler.indices), num_workers, timeout)
    options |= {"batch_sampler": sampler, "collate_fn": collate}
    return NamedLoader(dataset, dataset, sampler.samples, sampler.start_step, **options)


def watched(folder: VideoFolder, num_workers: int, timeout: float) -> tuple[VideoFolder, dict[str, Any]]:
    """The folder, which now tells what its workers read, and the options of a NamedLoader for it."""
    # A generator of its own: left to itself a DataLoader draws its base seed from the run's, once more after a resume.
    options: dict[str, Any] = {"generator": torch.Generator(), "num_workers": num_workers, "limit": timeout}
    folder = copy.copy(folder)
    folder.reading = ()
    if num_workers:
        # The trainer has threads (OpenMP, CUDA, loggers) whose locks a forked child would inherit, held for ever.
        # A fork server has none, and imports the heavy modules once, while the trainer builds its model.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torchvision.transforms.v2", "av", __name__])
        _start_server()
        options |= {"multiprocessing_context": context, "timeout": min(timeout, POLL), "worker_init_fn": _start_worker}
        folder.reading = context.RawArray("q", [-1] * num_workers)
    return folder, options


def _start_server() -> None:
    """Start the fork server, without SIGTERM, as are the workers when they begin: torchrun and others send it to all
    processes of a group, and the trainer still needs a batch to end its step."""
    multiprocessing.resource_tracker.ensure_running()  # starting it ends with SIGTERM let in
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(worker: int) -> None:
    """Signals reach every process of a terminal or group; what to do about them is the trainer's decision alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # (DataLoader has already set the worker's threads to one)
    # In a group of its own a worker may be ended, as a DataLoader ends one that hangs. What has come by now is dropped.
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_trainer, daemon=True).start()


def _end_with_trainer() -> None:
    """End this worker when the trainer is gone, killed perhaps. DataLoader looks at the parent by number, which is the
    fork server, and that lives as long as its workers: each would wait for the other, for ever."""
    if trainer := multiprocessing.parent_process():
        trainer.join()
        os._exit(1)


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
    known = {json_object(line).get("path") for line in lines}
    with open(path, "a", encoding="utf-8") as file:
        for name, reason in rejects:
            if name not in known:
                file.write(json.dumps({"path": name, "reason": reason}) + "\n")
                known.add(name)
