"""The built-in video folder: coloured shapes moving in named directions, and an oracle that reads them back.

Some combinations of colour, shape and direction are never rendered, though every pair of values is, so that a model
can be asked for what it has not seen. The oracle looks at frames alone; it never sees the prompt.
"""

import csv
import json
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from stgen import video

COLOURS = {"red": (220, 50, 50), "green": (50, 200, 70), "blue": (60, 90, 230), "yellow": (230, 210, 50)}
KINDS = ("circle", "square", "triangle")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # rows, columns
RELATIVE = {"circle": 1.0, "square": 1.0, "triangle": 0.74}  # radii that give the kinds about the same extent
REACH = {"circle": 1.0, "square": 0.89, "triangle": 1.56}  # farthest point from the centre along an axis, in radii
FPS = 8.0
MARKER = "shapes.json"  # lies in a rendered folder and says how it was made


class ShapesError(ValueError):
    """A split that cannot be had; one sentence."""


@dataclass(frozen=True, order=True)
class Combination:
    colour: str
    kind: str
    direction: str

    @property
    def prompt(self) -> str:
        return f"a {self.colour} {self.kind} moving {self.direction}"


@dataclass(frozen=True)
class Split:
    seen: tuple[Combination, ...]
    held_out: tuple[Combination, ...]
    around: bool = False  # whether shapes that leave the frame come back on the other side


ALL = tuple(Combination(*values) for values in product(COLOURS, KINDS, DIRECTIONS))


def split(held_out: int, seed: int) -> Split:
    """Choose `held_out` combinations, no two of which share a pair of values.

    So each pair, such as red and circle, is still seen with all but one value of the third attribute.
    Raises ShapesError when so many cannot be chosen.
    """
    rng = random.Random(seed)
    for _ in range(1000):
        held: list[Combination] = []
        for candidate in rng.sample(ALL, len(ALL)):
            if len(held) < held_out and not any(_pairs(candidate) & _pairs(other) for other in held):
                held.append(candidate)
        if len(held) == held_out:
            return Split(tuple(c for c in ALL if c not in held), tuple(sorted(held)))
    raise ShapesError(f"data.shapes.held_out: {held_out} combinations cannot be held out; at most 12 share no pair")


def _pairs(combo: Combination) -> set[tuple[str, str]]:
    return set(combinations((combo.colour, combo.kind, combo.direction), 2))


# ---------------------------------------------------------------------------------------------------- rendering


def coverage(kind: str, centre: Tensor, radius: Tensor, height: int, width: int, around: bool = False) -> Tensor:
    """How much of each pixel the shape covers: [..., H, W] in [0, 1] for centres [..., 2] (row, column) and radii [...].

    `radius` is the circle's; squares and triangles of the same radius have the same area. `around`: what is beyond a
    border lies at the opposite one.
    """
    y = torch.arange(height).view(-1, 1) + 0.5 - centre[..., 0, None, None]
    x = torch.arange(width).view(1, -1) + 0.5 - centre[..., 1, None, None]
    if around:
        y, x = ((offset + extent / 2) % extent - extent / 2 for offset, extent in ((y, height), (x, width)))
    r = radius[..., None, None]
    if kind == "circle":
        distance = (x * x + y * y).sqrt() - r
    elif kind == "square":
        distance = torch.maximum(x.abs(), y.abs()) - r * (torch.pi**0.5 / 2)
    else:
        # Equilateral, pointing up, centred on its centroid: the largest of three half-planes at the inradius.
        inradius = r * (torch.pi / (3 * 3**0.5)) ** 0.5
        slope = 3**0.5 / 2 * x.abs() - y / 2
        distance = torch.maximum(slope, y.expand_as(slope)) - inradius
    return (0.5 - distance).clamp(0, 1)


def render(combo: Combination, frames: int, height: int, width: int, seed: int, around: bool = False) -> Tensor:
    """One clip, uint8 [T, 3, H, W]: random size, start, travel and grey ground, all from `seed`."""
    rng = random.Random(f"{seed}-{combo.prompt}")
    side = min(height, width)
    radius = rng.uniform(0.22, 0.30) * side * RELATIVE[combo.kind]
    travel = rng.uniform(0.26, 0.40)
    margin = REACH[combo.kind] * radius + 1
    start, end = [], []
    for extent, sign in zip((height, width), DIRECTIONS[combo.direction], strict=True):
        distance = sign * (travel * extent if around else min(travel * extent, extent - 2 * margin))
        low, high = margin + max(0.0, -distance), extent - margin - max(0.0, distance)
        low, high = (0.0, float(extent)) if around else (low, high)
        start.append(rng.uniform(low, max(low, high)))
        end.append(start[-1] + distance)
    along = torch.linspace(0, 1, frames).unsqueeze(1)  # [T, 1]
    centres = torch.tensor(start) * (1 - along) + torch.tensor(end) * along  # [T, 2]
    mask = coverage(combo.kind, centres, torch.full((frames,), radius), height, width, around).unsqueeze(
        1
    )  # [T, 1, H, W]
    colour = torch.tensor(COLOURS[combo.colour], dtype=torch.float32).view(1, 3, 1, 1)
    ground = rng.uniform(10, 60)
    return (ground * (1 - mask) + colour * mask).round().to(torch.uint8)


