"""Clips on disk: reading, writing and measuring videos, and sheets of stills. The only file that imports av.

A video is a regular local file (mp4, mkv, webm, avi, mov, m4v, gif) or a folder that holds nothing but numbered
images. Pixels are sRGB bytes; a clip is uint8 [T, 3, H, W].
"""

import itertools
import math
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.codec.context import Flags as CodecFlags
from av.container import Flags as ContainerFlags
from av.stream import Disposition
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter
from PIL import Image, ImageDraw, ImageFont, ImageSequence

SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".gif")
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
FOLDER_FPS = 8.0  # a folder of images has no rate of its own
MAX_SIDE = 16384
NEAR = 32  # up to this frame, decoding from the start is cheaper than looking for a place to seek to

# A playlist or script named x.mp4 must not make FFmpeg open other files or connect to anywhere.
LOCAL_ONLY = {"protocol_whitelist": "file", "format_whitelist": "mov,matroska,avi,mpegts"}

# Without these flags FFmpeg takes shortcuts that cost 4 dB and differ between processors.
EXACT = (
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.BITEXACT
)


class VideoError(ValueError):
    """A video that cannot be read or written; `reason` is one line, the message also names the path."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(str(path), reason)  # both arguments, so that the error survives pickling
        self.path, self.reason = str(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class Clip:
    frames: torch.Tensor  # uint8 [T, 3, H, W]
    fps: float


@dataclass(frozen=True)
class Info:
    """What a video is, as `read` would return it (rotation applied)."""

    frames: int
    fps: float
    height: int
    width: int


# ---------------------------------------------------------------------------------------------------------- reading


def probe(path: str | Path) -> Info:
    """Length, rate and size of a video, from its header and its first frame.

    Containers that do not say their length are counted packet by packet. Raises VideoError for anything that is not
    a readable video with a frame rate and sides up to 16384 pixels.
    """
    path = Path(path)
    with _explained(path):
        _check_kind(path)
        info = _SOURCES[_kind(path)].probe(path)
        if info.frames < 1:
            raise VideoError(path, "has no frames")
        if not (math.isfinite(info.fps) and info.fps > 0):
            raise VideoError(path, "has no frame rate")
        if not 0 < max(info.height, info.width) <= MAX_SIDE:
            raise VideoError(path, f"is {info.width} x {info.height} pixels; at most {MAX_SIDE} a side can be read")
        return info


def read(path: str | Path, start: int = 0, num_frames: int | None = None, step: float = 1.0) -> Clip:
    """Frames start, start + step, start + 2 step, … of a video, rounded to whole frames; None reads to the end.

    Exact to the frame wherever it starts. A step below 1 repeats frames; the clip's fps is the source's / step.
    Raises VideoError, never returns a short clip, when a frame asked for cannot be decoded.
    """
    path = Path(path)
    info = probe(path)
    if num_frames is None:
        num_frames = _fitting(info.frames - start, step)
    if start < 0 or step <= 0 or num_frames < 1:
        raise VideoError(path, f"has {info.frames} frames; start {start}, step {step} leaves {num_frames} to read")
    wanted = [start + offset for offset in offsets(num_frames, step)]
    if wanted[-1] >= info.frames:
        raise VideoError(path, f"has {info.frames} frames, but frame {wanted[-1]} was asked for")
    with _explained(path):
        arrays = _SOURCES[_kind(path)].read(path, wanted)
        if len({array.shape for array in arrays}) > 1:
            raise VideoError(path, "changes its frame size on the way")
        frames = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()  # [T, 3, H, W]
        return Clip(frames, info.fps / step)


def offsets(num_frames: int, step: float) -> list[int]:
    """Source frames of a clip, counted from its first one: 0, step, 2 step, … rounded half up."""
    return [math.floor(i * step + 0.5) for i in range(num_frames)]


def frame_files(folder: Path) -> list[Path]:
    """The images of a folder of frames by number; empty if it holds anything else or two of the same number."""
    numbered = {}
    for entry in os.scandir(folder):
        match = re.fullmatch(r"\D*(\d+)\.(png|jpe?g|webp|bmp)", entry.name, re.IGNORECASE)
        if entry.name.startswith("."):
            continue
        if not match or not entry.is_file() or int(match[1]) in numbered:
            return []
        numbered[int(match[1])] = Path(entry.path)
    return [numbered[number] for number in sorted(numbered)]


def _fitting(frames: int, step: float) -> int:
    """How many steps fit into `frames` source frames."""
    count = max(0, math.ceil(frames / step) + 1)
    while count and math.floor((count - 1) * step + 0.5) >= frames:
        count -= 1
    return count


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file raises into a VideoError.

    Seen so far: FFmpegError, OSError, IndexError, MemoryError, EOFError, UnicodeDecodeError and, from Pillow,
    SyntaxError, struct.error and DecompressionBombError; a list would not stay complete.
    """
    try:
        yield
    except VideoError:
        raise
    except Exception as error:
        text = getattr(error, "strerror", None) or str(error) or "no details"
        raise VideoError(path, f"{' '.join(text.split())[:200]} ({type(error).__name__})") from None


