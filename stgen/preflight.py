"""Before the first step of a run with buckets: does every bucket pass through the model, and does the largest fit?

Out of memory late in a run, when a rare large bucket comes up, costs the run. So each size goes through the model once on
tensors without storage, which refuses what a mixer cannot take, and the largest batch once for real on CUDA: forward and
backward, no update. On a CPU an estimate is compared with the memory that is free.
"""

import gc
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stgen import build, flops, ranks, schema, shards, text
from stgen.buckets import Bucket
from stgen.dataset import DataError
from stgen.flops import readable
from stgen.objective import Objective
from stgen.source import Batch
from stgen.step import accumulate

COMING_BYTES = 12  # of a trained number, allocated with the first step: its gradient and two moments in float32
Attempt = Callable[[Bucket, int], None]  # forward and backward of so many clips of a bucket


def check(
    cfg: schema.Config,
    parts: build.Parts,
    objective: Objective,
    buckets: Sequence[Bucket],
    captions: Sequence[str],
    reserve: int,
) -> str:
    """A line about the memory of the largest batch.

    reserve: bytes that the first update will still allocate on CUDA. Raises DataError for a bucket that the model cannot
    take, and for one whose batch does not fit, with a batch that does.
    """
    device, longest = parts.transformer.device, max(captions, key=len)
    embeds = text.encode(parts.text_encoder, parts.tokenizer, [longest], cfg.text.max_length)[0]  # [1, L, width]
    needed = activations(cfg, buckets, (embeds.shape[1], embeds.shape[2]))
    if device.type != "cuda":
        return check_estimate(cfg, buckets, needed, flops.trainable(parts.trained), free_memory())

    def attempt(bucket: Bucket, clips: int) -> None:
        with _untouched(parts):
            latents = torch.randn(
                clips // ranks.size(), *bucket.latent_shape, generator=torch.Generator().manual_seed(0)
            )
            batch = Batch(latents.to(device), [longest] * len(latents), [], 0)
            accumulate(cfg, parts.transformer, parts, objective, batch, 0)

    return check_cuda(cfg, heaviest(buckets, needed)[0], attempt, reserve, alone=not _meeting(cfg, parts))


def _meeting(cfg: schema.Config, parts: build.Parts) -> bool:
    """Whether ranks wait for one another within a pass through the model: they cannot go on after one ran out of memory."""
    weights = (weight for module in parts.trained.values() for weight in module.parameters())
    return ranks.size() > 1 and (cfg.model.norm.kind in ("batch", "prepbn") or any(map(shards.is_cut, weights)))


@contextmanager
def _untouched(parts: build.Parts) -> Iterator[None]:
    """Afterwards there are no gradients, and buffers, such as running means of norms, are what they were."""
    kept = [(buffer, buffer.clone()) for module in parts.trained.values() for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)
        for module in parts.trained.values():
            module.zero_grad(set_to_none=True)


def activations(cfg: schema.Config, buckets: Sequence[Bucket], text_shape: tuple[int, int]) -> list[int]:
    """Bytes that autograd keeps of the part of each bucket's batch that is computed at once on a rank.

    text_shape: tokens and channels of a prompt's embedding. Raises DataError for a bucket that the model cannot take.
    """
    bf16, parts = cfg.train.mixed_precision == "bf16", cfg.train.gradient_accumulation_steps * ranks.size()
    with FakeTensorMode(allow_non_fake_inputs=True):
        transformer = build.build_transformer(cfg, buckets[0].latent_shape, text_shape[1])  # type: ignore[arg-type]
        found = []
        for bucket in buckets:
            part = bucket.batch_size // parts
            try:
                found.append(flops.activation_bytes(transformer, bucket.latent_shape, text_shape, part, bf16))
            except ValueError as error:
                raise DataError(f"data.buckets: {bucket} does not pass through the model: {error}") from None
        return found


