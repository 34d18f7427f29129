"""Videos of many codecs and containers, harm done to them, and what reading them says, told by another process."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.codec.context import Flags as CodecFlags
from av.container import Flags as ContainerFlags

ROOT = Path(__file__).parents[2]
FRAMES, HEIGHT, WIDTH = 48, 64, 64  # on smaller frames x265 writes where it must not


def pictures(frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Waves that move over noise, so that every frame is its own and takes bytes: uint8 [T, H, W, 3]."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    waves = [np.sin(x / 9 + t / 5), np.cos(y / 7 - t / 6), np.sin((x + y) / 11 + t / 4)]
    noise = np.random.default_rng(0).normal(0, 6, (frames, height, width, 3))
    return np.clip(127 + 90 * np.stack(waves, -1) + noise, 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Kind:
    """How a video is stored."""

    file: str
    codec: str
    pixels: str = "yuv420p"
    options: dict[str, str] = field(default_factory=dict)
    container: dict[str, str] = field(default_factory=dict)  # options of the container


KINDS = [
    Kind("h264.mp4", "libx264", options={"g": "8", "bf": "2"}),
    Kind("faststart.mp4", "libx264", options={"g": "8"}, container={"movflags": "+faststart"}),
    Kind("fragmented.mp4", "libx264", options={"g": "8"}, container={"movflags": "frag_keyframe+empty_moov"}),
    Kind("hevc.mp4", "libx265", options={"g": "8", "x265-params": "log-level=none:pools=none:frame-threads=1"}),
    Kind("av1.mp4", "libsvtav1", options={"g": "8", "preset": "12", "svtav1-params": "lp=1"}),
    Kind("h264.mkv", "libx264", options={"g": "8", "bf": "2"}),
    Kind("ffv1.mkv", "ffv1", "bgr0", options={"level": "3"}),
    Kind("vp8.webm", "libvpx", options={"g": "8", "cpu-used": "8"}),
    Kind("vp9.webm", "libvpx-vp9", options={"g": "8", "b:v": "0", "crf": "30", "cpu-used": "8"}),
    Kind("mpeg4.avi", "mpeg4", options={"g": "8", "bf": "2"}),
    Kind("mjpeg.avi", "mjpeg", "yuvj420p"),
    Kind("prores.mov", "prores_ks", "yuv422p10le"),
    Kind("qtrle.mov", "qtrle", "rgb24"),
    Kind("gif.gif", "gif", "rgb8"),
]


def write(path: Path, kind: Kind, frames: np.ndarray, fps: float = 24.0, stamps: list[int] | None = None) -> Path:
    """Encode uint8 [T, H, W, 3] with av directly."""
    with av.open(str(path), "w", container_options=kind.container) as container:
        stream = container.add_stream(kind.codec, rate=Fraction(fps).limit_denominator(1001), options=kind.options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], kind.pixels
        stream.codec_context.thread_count = 1
        container.flags |= ContainerFlags.bitexact.value  # no random numbers: the same harm meets the same bytes
        stream.codec_context.flags |= CodecFlags.bitexact.value
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=kind.pixels)
            frame.pts = stamps[number] if stamps else number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


# ------------------------------------------------------------------------------------------------------------ harm

Harm = Callable[[random.Random, bytearray], bytearray]


def place(chance: random.Random, data: bytearray, length: int = 1) -> int:
    return chance.randrange(max(1, len(data) - length))


def flip(count: int) -> Harm:
    def harm(chance: random.Random, data: bytearray) -> bytearray:
        for _ in range(count):
            data[place(chance, data)] ^= 1 << chance.randrange(8)
        return data

    return harm


def flip_ends(chance: random.Random, data: bytearray) -> bytearray:
    """Where containers keep what they say about themselves."""
    for _ in range(4):
        reach = min(len(data), 800)
        at = chance.randrange(reach)
        data[at if chance.random() < 0.5 else len(data) - 1 - at] ^= 1 << chance.randrange(8)
    return data


def cut(low: float, high: float) -> Harm:
    return lambda chance, data: data[: int(len(data) * chance.uniform(low, high))]


def cut_bytes(chance: random.Random, data: bytearray) -> bytearray:
    return data[: -chance.randrange(1, 200)]


def beheaded(chance: random.Random, data: bytearray) -> bytearray:
    return data[chance.randrange(1, 400) :]


def overwrite(fill: int | None) -> Harm:
    def harm(chance: random.Random, data: bytearray) -> bytearray:
        length = chance.randrange(4, 400)
        at = place(chance, data, length)
        data[at : at + length] = chance.randbytes(length) if fill is None else bytes([fill]) * length
        return data

    return harm


def swap_bytes(chance: random.Random, data: bytearray) -> bytearray:
    for _ in range(8):
        a, b = place(chance, data), place(chance, data)
        data[a], data[b] = data[b], data[a]
    return data


def swap_blocks(chance: random.Random, data: bytearray) -> bytearray:
    length = chance.randrange(16, min(512, len(data) // 4))
    a = chance.randrange(len(data) // 2 - length)
    b = chance.randrange(len(data) // 2, len(data) - length)
    data[a : a + length], data[b : b + length] = data[b : b + length], data[a : a + length]
    return data


def lose(chance: random.Random, data: bytearray) -> bytearray:
    length = chance.randrange(1, len(data) // 3)
    at = place(chance, data, length)
    del data[at : at + length]
    return data


def repeat(chance: random.Random, data: bytearray) -> bytearray:
    length = chance.randrange(1, len(data) // 3)
    at = place(chance, data, length)
    data[at:at] = data[at : at + length]
    return data


HARMS: dict[str, Harm] = {
    "one bit": flip(1),
    "64 bits": flip(64),
    "bits of the ends": flip_ends,
    "cut": cut(0.05, 0.95),
    "cut early": cut(0.0, 0.1),
    "cut at the end": cut_bytes,
    "beheaded": beheaded,
    "noise": overwrite(None),
    "zeros": overwrite(0),
    "swapped bytes": swap_bytes,
    "swapped blocks": swap_blocks,
    "lost": lose,
    "twice": repeat,
}


# ------------------------------------------------------------------------------------------------------------ told

TOLD = """
import hashlib, json, signal, sys
import torch
from stgen import video

