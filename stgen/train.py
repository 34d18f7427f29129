"""The story of a run: a folder of videos in; checkpoints, metrics, clips and a pipeline out."""

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
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from stgen import (
    buckets,
    build,
    checkpoint,
    config,
    dataset,
    finite,
    flops,
    latent_cache,
    lora,
    optim,
    parallel,
    preflight,
    ranks,
    run_folder,
    saving,
    schedules,
    schema,
    shards,
    source,
    text,
    validation,
)
from stgen.describe import describe
from stgen.ema import EMA
from stgen.logger import Logger
from stgen.objective import Objective
from stgen.progress import Meter, Progress, steps_of
from stgen.run_folder import TrainingError as TrainingError  # raised by train
from stgen.source import Batch
from stgen.step import accumulate, drawn
from stgen.tokens import grid_of


def train(cfg: schema.Config) -> dict[str, Any]:
    """Train as the config says and return the run's summary (also written to summary.json).

    Under torchrun every rank calls it, and does its share; the first one writes and speaks.
    """
    began = time.monotonic()
    device = build.device_of(cfg)
    # What is open is closed last: the logger may wait for W&B, and the others must know of a failure before.
    with ExitStack() as closing, ranks.together(device, cfg.distributed.timeout):
        ranks.check_same(run_folder.identity(cfg))
        parallel.check_batch(cfg)
        ranks.in_turn(lambda: closing.enter_context(run_folder.held(cfg.output_dir, run_folder.goes_on(cfg))))
        run = Run(cfg, device, closing)
        run.tell()
        run.check_memory()
        signal = loop(run)
        if signal is None:
            return finish(run, began)
        ranks.say(
            f"stopped by {signal} at step {run.progress.step}; everything is saved in {run.last}\n"
            f"continue with the same command and run.resume_from_checkpoint=latest"
        )
        return {"steps": run.progress.step, "stopped": signal}


# ------------------------------------------------------------------------------------------ what a run is made of


