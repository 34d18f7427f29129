"""stgen quantise: the errors it tells are those of rounding by hand, and runs are compared as they measure."""

import json
import math

import pytest
import torch

from stgen import cli, config, schema
from stgen.attention.approximate import integers
from stgen.attention.attend import Mixer
from stgen.build import build_parts
from stgen.lab.inspect_masks import mixers_of, runs_of
from stgen.lab.inspect_statistics import ClipIn, Sample, forward_at, map_rows
from stgen.lab.quantisation import measure
from stgen.lab.quantisation_report import RunErrors, UseErrors, compare, compared_in_words, in_words
from stgen.model import VideoTransformer
from stgen.objective import Objective
from stgen.tokens import Grid
from stgen.train import train

GRID = Grid(3, 4, 4)
TINY = [
    "data.num_frames=6", "data.height=16", "data.width=16", "data.shapes.clips=24", "data.dataloader_num_workers=0",
    "codec.patch_size=[2,4,4]", "codec.components=6", "codec.fit_clips=8", "text.width=16",
    "model.width=16", "model.depth=2", "model.heads=2", "train.train_batch_size=4", "train.max_train_steps=3",
    "validation.steps=null", "validation.num_inference_steps=1", "log.wandb=disabled",
]  # fmt: skip


def make(tmp_path, *overrides, folder="run") -> schema.Config:
    path = tmp_path / "tiny.yaml"
    path.write_text("{}\n")
    return config.load(path, [*TINY, f"run.output_dir={tmp_path / folder}", *overrides], schema.Config)


def drawn(tmp_path, *overrides) -> tuple[VideoTransformer, ClipIn]:
    """A model with random weights, and a clip."""
    transformer = build_parts(make(tmp_path, *overrides), ["a"]).transformer.eval()
    g = torch.Generator().manual_seed(0)
    for parameter in transformer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=g) * 0.3
    latents, noise = torch.randn(2, 1, 6, 3, 4, 4, generator=g)
    return transformer, ClipIn(latents, noise, torch.randn(1, 2, 16, generator=g), torch.ones(1, 2).bool())


def measured(tmp_path, *overrides) -> tuple[RunErrors, list[Mixer], list[tuple]]:
    """Errors of such a model at one time, and what its mixers were given, those of the first pass first."""
    transformer, clip = drawn(tmp_path, *overrides)
    given, mixers = [], mixers_of(transformer)
    for mixer in mixers:
        mixer.register_forward_pre_hook(lambda _, args: given.append(args))
    with torch.no_grad():
        return measure("one", transformer, Objective(), GRID, [clip], [0.5]), mixers, given


def error(found, exact, over):
    return ((found - exact).square().sum(over) / exact.square().sum(over)).sqrt().double()


