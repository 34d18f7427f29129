"""Hand-made files that a folder of videos may hold, and what must become of each."""

import os
import socket
import struct
import zipfile
import zlib
from collections.abc import Callable
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.stream import Disposition
from fault_videos import Kind, pictures, write
from PIL import Image

H264 = Kind("", "libx264")
MJPEG = Kind("", "mjpeg", "yuvj420p")
PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n"


class Monster(NamedTuple):
    make: Callable[[Path], Any]
    reason: str = ""  # why it is refused, as a regular expression; "" if it is read
    late: bool = False  # only reading tells


def clip(path: Path, kind: Kind = H264, frames: int = 8, height: int = 32, width: int = 48, **options: Any) -> Path:
    return write(path, kind, pictures(frames, height, width), fps=8.0, **options)


def h264(**options: str) -> Kind:
    return Kind("", "libx264", options=options)


def mjpeg(height: int, width: int, frames: int = 8) -> list[bytes]:
    """The packets of a video of whole pictures."""
    codec: Any = av.CodecContext.create("mjpeg", "w")
    codec.height, codec.width, codec.pix_fmt, codec.time_base = height, width, "yuvj420p", Fraction(1, 8)
    packets = []
    for image in pictures(frames, height, width):
        frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuvj420p")
        packets += [bytes(packet) for packet in codec.encode(frame)]
    return packets


def muxed(path: Path, packets: list[bytes], form: str = "matroska", options: dict[str, str] | None = None) -> Path:
    with av.open(str(path), "w", format=form, container_options=options or {}) as container:
        stream: Any = container.add_stream("mjpeg", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuvj420p"
        for number, data in enumerate(packets):
            packet = av.Packet(data)
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 8)
            packet.is_keyframe = True
            container.mux(packet)
    return path


# ----------------------------------------------------------------------------------------------------- one by one


def no_frames(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        container.start_encoding()


def sound(path: Path, cover: bool = False) -> None:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("aac", rate=8000)
        picture: Any = container.add_stream("mjpeg", rate=1) if cover else None
        if cover:
            picture.height, picture.width, picture.pix_fmt, picture.disposition = (
                32,
                48,
                "yuvj420p",
                Disposition.attached_pic,
            )
            packet = av.Packet(mjpeg(32, 48, 1)[0])
            packet.stream, packet.pts, packet.dts, packet.is_keyframe = picture, 0, 0, True
            container.mux(packet)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        container.mux(stream.encode(silence))
        container.mux(stream.encode())


def turned(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 48, 32, "yuv420p"
        stream.set_display_rotation(90)
        for number, image in enumerate(pictures(8, 48, 32)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def two_sizes(path: Path) -> None:
    muxed(path, [*chain(*zip(mjpeg(32, 48), mjpeg(64, 32), strict=True))])


def out_of_order(path: Path) -> None:
    """Two pictures of a Matroska file carry each other's time."""
    muxed(path, mjpeg(32, 48))
    data = bytearray(path.read_bytes())
    first, second = (data.index(b"\xff\xd8", at) for at in (0, data.index(b"\xff\xd8") + 2000))
    data[first - 3 : first - 1], data[second - 3 : second - 1] = (
        data[second - 3 : second - 1],
        data[first - 3 : first - 1],
    )
    path.write_bytes(data)


def huge_picture(path: Path) -> None:
    """A JPEG header that declares 12 000 x 12 000 pixels."""
    clip(path, MJPEG)
    data = path.read_bytes()
    at = data.index(b"\xff\xc0") + 5
    path.write_bytes(data.replace(data[at : at + 4], struct.pack(">HH", 12_000, 12_000)))


def huge_header(path: Path) -> None:
    """An AVI header that declares 16 000 x 12 000 pixels."""
    clip(path, Kind("", "ffv1", "bgr0"))
    data = bytearray(path.read_bytes())
    at = data.index(b"strf") + 12  # behind its length and that of the header in it
    data[at : at + 8] = struct.pack("<II", 16_000, 12_000)
    path.write_bytes(data)


def bomb(path: Path) -> None:
    """A PNG of a few bytes that declares 60 000 x 60 000 pixels."""
    path.mkdir()
    for number in range(8):
        Image.new("L", (8, 8)).save(path / f"{number}.png")
        data = (path / f"{number}.png").read_bytes()
        header = data[12:16] + struct.pack(">II", 60_000, 60_000) + data[24:29]
        (path / f"{number}.png").write_bytes(data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:])


def images(path: Path, numbers: list[int], sizes: list[tuple[int, int]] | None = None, mode: str = "RGB") -> None:
    path.mkdir()
    for place, number in enumerate(numbers):
        image = Image.fromarray(pictures(8, 32, 48)[place % 8]).convert(mode)
        image.resize(sizes[place] if sizes else (48, 32)).save(path / f"f_{number:04d}.png")


def disposed(path: Path) -> None:
    """Frames of which each only paints a spot and clears it again."""
    spots = []
    for number in range(8):
        image = Image.new("RGBA", (48, 32), (0, 0, 0, 0))
        image.paste((255, 30 * number, 0, 255), (number * 4, 4, number * 4 + 8, 12))
        spots.append(image)
    spots[0].save(path, save_all=True, append_images=spots[1:], disposal=2, duration=125, loop=0)


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "no video" * 100)


def listening(path: Path) -> None:
    server, here = socket.socket(socket.AF_UNIX), os.getcwd()
    os.chdir(path.parent)  # the whole path may be too long for a socket's name
    try:
        server.bind(path.name)
    finally:
        os.chdir(here)
        server.close()


def unfinished(path: Path) -> None:
    """An mp4 whose writer died before it wrote the index."""
    clip(path)
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"moov") - 4])


