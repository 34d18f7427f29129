"""The story of a run: a folder of videos in; checkpoints, metrics, clips and a pipeline out."""

import hashlib
import itertools
import json
import logging
import math
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from stgen import build, checkpoint, codec, config, dataset, flops, optim, schedules, schema, shapes, text, video
from stgen.describe import describe
from stgen.ema import EMA
from stgen.logger import Logger
from stgen.objective import Objective
from stgen.pipeline import VideoPipeline
from stgen.tokens import grid_of

log = logging.getLogger("stgen")

SPEED_STEPS = 50  # a run limited in seconds fixes its number of steps from the speed of this many
# Keys that may differ on resume without changing what the run computes up to its limit.
FREE_KEYS = ("run.", "log.", "checkpoint.", "validation.", "data.dataloader_num_workers", "data.decode_timeout")
LIMIT_KEYS = ("train.max_train_steps", "train.max_train_seconds", "train.num_train_epochs")


class TrainingError(Exception):
    """Something that ends the run; a sentence that says where to look and what to do."""


def train(cfg: schema.Config) -> dict[str, Any]:
    """Train as the config says and return the run's summary (also written to summary.json)."""
    began = time.monotonic()

    # ------------------------------------------------------------------------------------------ the run folder
    device = build.device_of(cfg)
    run_dir = cfg.output_dir
    resuming = cfg.run.resume_from_checkpoint != "none"
    with _run_folder(run_dir, keep=resuming) as run_dir:
        loaded = checkpoint.resolve(run_dir, cfg.run.resume_from_checkpoint)
        if loaded is not None:
            _check_same_config(cfg, loaded)
        (run_dir / "config.yaml").write_text(config.dump(cfg))
        (run_dir / "env.json").write_text(json.dumps(_environment(device), indent=2) + "\n")

        # -------------------------------------------------------------------------------------- data and parts
        folder, split = open_folder(cfg, run_dir)
        train_ids, held_ids = dataset.split(len(folder), cfg.data.held_out_clips, cfg.run.seed)
        captions = [folder.samples[i].caption for i in train_ids]
        vocabulary = text.vocabulary_of(captions) if loaded is None else loaded.state["vocabulary"]
        parts = build.build_parts(cfg, vocabulary).to(device)
        fit_or_load_codec(cfg, parts.codec, folder, train_ids, loaded)
        source = Source(cfg, folder, train_ids, parts.codec, device)
        held_out = Batch.read(folder, held_ids, parts.codec, device) if held_ids else None
        fps = cfg.data.fps or folder.samples[0].info.fps

        # -------------------------------------------------------------------------------- optimiser, EMA, resume
        objective = Objective(**cfg.objective.model_dump())
        names = optim.named_parameters(parts.trained)
        optimizer = optim.build(parts.trained, cfg.optim)
        ema = EMA(parts.trained, cfg.ema.decay)
        progress = Progress(total=steps_of(cfg, len(train_ids)))
        if loaded is not None:
            build.load_weights(parts, loaded.tensors["model"])
            ema.load_state_tensors(loaded.tensors["ema"])
            optim.load_state_tensors(optimizer, names, loaded.tensors["optimizer"])
            checkpoint.restore_random_state(loaded.tensors["random"])
            progress = Progress.resumed(loaded, progress.total)
        logger = Logger(
            run_dir,
            cfg.model_dump(mode="json"),
            mode=cfg.log.wandb,
            project=cfg.log.project,
            group=cfg.log.group,
            name=cfg.log.name or run_dir.name,
            run_id=progress.wandb_id,
            resume_step=progress.step if loaded is not None else None,
        )
        progress.wandb_id = logger.run_id
        pipeline = build.build_pipeline(cfg, parts, fps)
        prompts = validation_prompts(cfg, captions, split)
        forward = torch.compile(parts.transformer) if cfg.train.compile else parts.transformer

        grid = grid_of(tuple(source.latent_shape[1:]), cfg.tokens.patch_size)
        text_tokens = text.encode(parts.text_encoder, parts.tokenizer, captions[:1], cfg.text.max_length)[1].shape[1]
        step_flops = flops.step_flops(
            parts.transformer, grid, text_tokens, cfg.train.train_batch_size, cfg.train.gradient_checkpointing
        )
        tqdm.write(describe(cfg, parts, grid, step_flops, device, folder_summary(folder, train_ids, held_ids)))
        if loaded is not None:
            tqdm.write(f"resumed from {loaded.path} at step {progress.step}")

        def save() -> Path:
            tensors = {
                "model": nn.ModuleDict(parts.trained).state_dict(),
                "ema": ema.state_tensors(),
                "optimizer": optim.state_tensors(optimizer, names),
                "random": checkpoint.random_state(),
                "codec": build.codec_tensors(parts.codec),
            }
            state = {**progress.state(), "vocabulary": vocabulary, "fps": fps, "config": cfg.model_dump(mode="json")}
            return checkpoint.save(run_dir, progress.step, tensors, state, cfg.checkpoint.total_limit)

        def validate() -> dict[str, float]:
            with ema.applied(), evaluating(parts, cfg, device):
                metrics = {}
                if held_out is not None:
                    loss = held_out_loss(cfg, parts, objective, held_out)
                    metrics["val/loss"] = progress.held_out_loss = loss
                out = run_dir / "samples" / f"step-{progress.step:06d}"
                clips = sample_prompts(pipeline, prompts, cfg, fps, out)
                logger.log(progress.step, metrics)
                logger.videos(progress.step, "validation/videos", clips)
                return metrics

        # ---------------------------------------------------------------------------------------------- the loop
        meter = Meter(cfg, grid.tokens, step_flops)
        with checkpoint.StopSignals() as stop, _progress_bar(progress) as bar:
            if progress.step == 0 and cfg.validation.steps is not None:
                validate()
            batches = source.batches(progress.step)
            saved = progress.step if loaded is not None else None
            while not stop.requested and not progress.done:
                meter.start()
                batch = next(batches)
                meter.lap("data")
                rate = learning_rate(cfg, progress)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                loss = accumulate(cfg, forward, parts, objective, batch, progress.step)
                norm = optim.clip_and_check(names.values(), cfg.optim.max_grad_norm)
                _refuse_nan(loss, norm, batch, progress.step, run_dir)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                ema.update(progress.step)
                meter.lap("step")

                progress.advance(loss, norm, meter.seconds, cfg)
                bar.total = progress.total
                bar.set_postfix(loss=f"{progress.smooth_loss:.4f}", lr=f"{rate:.1e}", refresh=False)
                bar.update()
                if progress.step % cfg.log.every == 0 or progress.done:
                    logger.log(progress.step, progress.window_metrics(rate) | meter.metrics(source.rejected))
                if cfg.validation.steps is not None and progress.step % cfg.validation.steps == 0 and not progress.done:
                    bar.write(f"step {progress.step}: " + _words(validate()))
                if progress.step % cfg.checkpoint.steps == 0 and not progress.done:
                    with stop.protected():
                        save()
                    saved = progress.step
            if saved != progress.step:
                with stop.protected():
                    last = save()
            else:
                last = run_dir / f"checkpoint-{progress.step}"
        dataset.write_rejects(run_dir / "rejects.jsonl", [*folder.rejects, *source.rejects])
        if stop.requested:
            logger.finish()
            tqdm.write(
                f"stopped by {stop.requested} at step {progress.step}; everything is saved in {last}\n"
                f"continue with the same command and run.resume_from_checkpoint=latest"
            )
            return {"steps": progress.step, "stopped": stop.requested}

        # ------------------------------------------------------------------------------------------------ the end
        validate()
        with ema.applied(), evaluating(parts, cfg, device):
            pipeline.save_pretrained(run_dir / "final", safe_serialization=True)
            sheet, accuracy = finish(cfg, pipeline, prompts, split, folder, fps, run_dir)
        summary = {
            "steps": progress.step,
            "seconds": {"train": round(progress.seconds, 2), "total": round(time.monotonic() - began, 2)},
            "loss": {"train": progress.smooth_loss, "held_out": progress.held_out_loss},
            **accuracy,
            "parameters": flops.trainable(parts.trained),
            "flops_per_step": step_flops,
            "rejects": len(folder.rejects) + source.rejected,
        }
        (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        logger.image(progress.step, "validation/contact_sheet", sheet)
        logger.summary(summary)
        logger.finish()
        tqdm.write(farewell(run_dir, sheet, last, logger, summary))
        return summary


# -------------------------------------------------------------------------------------------------- the run folder


@contextmanager
def _run_folder(run_dir: Path, keep: bool) -> Iterator[Path]:
    """Make the run folder and hold it for this process; an earlier run that is not resumed is moved aside, whole.

    Raises TrainingError when another process trains into it.
    """
    import fcntl

    if run_dir.exists() and not run_dir.is_dir():
        raise TrainingError(f"run.output_dir: {run_dir} is a file; name a folder")
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = (run_dir / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise TrainingError(
            f"run.output_dir: another process is training into {run_dir}; choose another folder"
        ) from None
    if not keep and (run_dir / "config.yaml").exists():
        aside = next(p for i in itertools.count(1) if not (p := run_dir.with_name(f"{run_dir.name}-old{i}")).exists())
        run_dir.rename(aside)
        run_dir.mkdir()
        tqdm.write(f"{run_dir} held an earlier run; it now lies in {aside} (resume it with run.output_dir={aside})")
        if (aside / "data" / shapes.MARKER).exists():
            shutil.move(aside / "data", run_dir / "data")  # rendered anew only if the recipe differs
        lock.close()
        lock = (run_dir / ".lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield run_dir
    finally:
        lock.close()


def _check_same_config(cfg: schema.Config, loaded: checkpoint.Loaded) -> None:
    """Raise TrainingError listing every key that shapes the run and differs from the checkpoint's."""
    changed = [
        line
        for line in config.differences(loaded.state["config"], cfg.model_dump(mode="json"))
        if not line.startswith(FREE_KEYS)
    ]
    limits = [line for line in changed if line.startswith(LIMIT_KEYS)]
    others = [line for line in changed if line not in limits]
    if limits:
        tqdm.write("the run's limit changes, and with it the course of the learning rate: " + "; ".join(limits))
    if others and not cfg.run.allow_changed_config:
        raise TrainingError(
            f"{loaded.path} was written under another config: {'; '.join(others)} "
            "(restore these keys, or say run.allow_changed_config=true)"
        )


def _environment(device: torch.device) -> dict[str, Any]:
    packages = ("stgen", "torch", "torchvision", "triton", "diffusers", "transformers", "av", "wandb")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in packages},
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "pid": os.getpid(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ModuleNotFoundError:
        return None


# ------------------------------------------------------------------------------------------------------------- data


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


def folder_summary(folder: dataset.VideoFolder, train_ids: list[int], held_ids: list[int]) -> str:
    """One line about the folder: what is used, set aside, rejected and uncaptioned."""
    line = f"{len(train_ids)} videos to train on, {len(held_ids)} held out for the loss"
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
    def read(folder: dataset.VideoFolder, ids: list[int], component: Any, device: torch.device) -> "Batch":
        """Decode and encode the clips of epoch 0 of the videos `ids`."""
        items = [folder[(i, 0)] for i in ids]
        encode = codec.as_codec(component).encode
        latents = [encode(codec.to_unit(item["frames"][None].to(device))) for item in items]
        return Batch(torch.cat(latents), [item["caption"] for item in items], [item["path"] for item in items])


class Source:
    """Batches of latents as a pure function of seed and step, from memory or decoded on the way."""

    def __init__(
        self, cfg: schema.Config, folder: dataset.VideoFolder, ids: list[int], component: Any, device: torch.device
    ):
        self.cfg, self.folder, self.device = cfg, folder, device
        self.codec = codec.as_codec(component)
        self.latent_shape = self.codec.latent_shape(cfg.data.num_frames, cfg.data.height, cfg.data.width)
        self.rejects: list[Any] = []
        self.sampler = dataset.StepSampler(ids, cfg.train.train_batch_size, cfg.run.seed)
        self.memory = self._fill(ids) if cfg.data.cache == "memory" else None

    @property
    def rejected(self) -> int:
        return len(self.rejects)

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
        self.rejects += item["rejects"]
        frames = codec.to_unit(item["frames"].to(self.device))  # [B, 3, T, H, W]
        return Batch(self.codec.encode(frames), item["caption"], item["path"])

    def _fill(self, ids: list[int]) -> dict[int, tuple[Tensor, str, str]]:
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
    cfg: schema.Config, component: Any, folder: dataset.VideoFolder, ids: list[int], loaded: checkpoint.Loaded | None
) -> None:
    """Fit a codec of ours to training clips, or load what the checkpoint holds; an autoencoder needs neither."""
    if not hasattr(component, "fit"):
        return
    if loaded is not None:
        checkpoint.load_into(component, loaded.tensors["codec"], "codec")
        return
    count = cfg.codec.fit_clips if isinstance(cfg.codec, schema.PatchPCA) else 64
    chosen = ids[:: max(1, len(ids) // count)][:count]
    frames = torch.stack([folder[(i, 0)]["frames"] for i in tqdm(chosen, desc="fitting the codec", unit="clip")])
    component.fit(codec.to_unit(frames).to(component.device))


# ------------------------------------------------------------------------------------------------------- one step


def generator(*key: Any) -> torch.Generator:
    """A generator that depends on its key alone."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)


def draw(cfg: schema.Config, objective: Objective, batch: Batch, first: int) -> tuple[Tensor, Tensor, list[str]]:
    """Noise [B, ...], times [B] and captions after dropout, each keyed by (seed, number of the sample in the run).

    So the draws do not depend on how a batch is cut into parts or shared out, and two runs of one seed see the same.
    """
    noise, times, captions = [], [], []
    for i, caption in enumerate(batch.captions):
        g = generator(cfg.run.seed, "draw", first + i)
        times.append(objective.draw_times(1, g))
        captions.append("" if float(torch.rand((), generator=g)) < cfg.text.caption_dropout else caption)
        noise.append(torch.randn(batch.latents.shape[1:], generator=g))
    return torch.stack(noise).to(batch.latents.device), torch.cat(times).to(batch.latents.device), captions


def losses(
    cfg: schema.Config, forward: Any, parts: build.Parts, objective: Objective, batch: Batch,
    noise: Tensor, t: Tensor, captions: list[str],
) -> Tensor:  # fmt: skip
    """Loss of each clip: [B]."""
    z = objective.add_noise(batch.latents, noise, t)  # [B, C, T, H, W]
    with torch.autocast(z.device.type, torch.bfloat16, enabled=cfg.train.mixed_precision == "bf16"):
        embeds, mask = text.encode(parts.text_encoder, parts.tokenizer, captions, cfg.text.max_length)
        output = forward(z, objective.model_time(t), embeds, mask, return_dict=False)[0]
    return objective.loss(output, batch.latents, noise, t)


def accumulate(
    cfg: schema.Config, forward: Any, parts: build.Parts, objective: Objective, batch: Batch, step: int
) -> float:
    """Gradients of the mean loss over the batch, computed in equal parts; returns that loss."""
    total, first = 0.0, step * cfg.train.train_batch_size
    for part in batch.parts(cfg.train.gradient_accumulation_steps):
        noise, t, captions = draw(cfg, objective, part, first)
        loss = losses(cfg, forward, parts, objective, part, noise, t, captions).sum() / len(batch.captions)
        loss.backward()
        total += float(loss.detach())
        first += len(part.captions)
    return total


def learning_rate(cfg: schema.Config, progress: "Progress") -> float:
    """The rate of this step; until a run limited in seconds knows its length, only the warm-up applies."""
    total = progress.total or 10**9
    factor = schedules.lr_at(
        progress.step,
        total,
        scheduler=cfg.optim.lr_scheduler,
        warmup_steps=cfg.optim.lr_warmup_steps,
        min_ratio=cfg.optim.lr_min_ratio,
    )
    return cfg.optim.learning_rate * factor


def _refuse_nan(loss: float, norm: float, batch: Batch, step: int, run_dir: Path) -> None:
    """Stop before the update that would spoil the weights, naming the clips."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    dump = run_dir / f"not-finite-step-{step}.json"
    dump.write_text(
        json.dumps({"step": step, "loss": str(loss), "grad_norm": str(norm), "files": batch.files}, indent=2)
    )
    raise TrainingError(
        f"step {step}: loss {loss}, gradient norm {norm}; stopped before the update. Clips of the batch: "
        f"{', '.join(batch.files[:4])}{' …' if len(batch.files) > 4 else ''} (all in {dump}). Weights of the last "
        "checkpoint are sound: lower optim.learning_rate or remove the clips, then resume"
    )


# ------------------------------------------------------------------------------------------------------- progress


def steps_of(cfg: schema.Config, videos: int) -> int | None:
    """Optimiser steps of the run; None until a run limited in seconds has measured its speed."""
    if cfg.train.num_train_epochs is not None:
        return max(1, math.ceil(cfg.train.num_train_epochs * videos / cfg.train.train_batch_size))
    return cfg.train.max_train_steps


class Progress:
    """Where the run stands: everything but tensors that an exact resume needs."""

    def __init__(self, total: int | None):
        self.total = total
        self.step = 0
        self.seconds = 0.0  # spent on training steps, data included
        self.wandb_id: str | None = None
        self.held_out_loss: float | None = None
        self.smooth_loss = 0.0
        self._recent: list[float] = []  # seconds of the first steps
        self._window: list[tuple[float, float]] = []  # loss and gradient norm since the last line of metrics

    @classmethod
    def resumed(cls, loaded: checkpoint.Loaded, total: int | None) -> "Progress":
        state = loaded.state["progress"]
        progress = cls(total)
        progress.step, progress.seconds, progress.wandb_id = loaded.step, state["seconds"], state["wandb_id"]
        progress.held_out_loss, progress.smooth_loss = state["held_out_loss"], state["smooth_loss"]
        progress._recent, progress._window = state["recent"], [tuple(pair) for pair in state["window"]]
        progress.total = total if total is not None else state["total"]
        return progress

    def state(self) -> dict[str, Any]:
        return {
            "progress": {
                "total": self.total,
                "seconds": self.seconds,
                "wandb_id": self.wandb_id,
                "held_out_loss": self.held_out_loss,
                "smooth_loss": self.smooth_loss,
                "recent": self._recent,
                "window": self._window,
            }
        }

    @property
    def done(self) -> bool:
        return self.total is not None and self.step >= self.total

    def advance(self, loss: float, norm: float, seconds: float, cfg: schema.Config) -> None:
        """Count one optimiser step that took `seconds`."""
        self.step += 1
        self.seconds += seconds
        self.smooth_loss = loss if self.step == 1 else 0.98 * self.smooth_loss + 0.02 * loss
        self._window.append((loss, norm))
        budget = cfg.train.max_train_seconds
        if budget is not None and self.total is None:
            self._recent.append(seconds)
            if self.step >= SPEED_STEPS or self.seconds >= budget:
                typical = sorted(self._recent)[len(self._recent) // 2]
                self.total = self.step + max(0, int((budget - self.seconds) / typical))

    def window_metrics(self, rate: float) -> dict[str, float]:
        """Means since the last call."""
        window, self._window = self._window, []
        loss, norm = (sum(values) / len(window) for values in zip(*window, strict=True))
        return {"train/loss": loss, "train/grad_norm": norm, "train/lr": rate}


class Meter:
    """Seconds of a step by what they were spent on, and the rates that follow."""

    def __init__(self, cfg: schema.Config, tokens: int, step_flops: int):
        self.clips, self.tokens, self.flops = cfg.train.train_batch_size, tokens, step_flops
        self._split = {"data": 0.0, "step": 0.0}
        self._steps, self.seconds = 0, 0.0

    def start(self) -> None:
        self._mark, self.seconds = time.perf_counter(), 0.0
        self._steps += 1

    def lap(self, name: str) -> None:
        """Book the time since the last mark under `name`."""
        if name == "step" and torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._split[name] += now - self._mark
        self.seconds += now - self._mark
        self._mark = now

    def metrics(self, rejected: int) -> dict[str, float]:
        """Rates since the last call."""
        data, step, steps = self._split["data"], self._split["step"], self._steps
        seconds = (data + step) / steps
        self._split, self._steps = {"data": 0.0, "step": 0.0}, 0
        return {
            "perf/step_time_s": seconds,
            "perf/data_wait_s": data / steps,
            "perf/samples_per_s": self.clips / seconds,
            "perf/tokens_per_s": self.clips * self.tokens / seconds,
            "perf/tflops": self.flops / seconds / 1e12,
            "data/rejects": rejected,
        }


def _progress_bar(progress: Progress) -> tqdm:
    return tqdm(total=progress.total, initial=progress.step, desc="training", unit="step", dynamic_ncols=True)


# ----------------------------------------------------------------------------------------------------- validation


@contextmanager
def evaluating(parts: build.Parts, cfg: schema.Config, device: torch.device) -> Iterator[None]:
    """Evaluation mode, no gradients, the precision of training."""
    for module in parts.trained.values():
        module.eval()
    bf16 = cfg.train.mixed_precision == "bf16"
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        yield
    for module in parts.trained.values():
        module.train()


def held_out_loss(cfg: schema.Config, parts: build.Parts, objective: Objective, batch: Batch) -> float:
    """Mean loss over the held-out clips, each at a fixed time and noise; times are spread evenly over (0, 1)."""
    count, total = len(batch.captions), 0.0
    for start in range(0, count, cfg.train.train_batch_size):
        rows = range(start, min(start + cfg.train.train_batch_size, count))
        latents = batch.latents[rows.start : rows.stop]
        noise = [torch.randn(latents.shape[1:], generator=generator(cfg.run.seed, "held-out", i)) for i in rows]
        t = torch.tensor([(i + 0.5) / count for i in rows], device=latents.device)
        part = Batch(latents, batch.captions[rows.start : rows.stop], [])
        total += float(
            losses(
                cfg, parts.transformer, parts, objective, part, torch.stack(noise).to(latents), t, part.captions
            ).sum()
        )
    return total / count


def validation_prompts(cfg: schema.Config, captions: list[str], split: shapes.Split | None) -> list[str]:
    """The prompts of the config; else two seen and two held-out ones of built-in shapes, or four captions."""
    if cfg.validation.prompts is not None:
        return cfg.validation.prompts
    if split is not None and split.held_out:
        return [combo.prompt for combo in (*split.seen[::20][:2], *split.held_out[:2])]
    return list(dict.fromkeys(captions))[:4]


def sample_prompts(
    pipeline: VideoPipeline, prompts: list[str], cfg: schema.Config, fps: float, out: Path
) -> list[tuple[Path, str]]:
    """Sample each prompt at its fixed seed into `out`; returns files and captions."""
    seeds = [cfg.validation.seed + i for i in range(len(prompts))]
    clips = sample_clips(pipeline, prompts, seeds, cfg)
    files = []
    for i, (prompt, seed, frames) in enumerate(zip(prompts, seeds, clips, strict=True)):
        path = out / f"{i:03d}-seed{seed}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        video.write(path, video.Clip(frames, fps))
        files.append((path, f"{i}: {prompt}"))
    return files


def sample_clips(
    pipeline: VideoPipeline, prompts: list[str], seeds: list[int], cfg: schema.Config, batch: int = 80
) -> list[Tensor]:
    """One clip, uint8 [T, 3, H, W], for each prompt and seed."""
    pipeline.set_progress_bar_config(disable=True)
    clips = []
    for start in range(0, len(prompts), batch):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch]]
        frames = pipeline(
            prompts[start : start + batch], cfg.validation.negative_prompt, generator=generators, output_type="pt"
        ).frames  # [B, T, 3, H, W] in [0, 1]
        clips += list((frames.float().cpu() * 255).round().to(torch.uint8))
    return clips


# ----------------------------------------------------------------------------------------------------------- the end


def finish(
    cfg: schema.Config, pipeline: VideoPipeline, prompts: list[str], split: shapes.Split | None,
    folder: dataset.VideoFolder, fps: float, run_dir: Path,
) -> tuple[Path, dict[str, Any]]:  # fmt: skip
    """The contact sheet, and for built-in shapes the oracle's verdict on prompts seen, held out, and on real clips."""
    accuracy = {}
    if split is not None and cfg.validation.judged_noises:
        prompts = [combo.prompt for combo in (*split.seen[::10], *split.held_out)]
        accuracy = judge(cfg, pipeline, split, folder)
    files = sample_prompts(pipeline, prompts, cfg, fps, run_dir / "samples" / "final")
    sheet = run_dir / "contact_sheet.png"
    held_out = {combo.prompt for combo in split.held_out} if split is not None else set()
    captions = [prompt + (" (never trained)" if prompt in held_out else "") for prompt in prompts]
    video.contact_sheet(sheet, [video.read(path) for path, _ in files], captions)
    return sheet, accuracy


def judge(
    cfg: schema.Config, pipeline: VideoPipeline, split: shapes.Split, folder: dataset.VideoFolder
) -> dict[str, Any]:
    """Share of clips of which the oracle reads the whole prompt: {seen, held_out, real}, with n and intervals beside."""
    count = cfg.validation.judged_noises * len(split.held_out)
    groups = {"seen": split.seen, "held_out": split.held_out}
    detail = {}
    for name, combos in groups.items():
        asked = [combos[i % len(combos)] for i in range(count)]
        seeds = [10_000 + i for i in range(count)]
        clips = sample_clips(pipeline, [combo.prompt for combo in asked], seeds, cfg)
        detail[name] = shapes.accuracy(clips, asked)
    real = [folder[(i, 0)] for i in range(min(count, len(folder)))]
    by_prompt = {combo.prompt: combo for combo in shapes.ALL}
    clips = [item["frames"].movedim(0, 1) for item in real]
    detail["real"] = shapes.accuracy(clips, [by_prompt[item["caption"]] for item in real])
    return {"accuracy": {name: value["all"] for name, value in detail.items()}, "accuracy_detail": detail}


def farewell(run_dir: Path, sheet: Path, last: Path, logger: Logger, summary: dict[str, Any]) -> str:
    """Where everything lies, and how good it is."""
    lines = [
        "",
        f"clips          {run_dir / 'samples' / 'final'}",
        f"contact sheet  {sheet}",
        f"checkpoint     {last}",
        f"pipeline       {run_dir / 'final'}",
        f"metrics        {run_dir / 'metrics.jsonl'}, {run_dir / 'summary.json'}",
        f"W&B            {logger.where}",
    ]
    for name, label in (
        ("seen", "prompts seen in training"),
        ("held_out", "combinations never trained"),
        ("real", "real clips"),
    ):
        if name in summary.get("accuracy_detail", {}):
            found = summary["accuracy_detail"][name]
            low, high = found["interval"]
            lines.append(
                f"oracle         {found['all']:.1%} of {found['n']} {label} (95 % interval {low:.1%} to {high:.1%})"
            )
    lines.append(f'next           python sample.py {run_dir} --prompt "…" --seed 0')
    return "\n".join(lines)


def _words(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()) or "clips sampled"
