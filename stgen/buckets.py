"""Buckets: clips of several sizes (frames, height, width) in one run, a batch being of one of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from stgen import data_spec, flops, schema
from stgen.codec import Codec, CodecError
from stgen.dataset import DataError, VideoFolder
from stgen.model import VideoTransformer
from stgen.ops.cost import Work
from stgen.progress import Load
from stgen.samplers import BucketSampler, Sampler, StepSampler
from stgen.sizes import Size
from stgen.tokens import Grid, grid_of

FEWER = 32  # frames given up at most in search of a number that the codec takes


@dataclass(frozen=True)
class Bucket:
    """One size of clip, as it is read, and how many of them make a step."""

    size: Size
    latent_shape: tuple[int, ...]  # channels, frames, rows, columns
    grid: Grid
    batch_size: int
    own_batch: bool = True  # not from data.tokens_per_batch
    rule: str = ""  # of the codec, where fewer frames are read than the config asks for

    def __str__(self) -> str:
        return str(self.size)


def plan(cfg: schema.Config, codec: Codec, ranks: int = 1) -> list[Bucket]:
    """The buckets of a config, or its one size as the only bucket.

    Raises DataError for a size that codec or tokens.patch_size cannot divide, and for a batch that gradient accumulation
    and ranks cannot share out.
    """
    data = cfg.data
    if not data.buckets:
        size = Size(data.num_frames, data.height, data.width)
        shape = codec.latent_shape(*size)
        grid = grid_of(shape[1:], cfg.tokens.patch_size)
        return [Bucket(size, shape, grid, cfg.train.train_batch_size)]
    found = [_bucket(cfg, i, bucket, codec, ranks) for i, bucket in enumerate(data.buckets)]
    sampled = Size(data.num_frames, data.height, data.width)
    if sampled not in [bucket.size for bucket in found]:
        sizes = ", ".join(map(str, found))
        raise DataError(
            f"data.num_frames, data.height, data.width: {sampled}, the size of sampled clips, is none of the buckets, as "
            f"which {sizes} are read; write one of them"
        )
    return found


def _bucket(cfg: schema.Config, number: int, asked: data_spec.Bucket, codec: Codec, ranks: int) -> Bucket:
    where = f"data.buckets.{number}"
    size, shape = _taken(asked, codec, cfg.tokens.patch_size, where)
    grid = grid_of(shape[1:], cfg.tokens.patch_size)
    own = asked.batch_size is not None or cfg.data.tokens_per_batch is None
    rule = _rule(asked, size, shape[1], codec, cfg.tokens.patch_size[0])
    return Bucket(size, shape, grid, _batch_size(cfg, asked, grid, where, ranks), own, rule)


def _taken(
    asked: data_spec.Bucket, codec: Codec, patch: Sequence[int], where: str
) -> tuple[Size, tuple[int, int, int, int]]:
    """The size with as many of the frames asked for as the codec and the patches of tokens take, and its latents' shape."""
    fault, takes = "", getattr(codec, "takes", lambda frames: True)  # a diffusers autoencoder has to try
    for frames in range(asked.num_frames, max(0, asked.num_frames - FEWER), -1):
        if not takes(frames):
            fault = fault or f"{frames} frames are not taken by the autoencoder"
            continue
        try:
            shape = codec.latent_shape(frames, asked.height, asked.width)
            grid_of((shape[1], patch[1], patch[2]), patch)
        except (CodecError, ValueError) as error:
            fault = fault or str(error)
            if "frames" not in str(error):
                raise DataError(f"{where}: {asked}: {error}") from None
            continue
        try:
            grid_of(shape[1:], patch)
        except ValueError as error:
            raise DataError(f"{where}: {asked}: {error}") from None
        return Size(frames, asked.height, asked.width), shape
    raise DataError(f"{where}: {asked}: {fault}, nor are fewer frames taken; leave the bucket out or give it more")


def _rule(asked: data_spec.Bucket, size: Size, latent_frames: int, codec: Codec, joined: int) -> str:
    """Why fewer frames are read than asked: `48 frames asked, the codec takes 4n+1: 45 read`; else nothing."""
    if size.num_frames == asked.num_frames:
        return ""
    each = (size.num_frames - 1) // max(1, latent_frames - 1)
    try:
        codec.latent_shape(each + 1, size.height, size.width)
        taken = f"{each}n+1"
    except (CodecError, ValueError):
        taken = f"multiples of {size.num_frames // latent_frames}"
    tokens = f", tokens.patch_size joins {joined} latent frames" if joined > 1 else ""
    return f"{asked.num_frames} frames asked, the codec takes {taken}{tokens}: {size.num_frames} read"


