"""What was measured of a model: in words, as pictures, as JSON, and to metrics.jsonl and W&B."""

import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stgen.attention.spec import NoSink, OffByOne
from stgen.lab import pictures
from stgen.lab.inspect_statistics import Study, UseStatistics
from stgen.lab.tables import percent, table
from stgen.logger import Logger

SHOWN = ("entropy_share", "keys", "frames", "in_frame", "sink", "registers")  # by use and head


def _value(one: UseStatistics, name: str) -> torch.Tensor:
    """[times, heads], NaN where a head cannot have it: no sink, no registers, no distance to go, no choice."""
    value = one.values[name].clone()
    for run in one.runs:
        own = slice(run.group.first, run.group.first + run.group.count)
        has_sink = not isinstance(run.group.sink, NoSink) or isinstance(run.group.normaliser, OffByOne)
        if (name == "sink" and not has_sink) or (name == "registers" and not run.registers):
            value[:, own] = math.nan
    if f"even_{name}" in one.values:
        value[one.values[f"even_{name}"] == 0] = math.nan
    return value


def in_words(measured: Study) -> str:
    """A line for each use: mean over heads, and the lowest and highest head."""
    lines: list[Sequence[str]] = [
        ("layer", "mixer", "entropy", "keys for 90%", "frames away", "tokens away in frame", "on sink", "registers")
    ]
    remarks = []
    for one in measured.uses:
        if one.note:
            remarks.append(f"  layer {one.use.layer}, {one.use.name}: {one.note}")
        if one.sample is not None:
            cells = [_spread(_value(one, name).nanmean(0), share=name not in ("frames", "in_frame")) for name in SHOWN]
            lines.append((str(one.use.layer), one.use.name, *cells))
            if one.sample.words:
                remarks.append(f"  layer {one.use.layer}, {one.use.name}: looked at {one.sample.words}")
    explained = (
        "  mean over heads (lowest head to highest). entropy: share of the largest possible; keys for 90%: share of the\n"
        "  allowed keys that hold 90 % of the mass; away: distance from the query to what it attends, in tokens"
    )
    return "\n".join([table(lines), *dict.fromkeys(remarks), explained])


def _spread(values: torch.Tensor, share: bool) -> str:
    known = values[~values.isnan()]
    if not len(known):
        return "–"
    write: Callable[[float], str] = percent if share else "{:.2f}".format
    low, middle, high = (float(x) for x in (known.min(), known.mean(), known.max()))
    return write(middle) if write(low) == write(high) else f"{write(middle)} ({write(low)} to {write(high)})"


def draw_all(measured: Study, out: Path) -> list[Path]:
    """Heads x layers, layers x layers, times x times."""
    uses = [(i, one) for i, one in enumerate(measured.uses) if one.sample is not None]
    if not uses:
        return []
    names = [one.name for _, one in uses]
    heads = max(one.use.heads for _, one in uses)

    def panel(name: str) -> np.ndarray:
        return np.stack(
            [
                np.pad(_value(one, name).nanmean(0).numpy(), (0, heads - one.use.heads), constant_values=np.nan)
                for _, one in uses
            ]
        )

    panels = [
        ("entropy", "1: all allowed keys alike, 0: one key", panel("entropy_share")),
        ("keys for 90 %", "share of the allowed keys that hold 90 % of the mass", panel("keys")),
        ("frames away", "mean distance in time, in token frames", panel("frames")),
        ("tokens away in the frame", "mean distance in space, in tokens", panel("in_frame")),
        ("sink", "share of the mass on the sink", panel("sink")),
        ("registers", "share of the mass on registers", panel("registers")),
    ]
    panels = [one for one in panels if one[0] not in ("sink", "registers") or not np.isnan(one[2]).all()]
    title = "What each head attends: rows are layers (number and mixer), columns heads; grey: not there"
    files = [pictures.heat_maps(out / "heads.png", title, names, panels)]
    numbers = [i for i, _ in uses]
    between = measured.between_layers.nanmean(-1)[numbers][:, numbers].numpy()
    title = "How alike the maps of two layers are (1: equal, 0: disjoint; grey: other sequences, not comparable)"
    files.append(pictures.matrices(out / "similarity_layers.png", title, [("all heads, mean", names, between)]))
    if len(measured.times) > 1:
        times = [f"{t:.2g}" for t in measured.times]
        title = "How alike the maps of a layer are at two denoising times t (0: data, 1: noise)"
        each = [(f"layer {one.name}", times, measured.between_times[i].numpy()) for i, one in uses]
        files.append(pictures.matrices(out / "similarity_times.png", title, each, label="t"))
    return files


def as_json(measured: Study) -> dict[str, Any]:
    """Every use and head, and the similarities; NaN stands for what is not there."""
    layers = []
    for i, one in enumerate(measured.uses):
        entry: dict[str, Any] = {"use": i, "layer": one.use.layer, "mixer": one.use.name, "heads": one.use.heads}
        entry |= {"note": one.note} if one.note else {}
        if one.sample is not None:
            entry["looked_at"] = one.sample.words or "everything"
            entry["measured"] = {
                name: {"mean": _value(one, name).nanmean(0).tolist(), "by_time": _value(one, name).tolist()}
                for name, values in one.values.items()
                if values.ndim == 2
            }
            entry["between_times"] = measured.between_times[i].tolist()
        layers.append(entry)
    pairs = [
        {"uses": [b, a], "mean": float(found.nanmean()), "heads": found[~found.isnan()].tolist()}
        for a in range(len(measured.uses))
        for b in range(a)
        if not (found := measured.between_layers[a, b]).isnan().all()
    ]
    grid = measured.grid
    return {"grid": [grid.t, grid.h, grid.w], "layers": layers, "between_layers": pairs}


def finite(value: Any) -> Any:
    """JSON has no NaN; null stands for it."""
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    return [finite(one) for one in value] if isinstance(value, list) else value


def log(
    args: Namespace, out: Path, home: Path, measured: Study, drawn: Sequence[Path], suggestions: Sequence[str]
) -> None:
    """Scalars, a table of every head and the pictures to metrics.jsonl and W&B."""
    run = home.resolve().name
    logger = Logger(
        out, vars(args), mode=args.wandb, project="stgen", group=run, name=f"{run}-inspect", job_type="inspect"
    )
    try:
        scalars, rows = {}, []
        for one in measured.uses:
            if one.sample is None:
                continue
            values = {name: _value(one, name).nanmean(0) for name in SHOWN}
            known = {name: float(value.nanmean()) for name, value in values.items() if not value.isnan().all()}
            scalars |= {f"attn/{one.use.layer:02d}-{one.use.name}/{name}": value for name, value in known.items()}
            for head in range(one.use.heads):
                cells = [float(values[name][head]) for name in SHOWN]
                rows.append([one.use.layer, one.use.name, head, *(None if math.isnan(x) else x for x in cells)])
        logger.log(0, {**scalars, "attn/suggestions": list(suggestions)})
        logger.table(0, "attn/heads", ["layer", "mixer", "head", *SHOWN], rows)
        for path in drawn:
            logger.image(0, f"attn/{path.stem}", path)
    finally:
        logger.finish()
    print(logger.where)
