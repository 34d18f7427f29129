"""`stgen data`: a folder's numbers are those of its files, its page says what stands out, and nothing is written into it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from transformers import ByT5Tokenizer

from stgen import cli, config, dataset, schema, shapes, video
from stgen.lab import data_check, data_page

ROOT = Path(__file__).parents[2]


def write(path: Path, frames: int, height: int, width: int, fps: float, caption: str | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    video.write(path, video.Clip(shapes.render(shapes.ALL[0], frames, height, width, 0), fps))
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six videos that can be used, and three entries that cannot."""
    root = tmp_path / "videos"
    write(root / "a.mp4", 8, 32, 48, 8.0, "a red circle")
    write(root / "b.mp4", 16, 32, 48, 8.0, "a red circle")
    write(root / "c.mp4", 40, 48, 32, 8.0, "one two three four five six seven")
    write(root / "d.mp4", 48, 64, 96, 24.0, None)
    write(root / "sub" / "e.mp4", 20, 32, 48, 8.0, "a red circle")
    write(root / "sub" / "f.mp4", 12, 32, 48, 8.0, "blue")
    (root / "broken.mp4").write_bytes((root / "a.mp4").read_bytes()[:200])
    (root / "empty.mp4").write_bytes(b"")
    (root / "sub" / "metadata.csv").write_text("file_name,text\nnowhere.mp4,x\n")
    return root


