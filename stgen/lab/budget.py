"""Cells that spend alike: what each costs, which sizes bring it to the base's cost, and how many steps it may make.

Parameters and FLOPs are counted on models without weights. A step's FLOPs are those executed, sparsity counted, and a
mean over the run where a schedule changes them; dense-equivalent ones are told beside. Seconds are measured, in a
process of their own (`python -m stgen.lab.budget`), on random latents.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stgen import build, codec, config, flops, optim, schema, source
from stgen.attention.numbers import Numbers
from stgen.lab.study import Cell, Study, StudyError
from stgen.objective import Objective
from stgen.ops.cost import Work
from stgen.step import accumulate
from stgen.tokens import grid_of

EXACT = 0.005  # a mismatch of parameters or FLOPs below this is as good as none; the smaller change of the config wins
HIDDEN_STEP = 8  # hidden channels of the MLP change by so many, as tensor cores like them
FARTHEST = 4.0  # no size is changed by more than this factor
MOMENTS = 16  # of a run at which scheduled sparsity is counted


@dataclass(frozen=True)
class Cost:
    """Of one config: trained parameters, and FLOPs of an optimiser step."""

    parameters: int
    executed: float
    dense: float

    def of(self, match: str) -> float:
        """What `match` equalises: parameters, or FLOPs a step."""
        return float(self.parameters) if match == "params" else self.executed


@dataclass(frozen=True)
class Speed:
    """Seconds measured on this machine: of an optimiser step, and of a forward pass over one clip."""

    step: float
    forward: float


@dataclass(frozen=True)
class Planned:
    """A cell as it will run."""

    cell: Cell
    cfg: schema.Config  # with the solver's sizes and the steps in it; seed and folders are still the base's
    cost: Cost
    steps: int | None  # None: as the config says, in seconds or epochs
    solved: Mapping[str, Any]
    mismatch: float  # of what is matched, relative to the base


def plan(
    study: Study,
    path: Path,
    cells: Sequence[Cell],
    speeds: Callable[[list[schema.Config]], list[Speed]],
    progress: Callable[[], Any] = lambda: None,
) -> list[Planned]:
    """The cells, the base first, with sizes and steps such that they match; `speeds` is asked under match time only.

    `progress` is called after each cell. Raises StudyError for a match that cannot be had.
    """
    sketches, sized = Sketches(), []
    steps = _base_steps(study, path, cells[0])
    target = sketches.cost(cells[0].cfg, steps)
    for cell in cells:
        sized.append((cell, *_sized(study, path, cell, sketches, steps, target)))
        progress()
    numbers: list[int | None] = [steps] * len(cells)
    if study.match == "none":
        numbers = [cfg.train.max_train_steps for _, cfg, _ in sized]
    if study.match == "flops":
        assert steps is not None
        numbers = [_steps_within(steps * target.executed, cfg, sketches) for _, cfg, _ in sized]
    if study.match == "time":
        found = speeds([limited(cell, {}, steps or 10**6) for cell in cells])
        seconds = study.seconds or (steps or 0) * found[0].step
        numbers = [max(1, round(seconds / speed.step)) for speed in found]
    planned = []
    for (cell, cfg, solved), n in zip(sized, numbers, strict=True):
        cost = sketches.cost(cfg, n)
        final = cfg if study.match == "none" or n is None else limited(cell, solved, n)
        planned.append(Planned(cell, final, cost, n, solved, _mismatch(study.match, cost, target, n, steps)))
    return planned


def limited(cell: Cell, changes: Mapping[str, Any], steps: int) -> schema.Config:
    """The cell's config with changes, limited by steps."""
    limits = {"train.max_train_seconds": None, "train.num_train_epochs": None, "train.max_train_steps": steps}
    return cell.but({**limits, **changes})


def _base_steps(study: Study, path: Path, base: Cell) -> int | None:
    steps = study.steps or base.cfg.train.max_train_steps
    if steps is None and study.match != "none" and study.seconds is None:
        raise StudyError(
            f"{path}: match: {study.match} counts from the base's steps, but {base.path} limits its run otherwise; "
            "write steps: 1000, say"
        )
    return steps


def _mismatch(match: str, cost: Cost, target: Cost, steps: int | None, base_steps: int | None) -> float:
    if match == "params":
        return cost.parameters / target.parameters - 1
    if match == "flops" and steps and base_steps:
        return steps * cost.executed / (base_steps * target.executed) - 1
    return 0.0


# ---------------------------------------------------------------------------------------------------------- counting


