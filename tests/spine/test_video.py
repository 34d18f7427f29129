"""Videos on disk: what is written comes back, reads start on the exact frame, and broken files say why."""

import os
import pickle
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from stgen import video
from stgen.video import Clip, VideoError, streams, writing


def moving(frames: int = 40, height: int = 32, width: int = 48, fps: float = 24.0) -> Clip:
    """A smooth pattern that moves, so that no two frames are alike."""
    t, y, x = torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij")
    waves = [torch.sin(x / 9 + t / 5), torch.cos(y / 7 - t / 6), torch.sin((x + y) / 11 + t / 4)]
    return Clip(torch.stack([127 + 100 * wave for wave in waves], dim=1).to(torch.uint8), fps)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    error = (a.double() - b.double()).square().mean()
    return float(10 * torch.log10(255**2 / error))


def encode(path, clip: Clip, codec: str, pixels: str = "yuv420p", options=None, stamps=None, rotation=0):
    """Write with av directly what `video.write` does not: other codecs, uneven times, rotated streams."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(clip.fps).limit_denominator(1001), options=options or {})
        stream.height, stream.width, stream.pix_fmt = clip.frames.shape[2], clip.frames.shape[3], pixels
        if rotation:
            stream.set_display_rotation(rotation)
        for number, image in enumerate(clip.frames.permute(0, 2, 3, 1).contiguous().numpy()):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pixels)
            frame.pts = stamps[number] if stamps else number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize("size", [(32, 48), (33, 47), (1, 1)])
@pytest.mark.parametrize(
    ("suffix", "floor"), [(".mp4", 30), (".webm", 30), (".mkv", np.inf), (".gif", 25), ("", np.inf)]
)
def test_written_clips_come_back(tmp_path, suffix, floor, size):
    clip = moving(10, *size)
    video.write(tmp_path / f"clip{suffix}", clip)
    back = video.read(tmp_path / f"clip{suffix}")
    assert back.frames.shape == clip.frames.shape and back.frames.dtype == torch.uint8
    assert psnr(back.frames, clip.frames) >= floor
    if suffix == ".gif":
        assert back.fps == pytest.approx(24, rel=0.05)  # gifs count hundredths of a second
    else:
        assert back.fps == pytest.approx(video.FOLDER_FPS if suffix == "" else 24)
    assert video.probe(tmp_path / f"clip{suffix}") == video.Info(10, back.fps, *size)


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize("colour", [(200, 30, 40), (20, 180, 60), (30, 60, 220), (255, 255, 255), (0, 0, 0)])
def test_flat_colours_come_back(tmp_path, suffix, colour):
    frames = torch.tensor(colour, dtype=torch.uint8).view(1, 3, 1, 1).expand(3, 3, 32, 32)
    video.write(tmp_path / f"flat{suffix}", Clip(frames, 8.0))
    assert (video.read(tmp_path / f"flat{suffix}").frames.int() - frames.int()).abs().max() <= 3


def test_still_gif_keeps_its_frames(tmp_path):
    video.write(tmp_path / "still.gif", Clip(moving(1).frames.expand(7, 3, 32, 48), 10.0))
    back = video.read(tmp_path / "still.gif")
    assert len(back.frames) == 7 and back.fps == pytest.approx(10)


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".mkv", ".gif"])
def test_same_frames_same_bytes(tmp_path, suffix):
    """Many times: x264's uninitialised memory showed in one file of two."""
    for size in [(33, 47), (48, 48)]:
        contents = set()
        for _ in range(12):
            video.write(tmp_path / f"clip{suffix}", moving(12, *size))
            contents.add((tmp_path / f"clip{suffix}").read_bytes())
        assert len(contents) == 1
    assert os.listdir(tmp_path) == [f"clip{suffix}"]  # no draft is left


def test_rates_that_are_not_whole(tmp_path):
    video.write(tmp_path / "clip.mp4", moving(12, fps=30000 / 1001))
    assert video.read(tmp_path / "clip.mp4").fps == pytest.approx(30000 / 1001)