def tree(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def configured(tmp_path: Path, folder: Path, *overrides: str) -> schema.Config:
    (tmp_path / "c.yaml").write_text("train: {max_train_steps: 1}\n")
    keys = [
        "data.num_frames=4",
        "data.height=24",
        "data.width=24",
        f"data.train_data_dir={folder}",
        "codec.patch_size=[2,8,8]",
    ]
    return config.load(tmp_path / "c.yaml", [*keys, f"run.output_dir={tmp_path / 'run'}", *overrides], schema.Config)


def test_numbers_of_a_folder(folder, tmp_path, capsys):
    before = tree(folder)
    numbers = data_check.check(None, folder, None, 4)
    assert tree(folder) == before
    kept = json.loads((tmp_path / "videos-check" / "check.json").read_text())
    assert kept == json.loads(json.dumps(numbers))
    assert numbers["videos"] == 6 and numbers["seconds"] == pytest.approx(1 + 2 + 5 + 2 + 2.5 + 1.5)
    used = [content for name, content in before.items() if name.endswith(".mp4") and "broken" not in name]
    assert numbers["bytes"] == sum(map(len, used))
    assert numbers["sizes"] == {"48x32": 4, "32x48": 1, "96x64": 1} and numbers["fps"] == {"8": 5, "24": 1}
    assert numbers["frames"] == {"least": 8, "median": 18, "most": 48}
    assert numbers["durations"]["histogram"][:4] == [(0, 1, 0), (1, 2, 2), (2, 4, 3), (4, 8, 1)]
    captions = numbers["captions"]
    assert (captions["empty"], captions["distinct"], captions["repeated"], captions["vocabulary"]) == (1, 3, 3, 11)
    assert captions["most_frequent"][0] == ("a red circle", 3) and captions["words"]["median"] == 3
    assert sorted(reject["path"] for reject in numbers["rejects"]) == ["broken.mp4", "empty.mp4", "sub/metadata.csv:2"]
    page = capsys.readouterr().out
    assert "6 videos, 14 s, " in page and "3 entries cannot be used" in page and "3 x 'a red circle'" in page
    assert (
        "empty.mp4" in page and "1 videos have no caption" in page and "different rates (8, 24 frames a second)" in page
    )
    with Image.open(tmp_path / "videos-check" / "contact_sheet.png") as sheet:
        assert sheet.height > 4 * 96 and len(sheet.getcolors(2**20) or []) > 10


def test_numbers_of_a_config(folder, tmp_path, capsys):
    cfg = configured(tmp_path, folder, "text={kind: words, width: 8, max_length: 5}")
    numbers = data_check.check(cfg, tmp_path / "c.yaml", None, 3)
    (row,) = numbers["clips"]
    assert row == {
        "size": "4x24x24", "videos": 6, "clips": 2 + 4 + 10 + 12 + 5 + 3, "enlarged": 0, "largest_scale": 0.75,
        "frame_kept": pytest.approx(2 / 3),
    }  # fmt: skip
    assert numbers["captions"]["truncated"] == 1 and numbers["captions"]["most_tokens"] == 8
    page = capsys.readouterr().out
    assert "1 (17%) are longer than the 5 tokens of text.max_length; the longest has 8" in page
    assert "raise text.max_length, to 8 for all" in page and "clips of 4x24x24 keep 67% of a frame" in page
    assert (tmp_path / "run-data" / "contact_sheet.png").exists()


def test_clips_of_buckets_at_another_rate(folder, tmp_path):
    buckets = "data.buckets=[{num_frames: 4, height: 24, width: 24}, {num_frames: 8, height: 48, width: 32}]"
    cfg = configured(tmp_path, folder, buckets, "data.fps=4", "tokens.positions=rope")
    rows = {row["size"]: row for row in data_check.measure(data_check._folder(cfg, folder), cfg)["clips"]}
    assert (rows["8x48x32"]["videos"], rows["8x48x32"]["clips"]) == (1, 40 // 15)  # c.mp4, every other frame
    assert (rows["4x24x24"]["videos"], rows["4x24x24"]["clips"]) == (5, 1 + 2 + 48 // 19 + 2 + 1)


def test_tokens_are_counted_by_the_config_s_encoder(folder, tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path / "t5")
    pretrained = f"kind: transformers, path: {tmp_path / 't5'}, max_length: 11"
    for keys, limit in (("kind: bytes, width: 8, max_length: 9", 9), (pretrained, 11)):
        length, most = data_check.tokens_of(configured(tmp_path, folder, f"text={{{keys}}}"))
        assert (length("a red dög"), most) == (11, limit)


def test_a_video_that_fails_on_the_sheet_is_told(folder, tmp_path, monkeypatch, capsys):
    read = video.read

    def failing(path, *args):
        if path.name == "b.mp4":
            raise video.VideoError(path, "is damaged at frame 3")
        return read(path, *args)

    monkeypatch.setattr(video, "read", failing)
    for cfg in (None, configured(tmp_path, folder)):
        numbers = data_check.check(cfg, folder, tmp_path / "out", 6)
        assert {"path": "b.mp4", "reason": "is damaged at frame 3"} in numbers["rejects"]
        assert "4 entries cannot be used" in capsys.readouterr().out


def test_a_histogram_has_every_value_once():
    found = data_check.histogram([0, 0.5, 1, 1.5, 2, 9], (1, 2, 4))
    assert found == [(0, 1, 2), (1, 2, 2), (2, 4, 1), (4, None, 1)]


def test_bars_and_lists_stay_short():
    assert [len(data_page._bar(share)) for share in (0, 0.001, 0.5, 1)] == [0, 1, 16, 32]
    rows = data_page._most({str(i): 20 - i for i in range(20)})
    assert len(rows) == data_page.ROWS and rows[-1] == ("13 others", sum(range(1, 14)))
    rejects = [{"path": f"{i}.mp4", "reason": f"has {i} frames; a clip needs 9"} for i in range(5)]
    lines = list(data_page._rejects([*rejects, {"path": "x\n.mp4", "reason": "is an empty file"}]))
    assert lines[1:] == [
        "  5  has 0 frames; a clip needs 9: 0.mp4, 1.mp4, 2.mp4, …",
        "  1  is an empty file: x .mp4",
    ]


# ------------------------------------------------------------------------------------------------------ the commands


def test_shapes_of_any_size_are_rendered_and_checked(tmp_path, capsys):
    root = tmp_path / "shapes"
    options = ["--clips", "6", "--num_frames", "5", "--height", "24", "--width", "40", "--held_out", "3"]
    with pytest.raises(SystemExit) as done:
        cli.data(["shapes", str(root), *options])
    assert done.value.code == 0 and "6 clips of 45 combinations, 3 held out" in capsys.readouterr().out
    found = dataset.VideoFolder(root, num_frames=5, height=24, width=40)
    assert len(found) == 6 and not found.uncaptioned and found.samples[0].info == video.Info(5, 8.0, 24, 40)
    with pytest.raises(SystemExit) as done:
        cli.data(["check", str(root), "--clips", "2"])
    assert not done.value.code and "6 videos" in capsys.readouterr().out


def test_options_and_overrides_come_in_any_order(tmp_path):
    from stgen.lab import data_cli

    args = data_cli.parse(["cache", "c.yaml", "--jobs", "2", "data.fps=4", "--prune", "a.b=c"])
    assert (args.jobs, args.prune, args.overrides) == (2, True, ["data.fps=4", "a.b=c"])


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["check", "nowhere.yaml"], 2, "config error: nowhere.yaml: no such file"),
        (["cache", "configs/quickstart.yaml", "data.cahce=disk"], 2, "did you mean data.cache?"),
        (["check", "EMPTY"], 1, "holds no usable video"),
        (["cache", "configs/quickstart.yaml", "data.train_data_dir=EMPTY"], 1, "holds no usable video"),
    ],
)
def test_what_cannot_be_meant_ends_in_one_line(words, code, line, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = [word.replace("EMPTY", str(tmp_path / "none")) for word in words]
    (tmp_path / "none").mkdir()
    with pytest.raises(SystemExit) as refusal:
        cli.data([*words, *([f"run.output_dir={tmp_path / 'r'}"] if words[1].endswith("quickstart.yaml") else [])])
    error = capsys.readouterr().err.strip()
    assert refusal.value.code == code and line in error and "\n" not in error


def test_help_loads_no_torch_and_tells_everything():
    code = "import sys; from stgen.lab import data_cli\ntry: data_cli.parse(['cache', '--help'])\n"
    code += "finally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.rstrip().endswith("False")
    for words in ("data.cache_clips", "--jobs", "--prune", "Kill it at any time"):
        assert words in done.stdout
