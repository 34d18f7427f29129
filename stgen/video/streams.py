"""Streams in containers, read by FFmpeg through av, in this thread alone."""

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import Interpolation, VideoReformatter

from stgen.video.clip import MAX_PIXELS, Info, VideoError, check_size, collect
from stgen.video.files import SUFFIXES, check_whole, content_of

NEAR = 32  # up to this frame, decoding from the start is cheaper than looking for a place to seek to

# A playlist or script named x.mp4 must not make FFmpeg open other files or connect to anywhere.
LOCAL_ONLY = {"protocol_whitelist": "file", "format_whitelist": "mov,matroska,avi"}

# Without these flags FFmpeg takes shortcuts that cost 4 dB and differ between processors.
EXACT = (
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.BITEXACT
)


def probe_stream(path: Path) -> Info:
    check_whole(path)
    with _opened(path) as (container, stream):
        _check_index(path, stream)
        check_size(path, stream.height or 1, stream.width or 1)  # before a frame of that size is allocated
        rate = stream.average_rate or stream.guessed_rate or 0
        frames = stream.frames - _count_hidden(path, container, stream)
        first = next(container.decode(stream), None)
        if first is None:
            raise VideoError(path, "has no frame that can be decoded")
        height, width = (first.width, first.height) if _quarter_turns(first) % 2 else (first.height, first.width)
    return Info(frames or len(_stamps_of(path)), float(rate), height, width)


