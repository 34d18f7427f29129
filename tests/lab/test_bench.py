"""stgen bench attention: it times what it says, compares with dense attention, and keeps what it has when interrupted.

And benchmarks/attention.py: what its contenders compute is the same, and it counts and judges as it says.
"""

import contextlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from stgen import config, schema
from stgen.attention import attend
from stgen.attention.pattern import PatternError
from stgen.lab import bench
from stgen.lab.bench import DENSE, JOINT, BenchError, Contender, Ladder, bench_attention
from stgen.ops.block_sparse_attention import block_sparse_attention
from stgen.ops.boxes import Boxes
from stgen.ops.support import Support
from stgen.testing.compiled import Report
from stgen.testing.cost import H200
from stgen.tokens import Grid

CPU = torch.device("cpu")
LOCAL = "{pattern: {kind: local, radius: 1}, sink: {kind: logit}}"
TINY = [
    *("data.num_frames=4", "data.height=8", "data.width=8", "codec={kind: pixels}", "tokens.patch_size=[1, 2, 2]"),
    *("model.width=16", "model.heads=2", "model.depth=4", "model.plan=spatial a spatial b"),
    *("train.train_batch_size=4", "train.gradient_accumulation_steps=2", "train.max_train_steps=1"),
    f"model.mixers.spatial={LOCAL}",
    *("model.mixers.a={layout: joint, normaliser: linear}", "model.mixers.b={layout: temporal, normaliser: relu}"),
]


def tiny(tmp_path, *overrides):
    (tmp_path / "base.yaml").write_text("train: {max_train_steps: 1}\n")
    return config.load(tmp_path / "base.yaml", [*TINY, *overrides], schema.Config)


@pytest.fixture
def impatient(monkeypatch):
    """Ladders end after some rungs, however fast the machine."""
    monkeypatch.setattr(bench, "RUNGS", range(-1, 2))


def test_every_mixer_of_the_plan_is_measured_beside_dense_attention(tmp_path, impatient, monkeypatch, capsys):
    impls = bench._impls  # without the interpreter, which is slow
    monkeypatch.setattr(bench, "_impls", lambda op: tuple(impl for impl in impls(op) if impl != "triton"))
    cfg = tiny(tmp_path)
    result = bench_attention(cfg, CPU, tmp_path / "out", repeats=1)
    rows = {row["mixer"]: row for row in result["rows"]}
    assert {name: row["layers"] for name, row in rows.items()} == {"spatial": [0, 2], "a": [1], "b": [3]}
    assert {name: set(row["rivals"]) for name, row in rows.items()} == {
        "spatial": {DENSE, JOINT},
        "a": {DENSE, JOINT},
        "b": {DENSE, JOINT},
    }
    assert all({"forward_ms", "forward_backward_ms"} <= row.keys() for row in rows.values())
    assert result["about"]["clips"] == 2, "clips of one part of the batch"
    impls = {(row["of"], row["impl"]) for row in result["implementations"] if "forward_ms" in row}
    assert {("spatial: block_sparse_attention", x) for x in ("auto", "reference", "gather")} <= impls
    assert {("a: linear_attention", x) for x in ("auto", "reference", "state")} <= impls
    assert {ladder["mixer"] for ladder in result["ladders"]} == set(rows)
    assert all(len(ladder["rungs"]) == 3 for ladder in result["ladders"])
    assert json.loads((tmp_path / "out/bench.json").read_text()) == result
    assert (tmp_path / "out/bench.png").stat().st_size > 0
    printed = capsys.readouterr().out
    assert "will run" in printed and "local (radius 1)" in printed and "faster" in printed


def test_what_is_taken_from_another_layer_is_measured_as_such(tmp_path, monkeypatch):
    mixers = "{x: {layout: temporal, reuse: {what: map}}, y: {layout: spatial, reuse: {what: output}}}"
    cfg = tiny(tmp_path, "model.plan=x y x y", f"model.mixers={mixers}")
    monkeypatch.setattr(bench, "RUNGS", range(0))
    result = bench_attention(cfg, CPU, tmp_path, repeats=1)
    by_name = {row["mixer"]: row for row in result["rows"]}
    assert list(by_name) == ["x (map lent)", "y (output lent)", "x (map taken)", "y (output taken)"]
    assert by_name["x (map lent)"]["density"] == 1.0 and by_name["x (map taken)"]["density"] == 0.5
    assert not any("failure" in row for row in by_name.values())


