"""Videos that were damaged anywhere: never a crash, a hang or a clip that lacks a frame, and one line that says why."""

import random
from pathlib import Path
from typing import Any

import av
import fault_videos
import numpy as np
import pytest
import torch
from fault_videos import FRAMES, HARMS, KINDS

from stgen import video
from stgen.members import Member

UNSEEN = 500  # of so many damaged files one may agree with itself: a frame marked as hidden, a picture the decoder shows again
READS = [(0, None), (0, 8), (10, 8), (FRAMES - 8, 8)]  # the last from a place that is sought


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Path]:
    folder, frames = tmp_path_factory.mktemp("whole"), fault_videos.pictures()
    return {kind.file: fault_videos.write(folder / kind.file, kind, frames) for kind in KINDS}


@pytest.fixture(scope="module")
def order(whole) -> dict[str, list[str]]:
    """The marks of the frames of each undamaged video; no two of them are alike."""
    told = fault_videos.tell(list(whole.values()), READS)
    for name, marks in zip(whole, told, strict=True):
        assert len(set(marks[0])) == FRAMES, f"{name}: {marks}"
        assert marks[1:] == [marks[0][start : start + 8] for start, _ in READS[1:]], name
    return {name: marks[0] for name, marks in zip(whole, told, strict=True)}


def harmed(whole: dict[str, Path], folder: Path, count: int, seed: int) -> list[tuple[str, str, Path]]:
    """(video, harm, path) of `count` damaged videos: every harm to every video in turn."""
    cases = [(name, harm) for harm in HARMS for name in whole]
    made = []
    for number in range(count):
        name, harm = cases[number % len(cases)]
        chance = random.Random(f"{seed} {number}")
        path = folder / f"{number}{Path(name).suffix}"
        path.write_bytes(HARMS[harm](chance, bytearray(whole[name].read_bytes())))
        made.append((name, harm, path))
    return made


def fault_of(told: list[list[str] | str] | str, order: list[str]) -> str | None:
    """What is wrong with what is told of a damaged video; None if nothing is."""
    if isinstance(told, str):
        return told
    for (start, count), marks in zip(READS, told, strict=True):
        if isinstance(marks, str):
            if not 5 < len(marks) < 300 or "\n" in marks:
                return f"a reason that is none: {marks!r}"
            continue
        if len(marks) != (count or len(order)):
            return f"{len(marks)} frames from {start} on, not {count or len(order)}"
        places = [
            order.index(mark) if mark in order else None for mark in marks
        ]  # None: damaged, which no one can tell
        moved = [(start + i, place) for i, place in enumerate(places) if place not in (None, start + i)]
        if moved:
            return f"frame {moved[0][0]} is frame {moved[0][1]}"
    return None


