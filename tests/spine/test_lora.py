"""LoRA from end to end: a run fine-tuned by train.py, its checkpoints and resume, its adapter in sample.py and in a pipeline."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stgen import build, cli, config, lora, schema
from stgen.lora import LoraError
from stgen.lora_spec import Lora
from stgen.model import VideoTransformer
from stgen.pipeline import VideoPipeline
from stgen.train import train

pytest.importorskip("peft")

TINY = """
data: {num_frames: 4, height: 16, width: 16, shapes: {clips: 12}, held_out_clips: 2}
codec: {kind: pca, patch_size: [2, 8, 8], components: 6}
text: {kind: words, width: 8}
model: {width: 16, depth: 2, heads: 2}
optim: {lr_warmup_steps: 0, learning_rate: 0.01}
train: {max_train_steps: 2, train_batch_size: 4}
checkpoint: {steps: 2}
validation: {num_inference_steps: 2, steps: null}
log: {wandb: disabled}
run: {device: cpu}
"""
FILE = "pytorch_lora_weights.safetensors"
PROMPT = "a red circle moving left"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A finished run, and one of LoRA on it."""
    home = tmp_path_factory.mktemp("runs")
    (home / "tiny.yaml").write_text(TINY)
    train(cfg(home, "base"))
    train(cfg(home, "tuned", *tuning(home)))
    return home


def cfg(home: Path, name: str, *overrides: str) -> schema.Config:
    data = [] if name == "base" else [f"data.train_data_dir={home / 'base/data/shapes'}"]
    data = data if data and Path(data[0].partition("=")[2]).is_dir() else []
    return config.load(home / "tiny.yaml", [f"run.output_dir={home / name}", *data, *overrides], schema.Config)


def tuning(home: Path, rank: int = 2) -> list[str]:
    return [f"model.pretrained={home / 'base'}", f"lora.rank={rank}", "train.max_train_steps=4"]


def frames(pipeline, seed=0):
    return pipeline.clips([PROMPT], [seed], [""])[0]


def latents(pipeline):
    generator = torch.Generator().manual_seed(0)
    return pipeline(PROMPT, generator=generator, output_type="latent").frames


# ------------------------------------------------------------------------------------------------------------ training


def test_only_adapters_are_trained_and_kept(home):
    checkpoint = home / "tuned/checkpoint-4"
    names = set(load_file(checkpoint / "model.safetensors"))
    assert names and all(".lora_A." in name or ".lora_B." in name for name in names)
    assert set(load_file(checkpoint / "ema.safetensors")) == names
    moments = load_file(checkpoint / "optimizer.safetensors")
    assert {name.rpartition(".")[0] for name in moments} == names
    ends = {name.partition(".lora_")[0].rpartition(".")[2] for name in names}
    assert ends == {"to_qkv", "to_out"}
    summary = json.loads((home / "tuned/summary.json").read_text())
    assert summary["parameters"] == sum(x.numel() for x in load_file(checkpoint / "model.safetensors").values())


def test_the_merged_pipeline_is_the_base_with_the_adapter(home):
    base = VideoPipeline.from_pretrained(home / "base/final")
    merged = VideoPipeline.from_pretrained(home / "tuned/final")
    assert not any("lora" in name for name in merged.transformer.state_dict())
    before = latents(base)
    base.load_lora_weights(home / "tuned")
    torch.testing.assert_close(latents(base), latents(merged), rtol=1e-4, atol=1e-5)
    assert (latents(merged) - before).abs().max() > 1e-4
    for key, tensor in merged.text_encoder.state_dict().items():
        assert torch.equal(tensor, base.text_encoder.state_dict()[key])