class Run:
    """Data, parts, optimiser and averages of a run, as its config or its checkpoint says, and what is done with all of them.

    Each rank has one. Unless said otherwise all must call a method at once.
    """

    def __init__(self, cfg: schema.Config, device: torch.device, closing: ExitStack):
        self.cfg, self.device, self.dir = cfg, device, cfg.output_dir
        self.loaded = saving.resolve(self.dir, cfg.run.resume_from_checkpoint)
        if self.loaded is not None:
            run_folder.check_same_config(cfg, build.read_state(self.loaded, resume=True), self.loaded.path)
        if ranks.is_first():
            (self.dir / "config.yaml").write_text(config.dump(cfg))
            (self.dir / "env.json").write_text(json.dumps(_environment(device), indent=2) + "\n")
        seed_everything(cfg.run.seed)
        self._open_data()
        self._build_parts()
        self._open_clips()
        self._build_training()
        self._reckon()
        if self.loaded is not None:
            self._go_on(self.loaded)
            self.loaded = replace(self.loaded, tensors={})  # they are as much again as the run's own
        self._open_logger(closing)
        self.saved = self.progress.step if self.loaded is not None else None  # the step of the last checkpoint
        self.meter = Meter(self.loads, device)

    def _open_data(self) -> None:
        """The folder, its split, and the words that a learned text encoder will know."""
        cfg = self.cfg
        self.folder, self.split = ranks.in_turn(lambda: source.open_folder(cfg, self.dir))
        ranks.check_same(
            {"the number of usable videos": len(self.folder), "their names": run_folder.fingerprint(self.folder)}
        )
        run_folder.check_same_folder(cfg, self.folder, self.loaded)
        if ranks.is_first():
            dataset.write_rejects(self.dir / "rejects.jsonl", self.folder.rejects)
        self.train_ids, self.held_ids = self.folder.split(cfg.data.held_out_clips)
        self.captions = [self.folder.samples[i].caption for i in self.train_ids]
        known = None if self.loaded is None else self.loaded.state["vocabulary"]
        self.vocabulary = text.vocabulary_of(self.captions) if known is None else known
        self.fps = self.folder.rate
        self.prompts = validation.prompts_of(cfg, self.captions, self.split)

    def _build_parts(self) -> None:
        """The parts, with a checkpoint's weights where there is one, on their ranks."""
        cfg = self.cfg
        known = latent_cache.open_text(cfg, self.folder, self.split)
        self.parts = build.build_parts(cfg, self.vocabulary, known=known)
        self.vocabulary = build.vocabulary_of(self.parts, self.vocabulary)
        if self.loaded is not None:
            build.load_weights(self.parts, self.loaded.tensors["model"])
        if cfg.train.compile:
            self.parts.transformer.compile_repeated_blocks()  # layers of one kind share what is compiled
        self.spread = parallel.spread_of(cfg, self.parts, self.device)
        parallel.place(self.spread, self.parts, self.device, cfg.train.mixed_precision)

    def _open_clips(self) -> None:
        """The codec, fitted, and the clips as it gives them."""
        cfg, codec = self.cfg, self.parts.codec
        if ranks.is_first():
            source.fit_or_load_codec(cfg, codec, self.folder, self.train_ids, self.loaded)
        ranks.broadcast(build.codec_tensors(codec))
        self.clips = source.Source(cfg, self.folder, self.train_ids, codec, self.device, self.dir)
        apart = self.folder.within(self.held_ids)
        self.held_out = Batch.of_sizes(apart, self.held_ids, codec, self.device, self.clips.disk)

    def _build_training(self) -> None:
        """Optimiser and averages of the parts, and how far the run is."""
        cfg = self.cfg
        self.objective = Objective(**cfg.objective.model_dump())
        self.names = optim.named_parameters(self.parts.trained)
        self.optimizer = optim.build(self.parts.trained, cfg.optim)
        self.ema = EMA(self.parts.trained, cfg.ema.decay)
        self.progress = Progress(total=steps_of(cfg, self.clips.sampler))
        self.pipeline = build.build_pipeline(cfg, self.parts, self.fps)
        self.learner = parallel.Learner(self.spread, self.parts)

    def _reckon(self) -> None:
        """What a step costs."""
        cfg = self.cfg
        self.grid = grid_of(tuple(self.clips.latent_shape[1:]), cfg.tokens.patch_size)
        encoded = text.encode(self.parts.text_encoder, self.parts.tokenizer, self.captions[:1], cfg.text.max_length)
        works = buckets.works(cfg, self.parts.transformer, self.clips.buckets, encoded[1].shape[1])
        self.work = buckets.mean_work(works, self.clips.sampler.shares)
        self.loads = buckets.loads(self.clips.buckets, works)

    def _go_on(self, loaded: checkpoint.Loaded) -> None:
        """Averages, moments and place of a checkpoint, the weights of which are loaded."""
        self.ema.load_state_tensors(loaded.tensors["ema"])
        optim.load_state_tensors(self.optimizer, self.names, loaded.tensors["optimizer"])
        checkpoint.restore_random_state(loaded.tensors["random"])
        self.progress = Progress.resumed(loaded, self.progress.total, self.cfg)
        if not run_folder.goes_on(self.cfg):
            self.progress.wandb_id = None

    def _open_logger(self, closing: ExitStack) -> None:
        cfg, progress = self.cfg, self.progress
        if not ranks.is_first():
            self.logger: Any = _Quiet()
            return
        self.logger = Logger(
            self.dir,
            cfg.model_dump(mode="json"),
            mode=cfg.log.wandb,
            project=cfg.log.project,
            group=cfg.log.group,
            name=cfg.log.name or self.dir.name,
            run_id=progress.wandb_id,
            resume_step=(progress.step if self.loaded is not None else -1) if run_folder.goes_on(cfg) else None,
            done=progress.done,
        )
        closing.callback(self.logger.finish)
        progress.wandb_id = self.logger.run_id

    def tell(self) -> None:
        """What will run, in words."""
        data = source.folder_summary(self.folder, self.train_ids, self.held_ids)
        lines = buckets.summary(self.cfg, self.folder, self.train_ids, self.clips.planned)
        data = f"\n{'':<12}".join([data, *lines])
        ranks.say(describe(self.cfg, self.parts, self.grid, self.work, self.device, data))
        if ranks.size() > 1:
            ranks.say(self.spread.words(self.cfg))
        if self.loaded is not None:
            ranks.say(f"resumed from {self.loaded.path} at step {self.progress.step}")

    def check_memory(self) -> None:
        """Of several buckets the largest first: whether its batch fits. Raises DataError where it does not."""
        if self.cfg.data.buckets and not self.progress.done:
            coming = 0 if self.optimizer.state else 8  # two moments; DDP's copies of gradients lie there already
            reserve = coming * sum(shards.local(weight).numel() for weight in self.names.values())
            parts, used = self.parts, self.clips.buckets
            ranks.say(preflight.check(self.cfg, parts, self.objective, used, self.captions, reserve))

    # ------------------------------------------------------------------------------------------------- the state

    @property
    def last(self) -> Path:
        """The folder of the last checkpoint."""
        return self.dir / f"checkpoint-{self.saved}"

    def content(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
        """All that a checkpoint holds; of weights in shards, those of this rank."""
        tensors = {
            "model": self.parts.weights(),
            "ema": self.ema.state_tensors(),
            "optimizer": optim.state_tensors(self.optimizer, self.names),
            "random": checkpoint.random_state(),
            "codec": build.codec_tensors(self.parts.codec),
        }
        state = {"vocabulary": self.vocabulary, "fps": self.fps, "files": run_folder.fingerprint(self.folder)}
        return tensors, {**self.progress.state(), **state, "config": self.cfg.model_dump(mode="json")}

    def save(self) -> None:
        """Write a checkpoint of this step. Raises NotFinite for a state that holds NaN."""
        self.logger.settle()  # a resume keeps the lines up to its checkpoint, so that they must be on disk first
        tensors, state = self.content()
        step = self.progress.step
        finite.refuse_spoiled({"model": self.names, "ema": tensors["ema"], "optimizer": tensors["optimizer"]}, step)
        saving.save(self.dir, step, tensors, state, self.cfg.checkpoint.total_limit)
        self.saved = step

    def remembered(self) -> Iterator[torch.Tensor]:
        """What a step leaves to the next beside the weights."""
        yield from self.ema.state_tensors().values()
        for moments in self.optimizer.state.values():
            yield from (moments[key] for key in optim.MOMENTS)

    def stopped(self, loss: float, norm: float, batch: Batch) -> finite.NotFinite:
        """The error of a step that is not finite, all that it was computed from being kept."""
        tensors, state = self.content()
        _, noises, times, told = zip(*drawn(self.cfg, self.objective, batch, self.progress.step), strict=True)
        inputs = {"latents": batch.latents, "noise": torch.cat(noises), "times": torch.cat(times)}
        spoiled = self._spoiled(inputs, tensors)
        found = ranks.merged({"files": batch.files, "captions": [*itertools.chain(*told)], "spoiled": spoiled})
        found["spoiled"] = list(dict.fromkeys(found["spoiled"]))
        report = {"step": self.progress.step, "loss": loss, "grad_norm": norm, **found}
        return finite.stop(self.dir, report, {**tensors, "batch": inputs}, state, saving.dump)

    def _spoiled(self, inputs: dict[str, torch.Tensor], tensors: dict[str, dict[str, torch.Tensor]]) -> list[str]:
        """Names of what holds NaN or infinity on this rank, what is upstream first."""
        gradients = {name: weight.grad for name, weight in self.names.items() if weight.grad is not None}
        state = {group: tensors[group] for group in ("ema", "optimizer", "codec")}
        return finite.spoiled({"batch": inputs, "model": self.names, **state, "gradient": gradients})

    # -------------------------------------------------------------------------------------------- the looks at it

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Within it the averaged weights stand in evaluation mode, as a saved pipeline has them: not compiled either."""
        with self.ema.applied(), validation.evaluating(self.parts), ExitStack() as plain:
            if self.cfg.train.compile:
                plain.enter_context(torch.compiler.set_stance("force_eager"))
            yield

    def validate(self) -> dict[str, float]:
        """The averaged weights' held-out loss, which is returned, and their clips of the prompts."""
        step, metrics = self.progress.step, {}
        with self.looking():
            if self.held_out:
                metrics = validation.held_out_by_size(self.cfg, self.parts, self.objective, self.held_out)
                self.progress.held_out_loss = metrics["val/loss"]
                self.logger.log(step, metrics)
            out = self.dir / "samples" / f"step-{step:06d}"
            videos = validation.sample_prompts(self.pipeline, self.prompts, self.cfg, self.fps, out)
            self.logger.videos(step, "validation/videos", videos)
        return metrics

    def log(self, rate: float) -> None:
        """Means and speeds since the last time; `rate` is the learning rate of the step just made."""
        metrics = self.progress.window_metrics(rate, self.clips.sampler)
        metrics |= self.meter.metrics(len(self.clips.rejects)) | self.parts.transformer.measured()
        self.logger.log(self.progress.step, metrics)

    def export(self, folder: Path) -> None:
        """The pipeline, with the weights as they are now, in diffusers' format."""
        pipeline = self.pipeline
        if self.spread.kind == "fsdp":
            weights = parallel.gathered(self.parts.weights())
            if ranks.is_first():
                parts = build.build_parts(self.cfg, self.vocabulary)
                build.load_weights(parts, weights)
                checkpoint.load_into(parts.codec, build.codec_tensors(self.parts.codec), "codec")
                pipeline = build.build_pipeline(self.cfg, parts, self.fps)
        if ranks.is_first():
            if self.parts.adapted:
                lora.save(pipeline, self.dir)
            with build.complete(self.cfg, pipeline), lora.merged(pipeline):
                pipeline.save_pretrained(folder, safe_serialization=True)


class _Quiet:
    """The logger of a rank that is not the first."""

    run_id, where = None, ""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


# --------------------------------------------------------------------------------------------------------- the loop


def loop(run: Run) -> str | None:
    """Make steps until the run is done or a signal stops it, and save; returns the signal's name."""
    cfg, progress = run.cfg, run.progress
    if not progress.done and ranks.is_first():  # of the steps before; checkpoints hold the same weights
        shutil.rmtree(run.dir / "final", ignore_errors=True)
    with checkpoint.StopSignals() as stop, _progress_bar(progress) as bar:
        if progress.step == 0 and cfg.validation.steps is not None:
            run.validate()
        batches = run.clips.batches(progress.step)
        while ranks.agreed(stop.requested) is None and not progress.done:
            rate = learning_rate(cfg, progress)
            make_step(run, batches, rate)
            bar.total = progress.total
            bar.set_postfix(loss=f"{progress.smooth_loss:.4f}", lr=f"{rate:.1e}", refresh=False)
            bar.update()
            if progress.step % cfg.log.every == 0 or progress.done:
                run.log(rate)
            if cfg.validation.steps is not None and progress.step % cfg.validation.steps == 0 and not progress.done:
                ranks.say(f"step {progress.step}: " + _words(run.validate()))
            if progress.step % cfg.checkpoint.steps == 0 and not progress.done:
                with stop.protected():
                    run.save()
        if run.saved != progress.step:
            with stop.protected():
                run.save()
        return ranks.agreed(stop.requested)  # also of a signal that came while the last checkpoint was written


def make_step(run: Run, batches: Iterator[Batch], rate: float) -> None:
    """One optimiser step at a learning rate. Raises NotFinite before an update that would spoil the weights."""
    cfg, progress, transformer, meter = run.cfg, run.progress, run.parts.transformer, run.meter
    meter.start(run.clips.sampler.bucket(progress.step))
    batch = next(batches)
    meter.lap("data")
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    transformer.at_step(progress.step)
    loss = accumulate(cfg, run.learner.forward, run.learner.parts, run.objective, batch, progress.step)
    norm = optim.clip_and_check(run.names.values(), cfg.optim.max_grad_norm)
    fine = math.isfinite(loss) and math.isfinite(norm) and finite.whole(run.remembered())
    loss, spoiled = ranks.total(loss / ranks.size(), not fine)
    if spoiled:
        raise run.stopped(loss, norm, batch)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.ema.update(progress.step)
    transformer.observe(loss)
    meter.lap("step")
    seconds = meter.seconds
    if cfg.train.max_train_seconds is not None and progress.total is None:  # all must come to the same number of steps
        seconds = ranks.total(seconds / ranks.size())[0]
    progress.advance(loss, norm, seconds, cfg)


def finish(run: Run, began: float) -> dict[str, Any]:
    """The last look, the pipeline and the summary, which is returned; `began` is when the run did."""
    cfg, progress, logger = run.cfg, run.progress, run.logger
    run.validate()
    with run.looking():
        run.export(run.dir / "final")
        sheet, accuracy = validation.finish(cfg, run.pipeline, run.prompts, run.split, run.folder, run.fps, run.dir)
    summary = {
        "steps": progress.step,
        "seconds": {"train": round(progress.seconds, 2), "total": round(time.monotonic() - began, 2)},
        "loss": {"train": progress.smooth_loss, "held_out": progress.held_out_loss},
        **accuracy,
        "parameters": flops.trainable(run.parts.trained),
        "flops_per_step": run.work.executed,
        "dense_flops_per_step": run.work.dense,
        "rejects": len(run.clips.rejects),
    }
    if ranks.is_first():
        (run.dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    logger.image(progress.step, "validation/contact_sheet", sheet)
    logger.summary(summary)
    logger.finish()
    ranks.say(farewell(run.dir, sheet, run.last, logger, summary))
    return summary


# -------------------------------------------------------------------------------------------------- the run folder


def seed_everything(seed: int) -> None:
    """Seed the global generators. The loop draws from none of them; libraries that it calls might."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def _environment(device: torch.device) -> dict[str, Any]:
    packages = ("stgen", "torch", "torchvision", "triton", "diffusers", "transformers", "av", "wandb")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        "packages": {package: run_folder.version_of(package) for package in packages},
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "pid": os.getpid(),
    }


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
    return tqdm(
        total=progress.total,
        initial=progress.step,
        desc="training",
        unit="step",
        dynamic_ncols=True,
        disable=not ranks.is_first(),
    )


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