def test_dense_attention_has_no_dense_rival(tmp_path):
    cfg = tiny(tmp_path, "model.plan=joint height", "model.depth=2", "model.mixers={}")
    assert [list(bench._rivals(case)) for case in bench._cases(cfg)] == [[], [JOINT]]


def test_uses_of_a_mixer_at_another_cost_are_cases_of_their_own(tmp_path):
    mixers = "{x: {layout: temporal, reuse: {what: kv, source: 1}}, y: {layout: spatial}}"
    cfg = tiny(tmp_path, "model.depth=6", "model.plan=x x x y|z y z", f"model.mixers={mixers[:-1]}, z: {{}}}}")
    assert {case.name: case.layers for case in bench._cases(cfg)} == {
        "x": [0],
        "x (kv lent)": [1],
        "x (kv taken)": [2],
        "y (1 heads)": [3],
        "z (1 heads)": [3],
        "y": [4],
        "z": [5],
    }


def test_the_rival_in_a_layout_is_its_dense_attention(tmp_path):
    """Checked by value: a window's rival stays within the window, and in the shifted one when the mixer is shifted."""
    window = "{w: {layout: window, size: [2, 2, 2], shift: [1, 1, 1], pattern: {kind: local, radius: 1}}}"
    cfg = tiny(tmp_path, "model.plan=w", f"model.mixers={window}")
    shapes = bench.Shapes(Grid(4, 4, 4), 1, 8, 0, torch.float32, CPU)
    plain, shifted = bench._cases(cfg)
    assert (plain.layers, shifted.layers) == ([0, 2], [1, 3])
    x = torch.zeros(1, 64, 1, 8)
    v = torch.arange(64.0).view(1, 64, 1, 1).expand(1, 64, 1, 8)
    for case in (plain, shifted):
        layout = attend.Mixer(case.use, 8, shapes.grid, 0).runs[0].layout
        use = bench._rivals(case)[DENSE]
        out, _ = attend.Mixer(use, 8, shapes.grid, 0)(*(y.expand(1, 64, 2, 8) for y in (x, x, v)), shapes.grid, {})
        same = layout.same_sequence(shapes.grid).float()
        means = (same @ torch.arange(64.0)) / same.sum(-1)
        torch.testing.assert_close(out[0, :, 0, 0], means)


def test_a_plan_without_attention_is_refused(tmp_path):
    with pytest.raises(BenchError, match="no attention to measure"):
        bench._cases(tiny(tmp_path, "model.plan=gru", "model.mixers={}"))


def test_forward_and_backward_are_timed_and_a_failure_stays_its_own():
    passes = []

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            passes.append("forward")
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            passes.append("backward")
            return 2 * grad

    x, unused = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    good = Contender("good", CPU, lambda: [Doubled.apply(x)], [x, unused])
    bad = Contender("bad", CPU, lambda: [torch.ones(2) @ torch.ones(3)], [x])
    bench._take_turns("test", [good, bad], repeats=2)
    assert passes == ["forward", "forward", "backward"] * 3, "a warm-up and two counted rounds"
    assert len(good.forward) == len(good.both) == 2 and not good.slow
    assert "size" in bad.failure and bad.ms is None and bad.slow


def test_what_is_slow_is_measured_on_fewer_clips(monkeypatch):
    shapes = bench.Shapes(Grid(1, 2, 2), 1, 8, 0, torch.float32, CPU)
    step = Contender("step", CPU, lambda: [torch.ones(1, requires_grad=True) * 2], [])
    for seconds, clips in ((0.001, 16), (0.3, 3), (5.0, 1)):
        monkeypatch.setattr(bench, "_seconds", lambda call, device, seconds=seconds: seconds)
        step.both.clear()
        assert bench._clips(shapes, 2, 16, step) == clips


@pytest.mark.parametrize(
    "mixer, rival, expected",
    [
        ([1, 2, 4], [4, 4, 8], (None, 1)),
        ([5, 2, 4], [4, 4, 8], (1, 2)),
        ([5, 9, 4], [4, 4, 8], (2, 4)),  # from where on it stays faster
        ([5, 9, 9], [4, 4, 8], (4, None)),
    ],
)
def test_crossover_is_where_the_mixer_becomes_faster_for_good(mixer, rival, expected):
    rungs = [(Grid(t, 1, 1), {"m": a, DENSE: b}) for t, a, b in zip((1, 2, 4), mixer, rival, strict=True)]
    found = Ladder("m", rungs).crossover(DENSE)
    assert found is not None and tuple(grid and grid.tokens for grid in found) == expected
    assert Ladder("m", rungs).crossover(JOINT) is None


