"""stgen inspect: the maps it measures are those of the model, its masks those of the layouts, its advice what it says."""

import json
import math
import re

import pytest
import torch

from stgen import cli, config, schema
from stgen.attention import plan, reuse
from stgen.attention.attend import Mixer
from stgen.attention.spec import AttentionMixer
from stgen.build import build_parts
from stgen.lab import inspect_statistics as statistics
from stgen.lab.inspect_advice import advice
from stgen.lab.inspect_masks import draw, mixers_of, runs_of, support_rows
from stgen.lab.inspect_statistics import (
    ClipIn,
    Maps,
    Sample,
    Study,
    UseStatistics,
    map_rows,
    measure,
    similarity,
    study,
)
from stgen.objective import Objective
from stgen.ops.support import Support
from stgen.tokens import Grid, coordinates
from stgen.train import train

GRID = Grid(3, 4, 5)
CPU = torch.device("cpu")
TINY = [
    "data.num_frames=6", "data.height=16", "data.width=16", "data.shapes.clips=24", "data.dataloader_num_workers=0",
    "codec.patch_size=[2,4,4]", "codec.components=6", "codec.fit_clips=8", "text.width=16",
    "model.width=16", "model.depth=2", "model.heads=2", "train.train_batch_size=4", "train.max_train_steps=3",
    "validation.steps=null", "validation.num_inference_steps=1", "log.wandb=disabled",
]  # fmt: skip


def mixer_of(registers=0, grid=GRID, heads=2, depth=1, **keys) -> Mixer:
    spec = AttentionMixer.model_validate(keys)
    uses = reuse.place(plan.parse("m", depth), {"m": spec}, heads)
    torch.manual_seed(0)
    mixer = Mixer(uses[0][0][0][0], 8, grid, registers)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter)
    return mixer


def drawn_qkv(registers=0, heads=2, grid=GRID):
    g = torch.Generator().manual_seed(1)
    return torch.randn(3, 1, registers + grid.tokens, heads, 8, generator=g).unbind(0)


def sample_of(mixer, entries=1 << 30, grid=GRID) -> Sample:
    return Sample.of(runs_of(mixer)[0].layout, grid, mixer.use.heads, entries, CPU)


# --------------------------------------------------------------------------------------------------------------- masks


def test_rows_of_a_support_are_those_of_its_dense_mask():
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(3, 2, 13, 11, generator=g) < 0.4
    mask[:, :, :4, 3:6] = True  # a pair of blocks that is kept whole
    support = Support.from_mask(mask, (4, 3))
    groups, rows = torch.tensor([2, 0, 2]), torch.tensor([[0, 12], [5, 3], [7, 7]])
    expected = torch.stack([mask[g][:, r] for g, r in zip(groups, rows, strict=True)])
    assert torch.equal(support_rows(support, groups, rows), expected)


@pytest.mark.parametrize(
    "keys",
    [
        {"layout": "temporal"},
        {"layout": "window", "size": [2, 3, 2], "order": "tile", "block": [1, 2, 2]},
        {"layout": "spatial", "pattern": {"kind": "causal"}, "normaliser": {"kind": "linear"}},
    ],
)
def test_the_plane_of_full_attention_is_the_layout(keys):
    [heads] = runs_of(mixer_of(**keys))
    drawing = draw(heads, GRID)
    assert torch.equal(drawing.plane.bool(), heads.layout.same_sequence(GRID))
    for view in drawing.views:
        number = int(torch.tensor(view.query) @ torch.tensor([20, 5, 1]))
        assert torch.equal(view.seen.flatten(), drawing.plane[number])


def test_a_view_of_a_local_pattern_is_its_box_under_registers_and_sinks():
    keys = {
        "pattern": {"kind": "local", "radius": [1, 1, 0]},
        "block": [1, 2, 2],
        "sink": {"kind": "tokens", "count": 3},
    }
    [heads] = runs_of(mixer_of(registers=2, **keys))
    near = (coordinates(GRID) - torch.tensor([1, 2, 2])).abs() <= torch.tensor([1, 1, 0])
    assert torch.equal(draw(heads, GRID).views[0].seen.flatten().bool(), near.all(-1))


