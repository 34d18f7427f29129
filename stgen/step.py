"""One optimiser step: draws keyed by seed and sample, losses, and their gradients."""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from stgen import build, ranks, schema, text
from stgen.objective import Objective
from stgen.source import Batch


def generator(*key: Any) -> torch.Generator:
    """A generator that depends on its key alone."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)


def draw(cfg: schema.Config, objective: Objective, batch: Batch, first: int) -> tuple[Tensor, Tensor, list[str]]:
    """Noise [B, ...], times [B] or [B, T], and captions after dropout, each keyed by (seed, number of the sample in the run).

    So the draws do not depend on how a batch is cut into parts or shared out, and two runs of one seed see the same.
    """
    noise, times, captions = [], [], []
    together = cfg.tokens.patch_size[0]  # latent frames of a token, which have one time
    for i, caption in enumerate(batch.captions):
        g = generator(cfg.run.seed, "draw", first + i)
        times.append(objective.draw_clip_times(batch.latents.shape[2] // together, g))
        captions.append("" if float(torch.rand((), generator=g)) < cfg.text.caption_dropout else caption)
        noise.append(torch.randn(batch.latents.shape[1:], generator=g))
    t = torch.cat(times) if objective.frame_times == "clip" else torch.stack(times).repeat_interleave(together, 1)
    return torch.stack(noise).to(batch.latents.device), t.to(batch.latents.device), captions


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


def drawn(
    cfg: schema.Config, objective: Objective, batch: Batch, step: int
) -> Iterator[tuple[Batch, Tensor, Tensor, list[str]]]:
    """The parts of a batch with their draws; of each part of the whole batch every rank has an equal share, in order."""
    first = step * cfg.train.train_batch_size if batch.first is None else batch.first
    for part in batch.parts(cfg.train.gradient_accumulation_steps):
        count = len(part.captions)
        yield part, *draw(cfg, objective, part, first + ranks.rank() * count)
        first += ranks.size() * count


def accumulate(
    cfg: schema.Config, forward: Any, parts: build.Parts, objective: Objective, batch: Batch, step: int
) -> float:
    """Gradients of the mean loss over the batch, computed in equal parts; returns that loss.

    Of several ranks each is given its share of the batch; the loss is that of the share, the gradients are those of all.
    """
    total, done = 0.0, 0
    for part, noise, t, captions in drawn(cfg, objective, batch, step):
        done += len(part.captions)
        with ExitStack() as alone:
            if done < len(batch.captions):  # DDP sums over the ranks once, with the last part
                for module in (forward, parts.text_encoder):
                    alone.enter_context(module.no_sync()) if hasattr(module, "no_sync") else None
            loss = losses(cfg, forward, parts, objective, part, noise, t, captions).sum() / len(batch.captions)
            loss.backward()
        total += float(loss.detach())
    return total
