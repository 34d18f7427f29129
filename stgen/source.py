"""Where training clips come from: the folder, rendered if need be, and its clips as batches of latents."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from stgen import buckets, build, checkpoint, codec, dataset, hub, latent_cache, listing, ranks, schema, shapes, tars
from stgen.config import one_line

FILL = 2**28  # numbers of the clips that data.cache: memory encodes at once


def open_folder(cfg: schema.Config, run_dir: Path) -> tuple[dataset.VideoFolder, shapes.Split | None]:
    """The training folder, rendered first when none is named, and the split of a rendered one."""
    root, found = Path(cfg.data.train_data_dir or run_dir / "data"), None
    if cfg.data.source == "webdataset":
        root, found = tars.find(str(cfg.data.train_data_dir))
    if cfg.data.source == "huggingface":
        root = hub.fetch(str(cfg.data.train_data_dir), cfg.data.huggingface, _fetched(cfg, run_dir))
    if cfg.data.train_data_dir is None:
        shapes.write_folder(
            root,
            clips=cfg.data.shapes.clips,
            held_out=cfg.data.shapes.held_out,
            held_out_seed=cfg.data.shapes.held_out_seed,
            motion=cfg.data.shapes.motion,
            num_frames=cfg.data.num_frames,
            height=cfg.data.height,
            width=cfg.data.width,
            seed=cfg.run.seed,
        )
    folder = dataset.VideoFolder(
        root,
        num_frames=cfg.data.num_frames,
        height=cfg.data.height,
        width=cfg.data.width,
        fps=cfg.data.fps,
        crop=cfg.data.crop,
        clip=cfg.data.clip,
        seed=cfg.run.seed,
        max_reject_fraction=cfg.data.max_reject_fraction,
        sizes=[bucket.size for bucket in buckets.plan(cfg, _codec(cfg))] if cfg.data.buckets else [],
        found=found,
    )
    return folder, shapes.split_of(root)


def known_captions(cfg: schema.Config) -> list[str]:
    """The captions that training would see, without decoding or rendering a video."""
    if cfg.data.train_data_dir is None:
        seen = shapes.split(cfg.data.shapes.held_out, cfg.data.shapes.held_out_seed).seen
        return [combo.prompt for combo in seen]
    if cfg.data.source == "webdataset":
        root, found = tars.find(cfg.data.train_data_dir)
    else:
        root = _fetched(cfg, cfg.output_dir) if cfg.data.source == "huggingface" else Path(cfg.data.train_data_dir)
        found = listing.Found() if cfg.data.source == "huggingface" and not root.is_dir() else listing.find(root)
    lengths = [bucket.num_frames for bucket in cfg.data.buckets] or [cfg.data.num_frames]
    names = found.videos + (found.images if 1 in lengths else [])
    return [entry.row.caption for entry in found.entries(root, names)]


def _fetched(cfg: schema.Config, run_dir: Path) -> Path:
    """Where rows of a Hugging Face dataset are kept."""
    return Path(cfg.data.huggingface.folder or run_dir / "data")


def _codec(cfg: schema.Config) -> codec.Codec:
    """The codec, for the sizes that it takes."""
    component = build.build_codec(cfg)
    component.to(build.device_of(cfg))
    return codec.as_codec(component)


def folder_summary(folder: dataset.VideoFolder, train_ids: Sequence[int], held_ids: Sequence[int]) -> str:
    """One line about the folder: what is used, set aside, rejected and uncaptioned."""
    held_out = f"{len(held_ids)} held out for the loss" if held_ids else "none held out for the loss (too few)"
    line = f"{len(train_ids)} videos to train on, {held_out}"
    if folder.rejects:
        line += f", {len(folder.rejects)} rejected (rejects.jsonl says why)"
    if folder.uncaptioned:
        line += f", {folder.uncaptioned} without a caption"
    return line


def split_as_sampled(cfg: schema.Config, folder: dataset.VideoFolder) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(training, held-out) clips of the size that is sampled: of one size all."""
    size = (cfg.data.num_frames, cfg.data.height, cfg.data.width)
    train, held_out = folder.split(cfg.data.held_out_clips)
    train, held_out = (
        tuple(i for i in ids if folder.sizes[folder.samples[i].size] == size) for ids in (train, held_out)
    )
    return train, held_out