def read_stream(path: Path, wanted: list[int]) -> list[np.ndarray]:
    if wanted[0] > NEAR:
        try:
            return _read_from_seek(path, wanted, _stamps_of(path))
        except (VideoError, av.FFmpegError):
            pass  # stamps or index are of no use: read from the start instead
    try:
        with _opened(path) as (container, stream):
            return collect(path, _numbered(path, container, stream), wanted, _converter(path))
    except _Untimed:
        return _read_counting(path, wanted)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its first real video stream, decoding in this thread only."""
    with ExitStack() as closing:
        content = closing.enter_context(content_of(path))
        try:
            container = av.open(content, container_options=LOCAL_ONLY, metadata_errors="replace")
        except av.ArgumentError:
            raise VideoError(
                path, f"is of a format that is not read; convert it to one of {' '.join(SUFFIXES)}"
            ) from None
        closing.enter_context(container)
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            raise VideoError(path, "has no video stream")
        options = (
            {"err_detect": "explode"} if streams[0].codec_context.name == "mjpeg" else {}
        )  # or it shows an old frame
        streams[0].codec_context.options = {"max_pixels": str(MAX_PIXELS), **options}
        streams[0].codec_context.thread_count = 1
        streams[0].codec_context.thread_type = "NONE"
        yield container, streams[0]


def _check_index(path: Path, stream: Any) -> None:
    """Refuse a file whose index points past its end: the header of a cut-off mp4 still declares every frame."""
    entries = stream.index_entries
    if len(entries) and entries[-1].pos + entries[-1].size > path.stat().st_size:
        raise VideoError(path, "is cut short: its index points past the end of the file")


def _count_hidden(path: Path, container: Any, stream: Any) -> int:
    """How many of the frames that a stream declares are not shown.

    An AVI says by an empty entry that the frame before stays. An edit list hides what lay before the cut where a video
    was cut out of a longer one without encoding; a file whose edit list hides more than it says is refused, since a
    damaged time puts a frame outside of it.
    """
    entries = [(entry.timestamp or 0, entry.is_discard) for entry in stream.index_entries]
    if container.format.name == "avi":
        return stream.frames - len(entries) if entries and entries[-1][0] + 1 == stream.frames else 0
    hidden = sum(discard for _, discard in entries)
    if not hidden or not stream.frames or stream.duration is None:
        return 0
    steps = [after - before for (before, _), (after, _) in itertools.pairwise(entries)]
    steps = [*steps, steps[-1] if steps else 0]
    shown = sum(step for step, (_, discard) in zip(steps, entries, strict=True) if not discard)
    if shown < stream.duration - 0.9 * max(steps):
        raise VideoError(path, f"is damaged: its edit list hides {hidden} of {len(entries)} frames, more than it says")
    return hidden


class _Untimed(VideoError):
    """Time stamps that do not tell which frame is which."""


def _read_from_seek(path: Path, wanted: list[int], stamps: np.ndarray) -> list[np.ndarray]:
    """Decode from the key frame before wanted[0]; `stamps`, sorted, say which frame each time stamp belongs to."""
    if wanted[-1] >= len(stamps) or not (np.diff(stamps) > 0).all():
        raise _Untimed(path, "has no usable time stamps")

    def numbered(frames: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        last = -1
        for frame in frames:
            number = int(np.searchsorted(stamps, frame.pts)) if frame.pts is not None else len(stamps)
            if number == len(stamps) or stamps[number] != frame.pts or number <= last:
                raise _Untimed(path, "has frames without a time stamp of its packets, or not in their order")
            last = number
            yield number, frame

    with _opened(path) as (container, stream):
        container.seek(int(stamps[wanted[0]]), stream=stream, backward=True)
        return collect(path, numbered(container.decode(stream)), wanted, _converter(path))


def _numbered(path: Path, container: Any, stream: Any) -> Iterator[tuple[int, Any]]:
    """(number, frame) from the start; the number is how many packets come before in time.

    Decoders drop a packet they can make nothing of without a word. Counted so, it leaves a hole in the numbers, and
    what follows keeps its place.
    """
    waiting, number, shown = [], 0, _shown(stream)
    for packet in container.demux(stream):
        if shown(packet):
            if packet.pts is None:
                raise _Untimed(path, "has packets without a time stamp")
            heapq.heappush(waiting, packet.pts)
        for frame in packet.decode():
            while waiting and frame.pts is not None and waiting[0] < frame.pts:
                heapq.heappop(waiting)
                number += 1
            if not waiting or heapq.heappop(waiting) != frame.pts:
                raise _Untimed(path, "has frames that do not come in the order of their time stamps")
            yield number, frame
            number += 1


def _read_counting(path: Path, wanted: list[int]) -> list[np.ndarray]:
    """Without usable stamps a frame's number is known only if every packet gives one: decode all to see."""
    with _opened(path) as (container, stream):
        frames = container.decode(stream)
        arrays = collect(path, enumerate(frames), wanted, _converter(path))
        decoded = wanted[-1] + 1 + sum(1 for _ in frames)
    if decoded != (packets := len(_stamps_of(path))):
        raise VideoError(path, f"gives {decoded} frames of {packets}, and its time stamps do not tell which")
    return arrays


def _stamps_of(path: Path) -> np.ndarray:
    status = path.stat()
    return _stamps(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)  # a long video is read at many places; size and time of change keep the memory true
def _stamps(path: Path, size: int, changed: int) -> np.ndarray:
    """Time stamps of all shown frames, ascending: int64 [frames], all -1 where packets carry none."""
    with _opened(path) as (container, stream):
        shown, fragmented = _shown(stream), "mov" in container.format.name and not stream.frames
        packets = [(p.pts, p.dts, p.duration) for p in container.demux(stream) if shown(p)]
    for number, ((_, before, lasts), (_, dts, _)) in enumerate(itertools.pairwise(packets), 1):
        if fragmented and dts - before >= 2 * max(lasts, 1):
            raise VideoError(path, f"is damaged: a fragment before frame {number} is missing")
    stamps = [pts for pts, _, _ in packets]
    usable = all(stamp is not None for stamp in stamps)
    return np.sort(np.array(stamps if usable else [-1] * len(stamps), dtype=np.int64))


def _shown(stream: Any) -> Callable[[Any], bool]:
    """Which packets of a stream give a frame."""
    hidden = _hidden_vp8 if stream.codec_context.name == "vp8" else lambda packet: False
    return lambda packet: packet.size > 0 and not packet.is_discard and not hidden(packet)


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
