"""Sheets of stills: clips side by side on one page."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from stgen.video.clip import Clip, VideoError
from stgen.video.writing import whole


def contact_sheet(path: str | Path, clips: list[Clip], captions: list[str], columns: int = 8) -> None:
    """A PNG with one row per clip: its caption, and under it up to `columns` evenly spaced frames.

    Small frames are enlarged by whole factors until both sides have 96 pixels, large ones reduced to 256.
    Raises VideoError if there are no clips or not as many captions.
    """
    if not clips or len(clips) != len(captions):
        raise VideoError(path, f"needs as many captions as clips, and one at least: {len(clips)}, {len(captions)}")
    margin, gap, size = 20, 4, 15
    font = ImageFont.load_default(size)
    strips = [_strip(clip.frames, columns, gap) for clip in clips]
    heading = size + 10
    width = max(320, *(strip.width for strip in strips))
    height = sum(strip.height + heading + margin for strip in strips)
    sheet = Image.new("RGB", (width + 2 * margin, height + margin), "white")
    draw, top = ImageDraw.Draw(sheet), margin
    for strip, caption in zip(strips, captions, strict=True):
        draw.text((margin, top), _shortened(caption, font, width), "#222222", font)
        sheet.paste(strip, (margin, top + heading))
        top += strip.height + heading + margin
    with whole(Path(path)) as draft:
        sheet.save(draft, format="PNG")


def _strip(frames: torch.Tensor, columns: int, gap: int) -> Image.Image:
    """Evenly spaced frames of uint8 [T, 3, H, W] side by side, first and last among them."""
    chosen = np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int)
    stills = [_still(Image.fromarray(frames[i].permute(1, 2, 0).contiguous().cpu().numpy())) for i in chosen]
    width, height = stills[0].size
    strip = Image.new("RGB", (len(stills) * (width + gap) - gap, height), "white")
    for column, still in enumerate(stills):
        strip.paste(still, (column * (width + gap), 0))
    return strip


def _still(image: Image.Image) -> Image.Image:
    factor = math.ceil(96 / min(image.size))
    if factor > 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((256, 256))
    return image


def _shortened(caption: str, font: Any, width: int) -> str:
    """The caption on one line, its end cut with … where it is wider than `width` pixels."""
    text = " ".join(caption[:600].split())  # more would not fit in any width
    text = "".join(c if c.isprintable() else "?" for c in text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"
