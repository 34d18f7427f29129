"""What the cells of a study sample side by side, still and moving, and what their attention may see."""

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import pad

from stgen import build, config, schema, video
from stgen.describe import mixer_words
from stgen.lab.inspect_masks import Drawing, draw, mixers_of, runs_of
from stgen.lab.measure import lines_of
from stgen.lab.report_numbers import ordered, several
from stgen.lab.report_plots import RC
from stgen.lab.results import Cell, Results
from stgen.tokens import grid_of

FRAMES = 8  # of a clip on the strip
SIDE = 96  # pixels of a frame there, about
PROMPTS = ((6, 4), (12, 3), (24, 2))  # cells up to which so many prompts are shown; of more cells one
LABEL = 210  # pixels of the column of names
ACROSS = 8  # cells beside one another in the animation
ANIMATED_BYTES = 4_000_000  # a heavier animation stays out of the page
MASKS = 3  # of a cell, at most
ROW = 1.25  # inches of a mask
ANY_WIDTH = 8  # of prompts, which masks do not depend on
DPI = 120


# --------------------------------------------------------------------------------------------------------------- clips


@dataclass(frozen=True)
class Sampled:
    """The clips of the fixed prompts that a run sampled at its end."""

    cell: str
    clips: dict[str, Path]  # prompt -> file, named by its seed


def sampled(results: Results) -> list[Sampled]:
    """Of the first run of each cell that has such clips, all of one seed where that can be had."""
    found = []
    for cell in ordered(results):
        for run in sorted(cell.done, key=lambda run: run.seed):
            if clips := clips_of(run.folder):
                found.append(Sampled(cell.name, clips))
                break
    return found


def clips_of(run: Path) -> dict[str, Path]:
    """The last clips that training sampled of its fixed prompts, by prompt."""
    told = [line["validation/videos"] for line in lines_of(run) if "validation/videos" in line]
    found = {}
    for one in told[-1] if told else ():
        path = run / one["path"]
        if path.is_file():
            found[one["caption"].partition(": ")[2] or one["caption"]] = path
    return found


def common_prompts(clips: Sequence[Sampled]) -> list[str]:
    """Prompts that every cell has at the same seed, as many as there is room for."""
    first = clips[0].clips
    same = [p for p, path in first.items() if all(p in one.clips and one.clips[p].name == path.name for one in clips)]
    return same[: next((most for cells, most in PROMPTS if len(clips) <= cells), 1)]


def strip(clips: Sequence[Sampled], prompts: Sequence[str], path: Path) -> Path:
    """For each prompt a row of frames a cell, one below the other."""
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    blocks = [[(one.cell, _stills(video.read(one.clips[prompt]).frames)) for one in clips] for prompt in prompts]
    side = blocks[0][0][1][0].size
    width = LABEL + FRAMES * (side[0] + 3) + 20
    heading, row = 34, side[1] + 5
    sheet = Image.new("RGB", (width, sum(heading + row * len(block) + 8 for block in blocks) + 8), "white")
    pen, top = ImageDraw.Draw(sheet), 4
    for prompt, block in zip(prompts, blocks, strict=True):
        pen.text((10, top + 10), prompt, "#111111", font)
        top += heading
        for name, stills in block:
            for i, line in enumerate(_wrapped(name)):
                pen.text((10, top + side[1] / 2 - 10 + 16 * i), line, "#333333", small)
            for i, still in enumerate(stills):
                sheet.paste(still, (LABEL + i * (side[0] + 3), top))
            top += row
        top += 8
    return _saved(sheet, path)


def animation(clips: Sequence[Sampled], prompts: Sequence[str], path: Path) -> Path | None:
    """The same clips moving: a row a prompt, a column a cell, more cells below; None where the file would be heavy."""
    groups = [clips[i : i + ACROSS] for i in range(0, len(clips), ACROSS)]
    files = [[[video.read(one.clips[prompt]) for one in group] for prompt in prompts] for group in groups]
    length = min(len(clip.frames) for rows in files for row in rows for clip in row)
    headers = [_names(group, _enlarged(files[0][0][0].frames).shape[-1]) for group in groups]

    def frame(t: int) -> Tensor:  # [3, H, W]
        tiles = [[torch.cat([_tile(clip.frames, t) for clip in row], dim=2) for row in rows] for rows in files]
        strips = [strip for header, rows in zip(headers, tiles, strict=True) for strip in (header, *rows)]
        width = max(strip.shape[2] for strip in strips)
        return torch.cat([pad(strip, (0, width - strip.shape[2]), value=255) for strip in strips], dim=1)

    video.write(path, video.Clip(torch.stack([frame(t) for t in range(length)]), files[0][0][0].fps))
    if path.stat().st_size > ANIMATED_BYTES:
        path.unlink()
        return None
    return path


def _stills(frames: Tensor) -> list[Image.Image]:
    chosen = np.linspace(0, len(frames) - 1, FRAMES).round().astype(int)
    return [Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()) for frame in _enlarged(frames[chosen])]


