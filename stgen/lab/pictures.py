"""The pictures of `stgen inspect`, as PNG files."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from stgen.lab.inspect_masks import Drawing, View

ROWS_A_PAGE = 5
FRAMES_SHOWN = 12  # of a query's view
WRITTEN_CELLS = 240  # cells of a heat map up to which each carries its number
DPI = 110
DISTANCES = ("frames away", "tokens away in the frame")  # panels that are no shares
ATTENDED, MEASURED, MISSING = "Blues", "viridis", "#dddddd"  # colours of masks, of measurements, of what is not there
HOW_TO_READ = (
    "Left: each row is a query, each column a key; blue where the query may attend the key (paler: in some of the heads, or "
    "of two blocks in some of their tokens). Right: the same for two "
    "queries (red squares), frame by frame: blue tokens may be attended, white ones not."
)


@dataclass(frozen=True)
class PlanRow:
    """Heads of a mixer, and all layers in which they do the same."""

    title: str
    words: str
    drawing: Drawing


def plan(folder: Path, title: str, rows: Sequence[PlanRow], notes: Sequence[str] = ()) -> list[Path]:
    """The masks of a plan: plan.png, or plan-1.png and so on where one page is too short."""
    pages = [rows[i : i + ROWS_A_PAGE] for i in range(0, len(rows), ROWS_A_PAGE)] or [[]]
    for old in folder.glob("plan*.png"):
        old.unlink()
    files = []
    for i, page in enumerate(pages):
        path = folder / ("plan.png" if len(pages) == 1 else f"plan-{i + 1}.png")
        header = title if len(pages) == 1 else f"{title}   (page {i + 1} of {len(pages)})"
        files.append(_plan_page(path, header, page, notes if i == len(pages) - 1 else ()))
    return files


def heat_maps(path: Path, title: str, rows: Sequence[str], panels: Sequence[tuple[str, str, np.ndarray]]) -> Path:
    """Panels side by side of (name, explanation, values [layers, heads]), NaN in grey; shares are drawn from 0 to 1."""
    columns = max(values.shape[1] for _, _, values in panels)
    panel_width = max(2.6, 0.5 * columns + 0.9)
    figure = _figure(1.2 + panel_width * len(panels), max(1.5, 0.32 * len(rows)) + 1.9)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for i, (axis, (name, meaning, values)) in enumerate(zip(axes, panels, strict=True)):
        shares = name not in DISTANCES
        largest = 1.0 if shares or np.isnan(values).all() else max(float(np.nanmax(values)), 1e-9)
        figure.colorbar(_matrix(axis, values, vmax=largest), ax=axis, fraction=0.05, pad=0.03)
        axis.set_title("\n".join([name, *textwrap.wrap(meaning, round(9 * panel_width))]), fontsize=9)
        axis.set_xlabel("head")
        axis.set_xticks(range(values.shape[1]))
        axis.set_yticks(range(len(rows)), rows if i == 0 else [""] * len(rows))
    _titled(figure, title)
    return _save(figure, path)


def matrices(
    path: Path, title: str, panels: Sequence[tuple[str, Sequence[str], np.ndarray]], label: str = "", across: int = 4
) -> Path:
    """Square similarity matrices of (name, labels of rows and columns, values from 0 to 1); NaN is grey."""
    across = min(across, len(panels))
    down = math.ceil(len(panels) / across)
    side = max(2.2, 0.42 * max(len(labels) for _, labels, _ in panels) + 0.9)
    figure = _figure(across * (side + 0.6) + 0.9, down * (side + 0.75) + 0.9)
    axes = figure.subplots(down, across, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (name, labels, values) in zip(axes.flat, panels, strict=False):
        _matrix(axis, values, vmax=1.0)
        axis.set_title(name, fontsize=9)
        axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
        axis.set_yticks(range(len(labels)), labels, fontsize=8)
        axis.set_xlabel(label, fontsize=8)
    _titled(figure, title)
    return _save(figure, path)


# ------------------------------------------------------------------------------------------------------------ the plan


def _plan_page(path: Path, title: str, rows: Sequence[PlanRow], notes: Sequence[str]) -> Path:
    frames = max((min(FRAMES_SHOWN, row.drawing.frames) for row in rows), default=1)
    width, row_height = 4.2 + max(5.5, 0.95 * frames), 3.7
    titles, explained = textwrap.wrap(title, round(9 * width)), textwrap.wrap(HOW_TO_READ, round(14 * width))
    top, foot = 0.5 + 0.2 * len(titles) + 0.16 * len(explained), 0.25 * len(notes) + 0.1
    height = top + row_height * len(rows) + foot
    figure = _figure(width, height)
    figure.text(0.2 / width, 1 - 0.18 / height, "\n".join(titles), fontsize=12, weight="bold", va="top")
    below = 1 - (0.25 + 0.2 * len(titles)) / height
    figure.text(0.2 / width, below, "\n".join(explained), fontsize=8.5, va="top", color="#444444")
    for i, row in enumerate(rows):
        _plan_row(figure, row, (width, height), height - top - i * row_height)
    for i, note in enumerate(notes):
        figure.text(0.2 / width, (foot - 0.15 - 0.25 * i) / height, note, fontsize=9, va="top")
    return _save(figure, path)


def _plan_row(figure: Any, row: PlanRow, size: tuple[float, float], top: float) -> None:
    """One row of the page, from `top` inches downwards: two lines of words, the plane, two views."""
    width, height = size
    figure.text(0.2 / width, top / height, row.title, fontsize=10, weight="bold", va="top")
    words = "\n".join([*textwrap.wrap(row.words, round(12.5 * width)), row.drawing.note]).rstrip()
    figure.text(0.2 / width, (top - 0.2) / height, words, fontsize=9, va="top")
    bottom, side = top - 3.3, 2.5
    plane = figure.add_axes((0.55 / width, bottom / height, side / width, side / height))
    _plane(plane, row.drawing)
    views = row.drawing.views
    shown = [_shown_frames(view) for view in views]
    left, free = 3.3, width - 3.4
    for i, (view, frames) in enumerate(zip(views, shown, strict=True)):
        cell = min(free / len(frames), 1.05, 0.95 * view.seen.shape[2] / view.seen.shape[1])
        base = bottom + (1.4 if i == 0 and len(views) > 1 else 0.05)
        for j, frame in enumerate(frames):
            box = ((left + j * cell) / width, base / height, 0.9 * cell / width, 0.85 / height)
            _frame(figure.add_axes(box), view, frame)
        t, h, w = view.query
        name = ("the centre" if i == 0 else "a corner") + f" (frame {t}, row {h}, column {w})"
        total = f", {len(frames)} of {len(view.seen)} frames" if len(frames) < len(view.seen) else ""
        kept = float(view.seen.sum())
        words = f"query at {name}: attends {kept:.4g} of {view.seen.numel()} tokens{total}"
        figure.text(left / width, (base + 1.03) / height, words, fontsize=8, va="bottom")


def _plane(axis: Any, drawing: Drawing) -> None:
    plane = drawing.plane
    axis.imshow(plane, cmap=ATTENDED, vmin=0, vmax=1.25, interpolation="nearest" if len(plane) < 200 else "antialiased")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlabel(f"keys: {drawing.of}", fontsize=7)
    axis.set_ylabel("queries", fontsize=7)
    if "of the clip" in drawing.of:
        for frame in range(1, drawing.frames):
            at = frame * len(plane) / drawing.frames - 0.5
            axis.axhline(at, color="#999999", linewidth=0.5)
            axis.axvline(at, color="#999999", linewidth=0.5)


def _frame(axis: Any, view: View, frame: int) -> None:
    t, h, w = view.query
    axis.imshow(view.seen[frame], cmap=ATTENDED, vmin=0, vmax=1.25, aspect="auto")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(f"frame {frame}", fontsize=7, pad=2, color="#c00000" if frame == t else "black")
    if frame == t:
        axis.add_patch(Rectangle((w - 0.5, h - 0.5), 1, 1, fill=False, edgecolor="#c00000", linewidth=1.8))


def _shown_frames(view: View) -> list[int]:
    """All frames; of many the query's own, its neighbours, and others spread over the clip."""
    count, own = len(view.seen), view.query[0]
    if count <= FRAMES_SHOWN:
        return list(range(count))
    spaced = [round(i * (count - 1) / (FRAMES_SHOWN - 1)) for i in range(FRAMES_SHOWN)]
    near = [frame for frame in (own - 1, own, own + 1) if 0 <= frame < count]
    far = sorted(set(spaced) - set(near), key=lambda frame: -abs(frame - own))
    return sorted([*near, *far[: FRAMES_SHOWN - len(near)]])