def write_folder(
    root: Path, *, clips: int, held_out: int, held_out_seed: int, num_frames: int, height: int, width: int, seed: int,
    motion: str = "within",
) -> Split:  # fmt: skip
    """Render `clips` captioned mp4 files of the seen combinations into `root`; a folder already made so is kept.

    Raises ShapesError for a folder that holds anything else.
    """
    recipe: dict[str, int | str] = dict(
        clips=clips, held_out=held_out, held_out_seed=held_out_seed,
        num_frames=num_frames, height=height, width=width, seed=seed,
    )  # fmt: skip
    around = motion == "around"
    recipe |= {"motion": motion} if around else {}  # older folders do not say it
    chosen = replace(split(held_out, held_out_seed), around=around)
    marker = root / MARKER
    if _recipe(root) == recipe:
        return chosen
    if not _may_render(root):
        raise ShapesError(f"{root} holds files that were not rendered here; name a new or an empty folder")
    root.mkdir(parents=True, exist_ok=True)
    if marker.exists():  # an earlier recipe's clips, some of which this one may not replace
        for path in root.glob("[0-9]" * 5 + ".mp4"):
            path.unlink()
    marker.write_text("{}\n")  # not finished
    combos = [chosen.seen[i % len(chosen.seen)] for i in range(clips)]

    def write(i: int) -> None:
        frames = render(combos[i], num_frames, height, width, seed * 1_000_003 + i, around)
        video.write(root / f"{i:05d}.mp4", video.Clip(frames, FPS))

    with ThreadPoolExecutor(2) as pool:
        list(tqdm(pool.map(write, range(clips)), total=clips, desc="rendering shapes", unit="clip"))
    with (root / "metadata.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("file_name", "text"))
        rows.writerows((f"{i:05d}.mp4", combo.prompt) for i, combo in enumerate(combos))
    marker.write_text(json.dumps({"recipe": recipe, "held_out": [c.prompt for c in chosen.held_out]}, indent=2) + "\n")
    return chosen


def split_of(root: Path) -> Split | None:
    """The split by which a folder was rendered; None for any other folder."""
    recipe = _recipe(root)
    if recipe is None:
        return None
    return replace(split(recipe["held_out"], recipe["held_out_seed"]), around=recipe.get("motion") == "around")


def _recipe(root: Path) -> dict[str, Any] | None:
    """How a folder was rendered; None for any other folder and for one that was not finished."""
    try:
        content = json.loads((root / MARKER).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    recipe = content.get("recipe") if isinstance(content, dict) else None
    ours = isinstance(recipe, dict) and type(recipe.get("held_out_seed")) is int and recipe.get("held_out") in range(13)
    return recipe if ours else None


def _may_render(root: Path) -> bool:
    """Whether a folder is empty or was rendered here, to its end or not."""
    try:
        content = json.loads((root / MARKER).read_text())
    except FileNotFoundError:
        return not root.exists() or all(path.name.startswith(".") for path in root.iterdir())
    except ValueError:  # killed while it was written
        return True
    return content == {} or _recipe(root) is not None


# ---------------------------------------------------------------------------------------------------- the oracle

FOREGROUND = 45.0  # RGB distance from the ground above which a pixel belongs to the shape
NEAREST = 90.0  # RGB distance within which a colour is recognised
OVERLAP = 0.75  # least intersection over union, median over frames, with the best template


@dataclass(frozen=True)
class Verdict:
    """What the oracle saw; None where nothing fits."""

    colour: str | None
    kind: str | None
    direction: str | None
    overlap: float

    def agrees(self, combo: Combination) -> bool:
        return (self.colour, self.kind, self.direction) == (combo.colour, combo.kind, combo.direction)


def judge(frames: Tensor, around: bool = False) -> Verdict:
    """Read colour, shape and direction off a clip, uint8 [T, 3, H, W].

    Foreground is what differs from the median colour. The colour is the nearest of the palette, the shape the best
    overlapping template of equal area and centre, the direction the slope of the centre: it must cross 15 % of the
    frame and twice what it moves on the other axis. `around`: a shape may leave the frame and come back on the other side.
    """
    x = frames.float()
    ground = x.flatten(2).median(-1).values.median(0).values.view(1, 3, 1, 1)
    mask = (x - ground).square().sum(1).sqrt() > FOREGROUND  # [T, H, W]
    areas = mask.flatten(1).sum(1)  # [T]
    height, width = mask.shape[1:]
    if (areas < 9).any() or areas.median() > height * width / 2:  # gone, or noise all over
        return Verdict(None, None, None, 0.0)
    grid = torch.stack(
        torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    )  # [2, H, W]
    colour, path = _colour(x, mask), None
    if around:
        mask, path = _gathered(mask)
    centres = (mask.unsqueeze(1) * grid).flatten(2).sum(-1) / areas[:, None]  # [T, 2]
    kind, overlap = _kind(mask, centres, areas)
    return Verdict(colour, kind, _direction(centres if path is None else path, height, width), overlap)


def _gathered(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Masks [T, H, W] moved round the borders until each shape is in the middle, and the way its centre went [T, 2]."""
    path = []
    for axis in (1, 2):
        n = mask.shape[axis]
        angles = 2 * torch.pi * (torch.arange(n) + 0.5) / n
        mass = mask.sum(3 - axis).float()  # [T, n]
        middle = torch.atan2(mass @ angles.sin(), mass @ angles.cos()) / (2 * torch.pi) * n
        path.append(torch.from_numpy(np.unwrap(middle.numpy(), period=n)))
        shifts = (n / 2 - middle).round().long().tolist()
        mask = torch.stack([one.roll(shift, axis - 1) for one, shift in zip(mask, shifts, strict=True)])
    return mask, torch.stack(path, dim=1)


def _colour(x: Tensor, mask: Tensor) -> str | None:
    core = x.movedim(1, -1)[mask].median(0).values  # [3]; edges are mixed with the ground, the median is not
    distances = {name: float((core - torch.tensor(rgb)).norm()) for name, rgb in COLOURS.items()}
    name = min(distances, key=lambda n: distances[n])
    return name if distances[name] < NEAREST else None


def _kind(mask: Tensor, centres: Tensor, areas: Tensor) -> tuple[str | None, float]:
    radii = (areas / torch.pi).sqrt()
    height, width = mask.shape[1:]
    overlaps = {}
    for kind in KINDS:
        template = coverage(kind, centres, radii, height, width) > 0.5  # [T, H, W]
        union = (template | mask).flatten(1).sum(1)
        overlaps[kind] = float(((template & mask).flatten(1).sum(1) / union).median())
    kind = max(overlaps, key=lambda k: overlaps[k])
    return (kind if overlaps[kind] > OVERLAP else None), overlaps[kind]


def _direction(centres: Tensor, height: int, width: int) -> str | None:
    time = torch.arange(len(centres)) - (len(centres) - 1) / 2
    slope = (time[:, None] * centres).sum(0) / time.square().sum().clamp(min=1)  # rows and columns a frame
    travel = slope * (len(centres) - 1) / torch.tensor([height, width])
    axis = int(travel.abs().argmax())
    if travel[axis].abs() <= 0.15 or travel[axis].abs() < 2 * travel[1 - axis].abs():
        return None
    if axis == 0:
        return "down" if travel[0] > 0 else "up"
    return "right" if travel[1] > 0 else "left"


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    p, centre = successes / n, (successes / n + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def accuracy(
    clips: Sequence[Tensor], combos: Sequence[Combination], around: bool = False
) -> dict[str, float | int | list[float]]:
    """Share of clips of which the oracle reads all three values right, with n, the 95 % interval and each value's share."""
    verdicts = [judge(clip, around) for clip in clips]
    pairs = list(zip(verdicts, combos, strict=True))
    n, right = len(pairs), sum(verdict.agrees(combo) for verdict, combo in pairs)
    low, high = wilson(right, n)
    return {
        "all": right / n,
        "n": n,
        "interval": [round(low, 4), round(high, 4)],
        "colour": sum(v.colour == c.colour for v, c in pairs) / n,
        "shape": sum(v.kind == c.kind for v, c in pairs) / n,
        "direction": sum(v.direction == c.direction for v, c in pairs) / n,
        "overlap": sum(v.overlap for v in verdicts) / n,
    }