CONTAINERS = {
    "h264.mp4": ("libx264", {"g": "17", "bf": "3"}),
    "open-gop.mp4": ("libx264", {"g": "17", "bf": "3", "x264-params": "open-gop=1"}),
    "h264.mkv": ("libx264", {"g": "17", "bf": "2"}),
    "vp9.webm": ("libvpx-vp9", {"g": "23", "b:v": "0", "crf": "30", "cpu-used": "8"}),
    "vp8.webm": ("libvpx", {"g": "23", "cpu-used": "8"}),
    "mpeg4.avi": ("mpeg4", {"g": "11", "bf": "2"}),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_start_is_exact(tmp_path, name):
    codec, options = CONTAINERS[name]
    encode(tmp_path / name, moving(90), codec, options=options)
    whole = video.read(tmp_path / name).frames
    assert len(whole) == 90
    for start in [0, 1, 16, 17, 33, 34, 35, 50, 51, 52, 67, 68, 69, 80, 88]:
        assert torch.equal(video.read(tmp_path / name, start, 2).frames, whole[start : start + 2]), start


@pytest.mark.parametrize("name", ["h264.mp4", "open-gop.mp4", "h264.mkv", "vp9.webm", "vp8.webm"])
def test_late_reads_seek(tmp_path, monkeypatch, name):
    codec, options = CONTAINERS[name]
    encode(tmp_path / name, moving(90), codec, options=options)
    whole = video.read(tmp_path / name).frames
    decoded = []
    convert = streams.collect
    monkeypatch.setattr(
        streams,
        "collect",
        lambda p, frames, w, c: convert(p, ((decoded.append(n), (n, f))[1] for n, f in frames), w, c),
    )
    assert torch.equal(video.read(tmp_path / name, 80, 3).frames, whole[80:83])
    assert len(decoded) < 40


def test_uneven_times_are_read_by_frame(tmp_path):
    stamps = list(np.cumsum([1] * 30 + [5] * 30 + [2] * 30))
    encode(tmp_path / "vfr.mkv", moving(90), "libx264", options={"g": "10"}, stamps=[int(s) for s in stamps])
    whole = video.read(tmp_path / "vfr.mkv").frames
    assert len(whole) == 90
    for start in (34, 61, 85):
        assert torch.equal(video.read(tmp_path / "vfr.mkv", start, 3).frames, whole[start : start + 3])


def test_hidden_vp8_frames_are_not_counted(tmp_path):
    """Packets whose show bit is cleared are decoded for reference only, as two-pass encoders make them."""
    encode(tmp_path / "plain.webm", moving(90), "libvpx", options={"cpu-used": "8"})
    path = tmp_path / "hidden.webm"
    with av.open(str(tmp_path / "plain.webm")) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(p for p in source.demux(video=0) if p.size):
            data = bytearray(bytes(packet))
            data[0] &= 0xEF if number in (10, 50) else 0xFF
            copy = av.Packet(bytes(data))
            copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
            copy.stream, copy.is_keyframe = stream, packet.is_keyframe
            target.mux(copy)
    whole = video.read(path).frames
    assert video.probe(path).frames == len(whole) == 88
    for start in (9, 40, 48, 70, 86):
        assert torch.equal(video.read(path, start, 2).frames, whole[start : start + 2])


@pytest.mark.parametrize("suffix", [".mkv", ".gif", ""])
def test_steps_round_half_up(tmp_path, suffix):
    video.write(tmp_path / f"clip{suffix}", moving(60))
    whole = video.read(tmp_path / f"clip{suffix}")
    fast = video.read(tmp_path / f"clip{suffix}", 40, 5, step=2.5)
    assert torch.equal(fast.frames, whole.frames[[40, 43, 45, 48, 50]])
    assert fast.fps == pytest.approx(whole.fps / 2.5)
    slow = video.read(tmp_path / f"clip{suffix}", 57, 5, step=0.5)
    assert torch.equal(slow.frames, whole.frames[[57, 58, 58, 59, 59]])
    rest = video.read(tmp_path / f"clip{suffix}", 50, step=3)
    assert torch.equal(rest.frames, whole.frames[[50, 53, 56, 59]])


def test_rotation_is_applied(tmp_path):
    encode(tmp_path / "upright.mp4", moving(4), "libx264")
    encode(tmp_path / "turned.mp4", moving(4), "libx264", rotation=90)
    info, back = video.probe(tmp_path / "turned.mp4"), video.read(tmp_path / "turned.mp4")
    assert (info.height, info.width) == (48, 32) == tuple(back.frames.shape[2:])
    assert torch.equal(back.frames, torch.rot90(video.read(tmp_path / "upright.mp4").frames, 1, (2, 3)))


def test_frame_folders(tmp_path):
    folder, clip = tmp_path / "frames", moving(11)
    folder.mkdir()
    for number, image in enumerate(clip.frames.permute(0, 2, 3, 1).contiguous().numpy()):
        Image.fromarray(image).save(folder / f"frame_{number}.png")  # 10 sorts after 9
    (folder / ".thumbs").write_text("hidden files do not count")
    assert torch.equal(video.read(folder).frames, clip.frames)
    Image.new("RGB", (5, 5)).save(folder / "frame_4.png")
    with pytest.raises(VideoError, match="changes its frame size"):
        video.read(folder)
    (folder / "notes.md").write_text("not an image")
    with pytest.raises(VideoError, match="numbered images only"):
        video.probe(folder)


def test_short_videos_are_errors(tmp_path):
    video.write(tmp_path / "clip.mp4", moving(10))
    for start, frames in [(0, 11), (8, 3), (10, 1), (-1, 2), (0, 0)]:
        with pytest.raises(VideoError, match="has 10 frames"):
            video.read(tmp_path / "clip.mp4", start, frames)


def audio_only(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())


def cut(path):
    video.write(path, moving(60))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BROKEN = {
    "missing": (lambda path: None, "No such file"),
    "empty": (lambda path: path.write_bytes(b""), "empty file"),
    "text": (lambda path: path.write_text("this is no video\n" * 100), "Invalid data"),
    "fifo": (os.mkfifo, "not a regular file"),
    "folder": (lambda path: path.mkdir(), "numbered images only"),
    "loop": (lambda path: path.symlink_to(path), "symbolic links"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "sound": (audio_only, "no video stream"),
    "cut": (cut, "cut short"),
    "playlist": (lambda path: path.write_text("#EXTM3U\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n"), "Invalid data"),
    "gif": (lambda path: Image.new("P", (9, 9)).save(path, format="GIF"), "format that is not read"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_files_say_why(tmp_path, fault):
    make, reason = BROKEN[fault]
    path = tmp_path / "x.mp4"
    make(path)
    for use in (video.probe, video.read):
        with pytest.raises(VideoError, match=reason) as caught:
            use(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    "name", ["http://127.0.0.1:9/x.mp4", "concat:a.mp4|b.mp4", "pipe:0", "data:video/mp4;base64,AA"]
)
def test_only_files_are_opened(name, monkeypatch):
    monkeypatch.setattr(streams.av, "open", lambda *a, **k: pytest.fail("opened"))
    with pytest.raises(VideoError, match="No such file"):
        video.read(name)


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".mkv", ".gif"])
def test_damage_is_never_a_short_clip(tmp_path, suffix):
    """Cut anywhere or overwritten anywhere: all frames asked for, or VideoError."""
    whole, path = tmp_path / f"whole{suffix}", tmp_path / f"damaged{suffix}"
    video.write(whole, moving(40))
    data, random = whole.read_bytes(), np.random.default_rng(0)
    outcomes = []
    for trial in range(30):
        place = int(random.integers(len(data)))
        noise = random.integers(256, size=40, dtype=np.uint8).tobytes()
        path.write_bytes(data[:place] if trial % 2 else data[:place] + noise + data[place + 40 :])
        try:
            outcomes.append(len(video.read(path, 0, 40).frames))
        except VideoError:
            outcomes.append(0)
    assert set(outcomes) <= {0, 40} and 0 in outcomes


def test_errors_survive_pickling():
    """A worker process hands its errors to the trainer pickled; an error that cannot be would hang the run."""
    error = pickle.loads(pickle.dumps(VideoError("a.mp4", "has no frames")))
    assert str(error) == "a.mp4: has no frames" and error.reason == "has no frames"


def test_bad_clips_are_refused(tmp_path):
    for name, clip in {
        "clip.avi": moving(2),
        "float.mp4": Clip(torch.zeros(2, 3, 8, 8), 8.0),
        "axes.mp4": Clip(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), 8.0),
        "none.mp4": Clip(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), 8.0),
    }.items():
        with pytest.raises(VideoError, match=name):
            video.write(tmp_path / name, clip)
    assert os.listdir(tmp_path) == []


