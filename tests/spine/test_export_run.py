"""stgen export: the folder, its card, plain diffusers, the hub (faked), and pipelines fetched by a hub id."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from test_sample import CAPTIONS, make

from stgen import build, cli, export
from stgen.lora import LoraError
from stgen.model import VideoTransformer
from stgen.pipeline import VideoPipeline
from stgen.saved import SavedError

CONFIG = """
run: {output_dir: /home/someone/private/runs/base}
data: {train_data_dir: /home/someone/private/clips, num_frames: 4, height: 16, width: 16}
codec: {kind: pca, patch_size: [2, 8, 8], components: 6}
model: {width: 16, depth: 2}
text: {kind: words, width: 8}
train: {max_train_steps: 1}
log: {name: "secret plan", wandb: disabled}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run's folder, put together by hand."""
    folder = tmp_path_factory.mktemp("runs") / "base"
    make().save_pretrained(folder / "final")
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "summary.json").write_text(json.dumps({"steps": 7, "loss": {"held_out": 0.12345}, "note": "| **x**"}))
    (folder / "samples/final").mkdir(parents=True)
    for i in range(6):
        (folder / f"samples/final/00{i}-seed{i}.mp4").write_bytes(b"clip %d" % i)
    (folder / "contact_sheet.png").write_bytes(b"sheet")
    return folder


def door(run, output, *more):
    cli.export([str(run), "--output", str(output), *map(str, more)])
    return output


