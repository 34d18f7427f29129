"""Prompts, captions and keys: hostile words become safe names, pages and captions; secrets appear nowhere."""

import csv
import html.parser
import io
import json
import logging
import os
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fault_guard import guarded

from stgen import cli, config, schema, shapes, video
from stgen.codec import PatchPCA
from stgen.lab.report_page import Bullets, Heading, Paragraph, Table, Verbatim, markdown, page
from stgen.logger import Logger, redact
from stgen.model import VideoTransformer
from stgen.objective import Objective
from stgen.pipeline import VideoPipeline, build_scheduler
from stgen.text import LearnedTextEncoder
from stgen.train import train

PARTS = [
    "../", "..\\", "/etc/passwd", "~/.ssh/id_rsa", "C:\\Windows", "\\\\server\\share", "file:///etc/passwd", "\0", "\n", "\r",
    "\t", "\x1b[2J", "\x1b]0;owned\x07", "\x7f", "\u2028", "\u202e", "\ufeff", "\u200b", "\ud800", "\udcff", "é日本🎬",
    "a" * 300, "a\u0300" * 200, "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", '"><svg/onload=alert(1)>',
    "javascript:alert(1)", "&lt;b&gt;", "=cmd|'/C calc'!A0", "@SUM(1+1)", "+1+1", "-1", "=HYPERLINK(\"http://127.0.0.1:9\")",
    "$(touch owned)", "`touch owned`", "; touch owned", "| touch owned", "&& touch owned", "%s%n%x", "{0.__class__}",
    "{{7*7}}", "${jndi:ldap://127.0.0.1:9/a}", "!!python/object/apply:os.system [id]", "'; DROP TABLE runs; --", "-rf", "--help",
    "con", "nul", ".", "..", "", " ", ".hidden", "a.mp4", "000-seed0.mp4", "metrics.jsonl", "x/y/z", "*", "?", "|", ":",
    "http://127.0.0.1:9/x.mp4", "concat:a.mp4|b.mp4", "pipe:0", "[redacted]", "```", "](javascript:alert(1))", "</details>",
]  # fmt: skip


def hostile(count: int, seed: int = 5) -> list[str]:
    """So many prompts that differ, of the parts above, alone and together."""
    chance, made = random.Random(seed), dict.fromkeys(PARTS)
    while len(made) < count:
        made["".join(chance.choices(PARTS, k=chance.choice([2, 2, 3, 8])))] = None
    return list(made)[:count]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    component = PatchPCA((2, 8, 8), 6).fit(torch.rand(16, 3, 2, 8, 8) * 2 - 1)
    transformer = VideoTransformer(6, (1, 1, 1), width=8, depth=1, heads=1, text_width=8, plan="spatial")
    sampling = {"num_frames": 2, "height": 8, "width": 8, "fps": 8.0, "num_inference_steps": 1, "guidance_scale": 1.0}
    encoder = LearnedTextEncoder(None, width=8, max_length=16)
    pipeline = VideoPipeline(
        transformer, component, encoder, build_scheduler(None, Objective()), objective={}, sampling=sampling
    )
    folder = tmp_path_factory.mktemp("saved") / "final"
    pipeline.save_pretrained(folder)
    return folder


# --------------------------------------------------------------------------------------------------- prompts as files


def test_hostile_prompts_become_numbered_files(saved, tmp_path, monkeypatch, capsys, figure):
    monkeypatch.chdir(tmp_path)
    prompts = [prompt for prompt in hostile(200) if prompt] + ["one more"]
    rows = [json.dumps({"prompt": prompt}) for prompt in prompts]
    Path("prompts.jsonl").write_text("\n".join(rows) + "\n")
    options = [
        "--output_dir",
        "out",
        "--wandb",
        "disabled",
        "--batch_size",
        "64",
        "--device",
        "cpu",
        "--output",
        "mp4",
        "sheet",
    ]
    with guarded():
        cli.sample([str(saved), "--prompt_file", "prompts.jsonl", *options])
    found = {path.name for path in Path("out").iterdir()}
    expected = {f"{i:03d}-seed0.{kind}" for i in range(len(prompts)) for kind in ("mp4", "json")}
    assert found == expected | {"metrics.jsonl", "contact_sheet.png"}
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.jsonl", "out"}  # nothing beside the folder
    for i, prompt in enumerate(prompts):
        assert json.loads(Path("out", f"{i:03d}-seed0.json").read_text())["prompt"] == prompt
    lines = Path("out", "metrics.jsonl").read_bytes().split(b"\n")
    captions = [json.loads(line).get("samples/videos", []) for line in lines if line]
    assert [c["caption"].startswith(p) for c, p in zip(captions[-1], prompts, strict=True)] == [True] * len(prompts)
    said = capsys.readouterr()
    assert not re.search(
        r"[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f]|\x1b[^\[]|\x1b\[2J", said.out + said.err.replace("\x1b[A", "")
    )
    figure("hostile prompts in numbered files, none beside the folder, words kept beside them", len(prompts))