@dataclass
class Batch:
    """Clips of one step."""

    latents: Tensor  # [B, C, t, h, w], float32
    captions: list[str]
    files: list[str]
    first: int | None = None  # the number in the run of its step's first clip; None: step x train.train_batch_size

    def parts(self, count: int) -> Iterator["Batch"]:
        """The batch in `count` equal parts."""
        size = len(self.captions) // count
        for i in range(0, len(self.captions), size):
            yield Batch(self.latents[i : i + size], self.captions[i : i + size], self.files[i : i + size])

    @staticmethod
    def of_sizes(
        folder: dataset.VideoFolder,
        ids: Sequence[int],
        component: Any,
        device: torch.device,
        disk: latent_cache.Latents | None = None,
    ) -> dict[str, "Batch"]:
        """The clips of epoch 0 of the videos `ids`, by their size; from `disk` if there is a cache."""
        groups = zip(folder.sizes, folder.by_size(ids), strict=True)
        return {str(size): Batch.read(folder, group, component, device, disk) for size, group in groups if group}

    @staticmethod
    def of(rows: Sequence[tuple[Tensor, str, str]], device: torch.device) -> "Batch":
        """(latents, caption, file) of each clip, together."""
        latents, captions, files = zip(*rows, strict=True)
        return Batch(torch.stack(latents).to(device), list(captions), list(files))

    @staticmethod
    def read(
        folder: dataset.VideoFolder,
        ids: Sequence[int],
        component: Any,
        device: torch.device,
        disk: latent_cache.Latents | None = None,
    ) -> "Batch":
        """The clips of epoch 0 of the videos `ids`, which are of one size: from `disk`, or decoded and encoded."""
        if len({folder.samples[i].size for i in ids}) > 1:
            raise dataset.DataError(
                "data.buckets: clips of several sizes cannot be one batch here; take one size of clips"
            )
        if disk is not None:
            kept = disk.within(ids)
            return Batch.of([kept[i, 0] for i in ids], device)
        encode, rows = codec.as_codec(component).encode, []
        for item in (folder[i, 0] for i in ids):  # one clip at a time is held as frames
            for name, reason in item["rejects"]:
                ranks.say(one_line(f"{name} cannot be read, {item['path']} stands for it: {reason}"))
            latents = encode(codec.to_unit(item["frames"][None].to(device)))[0]
            rows.append((latents, item["caption"], item["path"]))
        return Batch.of(rows, device)


