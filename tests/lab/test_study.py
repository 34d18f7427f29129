"""Studies: cells that differ from the base in one key, and shipped ones that vary what they say they vary."""

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stgen import build, codec, config, schema
from stgen.attention.attend import Heads
from stgen.lab import study
from stgen.mixers.sequences import SequenceMixer
from stgen.tokens import grid_of

SHIPPED = sorted(p for p in Path("configs/ablations").glob("*.yaml") if "axes:" in p.read_text())


def model_of(cfg):
    component = build.build_codec(cfg)
    shape = codec.as_codec(component).latent_shape(cfg.data.num_frames, cfg.data.height, cfg.data.width)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build.build_transformer(cfg, shape, 8)
    return model, grid_of(tuple(shape[1:]), cfg.tokens.patch_size)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_a_shipped_variant_differs_from_its_base_in_one_key_and_varies_something(path):
    base, *variants = study.load(path, [])
    assert variants
    dense, grid = model_of(base.cfg)
    assert grid.tokens >= 128 and grid.t >= 8
    for cell in variants:
        changed = {key.partition(": ")[0] for key in config.differences(base.cfg, cell.cfg)}
        assert all(key.startswith(cell.key) for key in changed) and changed, cell.name
        model, _ = model_of(cell.cfg)
        model.at_step(10**6)  # of schedules the last value
        runs = [module for module in model.modules() if isinstance(module, Heads)]
        if cell.key.endswith("pattern"):
            waits = "plateau" in str(cell.value)
            assert waits or all(run.density(grid)[0] < 0.999 for run in runs), (
                f"{cell.name} keeps every pair, as full does"
            )
        if cell.key == "model.plan":
            mixers = runs + [module for module in model.modules() if isinstance(module, SequenceMixer)]
            assert any(mixer.layout.sequence(grid)[0] > 1 for mixer in mixers), f"{cell.name} is joint attention"
        if cell.key.endswith("reuse"):
            assert model.work(grid, 4).executed < dense.work(grid, 4).executed, f"{cell.name} saves nothing"


def write(tmp_path, axes):
    (tmp_path / "base.yaml").write_text("train: {max_train_steps: 1}\nmodel: {plan: joint}\n")
    (tmp_path / "study.yaml").write_text(f"base: base.yaml\naxes:\n{axes}")
    return tmp_path / "study.yaml"


def test_two_names_of_one_config_are_refused(tmp_path):
    with pytest.raises(study.StudyError, match="again is the same config as base; leave it out"):
        study.load(write(tmp_path, "  model.plan: {again: joint}\n"), [])
    with pytest.raises(study.StudyError, match="b is the same config as a"):
        study.load(write(tmp_path, "  model.plan: {a: spatial, b: spatial}\n"), [])


def test_a_key_or_value_that_the_config_refuses_is_told_as_ever(tmp_path):
    with pytest.raises(config.ConfigError, match=r"did you mean model\.plan"):
        study.load(write(tmp_path, "  model.plam: {a: spatial}\n"), [])
    with pytest.raises(config.ConfigError, match="no mixer is called 'spatiel'"):
        study.load(write(tmp_path, "  model.plan: {a: spatiel}\n"), [])


def test_cells_carry_their_key_and_value(tmp_path):
    path = write(tmp_path, "  model.plan: {a: spatial}\n  model.depth: {twelve: 12}\n")
    cells = study.load(path, ["run.seed=3"])
    assert [(c.name, c.key, c.value) for c in cells] == [
        ("base", "", None), ("a", "model.plan", "spatial"), ("twelve", "model.depth", 12),
    ]  # fmt: skip
    assert all(isinstance(c.cfg, schema.Config) and c.cfg.run.seed == 3 for c in cells)
    assert torch.tensor([c.cfg.model.depth for c in cells]).tolist() == [6, 6, 12]