def test_ladders_grow_the_axes_of_the_layout():
    grids = {
        layout: list(bench._grids(layout, Grid(2, 4, 4)))[:6] for layout in ("spatial", "temporal", "width", "joint")
    }
    assert [str(grid) for grid in grids["spatial"]] == ["2x2x1", "2x2x2", "2x4x2", "2x4x4", "2x8x4", "2x8x8"]
    assert [str(grid) for grid in grids["temporal"]] == ["1x4x4", "2x4x4", "4x4x4", "8x4x4", "16x4x4", "32x4x4"]
    assert grids["joint"] == grids["temporal"]
    assert [str(grid) for grid in grids["width"]][:3] == ["2x4x1", "2x4x2", "2x4x4"]


def test_a_ladder_drops_who_is_slow_and_ends_with_the_mixer_or_its_last_rival(tmp_path, monkeypatch):
    case = bench._cases(tiny(tmp_path))[0]

    def race(name, use, lender, shapes):
        tokens = shapes.grid.tokens
        if tokens < 16:
            raise PatternError("too small")
        contender = Contender(name, CPU, list, [])
        seconds = {JOINT: tokens**2 / 3e4, DENSE: tokens / 1e3}.get(name, tokens / 2e3)
        contender.measure = lambda counted=True: contender.both.append(seconds) or contender.forward.append(seconds)
        return contender

    monkeypatch.setattr(bench, "_mixer_contender", race)
    ladder = Ladder(case.name)
    bench._climb(ladder, case, bench.Shapes(Grid(4, 4, 4), 1, 8, 0, torch.float32, CPU))
    assert [grid.tokens for grid, _ in ladder.rungs] == [16, 32, 64, 128, 256, 512, 1024]
    assert [JOINT in ms for _, ms in ladder.rungs] == [True] * 5 + [False] * 2, "256^2 / 3e4 s is over a second"
    assert ladder.ended == f"{DENSE}, {JOINT} took long"


def test_shares_of_a_step_are_counted_over_layers_and_parts():
    step = Contender("step", CPU, list, [], forward=[0.02], both=[0.1])
    ms = {"forward_ms": 2.0, "forward_backward_ms": 5.0}
    row = {"layers": [0, 2], **ms, "rivals": {JOINT: {"forward_ms": 8.0, "forward_backward_ms": 30.0}}}
    told = bench._step(step, [row], times=4, recompute=False)
    assert told["ms"] == 400 and told["attention_ms"] == 4 * 2 * 5
    assert told["saved"][JOINT] == row["saved"][JOINT] == pytest.approx(200 / 600)
    told = bench._step(step, [row], times=4, recompute=True)
    assert told["saved"][JOINT] == pytest.approx(4 * 2 * (38 - 7) / (400 + 4 * 2 * (38 - 7)))
    assert bench._step(step, [{"layers": [0], "failure": "x", "rivals": {}}], 1, False) == {"failure": "not measured"}


def test_an_interruption_keeps_what_is_measured(tmp_path, monkeypatch, capsys):
    measured = Contender.measure

    def until(self, counted=True):
        if self.name == JOINT and counted and len(self.both) == 2:
            raise KeyboardInterrupt
        measured(self, counted)

    monkeypatch.setattr(Contender, "measure", until)
    with pytest.raises(KeyboardInterrupt):
        bench_attention(tiny(tmp_path), CPU, tmp_path / "out", repeats=5)
    result = json.loads((tmp_path / "out/bench.json").read_text())
    assert result["interrupted"] and "forward_ms" in result["rows"][0] and not result["ladders"]
    assert "interrupted; what was measured is in" in capsys.readouterr().out


def test_listening_to_the_operations_changes_none():
    before, calls = dict(vars(attend)), []
    with bench._recorded(calls):
        q = torch.randn(1, 1, 2, 4)
        attend.dense_attention(q, q, q)
    assert [op for op, _, _ in calls] == [before["dense_attention"]] and dict(vars(attend)) == before


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchError, match="cannot be written"):
        bench_attention(tiny(tmp_path), CPU, tmp_path / "file/out")