def test_a_chosen_pattern_is_drawn_as_an_example_and_says_so():
    [heads] = runs_of(mixer_of(pattern={"kind": "topk", "ratio": 0.25, "level": "token"}))
    drawing = draw(heads, GRID)
    assert "random queries and keys" in drawing.note
    assert torch.equal(draw(heads, GRID).plane, drawing.plane)
    q, k, _ = drawn_qkv()
    real = draw(heads, GRID, (q, k))
    best = (q[0].transpose(0, 1) @ k[0].permute(1, 2, 0)).argmax(-1)  # [heads, N]: every query keeps its best key
    assert "random" not in real.note
    for row in best:
        assert bool((real.plane.gather(1, row[:, None]) > 0).all())


# ---------------------------------------------------------------------------------------------------------------- maps


SPECS = [
    {"layout": "spatial"},
    {"layout": "window", "size": [2, 3, 2], "shift": [1, 0, 1], "sink": {"kind": "logit"}},
    {"order": "tile", "block": [2, 2, 2], "pattern": {"kind": "topk", "ratio": 0.3}},
    {"block": [2, 2, 2], "pattern": {"kind": "cluster", "clusters": 3}, "sink": {"kind": "tokens", "count": 2}},
    {"layout": "temporal", "pattern": {"kind": "local", "radius": 1}, "sink": {"kind": "tokens", "count": 2}},
    {"normaliser": {"kind": "relu"}, "block": [1, 2, 2], "pattern": {"kind": "random", "blocks": 3}},
    {"normaliser": {"kind": "off_by_one"}, "order": "tile", "block": [2, 3, 3]},
]


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("keys", SPECS, ids=str)
def test_sampled_rows_are_those_of_the_map_that_the_model_applies(keys, registers):
    mixer = mixer_of(registers, depth=2, **keys)
    [heads] = runs_of(mixer)
    q, k, _ = drawn_qkv(registers)
    whole = heads.map(q, k, GRID)  # [S, heads, front + places, sinks + front + places]
    for entries in (1 << 30, 300):
        sample = sample_of(mixer, entries)
        assert bool(sample.words) == (entries == 300)
        maps = map_rows(heads, q, k, GRID, sample)
        places = heads.layout.sequence(GRID)[1]
        front = whole.shape[2] - places
        for s, sequence in enumerate(sample.sequences):
            order = sample.order[s][sample.there[s]]
            rows = sample.order[s][sample.rows][maps.valid[s]]
            expected = whole[sequence][:, front + rows]  # [heads, r, m]
            found = maps.weights[s][:, maps.valid[s]]
            torch.testing.assert_close(found[..., sample.there[s]], expected[..., -places:][..., order])
            assert not found[..., ~sample.there[s]].any()
            sinks = expected.shape[-1] - places - front
            kept = expected[..., :sinks].sum(-1)
            if heads.sink.logit(q) is not None:
                kept = 1 - expected.sum(-1)
            torch.testing.assert_close(maps.sink[s][:, maps.valid[s]], kept)
            torch.testing.assert_close(
                maps.registers[s][:, maps.valid[s]], expected[..., sinks : sinks + front].sum(-1)
            )


