"""sample.py under torchrun: every clip is made once and is the one-process clip; what a CPU can tell of little memory."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_sample import CAPTIONS, make

from stgen import cli
from stgen.model import VideoTransformer
from stgen.pipeline import VideoPipeline

ROOT = Path(cli.__file__).parents[1]
ROWS = [
    {"prompt": CAPTIONS[0], "seed": 3},
    {"prompt": CAPTIONS[1], "seed": 4},
    {"prompt": CAPTIONS[0], "seed": 5, "num_frames": 8},
    {"prompt": CAPTIONS[1], "seed": 6, "guidance_scale": 1.0},
    {"prompt": CAPTIONS[1], "seed": 3, "scheduler": "heun"},
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    make().save_pretrained(folder)
    rows = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder.parent / "prompts.jsonl").write_text(rows)
    return folder


def torchrun(ranks: int, saved, out, *more) -> subprocess.CompletedProcess:
    options = [
        "--prompt_file",
        saved.parent / "prompts.jsonl",
        "--output_dir",
        out,
        "--wandb",
        "disabled",
        "--device",
        "cpu",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, ROOT / "sample.py", saved, *options, *more],
        capture_output=True, text=True, env=environment, timeout=300, cwd=out.parent,
    )  # fmt: skip


def test_ranks_share_the_prompts_and_no_clip_changes(saved, tmp_path):
    cli.sample([
        str(saved), "--prompt_file", str(saved.parent / "prompts.jsonl"), "--output_dir", str(tmp_path / "one"),
        "--wandb", "disabled", "--device", "cpu", "--batch_size", "2",
    ])  # fmt: skip
    done = torchrun(2, saved, tmp_path / "two", "--batch_size", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("one", "two"))
    assert one == two and sum(name.endswith(".mp4") for name in one) == len(ROWS)
    for name in one:
        if name.endswith((".mp4", ".json")):
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert done.stdout.count(f"{len(ROWS)} clips in") == 1  # the first rank alone speaks


def test_ranks_refuse_what_one_process_could_do(saved, tmp_path):
    done = torchrun(2, saved, tmp_path / "out", "--output", "sheet")
    assert done.returncode != 0 and "sample without torchrun" in done.stderr


@pytest.mark.slow
def test_more_ranks_than_prompts(saved, tmp_path):
    done = torchrun(7, saved, tmp_path / "out")
    assert done.returncode == 0, done.stderr[-2000:]
    assert sum(path.suffix == ".mp4" for path in (tmp_path / "out").iterdir()) == len(ROWS)


def test_mistakes_are_told_before_torch_is_loaded(saved, tmp_path):
    """In a process of its own: which modules are loaded when the error is told."""
    script = (
        "import sys\nfrom stgen import cli\n"
        "try:\n    cli.sample(sys.argv[1:])\nexcept SystemExit as end:\n"
        "    print(end.code, [name for name in ('torch', 'diffusers') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for options, words in (
        (["--height", "20"], "height 20 is not divisible"),
        (["--scheduler", "ddim"], "scheduler ddim is for objective.path diffusion"),
        (["--prompt_file", str(tmp_path / "none.txt")], "is not a file"),
        (["--image", str(saved / "model_index.json")], "train with objective.frame_times=past"),
        (["--lora", str(tmp_path / "none")], "--lora: "),
        (["--vae_tiling"], "--vae_tiling: this run has no autoencoder"),
        (["--seed", "-1"], "--seed: "),
    ):
        done = subprocess.run(
            [sys.executable, "-c", script, str(saved), "--prompt", "red", *options],
            capture_output=True, text=True, env=environment, check=True,
        )  # fmt: skip
        assert done.stdout.strip() == "1 []", (options, done.stdout)
        assert words in done.stderr and done.stderr.count("\n") == 1


# --------------------------------------------------------------------------------------------------------------- chunks


def test_chunk_frames_may_be_a_column_and_a_mistake_names_what_suits(tmp_path, capsys):
    model = {"t": {"kind": "attention", "layout": "temporal", "memory": {"kind": "infini", "segment": 2}}}
    streaming = make(frame_times="past")
    streaming.register_modules(
        transformer=VideoTransformer(
            6, (4, 2, 2), width=16, depth=2, heads=2, text_width=8, plan="spatial t", mixers=model
        )
    )
    streaming.register_to_config(sampling={**streaming.config.sampling, "num_frames": 8})
    streaming.save_pretrained(tmp_path / "run")
    (tmp_path / "p.csv").write_text("prompt,num_frames,chunk_frames\na blue square,16,8\na blue square,16,\n")
    options = ["--output_dir", str(tmp_path / "out"), "--wandb", "disabled", "--device", "cpu"]
    cli.sample([str(tmp_path / "run"), "--prompt_file", str(tmp_path / "p.csv"), *options])
    told = [json.loads((tmp_path / f"out/00{i}-seed0.json").read_text())["chunk_frames"] for i in (0, 1)]
    assert told == [8, None]
    (tmp_path / "p.csv").write_text("prompt,num_frames,chunk_frames\na blue square,16,6\n")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.sample([str(tmp_path / "run"), "--prompt_file", str(tmp_path / "p.csv"), *options])
    assert "--chunk_frames: 6 frames do not suit this model; write 4; 8 would do too" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- little memory


def test_offloading_hears_of_a_codec_that_is_not_called_as_a_layer(saved):
    pipeline, heard = VideoPipeline.from_pretrained(saved), []
    pipeline.codec._hf_hook = SimpleNamespace(
        pre_forward=lambda module: heard.append(module)
    )  # as accelerate puts it there
    clip(pipeline)
    assert heard == [pipeline.codec]


def clip(pipeline):
    return pipeline(CAPTIONS[0], generator=torch.Generator().manual_seed(0), output_type="pt").frames


def test_offload_without_a_gpu_is_refused(saved, tmp_path, capsys):
    for how in ("model", "group", "sequential"):
        with pytest.raises(SystemExit):
            cli.sample(
                [
                    str(saved),
                    "--prompt",
                    "red",
                    "--device",
                    "cpu",
                    "--offload",
                    how,
                    "--output_dir",
                    str(tmp_path / "o"),
                ]
            )
        assert "error: --offload: " in capsys.readouterr().err


def test_group_offload_between_memories_changes_nothing(saved):
    plain, offloaded = VideoPipeline.from_pretrained(saved), VideoPipeline.from_pretrained(saved)
    cpu = torch.device("cpu")
    offloaded.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    assert torch.equal(clip(plain), clip(offloaded))
    blocks = VideoPipeline.from_pretrained(saved)
    blocks.transformer.enable_group_offload(
        onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1
    )
    assert torch.equal(clip(plain), clip(blocks))


def test_tiles_of_an_autoencoder(tmp_path, saved, capsys):
    """A small randomly initialised Wan autoencoder: with tiling on it decodes tile by tile, and sample.py turns it on."""
    import diffusers

    pipeline = make()
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=6, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 6, latents_std=[1.0] * 6
    ).eval()
    pipeline.register_modules(codec=vae)
    pipeline.config.sampling.update(num_frames=5)
    pipeline.register_to_config(sampling=dict(pipeline.config.sampling))
    pipeline.save_pretrained(tmp_path / "wan")
    tiled = []
    own = diffusers.AutoencoderKLWan.tiled_decode
    diffusers.AutoencoderKLWan.tiled_decode = lambda self, *a, **k: tiled.append(1) or own(self, *a, **k)
    try:
        size = ["--height", "320", "--width", "320", "--num_inference_steps", "1"]
        options = ["--prompt", "red", "--wandb", "disabled", "--device", "cpu", "--vae_tiling", *size]
        cli.sample([str(tmp_path / "wan"), *options, "--output_dir", str(tmp_path / "out")])
    finally:
        diffusers.AutoencoderKLWan.tiled_decode = own
    assert tiled and (tmp_path / "out/000-seed0.mp4").is_file()