# ------------------------------------------------------------------------------------------ benchmarks/attention.py


def _load_program():
    path = Path(__file__).parents[2] / "benchmarks/attention.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_attention", path)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


program = _load_program()
ON = program.On(CPU, torch.float32)


def gathered(on, seed):
    """What program.sparse(128, 1, 16, 0.5) computes, by PyTorch."""
    q, k, v = program._transposed(on, seed, 128, 1, 16)
    support = Support.from_blocks(program.random_blocks(128, 1, 0.5), 128, 128, (64, 64))
    return [q, k, v], lambda: block_sparse_attention(q, k, v, support, impl="gather")


def small_cases():
    """The cases of the program, of sizes that an interpreter can do."""
    for backward in (False, True):
        yield program.short_case("temporal", Boxes((16, 2, 2), (16, 1, 1)), 2, 16, backward, backends=("math", "flash"))
        yield program.spatial_case(4, 2, 2, 16, backward, None)
        shape = (128, 1, 16)
        for density, rival in ((0.5, gathered), (1.0, program.dense(*shape, "math"))):
            ours = program.Contender(program.OURS, program.OURS, program.sparse(*shape, density), backward)
            other = program.Contender("rival", "rival", rival, backward)
            yield program.Case("sparse", f"sparse {density} {backward}", [ours, other], None)
    for boxes in (Boxes((2, 4, 8), (1, 2, 8)), Boxes((4, 4, 6), (2, 2, 4), (1, 1, 2))):
        yield program.short_case("window", boxes, 2, 16, False, backends=("math",))
    yield from program.linear_cases(tokens=128, heads=1, width=32)
    yield from program.norm_cases(tokens=16)


@pytest.mark.parametrize("case", small_cases(), ids=lambda case: case.name)
def test_contenders_compute_the_same(case):
    ours, *rivals = case.contenders
    expected, compared = program._tensors(ours.make(ON, 3)()), 0
    for rival in rivals:
        with contextlib.suppress(RuntimeError):  # a backend that this machine has not
            results = program._tensors(rival.make(ON, 3)())
            compared += rival.comparable
            assert not rival.comparable or program.distance(expected, results) < 1e-4, rival
    assert compared


def test_flex_attention_is_given_the_same_blocks():
    kept = program.random_blocks(512, 2, 0.3)
    assert (kept.sum(-1) == 2).all()
    mask = program.block_mask(kept)
    assert torch.equal(mask.to_dense().bool(), kept) and mask.BLOCK_SIZE == (64, 64)
    assert mask.full_kv_num_blocks is not None and int(mask.kv_num_blocks.sum()) == 0, "no block needs a mask"


def test_inputs_differ_by_seed_and_not_by_contender():
    case = next(small_cases())
    a, b = case.contenders[0], case.contenders[2]
    first, other, again = (c.prepare(ON, seed)[0] for c, seed in ((a, 0), (a, 1), (b, 0)))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(first, other, strict=True))


def test_selection_keeps_the_share_of_blocks_it_is_asked_for():
    q, k, _ = program._transposed(ON, 0, 256, 2, 16)
    assert torch.equal(program.select(q, k, 0.5).counts, torch.full((1, 2, 4), 2))


