"""What a trained run is worth and what it cost, by one protocol for every run: RUN/measures.json.

Everything but `cost` and `seconds` is repeatable: the averaged weights, clips, noise, times, prompts and seeds are fixed
by the run's config and the protocol, so that two runs of one data and seed are measured on the same draws.
"""

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import adaptive_avg_pool2d

from stgen import build, codec, config, dataset, flops, schema, shapes, source, text, validation
from stgen.attention.pattern import Remade
from stgen.lab.inspect_masks import mixers_of, runs_of
from stgen.lab.inspect_statistics import ClipIn, study
from stgen.metrics import distances, temporal
from stgen.metrics.features import Features, open_features
from stgen.objective import Objective
from stgen.pipeline import VideoPipeline
from stgen.step import generator
from stgen.tokens import Grid, grid_of

FILE = "measures.json"
FORMAT = 1  # of its contents; one of another is measured anew
READ = 32  # training clips in memory at once
REDUCED = (16, 32)  # frames and rows or columns at most, of the pixels in which the nearest training clip is looked for
MATMUL = {"cpu": 1024, "cuda": 8192}  # size of the products that give a device's peak
REPEATS = 10  # of them


class MeasureError(ValueError):
    """A run that cannot be measured; one sentence that says what to do."""


@dataclass(frozen=True)
class Protocol:
    """How a run is measured; stored with the numbers."""

    t_bins: int = 8  # equally likely bins of the training times, one draw of each held-out clip in each
    samples: int = 64  # clips sampled of captions; of built-in shapes as many of seen prompts and of held-out ones,
    # or those that validation.judged_noises asks for
    real: int = 1024  # training clips that samples are compared with
    features: str = "random"  # see stgen.metrics.features.open_features
    kernel: distances.Kernel = "rbf"  # of the MMD
    attention_clips: int = 2
    attention_times: int = 3
    seed: int = 0  # chooses the training clips


@dataclass
class _Subject:
    """A run, opened."""

    folder: Path
    cfg: schema.Config
    pipeline: VideoPipeline
    parts: build.Parts
    videos: dataset.VideoFolder
    split: shapes.Split | None
    train: tuple[int, ...]
    held_out: tuple[int, ...]
    steps: int
    device: torch.device

    @property
    def objective(self) -> Objective:
        return self.pipeline.objective

    @property
    def grid(self) -> Grid:
        return grid_of(self.latent_shape[1:], self.cfg.tokens.patch_size)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        size = self.cfg.data
        return self.pipeline.latent_shape(size.num_frames, size.height, size.width)

    def clips(self, ids: Sequence[int]) -> list[Tensor]:
        """Real clips, uint8 [T, 3, H, W]: of each video the one of the first epoch."""
        inside = self.videos.within(ids)
        return [inside[i, 0]["frames"].movedim(0, 1) for i in ids]


def measure(
    run: Path, *, protocol: Protocol | None = None, progress: Callable[[str], Any] = lambda what: None
) -> dict[str, Any]:
    """Measure the averaged weights of a run, write RUN/measures.json and return what it holds.

    `progress` is told what is being measured. A run that has not ended is measured at its newest checkpoint.
    Raises MeasureError, BuildError or FeatureError.
    """
    began, protocol = time.perf_counter(), protocol or Protocol()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(protocol.seed)
        progress("loading")
        one = _open(Path(run))
        features = open_features(protocol.features, codec.as_codec(one.pipeline.codec).encode, one.device)
        progress("held-out loss")
        looked_at = one.held_out or one.train[: protocol.attention_clips]
        batch = source.Batch.read(one.videos.within(looked_at), looked_at, one.parts.codec, one.device)
        result = {"format": FORMAT, "steps": one.steps, "held_out": _held_out(one, batch, protocol.t_bins)}
        progress("sampling")
        sampled, accuracy = _sampled(one, protocol)
        progress("comparing with real clips")
        result |= {"accuracy": accuracy, **_against_real(one, features, sampled, protocol)}
        progress("attention and cost")
        result |= {"cost": _cost(one), "attention": _attention(one, batch, protocol)}
    result["protocol"] = _told_protocol(one, protocol, features, len(sampled))
    result["seconds"] = round(time.perf_counter() - began, 2)
    _write(Path(run) / FILE, _finite(result))
    return read(Path(run)) or {}