def _batch_size(cfg: schema.Config, asked: data_spec.Bucket, grid: Grid, where: str, ranks: int) -> int:
    """Clips of a step; equal parts of them go to ranks and gradient accumulation."""
    accumulated, budget = cfg.train.gradient_accumulation_steps, cfg.data.tokens_per_batch
    parts = accumulated * ranks
    shared = f"{accumulated} (train.gradient_accumulation_steps) x {ranks} ranks"
    if asked.batch_size is None and budget is not None:
        if count := budget // (grid.tokens * parts) * parts:
            return count
        raise DataError(
            f"data.tokens_per_batch: {budget}, but one clip of {asked} has {grid.tokens} tokens, to each of {shared}; "
            f"write {grid.tokens * parts} or more, or leave the bucket out"
        )
    count = asked.batch_size or cfg.train.train_batch_size
    if count % parts:
        raise DataError(
            f"{where}.batch_size: {count} clips of {asked} cannot be shared equally by {shared}; write a multiple of {parts}"
        )
    return count


# -------------------------------------------------------------------------------------------------- clips in buckets


def sampler(cfg: schema.Config, folder: VideoFolder, ids: Sequence[int], buckets: Sequence[Bucket]) -> Sampler:
    """The order in which the clips `ids` are trained on. Raises DataError for a bucket with fewer clips than a batch."""
    weights = {i: folder.samples[i].weight for i in ids}
    if not cfg.data.buckets:
        some = list(weights.values()) if set(weights.values()) != {1.0} else None
        return StepSampler(ids, cfg.train.train_batch_size, cfg.run.seed, weights=some)
    members = []
    for number, (group, bucket) in enumerate(zip(folder.by_size(ids), buckets, strict=True)):
        if 0 < len(group) < bucket.batch_size:
            raise DataError(
                f"data.buckets.{number}: {bucket} has {len(group)} clip{'s' * (len(group) > 1)} to train on and a batch of "
                f"{bucket.batch_size}; lower its batch_size, add videos, or leave it out, so that they go to other buckets"
            )
        if group:
            members.append(
                StepSampler(group, bucket.batch_size, cfg.run.seed, 0, [weights[i] for i in group], (number,))
            )
    return BucketSampler(members, cfg.run.seed)


def used(folder: VideoFolder, ids: Sequence[int], buckets: Sequence[Bucket]) -> list[Bucket]:
    """The buckets that hold clips, in the order in which a sampler numbers them."""
    return [bucket for bucket, group in zip(buckets, folder.by_size(ids), strict=True) if group]


def summary(cfg: schema.Config, folder: VideoFolder, ids: Sequence[int], buckets: Sequence[Bucket]) -> list[str]:
    """A line for each bucket, and one for frames that are not read; nothing without buckets."""
    if not cfg.data.buckets:
        return []
    groups = folder.by_size(ids)
    steps = [sum(folder.samples[i].weight for i in g) / b.batch_size for g, b in zip(groups, buckets, strict=True)]
    lines = []
    for bucket, group, often in zip(buckets, groups, steps, strict=True):
        share = f"{bucket.batch_size} a step, {often / sum(steps):.0%} of steps" if group else "never trained"
        lines.append(f"{bucket}: {len(group)} clips of {bucket.grid.tokens} tokens, {share}")
    return lines + list(dict.fromkeys(bucket.rule for bucket in buckets if bucket.rule))


def works(cfg: schema.Config, transformer: VideoTransformer, buckets: Sequence[Bucket], text_tokens: int) -> list[Work]:
    """What a step of each bucket costs."""
    recompute = cfg.train.gradient_checkpointing
    return [flops.step_work(transformer, b.grid, text_tokens, b.batch_size, recompute) for b in buckets]


def mean_work(works: Sequence[Work], shares: Sequence[float]) -> Work:
    """What a step costs on average, where each bucket has its share of steps."""
    if len(works) == 1:
        return works[0]
    pairs = list(zip(works, shares, strict=True))
    return Work(round(sum(w.executed * s for w, s in pairs)), round(sum(w.dense * s for w, s in pairs)))


def loads(buckets: Sequence[Bucket], works: Sequence[Work]) -> list[Load]:
    """The same as a Meter counts it."""
    return [
        Load(b.batch_size, b.batch_size * b.grid.tokens, work.executed) for b, work in zip(buckets, works, strict=True)
    ]
