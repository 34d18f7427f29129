"""A folder becomes clips: what is found, what is refused and why, and an order that only the seed decides."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from stgen import dataset, video
from stgen.dataset import DataError, Reject, StepSampler, VideoFolder, captions, loader, split, write_rejects

SIZE = {"num_frames": 4, "height": 16, "width": 24, "progress": False}


def make(path: Path, frames: int = 12, size: tuple[int, int] = (20, 30), hue: int = 0, fps: float = 8.0) -> Path:
    """A clip whose pixels tell the frame number (red: 8 a frame), the place (green) and the file (blue: `hue`)."""
    pixels = torch.zeros(frames, 3, *size, dtype=torch.uint8)
    pixels[:, 0] = 8 * torch.arange(frames, dtype=torch.uint8).view(-1, 1, 1)
    pixels[:, 1] = 5 * torch.arange(size[1], dtype=torch.uint8)
    pixels[:, 2] = hue
    path.parent.mkdir(parents=True, exist_ok=True)
    video.write(path, video.Clip(pixels, fps))
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """Eleven videos of different kinds, with captions of every kind."""
    root = tmp_path / "videos"
    for number, name in enumerate(["a.mp4", "b.mkv", "c.webm", "d.gif", "sub/é 猫.mp4", "sub/deep/f.mkv", "odd.mkv"]):
        make(root / name, hue=10 * number, size=(21, 31) if name == "odd.mkv" else (20, 30))
    for number in range(3):
        make(root / "more" / f"{number}.mkv", hue=100 + 10 * number)
    make(root / "frames", hue=150)
    (root / "a.txt").write_text("\ufeffa sidecar\n", encoding="utf-8")
    (root / "frames.txt").write_text("numbered images")
    (root / "metadata.csv").write_text(
        '\ufefffile_name,text\nb.mkv,"one, two"\nsub/é 猫.mp4,ein Kater\n', encoding="utf-8"
    )
    (root / "sub" / "metadata.jsonl").write_text('{"video": "deep/f.mkv", "prompt": "nested", "other": 1}\n\n')
    return root


def reject(root: Path) -> dict[str, str]:
    return dict(VideoFolder(root, **SIZE, max_reject_fraction=1).rejects)


# --- finding


def test_videos_and_captions_are_found(folder):
    found = VideoFolder(folder, **SIZE)
    names = [found.name(i) for i in range(len(found))]
    assert names == sorted(names) and len(names) == 11 and not found.rejects
    captioned = {found.name(i): s.caption for i, s in enumerate(found.samples) if s.caption}
    assert captioned == {
        "a.mp4": "a sidecar",
        "b.mkv": "one, two",
        "frames": "numbered images",
        "sub/é 猫.mp4": "ein Kater",
        "sub/deep/f.mkv": "nested",
    }
    assert found.uncaptioned == 6
    assert captions(folder) == {s.path: s.caption for s in found.samples}


def test_captions_open_no_video(folder, monkeypatch):
    monkeypatch.setattr(video, "probe", lambda path: pytest.fail("probed"))
    assert len(captions(folder)) == 11


def test_hidden_files_and_loops(folder):
    make(folder / ".hidden" / "x.mp4")
    (folder / "a.mp4").rename(folder / ".a.mp4")
    (folder / "sub" / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "self").symlink_to(folder / "self")
    assert len(VideoFolder(folder, **SIZE)) == 10


def test_linked_folders_are_read(folder, tmp_path):
    make(tmp_path / "elsewhere" / "linked.mp4")
    (folder / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert folder / "link" / "linked.mp4" in captions(folder)


def test_unusable_files_are_named(folder):
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("no video at all\n" * 50)
    os.mkfifo(folder / "fifo.mp4")
    (folder / "gone.mp4").symlink_to(folder / "nowhere")
    make(folder / "one.mp4", frames=1)
    make(folder / "folder.mp4" / "inside.mkv")
    cut = make(folder / "cut.mp4", frames=40)
    cut.write_bytes(cut.read_bytes()[:-100])
    reasons = reject(folder)
    assert reasons.keys() == {"empty.mp4", "text.mp4", "fifo.mp4", "gone.mp4", "one.mp4", "cut.mp4"}
    for name, reason in {
        "empty": "empty file",
        "fifo": "regular",
        "gone": "No such",
        "one": "1 frames",
        "cut": "cut",
    }.items():
        assert reason in reasons[f"{name}.mp4"]
    assert folder / "folder.mp4" / "inside.mkv" in captions(folder)


def test_bad_rows_are_refused_by_line(folder):
    make(folder.parent / "outside.mp4")
    rows = [
        "../outside.mp4",
        str(folder / "a.mp4"),
        "http://127.0.0.1:9/x.mp4",
        "gone.mp4",
        "sub/../a.mp4",
        "a.mp4",
        "",
    ]
    (folder / "metadata.csv").write_text("path,caption\n" + "".join(f"{row},words\n" for row in rows))
    (folder / "sub" / "metadata.jsonl").write_text(
        'not json\n[1]\n{"video": "é 猫.mp4"}\n{"video": "é 猫.mp4", "text": 5}\n'
    )
    found = VideoFolder(folder, **SIZE, max_reject_fraction=1)
    reasons = dict(found.rejects)
    expected = ["leaves the folder", "absolute", "URL", "no such video", None, "already", "not a file name"]
    for line, reason in enumerate(expected, 2):
        if reason:
            assert reason in reasons.pop(f"metadata.csv:{line}")
    assert set(reasons) == {f"sub/metadata.jsonl:{line}" for line in (1, 2, 3, 4)}
    assert next(s.caption for s in found.samples if s.path == folder / "a.mp4") == "words"


def test_a_row_may_write_separators_and_accents_as_another_system_does(tmp_path):
    for name in ("a.mp4", "caf\u00e9.mp4", "nin\u0303o.mp4"):
        make(tmp_path / "clips" / name)
    rows = [{"video": name, "text": "x"} for name in ("clips\\a.mp4", "clips/cafe\u0301.mp4", "clips\\ni\u00f1o.mp4")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"video": "..\\x.mp4", "text": "x"}])))
    found = VideoFolder(tmp_path, **SIZE, max_reject_fraction=1)
    assert [sample.caption for sample in found.samples] == ["x"] * 3
    assert [path for path, _ in found.rejects] == ["metadata.jsonl:4"]


def test_numbered_images_that_metadata_names_are_images(tmp_path):
    make(tmp_path / "images")
    make(tmp_path / "frames")
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    rows = [json.dumps({"file_name": f"images/{name}", "text": name}) for name in names[:-1]]
    (tmp_path / "metadata.jsonl").write_text("\n".join([*rows, '{"video": "frames", "text": "a clip"}']))
    assert list(captions(tmp_path).values()) == ["a clip"]
    found = VideoFolder(tmp_path, **SIZE | {"num_frames": 1})
    assert [sample.caption for sample in found.samples] == ["a clip", *names[:-1], ""] and not found.rejects


def test_frames_of_clips_with_numbers_in_their_names(tmp_path):
    for folder, prefixes in (
        ("one", ["clip1_"]),
        ("rate", ["1080p_"]),
        ("shot", ["shot2-"]),
        ("mixed", ["cat1_", "cat2_"]),
    ):
        make(tmp_path / folder)
        for number, file in enumerate(sorted((tmp_path / folder).iterdir())):
            file.rename(file.with_name(f"{prefixes[number % len(prefixes)]}{number:04d}.png"))
    found = VideoFolder(tmp_path, **SIZE)
    assert [found.name(i) for i in range(len(found))] == ["one", "rate", "shot"]
    assert found.samples[0].info.frames == 12


def test_videos_of_formats_that_are_not_read_are_named(tmp_path):
    make(tmp_path / "a.mkv")
    for name in ("b.wmv", "c.TS", "d.3gp"):
        (tmp_path / name).write_bytes(b"x")
    reasons = reject(tmp_path)
    assert reasons.keys() == {"b.wmv", "c.TS", "d.3gp"}
    assert reasons["c.TS"].startswith("is of a format that is not read; convert it to one of .mp4")


def test_a_field_too_long_for_csv_is_not_taken_for_bad_text(tmp_path):
    make(tmp_path / "a.mkv")
    (tmp_path / "metadata.csv").write_text("video,text\na.mkv," + "x" * 200_000 + "\n")
    with pytest.raises(DataError, match=r"field larger than field limit.*; mend it, or write metadata.jsonl instead"):
        captions(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.csv", b"file_name,path,text\na.mp4,a.mp4,x\n", "file_name and path mean the same"),
        ("metadata.jsonl", b'{"file_name": "a.mp4", "text": "x", "prompt": "y"}', "text and prompt mean the same"),
        ("metadata.csv", b"name,text\na.mp4,x\n", "no column is called file_name or video or path"),
        ("metadata.csv", b"file_name,text\na.mp4,caf\xe9\n", "UTF-8"),
    ],
)
def test_metadata_that_cannot_be_understood_stops(folder, name, text, message):
    (folder / name).write_bytes(text)
    with pytest.raises(DataError, match=message):
        captions(folder)


def test_useless_folders_stop_with_a_sentence(tmp_path, folder):
    with pytest.raises(DataError, match="there is no folder"):
        VideoFolder(tmp_path / "nowhere", **SIZE)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"no usable video \(none of"):
        VideoFolder(tmp_path / "none", **SIZE)
    with pytest.raises(DataError, match=r"11 were found and refused.*12 frames"):
        VideoFolder(folder, **SIZE | {"num_frames": 99})
    for number in range(4):
        (folder / f"bad{number}.mp4").touch()
    assert len(VideoFolder(folder, **SIZE, max_reject_fraction=4 / 15)) == 11
    with pytest.raises(DataError, match=r"4 of 15 .*max_reject_fraction above 0.25"):
        VideoFolder(folder, **SIZE, max_reject_fraction=0.25)


def test_fps_decides_what_is_too_short(tmp_path):
    make(tmp_path / "a.mkv", frames=12, fps=24.0)
    assert len(VideoFolder(tmp_path, **SIZE, fps=8)) == 1  # frames 0 3 6 9
    with pytest.raises(DataError, match="a clip needs 13"):
        VideoFolder(tmp_path, **SIZE, fps=6)  # frames 0 4 8 12


# --- clips


def test_a_clip_is_what_was_asked(tmp_path):
    make(tmp_path / "a.mkv", frames=12, size=(32, 48), hue=77, fps=24.0)
    item = VideoFolder(tmp_path, **SIZE, fps=12, clip="start")[0, 0]
    assert item["frames"].shape == (3, 4, 16, 24) and item["frames"].dtype == torch.uint8
    assert item["frames"][0, :, 0, 0].tolist() == [0, 16, 32, 48]  # every second frame
    assert (item["frames"][2] == 77).all()
    assert (item["caption"], item["path"], item["rejects"]) == ("", "a.mkv", [])


def test_frames_are_scaled_to_cover_and_cut_in_the_centre():
    columns = torch.arange(60, dtype=torch.uint8).expand(2, 3, 20, 60)
    assert torch.equal(dataset.fit(columns, 20, 20), columns[..., 20:40])
    half = dataset.fit(columns, 10, 10).float()
    assert half.shape == (2, 3, 10, 10) and half.mean() == pytest.approx(29.5, abs=0.6)
    assert dataset.fit(columns, 61, 7).shape == (2, 3, 61, 7)


def test_random_spans_and_cuts_reach_both_ends(tmp_path):
    make(tmp_path / "a.mkv", frames=7, size=(16, 28))
    found = VideoFolder(tmp_path, **SIZE, crop="random")
    corners = [found[0, epoch]["frames"][:, 0, 0, 0] for epoch in range(60)]
    assert {int(c[0]) // 8 for c in corners} == {0, 1, 2, 3}  # 7 - 4 free frames
    assert {int(c[1]) // 5 for c in corners} == {0, 1, 2, 3, 4}  # 28 - 24 free columns
    assert {int(VideoFolder(tmp_path, **SIZE, clip="start")[0, e]["frames"][0, 0, 0, 0]) for e in range(9)} == {0}


def test_clips_depend_on_seed_index_and_epoch_alone(folder):
    first, second = VideoFolder(folder, **SIZE, crop="random"), VideoFolder(folder, **SIZE, crop="random")
    keys = [(index, epoch) for epoch in range(2) for index in range(11)]
    clips = {key: first[key]["frames"] for key in keys}
    assert all(torch.equal(second[key]["frames"], clips[key]) for key in reversed(keys))
    other = VideoFolder(folder, **SIZE, crop="random", seed=1)
    assert any(not torch.equal(other[key]["frames"], clips[key]) for key in keys)


def test_broken_videos_are_replaced(folder):
    found = VideoFolder(folder, **SIZE).within(range(6))
    for index in (0, 1):
        found.samples[index].path.write_bytes(b"broken since")
    found.samples[2].path.unlink()
    for index in range(3):
        items = [found[index, epoch] for epoch in range(8)]
        for item in items:
            assert item["path"] in {found.name(i) for i in (3, 4, 5)}  # of those it was told to stay within
            assert item["rejects"][0].path == found.name(index)
        assert len({item["path"] for item in items}) > 1
        assert [found[index, epoch]["path"] for epoch in range(8)] == [item["path"] for item in items]
    (folder / "frames").rename(folder / "moved")
    for name in ("d.gif", "more/0.mkv"):
        (folder / name).write_bytes(b"broken since")
    with pytest.raises(RuntimeError, match="none of 6 videos can be read any more"):
        found[0, 0]


def test_replacement_gives_up_after_twenty(tmp_path):
    for number in range(30):
        make(tmp_path / f"{number}.mkv", frames=4)
    found = VideoFolder(tmp_path, **SIZE)
    for sample in found.samples:
        sample.path.write_bytes(b"")
    with pytest.raises(RuntimeError, match="none of 21 videos"):
        found[0, 0]


# --- order


def test_split_is_a_partition():
    train, held = split(100, 7, 0)
    assert len(held) == 7 and sorted(train + held) == list(range(100))
    assert split(100, 7, 0) == (train, held) != split(100, 7, 1)
    assert [len(split(count, 64, 0)[1]) for count in (5, 10, 99, 1000)] == [0, 1, 9, 64]


@pytest.mark.parametrize(("clips", "batch"), [(10, 3), (10, 10), (3, 8), (1, 4)])
def test_batches_cover_every_epoch(clips, batch):
    sampler = StepSampler(range(100, 100 + clips), batch, seed=0)
    keys = [key for step in range(clips * 3) for key in sampler.samples(step)]
    for epoch in range(3 * batch):
        part = keys[epoch * clips : (epoch + 1) * clips]
        assert {e for _, e in part} == {epoch} and sorted(i for i, _ in part) == list(range(100, 100 + clips))
    if clips > 3:
        assert keys[:clips] != [(i, 0) for i, _ in keys[clips : 2 * clips]]


def test_order_is_resumed_at_any_step():
    steps = iter(StepSampler(range(7), 4, seed=3))
    whole = [next(steps) for _ in range(20)]
    for start in (1, 6, 13):
        resumed = iter(StepSampler(range(7), 4, seed=3, start_step=start))
        assert [next(resumed) for _ in range(20 - start)] == whole[start:]
    assert next(iter(StepSampler(range(7), 4, seed=4))) != whole[0]


# --- the loader


def batches(folder: Path, workers: int, start: int, steps: int) -> list[dict]:
    found = VideoFolder(folder, **SIZE, crop="random")
    stream = iter(loader(found, StepSampler(range(11), 4, 0, start), workers, 60))
    return [next(stream) for _ in range(steps)]


def test_workers_change_nothing(folder):
    alone = batches(folder, 0, 0, 6)
    assert alone[0]["frames"].shape == (4, 3, 4, 16, 24)
    for start, others in ((0, batches(folder, 2, 0, 6)), (4, batches(folder, 0, 4, 2))):
        for one, other in zip(alone[start:], others, strict=True):
            assert torch.equal(one["frames"], other["frames"])
            assert one["path"] == other["path"] and one["caption"] == other["caption"]


class Faulty(VideoFolder):
    """A dataset whose workers die, hang or raise something that cannot be pickled."""

    fault = ""

    def _frames(self, index, generator):
        class Local(Exception):
            pass

        if self.fault == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "hangs":
            time.sleep(3600)
        raise Local("cannot be pickled")


@pytest.mark.parametrize(
    ("fault", "message"), [("dies", "exited unexpectedly"), ("hangs", "timed out"), ("raises", "Local")]
)
def test_failing_workers_end_the_run_and_name_the_videos(tmp_path, fault, message):
    for number in range(2):
        make(tmp_path / f"clip{number}.mkv", frames=4)
    next(iter(loader(VideoFolder(tmp_path, **SIZE), StepSampler(range(2), 2, 0), 1, 60)))  # the fork server is up
    found = Faulty(tmp_path, **SIZE)
    found.fault = fault
    began, timeout = time.monotonic(), 5.0
    with pytest.raises(RuntimeError, match=message) as caught:
        next(iter(loader(found, StepSampler(range(2), 2, 0), 1, timeout)))
    assert type(caught.value) is dataset.DataError and "\n" not in str(caught.value)
    assert "clip0.mkv" in str(caught.value) and "clip1.mkv" in str(caught.value)
    assert time.monotonic() - began < timeout + 10


def test_rejects_are_written_once(tmp_path):
    file = tmp_path / "rejects.jsonl"
    write_rejects(file, [Reject("a.mp4", "empty"), Reject("a.mp4", "empty again"), ("é\udcff.mp4", "odd name")])
    write_rejects(file, [("a.mp4", "met again"), ("c.mp4", "late")])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(r["path"], r["reason"]) for r in rows] == [
        ("a.mp4", "empty"),
        ("é\udcff.mp4", "odd name"),
        ("c.mp4", "late"),
    ]
