"""The story of a run: a folder of videos in; checkpoints, metrics, clips and a pipeline out."""

import fcntl
import hashlib
import itertools
import json
import math
import os
import platform
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from stgen import build, checkpoint, config, dataset, finite, flops, optim, schedules, schema, source, text, validation
from stgen.describe import describe
from stgen.ema import EMA
from stgen.logger import DISK, Logger
from stgen.objective import Objective
from stgen.progress import Meter, Progress, steps_of
from stgen.source import Batch
from stgen.step import accumulate, draw
from stgen.tokens import grid_of

# Keys that may differ on resume without changing what the run computes up to its limit.
FREE_KEYS = (
    "run.output_dir", "run.resume_from_checkpoint", "run.allow_changed_config", "run.device",
    "log.", "checkpoint.", "validation.", "data.dataloader_num_workers", "data.decode_timeout",
)  # fmt: skip
LIMIT_KEYS = ("train.max_train_steps", "train.max_train_seconds", "train.num_train_epochs")


class TrainingError(Exception):
    """Something that ends the run; a sentence that says where to look and what to do."""


def train(cfg: schema.Config) -> dict[str, Any]:
    """Train as the config says and return the run's summary (also written to summary.json)."""
    began = time.monotonic()

    # ------------------------------------------------------------------------------------------ the run folder
    device = build.device_of(cfg)
    run_dir = cfg.output_dir
    with _run_folder(run_dir, keep=_goes_on(cfg)), ExitStack() as closing:
        loaded = checkpoint.resolve(run_dir, cfg.run.resume_from_checkpoint)
        if loaded is not None:
            _check_same_config(cfg, build.read_state(loaded, resume=True), loaded.path)
        (run_dir / "config.yaml").write_text(config.dump(cfg))
        (run_dir / "env.json").write_text(json.dumps(_environment(device), indent=2) + "\n")

        # -------------------------------------------------------------------------------------- data and parts
        seed_everything(cfg.run.seed)
        folder, split = source.open_folder(cfg, run_dir)
        _check_same_folder(cfg, folder, loaded)
        dataset.write_rejects(run_dir / "rejects.jsonl", folder.rejects)
        train_ids, held_ids = dataset.split(len(folder), cfg.data.held_out_clips, cfg.run.seed)
        captions = [folder.samples[i].caption for i in train_ids]
        vocabulary = text.vocabulary_of(captions) if loaded is None else loaded.state["vocabulary"]
        parts = build.build_parts(cfg, vocabulary).to(device)
        source.fit_or_load_codec(cfg, parts.codec, folder, train_ids, loaded)
        clips = source.Source(cfg, folder, train_ids, parts.codec, device, run_dir)
        held_out = Batch.read(folder.within(held_ids), held_ids, parts.codec, device) if held_ids else None
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
            progress = Progress.resumed(loaded, progress.total, cfg)
            if not _goes_on(cfg):
                progress.wandb_id = None
        logger = Logger(
            run_dir,
            cfg.model_dump(mode="json"),
            mode=cfg.log.wandb,
            project=cfg.log.project,
            group=cfg.log.group,
            name=cfg.log.name or run_dir.name,
            run_id=progress.wandb_id,
            resume_step=(progress.step if loaded is not None else -1) if _goes_on(cfg) else None,
        )
        closing.callback(logger.finish)
        progress.wandb_id = logger.run_id
        pipeline = build.build_pipeline(cfg, parts, fps)
        prompts = validation.prompts_of(cfg, captions, split)
        forward = torch.compile(parts.transformer) if cfg.train.compile else parts.transformer

        grid = grid_of(tuple(clips.latent_shape[1:]), cfg.tokens.patch_size)
        text_tokens = text.encode(parts.text_encoder, parts.tokenizer, captions[:1], cfg.text.max_length)[1].shape[1]
        work = flops.step_work(
            parts.transformer, grid, text_tokens, cfg.train.train_batch_size, cfg.train.gradient_checkpointing
        )
        tqdm.write(describe(cfg, parts, grid, work, device, source.folder_summary(folder, train_ids, held_ids)))
        if loaded is not None:
            tqdm.write(f"resumed from {loaded.path} at step {progress.step}")

        def content() -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
            tensors = {
                "model": nn.ModuleDict(parts.trained).state_dict(),
                "ema": ema.state_tensors(),
                "optimizer": optim.state_tensors(optimizer, names),
                "random": checkpoint.random_state(),
                "codec": build.codec_tensors(parts.codec),
            }
            state = {**progress.state(), "vocabulary": vocabulary, "fps": fps, "files": fingerprint(folder)}
            return tensors, {**state, "config": cfg.model_dump(mode="json")}

        def save() -> Path:
            logger.settle()  # a resume keeps the lines up to its checkpoint, so that they must be on disk first
            tensors, state = content()
            finite.refuse_spoiled(
                {"model": names, "ema": tensors["ema"], "optimizer": tensors["optimizer"]}, progress.step
            )
            return checkpoint.save(run_dir, progress.step, tensors, state, cfg.checkpoint.total_limit)

        def remembered() -> Iterator[torch.Tensor]:
            """What a step leaves to the next beside the weights."""
            yield from ema.state_tensors().values()
            for moments in optimizer.state.values():
                yield from (moments[key] for key in optim.MOMENTS)

        def stopped(loss: float, norm: float, batch: Batch) -> finite.NotFinite:
            tensors, state = content()
            noise, times, told = draw(cfg, objective, batch, progress.step * cfg.train.train_batch_size)
            looked_at = {"latents": batch.latents, "noise": noise, "times": times}
            gradients = {name: weight.grad for name, weight in names.items() if weight.grad is not None}
            kept = {
                "batch": looked_at,
                "model": names,
                **{group: tensors[group] for group in ("ema", "optimizer", "codec")},
            }
            report = {"step": progress.step, "loss": loss, "grad_norm": norm, "files": batch.files, "captions": told}
            report["spoiled"] = finite.spoiled({**kept, "gradient": gradients})
            return finite.stop(run_dir, report, {**tensors, "batch": looked_at}, state)

        def validate() -> dict[str, float]:
            with ema.applied(), validation.evaluating(parts):
                metrics = {}
                if held_out is not None:
                    loss = validation.held_out_loss(cfg, parts, objective, held_out)
                    metrics["val/loss"] = progress.held_out_loss = loss
                    logger.log(progress.step, metrics)
                out = run_dir / "samples" / f"step-{progress.step:06d}"
                videos = validation.sample_prompts(pipeline, prompts, cfg, fps, out)
                logger.videos(progress.step, "validation/videos", videos)
                return metrics

        # ---------------------------------------------------------------------------------------------- the loop
        if not progress.done:
            shutil.rmtree(
                run_dir / "final", ignore_errors=True
            )  # of the steps before; checkpoints hold the same weights
        meter = Meter(cfg, grid.tokens, work.executed, device)
        with checkpoint.StopSignals() as stop, _progress_bar(progress) as bar:
            if progress.step == 0 and cfg.validation.steps is not None:
                validate()
            batches = clips.batches(progress.step)
            saved = progress.step if loaded is not None else None
            while not stop.requested and not progress.done:
                meter.start()
                batch = next(batches)
                meter.lap("data")
                rate = learning_rate(cfg, progress)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                parts.transformer.at_step(progress.step)
                loss = accumulate(cfg, forward, parts, objective, batch, progress.step)
                norm = optim.clip_and_check(names.values(), cfg.optim.max_grad_norm)
                if not (math.isfinite(loss) and math.isfinite(norm) and finite.whole(remembered())):
                    raise stopped(loss, norm, batch)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                ema.update(progress.step)
                parts.transformer.observe(loss)
                meter.lap("step")

                progress.advance(loss, norm, meter.seconds, cfg)
                bar.total = progress.total
                bar.set_postfix(loss=f"{progress.smooth_loss:.4f}", lr=f"{rate:.1e}", refresh=False)
                bar.update()
                if progress.step % cfg.log.every == 0 or progress.done:
                    metrics = progress.window_metrics(rate, cfg.train.train_batch_size, len(train_ids))
                    metrics |= meter.metrics(len(clips.rejects)) | parts.transformer.measured()
                    logger.log(progress.step, metrics)
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
        if stop.requested:
            tqdm.write(
                f"stopped by {stop.requested} at step {progress.step}; everything is saved in {last}\n"
                f"continue with the same command and run.resume_from_checkpoint=latest"
            )
            return {"steps": progress.step, "stopped": stop.requested}

        # ------------------------------------------------------------------------------------------------ the end
        validate()
        with ema.applied(), validation.evaluating(parts):
            pipeline.save_pretrained(run_dir / "final", safe_serialization=True)
            sheet, accuracy = validation.finish(cfg, pipeline, prompts, split, folder, fps, run_dir)
        summary = {
            "steps": progress.step,
            "seconds": {"train": round(progress.seconds, 2), "total": round(time.monotonic() - began, 2)},
            "loss": {"train": progress.smooth_loss, "held_out": progress.held_out_loss},
            **accuracy,
            "parameters": flops.trainable(parts.trained),
            "flops_per_step": work.executed,
            "dense_flops_per_step": work.dense,
            "rejects": len(clips.rejects),
        }
        (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        logger.image(progress.step, "validation/contact_sheet", sheet)
        logger.summary(summary)
        logger.finish()
        tqdm.write(farewell(run_dir, sheet, last, logger, summary))
        return summary


# -------------------------------------------------------------------------------------------------- the run folder


@contextmanager
def _run_folder(run_dir: Path, keep: bool) -> Iterator[None]:
    """Make the run folder and hold it for this process; an earlier run that is not resumed is moved aside, whole.

    Raises TrainingError when another process trains into it.
    """
    try:
        if run_dir.exists() and not run_dir.is_dir():
            raise TrainingError(f"run.output_dir: {run_dir} is a file; name a folder")
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = _lock(run_dir)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise TrainingError(
            f"run.output_dir: {run_dir} cannot be made or written to: {reason}; choose another"
        ) from None
    if not keep and ((run_dir / "metrics.jsonl").exists() or any(run_dir.glob("checkpoint-*"))):
        home = run_dir.resolve()
        aside = next(p for i in itertools.count(1) if not (p := home.with_name(f"{home.name}-old{i}")).exists())
        home.rename(aside)
        home.mkdir()
        tqdm.write(f"{run_dir} held an earlier run; it now lies in {aside} (resume it with run.output_dir={aside})")
        lock.close()
        lock = _lock(home)
    try:
        yield
    except OSError as error:
        if error.errno not in DISK:
            raise
        raise TrainingError(_told(run_dir, error)) from error
    finally:
        lock.close()


def _told(run_dir: Path, error: OSError) -> str:
    """A disk's refusal as a sentence."""
    return (
        f"{error.filename or run_dir}: {(error.strerror or str(error)).lower()}; checkpoints already written to {run_dir} are "
        "whole: make room, or choose another run.output_dir, and go on with run.resume_from_checkpoint=latest"
    )


def _lock(run_dir: Path) -> IO[str]:
    """Hold the folder until the file is closed or the process ends."""
    lock = (run_dir / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise TrainingError(
            f"run.output_dir: another process is training into {run_dir}; choose another folder"
        ) from None
    return lock


def _goes_on(cfg: schema.Config) -> bool:
    """Whether the run continues in its own folder; a run that starts from another one's checkpoint is a new run."""
    which = cfg.run.resume_from_checkpoint
    return which == "latest" or (which != "none" and cfg.output_dir.resolve() in (Path(which) / "_").resolve().parents)


def fingerprint(folder: dataset.VideoFolder) -> str:
    """A hash of the names of the usable videos, in order: it decides the split and the order of training."""
    return hashlib.sha256("\n".join(folder.name(i) for i in range(len(folder))).encode()).hexdigest()


def _check_same_folder(cfg: schema.Config, folder: dataset.VideoFolder, loaded: checkpoint.Loaded | None) -> None:
    """Raise TrainingError when the usable videos are not those that the checkpoint was trained on."""
    if loaded is None or cfg.run.allow_changed_config or loaded.state["files"] == fingerprint(folder):
        return
    raise TrainingError(
        f"{folder.root} no longer holds the videos that {loaded.path} was trained on, so order and held-out clips would "
        "change (restore them, or say run.allow_changed_config=true)"
    )


def seed_everything(seed: int) -> None:
    """Seed the global generators. The loop draws from none of them; libraries that it calls might."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def _check_same_config(cfg: schema.Config, saved: schema.Config, path: Path) -> None:
    """Raise TrainingError listing every key that shapes the run and differs from that of the checkpoint at `path`.

    Keys that are younger than the checkpoint have their defaults there.
    """
    both = (x.model_dump(mode="json") for x in (saved, cfg))
    changed = [line for line in config.differences(*both) if not line.startswith(FREE_KEYS)]
    limits = [line for line in changed if line.startswith(LIMIT_KEYS)]
    others = [line for line in changed if line not in limits]
    if limits:
        tqdm.write("the run's limit changes, and with it the course of the learning rate: " + "; ".join(limits))
    if others and not cfg.run.allow_changed_config:
        raise TrainingError(
            f"{path} was written under another config: {'; '.join(others)} "
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
    except PackageNotFoundError:
        return None


# ------------------------------------------------------------------------------------------ the parts of the loop


def learning_rate(cfg: schema.Config, progress: Progress) -> float:
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


def _progress_bar(progress: Progress) -> tqdm:
    return tqdm(total=progress.total, initial=progress.step, desc="training", unit="step", dynamic_ncols=True)


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
