"""Every config that is shipped plans without a warning and takes a training step, every cell of every study among them.

By default whole runs of one step of the configs that stand alone, and a seeded handful of the cells; the rest is slow. What
is too large for the memory of a small machine is planned only: DRY.
"""

import random
from pathlib import Path

import pytest
import torch

from stgen import build, config, schema
from stgen.describe import dry_run
from stgen.ema import EMA
from stgen.lab import study
from stgen.objective import Objective
from stgen.optim import build as build_optimizer
from stgen.optim import clip_and_check, named_parameters
from stgen.source import Batch
from stgen.step import accumulate
from stgen.train import train

ROOT = Path(__file__).parents[2]
ALL = sorted((ROOT / "configs").rglob("*.yaml"))
STUDIES = [
    path for path in ALL if any(line.startswith(("axes:", "variants:")) for line in path.read_text().splitlines())
]
PRESETS = [path for path in ALL if path.parent.name == "models"]  # a preset is extended by a config that limits the run
ALONE = [path for path in ALL if path not in STUDIES and path not in PRESETS]
DRY = {"l"}  # models/l.yaml: 458 M parameters are 7 GB of weights, gradients and moments
CAPTIONS = ["a red circle moving up", "a blue square moving left"]
ONE_STEP = [
    "train.max_train_steps=1", "train.max_train_seconds=null", "train.num_train_epochs=null", "train.train_batch_size=2",
    "train.gradient_accumulation_steps=1", "data.shapes.clips=24", "data.held_out_clips=0", "data.dataloader_num_workers=0",
    "codec.fit_clips=16", "validation.steps=null", "validation.num_inference_steps=1", "validation.judged_noises=0",
    "validation.prompts=[a red circle]", "log.wandb=disabled", "optim.lr_warmup_steps=1",
]  # fmt: skip


def name(path: Path) -> str:
    return path.relative_to(ROOT / "configs").with_suffix("").as_posix()


def one_step(cfg: schema.Config) -> None:
    """An optimiser step on latents of noise, without a folder of videos."""
    parts = build.build_parts(cfg, CAPTIONS)
    for module in parts.trained.values():
        module.train()
    shape = build.codec.as_codec(parts.codec).latent_shape(cfg.data.num_frames, cfg.data.height, cfg.data.width)
    count = cfg.train.train_batch_size
    latents = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))
    batch = Batch(latents, (CAPTIONS * count)[:count], ["x.mp4"] * count)
    names, optimizer, ema = (
        named_parameters(parts.trained),
        build_optimizer(parts.trained, cfg.optim),
        EMA(parts.trained, 0.9),
    )
    before = {name: weight.detach().clone() for name, weight in names.items()}
    parts.transformer.at_step(0)
    loss = accumulate(cfg, parts.transformer, parts, Objective(**cfg.objective.model_dump()), batch, 0)
    norm = clip_and_check(names.values(), cfg.optim.max_grad_norm)
    assert 0 < norm < float("inf") and 0 < loss < float("inf")
    optimizer.step()
    ema.update(0)
    assert any(not torch.equal(before[name], weight) for name, weight in names.items())
    assert all(weight.isfinite().all() for weight in names.values())


def test_every_file_is_a_preset_a_study_or_stands_alone():
    assert (
        len(PRESETS) >= 4 and len(STUDIES) >= 5 and {"quickstart", "ablations/base"} <= {name(path) for path in ALONE}
    )


@pytest.mark.parametrize("path", ALONE, ids=name)
def test_a_config_that_stands_alone_trains_one_step_to_its_end(tmp_path, path, figure):
    cfg = config.load(path, [*ONE_STEP, f"run.output_dir={tmp_path / 'run'}"], schema.Config)
    assert "parameters" in dry_run(config.load(path, [], schema.Config), CAPTIONS)
    assert train(cfg)["steps"] == 1
    assert (tmp_path / "run" / "final" / "model_index.json").is_file()
    figure("shipped configs planned and run from end to end with one step")


@pytest.mark.parametrize("path", [
    pytest.param(path, marks=pytest.mark.slow if path.stem == "b" else ()) for path in PRESETS if path.stem not in DRY
], ids=name)  # fmt: skip
def test_a_preset_takes_a_step(path, figure):
    small = ["data.num_frames=4", "data.height=24", "data.width=24", "train.train_batch_size=1"]
    one_step(config.load(path, [*ONE_STEP, *small], schema.Config))
    figure("shipped presets trained for a step")


@pytest.mark.parametrize("path", PRESETS, ids=name)
def test_a_preset_is_planned(path):
    assert "parameters" in dry_run(config.load(path, ["train.max_train_steps=1"], schema.Config), CAPTIONS)


def cells(path: Path) -> list[study.Cell]:
    return study.load(path, ["train.train_batch_size=1"])[1:]  # the base stands alone


@pytest.mark.parametrize("path", STUDIES, ids=name)
def test_cells_of_a_study_take_a_step(path):
    chosen = random.Random(path.stem).choice(cells(path))
    assert "parameters" in dry_run(chosen.cfg, CAPTIONS)
    one_step(chosen.cfg)


@pytest.mark.slow
@pytest.mark.parametrize("path", STUDIES, ids=name)
def test_every_cell_of_a_study_takes_a_step(path, figure):
    found = cells(path)
    for cell in found:
        assert "parameters" in dry_run(cell.cfg, CAPTIONS), cell.name
        one_step(cell.cfg)
    figure("cells of shipped studies planned and trained for a step", len(found))