def heaviest(buckets: Sequence[Bucket], needed: Sequence[int]) -> tuple[Bucket, int]:
    """The bucket whose batch needs the most memory, and how much."""
    return max(zip(buckets, needed, strict=True), key=lambda pair: pair[1])


def check_estimate(
    cfg: schema.Config, buckets: Sequence[Bucket], needed: Sequence[int], weights: int, free: int
) -> str:
    """A line about memory on a CPU. Raises DataError, with a batch that fits, where the largest bucket does not.

    needed: bytes of activations of each bucket; weights: trained numbers; free: bytes of memory.
    """
    bucket, most = heaviest(buckets, needed)
    state = COMING_BYTES * weights
    if state + most > free:
        fits = int(bucket.batch_size * max(0, free - state) / most)
        raise DataError(_refusal(cfg, bucket, fits, f"needs about {readable(state + most, 'B')} of memory", free))
    return (
        f"memory      about {readable(state + most, 'B')} for the largest batch ({bucket.batch_size} of {bucket}), "
        f"{readable(free, 'B')} are free"
    )


def check_cuda(cfg: schema.Config, bucket: Bucket, attempt: Attempt, reserve: int, alone: bool = True) -> str:
    """Make one forward and backward pass of the largest batch, that of `bucket`, and say what it took.

    reserve: bytes of moments that the first update will still allocate. Raises DataError, with a batch that fits, where
    memory does not suffice: what does is measured on batches of fewer clips if this rank can do it `alone`.
    """
    peak, free = _peak(attempt, bucket, bucket.batch_size, reserve), torch.cuda.mem_get_info()[1]
    if peak is None:
        step = cfg.train.gradient_accumulation_steps * ranks.size()
        fewer = _halves(bucket.batch_size, step)
        fits = next((n for n in fewer if _peak(attempt, bucket, n, reserve)), 0) if alone else None
        raise DataError(_refusal(cfg, bucket, fits, "does not fit", free))
    return (
        f"memory      {readable(peak, 'B')} of {readable(free, 'B')} for the largest batch ({bucket.batch_size} of {bucket}), "
        "tried before the first step"
    )


def _peak(attempt: Attempt, bucket: Bucket, clips: int, reserve: int) -> int | None:
    """Bytes allocated at most while clips go through the model, or None where memory does not suffice."""
    torch.cuda.reset_peak_memory_stats()
    held = None
    try:
        held = torch.empty(reserve, dtype=torch.uint8, device="cuda")
        attempt(bucket, clips)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        del held
        gc.collect()  # frames of the error hold activations
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # training's own is logged


def _halves(batch: int, step: int) -> list[int]:
    """Multiples of `step` below `batch`, each about half of the one before."""
    found = []
    while (batch := batch // 2 // step * step) >= step:
        found.append(batch)
    return found


def _refusal(cfg: schema.Config, bucket: Bucket, fits: int | None, words: str, free: int) -> str:
    """The sentence of the error; `fits` clips of the bucket would do, None where that is not known."""
    told = f"data.buckets: the largest batch, {bucket.batch_size} clips of {bucket} ({bucket.grid.tokens} tokens each), {words}"
    told += f", {readable(free, 'B')} are there; "
    parts = cfg.train.gradient_accumulation_steps * ranks.size()
    less = "raise train.gradient_accumulation_steps or write train.gradient_checkpointing: true"
    if fits is None:
        key = "a lower batch_size there" if bucket.own_batch else "a lower data.tokens_per_batch"
        return told + f"write {key}, or {less}"
    fits = fits // parts * parts
    if not fits:
        return told + f"no smaller batch does: {less}, or take smaller buckets or a smaller model"
    key = f"batch_size: {fits} there" if bucket.own_batch else f"data.tokens_per_batch: {fits * bucket.grid.tokens}"
    return told + f"write {key}, or {less}"


def free_memory() -> int:
    """Bytes of memory that this machine could still give, what its file cache holds included."""
    told = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable:\s+(\d+) kB", told.read_text(), re.MULTILINE) if told.is_file() else None
    return 1024 * int(found[1]) if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
