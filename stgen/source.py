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

from stgen import checkpoint, codec, dataset, schema, shapes


def open_folder(cfg: schema.Config, run_dir: Path) -> tuple[dataset.VideoFolder, shapes.Split | None]:
    """The training folder, rendered first when none is named, and the split of a rendered one."""
    root = Path(cfg.data.train_data_dir or run_dir / "data")
    if cfg.data.train_data_dir is None:
        shapes.write_folder(
            root,
            clips=cfg.data.shapes.clips,
            held_out=cfg.data.shapes.held_out,
            held_out_seed=cfg.data.shapes.held_out_seed,
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
    )
    return folder, shapes.split_of(root)


def known_captions(cfg: schema.Config) -> list[str]:
    """The captions that training would see, without decoding or rendering a video."""
    if cfg.data.train_data_dir is None:
        seen = shapes.split(cfg.data.shapes.held_out, cfg.data.shapes.held_out_seed).seen
        return [combo.prompt for combo in seen]
    return list(dataset.captions(Path(cfg.data.train_data_dir)).values())


def folder_summary(folder: dataset.VideoFolder, train_ids: Sequence[int], held_ids: Sequence[int]) -> str:
    """One line about the folder: what is used, set aside, rejected and uncaptioned."""
    held_out = f"{len(held_ids)} held out for the loss" if held_ids else "none held out for the loss (too few)"
    line = f"{len(train_ids)} videos to train on, {held_out}"
    if folder.rejects:
        line += f", {len(folder.rejects)} rejected (rejects.jsonl says why)"
    if folder.uncaptioned:
        line += f", {folder.uncaptioned} without a caption"
    return line


@dataclass
class Batch:
    """Clips of one step."""

    latents: Tensor  # [B, C, t, h, w], float32
    captions: list[str]
    files: list[str]

    def parts(self, count: int) -> Iterator["Batch"]:
        """The batch in `count` equal parts."""
        size = len(self.captions) // count
        for i in range(0, len(self.captions), size):
            yield Batch(self.latents[i : i + size], self.captions[i : i + size], self.files[i : i + size])

    @staticmethod
    def read(folder: dataset.VideoFolder, ids: Sequence[int], component: Any, device: torch.device) -> "Batch":
        """Decode and encode the clips of epoch 0 of the videos `ids`."""
        items = [folder[(i, 0)] for i in ids]
        encode = codec.as_codec(component).encode
        latents = [encode(codec.to_unit(item["frames"][None].to(device))) for item in items]
        return Batch(torch.cat(latents), [item["caption"] for item in items], [item["path"] for item in items])


class Source:
    """Batches of latents as a pure function of seed and step, from memory or decoded on the way."""

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
        self.sampler = dataset.StepSampler(ids, cfg.train.train_batch_size, cfg.run.seed)
        self.memory = self._fill(ids) if cfg.data.cache == "memory" else None

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Batches from `start_step` on, for ever."""
        if self.memory is not None:
            for step in itertools.count(start_step):
                rows = [self.memory[index] for index, _ in self.sampler.samples(step)]
                yield Batch(torch.stack([row[0] for row in rows]), [row[1] for row in rows], [row[2] for row in rows])
        self.sampler.start_step = start_step
        workers, timeout = self.cfg.data.dataloader_num_workers, self.cfg.data.decode_timeout
        for item in dataset.loader(self.folder, self.sampler, workers, timeout):
            yield self._encoded(item)

    def _encoded(self, item: dict[str, Any]) -> Batch:
        new = [reject for reject in item["rejects"] if reject[0] not in self.rejects]
        if new:
            dataset.write_rejects(self.run_dir / "rejects.jsonl", new)
            self.rejects |= {path for path, _ in new}
        frames = codec.to_unit(item["frames"].to(self.device))  # [B, 3, T, H, W]
        return Batch(self.codec.encode(frames), item["caption"], item["path"])

    def _fill(self, ids: Sequence[int]) -> dict[int, tuple[Tensor, str, str]]:
        """One clip of every video, decoded and encoded once: what the first epoch would draw."""
        sampler = dataset.StepSampler(ids, 32, self.cfg.run.seed)
        workers, timeout = self.cfg.data.dataloader_num_workers, self.cfg.data.decode_timeout
        items = iter(dataset.loader(self.folder, sampler, workers, timeout))
        memory = {}
        with tqdm(total=len(ids), desc="encoding clips", unit="clip") as bar:
            for step in range(math.ceil(len(ids) / sampler.batch_size)):
                batch = self._encoded(next(items))
                rows = zip(batch.latents, batch.captions, batch.files, strict=True)
                keys = zip(sampler.samples(step), rows, strict=True)
                memory.update({index: row for (index, epoch), row in keys if epoch == 0})
                bar.update(len(memory) - bar.n)
        return memory


def fit_or_load_codec(
    cfg: schema.Config,
    component: Any,
    folder: dataset.VideoFolder,
    ids: Sequence[int],
    loaded: checkpoint.Loaded | None,
) -> None:
    """Fit a codec of ours to training clips, or load what the checkpoint holds; an autoencoder needs neither."""
    if not hasattr(component, "fit"):
        return
    if loaded is not None:
        checkpoint.load_into(component, loaded.tensors["codec"], "codec")
        return
    folder, count = folder.within(ids), 64
    if isinstance(cfg.codec, schema.PatchPCA):
        # A small folder gives several clips of each video, or there might be fewer patches than components.
        patches = math.prod(component.latent_shape(cfg.data.num_frames, cfg.data.height, cfg.data.width)[1:])
        needed = math.ceil(4 * cfg.codec.components / patches)
        count = min(cfg.codec.fit_clips, max(len(ids), needed))
    stride = max(1, len(ids) // count)
    keys = [(ids[i * stride % len(ids)], i * stride // len(ids)) for i in range(count)]
    clips = (folder[key]["frames"] for key in tqdm(keys, desc="fitting the codec", unit="clip"))
    component.fit(codec.to_unit(clip).to(component.device) for clip in clips)