def trimmed(path: Path) -> None:
    """Cut out of a longer video without encoding: an edit list hides five frames before the cut."""
    clip(path.with_name(".long.mp4"), h264(g="50"), frames=16)
    with av.open(str(path.with_name(".long.mp4"))) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size and packet.pts is not None and packet.dts is not None:
                shift = int(5 / 8 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                target.mux(packet)
    path.with_name(".long.mp4").unlink()


def beside(text: str) -> Callable[[Path], None]:
    """A script that names the video `real.mp4` beside it; whoever follows it gets a video."""

    def make(path: Path) -> None:
        path.with_name(".real.mp4").exists() or clip(path.with_name(".real.mp4"))
        path.write_text(text.format(".real.mp4"))

    return make


MONSTERS = {
    "zero length.mp4": Monster(Path.touch, "empty file"),
    "zero frames.mp4": Monster(no_frames, "no video stream"),
    "sound.mp4": Monster(sound, "no video stream"),
    "sound with a cover.mp4": Monster(lambda path: sound(path, cover=True), "no video stream"),
    "one frame.mp4": Monster(lambda path: clip(path, frames=1), "has 1 frames"),
    "text.mp4": Monster(lambda path: path.write_text("no video\n" * 99), "Invalid data"),
    "zip.mp4": Monster(zipped, "Invalid data"),
    "image.mp4": Monster(lambda path: Image.new("RGB", (48, 32)).save(path, format="PNG"), "format that is not read"),
    "gif.mp4": Monster(disposed_as := lambda path: (disposed(path.with_suffix(".gif")), path.with_suffix(".gif").rename(path)),
                       "format that is not read"),
    "unfinished.mp4": Monster(unfinished, "not finished"),
    "folder.mp4": Monster(Path.mkdir, "folder"),
    "loop.mp4": Monster(lambda path: path.symlink_to(path), "symbolic links"),
    "gone.mp4": Monster(lambda path: path.symlink_to("nowhere.mp4"), "No such file"),
    "pipe.mp4": Monster(os.mkfifo, "not a regular file"),
    "socket.mp4": Monster(listening, "not a regular file"),
    "device.mp4": Monster(lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "huge picture.avi": Monster(huge_picture, "Invalid data"),
    "huge header.avi": Monster(huge_header, "16000 x 12000"),
    "bomb": Monster(bomb, "decompression bomb"),
    "holes": Monster(lambda path: images(path, [0, 1, 2, 3, 5, 6, 7, 8]), "lacks frames after number 3"),
    "sizes": Monster(lambda path: images(path, [*range(8)], [(48, 32), (24, 16)] * 4), "changes its frame size", late=True),
    "size changes.mkv": Monster(two_sizes, "changes its frame size", late=True),
    "playlist.mp4": Monster(beside(PLAYLIST), "Invalid data|not read"),
    "playlist of URLs.mp4": Monster(lambda path: path.write_text(PLAYLIST.format("http://127.0.0.1:9/a.ts")), "Inv|not read"),
    "list.mp4": Monster(beside("ffconcat version 1.0\nfile '{}'\n"), "Invalid data|not read"),
    "manifest.mp4": Monster(beside('<?xml version="1.0"?><MPD type="static"><Period><AdaptationSet><Representation>'
                                   "<BaseURL>{}</BaseURL></Representation></AdaptationSet></Period></MPD>"), "Invalid|not read"),
    "session.mp4": Monster(lambda path: path.write_text("v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
                                                        "m=video 9 RTP/AVP 96\na=rtpmap:96 H264/90000\n"), "Invalid|not read"),
    "uneven times.mkv": Monster(lambda path: clip(path, stamps=[0, 1, 2, 9, 10, 30, 31, 40])),
    "times out of order.mkv": Monster(out_of_order),
    "turned.mp4": Monster(turned),
    "odd.mp4": Monster(lambda path: clip(path, Kind("", "libx264", "yuv444p"), height=33, width=47)),
    "one pixel.mkv": Monster(lambda path: clip(path, Kind("", "ffv1", "bgr0"), height=1, width=1)),
    "mkv.mp4": Monster(lambda path: clip(path.with_suffix(".mkv")).rename(path)),
    "interlaced.mp4": Monster(lambda path: clip(path, h264(**{"x264-params": "tff=1"}))),
    "alpha.mov": Monster(lambda path: clip(path, Kind("", "qtrle", "argb"))),
    "ten bits.mp4": Monster(lambda path: clip(path, Kind("", "libx265", "yuv420p10le", {"x265-params": "log-level=none"}),
                                              height=64, width=64)),
    "trimmed.mp4": Monster(trimmed),
    "live.webm": Monster(lambda path: clip(path, Kind("", "libvpx", options={"cpu-used": "8"}, container={"live": "1"}))),
    "disposed.gif": Monster(disposed),
    "every second": Monster(lambda path: images(path, [*range(0, 16, 2)])),
    "with alpha": Monster(lambda path: images(path, [*range(8)], mode="RGBA")),
    "back\\slash\n\x1b[2J.mp4": Monster(clip),
    "no utf-8 \udcff.mp4": Monster(clip),
    "x" * 240 + ".mp4": Monster(clip),
}  # fmt: skip