def test_failed_writes_leave_nothing(tmp_path, monkeypatch):
    video.write(tmp_path / "clip.mp4", moving(3))
    before = (tmp_path / "clip.mp4").read_bytes()

    def fail(draft, *_):
        draft.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "_write_stream", fail)
    with pytest.raises(VideoError, match="No space left"):
        video.write(tmp_path / "clip.mp4", moving(9))
    assert (tmp_path / "clip.mp4").read_bytes() == before and os.listdir(tmp_path) == ["clip.mp4"]


def test_contact_sheet(tmp_path):
    clips = [moving(20, 16, 24), moving(3, 16, 24)]
    video.contact_sheet(tmp_path / "sheet.png", clips, ["short", "a long caption " * 50])
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    first = clips[0].frames[0].permute(1, 2, 0).numpy().repeat(6, 0).repeat(6, 1)  # 16 x 24 -> 96 x 144
    last = clips[0].frames[-1].permute(1, 2, 0).numpy().repeat(6, 0).repeat(6, 1)
    assert (sheet[45:141, 20:164] == first).all()
    assert (sheet[45:141, -164:-20] == last).all()
    assert (sheet[:, -20:] == 255).all()  # the long caption stays inside the margin
    with pytest.raises(VideoError, match="captions"):
        video.contact_sheet(tmp_path / "sheet.png", clips, ["one"])
