"""Laws of whole models whose mixers are not plain: no dead weights, no leak, nothing changed by batch or recomputing."""

import os
import subprocess
import sys

import pytest
import torch

from stgen.attention.pattern import PatternError
from stgen.model import VideoTransformer
from stgen.tokens import Grid

GRID = (4, 3, 4)
TILES = {"layout": "joint", "order": "tile", "block": [2, 2, 2]}
LOCAL = {"kind": "local", "radius": 1}
EXACT = dict(rtol=0, atol=1e-12)
MIXERS = {
    "sparse": {**TILES, "pattern": {"kind": "any", "any": [LOCAL, {"kind": "topk", "ratio": 0.4}]}},
    "random": {**TILES, "pattern": {"kind": "random", "blocks": 2, "seed": 5}},
    "learned": {**TILES, "pattern": {"kind": "learned", "ratio": 0.5}},
    "learned with noise": {**TILES, "pattern": {"kind": "learned", "ratio": 0.5, "gumbel": 1.0}},
    "linformer": {**TILES, "pattern": {"kind": "linformer", "keys": 5}},
    "convolution": {**TILES, "pattern": {"kind": "convolution"}},
    "sinkhorn": {**TILES, "pattern": {"kind": "sinkhorn"}},
    "three ways": {**TILES, "pattern": {"kind": "three_way", "radius": 1, "ratio": 0.4}},
    "logit sink": {"layout": "temporal", "sink": {"kind": "logit"}},
    "sink tokens": {**TILES, "pattern": LOCAL, "sink": {"kind": "tokens", "count": 2}},
    "relu": {"layout": "spatial", "normaliser": {"kind": "relu"}},
    "learned features": {"layout": "joint", "normaliser": {"kind": "linear", "features": "learned"}},
    "map reuse": {"layout": "temporal", "sink": {"kind": "tokens", "count": 2}, "reuse": {"what": "map"}},
    "kv reuse": {**TILES, "pattern": LOCAL, "reuse": {"what": "kv"}},
    "support reuse": {**TILES, "pattern": {"kind": "topk"}, "reuse": {"what": "support"}},
    "output reuse": {"layout": "joint", "reuse": {"what": "output"}},
    "heads": {**TILES, "heads": {"0-1": {"pattern": LOCAL, "sink": {"kind": "logit"}}, "3": {"normaliser": {"kind": "relu"}}}},
    "shifted windows": {"layout": "window", "size": [2, 2, 2], "shift": [1, 1, 1], "pattern": LOCAL},
}  # fmt: skip


def build(mixer, plan="a", **changes):
    torch.manual_seed(0)
    keys = dict(in_channels=3, grid=GRID, width=32, depth=2, heads=4, plan=plan, text_width=8, mixers={"a": mixer})
    return VideoTransformer(**{**keys, **changes})


def inputs(batch=2, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 3, *GRID, generator=g, dtype=torch.float64).to(dtype)
    return latents, torch.tensor([100.0, 900.0])[:batch], torch.randn(batch, 5, 8, generator=g).to(dtype)