def test_a_resumed_run_is_the_run_that_was_not_stopped(home):
    train(cfg(home, "again", *tuning(home), "checkpoint.steps=2"))
    left = home / "again/checkpoint-4"
    for file in left.iterdir():
        file.unlink()
    left.rmdir()
    train(cfg(home, "again", *tuning(home), "run.resume_from_checkpoint=latest"))
    for group in ("model", "ema", "optimizer"):
        ours, theirs = (load_file(home / name / f"checkpoint-4/{group}.safetensors") for name in ("again", "tuned"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_checkpoint_is_sampled_as_the_final_pipeline(home):
    final, checkpoint = build.load_pipeline(home / "tuned"), build.load_pipeline(home / "tuned/checkpoint-4")
    torch.testing.assert_close(latents(checkpoint), latents(final), rtol=1e-4, atol=1e-5)


def test_projections_may_be_adapted_apart_and_the_mlp_too(home):
    targets = "lora.target_modules=[to_q, to_v, mlp.up]"
    train(cfg(home, "apart", *tuning(home), targets, "train.max_train_steps=1"))
    names = {name.partition(".lora_")[0].rpartition(".")[2] for name in load_file(home / "apart" / FILE)}
    assert names == {"to_q", "to_v", "up"}
    base, merged = (VideoPipeline.from_pretrained(home / name / "final") for name in ("base", "apart"))
    base.load_lora_weights(home / "apart")
    torch.testing.assert_close(latents(base), latents(merged), rtol=1e-4, atol=1e-5)


def test_all_weights_may_go_on_from_a_pretrained_pipeline(home):
    train(
        cfg(home, "whole", f"model.pretrained={home / 'base'}", "optim.learning_rate=1e-12", "train.max_train_steps=1")
    )
    base, whole = (VideoPipeline.from_pretrained(home / name / "final") for name in ("base", "whole"))
    for part in ("transformer", "text_encoder", "codec"):
        left, right = (getattr(pipeline, part).state_dict() for pipeline in (base, whole))
        assert all(torch.allclose(left[key], right[key], atol=1e-8) for key in left)
    torch.testing.assert_close(latents(build.load_pipeline(home / "whole/checkpoint-1")), latents(whole))


# ------------------------------------------------------------------------------------------------------ diffusers' face


def test_the_methods_of_diffusers(home, tmp_path):
    pipeline = VideoPipeline.from_pretrained(home / "base/final")
    before = latents(pipeline)
    pipeline.load_lora_weights(home / "tuned", adapter_name="left")
    pipeline.load_lora_weights(str(home / "tuned" / FILE), adapter_name="right")
    assert pipeline.get_list_adapters() == {"transformer": ["left", "right"]}
    pipeline.set_adapters(["left", "right"], [0.5, 0.5])
    half = latents(pipeline)
    pipeline.set_adapters("left", 1.0)
    whole = latents(pipeline)
    torch.testing.assert_close(half, whole, rtol=1e-4, atol=1e-5)
    pipeline.disable_lora()
    assert torch.equal(latents(pipeline), before)
    pipeline.enable_lora()
    pipeline.fuse_lora(lora_scale=1.0)
    torch.testing.assert_close(latents(pipeline), whole, rtol=1e-4, atol=1e-5)
    pipeline.unfuse_lora()
    lora.save(pipeline, tmp_path)
    pipeline.unload_lora_weights()
    torch.testing.assert_close(latents(pipeline), before, rtol=1e-4, atol=1e-5)  # fusing and unfusing rounds
    pipeline.load_lora_weights(tmp_path)
    torch.testing.assert_close(latents(pipeline), whole, rtol=1e-4, atol=1e-5)


def test_alpha_comes_from_the_header(home, tmp_path):
    pipeline = VideoPipeline.from_pretrained(home / "base/final")
    with safe_open(home / "tuned" / FILE, framework="pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
    assert told["transformer.lora_alpha"] == 2 and told["transformer.r"] == 2
    written = {"lora_adapter_metadata": json.dumps({**told, "transformer.lora_alpha": 6})}
    save_file(load_file(home / "tuned" / FILE), tmp_path / FILE, metadata=written)
    pipeline.load_lora_weights(tmp_path)
    strong = latents(pipeline)
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(home / "tuned")
    pipeline.set_adapters("default_0", 3.0)
    torch.testing.assert_close(strong, latents(pipeline), rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- sample.py


def sample(run, out, *more) -> bytes:
    options = ["--prompt", PROMPT, "--output_dir", str(out), "--wandb", "disabled", "--device", "cpu"]
    cli.sample([str(run), *options, *map(str, more)])
    return (out / "000-seed0.mp4").read_bytes()


def test_sample_with_an_adapter(home, tmp_path):
    own = sample(home / "base", tmp_path / "own")
    none = sample(home / "base", tmp_path / "none", "--lora", home / "tuned", "--lora_scale", 0)
    strong = sample(home / "base", tmp_path / "strong", "--lora", home / "tuned" / FILE, "--lora_scale", 50)
    assert own == none != strong
    told = json.loads((tmp_path / "strong/000-seed0.json").read_text())
    assert told["lora"] == str(home / "tuned" / FILE) and told["lora_scale"] == 50


@pytest.mark.parametrize("name", ["missing", "base"])
def test_sample_says_what_is_no_adapter(home, tmp_path, capsys, name):
    with pytest.raises(SystemExit):
        sample(home / "base", tmp_path, "--lora", home / name)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and str(home / name) in said and said.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["lora.rank=2"], "write model.pretrained"),
        (["lora.rank=-1"], "lora.rank"),
        (["lora.rank=2", "model.pretrained=x", "distributed.kind=fsdp"], "distributed.kind: ddp"),
    ],
)
def test_configs_without_meaning(home, overrides, words):
    with pytest.raises(config.ConfigError, match=words):
        cfg(home, "bad", *overrides)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.width=32"], "trained with width 16, the config says 32"),
        (["model.mixers={temporal: {pattern: causal}}"], "trained with mixers"),
        (["objective.prediction_type=sample"], "trained with prediction_type v_prediction, the config says sample"),
        (["lora.target_modules=[to_nothing]"], "no linear layer's name ends with to_nothing; there are "),
    ],
)
def test_a_pipeline_of_another_form(home, overrides, words):
    with pytest.raises((build.BuildError, LoraError), match=words) as error:
        build.build_parts(cfg(home, "bad", *tuning(home), *overrides), ["red"])
    assert "\n" not in str(error.value)