def test_cases_have_names_of_their_own_and_goals_that_can_be_judged():
    every = list(program.cases([], quick=False))
    names = [case.name for case in every]
    assert len(set(names)) == len(names)
    for case in every:
        groups = {contender.group for contender in case.contenders} | {program.COPY, program.PRODUCTS}
        assert {goal.of for goal in case.goals} <= groups, case.name
        assert case.contenders[0].group == program.OURS
    assert {case.family for case in program.cases(["linear", "norm"], quick=False)} >= {"linear", "norm"}
    assert all("16x72" in case.name for case in program.cases(["16x72"], quick=False))
    quick = [case.name for case in program.cases([], quick=True)]
    assert 0 < len(quick) < len(names) / 3 and set(quick) <= set(names)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Streams, events and graphs of which the calls run on the CPU and take 2 ms each."""

    class Graph:
        def __init__(self, calls):
            self.replay = lambda: program._each(calls)

    class Stream:
        def synchronize(self):
            pass

    def elapsed(run):
        run()
        return 2.0

    monkeypatch.setattr(program, "_elapsed", elapsed)
    monkeypatch.setattr(program, "_graph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    cache = type("Properties", (), {"L2_cache_size": 1000})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: cache)


def test_all_contenders_are_measured_on_several_inputs_and_a_failure_stays_its_own(pretended_gpu):
    seeds, forwards = [], []

    def prepare(factor):
        def prepared(on, seed):
            seeds.append(seed)
            x = on.randn(seed, 4)
            return [x], lambda: forwards.append(seed) or factor * x

        return prepared

    def fails(on, seed):
        raise RuntimeError("no such backend\nsays the driver")

    contenders = [
        program.Contender("ours", program.OURS, prepare(2), backward=True),
        program.Contender("a", "SDPA", prepare(2), backward=True),
        program.Contender("b", "SDPA", prepare(3), backward=True),
        program.Contender("c", "SDPA", fails),
    ]
    case = program.Case("f", "n", contenders, program.Work(bytes=500), (program.Goal("SDPA", 0.5),))
    told = program.measure(case, ON, samples=10, ceilings={"copy_bytes": 1e3})
    assert seeds == [*range(8)] * 3, "as many inputs as four times the cache holds"
    assert forwards == seeds, "a forward pass for each, and none while the backward is timed"
    ours, a, b, c = told["contenders"]
    assert ours["ms"] == 2.0 and ours["graph"] and a["distance"] == 0 and b["distance"] == pytest.approx(1 / 3)
    assert c["failure"] == "RuntimeError: no such backend"
    assert told["goals"] == [{"goal": "0.5x SDPA", "reached": 1.0, "met": True}]


def test_goals_are_judged_by_the_best_of_each_group():
    goals = (program.Goal("SDPA", 2.0), program.Goal(program.COPY, 0.8), program.Goal("flex", 1.0))
    case = program.Case("f", "n", [], program.Work(flops=4e9, bytes=3e9), goals)
    rows = [
        {"name": "ours", "group": program.OURS, "ms": 1.0},
        {"name": "a", "group": "SDPA", "ms": 3.0},
        {"name": "b", "group": "SDPA", "ms": 2.5, "distance": 0.1},
        {"name": "c", "group": "SDPA", "failure": "no such backend"},
        {"name": "d", "group": "flex", "failure": "does not compile"},
    ]
    told = program.judged(case, rows, {"copy_bytes": 4e12})
    assert told["best"] == {"SDPA": {"name": "b", "ms": 2.5, "times": 2.5}}
    assert told["share_of_copy"] == pytest.approx(0.75) and told["tflops"] == pytest.approx(4.0)
    assert [goal["met"] for goal in told["goals"]] == [True, False, False]
    assert "NOT ALIKE" in program.line({"case": "n", "contenders": rows, **told})
    rows[0] = {"name": "ours", "group": program.OURS, "failure": "spilled coffee"}
    told = program.judged(case, rows, {"copy_bytes": 4e12})
    assert not any(goal["met"] for goal in told["goals"])
    assert "failed: spilled coffee" in program.line({"case": "n", "contenders": rows, **told})


def test_predictions_are_bounds_and_say_so(monkeypatch, capsys):
    @contextlib.contextmanager
    def compiled(target):
        yield [Report("_attend", target, (132 * 8 * 100,), 4, 1, 64, 0, 1024, {})]

    monkeypatch.setattr("stgen.testing.compiled.dry_launch", compiled)
    work = program.Work(flops=0.25 * H200.tensor_flops, bytes=0.5 * H200.bandwidth)
    goals = (program.Goal(program.COPY, 0.5), program.Goal(program.COPY, 0.9), program.Goal(program.COPY, 1.1))
    case = program.Case("f", "n", [], work, (*goals, program.Goal("SDPA", 2.0)), dry=lambda: None)
    result = program.run_predictions(iter([case]))
    (told,) = result["results"]
    assert told["ms"] == pytest.approx([500, 750]) and told["share_of_copy"] == pytest.approx([2 / 3, 1])
    assert [goal["met"] for goal in told["goals"]] == ["predicted", "possible", "out of reach", "needs a measurement"]
    assert result["predicted"] and not result["measured"]
    assert "PREDICTED, NOT MEASURED" in capsys.readouterr().out


def test_without_a_gpu_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["attention.py"])
    with pytest.raises(SystemExit, match=r"no CUDA device .* say --predict"):
        program.main()
