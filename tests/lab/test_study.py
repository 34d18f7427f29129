"""Studies: cells that differ from the base as they say, studies that are refused, and shipped ones that vary something."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stgen import build, codec, config, schema
from stgen.attention.attend import Heads
from stgen.lab import study
from stgen.mixers.sequences import SequenceMixer
from stgen.tokens import grid_of

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(p for p in Path("configs/ablations").glob("*.yaml") if "axes:" in p.read_text())


def model_of(cfg):
    component = build.build_codec(cfg)
    shape = codec.as_codec(component).latent_shape(cfg.data.num_frames, cfg.data.height, cfg.data.width)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build.build_transformer(cfg, shape, 8)
    return model, grid_of(tuple(shape[1:]), cfg.tokens.patch_size)


def said(cell, base):
    """The keys that a cell changes; of a mixer that the base does not write, the whole mixer."""
    new = [key.split(".")[:3] for key in cell.changes if key.startswith("model.mixers.")]
    new = [".".join(steps) for steps in new if steps[2] not in base.cfg.model.mixers]
    return (*cell.changes, *new)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_a_shipped_variant_differs_from_its_base_in_what_it_says_and_varies_something(path):
    base, *variants = study.load(path, [])
    assert variants
    dense, grid = model_of(base.cfg)
    assert grid.tokens >= 128 and grid.t >= 8
    for cell in variants:
        changed = {key.partition(": ")[0] for key in config.differences(base.cfg, cell.cfg)}
        assert all(key.startswith(said(cell, base)) for key in changed) and changed, cell.name
        if len(cell.changes) > 1:
            continue
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
    cells = study.load(path, ["model.width=64", "seeds=[7]"])
    assert [(c.name, c.key, c.value) for c in cells] == [
        ("base", "", None), ("a", "model.plan", "spatial"), ("twelve", "model.depth", 12),
    ]  # fmt: skip
    assert all(isinstance(c.cfg, schema.Config) and c.cfg.model.width == 64 for c in cells)
    assert study.read(path, ["model.width=64", "seeds=[7]"]).seeds == [7]
    assert torch.tensor([c.cfg.model.depth for c in cells]).tolist() == [6, 6, 12]


# ------------------------------------------------------------------------------------------------------- the format


def written(tmp_path, text, base="train: {max_train_steps: 1}\nmodel: {plan: joint}\n"):
    (tmp_path / "base.yaml").write_text(base)
    (tmp_path / "study.yaml").write_text("base: base.yaml\n" + text)
    return tmp_path / "study.yaml"


def test_variants_change_several_keys(tmp_path):
    text = "axes: {model.depth: {four: 4}}\nvariants:\n  both: {model.plan: spatial temporal, model.depth: 2}\n"
    base, four, both = study.load(written(tmp_path, text), [])
    assert both.cfg.model.plan == "spatial temporal" and both.cfg.model.depth == 2
    assert dict(both.changes) == {"model.plan": "spatial temporal", "model.depth": 2}
    assert four.cfg.model.plan == "joint" and not base.changes
    assert both.but({"model.mlp.ratio": 2}).model.plan == "spatial temporal"
    assert both.but({"model.mlp.ratio": 2}).model.mlp.ratio == 2


def test_a_grid_is_every_combination_and_the_base_stands_for_its_own(tmp_path):
    text = (
        "grid: true\naxes:\n  model.plan: {joint: joint, latte: spatial temporal}\n  model.depth: {six: 6, two: 2}\n"
        "variants: {wide: {model.width: 256}}\n"
    )
    cells = study.load(written(tmp_path, text), [])
    assert [cell.name for cell in cells] == ["base", "joint x two", "latte x six", "latte x two", "wide"]
    assert cells[3].cfg.model.plan == "spatial temporal" and cells[3].cfg.model.depth == 2


def test_a_study_that_cannot_be_run_is_refused_in_one_line(tmp_path):
    axes = "axes: {model.plan: {a: spatial}}\n"
    refused = {
        "axes: {}\n": "name at least one change",
        axes + "seeds: []\n": "seeds: should be a list of 1 or more",
        axes + "seeds: [0, 0]\n": "seeds: one is given twice",
        axes + "match: parms\n": "match: should be one of none, steps, params, flops, time",
        axes + "match: params\n": "match: params needs keys that may change",
        axes + "match: steps\nadjust: [model.depth]\n": "adjust: match steps changes no key",
        axes + "match: flops\nadjust: [model.heads]\n": "should be one of model.depth, model.width, model.mlp.ratio",
        axes + "match: flops\nseconds: 60\n": "seconds: they are a budget of match time",
        axes + "axis: 3\n": "axis: unknown key; did you mean axes",
    }
    for text, words in refused.items():
        with pytest.raises(config.ConfigError) as told:
            study.load(written(tmp_path, text), [])
        assert words in str(told.value) and "study.yaml" in str(told.value) and len(told.value.errors) == 1


def test_cells_that_cannot_stand_side_by_side_are_refused(tmp_path):
    refused = {
        "axes: {run.seed: {one: 1}}\n": "list the seeds under seeds",
        "axes: {run.output_dir: {one: x}}\n": "run.output_dir is set for every run by the runner",
        "axes: {train.max_train_steps: {two: 2}}\n": "train.max_train_steps is set by match steps; write steps, or match: none",
        "axes: {model.depth: {two: 2}}\nmatch: flops\nadjust: [model.depth]\n": "take it out of one of them",
        "axes: {model.plan: {a b: spatial}, model.depth: {a-b: 2}}\n": "a-b and a b would share a folder",
        "axes: {model.plan: {Base: spatial}}\n": "Base and base would share a folder",
        "axes: {model.plan: {'??': spatial}}\n": "'??' cannot name a folder",
        "grid: true\naxes: {model.plan: {a: spatial, b: spatial}}\n": "b is the same config as a",
        "axes: {model.plan: {a: spatial}}\nvariants: {b: {model.plan: spatial}}\n": "b is the same config as a",
    }
    for text, words in refused.items():
        with pytest.raises(study.StudyError, match=re.escape(words)) as told:
            study.load(written(tmp_path, text), [])
        assert "study.yaml" in str(told.value) and "\n" not in str(told.value)


def test_overrides_that_would_not_hold_are_refused(tmp_path):
    path = written(tmp_path, "axes: {model.plan: {a: spatial}}\n")
    for override in ("run.seed=1", "train.max_train_steps=9", "log.name=x"):
        with pytest.raises(study.StudyError, match=f"override: {override.split('=')[0]} is set"):
            study.load(path, [override])
    assert len(study.load(path, ["train.max_train_steps=9", "match=none"])) == 2


def test_a_refused_value_names_its_cell(tmp_path):
    with pytest.raises(config.ConfigError, match=r"model\.depth.*in cell deep of .*study\.yaml"):
        study.load(written(tmp_path, "variants: {deep: {model.plan: joint, model.depth: -1}}\n"), [])


def test_a_study_is_read_without_torch(tmp_path):
    path = written(tmp_path, "axes: {model.plan: {a: spatial}}\n")
    script = (
        "import sys\nfrom pathlib import Path\nfrom stgen.lab import results, statistics, study\n"
        f"study.load(Path({str(path)!r}), [])\nprint('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "False"