def test_a_folder_without_a_pipeline(home, tmp_path):
    with pytest.raises(build.BuildError, match="holds no saved pipeline"):
        build.build_parts(cfg(home, "bad", f"model.pretrained={tmp_path}"), ["red"])


HOSTILE = {
    "no safetensors": b"PK\x03\x04 a pickle",
    "another model's": {"transformer.blocks.9.mixing.0.branches.0.to_qkv.lora_A.weight": (2, 16)},
    "another width": {"transformer.blocks.0.mixing.0.branches.0.to_qkv.lora_A.weight": (2, 24)},
    "no adapter": {"transformer.blocks.0.mlp.up.weight": (64, 16)},
    "a text encoder's": {"text_encoder.lora_A.weight": (2, 8)},
    "no matrix": {
        "transformer.blocks.0.mixing.0.branches.0.to_qkv.lora_A.weight": (2, 16),
        "transformer.blocks.0.mixing.0.branches.0.to_qkv.lora_B.weight": (),
    },
    "unequal ranks": {
        "transformer.blocks.0.mixing.0.branches.0.to_qkv.lora_A.weight": (2, 16),
        "transformer.blocks.0.mixing.0.branches.0.to_qkv.lora_B.weight": (48, 3),
    },
    "empty": {},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_files_that_are_no_adapter_for_this_model(home, tmp_path, name):
    content = HOSTILE[name]
    if isinstance(content, bytes):
        (tmp_path / FILE).write_bytes(content)
    else:
        save_file({key: torch.zeros(shape) for key, shape in content.items()}, tmp_path / FILE)
    pipeline = VideoPipeline.from_pretrained(home / "base/final")
    before = pipeline.transformer.state_dict().keys()
    with pytest.raises(LoraError) as error:
        pipeline.load_lora_weights(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert pipeline.transformer.state_dict().keys() == before


@pytest.mark.parametrize(
    "told",
    [
        {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
        {"target_modules": "(a+)+$", "auto_mapping": {"base_model_class": "x", "parent_library": "os"}},
        {"loftq_config": {"x": 1}, "init_lora_weights": "pissa", "base_model_name_or_path": "a/b"},
    ],
)
def test_of_a_header_only_numbers_are_taken(home, tmp_path, told):
    header = json.dumps({f"transformer.{key}": value for key, value in told.items()})
    save_file(load_file(home / "tuned" / FILE), tmp_path / FILE, metadata={"lora_adapter_metadata": header})
    pipeline = VideoPipeline.from_pretrained(home / "base/final")
    pipeline.load_lora_weights(tmp_path)
    assert "antigravity" not in sys.modules
    found = next(iter(pipeline.transformer.peft_config.values()))
    assert not isinstance(found.target_modules, str) and found.auto_mapping is None and found.megatron_config is None
    model = VideoPipeline.from_pretrained(home / "base/final").transformer
    model.load_lora_adapter(tmp_path)
    assert next(iter(model.peft_config.values())) == found and "antigravity" not in sys.modules


def test_a_merge_that_fails_within_leaves_the_pipeline_as_it_was(home):
    pipeline = VideoPipeline.from_pretrained(home / "base/final")
    pipeline.load_lora_weights(home / "tuned")
    own = pipeline.transformer
    with pytest.raises(RuntimeError, match="within"), lora.merged(pipeline):
        assert pipeline.transformer is not own
        raise RuntimeError("within")
    assert pipeline.transformer is own


def test_only_safetensors_are_read(home):
    pipeline = VideoPipeline.from_pretrained(home / "base/final")
    for load in (pipeline.load_lora_weights, pipeline.transformer.load_lora_adapter):
        with pytest.raises(LoraError, match=r"weight_name: adapter\.bin is no safetensors file"):
            load(home / "tuned", weight_name="adapter.bin")


@pytest.mark.parametrize(
    "told", [b"[", b"1", b'{"transformer.lora_alpha": "x"}', b'{"transformer.alpha_pattern": {"a": 2}}']
)
def test_headers_that_cannot_be_followed(home, tmp_path, told):
    weights = load_file(home / "tuned" / FILE)
    save_file(weights, tmp_path / FILE, metadata={"lora_adapter_metadata": told.decode()})
    pipeline = VideoPipeline.from_pretrained(home / "base/final")
    if told == b"1":  # says nothing
        pipeline.load_lora_weights(tmp_path)
        return
    with pytest.raises(LoraError, match=str(tmp_path)):
        pipeline.load_lora_weights(tmp_path)


def test_without_peft_one_sentence_says_what_to_install():
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'peft' else find(name, *a)\n"
        "from stgen import lora, model\nfrom stgen.lora_spec import Lora\n"
        "try: lora.attach(None, Lora(rank=2))\nexcept lora.LoraError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "LoRA needs the peft library; run: pip install 'stgen[lora]'"


def test_attached_adapters_change_nothing_at_first():
    torch.manual_seed(0)
    model = VideoTransformer(4, (2, 2, 2), width=16, depth=2, heads=2, text_width=8).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    inputs = (torch.randn(1, 4, 2, 2, 2), torch.tensor([500.0]), torch.randn(1, 3, 8))
    before = model(*inputs)[0]
    lora.attach(model, Lora(rank=3, alpha=6.0))
    assert torch.equal(model(*inputs)[0], before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