class Source:
    """Batches of latents as a pure function of seed and step, from memory, from disk or decoded on the way."""

    def __init__(
        self,
        cfg: schema.Config,
        folder: dataset.VideoFolder,
        ids: Sequence[int],
        component: Any,
        device: torch.device,
        run_dir: Path,
    ):
        self.cfg, self.folder, self.device, self.run_dir = cfg, folder, device, run_dir
        self.codec = codec.as_codec(component)
        self.latent_shape = self.codec.latent_shape(cfg.data.num_frames, cfg.data.height, cfg.data.width)
        self.rejects = {reject.path for reject in folder.rejects}  # paths, each counted once
        self.planned = buckets.plan(cfg, self.codec, ranks.size())
        self.buckets = buckets.used(folder, ids, self.planned)  # those with clips, numbered as by the sampler
        sampler = buckets.sampler(cfg, folder, ids, self.planned)
        self.sampler = ranks.shared(sampler, cfg.train.gradient_accumulation_steps)
        self.memory = self._fill(ids) if cfg.data.cache == "memory" else None
        self.disk = self._open_cache(component) if cfg.data.cache == "disk" else None

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Batches from `start_step` on, for ever."""
        if self.disk is not None:
            kept = self.disk.within(self.sampler.indices)
            for step in itertools.count(start_step):
                batch = Batch.of([kept[key] for key in self.sampler.samples(step)], self.device)
                batch.first = self.sampler.seen(step)
                yield batch
        if self.memory is not None:
            for step in itertools.count(start_step):
                batch = Batch.of([self.memory[index] for index, _ in self.sampler.samples(step)], self.device)
                batch.first = self.sampler.seen(step)
                yield batch
        self.sampler.start_step = start_step
        workers, timeout = self.cfg.data.dataloader_num_workers, self.cfg.data.decode_timeout
        items = dataset.loader(self.folder, self.sampler, workers, timeout)
        for step, item in zip(itertools.count(start_step), items, strict=False):
            batch = self._encoded(item)
            batch.first = self.sampler.seen(step)
            yield batch

    def _encoded(self, item: dict[str, Any]) -> Batch:
        new = [reject for reject in item["rejects"] if reject[0] not in self.rejects]
        if new:
            # Of several ranks each has a file of its own: lines that many append to one would mix.
            name = "rejects.jsonl" if ranks.is_first() else f"rejects-{ranks.rank()}.jsonl"
            dataset.write_rejects(self.run_dir / name, new)
            self.rejects |= {path for path, _ in new}
        frames = codec.to_unit(item["frames"].to(self.device))  # [B, 3, T, H, W]
        return Batch(self.codec.encode(frames), item["caption"], item["path"])

    def _open_cache(self, component: Any) -> latent_cache.Latents:
        found = latent_cache.open_latents(self.cfg, self.folder, component)
        if ranks.is_first():
            dataset.write_rejects(self.run_dir / "rejects.jsonl", found.rejects)
        self.rejects |= {path for path, _ in found.rejects}
        if ranks.is_first():
            tqdm.write(f"latents are read from {latent_cache.folder_of(self.cfg)} ({len(found.wanted)} clips)")
        return found

    def _fill(self, ids: Sequence[int]) -> dict[int, tuple[Tensor, str, str]]:
        """One clip of every video, decoded and encoded once: what the first epoch would draw."""
        memory: dict[int, tuple[Tensor, str, str]] = {}
        with tqdm(total=len(ids), desc="encoding clips", unit="clip") as bar:
            for group in filter(None, self.folder.by_size(ids)):
                for kept in self._first_epoch(group):
                    memory.update(kept)
                    bar.update(len(memory) - bar.n)
        return memory

    def _first_epoch(self, ids: Sequence[int]) -> Iterator[dict[int, tuple[Tensor, str, str]]]:
        """Latents, caption and file of the clips `ids`, which are of one size, some at a time."""
        numbers = 3 * math.prod(self.folder.sizes[self.folder.samples[ids[0]].size])  # of one clip
        sampler = dataset.StepSampler(ids, max(1, min(32, FILL // numbers)), self.cfg.run.seed)
        workers, timeout = self.cfg.data.dataloader_num_workers, self.cfg.data.decode_timeout
        items = iter(dataset.loader(self.folder, sampler, workers, timeout))
        for step in range(math.ceil(len(ids) / sampler.batch_size)):
            batch = self._encoded(next(items))
            rows = zip(batch.latents, batch.captions, batch.files, strict=True)
            keys = zip(sampler.samples(step), rows, strict=True)
            yield {index: row for (index, epoch), row in keys if epoch == 0}


def fit_or_load_codec(
    cfg: schema.Config,
    component: Any,
    folder: dataset.VideoFolder,
    ids: Sequence[int],
    loaded: checkpoint.Loaded | None,
) -> None:
    """Fit a codec of ours to training clips, or load what the checkpoint holds; others need neither."""
    if not hasattr(component, "fit") or (cfg.model.pretrained is not None and loaded is None):
        return
    if loaded is not None:
        checkpoint.load_into(component, loaded.tensors["codec"], "codec")
        return
    if cfg.data.cache == "disk":
        latent_cache.load_codec(cfg, component)
        return
    ids = max(folder.by_size(ids), key=len)  # clips of one size go in; of buckets the fullest
    folder, count, size = folder.within(ids), 64, folder.sizes[folder.samples[ids[0]].size]
    if isinstance(cfg.codec, schema.PatchPCA):
        # A small folder gives several clips of each video, or there might be fewer patches than components.
        patches = math.prod(component.latent_shape(*size)[1:])
        needed = math.ceil(4 * cfg.codec.components / patches)
        count = min(cfg.codec.fit_clips, max(len(ids), needed))
    stride = max(1, len(ids) // count)
    keys = [(ids[i * stride % len(ids)], i * stride // len(ids)) for i in range(count)]
    clips = (folder[key]["frames"] for key in tqdm(keys, desc="fitting the codec", unit="clip"))
    component.fit(codec.to_unit(clip).to(component.device) for clip in clips)