# --------------------------------------------------------------------------------------------------------------- tools


def _titled(figure: Figure, title: str) -> None:
    """The title on top, wrapped to the figure, and the axes fitted below it."""
    width, height = figure.get_size_inches()
    lines = textwrap.wrap(title, round(12 * width))
    figure.text(0.12 / width, 1 - 0.12 / height, "\n".join(lines), fontsize=10.5, weight="bold", va="top")
    figure.tight_layout(rect=(0, 0, 1, 1 - (0.15 + 0.18 * len(lines)) / height))


def _matrix(axis: Any, values: np.ndarray, vmax: float) -> Any:
    """A heat map from 0 to `vmax` with its numbers written in, where they are few; NaN in grey."""
    colours = matplotlib.colormaps[MEASURED].with_extremes(bad=MISSING)
    shown = axis.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=0, vmax=vmax, aspect="auto")
    if values.size <= WRITTEN_CELLS:
        for (i, j), value in np.ndenumerate(values):
            text = "–" if math.isnan(value) else f"{value:.2f}" if value < 9.95 else f"{value:.0f}"
            dark = math.isnan(value) or value > vmax / 2
            axis.text(j, i, text, ha="center", va="center", fontsize=7, color="black" if dark else "white")
    return shown


def _figure(width: float, height: float) -> Figure:
    return pyplot.figure(figsize=(width, height), dpi=DPI)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, facecolor="white")
    pyplot.close(figure)
    return path