@pytest.mark.parametrize("pattern", ["full", "causal"])
def test_the_map_of_linear_attention_gives_its_output(pattern):
    mixer = mixer_of(layout="joint", normaliser={"kind": "linear"}, pattern={"kind": pattern})
    [heads] = runs_of(mixer)
    q, k, v = drawn_qkv()
    maps = map_rows(heads, q, k, GRID, sample_of(mixer))
    out = (maps.weights @ v.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(out, heads(q, k, v, GRID)[0])


# ------------------------------------------------------------------------------------------------------------ measures


def planted(weights: torch.Tensor, sink: float = 0.0) -> Maps:
    """Maps [s, heads, n, n] of tokens alone."""
    weights = weights.float() * (1 - sink)
    rest = torch.zeros(weights.shape[:3])
    return Maps(weights, torch.ones_like(weights).bool(), rest + sink, rest, torch.ones(rest[:, 0].shape).bool())


def test_measures_of_known_maps():
    n = GRID.tokens
    where = coordinates(GRID).float()
    sample = sample_of(mixer_of())
    even, own, first = torch.full((n, n), 1 / n), torch.eye(n), torch.zeros(n, n)
    first[:, 7] = 1
    found = measure(planted(torch.stack([even, own, first])[None]), sample, GRID)
    torch.testing.assert_close(found["entropy"], torch.tensor([math.log(n), 0, 0]))
    torch.testing.assert_close(found["entropy_share"], torch.tensor([1.0, 0, 0]))
    torch.testing.assert_close(found["keys"], torch.tensor([0.9, 1 / n, 1 / n]), atol=1 / n, rtol=0)
    frames = (where[:, None, 0] - where[None, :, 0]).abs()
    in_frame = (where[:, None, 1:] - where[None, :, 1:]).norm(dim=-1)
    torch.testing.assert_close(found["frames"], torch.stack([frames.mean(), frames[0, 0], frames[:, 7].mean()]))
    torch.testing.assert_close(found["in_frame"], torch.stack([in_frame.mean(), in_frame[0, 0], in_frame[:, 7].mean()]))
    torch.testing.assert_close(found["even_frames"], frames.mean().expand(3))
    torch.testing.assert_close(found["hub"], torch.tensor([1 / n, 0, 1]))
    assert int(found["hub_at"][2].argmax()) == 7
    torch.testing.assert_close(found["first"], torch.tensor([1 / 3, 0, 1]))
    torch.testing.assert_close(found["within_frames"][1], torch.ones(3))
    torch.testing.assert_close(found["within_frames"][0, 0], (frames == 0).float().mean())


def test_measures_of_tokens_do_not_depend_on_the_mass_of_the_sink():
    g = torch.Generator().manual_seed(0)
    weights = torch.rand(1, 2, GRID.tokens, GRID.tokens, generator=g).softmax(-1)
    sample = sample_of(mixer_of())
    plain, sunk = (measure(planted(weights, sink), sample, GRID) for sink in (0.0, 0.25))
    torch.testing.assert_close(sunk.pop("sink"), torch.full((2,), 0.25))
    assert not plain.pop("sink").any()
    torch.testing.assert_close(sunk, plain)


def test_similarity_is_one_minus_total_variation():
    n = GRID.tokens
    even, own = planted(torch.full((1, 1, n, n), 1 / n)), planted(torch.eye(n)[None, None])
    torch.testing.assert_close(similarity(even, even), torch.ones(1))
    torch.testing.assert_close(similarity(even, own), torch.full((1,), 1 / n))


# -------------------------------------------------------------------------------------------------------------- advice


def advice_on(*maps: torch.Tensor, mass: float = 0.0, **keys) -> list[str]:
    """Of layers that use one mixer, with planted joint maps [heads, N, N] each."""
    spec = AttentionMixer.model_validate(keys)
    uses = [layer[0][0][0] for layer in reuse.place(plan.parse("m", len(maps)), {"m": spec}, len(maps[0]))]
    sample, found, statistics_ = sample_of(mixer_of(heads=len(maps[0]))), [planted(m[None], mass) for m in maps], []
    for use, one in zip(uses, found, strict=True):
        values = {name: value[None] for name, value in measure(one, sample, GRID).items()}
        statistics_.append(UseStatistics(use, runs_of(Mixer(use, 8, GRID, 0)), sample, "", values))
    between = torch.stack([torch.stack([similarity(a, b) for b in found]) for a in found])
    return advice(Study(GRID, [0.5], statistics_, between, torch.ones(len(maps), 1, 1), {}))


def noisy(seed: int, sharp: float = 4.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (sharp * torch.randn(1, GRID.tokens, GRID.tokens, generator=g)).softmax(-1)


def near(radius: list[int], outside: float) -> torch.Tensor:
    """Random weights within a box, and `outside` of the mass beyond it."""
    where = coordinates(GRID)
    box = ((where[:, None] - where[None]).abs() <= torch.tensor(radius)).all(-1)
    inner, outer = noisy(3)[0] * box, noisy(4)[0] * ~box
    return ((1 - outside) * inner / inner.sum(-1, keepdim=True) + outside * outer / outer.sum(-1, keepdim=True))[None]


def test_nothing_is_advised_where_nothing_stands_out():
    assert advice_on(noisy(0), noisy(1), noisy(2)) == []


@pytest.mark.parametrize(("alike", "words"), [(0, "every: 2"), (1, "source: 0"), (2, None)])
def test_layers_that_could_share_a_map(alike, words):
    other = [noisy(2), noisy(2)] if alike == 0 else [noisy(2), noisy(5)]
    pair = [noisy(0), noisy(0 if alike < 2 else 7)]
    lines = advice_on(*pair, *other)
    assert [words in line for line in lines] == ([True] if words else [])


def test_a_layer_that_reuses_is_not_advised_to():
    assert advice_on(noisy(0), noisy(0), reuse={"what": "kv", "every": 2}) == []


@pytest.mark.parametrize(("outside", "found"), [(0.0, True), (0.01, True), (0.2, False)])
def test_local_heads(outside, found):
    lines = advice_on(torch.cat([noisy(0), near([0, 1, 1], outside)]))
    assert len(lines) == found
    if found:
        assert (
            "layer 0, m, head 1" in lines[0] and "heads: {'1': {pattern: {kind: local, radius: [0, 1, 1]}}}" in lines[0]
        )


@pytest.mark.parametrize(("mass", "found"), [(0.5, True), (0.2, False)])
@pytest.mark.parametrize(("normaliser", "sink"), [("softmax", "logit"), ("relu", "tokens")])
def test_a_missing_sink(mass, found, normaliser, sink):
    weights = noisy(0, sharp=1.0) * (1 - mass)
    weights[..., 23] += mass
    lines = advice_on(weights, normaliser={"kind": normaliser})
    assert len(lines) == found
    if found:
        assert "frame 1, row 0, column 3" in lines[0] and f"sink: {{kind: {sink}}}" in lines[0]


def test_even_maps_and_an_unused_sink():
    even = torch.full((1, GRID.tokens, GRID.tokens), 1 / GRID.tokens)
    assert ["normaliser: {kind: linear}" in line for line in advice_on(even)] == [True]
    assert ["linear" in line for line in advice_on(even, order="tile")] == [False]
    keys = {"sink": {"kind": "tokens"}}
    assert ["the sink (tokens) takes 0.5%" in line for line in advice_on(noisy(0), mass=0.005, **keys)] == [True]
    assert advice_on(noisy(0), mass=0.05, **keys) == []


def test_what_is_advised_can_be_written(tmp_path):
    even = torch.full((1, GRID.tokens, GRID.tokens), 1 / GRID.tokens)
    sinking = noisy(0, sharp=1.0) * 0.5
    sinking[..., 23] += 0.5
    first, second = torch.cat([noisy(0), near([0, 1, 1], 0)]), torch.cat([noisy(5), near([0, 1, 1], 0)])
    lines = [
        *advice_on(first, second),
        *advice_on(torch.cat([noisy(1), sinking])),
        *advice_on(torch.cat([noisy(1), even])),
    ]
    lines += [*advice_on(near([0, 1, 1], 0)), *advice_on(first, first)]
    lines += advice_on(noisy(0), mass=0.005, sink={"kind": "logit"})
    assert len(lines) >= 8
    for line in lines:
        [words] = re.findall('"([^"]+)"', line)
        given = words.removeprefix("reuse: ")
        given = f"{{reuse: {given}}}" if given != words else f"{{{words}}}"
        make(tmp_path, f"model.mixers.m={given[:-1]}, layout: joint}}", "model.plan=m", "model.depth=2")


# --------------------------------------------------------------------------------------------------------- whole models


def make(tmp_path, *overrides: str) -> schema.Config:
    path = tmp_path / "tiny.yaml"
    path.write_text("{}\n")
    return config.load(path, [*TINY, f"run.output_dir={tmp_path / 'run'}", *overrides], schema.Config)


def studied(cfg: schema.Config) -> tuple[Study, list[Mixer]]:
    transformer = build_parts(cfg, ["a"]).transformer.eval()
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    g = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 1, 6, 3, 4, 4, generator=g)
    clips = [ClipIn(latents, noise, torch.randn(1, 2, 16, generator=g), torch.ones(1, 2).bool())]
    return study(transformer, Objective(), Grid(3, 4, 4), clips, [0.2, 0.8]), mixers_of(transformer)


def test_every_way_of_reuse_is_measured_or_says_why_not(tmp_path):
    mixers = {
        "k": "{layout: joint, reuse: {what: kv, every: 2}}",
        "m": "{layout: joint, reuse: {what: map, every: 2}}",
        "s": "{layout: joint, block: [1, 2, 2], pattern: topk, reuse: {what: support, every: 2}}",
        "o": "{layout: joint, reuse: {what: output, every: 2}}",
        "t": "{layout: joint, pattern: three_way}",
        "h": "{layout: joint, heads: {'0': {pattern: three_way}}}",
    }
    keys = [f"model.mixers.{name}={value}" for name, value in mixers.items()]
    found, _ = studied(make(tmp_path, "model.depth=10", "model.plan=k*2 m*2 s*2 o*2 t h", *keys))
    notes = [one.note for one in found.uses]
    assert [bool(one.values) for one in found.uses] == [True, True, True, False, True, True, True, False, False, True]
    assert notes[3] == "map of an earlier layer" and notes[7] == "output of an earlier layer"
    assert "three_way" in notes[8] and "three_way" in notes[9]
    assert found.uses[9].mean("entropy").isnan().tolist() == [True, False]
    assert found.between_layers[0, 1].isfinite().all() and found.between_layers[0, 3].isnan().all()
    assert torch.equal(found.between_layers.nan_to_num(9), found.between_layers.transpose(0, 1).nan_to_num(9))
    torch.testing.assert_close(found.between_times[0].diagonal(), torch.ones(2))
    assert 0 < found.between_times[0, 0, 1] < 1


def test_a_support_taken_from_an_earlier_layer_is_the_one_measured(tmp_path):
    keys = "model.mixers.s={block: [1, 2, 2], pattern: {kind: topk, ratio: 0.3}, reuse: {what: support, every: 2}}"
    transformer = build_parts(make(tmp_path, "model.plan=s", keys), ["a"]).transformer.eval()
    mixers, grid = mixers_of(transformer), Grid(3, 4, 4)
    watched = {
        i: statistics.Watched(one, runs_of(one), Sample.of(runs_of(one)[0].layout, grid, 2, 1 << 30, CPU))
        for i, one in enumerate(mixers)
    }
    with statistics.watching(watched, grid) as seen, torch.no_grad():
        transformer(torch.randn(1, 6, 3, 4, 4), torch.tensor([500.0]), torch.randn(1, 2, 16))
    assert torch.equal(seen.maps[0].allowed, seen.maps[1].allowed)
    assert not seen.maps[0].allowed.all() and not torch.equal(seen.maps[0].weights, seen.maps[1].weights)
    assert not mixers[0]._forward_pre_hooks


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    window = "model.mixers.w={layout: window, size: [2, 2, 2], shift: [0, 1, 1], sink: {kind: logit}}"
    train(make(folder, "model.depth=3", "model.plan=joint w w", "model.registers=1", window))
    return folder / "run"


def test_a_run_is_measured_drawn_and_written(run_folder, tmp_path, capsys):
    options = ["--clips", "2", "--times", "2", "--device", "cpu", "--wandb", "disabled"]
    cli.inspect([str(run_folder), *options])
    out = run_folder / "inspect"
    assert {"plan.png", "heads.png", "similarity_layers.png", "similarity_times.png"} <= {p.name for p in out.iterdir()}
    found = json.loads((out / "statistics.json").read_text())
    assert [layer["mixer"] for layer in found["layers"]] == ["joint", "w", "w"]
    entropy = found["layers"][0]["measured"]["entropy_share"]
    assert len(entropy["mean"]) == 2 and all(0 < x <= 1 for row in entropy["by_time"] for x in row)
    assert found["layers"][0]["measured"]["sink"]["mean"] == [None, None]
    assert all(0 < x < 1 for x in found["layers"][1]["measured"]["sink"]["mean"])
    assert all(0 < x < 1 for x in found["layers"][1]["measured"]["registers"]["mean"])
    assert found["between_layers"] == []  # the window of the second is shifted
    printed = capsys.readouterr().out
    assert "suggestions" in printed and "measured on 2 held-out clips at 2 times" in printed
    [line] = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if "attn/00-joint" in line]
    assert line["attn/00-joint/entropy_share"] == pytest.approx(sum(entropy["mean"]) / 2, abs=1e-4)

    cli.inspect([str(run_folder / "checkpoint-3"), *options, "--output_dir", str(tmp_path / "again")])
    again = json.loads((tmp_path / "again" / "statistics.json").read_text())
    assert again["layers"] == found["layers"] and again["clips"] == found["clips"]