def trained(model, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(steps):
        optimizer.zero_grad()
        latents, t, text = inputs(dtype=model.dtype)
        (model(latents, t, text).sample - latents.flip(-1)).square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("name", MIXERS)
def test_every_weight_moves_by_the_second_step(name, registers):
    pattern = MIXERS[name].get("pattern", {}).get("kind")
    if registers and pattern in ("linformer", "convolution", "sinkhorn", "three_way"):
        registers = 0  # the schema refuses them together
    model = build(MIXERS[name], registers=registers)
    trained(model, steps=2)
    dead = [n for n, p in model.named_parameters() if p.grad is None or not (p.grad != 0).any()]
    assert not dead


@pytest.mark.parametrize("name", MIXERS)
def test_a_batch_equals_its_singles(name):
    model, (latents, t, text) = trained(build(MIXERS[name]).double()), inputs(dtype=torch.float64)
    batch = model(latents, t, text).sample
    for i in range(2):
        one = slice(i, i + 1)
        torch.testing.assert_close(model(latents[one], t[one], text[one]).sample, batch[one], atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", MIXERS)
def test_gradient_checkpointing_changes_no_gradient(name):
    gradients = []
    for recompute in (False, True):
        model = trained(build(MIXERS[name]).double())
        if recompute:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        model(*inputs(dtype=torch.float64)).sample.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", MIXERS)
def test_save_and_load_give_the_same_output(name, tmp_path):
    model = trained(build(MIXERS[name], registers=0)).eval()
    model.save_pretrained(tmp_path)
    again = VideoTransformer.from_pretrained(tmp_path)
    torch.testing.assert_close(again(*inputs()).sample, model(*inputs()).sample, rtol=0, atol=0)


CAUSAL = {
    "joint": {"layout": "joint", "pattern": {"kind": "causal"}},
    "union": {"layout": "joint", "pattern": {"kind": "any", "any": [{"kind": "global", "frames": 1}, {"kind": "causal"}]}},
    "tiles chosen within frames": {
        **TILES, "block": [1, 2, 2], "pattern": {"kind": "all", "all": [{"kind": "causal"}, {"kind": "topk", "ratio": 0.4}]},
    },
    "keys chosen": {
        "layout": "temporal",
        "pattern": {"kind": "all", "all": [{"kind": "causal"}, {"kind": "topk", "level": "token", "ratio": 0.4}]},
    },
    "linear": {"layout": "joint", "normaliser": {"kind": "linear"}, "pattern": {"kind": "causal"}},
    "sink": {"layout": "temporal", "pattern": {"kind": "causal"}, "sink": {"kind": "tokens", "count": 2}},
    "relu": {"layout": "temporal", "pattern": {"kind": "causal"}, "normaliser": {"kind": "relu2"}},
    "learned": {**TILES, "block": [1, 2, 2], "pattern": {"kind": "any", "any": [{"kind": "causal"}, {"kind": "learned"}]}},
}  # fmt: skip


@pytest.mark.parametrize("name", CAUSAL)
def test_the_future_never_leaks(name):
    """Neither by a gradient nor, since choosing carries none, by a value: later frames may be anything."""
    model, (latents, t, text) = trained(build(CAUSAL[name]).double()), inputs(dtype=torch.float64)
    out = model(latents.requires_grad_(), t, text).sample
    for frame in range(GRID[0] - 1):
        (gradient,) = torch.autograd.grad(out[:, :, : frame + 1].square().sum(), latents, retain_graph=True)
        assert (gradient[:, :, frame + 1 :] == 0).all() and (gradient[:, :, : frame + 1] != 0).any()
        changed = latents.detach().clone()
        changed[:, :, frame + 1 :] += 10 * torch.randn_like(changed[:, :, frame + 1 :])
        torch.testing.assert_close(
            model(changed, t, text).sample[:, :, : frame + 1], out[:, :, : frame + 1], rtol=0, atol=0
        )


def test_full_attention_does_see_the_future():
    model, (latents, t, text) = trained(build({"layout": "joint"}).double()), inputs(dtype=torch.float64)
    out = model(latents.requires_grad_(), t, text).sample
    (gradient,) = torch.autograd.grad(out[:, :, :1].square().sum(), latents)
    assert (gradient[:, :, 1:] != 0).any()


def test_registers_carry_information_between_windows():
    """Windows alone cannot; and the registers are dropped at the head."""
    window = {"layout": "window", "size": [2, 3, 4]}
    for registers, reaches in ((0, False), (2, True)):
        model, (latents, t, text) = trained(build(window, registers=registers).double()), inputs(dtype=torch.float64)
        out = model(latents.requires_grad_(), t, text).sample
        assert out.shape == latents.shape
        (gradient,) = torch.autograd.grad(out[:, :, :2].square().sum(), latents)
        assert bool((gradient[:, :, 2:] != 0).any()) == reaches


@pytest.mark.parametrize("what", ["map", "kv", "support", "output"])
def test_parameters_and_work_fall_by_what_is_reused(what):
    """The map saves the projections of q and k and their product, kv those of k and v, support its choosing, output all."""
    pattern = {"kind": "topk", "ratio": 1.0} if what == "support" else {"kind": "full"}
    own, taking = (build({"layout": "joint", "pattern": pattern, **more}) for more in ({}, {"reuse": {"what": what}}))
    own, taking = (model.blocks[1].branches[0] for model in (own, taking))
    grid, width, norm = Grid(*GRID), 32, 8
    projection, products = width * width + width, 4 * grid.tokens**2 * width
    parameters = {"map": 2 * projection + 2 * norm, "kv": 2 * projection + norm, "support": 0}
    parameters["output"] = 3 * projection + 2 * norm
    assert sum(p.numel() for p in own.parameters()) - sum(p.numel() for p in taking.parameters()) == parameters[what]
    choosing = own.mixers[0].runs[0].selection.choosing_flops(own.mixers[0].runs[0].setting(grid))
    linear = 2 * grid.tokens * width * width
    saved = {"map": 2 * linear + products // 2, "kv": 2 * linear, "support": choosing, "output": 3 * linear + products}
    assert own.work(grid).executed - taking.work(grid).executed == saved[what] > 0


@pytest.mark.parametrize("what", ["map", "kv", "support", "output"])
def test_reuse_of_a_layer_with_the_same_weights_and_input_is_that_layer(what):
    keys = {**TILES, "pattern": {"kind": "topk", "ratio": 0.4}} if what == "support" else {"layout": "temporal"}
    plain, taking = build(keys), build({**keys, "reuse": {"what": what}})
    first, second = taking.blocks[0].branches[0].double(), taking.blocks[1].branches[0].double()
    whole = plain.blocks[0].branches[0].double()
    rows = {"q": 0, "k": 1, "v": 2}
    first.load_state_dict(whole.state_dict())
    needs = {"map": "v", "kv": "q", "output": "", "support": ""}[what]
    second.to_out.load_state_dict(whole.to_out.state_dict())
    if what == "support":
        second.load_state_dict(whole.state_dict())
    if needs:
        part = slice(32 * rows[needs], 32 * (rows[needs] + 1))
        second.to_qkv.weight.data, second.to_qkv.bias.data = whole.to_qkv.weight[part], whole.to_qkv.bias[part]
    x = torch.randn(2, 48, 32, dtype=torch.float64)
    expected, carry = first(x, Grid(*GRID), None, {})
    out, _ = second(x, Grid(*GRID), None, carry)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    if what == "support":  # it is the first layer's also where the second would choose otherwise
        x, given = torch.randn_like(x), carry[0].supports[0]
        (q, k, v), run = second.projected(second.to_qkv(x), "qkv", None), second.mixers[0].runs[0]
        out, _ = second(x, Grid(*GRID), None, carry)
        torch.testing.assert_close(out, second.to_out(run(q, k, v, Grid(*GRID), given)[0].flatten(2)), **EXACT)
        assert (first(x, Grid(*GRID), None, {})[0] - out).abs().max() > 1e-3


def test_reuse_from_a_named_layer():
    model = build({"layout": "joint", "reuse": {"what": "kv", "source": 1}}, depth=4)
    takes = [block.branches[0].mixers[0].use.takes for block in model.blocks]
    assert takes == ["none", "none", "kv", "kv"]
    assert model(*inputs()).sample.shape == (2, 3, *GRID)


FULL_IN_DISGUISE = [
    {"kind": "local", "radius": 99}, {"kind": "local", "radius": 99, "border": "clamp"}, {"kind": "strided", "stride": 1},
    {"kind": "global", "frames": 99}, {"kind": "random", "blocks": 99}, {"kind": "sliding_tile", "window": [9, 9, 9]},
    {"kind": "topk", "ratio": 1.0}, {"kind": "topk", "ratio": 1.0, "level": "token"}, {"kind": "entropy", "ratio": 1.0},
    {"kind": "learned", "ratio": 1.0}, {"kind": "cluster", "clusters": 1},
]  # fmt: skip


@pytest.mark.parametrize("pattern", FULL_IN_DISGUISE, ids=lambda p: p["kind"])
def test_a_pattern_that_keeps_everything_is_full_attention(pattern):
    def attend(pattern):
        mixer = build({**TILES, "pattern": pattern}).blocks[0].branches[0].mixers[0].double()
        g = torch.Generator().manual_seed(2)
        q, k, v = torch.randn(3, 2, 48, 4, 8, generator=g, dtype=torch.float64)
        return mixer(q, k, v, Grid(*GRID), {})[0]

    torch.testing.assert_close(attend(pattern), attend({"kind": "full"}), rtol=0, atol=1e-12)


def test_more_sink_tokens_than_places_are_refused():
    build({"layout": "temporal", "sink": {"kind": "tokens", "count": 4}})
    with pytest.raises(
        PatternError, match=r"mixers.a.sink: 5 tokens are more than the 4 places of a sequence; write count: 4"
    ):
        build({"layout": "temporal", "sink": {"kind": "tokens", "count": 5}})


def test_a_pattern_that_leaves_no_query_a_key_is_refused():
    model = build({"layout": "joint", "pattern": {"kind": "global", "tokens": [(99, 0, 0)]}})
    with pytest.raises(PatternError, match="global leaves no query a key on the grid 4x3x4"):
        model(*inputs())


@pytest.mark.parametrize("name", ["linformer", "convolution"])
def test_learned_compression_refuses_another_length_in_one_sentence(name):
    model, (_, t, text) = build(MIXERS[name]), inputs()
    with pytest.raises(PatternError, match="train and sample on"):
        model(torch.randn(2, 3, 1, 2, 1), t, text)


def test_a_model_tells_what_its_parts_measured():
    model = build(MIXERS["sinkhorn"])
    model(*inputs())
    measured = model.measured()
    assert measured.keys() == {"attention/0/sinkhorn_residual", "attention/1/sinkhorn_residual"}
    assert all(0 <= value < 1 for value in measured.values())
    assert build(MIXERS["relu"]).measured() == {}


def test_what_several_mixers_or_heads_of_a_layer_measured_is_told_by_their_names():
    def ratio(end):
        return {"kind": "topk", "ratio": {"kind": "linear", "start": 1.0, "end": end, "steps": 4}}

    mixers = {
        "a": {**TILES, "pattern": ratio(0.2)},
        "b": {**TILES, "pattern": ratio(0.6)},
        "c": {**TILES, "pattern": ratio(0.4), "heads": {"0-1": {"pattern": ratio(0.8)}},
              "approximate": {"quantise": ["q"], "bits": {"kind": "stairs", "values": [8, 5], "at_steps": [3]}}},
    }  # fmt: skip
    model = build(None, "a>b c a", depth=3, mixers=mixers)
    model.at_step(4)
    assert model.measured() == {
        "attention/0/a/ratio": 0.2, "attention/0/b/ratio": 0.6, "attention/2/ratio": 0.2, "attention/1/bits": 5,
        "attention/1/c/heads.0-1/ratio": 0.8, "attention/1/c/heads.2-3/ratio": pytest.approx(0.4),
    }  # fmt: skip


@pytest.mark.slow
def test_random_blocks_are_the_same_in_a_fresh_process_under_another_seed():
    """As on every rank and after every resume: they are a function of seed, layer and blocks alone."""
    program = """if True:
        import hashlib, torch
        from stgen.attention import layout, selection
        from stgen.attention.patterns.random_ import Random
        from stgen.tokens import Grid
        torch.manual_seed(SEED)
        place = layout.build("joint", order="tile", tile=(2, 2, 2))
        support = selection.build(Random(blocks=2, seed=5), place, (2, 2, 2), Grid(4, 6, 6), 3, "cpu")
        print(hashlib.sha256(support.dense().numpy().tobytes()).hexdigest())
    """
    found = {
        subprocess.run(
            [sys.executable, "-c", program.replace("SEED", seed)], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(found) == 1


COMPILED = ["sparse", "sinkhorn", "learned features", "map reuse", "heads"]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiling_changes_nothing_beyond_rounding(name):
    torch._dynamo.reset()
    model = trained(build(MIXERS[name]))
    results = []
    for forward in (model, torch.compile(model)):
        model.zero_grad()
        out = forward(*inputs()).sample
        out.square().mean().backward()
        results.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