@pytest.mark.parametrize(("count", "seed"), [(450, 0), pytest.param(4500, 1, marks=pytest.mark.slow)])
def test_damaged_videos_are_whole_or_refused(whole, order, tmp_path, count, seed, figure):
    cases = harmed(whole, tmp_path, count, seed)
    told = fault_videos.tell([path for _, _, path in cases], READS)
    faults = [
        f"{path.name} ({name}, {harm}): {fault}"
        for (name, harm, path), words in zip(cases, told, strict=True)
        if (fault := fault_of(words, order[name]))
    ]
    ended = [words for words in told if isinstance(words, str)]
    assert not ended and len(faults) <= max(1, count // UNSEEN), f"{len(faults)} of {count}: {faults[:20]}"
    refused = sum(isinstance(words[0], str) for words in told)
    assert refused > count / 2  # or the harm is none
    figure("damaged videos refused with a reason: no crash, no hang, no short or shifted clip", refused)
    figure("damaged videos read: every frame there and in its place", count - refused - len(faults))
    figure("damaged videos of which a frame is missing or repeated, and nothing in the file tells", len(faults))


# -------------------------------------------------------------------------------------------- what says a file is whole

SHAPES = {  # name: (format, options, codec): ways in which good files are laid out
    "sound between.mp4": ("mp4", {}, "libx264"),
    "sound between.mkv": ("matroska", {}, "libx264"),
    "sound between.avi": ("avi", {}, "mpeg4"),
    "sound between.mov": ("mov", {"movflags": "+faststart+rtphint"}, "libx264"),
    "a fragment a frame.mp4": ("mp4", {"movflags": "frag_every_frame+empty_moov+default_base_moof"}, "libx264"),
    "fragments with an index.mp4": ("mp4", {"movflags": "frag_keyframe+dash+global_sidx"}, "libx264"),
    "for a player that streams.mp4": ("ismv", {"movflags": "frag_keyframe"}, "libx264"),
    "of unknown length.mkv": ("matroska", {"live": "1"}, "libx264"),
    "of unknown length.webm": ("webm", {"live": "1"}, "libvpx-vp9"),
    "short clusters.mkv": ("matroska", {"cluster_time_limit": "100", "write_crc32": "1"}, "libx264"),
    "index first.mkv": ("matroska", {"cues_to_front": "1", "reserve_index_space": "4000"}, "libx264"),
}


def laid_out(path: Path, form: str, options: dict[str, str], codec: str) -> Path:
    """24 frames, and sound of an odd number of bytes between them."""
    with av.open(str(path), "w", format=form, container_options=options) as container:
        container.metadata["title"] = "a title of odd length"
        stream: Any = container.add_stream(codec, rate=24, options={"g": "8"})
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        sound: Any = container.add_stream("libopus" if form == "webm" else "aac", rate=48_000)
        for number, image in enumerate(fault_videos.pictures(24)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
            frame.pts = number
            container.mux(stream.encode(frame))
            noise = np.random.default_rng(number).normal(0, 0.1, (1, 2000)).astype(np.float32)
            if form == "webm":
                noise = (noise * 20_000).astype(np.int16)
            part = av.AudioFrame.from_ndarray(noise, format="s16" if form == "webm" else "fltp", layout="mono")
            part.sample_rate, part.pts = 48_000, 2000 * number
            container.mux(sound.encode(part))
        container.mux(stream.encode())
        container.mux(sound.encode())
    return path


@pytest.mark.parametrize("name", SHAPES)
def test_whole_files_of_every_layout_are_read_and_cut_ones_refused(tmp_path, name):
    path = laid_out(tmp_path / name, *SHAPES[name])
    assert len(video.read(path).frames) == 24
    data = path.read_bytes()
    for share in (0.5, 0.9):
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(video.VideoError):
            video.read(path)


def test_videos_in_a_tar_are_checked_too(whole, tmp_path):
    data = whole["vp9.webm"].read_bytes()
    (tmp_path / "a.tar").write_bytes(b"x" * 100 + data + b"y" * 100)
    member = Member(tmp_path / "a.tar", "a.webm", 100, len(data))
    assert len(video.read(member).frames) == FRAMES
    with pytest.raises(video.VideoError, match="cut short"):
        video.probe(Member(tmp_path / "a.tar", "a.webm", 100, len(data) - 50))


def test_a_frame_that_cannot_be_decoded_keeps_its_number(whole, tmp_path):
    """A clip of frames before it is read, one with it is refused."""
    path = tmp_path / "a.webm"
    with av.open(str(whole["vp8.webm"])) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(p for p in source.demux(video=0) if p.size):
            data = bytes(packet)
            copy = av.Packet(data[:1] if number == 5 else data)
            copy.pts, copy.dts, copy.time_base, copy.stream = packet.pts, packet.dts, packet.time_base, stream
            copy.is_keyframe = packet.is_keyframe
            target.mux(copy)
    good = video.read(whole["vp8.webm"]).frames
    assert torch.equal(video.read(path, 0, 5).frames, good[:5])
    with pytest.raises(video.VideoError):
        video.read(path, 3, 5)