def test_a_config_is_drawn_without_training(tmp_path, capsys):
    path = tmp_path / "tiny.yaml"
    path.write_text("{}\n")
    topk = "model.mixers.k={order: tile, pattern: topk, heads: {'1': {normaliser: relu}}}"
    overrides = [*TINY, f"run.output_dir={tmp_path / 'run'}", "model.plan=spatial>k", topk]
    cli.inspect([str(path), *overrides])
    assert (tmp_path / "run-inspect" / "plan.png").is_file() and not (tmp_path / "run").exists()
    printed = capsys.readouterr().out
    assert "random queries and keys" in printed and "3 x 16" in printed and "0, 1  spatial" in printed


@pytest.mark.parametrize(
    ("target", "extra", "code", "words"),
    [
        ("nowhere", [], 1, "neither a config file nor a run folder"),
        ("empty", [], 1, "neither a run folder, nor a checkpoint"),
        ("bad.yaml", [], 2, "config error: model.widht: unknown key"),
        ("run", ["--clips", "0"], 2, "--clips: 0 should be at least 1"),
        ("run/final", ["model.width=3"], 2, "leave out 'model.width=3'"),
    ],
)
def test_what_cannot_be_inspected_ends_in_one_line(run_folder, tmp_path, capsys, target, extra, code, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.yaml").write_text("model: {widht: 3}\ntrain: {max_train_steps: 1}\n")
    path = run_folder.parent / target if target.startswith("run") else tmp_path / target
    with pytest.raises(SystemExit) as stopped:
        cli.inspect([str(path), *extra])
    said = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == code and words in said[-1] and (len(said) == 1 or extra)


def test_a_run_without_attention_has_no_maps_to_measure(tmp_path, capsys):
    train(make(tmp_path, "model.plan=tcn"))
    with pytest.raises(SystemExit):
        cli.inspect([str(tmp_path / "run"), "--device", "cpu", "--wandb", "disabled"])
    assert "no mixer of its plan (tcn) attends" in capsys.readouterr().err
