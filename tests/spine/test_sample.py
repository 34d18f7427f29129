"""sample.py in-process: which files it writes, what it says of what it cannot do, and that the seed decides the bytes."""

import json
import re

import pytest
import torch
from PIL import Image
from torch import nn

from stgen import build, checkpoint, cli, config, schema, video
from stgen.codec import PatchPCA
from stgen.model import VideoTransformer
from stgen.objective import Objective
from stgen.pipeline import VideoPipeline, build_scheduler
from stgen.text import LearnedTextEncoder, vocabulary_of

CAPTIONS = ["a red circle moving left", "a blue square"]
HOSTILE = ["../../x", "/etc/passwd", "red " * 100, "a\0b", "🎬 ☃", "%s {0}", "\udce9", "a\nb", "-"]


def make(positions="rope", **objective) -> VideoPipeline:
    torch.manual_seed(0)
    codec = PatchPCA((2, 8, 8), 6).fit(torch.rand(8, 3, 4, 16, 16) * 2 - 1)
    transformer = VideoTransformer(6, (2, 2, 2), width=16, depth=2, heads=2, text_width=8, positions=positions)
    for parameter in transformer.parameters():
        nn.init.normal_(parameter, std=0.2)
    encoder = LearnedTextEncoder(vocabulary_of(CAPTIONS), width=8)
    sampling = {"num_frames": 4, "height": 16, "width": 16, "fps": 8.0, "num_inference_steps": 2, "guidance_scale": 2.0}
    scheduler = build_scheduler(None, Objective(**objective))
    return VideoPipeline(transformer, codec, encoder, scheduler, objective=objective, sampling=sampling)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    make().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run stopped after its first checkpoint, whose averaged weights differ from the raw ones."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    text = """
    data: {num_frames: 4, height: 16, width: 16}
    codec: {kind: pca, patch_size: [2, 8, 8], components: 6}
    text: {kind: words, width: 8}
    model: {width: 16, depth: 2, heads: 2}
    train: {max_train_steps: 1}
    validation: {num_inference_steps: 2}
    """
    (folder / "config.yaml").write_text("\n".join(line[4:] for line in text.splitlines()))
    cfg = config.load(folder / "config.yaml", [], schema.Config)
    vocabulary = vocabulary_of(CAPTIONS)
    parts = build.build_parts(cfg, vocabulary)
    parts.codec.fit(torch.rand(8, 3, 4, 16, 16) * 2 - 1)
    for parameter in parts.transformer.parameters():
        nn.init.normal_(parameter, std=0.2)
    model = {name: x.clone() for name, x in nn.ModuleDict(parts.trained).state_dict().items()}
    ema = {name: x * 0.9 for name, x in model.items()}
    tensors = {"model": model, "ema": ema, "codec": build.codec_tensors(parts.codec)}
    checkpoint.save(
        folder, 1, tensors, {"config": cfg.model_dump(mode="json"), "vocabulary": vocabulary, "fps": 6.0}, 2
    )
    return folder


def run(folder, *options, out=None, wandb="disabled"):
    where = ["--output_dir", str(out)] if out else []
    cli.sample([str(folder), *map(str, options), *where, "--wandb", wandb, "--device", "cpu"])


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "metrics.jsonl")


def settings(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def refused(capsys, folder, *options, out=None) -> str:
    """The one line that is said of a request, which ends with code 1 and writes no clip."""
    with pytest.raises(SystemExit) as end:
        run(folder, *options, out=out)
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code in (1, 2) and lines[-1].startswith("error: ")
    assert sum(line.startswith("error: ") for line in lines) == 1 and not any("Traceback" in line for line in lines)
    assert out is None or not list(out.glob("*.mp4"))
    return lines[-1]


# ------------------------------------------------------------------------------------------------------------- files


def test_a_clip_and_its_settings(saved, tmp_path, capsys):
    run(saved, "--prompt", CAPTIONS[0], "--seed", 7, out=tmp_path)
    assert names(tmp_path) == ["000-seed7.json", "000-seed7.mp4"]
    clip = video.read(tmp_path / "000-seed7.mp4")
    assert clip.frames.shape == (4, 3, 16, 16) and clip.fps == 8.0
    assert settings(tmp_path, "000-seed7") == {
        "prompt": CAPTIONS[0], "seed": 7, "negative_prompt": "", "guidance_scale": 2.0, "num_inference_steps": 2,
        "num_frames": 4, "height": 16, "width": 16, "fps": 8.0, "scheduler": None, "image": None, "run": str(saved),
        "weights": "ema",
    }  # fmt: skip
    said = capsys.readouterr().out
    assert "1 clips in" in said and "000-seed7.mp4" in said and "W&B disabled" in said.splitlines()


def test_seeds_and_clips_of_a_prompt(saved, tmp_path):
    run(saved, "--prompt", *CAPTIONS, "--seed", 5, 3, out=tmp_path / "a")
    clips = ["000-seed5.mp4", "001-seed3.mp4", "002-seed5.mp4", "003-seed3.mp4"]
    assert [name for name in names(tmp_path / "a") if name.endswith("mp4")] == clips
    assert [settings(tmp_path / "a", name[:-4])["prompt"] for name in clips] == [p for p in CAPTIONS for _ in "12"]
    run(saved, "--prompt", *CAPTIONS, "--seed", 5, "--num_videos_per_prompt", 2, out=tmp_path / "b")
    clips = ["000-seed5.mp4", "001-seed6.mp4", "002-seed5.mp4", "003-seed6.mp4"]
    assert [name for name in names(tmp_path / "b") if name.endswith("mp4")] == clips
    run(saved, "--prompt", "a", "--prompt", "red", "circle", out=tmp_path / "c")
    assert settings(tmp_path / "c", "002-seed0")["prompt"] == "circle"


def test_the_seed_decides_the_bytes_and_neighbours_do_not_matter(saved, tmp_path):
    run(saved, "--prompt", *CAPTIONS, "red", "--seed", 1, out=tmp_path / "together")
    run(saved, "--prompt", *CAPTIONS, "red", "--seed", 1, out=tmp_path / "again")
    run(saved, "--prompt", *CAPTIONS, "red", "--seed", 1, "--batch_size", 1, out=tmp_path / "apart")
    run(saved, "--prompt", *CAPTIONS, "red", "--seed", 2, out=tmp_path / "other")
    for i in range(3):
        first = (tmp_path / "together" / f"{i:03d}-seed1.mp4").read_bytes()
        assert (tmp_path / "again" / f"{i:03d}-seed1.mp4").read_bytes() == first
        assert (tmp_path / "other" / f"{i:03d}-seed2.mp4").read_bytes() != first
        apart = video.read(tmp_path / "apart" / f"{i:03d}-seed1.mp4").frames.float()
        error = (video.read(tmp_path / "together" / f"{i:03d}-seed1.mp4").frames - apart).abs()
        assert error.mean() < 0.1  # rounding may move a number by one of 255


def test_every_form(saved, tmp_path):
    options = ("--prompt", "red", "--fps", 4, "--output", "gif", "frames", "sheet", "mp4")
    for _ in range(2):  # a second call replaces the first
        run(saved, *options, out=tmp_path)
        found = ["000-seed0", "000-seed0.gif", "000-seed0.json", "000-seed0.mp4", "contact_sheet.png"]
        assert names(tmp_path) == found
    assert video.read(tmp_path / "000-seed0.gif").frames.shape == (4, 3, 16, 16)
    assert names(tmp_path / "000-seed0") == [f"{i:05d}.png" for i in range(4)]
    assert Image.open(tmp_path / "contact_sheet.png").width > 300
    assert video.read(tmp_path / "000-seed0.mp4").fps == 4
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["samples/videos"] == [{"path": "000-seed0.mp4", "caption": "red  (seed 0)"}]


def test_a_gif_alone(saved, tmp_path):
    run(saved, "--prompt", "red", "--output", "gif", out=tmp_path)
    assert names(tmp_path) == ["000-seed0.gif", "000-seed0.json"]


def test_hostile_prompts_stay_inside_json(saved, tmp_path):
    out = tmp_path / "deep" / "out"
    run(
        saved, "--prompt=" + HOSTILE[0], *[f"--prompt={prompt}" for prompt in HOSTILE[1:]], "--output", "sheet", out=out
    )
    for i, prompt in enumerate(HOSTILE):
        assert settings(out, f"{i:03d}-seed0")["prompt"] == prompt
    found = {path.name for path in tmp_path.rglob("*")}
    allowed = re.compile(r"deep|out|metrics\.jsonl|contact_sheet\.png|\d{3}-seed0\.(mp4|json)")
    assert all(allowed.fullmatch(name) for name in found) and len(found) == 2 * len(HOSTILE) + 4


def test_offline_wandb(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run(saved, "--prompt", *HOSTILE[3:5], out=tmp_path, wandb="offline")
    assert "W&B offline in" in capsys.readouterr().out
    assert list((tmp_path / "wandb").glob("offline-run-*"))


# ----------------------------------------------------------------------------------------------------------- options


def test_options_change_the_clip(saved, tmp_path):
    base = ("--prompt", "red circle")
    changes = [
        ("--guidance_scale", 1), ("--negative_prompt", "blue square"), ("--num_inference_steps", 5),
        ("--scheduler", "heun"), ("--height", 24), ("--num_frames", 6),
    ]  # fmt: skip
    clips = {}
    for i, change in enumerate([(), *changes]):
        run(saved, *base, *change, out=tmp_path / str(i))
        clips[change] = video.read(tmp_path / str(i) / "000-seed0.mp4").frames
    assert clips[("--height", 24)].shape == (4, 3, 24, 16) and clips[("--num_frames", 6)].shape == (6, 3, 16, 16)
    for change in changes[:4]:
        assert not torch.equal(clips[change], clips[()]), change


def test_unknown_words_are_named(saved, tmp_path, capsys):
    run(saved, "--prompt", "a huge red dog", "--negative_prompt", "ugly", out=tmp_path)
    said = "".join(capsys.readouterr())
    assert "warning: no training caption held 'huge', 'dog', 'ugly'" in said
    run(saved, "--prompt", "a red circle", out=tmp_path)
    assert "warning" not in "".join(capsys.readouterr())


# ----------------------------------------------------------------------------------------------------- prompt files


def write(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_text_file(saved, tmp_path):
    path = write(tmp_path / "prompts.txt", "\ufeff# comment\na red circle\r\n\n  blue square  \n")
    run(saved, "--prompt_file", path, "--prompt", "left", out=tmp_path / "out")
    found = [settings(tmp_path / "out", f"{i:03d}-seed0")["prompt"] for i in range(3)]
    assert found == ["left", "a red circle", "blue square"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_file_with_columns(saved, tmp_path, suffix):
    rows = [
        {"prompt": "a red circle, moving left", "seed": 4, "scheduler": "heun", "height": 24},
        {"prompt": 'blue "square"\u2028', "seed": None, "scheduler": None, "height": None},
        {"prompt": "circle", "seed": 2, "scheduler": "unipc", "height": None},
    ]
    if suffix == "csv":
        cells = [['"' + str(v).replace('"', '""') + '"' if v is not None else "" for v in row.values()] for row in rows]
        content = "\n".join(",".join(line) for line in [list(rows[0]), *cells])
    else:
        content = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    path = write(tmp_path / f"prompts.{suffix}", content)
    run(saved, "--prompt_file", path, "--seed", 9, out=tmp_path / "out")
    found = [settings(tmp_path / "out", name) for name in ("000-seed4", "001-seed9", "002-seed2")]
    assert [(s["prompt"], s["scheduler"], s["height"]) for s in found] == [
        (rows[0]["prompt"], "heun", 24), (rows[1]["prompt"], None, 16), (rows[2]["prompt"], "unipc", 16),
    ]  # fmt: skip
    # The second row is sampled by the run's own scheduler, not by that of the row before.
    run(saved, "--prompt", rows[1]["prompt"], "--seed", 9, out=tmp_path / "alone")
    alone = (tmp_path / "alone" / "000-seed9.mp4").read_bytes()
    assert (tmp_path / "out" / "001-seed9.mp4").read_bytes() == alone


BAD_FILES = [  # name, content, the line, what is said
    ("a.csv", "prompt,colour\nred,1\n", ":2: ", "unknown column 'colour'; known are chunk_frames, fps, guidance_scale"),
    ("a.csv", "text\nred\n", ":2: ", "no prompt in this row"),
    ("a.csv", "prompt,seed\nred,1\nblue,one\n", ":3: ", "seed should be a whole number from 0 on, got 'one'"),
    ("a.csv", "prompt,seed\na red, circle,1\n", ":2: ", "more values than columns; quote a prompt that holds a comma"),
    ("a.csv", 'prompt\n"' + "x" * 200_000 + '"\n', ":2: ", "not CSV: field larger than field limit"),
    ("a.jsonl", '{"prompt": "red"}\n{"prompt": \n', ":2: ", "not JSON"),
    ("a.jsonl", "[" * 100_000, ":1: ", "not JSON"),
    ("a.jsonl", '"red"\n', ":1: ", "no prompt in this row"),
    ("a.jsonl", '{"prompt": ["red"]}\n', ":1: ", "prompt should be text, got ['red']"),
    ("a.jsonl", '\n{"prompt": "red", "seed": -1}\n', ":2: ", "seed should be a whole number from 0 on, got -1"),
    ("a.jsonl", '{"prompt": "red", "seed": 1e30}\n', ":1: ", "seed should be a whole number"),
    ("a.jsonl", '{"prompt": "red", "seed": true}\n', ":1: ", "seed should be a whole number"),
    ("a.jsonl", '{"prompt": "red", "num_frames": 4.5}\n', ":1: ", "num_frames should be a whole number from 1 on"),
    ("a.jsonl", '{"prompt": "red", "guidance_scale": NaN}\n', ":1: ", "guidance_scale should be a number, got nan"),
    ("a.jsonl", '{"prompt": "red", "fps": 0}\n', ":1: ", "fps should be a positive number, got 0"),
    ("a.jsonl", '{"prompt": "red", "scheduler": "magic"}\n', ":1: ", "scheduler 'magic' is none of euler, heun"),
    ("a.txt", "# nothing\n\n", "", "no prompt in it; write one a line"),
    ("a.txt", b"caf\xe9\n", "", "not UTF-8 text (byte 3)"),
    ("a.csv", "", "", "no prompt in it"),
]


@pytest.mark.parametrize(("name", "content", "line", "message"), BAD_FILES)
def test_bad_prompt_files_are_named_with_their_line(saved, tmp_path, capsys, name, content, line, message):
    path = write(tmp_path / name, content)
    said = refused(capsys, saved, "--prompt_file", path, out=tmp_path / "out")
    assert f"{path}{line}" in said and message in said and len(said) < 600


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num_frames", 5), "num_frames 5 is not divisible by the codec's patch of 2"),
        (("--height", 20), "height 20 is not divisible by the codec's patch of 8"),
        (("--width", 0), "--width: width should be a whole number from 1 on, got 0"),
        (("--num_inference_steps", 0), "--num_inference_steps: num_inference_steps should be a whole number from 1 on"),
        (("--seed", -1), "--seed: seed should be a whole number from 0 on, got -1"),
        (("--seed", 2**70), "--seed: seed should be a whole number from 0 on"),
        (("--fps", 0), "--fps: fps should be a positive number, got 0.0"),
        (("--guidance_scale", "nan"), "guidance_scale should be a number, got nan"),
        (("--num_videos_per_prompt", 0), "--num_videos_per_prompt: 0 should be at least 1"),
        (("--batch_size", 0), "--batch_size: 0 should be at least 1"),
        (("--seed", 1, 2, "--num_videos_per_prompt", 3), "--seed: 2 seeds for 3 clips of a prompt; give one"),
        (("--scheduler", "ddim"), "scheduler ddim is for objective.path diffusion; with flow use euler"),
        (("--weights", "raw"), "is a saved pipeline and holds one set of weights"),
        (("--prompt_file", "missing.txt"), "--prompt_file: missing.txt is not a file"),
    ],
)
def test_options_that_cannot_be_met(saved, tmp_path, capsys, options, message):
    assert message in refused(capsys, saved, "--prompt", "red", *options, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_size_that_learned_positions_do_not_know(tmp_path, capsys):
    make("learned").save_pretrained(tmp_path)
    said = refused(capsys, tmp_path, "--prompt", "red", "--height", 24)
    assert "4 frames of 24x16: learned positions hold for the training size alone" in said


def test_folders_that_hold_no_model(saved, tmp_path, capsys):
    for folder in (tmp_path / "missing", tmp_path):
        said = refused(capsys, folder, "--prompt", "red")
        assert (
            f"{folder} is neither a run folder, nor a checkpoint (manifest.json), nor a saved pipeline (model_index.json)"
            in said
        )
    (tmp_path / "model_index.json").write_text((saved / "model_index.json").read_text())
    assert "cannot be loaded" in refused(capsys, tmp_path, "--prompt", "red")
    (tmp_path / "model_index.json").write_text("{")
    assert "model_index.json: not JSON that can be read" in refused(capsys, tmp_path, "--prompt", "red")


def test_an_output_folder_that_is_a_file(saved, tmp_path, capsys):
    path = write(tmp_path / "file", "")
    assert f"--output_dir: {path} cannot be written to" in refused(capsys, saved, "--prompt", "red", out=path)


def test_no_prompt_is_a_matter_of_usage(saved, capsys):
    with pytest.raises(SystemExit) as end:
        run(saved)
    assert end.value.code == 2 and "give --prompt or --prompt_file" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- run folders


def test_a_run_folder_and_its_checkpoint(run_folder):
    run(run_folder, "--prompt", "red", "--seed", 1)
    out = run_folder / "samples"
    assert names(out) == ["000-seed1.json", "000-seed1.mp4"]
    clip = (out / "000-seed1.mp4").read_bytes()
    assert video.read(out / "000-seed1.mp4").fps == 6.0
    run(run_folder / "checkpoint-1", "--prompt", "red", "--seed", 1)
    assert (out / "000-seed1.mp4").read_bytes() == clip and not (run_folder / "checkpoint-1" / "samples").exists()
    run(run_folder, "--prompt", "red", "--seed", 1, "--weights", "raw")
    assert (out / "000-seed1.mp4").read_bytes() != clip and settings(out, "000-seed1")["weights"] == "raw"


def test_a_run_without_checkpoint(run_folder, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text((run_folder / "config.yaml").read_text())
    assert "has no checkpoint yet" in refused(capsys, tmp_path, "--prompt", "red")


# ------------------------------------------------------------------------------------------------------------- images


@pytest.fixture(scope="module")
def continuing(tmp_path_factory):
    """A pipeline that goes on from given frames, and two images beside it."""
    folder = tmp_path_factory.mktemp("continuing") / "pipeline"
    make(frame_times="past").save_pretrained(folder)
    for name, colour in (("red.png", (200, 30, 30)), ("blue.png", (30, 30, 200))):
        Image.new("RGB", (40, 24), colour).save(folder.parent / name)
    return folder


def test_an_image_shapes_the_clip_and_neighbours_do_not_matter(continuing, tmp_path):
    images = continuing.parent
    rows = [{"prompt": "a blue square", "seed": 3, "image": name} for name in ("red.png", "blue.png")]
    (images / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(continuing, "--prompt_file", images / "p.jsonl", out=tmp_path / "file")
    for i, row in enumerate(rows):
        out = tmp_path / row["image"]
        run(continuing, "--prompt", "a blue square", "--seed", 3, "--image", images / row["image"], out=out)
        assert (out / "000-seed3.mp4").read_bytes() == (tmp_path / "file" / f"00{i}-seed3.mp4").read_bytes()
        assert settings(out, "000-seed3")["image"] == str(images / row["image"])
    assert (tmp_path / "file/000-seed3.mp4").read_bytes() != (tmp_path / "file/001-seed3.mp4").read_bytes()


def test_images_that_cannot_be_used(saved, continuing, tmp_path, capsys):
    ask = ["--prompt", "a blue square", "--image"]
    assert "no such file" in refused(capsys, continuing, *ask, tmp_path / "none.png", out=tmp_path)
    broken = write(tmp_path / "broken.png", "no pixels")
    assert "not an image" in refused(capsys, continuing, *ask, broken, out=tmp_path)
    image = continuing.parent / "red.png"
    assert "train with objective.frame_times=past" in refused(capsys, saved, *ask, image, out=tmp_path)
    outside = write(tmp_path / "p.csv", f"prompt,image\na blue square,{image}\n")
    assert f"{outside}:2: image" in refused(capsys, continuing, "--prompt_file", outside, out=tmp_path)
