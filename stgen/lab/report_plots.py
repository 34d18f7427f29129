"""The plots of a report, as PNG files. The base is black; each other cell keeps its colour in every plot."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from stgen.lab.measure import lines_of
from stgen.lab.report_numbers import (
    comparable,
    difference,
    flops_of,
    is_share,
    main_measure,
    mean,
    ordered,
    total_flops,
)
from stgen.lab.results import Cell, Measure, Results

DPI = 130
COLOURED = 8  # cells with a colour of their own beside the base; the rest are grey
# Told apart also by those who see fewer colours (Okabe and Ito, https://jfly.uni-koeln.de/color), the pale yellow left out.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7b5ea7", "#8c6d31")
BASE, REST = "#111111", "#b5b5b5"
SMOOTH = 15  # lines of the log that a curve is smoothed over, at most
POINTS = 400  # of a curve
NAMED = 12  # cells up to which the Pareto plot names every one
LETTER, LINE, DOT, GAP = 8.5, 16, 7, 12  # pixels there: a letter, a line, half a dot, from its middle to the label
STEPS = sorted(range(-160, 161, 4), key=abs)  # pixels by which a label may be moved
RC: Any = {
    "font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10.5,
    "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.edgecolor": "#555555", "axes.linewidth": 0.8,
    "xtick.color": "#444444", "ytick.color": "#444444", "legend.frameon": False, "legend.fontsize": 8.5,
}  # fmt: skip


def colours(results: Results) -> dict[str, str]:
    """By name of the cell."""
    base = results.cells[0].name
    others = [cell.name for cell in ordered(results) if cell.name != base]
    return {base: BASE, **{name: COLOURS[i] if i < COLOURED else REST for i, name in enumerate(others)}}


def differences(results: Results, measure: Measure, path: Path) -> Path | None:
    """Each cell's paired difference to the base with its 95 % interval, best on top."""
    percent = is_share(measure)
    found = [difference(results, cell.name, measure.name) for cell in ordered(results)]
    found = [one for one in found if one is not None]
    if all(one.low is None for one in found):
        return None
    found.sort(key=lambda one: one.mean if measure.lower_is_better else -one.mean)
    scale = 100 if percent else 1
    with pyplot.rc_context(RC):
        figure, axis = _figure(7.6, 1.3 + 0.33 * len(found))
        for y, one in enumerate(reversed(found)):
            good = (one.mean < 0) == measure.lower_is_better
            colour = ("#00704f" if good else "#b3261e") if one.distinguishable else "#8a8a8a"
            if one.low is not None and one.high is not None:
                axis.plot([scale * one.low, scale * one.high], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
            axis.plot(
                scale * one.mean, y, "o", color=colour, markersize=6, fillstyle="none" if one.low is None else "full"
            )
        axis.axvline(0, color=BASE, linewidth=1)
        axis.set_yticks(range(len(found)), [one.cell for one in reversed(found)])
        axis.set_ylim(-0.7, len(found) - 0.3)
        axis.tick_params(axis="y", length=0)
        axis.set_xlabel(f"{measure.name}, less that of {results.cells[0].name}{' (points)' if percent else ''}")
        better = "better" if measure.lower_is_better else "worse"
        axis.set_title(f"left of the line is {better}; grey: not distinguishable", fontweight="normal", fontsize=9)
        return _save(figure, path)


def pareto(results: Results, path: Path) -> Path | None:
    """The main measure against executed FLOPs of the whole training, and against the time of a step."""
    measure, tint = main_measure(results), colours(results)

    def seconds(cell: Cell) -> float | None:
        return mean(cell, ("cost", "step_ms"))

    costs: list[tuple[str, Callable[[Cell], float | None]]] = [
        ("FLOPs executed in training", total_flops),
        ("milliseconds of a training step", seconds),
    ]
    cells = [cell for cell in comparable(results) if mean(cell, measure.path) is not None]
    costs = [(name, of) for name, of in costs if any(of(cell) for cell in cells)]
    if not costs:
        return None
    with pyplot.rc_context(RC):
        figure, axes = _figure(5.2 * len(costs), 4.4, len(costs))
        for axis, (name, of) in zip(np.atleast_1d(axes), costs, strict=True):
            points = {cell.name: (of(cell), mean(cell, measure.path), _sides(results, cell, measure)) for cell in cells}
            known = {key: (x, y, around) for key, (x, y, around) in points.items() if x is not None and y is not None}
            _front(axis, [(x, y) for x, y, _ in known.values()], measure.lower_is_better)
            for key, (x, y, around) in known.items():
                axis.errorbar(x, y, yerr=around, fmt="o", color=tint[key], markersize=6, capsize=2, linewidth=1)
            axis.margins(0.16)
            _labels(axis, {key: (x, y) for key, (x, y, _) in known.items()}, tint)
            axis.set_xlabel(name)
            axis.xaxis.set_major_formatter(EngFormatter(sep=" "))
            axis.set_ylabel(measure.name + ("" if measure.lower_is_better else " (higher is better)"))
        return _save(figure, path)


def _sides(results: Results, cell: Cell, measure: Measure) -> list[list[float]] | None:
    """How far the interval of the difference to the base reaches down and up."""
    one = difference(results, cell.name, measure.name)
    if one is None or one.low is None or one.high is None:
        return None
    return [[one.mean - one.low], [one.high - one.mean]]


def by_time(results: Results, path: Path) -> Path | None:
    """Held-out loss by bin of the noise level: as it is, and relative to the base's."""
    found = {cell.name: _per_bin(cell) for cell in comparable(results)}
    base = found.get(results.cells[0].name)
    known = {name: one for name, one in found.items() if one is not None and base is not None and one[1] == base[1]}
    if base is None or len(known) < 1:
        return None
    tint = colours(results)
    first = results.cells[0].name
    with pyplot.rc_context(RC):
        figure, (left, right) = _figure(10.4, 3.9, 2)
        for name, (losses, edges) in reversed(known.items()):
            at = [(low + high) / 2 for low, high in edges]
            style = {"color": tint[name], "linewidth": 2.2 if name == first else 1.5, "marker": "o", "markersize": 3}
            left.plot(at, losses, label=name, **style)
            right.plot(at, [100 * (mine / its - 1) for mine, its in zip(losses, base[0], strict=True)], **style)
        left.set_ylabel("held-out loss")
        right.set_ylabel(f"% above that of {first}")
        right.axhline(0, color=BASE, linewidth=0.8)
        for axis in (left, right):
            axis.set_xlabel("time t of the noise (0: data, 1: noise)")
        _legend(figure, left, tint)
        return _save(figure, path)


def _per_bin(cell: Cell) -> tuple[list[float], list[list[float]]] | None:
    """Mean over clips and runs in each bin of times, and the bins."""
    runs = [run.measures["held_out"] for run in cell.done if run.measures and run.measures.get("held_out")]
    rows = [row for run in runs for row in run["per_clip"] if None not in row]
    if not rows or any(run["t_bins"] != runs[0]["t_bins"] for run in runs):
        return None
    return [statistics.fmean(column) for column in zip(*rows, strict=True)], runs[0]["t_bins"]


# -------------------------------------------------------------------------------------------------------------- curves


@dataclass
class Curve:
    """The training loss of one run along its log."""

    steps: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @staticmethod
    def of(folder: Path) -> "Curve":
        curve, elapsed, last = Curve(), 0.0, 0
        for line in lines_of(folder):
            loss, step = _number(line.get("train/loss")), line.get("global_step", 0)
            if loss is None:
                continue
            elapsed += (step - last) * (_number(line.get("perf/step_time_s")) or math.nan)
            last = step
            curve.steps.append(step)
            curve.seconds.append(elapsed)
            curve.losses.append(loss)
        return curve


def curves(results: Results, path: Path) -> Path | None:
    """Training loss over steps, over executed FLOPs and over seconds; a mean over seeds, smoothed."""
    tint, found = colours(results), {}
    for cell in comparable(results):
        mine = [curve for run in cell.done if len((curve := Curve.of(run.folder)).losses) > 1]
        if mine:
            found[cell.name] = (cell, mine)
    if not found:
        return None
    with pyplot.rc_context(RC):
        figure, axes = _figure(12.4, 3.9, 3)
        for name, (cell, mine) in reversed(found.items()):
            steps, seconds, losses = _middle(mine)
            flop = flops_of(cell)[0]
            style = {"color": tint[name], "linewidth": 2.0 if name == results.cells[0].name else 1.3, "label": name}
            for axis, x in zip(axes, (steps, steps * (flop or math.nan), seconds), strict=True):
                axis.plot(x, losses, **style)
        for axis, words in zip(axes, ("steps", "FLOPs executed", "seconds of training"), strict=True):
            axis.set_xlabel(words)
        axes[1].xaxis.set_major_formatter(EngFormatter(sep=" "))
        low, high = _shown([losses for _, mine in found.values() for losses in (_middle(mine)[2],)])
        for axis in axes:
            axis.set_ylim(low, high)
        axes[0].set_ylabel("training loss")
        _legend(figure, axes[0], tint)
        return _save(figure, path)


def _middle(mine: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, seconds and smoothed losses, each a mean over the seeds that came as far."""
    n = min(len(curve.losses) for curve in mine)
    steps, seconds, losses = (
        np.mean([getattr(curve, name)[:n] for curve in mine], axis=0) for name in ("steps", "seconds", "losses")
    )
    width = max(1, min(SMOOTH, n // 20))
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    every = max(1, len(smooth) // POINTS)
    return steps[width - 1 :][::every], seconds[width - 1 :][::every], smooth[::every]


def _shown(losses: Sequence[np.ndarray]) -> tuple[float, float]:
    """A range of the axis that leaves the first moments of training out of the picture."""
    low = min(float(x.min()) for x in losses)
    high = max(float(np.quantile(x[len(x) // 20 :], 0.98)) for x in losses)
    room = 0.05 * max(high - low, 1e-9)
    return low - room, high + 2 * room


# --------------------------------------------------------------------------------------------------------------- tools


def _front(axis: Any, points: Sequence[tuple[float, float]], lower_is_better: bool) -> None:
    """A line through the cells that no other one beats in both."""
    best, front = math.inf, []
    for x, y in sorted(points, key=lambda point: (point[0], point[1] if lower_is_better else -point[1])):
        worth = y if lower_is_better else -y
        if worth < best:
            best = worth
            front.append((x, y))
    axis.plot(*zip(*front, strict=True), color="#cfcfcf", linewidth=1.2, zorder=0)


def _labels(axis: Any, points: dict[str, tuple[float, float]], tint: dict[str, str]) -> None:
    """Names beside the points, moved to where they lie over nothing else; of many cells the coloured ones alone."""
    axis.figure.canvas.draw()
    box, at = axis.get_window_extent(), {name: axis.transData.transform(point) for name, point in points.items()}
    taken = [(u - DOT, v, 2.0 * DOT) for u, v in at.values()]
    for name in sorted(points, key=lambda name: at[name][1]):
        if len(points) > NAMED and tint[name] == REST:
            continue
        (u, v), long = at[name], LETTER * len(name)
        places = [(start, v + step, long) for step in STEPS for start in (u + GAP, u - GAP - long)]
        inside = [one for one in places if one[0] > box.x0 and one[0] + long < box.x1]
        free = [one for one in inside if not any(_overlap(one, other) for other in taken)]
        start, middle, _ = (free or inside or places)[0]
        taken.append((start, middle, long))
        axis.annotate(
            name, points[name], (72 * (start + (long if start < u else 0) - u) / DPI, 72 * (middle - v) / DPI),
            textcoords="offset points", va="center", ha="right" if start < u else "left", fontsize=8.5,
            color=_dark(tint[name]), zorder=5,
            arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.6} if abs(middle - v) > LINE else None,
        )  # fmt: skip


def _overlap(a: tuple[float, float, float], b: tuple[float, float, float]) -> bool:
    """Whether two labels (left, middle height, length) overlap."""
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and abs(a[1] - b[1]) < LINE


def _dark(colour: str) -> str:
    return "#777777" if colour == REST else colour


def _legend(figure: Figure, axis: Any, tint: dict[str, str]) -> None:
    """Beside the plots: cells with a colour, base first, and one entry for all the grey ones."""
    handles, names = axis.get_legend_handles_labels()
    shown = {name: handle for handle, name in zip(handles, names, strict=True) if tint[name] != REST}
    grey = [handle for handle, name in zip(handles, names, strict=True) if tint[name] == REST]
    shown = {name: shown[name] for name in tint if name in shown} | ({f"{len(grey)} others": grey[0]} if grey else {})
    figure.legend(shown.values(), shown.keys(), loc="outside right upper")


def _number(x: Any) -> float | None:
    return float(x) if isinstance(x, int | float) and math.isfinite(x) else None


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    return pyplot.subplots(1, columns, figsize=(width, height), dpi=DPI, layout="constrained")


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")
    pyplot.close(figure)
    return path