class Sketches:
    """Models without weights; what lies around them is built once for each kind of data, codec and text."""

    def __init__(self):
        self._around: dict[str, tuple[tuple[int, ...], int, int, int]] = {}
        self._known: dict[str, Cost] = {}

    def cost(self, cfg: schema.Config, steps: int | None = None) -> Cost:
        """What the config costs, over `steps` where its sparsity follows schedules. Raises BuildError."""
        key = f"{steps} {cfg.model_dump_json()}"
        if key not in self._known:
            self._known[key] = self._count(cfg, steps)
        return self._known[key]

    def _count(self, cfg: schema.Config, steps: int | None) -> Cost:
        shape, text_width, text_tokens, text_parameters = self._surroundings(cfg)
        grid = grid_of(shape[1:], cfg.tokens.patch_size)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = build.build_transformer(cfg, shape, text_width)  # type: ignore[arg-type]
        scheduled = [m for m in model.modules() if isinstance(m, Numbers) and m.schedules]
        batch, recompute = cfg.train.train_batch_size, cfg.train.gradient_checkpointing
        works = []
        for step in [steps * (2 * i + 1) // (2 * MOMENTS) for i in range(MOMENTS)] if scheduled and steps else [0]:
            for numbers in scheduled:
                numbers.at_step(step)
            works.append(flops.step_work(model, grid, text_tokens, batch, recompute))
        total = sum(works, Work())
        parameters = flops.trainable({"transformer": model}) + text_parameters
        return Cost(parameters, total.executed / len(works), total.dense / len(works))

    def _surroundings(self, cfg: schema.Config) -> tuple[tuple[int, ...], int, int, int]:
        """(latent shape, text width, text tokens, parameters of a learned text encoder)."""
        key = "".join(section.model_dump_json() for section in (cfg.data, cfg.codec, cfg.text))
        if key not in self._around:
            component, captions = build.build_codec(cfg), source.known_captions(cfg)
            encoder, tokenizer, width = build.build_text(cfg, captions)
            shape = codec.as_codec(component).latent_shape(cfg.data.num_frames, cfg.data.height, cfg.data.width)
            tokens = min(cfg.text.max_length, 1 + max((len(c.split()) for c in captions), default=0))
            learned = 0 if tokenizer is not None else flops.trainable({"text": encoder})
            self._around[key] = (tuple(shape), width, tokens, learned)
        return self._around[key]


def _steps_within(total: float, cfg: schema.Config, sketches: Sketches) -> int:
    """Steps that spend about `total` FLOPs; under a schedule their number decides what a step costs, so it is iterated."""
    steps = max(1, round(total / sketches.cost(cfg).executed))
    for _ in range(8):
        better = max(1, round(total / sketches.cost(cfg, steps).executed))
        if better == steps:
            break
        steps = better
    return steps


# ----------------------------------------------------------------------------------------------------------- solving


def _sized(
    study: Study, path: Path, cell: Cell, sketches: Sketches, steps: int | None, target: Cost
) -> tuple[schema.Config, dict[str, Any]]:
    """The cell's config with sizes at which it matches, and those that were changed."""
    try:
        cost = sketches.cost(cell.cfg, steps)
    except build.BuildError as error:
        raise StudyError(f"{path}: {cell.name}: {error}") from None
    near = abs(cost.of(study.match) / target.of(study.match) - 1) <= EXACT if study.adjust else True
    if near or not cell.changes:
        return cell.cfg, {}

    def mismatch(changes: Mapping[str, Any]) -> float | None:
        """Above 0: too large. None: no such config."""
        try:
            return sketches.cost(cell.but(changes), steps).of(study.match) / target.of(study.match) - 1
        except (config.ConfigError, build.BuildError):
            return None

    order = [key for key in ("model.depth", "model.width", "model.mlp.ratio") if key in study.adjust]  # coarse to fine
    found = {json.dumps(changes): changes for changes in _candidates(order, {}, cell.cfg, mismatch)}.values()
    judged = [(abs(error), changes) for changes in found if (error := mismatch(changes)) is not None]
    error, best = min(judged, key=lambda pair: (max(pair[0], EXACT), _change(pair[1], cell.cfg), pair[0]))
    if error > study.tolerance:
        raise StudyError(
            f"{path}: match: {cell.name} cannot have the base's {_QUANTITY[study.match]} ({cost.of(study.match):.4g} against "
            f"{target.of(study.match):.4g}); the nearest that {' and '.join(order)} reach is {error:.1%} off, beyond "
            f"tolerance {study.tolerance:g}; list more keys under adjust, or raise tolerance"
        )
    return cell.but(best), best


_QUANTITY = {"params": "parameters", "flops": "FLOPs a step"}
Mismatch = Callable[[Mapping[str, Any]], float | None]


def _candidates(
    keys: Sequence[str], changes: dict[str, Any], cfg: schema.Config, mismatch: Mismatch
) -> Iterator[dict[str, Any]]:
    """Sets of changes around the target: each key as it is, or just below and just above it given those before."""
    if not keys:
        yield changes
        return
    key, *finer = keys
    yield from _candidates(finer, changes, cfg, mismatch)
    for value in _around(key, changes, cfg, mismatch):
        yield from _candidates(finer, {**changes, key: value}, cfg, mismatch)


def _around(key: str, changes: dict[str, Any], cfg: schema.Config, mismatch: Mismatch) -> list[Any]:
    """The two neighbouring values of a key between which the target lies; fewer where the range ends before it."""
    here = mismatch(changes)
    last: list[Any] = []
    for value in _values(key, changes, cfg, growing=here is None or here < 0):
        error = mismatch({**changes, key: value})
        if error is None:
            continue
        last = [*last[-1:], value]
        if here is not None and (error < 0) != (here < 0):
            break
    return last


def _values(key: str, changes: Mapping[str, Any], cfg: schema.Config, growing: bool) -> Iterator[Any]:
    """Values of a key from its own outwards, in the steps in which it may change."""
    width = changes.get("model.width", cfg.model.width)
    now, step = {
        "model.depth": (cfg.model.depth, 1),
        "model.width": (cfg.model.width, 2 * cfg.model.heads),  # the least that rotary positions allow
        "model.mlp.ratio": (int(width * cfg.model.mlp.ratio), HIDDEN_STEP),
    }[key]
    number = (now // step + 1) * step if growing else (math.ceil(now / step) - 1) * step
    while number > 0 and now / FARTHEST <= number <= now * FARTHEST:
        yield _ratio(number, width) if key == "model.mlp.ratio" else number
        number += step if growing else -step


def _ratio(hidden: int, width: int) -> float:
    """The MLP ratio that gives exactly so many hidden channels, which are int(width * ratio)."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _change(changes: Mapping[str, Any], cfg: schema.Config) -> float:
    """How far the sizes move, in factors."""
    now = {"model.depth": cfg.model.depth, "model.width": cfg.model.width, "model.mlp.ratio": cfg.model.mlp.ratio}
    return sum(abs(math.log(value / now[key])) for key, value in changes.items())


# ------------------------------------------------------------------------------------------------------------ timing


def measure_speed(cfg: schema.Config, timed: int = 3) -> Speed:
    """Median seconds of a few optimiser steps and forward passes on random latents, after two that warm up."""
    device, captions = build.device_of(cfg), source.known_captions(cfg)
    parts = build.build_parts(cfg, captions).to(device)
    objective, optimizer = Objective(**cfg.objective.model_dump()), optim.build(parts.trained, cfg.optim)
    parameters = optim.named_parameters(parts.trained).values()
    forward = torch.compile(parts.transformer) if cfg.train.compile else parts.transformer
    shape = codec.as_codec(parts.codec).latent_shape(cfg.data.num_frames, cfg.data.height, cfg.data.width)
    count = cfg.train.train_batch_size
    texts = [captions[i % len(captions)] if captions else "" for i in range(count)]
    batch = source.Batch(torch.randn(count, *shape).to(device), texts, texts)

    def step() -> None:
        parts.transformer.at_step(0)
        accumulate(cfg, forward, parts, objective, batch, 0)
        optim.clip_and_check(parameters, cfg.optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def look() -> None:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=cfg.train.mixed_precision == "bf16"):
            embeds, mask = build.text.encode(parts.text_encoder, parts.tokenizer, texts, cfg.text.max_length)
            parts.transformer(batch.latents, torch.full((count,), 0.5, device=device), embeds, mask)

    return Speed(_median_seconds(step, device, timed), _median_seconds(look, device, timed) / count)


def _median_seconds(work: Callable[[], None], device: torch.device, timed: int) -> float:
    seconds = []
    for i in range(2 + timed):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds += [time.perf_counter() - began] if i >= 2 else []
    return statistics.median(seconds)


def main(paths: Sequence[str]) -> None:
    """A line when all is loaded; then for each config file one of JSON with its seconds, or why it cannot run."""
    print("{}", flush=True)
    for path in paths:
        try:
            speed = measure_speed(config.load(path, [], schema.Config))
            line = {"step": speed.step, "forward": speed.forward}
        except Exception as error:  # whatever a backend may raise; the planner tells it
            line = {"failure": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
