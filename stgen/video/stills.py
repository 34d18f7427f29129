"""Images, folders of numbered images, and GIFs, read by Pillow."""

import itertools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, ImageSequence

from stgen.video.clip import Info, VideoError, collect
from stgen.video.files import check_whole, content_of

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
FOLDER_FPS = 8.0  # a folder of images has no rate of its own


def frame_files(folder: Path) -> list[Path]:
    """The images of a folder of frames by number; empty if it holds anything else or two of the same number."""
    numbered = {}
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        number = frame_number(entry.name)
        if number is None or not entry.is_file() or number in numbered:
            return []
        numbered[number] = Path(entry.path)
    return [numbered[number] for number in sorted(numbered)]


def frame_number(name: str) -> int | None:
    """12 for frame_0012.png; None for a name that is not one of a numbered image."""
    match = re.fullmatch(r"\D*(\d{1,18})\.(png|jpe?g|webp|bmp)", name, re.IGNORECASE)
    return int(match[1]) if match else None


@contextmanager
def _image(path: Path) -> Iterator[Image.Image]:
    """An image as it is meant to be seen: cameras store which way is up."""
    with content_of(path) as content, Image.open(content, formats=IMAGE_FORMATS) as image:
        yield ImageOps.exif_transpose(image)


def probe_image(path: Path) -> Info:
    with _image(path) as image:
        return Info(1, FOLDER_FPS, image.height, image.width)


def read_image(path: Path, wanted: list[int]) -> list[np.ndarray]:
    with _image(path) as image:
        return collect(path, [(0, image)], wanted, lambda image: np.asarray(image.convert("RGB")))


def probe_folder(path: Path) -> Info:
    files = frame_files(path)
    numbers = [frame_number(file.name) or 0 for file in files]
    steps = {after - before for before, after in itertools.pairwise(numbers)}
    if len(steps) > 1:
        gap = next(n for n, after in itertools.pairwise(numbers) if after - n > min(steps))
        raise VideoError(path, f"lacks frames after number {gap}: frames are numbered in steps of {min(steps)}")
    with Image.open(files[0], formats=IMAGE_FORMATS) as image:
        return Info(len(files), FOLDER_FPS, image.height, image.width)


def read_folder(path: Path, wanted: list[int]) -> list[np.ndarray]:
    def load(file: Path) -> np.ndarray:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            return np.asarray(image.convert("RGB"))

    files = frame_files(path)
    return collect(path, ((n, files[n]) for n in sorted(set(wanted)) if n < len(files)), wanted, load)


def probe_gif(path: Path) -> Info:
    check_whole(path)
    with content_of(path) as content, Image.open(content, formats=["GIF"]) as image:
        # Viewers show a frame without a duration for a tenth of a second.
        durations = [frame.info.get("duration", 0) or 100 for frame in ImageSequence.Iterator(image)]
        return Info(len(durations), 1000 * len(durations) / sum(durations), image.height, image.width)


def read_gif(path: Path, wanted: list[int]) -> list[np.ndarray]:
    with content_of(path) as content, Image.open(content, formats=["GIF"]) as image:
        frames = enumerate(ImageSequence.Iterator(image))
        return collect(path, frames, wanted, lambda frame: np.asarray(frame.convert("RGB")))
