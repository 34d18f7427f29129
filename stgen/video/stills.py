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
    numbered, prefixes = {}, set()
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        prefix, number = _parts(entry.name)
        if number is None or not entry.is_file() or number in numbered:
            return []
        numbered[number] = Path(entry.path)
        prefixes.add(prefix)
    if len(prefixes) > 1 and any(re.search(r"\d", prefix) for prefix in prefixes):
        return []  # cat1_7.png and cat2_8.png are of two clips
    return [numbered[number] for number in sorted(numbered)]


def frame_number(name: str) -> int | None:
    """12 for frame_0012.png; None for a name that is not one of a numbered image."""
    return _parts(name)[1]


def _parts(name: str) -> tuple[str, int | None]:
    """What stands before the number of an image, and the number."""
    match = re.fullmatch(r"((?:.*\D)?)(\d{1,18})\.(?:png|jpe?g|webp|bmp)", name, re.IGNORECASE | re.DOTALL)
    return (match[1], int(match[2])) if match else ("", None)


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
