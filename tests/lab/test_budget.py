"""Cells that spend alike: parameters and FLOPs that are those of real models, sizes that match, steps that follow."""

import pytest

from stgen import build, config, flops, schema, source
from stgen.lab import budget, study
from stgen.tokens import Grid

TINY = """
data: {num_frames: 8, height: 32, width: 32}
codec: {patch_size: [2, 8, 8], components: 6}
text: {width: 16}
model: {width: 32, depth: 4, heads: 2, plan: joint, mixers: {joint: {order: tile, block: [2, 2, 2]}}}
train: {train_batch_size: 4, max_train_steps: 100}
"""


@pytest.fixture
def planned(tmp_path):
    """A function that plans a study given as text; the cells by name."""

    def make(text: str, speeds=None, base=TINY) -> dict[str, budget.Planned]:
        (tmp_path / "base.yaml").write_text(base)
        path = tmp_path / "study.yaml"
        path.write_text("base: base.yaml\n" + text)
        found = budget.plan(study.read(path), path, study.load(path, []), speeds)
        return {one.cell.name: one for one in found}

    return make


def real(cfg: schema.Config) -> tuple[int, int]:
    """(parameters, executed FLOPs a step) of a model with weights."""
    parts = build.build_parts(cfg, source.known_captions(cfg))
    work = flops.step_work(parts.transformer, Grid(4, 4, 4), 6, cfg.train.train_batch_size, False)
    return flops.trainable(parts.trained), work.executed


def test_costs_are_those_of_the_model_that_is_trained(planned):
    cells = planned(
        "axes: {model.mixers.joint.pattern: {top: {kind: topk, ratio: 0.25}}, model.plan: {both: spatial>temporal}}"
    )
    for one in cells.values():
        assert (one.cost.parameters, one.cost.executed) == real(one.cfg), one.cell.name
    assert cells["top"].cost.executed < cells["top"].cost.dense == cells["base"].cost.dense
    assert cells["both"].cost.parameters > cells["base"].cost.parameters


@pytest.mark.parametrize(
    "adjust", ["[model.mlp.ratio]", "[model.depth, model.mlp.ratio]", "[model.width, model.depth]"]
)
def test_parameters_are_matched(planned, adjust):
    cells = planned(
        f"axes: {{model.plan: {{both: spatial>temporal}}}}\nmatch: params\nadjust: {adjust}\ntolerance: 0.1"
    )
    base, both = cells["base"], cells["both"]
    parameters = real(both.cfg)[0]
    assert both.solved and all(key in adjust for key in both.solved)
    assert both.mismatch == pytest.approx(parameters / base.cost.parameters - 1)
    assert abs(both.mismatch) < (0.02 if "ratio" in adjust else 0.1)
    assert both.cfg.model.plan == "spatial>temporal" and both.steps == base.steps == 100
    assert base.cfg.model == cells["base"].cell.cfg.model and not base.solved


def test_the_nearest_sizes_are_found(planned):
    """No width near the one that was chosen comes nearer."""
    text = "axes: {model.plan: {both: spatial>temporal}}\nmatch: params\nadjust: [model.width]\ntolerance: 1"
    both = planned(text)["both"]
    sketches, target = budget.Sketches(), planned(text)["base"].cost.parameters
    for width in range(16, 49, 4):
        other = sketches.cost(both.cell.but({"model.width": width})).parameters / target - 1
        assert abs(other) >= abs(both.mismatch) - 1e-12


def test_a_cell_that_matches_as_it_is_stays_as_it_is(planned):
    cells = planned(
        "axes: {model.plan: {latte: spatial temporal}}\nmatch: params\nadjust: [model.width, model.mlp.ratio]"
    )
    assert not cells["latte"].solved and cells["latte"].mismatch == 0


def test_a_match_out_of_reach_is_told_in_one_line(planned):
    text = "axes: {model.plan: {both: spatial>temporal}}\nmatch: params\nadjust: [model.depth]\ntolerance: 0.001"
    with pytest.raises(
        study.StudyError, match=r"both cannot have the base's parameters .* list more keys under adjust"
    ):
        planned(text)
    with pytest.raises(study.StudyError, match=r"match: flops counts from the base's steps.*write steps: 1000"):
        base = TINY.replace("max_train_steps: 100", "max_train_seconds: 9")
        planned("axes: {model.plan: {a: spatial}}\nmatch: flops", base=base)


def test_equal_flops_give_steps_and_sizes_keep_them_equal(planned):
    axes = (
        "axes: {model.plan: {both: spatial>temporal}, model.mixers.joint.pattern: {top: {kind: topk, ratio: 0.25}}}\n"
    )
    cells = planned(axes + "match: flops\nsteps: 5000")
    total = 5000 * cells["base"].cost.executed
    for one in cells.values():
        assert one.steps * real(one.cfg)[1] == pytest.approx(total, rel=1e-3)
        assert one.cfg.train.max_train_steps == one.steps
    assert cells["both"].steps < 5000 < cells["top"].steps and not cells["top"].solved
    sized = planned(axes + "match: flops\nsteps: 5000\nadjust: [model.mlp.ratio]")["both"]
    assert abs(sized.steps / 5000 - 1) < 0.05 and sized.cfg.model.mlp.ratio < 4


def test_sparsity_that_follows_a_schedule_is_counted_as_it_falls(planned):
    falling = "{kind: linear, start: 1.0, end: 0.25, steps: 1000}"
    cells = planned(
        f"axes: {{model.mixers.joint.pattern: {{falling: {{kind: topk, ratio: {falling}}}, "
        "low: {kind: topk, ratio: 0.25}, high: {kind: topk, ratio: 1.0}}}\nmatch: flops\nsteps: 1000"
    )
    low, falling, high = (cells[name].cost.executed for name in ("low", "falling", "high"))
    assert low < falling < high
    assert falling == pytest.approx((low + high) / 2, rel=0.03)
    assert cells["high"].steps <= cells["falling"].steps <= cells["low"].steps


def test_equal_seconds_follow_the_measured_speeds(planned):
    def speeds(cfgs):
        return [budget.Speed(0.1 if cfg.model.plan == "joint" else 0.05, 0.01) for cfg in cfgs]

    axes = "axes: {model.plan: {latte: spatial temporal}}\nmatch: time\n"
    assert {name: one.steps for name, one in planned(axes, speeds).items()} == {"base": 100, "latte": 200}
    assert {name: one.steps for name, one in planned(axes + "seconds: 5", speeds).items()} == {"base": 50, "latte": 100}


def test_without_a_match_a_cell_may_vary_its_limit(planned):
    cells = planned("axes: {train.max_train_steps: {twice: 200}}\nmatch: none")
    assert {name: one.cfg.train.max_train_steps for name, one in cells.items()} == {"base": 100, "twice": 200}
    assert {name: one.steps for name, one in cells.items()} == {"base": 100, "twice": 200}


def test_speed_is_measured_and_what_cannot_run_says_why(tmp_path, capsys):
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(TINY)
    bad.write_text(TINY.replace("text: {width: 16}", f"text: {{kind: transformers, path: {tmp_path}}}"))
    budget.main([str(good), str(bad)])
    ready, first, second = capsys.readouterr().out.splitlines()
    assert ready == "{}" and '"step"' in first and '"forward"' in first and '"failure"' in second
    speed = budget.measure_speed(config.load(good, [], schema.Config), timed=1)
    assert speed.step > speed.forward > 0


def test_a_solved_ratio_gives_whole_hidden_channels():
    for hidden in range(8, 400, 8):
        for width in (12, 28, 100, 128, 1152):
            assert int(width * budget._ratio(hidden, width)) == hidden