torch.set_num_threads(1)
signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, whatever code it is in

def marks(path, start, count):
    try:
        frames = video.read(path, start, count).frames
    except video.VideoError as error:
        return error.reason
    return [hashlib.md5(frame.numpy().tobytes()).hexdigest() for frame in frames]

limit, reads = int(sys.argv[1]), json.loads(sys.argv[2])
for path in sys.stdin.read().splitlines():
    signal.alarm(limit)
    try:
        told = [marks(path, *read) for read in reads]
    except BaseException as error:
        told = repr(error)
    print(json.dumps(told), flush=True)
"""


def tell(paths: list[Path], reads: list[tuple[int, int | None]], limit: int = 30) -> list[list[list[str] | str] | str]:
    """For each file and each read of it, (start, frames): the marks of its frames, or the reason why it cannot be.

    Read in processes of their own. A file that lasts longer than `limit` seconds, ends the process or raises something
    else than VideoError gives words instead.
    """
    told: list[Any] = []
    while len(told) < len(paths):
        names = "\n".join(map(str, paths[len(told) :]))
        command = [sys.executable, "-c", TOLD, str(limit), json.dumps(reads)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, input=names, env=environment, capture_output=True, text=True)
        told += [json.loads(line) for line in done.stdout.splitlines()]
        if len(told) < len(paths):
            told.append("hangs" if done.returncode == -signal.SIGALRM else f"crashes ({done.returncode}) {done.stderr}")
    return told
