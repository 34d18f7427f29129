"""What a model can do: clips of fixed prompts, the loss on held-out clips, the oracle's verdict on built-in shapes."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stgen import buckets, build, codec, dataset, ranks, schema, shapes, video
from stgen.objective import Objective
from stgen.pipeline import VideoPipeline
from stgen.source import Batch
from stgen.step import generator, losses


@contextmanager
def evaluating(parts: build.Parts) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards training mode again."""
    for module in parts.trained.values():
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in parts.trained.values():
            module.train()


def at_once(cfg: schema.Config, component: Any, latent_shape: Sequence[int] | None = None) -> int:
    """How many clips, of latents of that shape or else of the size that is sampled, a rank computes at once in training."""
    batch = cfg.train.train_batch_size
    if cfg.data.buckets:
        adapted, data = codec.as_codec(component), cfg.data
        shape = tuple(latent_shape or adapted.latent_shape(data.num_frames, data.height, data.width))
        batch = next((b.batch_size for b in buckets.plan(cfg, adapted) if tuple(b.latent_shape) == shape), batch)
    return max(1, batch // (cfg.train.gradient_accumulation_steps * ranks.size()))


def held_out_loss(cfg: schema.Config, parts: build.Parts, objective: Objective, batch: Batch) -> float:
    """Mean loss over the held-out clips, each at a fixed time and noise."""
    found = held_out_losses(cfg, parts, objective, batch)
    return sum(float(part.sum()) for part in found.split(cfg.train.train_batch_size)) / len(found)


def held_out_by_size(
    cfg: schema.Config, parts: build.Parts, objective: Objective, batches: Mapping[str, Batch]
) -> dict[str, float]:
    """The mean loss over the held-out clips, and where they are of several sizes that over those of each."""
    found = {size: held_out_loss(cfg, parts, objective, batch) for size, batch in batches.items()}
    if len(found) == 1:
        return {"val/loss": next(iter(found.values()))}
    counts = {size: len(batch.captions) for size, batch in batches.items()}
    mean = sum(found[size] * counts[size] for size in found) / sum(counts.values())
    return {"val/loss": mean, **{f"val/loss/{size}": loss for size, loss in found.items()}}


def held_out_losses(
    cfg: schema.Config, parts: build.Parts, objective: Objective, batch: Batch, part: int = 0, of: int = 1
) -> Tensor:
    """Loss of each held-out clip at a fixed time and noise, the same for every model: [clips].

    The times are evenly spaced quantiles of the density of training times, so that the mean compares with the training
    loss; with `of` above 1 they are taken from that `part` of as many equally likely ones. Of several ranks each computes its
    share of the clips, and has all.
    """
    count, found = len(batch.captions), []
    draws = objective.draw_times(4096, generator("held-out times")).sort().values
    places = torch.arange(count) * 2 + 1 + 2 * count * part
    times = draws[places * len(draws) // (2 * count * of)]  # [count]
    key = ("held-out",) if part == 0 else ("held-out", part, "of", of)
    shared, size = ranks.share(range(count)), at_once(cfg, parts.codec, batch.latents.shape[1:])
    for start in range(0, len(shared), size):
        rows = [*shared[start : start + size]]
        latents = batch.latents[rows]
        noise = [torch.randn(latents.shape[1:], generator=generator(cfg.run.seed, *key, i)) for i in rows]
        t = times[rows].to(latents.device)
        clips = Batch(latents, [batch.captions[i] for i in rows], [])
        noise = torch.stack(noise).to(latents.device)
        found.append(losses(cfg, parts.transformer, parts, objective, clips, noise, t, clips.captions))
    mine = torch.cat([batch.latents.new_empty(0), *found])  # of more ranks than clips some have none
    return mine if ranks.size() == 1 else torch.stack(ranks.joined([*mine.cpu()], count))


def prompts_of(cfg: schema.Config, captions: list[str], split: shapes.Split | None) -> list[str]:
    """The prompts of the config; else two seen and two held-out ones of built-in shapes, or four captions."""
    if cfg.validation.prompts is not None:
        return cfg.validation.prompts
    if split is not None and split.held_out:
        return [combo.prompt for combo in (*split.seen[::20][:2], *split.held_out[:2])]
    return list(dict.fromkeys(captions))[:4]


def sample_prompts(
    pipeline: VideoPipeline, prompts: list[str], cfg: schema.Config, fps: float, out: Path
) -> list[tuple[Path, str]]:
    """Sample each prompt at its fixed seed into `out`; returns files and captions. Of several ranks the first one writes."""
    seeds = [cfg.validation.seed + i for i in range(len(prompts))]
    clips = sample_clips(pipeline, prompts, seeds, cfg)
    files = []
    for i, (prompt, seed, frames) in enumerate(zip(prompts, seeds, clips, strict=True)):
        path = out / f"{i:03d}-seed{seed}.mp4"
        if ranks.is_first():
            path.parent.mkdir(parents=True, exist_ok=True)
            video.write(path, video.Clip(frames, fps))
        files.append((path, f"{i}: {prompt}"))
    return files


def sample_clips(pipeline: VideoPipeline, prompts: list[str], seeds: list[int], cfg: schema.Config) -> list[Tensor]:
    """One clip, uint8 [T, 3, H, W], for each prompt and seed; of several ranks each samples its share and has all."""
    pipeline.set_progress_bar_config(disable=True)
    clips, batch, count = [], at_once(cfg, pipeline.codec), len(prompts)
    prompts, seeds = [*ranks.share(prompts)], [*ranks.share(seeds)]
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        clips += pipeline.clips(part, seeds[start : start + batch], [cfg.validation.negative_prompt] * len(part))
    return ranks.joined(clips, count)


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
    if ranks.is_first():
        video.contact_sheet(sheet, [video.read(path) for path, _ in files], captions)
    return sheet, accuracy


def judge(
    cfg: schema.Config, pipeline: VideoPipeline, split: shapes.Split, folder: dataset.VideoFolder
) -> dict[str, Any]:
    """Share of clips of which the oracle reads the whole prompt: {seen, held_out, real}, with n and intervals beside."""
    count = cfg.validation.judged_noises * len(split.held_out)
    asked = asked_clips(cfg, pipeline, split, count)
    return verdicts(asked, folder, split.around) if ranks.is_first() else {}


def asked_clips(
    cfg: schema.Config, pipeline: VideoPipeline, split: shapes.Split, count: int
) -> dict[str, tuple[list[shapes.Combination], list[Tensor]]]:
    """`count` clips of combinations seen and as many of held-out ones, taking turns: {group: (asked, clips)}."""
    found = {}
    for name, combos in {"seen": split.seen, "held_out": split.held_out}.items():
        asked = [combos[i % len(combos)] for i in range(count)] if combos else []
        seeds = [10_000 + i for i in range(len(asked))]
        found[name] = (asked, sample_clips(pipeline, [combo.prompt for combo in asked], seeds, cfg))
    return found


def verdicts(
    groups: dict[str, tuple[list[shapes.Combination], list[Tensor]]], folder: dataset.VideoFolder, around: bool
) -> dict[str, Any]:
    """The oracle's verdict on each group of clips, and on as many real ones."""
    detail = {name: shapes.accuracy(clips, asked, around) for name, (asked, clips) in groups.items() if asked}
    count = max(len(asked) for asked, _ in groups.values())
    real = [folder[(i, 0)] for i in range(min(count, len(folder)))]
    by_prompt = {combo.prompt: combo for combo in shapes.ALL}
    clips = [item["frames"].movedim(0, 1) for item in real]
    detail["real"] = shapes.accuracy(clips, [by_prompt[item["caption"]] for item in real], around)
    return {"accuracy": {name: value["all"] for name, value in detail.items()}, "accuracy_detail": detail}