def test_hostile_prompts_on_the_command_line_are_prompts(saved, monkeypatch):
    """`--help` and `-rf` after --prompt= are words too."""
    asked = []
    monkeypatch.setattr("stgen.sample.sample", lambda args: asked.extend(args.prompt))
    words = [word for word in PARTS if word and "\0" not in word]
    for word in words:
        cli.sample([str(saved), f"--prompt={word}"])
    assert asked == words


def test_hostile_captions_make_a_sheet_in_time(tmp_path):
    """A caption of a megabyte, and signs that no font has."""
    words = [*hostile(40), "x" * 10**6, "\u202e" * 10**5]
    clip = video.Clip(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 8.0)
    video.contact_sheet(tmp_path / "sheet.png", [clip] * len(words), words)
    assert (tmp_path / "sheet.png").stat().st_size > 1000


# ------------------------------------------------------------------------------------------------ captions and pages


class Wandb:
    """Stands in for the package and keeps what it is given."""

    def __init__(self):
        self.captions, self.config, self.logged = [], None, []
        self.settings = SimpleNamespace(mode="offline", sync_dir="folder")
        self.summary = {}

    def Settings(self, **_):
        return None

    def init(self, config, **_):
        self.config = config
        return self

    def Video(self, path, caption, format):
        self.captions.append(caption)
        return caption

    def log(self, values):
        self.logged.append(values)

    def define_metric(self, *_, **__): ...

    def finish(self): ...

    def teardown(self): ...