def _enlarged(frames: Tensor) -> Tensor:
    """By a whole factor to about SIDE pixels, or averaged down to no more than twice that."""
    factor = max(1, round(SIDE / min(frames.shape[-2:])))
    if factor > 1:
        return frames.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    less = max(1, -(-min(frames.shape[-2:]) // (2 * SIDE)))
    return torch.nn.functional.avg_pool2d(frames.float(), less).round().to(torch.uint8) if less > 1 else frames


def _tile(frames: Tensor, t: int) -> Tensor:
    """One frame with a white border: [3, H, W]."""
    return pad(_enlarged(frames[t : t + 1])[0], (2, 2, 2, 2), value=255)


def _names(clips: Sequence[Sampled], side: int) -> Tensor:
    """The names of the cells above their columns: [3, H, W]."""
    font, width = ImageFont.load_default(11), side + 4
    words = [textwrap.wrap(one.cell, max(6, width // 6))[:3] for one in clips]
    image = Image.new("RGB", (width * len(clips), 6 + 13 * max(map(len, words))), "white")
    pen = ImageDraw.Draw(image)
    for i, lines in enumerate(words):
        for j, line in enumerate(lines):
            pen.text((i * width + 3, 2 + 13 * j), line, "#333333", font)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _wrapped(name: str) -> list[str]:
    return textwrap.wrap(name, LABEL // 8)[:3]


def _saved(image: Image.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


# --------------------------------------------------------------------------------------------------------------- masks


@dataclass(frozen=True)
class Mask:
    """What a mixer of a cell may attend."""

    words: str
    drawing: Drawing


def masks_of(cell: Cell) -> list[Mask]:
    """Of each mixer of the cell that differs, from the config of one of its runs; no weights are allocated."""
    shapes = [(run, (run.measures or {}).get("protocol", {}).get("latent_shape")) for run in cell.done]
    run, shape = next((pair for pair in shapes if pair[1] and (pair[0].folder / "config.yaml").is_file()), (None, None))
    if run is None or shape is None:
        return []
    cfg = config.load(run.folder / "config.yaml", [], schema.Config)
    grid = grid_of(tuple(shape[1:]), cfg.tokens.patch_size)
    with FakeTensorMode(allow_non_fake_inputs=True):
        transformer = build.build_transformer(cfg, tuple(shape), ANY_WIDTH)
    found: dict[tuple, Mask] = {}
    for mixer in mixers_of(transformer):
        for heads in runs_of(mixer):
            drawing = draw(heads, grid)
            key = (drawing.plane.numpy().tobytes(), *(view.seen.numpy().tobytes() for view in drawing.views))
            size, shift = mixer.use.keys.size, mixer.use.shift
            words = mixer_words(mixer, grid) + (f", window {list(size)} shifted by {list(shift)}" if size else "")
            words += f" ({drawing.note})" if drawing.note else ""
            found.setdefault(key, Mask(words, drawing))
    return list(found.values())


def masks(results: Results, path: Path) -> tuple[Path, list[str]] | None:
    """A row a mask: queries by keys, and what the query at the clip's centre sees, frame by frame; and what is not drawn."""
    rows, left_out = [], []
    alike: dict[tuple[str, ...], list[str]] = {}
    for cell in results.cells:
        found = masks_of(cell)
        same = alike.setdefault(tuple(map(_key, found)), [])
        same.append(cell.name)
        if found and len(same) == 1:
            rows += [(cell.name if i == 0 else "", mask) for i, mask in enumerate(found[:MASKS])]
            left_out += [f"{len(found) - MASKS} more of {cell.name}"] if len(found) > MASKS else []
    left_out += [f"{several(same[1:])} (as {same[0]})" for key, same in alike.items() if key and len(same) > 1]
    if not rows:
        return None
    frames = max(min(FRAMES, len(mask.drawing.views[0].seen)) for _, mask in rows)
    size = (4.9 + 0.95 * frames, ROW * len(rows) + 0.35)  # inches
    with pyplot.rc_context(RC):
        figure = pyplot.figure(figsize=size, dpi=DPI)
        for i, (name, mask) in enumerate(rows):
            _mask_row(figure, size, size[1] - 0.3 - ROW * i, name, mask)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, facecolor="white")
        pyplot.close(figure)
    return path, left_out


def _key(mask: Mask) -> str:
    """What tells two masks apart: words but for the mixer's name, and what is drawn."""
    return json.dumps([mask.words.partition(": ")[2], mask.drawing.plane.tolist()])


def _mask_row(figure, size: tuple[float, float], top: float, name: str, mask: Mask) -> None:
    """One row, from `top` inches downwards."""
    width, height = size
    words = textwrap.wrap(mask.words, 56)
    figure.text(0.1 / width, (top - 0.02) / height, name, fontsize=9.5, weight="bold", va="top")
    figure.text(0.1 / width, (top - 0.22) / height, "\n".join(words[:6]), fontsize=7.5, va="top", color="#444444")
    plane = figure.add_axes((3.35 / width, (top - 1.05) / height, 1.05 / width, 1.05 / height))
    smooth = "nearest" if len(mask.drawing.plane) < 200 else "antialiased"
    plane.imshow(mask.drawing.plane, cmap="Blues", vmin=0, vmax=1.25, interpolation=smooth)
    view = mask.drawing.views[0]
    shown = _frames_around(view.query[0], len(view.seen))
    panels = [(plane, "queries (down) x keys")]
    for j, frame in enumerate(shown):
        axis = figure.add_axes(((4.6 + 0.95 * j) / width, (top - 1.05) / height, 0.85 / width, 1.05 / height))
        axis.imshow(view.seen[frame], cmap="Blues", vmin=0, vmax=1.25)
        if frame == view.query[0]:
            axis.plot(view.query[2], view.query[1], "s", color="#c00000", markersize=5, fillstyle="none")
        panels.append((axis, f"frame {frame}"))
    for axis, title in panels:
        axis.set_anchor("N")
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set(visible=True, color="#999999", linewidth=0.6)
        axis.set_title(title, fontsize=6.5, pad=2, fontweight="normal", loc="center")


def _frames_around(own: int, count: int) -> list[int]:
    """All frames, or those about the query's own."""
    first = max(0, min(own - FRAMES // 2, count - FRAMES))
    return list(range(first, min(count, first + FRAMES)))
