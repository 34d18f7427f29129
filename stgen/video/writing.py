"""Writing clips: the same frames give the same bytes, and a file appears under its name only when it is whole."""

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.codec.context import Flags as CodecFlags
from av.container import Flags as ContainerFlags
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter
from PIL import Image

from stgen.video.clip import Clip, VideoError
from stgen.video.files import explained
from stgen.video.streams import EXACT


@dataclass(frozen=True)
class _Encoding:
    container: str
    codec: str
    pixels: str
    options: dict[str, str]
    odd_pixels: str  # for odd heights or widths


# Odd sizes have no yuv420p in H.264; yuv444p keeps the size and plays in mpv, VLC and FFmpeg, though not in all
# browsers. Even sizes play everywhere. mbtree is off because x264's vector code for it reads memory it has not set on
# frames of few macroblocks: the same frames gave up to 29 different files in 50.
_ENCODINGS = {
    ".mp4": _Encoding("mp4", "libx264", "yuv420p", {"crf": "18", "mbtree": "0"}, "yuv444p"),
    ".webm": _Encoding("webm", "libvpx-vp9", "yuv420p", {"crf": "24", "b:v": "0", "cpu-used": "5"}, "yuv420p"),
    ".mkv": _Encoding("matroska", "ffv1", "bgr0", {"level": "3"}, "bgr0"),  # lossless
}


def write(path: str | Path, clip: Clip) -> None:
    """Write a clip as .mp4, .webm, .mkv (lossless), .gif or, without a suffix, a new folder of PNG frames.

    The same frames give the same bytes; the file appears under its name only when it is whole. A folder keeps no
    frame rate. Raises VideoError for another suffix or a clip that is not uint8 [T, 3, H, W], and where encoding fails.
    """
    path = Path(path)
    if path.suffix not in {*_ENCODINGS, ".gif", ""}:
        raise VideoError(path, f"cannot be written: {path.suffix} is none of .mp4 .webm .mkv .gif or a folder")
    arrays = _arrays(path, clip.frames)
    with explained(path), whole(path) as draft:
        if path.suffix == "":
            _write_folder(draft, arrays)
        elif path.suffix == ".gif":
            _write_gif(draft, arrays, clip.fps)
        else:
            _write_stream(draft, arrays, clip.fps, _ENCODINGS[path.suffix])


@contextmanager
def writer(path: str | Path, fps: float) -> Iterator[Callable[[torch.Tensor], None]]:
    """Write a clip as .mp4, .webm or .mkv whose frames come bit by bit: within it add(frames) takes uint8 [T, 3, H, W].

    The bytes are those that `write` makes of all frames at once; the file appears when the last are added. Raises
    VideoError as `write` does.
    """
    path = Path(path)
    with whole(path) as draft, ExitStack() as open_file:
        with explained(path):
            encode = open_file.enter_context(_encoder(draft, fps, _ENCODINGS[path.suffix]))

        def add(frames: torch.Tensor) -> None:
            with explained(path):
                encode(_arrays(path, frames))

        yield add  # what goes wrong outside is none of the file's faults
        with explained(path):
            open_file.close()


def _arrays(path: Path, frames: torch.Tensor) -> np.ndarray:
    """uint8 [T, 3, H, W] -> [T, H, W, 3]."""
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3 or not frames.numel():
        raise VideoError(path, f"needs uint8 frames [T, 3, H, W], not {frames.dtype} {list(frames.shape)}")
    return frames.permute(0, 2, 3, 1).contiguous().cpu().numpy()


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A hidden name beside `path` to write to; it takes the place of `path` if all goes well and vanishes if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        if draft.is_dir():
            shutil.rmtree(draft)
        draft.unlink(missing_ok=True)


def _write_stream(path: Path, arrays: np.ndarray, fps: float, encoding: _Encoding) -> None:
    with _encoder(path, fps, encoding) as encode:
        encode(arrays)


@contextmanager
def _encoder(path: Path, fps: float, encoding: _Encoding) -> Iterator[Callable[[np.ndarray], None]]:
    """Within it, encode(arrays) takes frames [T, H, W, 3]; the first decide the size."""
    options = {"movflags": "+faststart"} if encoding.container == "mp4" else {}
    with av.open(os.path.abspath(path), "w", format=encoding.container, container_options=options) as container:
        container.flags |= ContainerFlags.bitexact.value  # no dates, no random ids
        stream: Any = container.add_stream(encoding.codec, rate=_rate(fps), options=encoding.options)
        context = stream.codec_context
        context.thread_count = 1  # x264's output depends on the number of its threads
        context.flags |= CodecFlags.bitexact.value
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        reformatter, numbers = VideoReformatter(), itertools.count()

        def encode(arrays: np.ndarray) -> None:
            for array, number in zip(arrays, numbers, strict=False):
                if number == 0:
                    stream.height, stream.width = height, width = array.shape[:2]
                    stream.pix_fmt = encoding.odd_pixels if height % 2 or width % 2 else encoding.pixels
                frame = av.VideoFrame.from_ndarray(array, format="rgb24")
                frame = reformatter.reformat(
                    frame, format=stream.pix_fmt, dst_colorspace=Colorspace.ITU709, interpolation=EXACT, threads=1
                )
                frame.pts = number
                container.mux(stream.encode(frame))

        yield encode
        container.mux(stream.encode())


def _write_gif(path: Path, arrays: np.ndarray, fps: float) -> None:
    """One palette for all frames, chosen by Pillow; stored by FFmpeg, since Pillow drops frames that repeat."""
    count, height, width = arrays.shape[:3]
    tall = Image.fromarray(arrays.reshape(count * height, width, 3)).quantize(256, dither=Image.Dither.NONE)
    colours = np.zeros((256, 4), np.uint8)  # alpha, red, green, blue
    colours[:, 0] = 255
    used = np.array(tall.getpalette("RGB"), np.uint8).reshape(-1, 3)
    colours[: len(used), 1:] = used
    indices = np.asarray(tall).reshape(count, height, width)
    with av.open(os.path.abspath(path), "w", format="gif") as container:
        stream: Any = container.add_stream("gif", rate=_rate(fps))
        stream.height, stream.width, stream.pix_fmt = height, width, "pal8"
        for number, index in enumerate(indices):
            picture: Any = (np.ascontiguousarray(index), colours)
            frame = av.VideoFrame.from_ndarray(picture, format="pal8")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _write_folder(path: Path, arrays: np.ndarray) -> None:
    path.mkdir()
    for number, array in enumerate(arrays):
        Image.fromarray(array).save(path / f"{number:05d}.png")


def _rate(fps: float) -> Fraction:
    return Fraction(fps).limit_denominator(1001)
