"""Clips from elsewhere than whole files of a folder: spans and weights of metadata, tars, Hugging Face datasets."""

import io
import json
import shutil
import sys
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from stgen import buckets, codec, config, hub, schema, shapes, source, tars, video
from stgen.data_spec import HuggingFace
from stgen.dataset import DataError, StepSampler, VideoFolder, captions, loader
from stgen.members import Member
from stgen.train import TrainingError, train

SIZE = {"num_frames": 4, "height": 16, "width": 16, "progress": False}


def make(path: Path, frames: int = 12, hue: int = 0, fps: float = 8.0) -> Path:
    """A clip whose pixels tell the frame number (red: 8 a frame) and the file (blue: `hue`)."""
    pixels = torch.zeros(frames, 3, 16, 16, dtype=torch.uint8)
    pixels[:, 0] = 8 * torch.arange(frames, dtype=torch.uint8).view(-1, 1, 1)
    pixels[:, 2] = hue
    path.parent.mkdir(parents=True, exist_ok=True)
    video.write(path, video.Clip(pixels, fps))
    return path


@pytest.fixture
def tiny(tmp_path):
    """A function that makes the config of a tiny run from overrides."""

    def make(*overrides: str, run: str = "run") -> schema.Config:
        path = tmp_path / "tiny.yaml"
        path.write_text("{}\n")
        base = [
            "data.num_frames=4", "data.height=16", "data.width=16", "data.dataloader_num_workers=0", "codec.kind=pixels",
            "tokens.patch_size=[1,8,8]", "text.width=16", "model.width=16", "model.depth=1", "model.plan=joint",
            "validation.steps=null", "validation.num_inference_steps=1", "log.every=1", "log.wandb=disabled",
            "checkpoint.total_limit=99", "checkpoint.steps=2", "train.max_train_steps=4", "train.train_batch_size=2",
            f"run.output_dir={tmp_path / run}",
        ]  # fmt: skip
        return config.load(path, [*base, *overrides], schema.Config)

    return make


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{f.stem}/{k}": v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def assert_resumes_exactly(make_cfg, tmp_path: Path) -> None:
    """A run of four steps equals one that was killed after the second and goes on."""
    train(make_cfg(run="whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-4")
    train(make_cfg("run.resume_from_checkpoint=latest", run="cut"))
    left, right = (tensors_of(tmp_path / run / "checkpoint-4") for run in ("whole", "cut"))
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# --- columns of metadata


def test_spans_of_a_video_are_clips_of_their_own(tmp_path):
    make(tmp_path / "a.mkv", frames=30)
    make(tmp_path / "b.mkv", hue=99)
    (tmp_path / "metadata.csv").write_text(
        "file_name,text,start,end\na.mkv,first,0,1\na.mkv,second,8f,20f\na.mkv,last,0:00:02.5,\nb.mkv,whole,,\n"
    )
    found = VideoFolder(tmp_path, **SIZE)
    spans = [(found.name(i), sample.caption, sample.first, sample.last) for i, sample in enumerate(found.samples)]
    assert spans == [
        ("a.mkv@0s-1s", "first", 0, 8),
        ("a.mkv@8f-20f", "second", 8, 20),
        ("a.mkv@2.5s-end", "last", 20, 30),
        ("b.mkv", "whole", 0, 12),
    ]
    for index, sample in enumerate(found.samples):
        firsts = {int(found[index, epoch]["frames"][0, 0, 0, 0]) // 8 for epoch in range(60)}
        assert firsts == set(range(sample.first, sample.last - 3))
    assert list(captions(tmp_path).values()) == ["first", "second", "last", "whole"]


def test_a_span_too_short_for_a_clip_is_a_reject(tmp_path):
    make(tmp_path / "a.mkv", frames=30)
    (tmp_path / "metadata.jsonl").write_text(
        '{"video": "a.mkv", "text": "x", "start": 0.5, "end": 0.8}\n{"video": "a.mkv", "text": "y", "start": 99}\n'
        '{"video": "a.mkv", "text": "z", "end": 1}\n'
    )
    found = VideoFolder(tmp_path, **SIZE, max_reject_fraction=1)
    assert [found.name(i) for i in range(len(found))] == ["a.mkv@0s-1s"]
    reasons = dict(found.rejects)
    assert "has 30 frames at 8 fps, 3 of them between start and end; a clip needs 4" in reasons["a.mkv@0.5s-0.8s"]
    assert "0 of them between" in reasons["a.mkv@99s-end"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('"weight": -1', r"metadata.jsonl:1: weight -1 is not a number from 0"),
        ('"weight": "much"', r"metadata.jsonl:1: weight 'much'"),
        ('"weight": NaN', r"metadata.jsonl:1: weight nan"),
        ('"start": "soon"', r"metadata.jsonl:1: start 'soon' is no time; write seconds"),
        ('"start": -2', r"metadata.jsonl:1: start -2 is no time"),
        ('"start": 2, "end": 1', r"metadata.jsonl:1: end 1s is not after start 2s"),
        ('"split": "test"', r"metadata.jsonl:1: split 'test' is none of train, held_out"),
        ('"split": ["train"]', r"metadata.jsonl:1: split \['train'\] is none of"),
        ('"start": [1]', r"metadata.jsonl:1: start \[1\] is no time"),
    ],
)
def test_values_that_cannot_be_meant_stop_with_their_line(tmp_path, row, message):
    make(tmp_path / "a.mkv")
    (tmp_path / "metadata.jsonl").write_text(f'{{"video": "a.mkv", "text": "x", {row}}}\n')
    with pytest.raises(DataError, match=message):
        VideoFolder(tmp_path, **SIZE)


def test_weights_say_how_often_a_clip_is_read(tmp_path, tiny):
    rows = ["file_name,text,weight"]
    for name, weight in (("a", "2"), ("b", ""), ("c", "0.5"), ("d", "0")):
        make(tmp_path / "clips" / f"{name}.mkv")
        rows.append(f"{name}.mkv,{name},{weight}")
    (tmp_path / "clips" / "metadata.csv").write_text("\n".join(rows))
    found = VideoFolder(tmp_path / "clips", **SIZE)
    assert dict(found.rejects) == {"d.mkv": "has weight 0 in metadata"} and len(found) == 3
    cfg = tiny()
    order = buckets.sampler(cfg, found, range(3), buckets.plan(cfg, codec.Pixels()))
    read = Counter(i for step in range(70) for i, _ in order.samples(step))
    assert [read[i] for i in range(3)] == [80, 40, 20]


def test_the_column_split_decides_what_is_held_out(tmp_path):
    lines = []
    for i in range(6):
        make(tmp_path / f"{i}.mkv")
        split = {1: ', "split": "held_out"', 4: ', "split": "held_out"', 5: ', "split": "train"'}.get(i, "")
        lines.append(f'{{"video": "{i}.mkv", "text": "x"{split}}}')
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert VideoFolder(tmp_path, **SIZE).split(64) == ((0, 2, 3, 5), (1, 4))
    (tmp_path / "metadata.jsonl").write_text("\n".join(line.replace("}", "") + "}" for line in lines[1:2]))
    for name in ("0", "2", "3", "4", "5"):
        (tmp_path / f"{name}.mkv").unlink()
    with pytest.raises(DataError, match="holds every usable clip out"):
        VideoFolder(tmp_path, **SIZE).split(64)


def test_a_run_does_not_go_on_when_weights_have_changed(tmp_path, tiny):
    for name in ("a", "b", "c"):
        make(tmp_path / "clips" / f"{name}.mkv")
    metadata = tmp_path / "clips" / "metadata.csv"
    metadata.write_text("file_name,text,weight\na.mkv,x,2\n")
    keys = (f"data.train_data_dir={tmp_path / 'clips'}", "data.held_out_clips=0")
    train(tiny(*keys, "train.max_train_steps=2"))
    metadata.write_text("file_name,text,weight\na.mkv,x,3\n")
    with pytest.raises(TrainingError, match="no longer holds the videos"):
        train(tiny(*keys, "run.resume_from_checkpoint=latest"))
    metadata.write_text("file_name,text,weight\na.mkv,x,2\n")
    assert train(tiny(*keys, "run.resume_from_checkpoint=latest"))["steps"] == 4


# --- tars


def pack(tar: Path, files: dict[str, bytes]) -> Path:
    tar.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(tar, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return tar


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Three tars of four clips each, captions as .txt and .json, and an image."""
    root = tmp_path_factory.mktemp("tars")
    for shard in range(3):
        files = {}
        for i in range(4):
            kind = (".mp4", ".mkv", ".gif")[shard]
            path = make(root / "plain" / f"{shard}{i}{kind}", hue=20 * (4 * shard + i))
            files[f"{shard}{i}{kind}"] = path.read_bytes()
            if shard == 1:
                files[f"{shard}{i}.json"] = json.dumps({"caption": f"clip {shard}{i}", "other": 1}).encode()
            else:
                files[f"{shard}{i}.txt"] = f"\ufeffclip {shard}{i}\n".encode()
        if shard == 2:
            picture = io.BytesIO()
            Image.new("RGB", (20, 20), (7, 8, 9)).save(picture, "PNG")
            files |= {"pic.png": picture.getvalue(), "._20.gif": b"finder", "note.cls": b"3"}
        pack(root / "shards" / f"clips-{shard:03d}.tar", files)
    return root / "shards"


def open_tars(where: Path | str, **options) -> VideoFolder:
    root, found = tars.find(str(where))
    return VideoFolder(root, found=found, **SIZE | options)


def test_clips_in_tars_are_those_of_the_files(shards):
    inside, plain = open_tars(shards), VideoFolder(shards.parent / "plain", **SIZE, clip="start")
    assert [inside.name(i) for i in range(4)] == [f"clips-000.tar/0{i}.mp4" for i in range(4)]
    assert [sample.caption for sample in inside.samples] == [f"clip {i}{j}" for i in range(3) for j in range(4)]
    assert not inside.rejects and len(inside) == 12
    start = open_tars(shards, clip="start")
    for i in range(12):
        assert torch.equal(start[i, 0]["frames"], plain[i, 0]["frames"])
        assert inside.samples[i].info == plain.samples[i].info
    late = {int(inside[0, epoch]["frames"][0, 0, 0, 0]) for epoch in range(40)}
    assert len(late) == 9  # spans are drawn from all of the clip


def test_tars_are_named_by_folder_file_or_pattern(shards):
    assert len(open_tars(shards / "clips-001.tar")) == 4
    assert len(open_tars(f"{shards}/clips-*[01].tar")) == 8
    one = open_tars(shards, num_frames=1)
    assert len(one) == 13 and one[12, 0]["frames"].flatten(1)[:, 0].tolist() == [7, 8, 9]
    for nothing in ("nowhere", f"{shards}/none-*.tar"):
        with pytest.raises(DataError, match=r"names no \.tar; give a folder, a \.tar or a pattern"):
            tars.find(nothing)


def test_tars_are_named_by_a_range_and_by_odd_paths(shards, tmp_path):
    assert len(open_tars(f"{shards}/clips-{{000..001}}.tar")) == 8
    with pytest.raises(
        DataError, match=r"names 5 tars of which 2 are not there, first .*clips-003.tar; mend the range"
    ):
        tars.find(f"{shards}/clips-{{000..004}}.tar")
    odd = tmp_path / "set[1]" / "a[2].tar"
    odd.parent.mkdir()
    shutil.copy(shards / "clips-000.tar", odd)
    assert len(open_tars(odd)) == len(open_tars(odd.parent / "*.tar")) == 4


def test_suffixes_in_a_tar_are_read_in_capitals_and_unread_ones_named(shards, tmp_path):
    clip = (shards.parent / "plain" / "00.mp4").read_bytes()
    found = open_tars(pack(tmp_path / "a.tar", {"x.MP4": clip, "x.TXT": b"loud", "y.mp4": clip, "y.JSON": b'{"text": "too"}',
                                                "z.wmv": clip}), max_reject_fraction=1)  # fmt: skip
    assert [sample.caption for sample in found.samples] == ["loud", "too"]
    assert "is of a format that is not read; convert it to one of .mp4" in dict(found.rejects)["a.tar/z.wmv"]


def test_tars_that_cannot_be_used_are_named(shards, tmp_path):
    shutil.copy(shards / "clips-000.tar", tmp_path / "good.tar")
    pack(tmp_path / "words.tar", {"a.txt": b"no video"})
    whole = (shards / "clips-000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.tar").write_bytes(b"no tar at all" * 99)
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as archive:
        archive.add(shards / "clips-001.tar", "a.mp4")
    pack(tmp_path / "bad.tar", {"x.mp4": b"no video", "x.txt": b"\xff\xfe\xff", "y.mkv": b""})
    found = open_tars(tmp_path, max_reject_fraction=1)
    reasons = {}
    for path, reason in found.rejects:
        reasons.setdefault(path, []).append(reason)
    assert "holds no video or image" in reasons["words.tar"][0]
    assert "is cut short in" in reasons["cut.tar"][0]
    assert "compressed ones must be unpacked" in reasons["packed.tar"][0]
    assert "compressed ones must be unpacked" in reasons["text.tar"][0]
    assert {"bad.tar/x.mp4", "bad.tar/x.txt", "bad.tar/y.mkv"} <= reasons.keys()
    assert {found.name(i).split("/")[0] for i in range(len(found))} == {"good.tar", "cut.tar"}
    with pytest.raises(DataError, match=r"no usable video \(1 were found and refused, first words.tar: holds no video"):
        open_tars(tmp_path / "words.tar")


def test_names_in_a_tar_lead_nowhere(tmp_path):
    """Nothing is unpacked: a name is a name, and a link in a tar is not followed."""
    secret = make(tmp_path / "private" / "secret.mp4")
    tar = pack(tmp_path / "set" / "a.tar", {"../../private/x.mp4": secret.read_bytes()})
    with tarfile.open(tar, "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo("link.mp4")
            info.type, info.linkname = kind, str(secret)
            archive.addfile(info)
    found = open_tars(tar)
    assert [found.name(i) for i in range(len(found))] == ["a.tar/../../private/x.mp4"]
    assert sorted(p.name for p in tmp_path.rglob("*.mp4")) == ["secret.mp4"]


def test_a_member_reads_as_the_file_that_it_is(tmp_path):
    content = bytes(range(256)) * 5
    (tmp_path / "x").write_bytes(b"before" + content + b"behind")
    member = Member(tmp_path / "x", "a.mp4", 6, len(content))
    assert member.read_bytes() == content and member.stat().st_size == len(content) and member.suffix == ".mp4"
    with member.open() as file:
        assert file.seek(-10, io.SEEK_END) == len(content) - 10 and file.read(99) == content[-10:]
        assert file.seek(300) == 300 and file.read(4) == content[300:304] and file.tell() == 304
        assert file.seek(2, io.SEEK_CUR) == 306 and file.read() == content[306:]


def test_tars_of_the_webdataset_library_are_read(tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="writes the tars; an optional library")
    clip = make(tmp_path / "a.mp4", hue=50).read_bytes()
    with webdataset.TarWriter(str(tmp_path / "w.tar")) as writer:
        for i in range(3):
            writer.write({"__key__": f"part/{i:06d}", "mp4": clip, "txt": f"clip {i}", "json": {"weight": i + 1}})
    found = open_tars(tmp_path / "w.tar")
    assert [found.name(i) for i in range(3)] == [f"w.tar/part/{i:06d}.mp4" for i in range(3)]
    assert [(s.caption, s.weight) for s in found.samples] == [("clip 0", 1), ("clip 1", 2), ("clip 2", 3)]


def test_a_run_on_tars_trains_and_a_resumed_one_equals_it(shards, tmp_path, tiny):
    def make_cfg(*more: str, run: str) -> schema.Config:
        return tiny("data.source=webdataset", f"data.train_data_dir={shards}", "data.held_out_clips=1", *more, run=run)

    assert_resumes_exactly(make_cfg, tmp_path)
    assert sorted(source.known_captions(make_cfg(run="x"))) == sorted(
        f"clip {i}{j}" for i in range(3) for j in range(4)
    )


def test_workers_read_tars_too(shards):
    found = open_tars(shards)
    alone, worked = (next(iter(loader(found, StepSampler(range(12), 12, 0), workers, 60))) for workers in (0, 1))
    assert torch.equal(alone["frames"], worked["frames"]) and alone["caption"] == worked["caption"]


# --- Hugging Face datasets


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """A dataset of twelve rows in two parquet files, videos as bytes."""
    pyarrow = pytest.importorskip("pyarrow", reason="comes with the datasets library")
    pytest.importorskip("datasets", reason="an optional library")
    from pyarrow import parquet

    root = tmp_path_factory.mktemp("rows")
    for part in range(2):
        clips = []
        for i in range(6):
            path = make(root / "files" / f"{part}{i}.mp4", hue=20 * (6 * part + i))
            clips.append({"bytes": path.read_bytes(), "path": path.name})
        table = {"video": clips, "prompt": [f"row {part}{i}" for i in range(6)], "weight": [1.0] * 5 + [2.0]}
        (root / "set").mkdir(exist_ok=True)
        parquet.write_table(pyarrow.table(table), root / "set" / f"train-{part:05d}-of-00002.parquet")
    return root / "set"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    if "datasets" in sys.modules:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf"))


def asked(**keys) -> HuggingFace:
    return HuggingFace.model_validate(keys)


def test_rows_become_a_folder_once(rows, tmp_path):
    folder = hub.fetch(str(rows), asked(clips=8), tmp_path / "kept")
    found = VideoFolder(folder, **SIZE)
    assert [sample.caption for sample in found.samples] == [f"row 0{i}" for i in range(6)] + ["row 10", "row 11"]
    assert [sample.weight for sample in found.samples] == [1, 1, 1, 1, 1, 2, 1, 1]
    assert int(found[7, 0]["frames"][2].float().mean()) == pytest.approx(140, abs=3)
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    hub.fetch(str(rows), asked(clips=8), folder)
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before  # nothing is fetched twice
    with pytest.raises(DataError, match="holds something else than rows of"):
        hub.fetch(str(rows), asked(clips=8, split="test"), folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("x")
    with pytest.raises(DataError, match="holds something else"):
        hub.fetch(str(rows), asked(), tmp_path / "other")


def test_an_interrupted_fetch_goes_on(rows, tmp_path, monkeypatch):
    honest, written = hub._kept, []

    def killed(row, number, *rest):
        if number == 5 and len(written) == 5:
            raise KeyboardInterrupt
        written.append(number)
        return honest(row, number, *rest)

    monkeypatch.setattr(hub, "_kept", killed)
    with pytest.raises(KeyboardInterrupt):
        hub.fetch(str(rows), asked(), tmp_path / "kept")
    with (tmp_path / "kept" / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "00000')  # as a killed process leaves it
    written.append(None)
    folder = hub.fetch(str(rows), asked(), tmp_path / "kept")
    assert written == [0, 1, 2, 3, 4, None, 5, 6, 7, 8, 9, 10, 11]
    assert len(VideoFolder(folder, **SIZE)) == 12 and not VideoFolder(folder, **SIZE).rejects


def test_another_number_of_rows_is_fetched_or_refused(rows, tmp_path):
    kept = tmp_path / "kept"
    hub.fetch(str(rows), asked(clips=3), kept)
    assert len(captions(hub.fetch(str(rows), asked(clips=5), kept))) == 5
    with pytest.raises(DataError, match=r"data.huggingface.clips: 4, but .* holds 5 rows; write 5, or name another"):
        hub.fetch(str(rows), asked(clips=4), kept)
    hub.fetch(str(rows), asked(clips=99), kept)  # there are twelve
    before = (kept / "metadata.jsonl").stat().st_mtime_ns
    assert len(captions(hub.fetch(str(rows), asked(clips=50), kept))) == 12
    assert (kept / "metadata.jsonl").stat().st_mtime_ns == before


def test_two_runs_fetch_into_a_folder_one_after_the_other(rows, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: hub.fetch(str(rows), asked(), tmp_path / "kept"), range(2)))
    names = [json.loads(line)["file_name"] for line in (tmp_path / "kept" / "metadata.jsonl").open()]
    assert len(names) == len(set(names)) == 12


def test_rows_without_a_video_and_rows_that_point_elsewhere(rows, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    clip = make(tmp_path / "inside" / "a.mp4").read_bytes()
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "b.mp4").write_bytes(clip)
    table = {"clip": [clip, None, b"no video"], "caption": ["x", "y", None]}
    parquet.write_table(pyarrow.table(table), tmp_path / "set" / "train.parquet")
    with pytest.raises(DataError, match=r"data.huggingface.video_column: none of video.* name one of clip, caption"):
        hub.fetch(str(tmp_path / "set"), asked(), tmp_path / "kept")
    shutil.rmtree(tmp_path / "kept")
    found = VideoFolder(hub.fetch(str(tmp_path / "set"), asked(video_column="clip"), tmp_path / "kept"), **SIZE,
                        max_reject_fraction=1)  # fmt: skip
    assert len(found) == 1 and {reject.path for reject in found.rejects} == {"0000001.mp4", "0000002.mp4"}
    for path, message in (("b.mp4", None), (str(tmp_path / "inside" / "a.mp4"), "is no file of the dataset")):
        parquet.write_table(pyarrow.table({"video": [path], "text": ["x"]}), tmp_path / "set" / "train.parquet")
        shutil.rmtree(tmp_path / "kept", ignore_errors=True)
        if message is None:
            assert len(VideoFolder(hub.fetch(str(tmp_path / "set"), asked(), tmp_path / "kept"), **SIZE)) == 1
        else:
            with pytest.raises(DataError, match=message):
                hub.fetch(str(tmp_path / "set"), asked(), tmp_path / "kept")


def test_a_dataset_that_is_not_there_and_a_library_that_is_missing(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="an optional library")
    with pytest.raises(DataError, match="cannot be read as a Hugging Face dataset"):
        hub.fetch(str(tmp_path / "nowhere"), asked(), tmp_path / "kept")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs the datasets library; run: pip install 'stgen\[datasets\]'"):
        hub.fetch("anyone/anything", asked(), tmp_path / "kept")


def test_a_run_on_rows_trains_and_a_resumed_one_equals_it(rows, tmp_path, tiny):
    def make_cfg(*more: str, run: str) -> schema.Config:
        kept = f"data.huggingface.folder={tmp_path / 'kept'}"
        return tiny("data.source=huggingface", f"data.train_data_dir={rows}", kept, *more, run=run)

    assert source.known_captions(make_cfg(run="x")) == []  # nothing is fetched to tell what would run
    assert_resumes_exactly(make_cfg, tmp_path)
    assert len(source.known_captions(make_cfg(run="x"))) == 12


@pytest.mark.parametrize("kind", ["webdataset", "huggingface"])
def test_a_source_needs_to_be_named(tiny, kind):
    with pytest.raises(config.ConfigError, match=f"data.train_data_dir: null, but data.source {kind} needs"):
        tiny(f"data.source={kind}")


def test_shapes_are_rendered_as_ever(tiny):
    assert len(source.known_captions(tiny())) == len(shapes.split(8, 0).seen)


def test_a_dry_run_knows_of_images_that_are_clips(tiny, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "a.txt").write_text("a still")
    assert source.known_captions(tiny(f"data.train_data_dir={tmp_path / 'images'}", "data.num_frames=1")) == ["a still"]


def test_a_held_out_clip_that_cannot_be_read_is_named(tmp_path, capsys):
    for name in "abc":
        make(tmp_path / f"{name}.mkv")
    found = VideoFolder(tmp_path, **SIZE)
    (tmp_path / "b.mkv").write_bytes(b"broken since")
    batch = source.Batch.read(found, [0, 1, 2], codec.Pixels(), torch.device("cpu"))
    assert len(batch.files) == 3 and "b.mkv" not in batch.files
    told = "".join(capsys.readouterr())
    assert f"b.mkv cannot be read, {batch.files[1]} stands for it: " in told


def test_each_rank_writes_rejects_of_its_own(tmp_path, tiny, monkeypatch):
    make(tmp_path / "clips" / "a.mkv")
    cfg = tiny(f"data.train_data_dir={tmp_path / 'clips'}", "data.held_out_clips=0")
    found = VideoFolder(tmp_path / "clips", **SIZE)
    clips = source.Source(cfg, found, [0], codec.Pixels(), torch.device("cpu"), tmp_path)
    item = {"frames": found[0, 0]["frames"][None], "caption": [""], "path": ["a.mkv"]}
    for rank in (1, 0):
        monkeypatch.setattr("stgen.ranks.rank", lambda rank=rank: rank)
        clips._encoded({**item, "rejects": [(f"{rank}.mkv", "gone")]})
    assert "1.mkv" in (tmp_path / "rejects-1.jsonl").read_text()
    assert "1.mkv" not in (tmp_path / "rejects.jsonl").read_text()


def test_clips_that_are_large_are_encoded_a_few_at_a_time(tmp_path, tiny, monkeypatch):
    for i in range(5):
        make(tmp_path / "clips" / f"{i}.mkv", hue=20 * i)
    cfg = tiny(f"data.train_data_dir={tmp_path / 'clips'}", "data.held_out_clips=0", "data.cache=memory")
    found, seen, encode = VideoFolder(tmp_path / "clips", **SIZE), [], codec.Pixels.encode
    monkeypatch.setattr(codec.Pixels, "encode", lambda self, x: seen.append(len(x)) or encode(self, x))

    def memory() -> dict:
        kept = source.Source(cfg, found, range(5), codec.Pixels(), torch.device("cpu"), tmp_path).memory
        assert kept is not None
        return kept

    whole = memory()
    monkeypatch.setattr(source, "FILL", 2 * 3 * 4 * 16 * 16)
    few = memory()
    assert seen == [32, 2, 2, 2]
    assert whole.keys() == few.keys() and all(torch.equal(whole[i][0], few[i][0]) for i in whole)