def _check_kind(path: Path) -> None:
    """Refuse, before anything is opened, what is neither a regular file with content nor a folder of frames."""
    status = path.stat()  # opening a FIFO could wait for ever; asking what it is cannot
    if stat.S_ISDIR(status.st_mode):
        if not frame_files(path):
            raise VideoError(path, "is a folder, but not one of numbered images only")
    elif not stat.S_ISREG(status.st_mode):
        raise VideoError(path, "is not a regular file")
    elif not status.st_size:
        raise VideoError(path, "is an empty file")


def _kind(path: Path) -> str:
    return "folder" if path.is_dir() else "gif" if path.suffix.lower() == ".gif" else "stream"


def _collect(path: Path, frames: Iterable[tuple[int, Any]], wanted: list[int], convert: Callable) -> list[np.ndarray]:
    """The `wanted` frames, each uint8 [H, W, 3], out of (number, frame) pairs in order of number."""
    needed, found = set(wanted), {}
    for number, frame in frames:
        if number in needed:
            found[number] = convert(frame)
        if number >= wanted[-1]:
            break
    if missing := sorted(needed - found.keys()):
        raise VideoError(path, f"frame {missing[0]} cannot be decoded ({len(found)} of {len(needed)} frames found)")
    return [found[number] for number in wanted]


# --- folders of images and gifs


def _probe_folder(path: Path) -> Info:
    files = frame_files(path)
    with Image.open(files[0], formats=IMAGE_FORMATS) as image:
        return Info(len(files), FOLDER_FPS, image.height, image.width)


def _read_folder(path: Path, wanted: list[int]) -> list[np.ndarray]:
    def load(file: Path) -> np.ndarray:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            return np.asarray(image.convert("RGB"))

    files = frame_files(path)
    return _collect(path, ((n, files[n]) for n in sorted(set(wanted)) if n < len(files)), wanted, load)


def _probe_gif(path: Path) -> Info:
    with Image.open(path, formats=["GIF"]) as image:
        # Viewers show a frame without a duration for a tenth of a second.
        durations = [frame.info.get("duration", 0) or 100 for frame in ImageSequence.Iterator(image)]
        return Info(len(durations), 1000 * len(durations) / sum(durations), image.height, image.width)


def _read_gif(path: Path, wanted: list[int]) -> list[np.ndarray]:
    with Image.open(path, formats=["GIF"]) as image:
        frames = enumerate(ImageSequence.Iterator(image))
        return _collect(path, frames, wanted, lambda frame: np.asarray(frame.convert("RGB")))