def test_hostile_captions_reach_wandb_as_one_plain_line(tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    record = Logger(tmp_path, {}, mode="offline")
    prompts = hostile(200)
    record.videos(1, "v", [(tmp_path / "a.mp4", prompt) for prompt in prompts])
    record.finish()
    assert len(wandb.captions) == 200 and record.where.startswith("W&B offline")
    for caption in wandb.captions:
        caption.encode("utf-8")  # a lone surrogate would end the W&B run
        assert caption.isprintable() and "<" not in caption and ">" not in caption and len(caption) <= 300
    assert wandb.captions[prompts.index("é日本🎬")] == "é日本🎬"


class Tags(html.parser.HTMLParser):
    """The tags of a page and their attributes."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes = set(), set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs} | {value for _, value in attrs if "script" in str(value)}


def test_hostile_words_stay_words_on_a_page(tmp_path):
    words = hostile(200)
    blocks = [Heading(words[23]), *(Paragraph(word) for word in words), Bullets(words), Verbatim(words[24], "\n".join(words)),
              Table(["name", "value"], [[word, word] for word in words])]  # fmt: skip
    plain = Tags()
    plain.feed(
        page("title", [Heading("a"), Paragraph("**a** `b`"), Bullets(["a"]), Verbatim("a", "b"), Table(["a"], [["b"]])])
    )
    found = Tags()
    found.feed(page(words[25], blocks))
    assert found.tags <= plain.tags and found.attributes <= plain.attributes | {"class"}
    assert not re.search(
        r"<(script|img|svg)", re.sub(r"`[^`]*`", "", markdown("t", blocks[:1] + blocks[1:60], tmp_path))
    )


def test_hostile_captions_survive_csv(tmp_path):
    """The metadata of rendered folders and prompt files: written and read back to the same words."""
    words = [word for word in hostile(200) if "\0" not in word and word.isprintable()]
    text = io.StringIO(newline="")
    csv.writer(text).writerows([["prompt"], *([word] for word in words)])
    (tmp_path / "p.csv").write_text(text.getvalue(), encoding="utf-8", newline="")
    from stgen.requests import read_prompt_file

    kept = [row["prompt"] for _, row in read_prompt_file(tmp_path / "p.csv")]
    assert kept == words


# ------------------------------------------------------------------------------------------------------------- secrets

KEYS = {
    "WANDB_API_KEY": "f0f0" * 10, "HF_TOKEN": "hf_" + "Secret" * 6, "HUGGING_FACE_HUB_TOKEN": "hf_" + "Hidden" * 6,
    "AWS_SECRET_ACCESS_KEY": "awsSECRETawsSECRET", "OPENAI_API_KEY": "sk-secretsecret", "GITHUB_TOKEN": "ghp_secretsecret",
}  # fmt: skip
TINY = [
    "data.num_frames=2", "data.height=8", "data.width=8", "data.held_out_clips=0", "data.dataloader_num_workers=0",
    "codec.patch_size=[2,8,8]", "codec.components=2", "text.width=8", "model.width=8", "model.depth=1", "model.heads=1",
    "model.plan=spatial", "train.train_batch_size=2", "train.max_train_steps=3", "optim.lr_warmup_steps=1",
    "validation.steps=null", "validation.num_inference_steps=1", "validation.prompts=[a red circle]", "log.every=1",
    "checkpoint.steps=2",
]  # fmt: skip


def test_keys_are_nowhere_in_a_run(tmp_path, monkeypatch, capfd, caplog, figure):
    """config.yaml, env.json, checkpoints, dumps, metrics, W&B's files and everything that is said."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "videos"
    for i in range(3):
        combo = shapes.ALL[i]
        video.write(folder / f"{i}.mp4", video.Clip(shapes.render(combo, 2, 16, 16, i), 8.0))
    (tmp_path / "empty.yaml").write_text("{}\n")
    given = [*TINY, f"data.train_data_dir={folder}", f"run.output_dir={tmp_path / 'run'}", "log.wandb=offline"]
    monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path / "empty.yaml"), *given])
    cfg = config.load(tmp_path / "empty.yaml", given, schema.Config)
    with caplog.at_level(logging.DEBUG):
        train(cfg)
        honest = Objective.loss
        monkeypatch.setattr(Objective, "loss", lambda *args: honest(*args) * float("nan"))
        with pytest.raises(Exception, match="step 3: loss nan"):  # a dump too
            train(cfg.model_copy(update={
                "run": cfg.run.model_copy(update={"resume_from_checkpoint": "latest"}),
                "train": cfg.train.model_copy(update={"max_train_steps": 4}),
            }))  # fmt: skip
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any("offline-run" in str(path) for path in files) and any("not-finite" in str(path) for path in files)
    found = [
        f"{name} in {path}" for path in files for name, value in KEYS.items() if value.encode() in path.read_bytes()
    ]
    said = "".join(capfd.readouterr()) + caplog.text
    found += [f"{name} was said" for name, value in KEYS.items() if value in said]
    assert not found
    figure("files of a run and its dump without a key of the environment", len(files))


def test_secrets_typed_into_a_config_do_not_reach_wandb():
    cfg = {
        "codec": {"path": "https://user:hunter2@host/vae", "apiKey": "hunter2"},
        "validation": {"prompts": ["a red circle"]},
        "HF_TOKEN": "hunter2", "wandb-api-key": "hunter2", "list": [{"password": "hunter2"}, "https://hunter2@host"],
        "url": "https://host/x?token=hunter2&size=3", "header": "Authorization: Bearer hunter2",
    }  # fmt: skip
    clean = json.dumps(redact(cfg))
    assert "hunter2" not in clean and "a red circle" in clean and "size=3" in clean


def test_every_key_of_the_config_reaches_wandb(tmp_path):
    """Redaction must not hide what a run is compared by: `tokens` and `max_length` are no secrets."""
    (tmp_path / "empty.yaml").write_text("{}\n")
    tree = config.load(tmp_path / "empty.yaml", ["train.max_train_steps=1"], schema.Config).model_dump(mode="json")
    assert "[redacted]" not in json.dumps(redact(tree))


def test_the_environment_file_names_versions_and_no_variables(tmp_path):
    from stgen.train import _environment

    told = _environment(torch.device("cpu"))
    assert set(told) == {"python", "packages", "device", "threads", "pid"}
    assert not any(value and value in json.dumps(told) for name, value in os.environ.items() if "KEY" in name)