def read(run: Path) -> dict[str, Any] | None:
    """What `measure` wrote; None where there is nothing whole."""
    try:
        return json.loads((run / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def measured(
    run: Path, *, protocol: Protocol | None = None, progress: Callable[[str], Any] = lambda what: None
) -> dict[str, Any]:
    """What `measure` wrote of these weights by this protocol, else measured now."""
    asked, found = protocol or Protocol(), read(run)
    same = found and (found.get("format"), found.get("steps")) == (FORMAT, _steps(run))
    if found and same and found["protocol"]["asked"] == asdict(asked):
        return found
    return measure(run, protocol=asked, progress=progress)


# ------------------------------------------------------------------------------------------------------------- the run


def _open(run: Path) -> _Subject:
    diffusers.utils.logging.disable_progress_bar()
    if not (run / "config.yaml").is_file():
        raise MeasureError(f"{run} is no run folder; it holds no config.yaml")
    cfg = config.load(run / "config.yaml", [], schema.Config)
    try:
        pipeline = build.load_pipeline(run)
    except (OSError, SafetensorError) as error:
        raise MeasureError(f"{run} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    device = build.device_of(cfg)
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    parts = build.Parts(pipeline.codec, pipeline.text_encoder, pipeline.tokenizer, pipeline.transformer)
    for module in parts.trained.values():
        module.eval()
    videos, split = source.open_folder(cfg, run)
    train, held_out = source.split_as_sampled(cfg, videos)
    return _Subject(run, cfg, pipeline, parts, videos, split, train, held_out, _steps(run), device)


def _steps(run: Path) -> int:
    """Optimiser steps behind the weights that `load_pipeline` takes."""
    if (run / "final" / "model_index.json").is_file():
        return int(_json(run / "summary.json").get("steps", 0))
    return max((int(path.name.split("-")[1]) for path in run.glob("checkpoint-*[0-9]")), default=0)


# ------------------------------------------------------------------------------------------------------ loss and clips


def _held_out(one: _Subject, batch: source.Batch, bins: int) -> dict[str, Any] | None:
    """The loss of each held-out clip in each bin of times, at draws that are the same for every model."""
    if not one.held_out:
        return None
    found = [validation.held_out_losses(one.cfg, one.parts, one.objective, batch, part, bins) for part in range(bins)]
    per_clip = torch.stack(found, dim=1).double().cpu()  # [clips, bins]
    draws = one.objective.draw_times(4096, generator("held-out times")).sort().values
    edges = [0.0, *(float(draws[i * len(draws) // bins]) for i in range(1, bins)), 1.0]
    return {
        "mean": float(per_clip.mean()),
        "per_clip": per_clip.tolist(),
        "t_bins": [list(pair) for pair in itertools.pairwise(edges)],
        "clips": batch.files,
    }


def _sampled(one: _Subject, protocol: Protocol) -> tuple[list[Tensor], dict[str, Any] | None]:
    """Clips of prompts like those of training, and for built-in shapes how many are right."""
    if one.split is not None and one.split.held_out:
        count = one.cfg.validation.judged_noises * len(one.split.held_out) or protocol.samples
        groups = validation.asked_clips(one.cfg, one.pipeline, one.split, count)
        verdicts = validation.verdicts(groups, one.videos, one.split.around)
        detail = verdicts["accuracy_detail"]
        return groups["seen"][1], verdicts["accuracy"] | {"detail": detail}
    ids = one.held_out or one.train
    prompts = [one.videos.samples[ids[i % len(ids)]].caption for i in range(protocol.samples)]
    seeds = [10_000 + i for i in range(len(prompts))]
    return validation.sample_clips(one.pipeline, prompts, seeds, one.cfg), None


def _against_real(one: _Subject, features: Features, sampled: list[Tensor], protocol: Protocol) -> dict[str, Any]:
    """Distances of the sampled clips to training clips, beside those that held-out real clips are at."""
    held_out = one.clips(one.held_out)
    sets = {name: clips for name, clips in {"sampled": sampled, "held_out": held_out}.items() if clips}
    reference, near = _looked_up(one, features, sets, protocol)
    enough = {name: features(clips) for name, clips in sets.items() if min(len(clips), len(reference)) > 1}
    frechet = {name: distances.frechet(x, reference) for name, x in enough.items()}
    mmd = {name: distances.mmd(x, reference, protocol.kernel) for name, x in enough.items()}
    about = {"n": len(sampled), "n_training": len(reference), "n_held_out": len(held_out), "features": features.name}
    name = "FVD" if features.fvd else "Fréchet distance"
    return {
        "frechet": _beside(frechet, {"name": name, **about, "dimensions": reference.shape[1]}),
        "mmd": _beside(mmd, {"name": "squared MMD, unbiased", **about, "kernel": protocol.kernel}),
        "flicker": _flicker(sampled, held_out),
        "nearest": _nearest(near, len(reference), len(one.train)),
    }


def _looked_up(
    one: _Subject, features: Features, sets: dict[str, list[Tensor]], protocol: Protocol
) -> tuple[Tensor, dict[str, Tensor]]:
    """Features of training clips [n, d], and how far each clip of the sets is from its nearest; a few in memory at once."""
    found, own = [], {name: _reduced(clips) for name, clips in sets.items()}
    near = {name: torch.full((len(clips),), math.inf, dtype=torch.float64) for name, clips in sets.items()}
    for clips in _training_clips(one, protocol):
        found.append(features(clips))
        pixels = _reduced(clips)
        near = {name: torch.minimum(near[name], distances.nearest(x, pixels)) for name, x in own.items()}
    return torch.cat(found), near


def _beside(values: dict[str, float], about: dict[str, Any]) -> dict[str, Any] | None:
    """The number of the sampled clips, and as `real` that of held-out ones."""
    return {"value": values["sampled"], "real": values.get("held_out"), **about} if "sampled" in values else None


def _training_clips(one: _Subject, protocol: Protocol) -> Iterator[list[Tensor]]:
    order = torch.randperm(len(one.train), generator=generator(protocol.seed, "measure", "training clips"))
    ids = [one.train[i] for i in sorted(order[: protocol.real].tolist())]
    for start in range(0, len(ids), READ):
        yield one.clips(ids[start : start + READ])


def _reduced(clips: Sequence[Tensor]) -> Tensor:
    """Grey levels of evenly spaced frames, averaged down to a few pixels: [n, d] float32."""
    frames, side = REDUCED
    chosen = torch.linspace(0, len(clips[0]) - 1, min(frames, len(clips[0]))).round().long()
    height, width = clips[0].shape[-2:]
    size = (min(side, height), min(side, width))
    return torch.stack([adaptive_avg_pool2d(clip[chosen].float(), size).flatten() for clip in clips])


def _flicker(sampled: list[Tensor], held_out: list[Tensor]) -> dict[str, Any]:
    """Means over clips, of sampled and of real ones."""

    def means(clips: list[Tensor]) -> dict[str, float]:
        each = {"change": temporal.change, "flicker": temporal.flicker, "consistency": temporal.consistency}
        return {name: statistics.fmean(map(of, clips)) for name, of in each.items()}

    real = means(held_out) if held_out else None
    return {**means(sampled), "real": real, "unit": temporal.UNIT, "n": len(sampled)}


def _nearest(near: dict[str, Tensor], looked_at: int, of: int) -> dict[str, Any]:
    """Distance to the nearest training clip: `median` and `least` over sampled clips, and over held-out real ones.

    `ratio` divides the medians. A model that copies is nearer than what it has not seen: far below 1.
    """

    def middle(x: Tensor) -> dict[str, float]:
        return {"median": float(x.median()), "least": float(x.min())}

    real = middle(near["held_out"]) if "held_out" in near else None
    own = middle(near["sampled"])
    ratio = own["median"] / real["median"] if real and real["median"] > 0 else None
    unit = f"{temporal.UNIT}, root mean square over at most {REDUCED[0]} frames of {REDUCED[1]}x{REDUCED[1]}"
    return {**own, "real": real, "ratio": ratio, "looked_at": looked_at, "of": of, "unit": unit}


# --------------------------------------------------------------------------------------------------------------- costs


def _cost(one: _Subject) -> dict[str, Any]:
    """What a step takes: counted, and as the run's own log says."""
    cfg, transformer = one.cfg, one.parts.transformer
    length = text.encode(one.parts.text_encoder, one.parts.tokenizer, [_caption(one)], cfg.text.max_length)[1].shape[1]
    batch, grid = cfg.train.train_batch_size, one.grid
    step = flops.step_work(transformer, grid, length, batch, cfg.train.gradient_checkpointing)
    useful = transformer.work(grid, length).executed * 3 * batch
    seconds = _logged(one.folder, "perf/step_time_s")
    memory = _logged(one.folder, "perf/peak_mem_gb", max)
    peak = peak_flops(one.device, cfg.train.mixed_precision == "bf16", _json(one.folder / "env.json").get("threads"))
    return {
        "parameters": flops.trainable(one.parts.trained),
        "flops_per_step": step.executed,
        "dense_flops_per_step": step.dense,
        "tokens_per_second": batch * grid.tokens / seconds if seconds else None,
        "step_ms": 1e3 * seconds if seconds else None,
        "peak_memory_bytes": round(1e9 * memory) if memory else counted_memory(one, length),
        "memory": "measured" if memory else "counted: weights, gradients, moments, averages and activations",
        "tflops": step.executed / seconds / 1e12 if seconds else None,
        "mfu": useful / seconds / peak if seconds else None,
        "peak_tflops": peak / 1e12,
        "tokens": grid.tokens,
        "clips_per_step": batch,
        "training_seconds": _json(one.folder / "summary.json").get("seconds", {}).get("train"),
        "not_repeatable": "tokens_per_second, step_ms, tflops, mfu, peak_tflops, training_seconds and a measured "
        "peak_memory_bytes are those of a machine that may be busy",
    }


def counted_memory(one: _Subject, text_tokens: int) -> int:
    """Bytes that a training step holds at its peak, without what libraries need for themselves; nothing is allocated."""
    cfg, shape, width = one.cfg, one.latent_shape, one.parts.transformer.config.text_width
    clips, bf16 = (
        cfg.train.train_batch_size // cfg.train.gradient_accumulation_steps,
        cfg.train.mixed_precision == "bf16",
    )
    with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad():
        transformer = build.build_transformer(cfg, shape, width)
        kept = flops.activation_bytes(transformer, shape, (text_tokens, width), clips, bf16)
    return flops.STATE_BYTES * flops.trainable(one.parts.trained) + kept


def peak_flops(device: torch.device, bf16: bool, threads: int | None = None) -> float:
    """FLOP/s of the best of several square matrix products, in the type of training and with as many threads."""
    n, own = MATMUL[device.type], torch.get_num_threads()
    a = torch.ones(n, n, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    torch.set_num_threads(threads or own)
    try:
        return 2 * n**3 / min(_seconds_of_product(a) for _ in range(REPEATS))
    finally:
        torch.set_num_threads(own)


def _seconds_of_product(a: Tensor) -> float:
    def wait() -> None:
        if a.is_cuda:
            torch.cuda.synchronize(a.device)

    wait()
    began = time.perf_counter()
    torch.mm(a, a)
    wait()
    return time.perf_counter() - began


def _logged(run: Path, key: str, of: Callable[[list[float]], float] = statistics.median) -> float | None:
    """A metric of the run's log over its lines; None where it has none. The first line, which warms up, is left out."""
    found = [float(line[key]) for line in lines_of(run) if key in line]
    return of(found[1:] or found) if found else None


def lines_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl that can be read; none where there is no such file."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:  # half a line, of a run that was killed or goes on
            continue
    return found


# ----------------------------------------------------------------------------------------------------------- attention


def _attention(one: _Subject, batch: source.Batch, protocol: Protocol) -> dict[str, Any] | None:
    """Means over layers and heads; None where no head has a map of tokens.

    entropy: of a row of the map as a share of that of an even row. sink_mass: share of the mass on sinks that carry no
    token. density: share of the pairs of a sequence that are attended; of_clip: of all pairs of the clip.
    """
    if not mixers_of(one.parts.transformer):
        return None
    inputs = []
    for i, latents in enumerate(batch.latents[: protocol.attention_clips]):
        noise = torch.randn(latents.shape, generator=generator(protocol.seed, "measure", "attention", i))
        prompt, mask, *_ = one.pipeline.encode_prompt(batch.captions[i])
        inputs.append(ClipIn(latents[None], noise[None].to(one.device), prompt, mask))
    times = [(i + 0.5) / protocol.attention_times for i in range(protocol.attention_times)]
    found = study(one.parts.transformer, one.objective, one.grid, inputs, times).uses
    known = [use for use in found if use.sample is not None]
    if not known:
        return None
    density, of_clip = _density(one)
    return {
        "entropy": _mean([use.mean("entropy_share") for use in known]),
        "sink_mass": _mean([use.mean("sink") for use in known]),
        "density": density,
        "of_clip": of_clip,
        "clips": len(inputs),
        "times": times,
    }


def _mean(values: list[Tensor]) -> float | None:
    mean = float(torch.cat(values).nanmean())
    return None if math.isnan(mean) else mean


def _density(one: _Subject) -> tuple[float | None, float | None]:
    """Shares of the pairs of a sequence, and of all pairs of the clip, that a head attends; means over all heads."""
    pairs, of_clip, heads = 0.0, 0.0, 0
    for run in (run for mixer in mixers_of(one.parts.transformer) for run in runs_of(mixer)):
        if not isinstance(run.group.pattern, Remade):
            share, count = run.density(one.grid)[0], run.group.count
            pairs, heads = pairs + share * count, heads + count
            of_clip += share * count * min(1.0, run.layout.sequence(one.grid)[1] / one.grid.tokens)
    return (pairs / heads, of_clip / heads) if heads else (None, None)


# -------------------------------------------------------------------------------------------------------------- record


def _told_protocol(one: _Subject, protocol: Protocol, features: Features, samples: int) -> dict[str, Any]:
    """What has to be the same for two runs' numbers to compare."""
    data, validate = one.cfg.data, one.cfg.validation
    return {
        "asked": asdict(protocol),
        "weights": "ema",
        "frames": data.num_frames,
        "size": [data.height, data.width],
        "latent_shape": list(one.latent_shape),
        "samples": samples,
        "features": features.about(),
        "num_inference_steps": validate.num_inference_steps,
        "guidance_scale": validate.guidance_scale,
        "scheduler": validate.scheduler,
        "run_seed": one.cfg.run.seed,
        "device": one.device.type,
        "torch": torch.__version__,
    }


def _caption(one: _Subject) -> str:
    return one.videos.samples[one.train[0]].caption


def _finite(value: Any) -> Any:
    """JSON has no NaN; null stands for it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _write(path: Path, value: dict[str, Any]) -> None:
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    draft.replace(path)