def latents(pipeline):
    return pipeline(CAPTIONS[0], generator=torch.Generator().manual_seed(0), output_type="latent").frames


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_the_folder_is_the_pipeline_with_a_card_and_clips(run, tmp_path, capsys):
    out = door(run, tmp_path / "out")
    assert [name for name in files(out) if "/" not in name] == ["README.md", "model_index.json"]
    assert [name for name in files(out) if name.startswith("samples/")] == [
        *(f"samples/00{i}-seed{i}.mp4" for i in range(4)), "samples/contact_sheet.png",
    ]  # fmt: skip
    loaded = VideoPipeline.from_pretrained(out)
    assert torch.equal(latents(loaded), latents(VideoPipeline.from_pretrained(run / "final")))
    assert f"pipeline {out}: " in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_card_tells_what_it_is_and_keeps_what_is_private(run, tmp_path):
    card = (door(run, tmp_path / "out") / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\npipeline_tag: text-to-video\n")
    for words in (
        "clips of 4 frames of 16x16", "loss.held out | 0.1235", "steps | 7", '"width": 16', "samples/contact_sheet.png",
        'VideoPipeline.from_pretrained("out")', "PatchPCA", "Trained on `clips`",
    ):  # fmt: skip
        assert words in card, words
    for words in ("/home/someone", "secret plan", "**x**", "base\n"):
        assert words not in card


def test_a_pipeline_without_its_run_has_a_card_too(run, tmp_path):
    make().save_pretrained(tmp_path / "alone/here")
    card = (door(tmp_path / "alone/here", tmp_path / "out") / "README.md").read_text()
    assert "Not recorded" in card and "## Metrics" not in card and '"plan": "spatial temporal"' in card


def test_types_and_variants(run, tmp_path):
    out = door(run, tmp_path / "out", "--dtype", "bf16", "--variant", "bf16")
    weights = out / "transformer/diffusion_pytorch_model.bf16.safetensors"
    with safe_open(weights, framework="pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    types = '{"transformer": torch.bfloat16, "text_encoder": torch.bfloat16, "default": torch.float32}'
    assert f'variant="bf16", torch_dtype={types}' in (out / "README.md").read_text()
    loaded = VideoPipeline.from_pretrained(
        out,
        variant="bf16",
        torch_dtype={**dict.fromkeys(["transformer", "text_encoder"], torch.bfloat16), "default": torch.float32},
    )
    assert (
        loaded.transformer.dtype == loaded.text_encoder.dtype == torch.bfloat16 and loaded.codec.dtype == torch.float32
    )
    ours, theirs = latents(loaded).float(), latents(VideoPipeline.from_pretrained(run / "final"))
    assert 0 < (ours - theirs).abs().max() < 0.2 * theirs.abs().max()


def test_norms_are_folded(tmp_path):
    pipeline = make()
    torch.manual_seed(0)
    model = VideoTransformer(
        6, (2, 2, 2), width=16, depth=2, heads=2, text_width=8, modulated=False, norm={"kind": "batch"}
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    pipeline.register_modules(transformer=model)
    pipeline.save_pretrained(tmp_path / "run/final")
    out = door(tmp_path / "run", tmp_path / "out", "--fold")
    folded = VideoPipeline.from_pretrained(out)
    assert folded.transformer.config.norm == {"kind": "folded"}
    torch.testing.assert_close(latents(folded), latents(pipeline), rtol=1e-4, atol=1e-4)


def test_plain_diffusers_loads_a_self_describing_folder_and_so_do_we(run, tmp_path):
    out = door(run, tmp_path / "out", "--self-describing")
    script = (
        "import sys, torch\nfrom diffusers import DiffusionPipeline\nassert 'stgen' not in sys.modules\n"
        f"pipe = DiffusionPipeline.from_pretrained({str(out)!r}, trust_remote_code=True)\n"
        f"clip = pipe({CAPTIONS[0]!r}, generator=torch.Generator().manual_seed(0), output_type='latent').frames\n"
        "print(type(pipe).__module__, type(pipe).__name__, float(clip.abs().sum()))\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    module, name, total = done.stdout.split()
    assert (module, name) == ("stgen.pipeline", "VideoPipeline")
    own = latents(VideoPipeline.from_pretrained(out))
    assert float(total) == pytest.approx(float(own.abs().sum()), rel=1e-5)
    assert torch.equal(own, latents(VideoPipeline.from_pretrained(run / "final")))
    assert "trust_remote_code=True" in (out / "README.md").read_text()


def test_of_the_code_in_a_folder_only_that_one_line_is_let_in(run, tmp_path):
    out = door(run, tmp_path / "out", "--self-describing")
    (out / "pipeline.py").write_text("from stgen.pipeline import VideoPipeline  # noqa: F401\nimport os\n")
    with pytest.raises(SavedError, match=r"pipeline\.py: a saved pipeline holds"):
        VideoPipeline.from_pretrained(out)
    (out / "pipeline.py").rename(out / "transformer/pipeline.py")
    with pytest.raises(SavedError, match=r"pipeline\.py: a saved pipeline holds"):
        VideoPipeline.from_pretrained(out)


def test_raw_weights_come_from_a_checkpoint(tmp_path):
    from test_sample import run_folder

    folder = run_folder.__wrapped__(type("Factory", (), {"mktemp": lambda self, name: _made(tmp_path / name)})())
    raw, ema = door(folder, tmp_path / "raw", "--weights", "raw"), door(folder, tmp_path / "ema")
    left, right = (VideoPipeline.from_pretrained(x).transformer.state_dict() for x in (raw, ema))
    assert all(torch.allclose(left[key] * 0.9, right[key]) for key in left)


def _made(path):
    path.mkdir()
    return path


# ------------------------------------------------------------------------------------------------------------ refusals


def refused(capsys, *arguments) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit):
        door(*arguments)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


def test_what_cannot_be_exported_is_told_and_leaves_nothing(run, tmp_path, capsys):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    assert "exists already" in refused(capsys, run, full)
    out = tmp_path / "out"
    assert "write ORG/NAME" in refused(capsys, run, out, "--push_to_hub", "../x")
    assert "--variant" in refused(capsys, run, out, "--variant", "../x")
    assert "--fold" in refused(capsys, run, out, "--fold")
    assert "holds no pytorch_lora_weights.safetensors" in refused(capsys, run, out, "--lora", run)
    assert "neither a run folder" in refused(capsys, tmp_path / "none", out)
    assert files(tmp_path) == ["full/mine.txt"] and not out.exists()


# ------------------------------------------------------------------------------------------------------------- the hub


class FakeApi:
    calls: list = []

    def create_repo(self, name, **options):
        self.calls.append(("create", name, options))
        return f"https://huggingface.co/{name}"

    def model_info(self, name):
        return SimpleNamespace(private=self.calls[0][2]["private"] and name != "someone/public")

    def upload_folder(self, repo_id, folder_path, **options):
        self.calls.append(("upload", repo_id, files(Path(folder_path))))


def test_pushing_makes_a_private_repository_and_uploads_the_folder(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    FakeApi.calls.clear()
    out = door(run, tmp_path / "out", "--push_to_hub", "someone/clips")
    assert FakeApi.calls == [
        ("create", "someone/clips", {"private": True, "exist_ok": True}), ("upload", "someone/clips", files(out)),
    ]  # fmt: skip
    assert "pushed to https://huggingface.co/someone/clips" in capsys.readouterr().out
    assert 'from_pretrained("someone/clips")' in (out / "README.md").read_text()


def test_a_repository_that_is_public_is_not_written_to_unasked(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    FakeApi.calls.clear()
    assert "add --public" in refused(capsys, run, tmp_path / "out", "--push_to_hub", "someone/public")
    assert [what for what, *_ in FakeApi.calls] == ["create"]
    door(run, tmp_path / "again", "--push_to_hub", "someone/public", "--public")
    assert FakeApi.calls[-1][0] == "upload"


def test_a_push_that_fails_leaves_the_folder(run, tmp_path, capsys, monkeypatch):
    class Refusing(FakeApi):
        def upload_folder(self, **_):
            raise OSError("no route to the hub\nsecond line")

    monkeypatch.setattr(huggingface_hub, "HfApi", Refusing)
    said = refused(capsys, run, tmp_path / "out", "--push_to_hub", "someone/clips", "--public")
    assert "no route to the hub" in said and "second" not in said
    VideoPipeline.from_pretrained(tmp_path / "out")


@pytest.fixture
def hub(run, tmp_path, monkeypatch):
    """A hub cache with one repository, laid out as huggingface_hub lays it out: files are links into a store."""
    cache = tmp_path / "cache"
    plain = door(run, tmp_path / "plain")
    store, snapshot = (cache / "models--someone--clips" / name for name in ("blobs", "snapshots/abc"))
    store.mkdir(parents=True)
    for i, name in enumerate(files(plain)):
        (store / str(i)).write_bytes((plain / name).read_bytes())
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(store / str(i), (snapshot / name).parent))
    asked = []

    def download(repo_id, **options):
        asked.append((repo_id, options))
        if repo_id != "someone/clips":
            raise huggingface_hub.errors.LocalEntryNotFoundError(f"no {repo_id}\nmore words")
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return snapshot, asked


def test_a_pipeline_comes_from_the_hub_without_code(hub, run):
    loaded = VideoPipeline.from_pretrained("someone/clips", revision="main", token="t")
    assert torch.equal(latents(loaded), latents(VideoPipeline.from_pretrained(run / "final")))
    (name, options), *_ = hub[1]
    assert name == "someone/clips" and options["revision"] == "main" and options["token"] == "t"
    assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in options["allow_patterns"])
    assert torch.equal(latents(build.load_pipeline(Path("someone/clips"))), latents(loaded))


def test_a_repository_is_judged_like_a_folder(hub, tmp_path):
    snapshot, _ = hub
    (tmp_path / "secret.txt").write_text("secret")
    (snapshot / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(SavedError, match="a link that leads out"):
        VideoPipeline.from_pretrained("someone/clips")
    (snapshot / "notes.txt").unlink()
    (snapshot / "model_index.json").unlink()
    (snapshot / "model_index.json").write_text('{"_class_name": "VideoPipeline", "transformer": ["os", "system"]}')
    with pytest.raises(SavedError, match="transformer names"):
        VideoPipeline.from_pretrained("someone/clips")


@pytest.mark.parametrize("hidden", [{"auto_map": {"a": "b"}}, [{"quantization_config": {}}]])
def test_what_leads_elsewhere_is_found_deep_in_a_config(tmp_path, hidden):
    make().save_pretrained(tmp_path)
    file = tmp_path / "text_encoder/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "text_config": {"more": hidden}}))
    with pytest.raises(SavedError, match="sends its reader to other code"):
        VideoPipeline.from_pretrained(tmp_path)


def test_a_pipeline_without_settings_is_sampled(tmp_path):
    make().save_pretrained(tmp_path / "run")
    index = tmp_path / "run/model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "sampling": None, "objective": None}))
    size = ["--num_frames", "4", "--height", "16", "--width", "16", "--num_inference_steps", "1"]
    cli.sample([str(tmp_path / "run"), "--prompt", CAPTIONS[0], *size, "--wandb", "disabled", "--device", "cpu"])
    assert list((tmp_path / "run/samples").glob("*.mp4"))


@pytest.mark.parametrize("name", ["someone/other", "../x", "/etc", "a/b/c", "https://x/y"])
def test_names_of_nothing_are_refused_in_a_sentence(hub, name):
    with pytest.raises(SavedError) as error:
        VideoPipeline.from_pretrained(name)
    assert name.rpartition("//")[2] in str(error.value) and "\n" not in str(error.value)
    assert [asked for asked, _ in hub[1]] == (["someone/other"] if name == "someone/other" else [])


def test_raw_weights_are_not_on_the_hub(hub):
    with pytest.raises(build.BuildError, match="someone/clips is fetched from the hub and holds one set of weights"):
        build.load_pipeline(Path("someone/clips"), "raw")
    assert not hub[1]


@pytest.mark.parametrize("name", ["runs/quickstart", "mine/typo"])
def test_a_folder_that_is_not_here_is_not_looked_up_on_the_hub(hub, tmp_path, monkeypatch, name):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    words = {"runs/quickstart": "runs/quickstart is not here", "mine/typo": "mine/ is a folder here and holds no typo"}
    with pytest.raises(SavedError, match=words[name]):
        VideoPipeline.from_pretrained(name)
    with pytest.raises(build.BuildError, match=words[name]):
        build.load_pipeline(Path(name))
    with pytest.raises(LoraError, match=words[name]):
        VideoPipeline.lora_state_dict(name)
    (tmp_path / "runs").mkdir()
    with pytest.raises(SavedError, match="is a folder here and holds no"):
        VideoPipeline.from_pretrained(name)
    assert not hub[1]


def test_sampling_from_the_hub_writes_beside_us(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.sample(["someone/clips", "--prompt", CAPTIONS[0], "--wandb", "disabled", "--device", "cpu"])
    assert (tmp_path / "samples/clips/000-seed0.mp4").is_file() and not (tmp_path / "someone").exists()


def test_paths_are_told_by_their_last_name_alone():
    told = [
        "/a/b",
        "../clients/acme",
        "~/acme",
        "clients/2026/acme",
        "./acme",
        "owner/name",
        "a red / blue ball",
        "pca",
    ]
    kept = ["b", "acme", "acme", "acme", "acme", "owner/name", "a red / blue ball", "pca"]
    assert export._without_folders({"x": told}) == {"x": kept}


def test_export_needs_no_words_of_its_own():
    assert export._plain("a|b `c` **d** <e>\nf") == "a b c d e f"