@pytest.mark.parametrize("normaliser", ["softmax", "relu", "{kind: poly_logits}"])
def test_errors_zeros_and_scales_are_those_by_hand(tmp_path, normaliser):
    found, mixers, given = measured(tmp_path, "model.plan=joint", f"model.mixers.joint.normaliser={normaliser}")
    values, [run] = found.uses[0].values, runs_of(mixers[0])
    q, k, v = given[0][:3]
    exact, weights = run(q, k, v, GRID)[0], run.map(q, k, GRID)  # [1, N, heads, D], [1, heads, N, N]
    for bits in (8, 4):
        rounded = integers(weights, bits, signed=False)
        torch.testing.assert_close(values[f"map/int{bits}"], error(rounded, weights, (0, 2, 3)), rtol=1e-4, atol=1e-7)
        out = (rounded @ v.transpose(1, 2)).transpose(1, 2)
        torch.testing.assert_close(values[f"map/int{bits}/output"], error(out, exact, (0, 1, 3)), rtol=1e-3, atol=1e-6)
        step = weights.amax(-1, keepdim=True) / (2**bits - 1)
        rows = (weights / step.masked_fill(step == 0, 1)).round() * step
        torch.testing.assert_close(values[f"rows/int{bits}"], error(rows, weights, (0, 2, 3)), rtol=1e-3, atol=1e-6)
        keys = integers(k.transpose(1, 2), bits).transpose(1, 2)
        torch.testing.assert_close(values[f"k/int{bits}"], error(keys, k, (0, 1, 3)), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(
            values[f"k/int{bits}/output"], error(run(q, keys, v, GRID)[0], exact, (0, 1, 3)), rtol=1e-3, atol=1e-6
        )
        zeros = (rounded == 0).double().mean((0, 2, 3))
        torch.testing.assert_close(values[f"zeros/int{bits}"], zeros, rtol=0, atol=1e-9)
    torch.testing.assert_close(values["zeros"], (weights == 0).double().mean((0, 2, 3)), rtol=0, atol=1e-9)
    torch.testing.assert_close(values["largest/map"], weights.amax((0, 2, 3)).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(values["largest/v"], v.abs().amax((0, 1, 3)).double(), rtol=1e-6, atol=0)
    peak = weights.amax((0, 2, 3)) / (weights.square().sum((0, 2, 3)) / (weights != 0).sum((0, 2, 3))).sqrt()
    torch.testing.assert_close(values["peak"], peak.double(), rtol=1e-4, atol=0)
    assert (values["zeros"] > 0.2).all() == (normaliser == "relu")


def test_the_prediction_is_that_of_a_model_that_rounds(tmp_path):
    keys = "model.mixers.joint={{normaliser: relu, approximate: {}}}"
    found, mixers, _ = measured(tmp_path, "model.plan=joint", keys.format("{}"))
    plan = ["model.plan=joint", keys.format("{quantise: [map], bits: 4}")]
    models = [drawn(tmp_path, *one) for one in (["model.plan=joint", keys.format("{}")], plan)]
    exact, rounded = (forward_at(model, Objective(), clip, 0.5) for model, clip in models)
    assert found.prediction["map/int4"] == pytest.approx(float(error(rounded, exact, (0, 1, 2, 3, 4))), rel=1e-4)
    assert found.prediction["map/int8"] < found.prediction["map/int4"] <= found.prediction["all/int4"] * 1.5
    again, _, _ = measured(tmp_path, *plan)  # a run that was trained with rounding is measured without its own
    for name, value in found.uses[0].values.items():
        torch.testing.assert_close(again.uses[0].values[name], value, rtol=1e-9, atol=0, equal_nan=True)
    assert all(run.approximation is None for mixer in mixers for run in runs_of(mixer))


@pytest.mark.parametrize(
    ("keys", "registers"),
    [
        ("{layout: window, size: [2, 3, 3], shift: [1, 1, 1], normaliser: relu}", 0),
        ("{layout: window, size: [2, 3, 3], shift: [1, 1, 1]}", 0),  # queries that are not there have weights too
        ("{layout: window, size: [2, 3, 3], order: tile, block: [1, 2, 2], pattern: {kind: local, radius: 1}, "
         "normaliser: relu}", 2),
        ("{layout: joint, sink: {kind: tokens, count: 3}, heads: {'1': {normaliser: relu2}}}", 1),
        ("{layout: joint, order: tile, block: [1, 2, 2], pattern: {kind: topk, ratio: 0.5}, normaliser: relu}", 0),
    ],
)  # fmt: skip
def test_zeros_and_peak_are_those_between_tokens_that_may_attend(tmp_path, keys, registers):
    """Against the maps that `stgen inspect` makes by other means."""
    found, mixers, given = measured(tmp_path, "model.plan=m", f"model.mixers.m={keys}", f"model.registers={registers}")
    for one, mixer, (q, k, *_) in zip(found.uses, mixers, given[: len(mixers)], strict=True):
        sample = Sample.of(runs_of(mixer)[0].layout, GRID, mixer.use.heads, 1 << 30, torch.device("cpu"))
        for run in runs_of(mixer):
            own = slice(run.group.first, run.group.first + run.group.count)
            maps = map_rows(run, q[:, :, own], k[:, :, own], GRID, sample)
            count = maps.allowed.sum((0, 2, 3))
            zeros = ((maps.weights == 0) & maps.allowed).sum((0, 2, 3)) / count
            torch.testing.assert_close(one.values["zeros"][own], zeros.double(), rtol=0, atol=1e-6)
            some = (maps.weights != 0).any(-1).any(-1)  # [s, heads]
            square = (maps.weights.square().sum((2, 3)) / (maps.weights != 0).sum((2, 3)).clamp(min=1)).sqrt()
            peak = (maps.weights.amax((2, 3)) / square.masked_fill(~some, 1) * some).sum(0) / some.sum(0)
            torch.testing.assert_close(one.values["peak"][own], peak.double(), rtol=1e-4, atol=0, equal_nan=True)
            if not registers:
                rounded = integers(maps.weights, 4, signed=False)
                cost = error(rounded, maps.weights, (0, 2, 3))
                torch.testing.assert_close(one.values["map/int4"][own], cost, rtol=1e-4, atol=0, equal_nan=True)
    assert found.mean("zeros") > 0.1 or "relu" not in keys


def test_what_has_no_map_says_why(tmp_path):
    mixers = {
        "k": "{layout: joint, reuse: {what: kv, every: 2}}",
        "m": "{layout: joint, reuse: {what: map, every: 2}}",
        "s": "{layout: joint, block: [1, 2, 2], pattern: topk, reuse: {what: support, every: 2}}",
        "o": "{layout: joint, reuse: {what: output, every: 2}}",
        "t": "{layout: joint, pattern: three_way}",
        "l": "{layout: joint, normaliser: linear}",
    }
    keys = [f"model.mixers.{name}={value}" for name, value in mixers.items()]
    found, _, _ = measured(tmp_path, "model.depth=10", "model.plan=k*2 m*2 s*2 o*2 t l", *keys)
    notes = [one.note for one in found.uses]
    assert ["map/int8" in one.values for one in found.uses] == [True] * 3 + [
        False,
        True,
        True,
        True,
        False,
        False,
        False,
    ]
    assert (
        notes[3] == "map of an earlier layer" and notes[7] == "output of an earlier layer" and "three_way" in notes[8]
    )
    assert "no map" in notes[9] and (found.uses[9].values["q/int4/output"] > 0).all()
    assert math.isfinite(found.mean("map/int8")) and "layer 8, t: three_way" in in_words([found])


def test_runs_are_compared_with_the_first():
    def run(name, normaliser, costs):
        values = {f"map/int{bits}/output": torch.tensor(cost) for bits, cost in zip((8, 4), costs, strict=True)}
        return RunErrors(name, [UseErrors(0, "joint", normaliser, "", values)], {"map/int8": costs[0][0]})

    runs = [run("a", "softmax", ([0.02, 0.04], [0.3, 0.3])), run("b", "relu", ([0.01, 0.01], [0.6, 0.6]))]
    found = {one["of"]: one["times_less"] for one in compare(runs)}
    assert found == pytest.approx({"map/int8/output": 3.0, "map/int4/output": 0.5, "map/int8/prediction": 2.0})
    words = compared_in_words(compare(runs), runs)
    assert words.startswith("b (relu) against a (softmax)")
    assert "3.00 times less (1% against 3%)" in words and "2.00 times more (60% against 30%)" in words


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantise")
    for normaliser in ("softmax", "relu"):
        joint = f"model.mixers.joint={{normaliser: {normaliser}}}"
        train(make(folder, "model.plan=joint", joint, folder=normaliser))
    return folder


def test_trained_runs_are_measured_compared_and_written(runs, tmp_path, capsys):
    options = ["--clips", "2", "--times", "2", "--device", "cpu", "--wandb", "disabled"]
    cli.main(["quantise", str(runs / "softmax"), str(runs / "relu"), *options])
    printed = capsys.readouterr().out
    assert "relu (relu) against softmax (softmax)" in printed and "times" in printed.split("against softmax")[1]
    out = runs / "softmax" / "quantisation"
    assert {"quantisation.json", "quantisation.png", "metrics.jsonl"} <= {p.name for p in out.iterdir()}
    found = json.loads((out / "quantisation.json").read_text())
    softmax, relu = found["runs"]
    assert softmax["mean"]["zeros"] == 0 and 0.1 < relu["mean"]["zeros"] < 0.9
    assert len(relu["layers"]) == 2 and len(relu["layers"][1]["heads"]["largest/map"]) == 2
    assert 0 < softmax["mean"]["map/int8/output"] < softmax["mean"]["map/int4/output"] < 1
    [one] = [c for c in found["compared"] if c["of"] == "map/int4/output"]
    assert one["times_less"] == pytest.approx(
        softmax["mean"]["map/int4/output"] / relu["mean"]["map/int4/output"], rel=1e-4
    )
    line = json.loads((out / "metrics.jsonl").read_text().splitlines()[1])
    assert line["quantise/relu/zeros"] == pytest.approx(relu["mean"]["zeros"], rel=1e-4)

    cli.main(["quantise", str(runs / "relu" / "final"), *options, "--output_dir", str(tmp_path / "again")])
    again = json.loads((tmp_path / "again" / "quantisation.json").read_text())
    assert again["runs"][0]["layers"] == relu["layers"] and again["compared"] == []


@pytest.mark.parametrize(
    ("targets", "words"), [(["nowhere"], "neither a run folder"), (["relu", "relu"], "given twice; give each once")]
)
def test_what_cannot_be_measured_ends_in_one_line(runs, capsys, targets, words):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["quantise", *(str(runs / target) for target in targets)])
    said = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 1 and words in said[-1] and len(said) == 1