# --- containers


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its first real video stream, decoding in this thread only."""
    try:
        # An absolute path cannot be taken for a protocol, as "concat:" or "http:" could.
        container = av.open(os.path.abspath(path), container_options=LOCAL_ONLY, metadata_errors="replace")
    except av.ArgumentError:
        raise VideoError(path, f"is of a format that is not read; convert it to one of {' '.join(SUFFIXES)}") from None
    with container:
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            raise VideoError(path, "has no video stream")
        streams[0].codec_context.thread_count = 1
        streams[0].codec_context.thread_type = "NONE"
        yield container, streams[0]


def _probe_stream(path: Path) -> Info:
    with _opened(path) as (container, stream):
        _check_whole(path, stream)
        rate, frames = stream.average_rate or stream.guessed_rate or 0, stream.frames
        if max(stream.height, stream.width) > MAX_SIDE:  # before a frame of that size is allocated
            return Info(1, 1.0, stream.height, stream.width)
        first = next(container.decode(stream), None)
        if first is None:
            raise VideoError(path, "has no frame that can be decoded")
        height, width = (first.width, first.height) if _quarter_turns(first) % 2 else (first.height, first.width)
    return Info(frames or len(_stamps_of(path)), float(rate), height, width)


def _check_whole(path: Path, stream: Any) -> None:
    """Refuse a file whose index points past its end: the header of a cut-off mp4 still declares every frame."""
    entries = stream.index_entries
    if len(entries) and entries[-1].pos + entries[-1].size > path.stat().st_size:
        raise VideoError(path, "is cut short: its index points past the end of the file")


def _read_stream(path: Path, wanted: list[int]) -> list[np.ndarray]:
    if wanted[0] > NEAR:
        try:
            return _read_from_seek(path, wanted, _stamps_of(path))
        except (VideoError, av.FFmpegError):
            pass  # stamps or index are of no use: count from the start instead
    with _opened(path) as (container, stream):
        return _collect(path, enumerate(container.decode(stream)), wanted, _converter(path))


def _read_from_seek(path: Path, wanted: list[int], stamps: np.ndarray) -> list[np.ndarray]:
    """Decode from the key frame before wanted[0]; `stamps`, sorted, say which frame each time stamp belongs to."""
    if wanted[-1] >= len(stamps) or not (np.diff(stamps) > 0).all():
        raise VideoError(path, "has no usable time stamps")

    def numbered(frames: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        for frame in frames:
            number = int(np.searchsorted(stamps, frame.pts)) if frame.pts is not None else len(stamps)
            if number == len(stamps) or stamps[number] != frame.pts:
                raise VideoError(path, "has frames without a time stamp of its packets")
            yield number, frame

    with _opened(path) as (container, stream):
        container.seek(int(stamps[wanted[0]]), stream=stream, backward=True)
        return _collect(path, numbered(container.decode(stream)), wanted, _converter(path))


def _stamps_of(path: Path) -> np.ndarray:
    status = path.stat()
    return _stamps(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)  # a long video is read at many places; size and time of change keep the memory true
def _stamps(path: Path, size: int, changed: int) -> np.ndarray:
    """Time stamps of all shown frames, ascending: int64 [frames], all -1 where packets carry none."""
    with _opened(path) as (container, stream):
        hidden = _hidden_vp8 if stream.codec_context.name == "vp8" else lambda packet: False
        packets = (packet for packet in container.demux(stream) if packet.size and not packet.is_discard)
        stamps = [packet.pts for packet in packets if not hidden(packet)]
    usable = all(stamp is not None for stamp in stamps)
    return np.sort(np.array(stamps if usable else [-1] * len(stamps), dtype=np.int64))


def _hidden_vp8(packet: Any) -> bool:
    """VP8 keeps reference frames that are never shown in packets of their own (RFC 6386, 9.1: show_frame)."""
    return not bytes(packet)[0] >> 4 & 1


def _converter(path: Path) -> Callable[[Any], np.ndarray]:
    """A function from decoded frames to uint8 [H, W, 3]; one for a whole read, so that its tables are kept."""
    reformatter = VideoReformatter()

    def convert(frame: Any) -> np.ndarray:
        if frame.is_corrupt:
            raise VideoError(path, "has a damaged frame")
        rgb = reformatter.reformat(frame, format="rgb24", interpolation=EXACT, threads=1)  # reads the frame's tags
        return np.rot90(rgb.to_ndarray(), _quarter_turns(frame))

    return convert


def _quarter_turns(frame: Any) -> int:
    """Counter-clockwise quarter turns that bring a frame upright."""
    return round(frame.rotation / 90) % 4


@dataclass(frozen=True)
class _Source:
    probe: Callable[[Path], Info]
    read: Callable[[Path, list[int]], list[np.ndarray]]


_SOURCES = {
    "folder": _Source(_probe_folder, _read_folder),
    "gif": _Source(_probe_gif, _read_gif),
    "stream": _Source(_probe_stream, _read_stream),
}


# ---------------------------------------------------------------------------------------------------------- writing


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
    with _explained(path), _whole(path) as draft:
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
    with _whole(path) as draft, ExitStack() as open_file:
        with _explained(path):
            encode = open_file.enter_context(_encoder(draft, fps, _ENCODINGS[path.suffix]))

        def add(frames: torch.Tensor) -> None:
            with _explained(path):
                encode(_arrays(path, frames))

        yield add  # what goes wrong outside is none of the file's faults
        with _explained(path):
            open_file.close()


def _arrays(path: Path, frames: torch.Tensor) -> np.ndarray:
    """uint8 [T, 3, H, W] -> [T, H, W, 3]."""
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3 or not frames.numel():
        raise VideoError(path, f"needs uint8 frames [T, 3, H, W], not {frames.dtype} {list(frames.shape)}")
    return frames.permute(0, 2, 3, 1).contiguous().cpu().numpy()


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
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


# ----------------------------------------------------------------------------------------------------------- sheets


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
    with _whole(Path(path)) as draft:
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
