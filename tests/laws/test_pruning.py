"""Laws of cascade pruning: against one clip, layer, head and query at a time, and what it must not change."""

import copy
import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from stgen.attention.cascade import PRUNED, Cascade, Pruner, best, put_back
from stgen.attention.pruning import Pruning, Stage, stages
from stgen.describe import pruning_words
from stgen.model import VideoTransformer
from stgen.schema import Model
from stgen.tokens import Grid, rope_tables

GRID = (3, 2, 5)
FALLING = {"kind": "linear", "start": 1.0, "end": 0.3, "steps": 8, "warmup_steps": 2}
TILES = {"layout": "joint", "order": "tile", "block": [2, 2, 2]}


def x64(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def build(pruning=None, grid=GRID, **changes):
    """A model whose gates are open."""
    torch.manual_seed(0)
    keys = dict(
        in_channels=3, grid=grid, width=24, depth=4, heads=4, plan="joint", text_width=8, mixers={"joint": TILES}
    )
    model = VideoTransformer(**{**keys, **changes}, pruning=pruning).double()  # type: ignore[arg-type]
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return model


def inputs(grid=GRID, batch=2):
    return x64(batch, 3, *grid), torch.tensor([100.0, 900.0, 400.0])[:batch], x64(batch, 5, 8, seed=1)


# ------------------------------------------------------------------------------------------------------ the definition


class Loop(nn.Module):
    """All layers, over one clip after the other; what is left is chosen by sorting Python lists.

    `left` gives the tokens and heads of each layer, None for all tokens, which then need not attend each other. Blocks
    are used as they are without pruning, on a clip of the tokens that are left; a hook makes the output of heads that
    are left out zero.
    """

    layers: Any

    def __init__(self, blocks, left):
        super().__init__()
        self.layers, self.left = nn.ModuleList(blocks), left

    def forward(self, x, grid, rope, shared, text, mask, carry):
        shared = shared.unflatten(0, (len(x), -1))  # [B, 1 or frames, 6, C]
        return torch.stack([self._clip(*clip, grid, rope) for clip in zip(x, shared, text, strict=True)])

    def _clip(self, x, shared, text, grid, rope):
        value, received = dict(enumerate(x)), dict.fromkeys(range(len(x)), 0.0)
        put_out = dict.fromkeys(range(self.left[0][1]), 0.0)
        for block, (n, h) in zip(self.layers, self.left, strict=True):
            tokens, heads = largest(received, n or len(x)), largest(put_out, h)
            at = torch.tensor(tokens)
            tables = None if rope is None else (rope[0][at], rope[1][at])
            rows = shared if len(shared) == 1 else shared[at // (grid.h * grid.w)]
            seen = []
            hooks = [m.register_forward_hook(watch(heads, seen)) for branch in block.branches for m in branch.mixers]
            given = torch.stack([value[i] for i in tokens]).unsqueeze(0)
            out = block(given, Grid(n, 1, 1) if n else grid, tables, rows, text[None], None, {})
            for hook in hooks:
                hook.remove()
            value |= dict(zip(tokens, out[0], strict=True))
            for run, q, k, o in seen:
                for head in heads:
                    put_out[head] += float(o[0, :, head].abs().sum())
                    for i in range(n or 0):
                        weights = row(run, q[0, i, head], k[0, :, head], head)
                        for j, token in enumerate(tokens):
                            received[token] += float(weights[j])
            received = {i: received[i] for i in tokens}
            put_out = {i: put_out[i] for i in heads}
        return torch.stack([value[i] for i in range(len(x))])


def largest(importance, count):
    return sorted(sorted(importance, key=lambda i: (-importance[i], i))[:count])


def watch(heads, seen):
    def hook(mixer, given, result):
        out, kept = result
        alive = torch.zeros(out.shape[2], 1).index_fill(0, torch.tensor(heads), 1).to(out)
        seen.append((mixer.runs[0], given[0].detach(), given[1].detach(), (out * alive).detach()))
        return out * alive, kept

    return hook


def row(run, q, k, head):
    """Weights of a query [D] on the keys [m, D]."""
    scores = [float(q @ key) / math.sqrt(len(q)) for key in k]
    if run.normaliser.kind == "relu":
        return [max(0.0, s) / (len(scores) + run.sink.count) for s in scores]
    rows = [] if run.sink.k is None else [float(q @ key) / math.sqrt(len(q)) for key in run.sink.k[head].detach()]
    logit = run.sink.logit(q)
    mass = sum(map(math.exp, scores + rows)) + (0 if logit is None else math.exp(float(logit[head].detach())))
    return [math.exp(s) / mass for s in scores]


def by_hand(pruning, depth, tokens, heads):
    """Tokens and heads of each layer, from the words of the keys."""
    first, found = pruning.get("first", 1), []
    tokens = tokens if "tokens" in pruning else None
    for layer in range(depth):
        steps = layer + 1 - first if pruning.get("course", "linear") == "linear" else depth - first
        share = 0 if layer < first else steps / (depth - first)
        found.append(
            tuple(
                n and max(1, math.floor(n * (1 - share * (1 - pruning.get(key, 1))) + 1e-9))
                for key, n in (("tokens", tokens), ("heads", heads))
            )
        )
    return found


def both(pruning, grid=GRID, batch=2, times=None, **changes):
    """Output and gradients, of the latents and every parameter, of the model and of the loop over its own blocks."""
    model = build(pruning, grid, **changes)
    twin = copy.deepcopy(model)
    named = [dict(m.named_parameters()) for m in (model, twin)]
    twin.pruner = None
    twin.blocks = nn.ModuleList([Loop(twin.blocks, by_hand(pruning, 4, math.prod(grid), 4))])
    found = []
    for one, parameters in zip((model, twin), named, strict=True):
        z, t, text = inputs(grid, batch)
        z.requires_grad_()
        out = one(z, t if times is None else times, text).sample
        gradients = torch.autograd.grad((out * x64(*out.shape, seed=5)).sum(), [z, *parameters.values()])
        found.append((out, gradients))
    return found


CASES = {
    "tokens": ({"tokens": 0.5}, {}),
    "heads": ({"heads": 0.5}, {}),
    "both, from a layer on": ({"tokens": 0.3, "heads": 0.25, "first": 2}, {}),
    "at once": ({"tokens": 0.4, "heads": 0.5, "course": "at_once"}, {}),
    "one token and one head": ({"tokens": 0.001, "heads": 0.001}, {}),
    "one frame": ({"tokens": 0.5}, {"grid": (1, 3, 5)}),
    "one clip": ({"tokens": 0.5, "heads": 0.5}, {"batch": 1}),
    "three clips": ({"tokens": 0.7, "heads": 0.7}, {"batch": 3}),
    "one token a clip": ({"tokens": 0.5, "heads": 0.5}, {"grid": (1, 1, 1)}),
    "in turn and added": ({"tokens": 0.5, "heads": 0.5}, {"plan": "a>a a+a", "mixers": {"a": {"layout": "joint"}}}),
    "cross, parallel": ({"tokens": 0.5}, {"conditioning": "both", "mlp_placement": "parallel"}),
    "without rope": ({"tokens": 0.5}, {"positions": "learned", "qk_norm": False}),
    "relu": ({"tokens": 0.5, "heads": 0.5}, {"mixers": {"joint": {"normaliser": {"kind": "relu"}}}}),
    "logit sink": ({"tokens": 0.5}, {"mixers": {"joint": {"sink": {"kind": "logit"}}}}),
    "token sink": ({"tokens": 0.5}, {"mixers": {"joint": {**TILES, "sink": {"kind": "tokens", "count": 3}}}}),
    "a time for every frame": ({"tokens": 0.4, "heads": 0.5}, {"times": torch.tensor([[0.0, 300, 700], [900, 50, 2]])}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_what_a_loop_over_clips_layers_heads_and_queries_gives(case):
    pruning, setting = CASES[case]
    (ours, our_gradients), (theirs, their_gradients) = both(pruning, **setting)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    for a, b in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert all(g.any() for g in our_gradients[:1]) and ours.std() > 0.01


def test_heads_are_left_out_in_any_layout_and_pattern_of_positions():
    local = {"layout": "joint", "pattern": {"kind": "local", "radius": 1}, "normaliser": {"kind": "poly"}}
    window = {"layout": "window", "size": [2, 2, 2], "shift": [1, 1, 1]}
    mixers = {"local": local, "win": window}
    (ours, our_gradients), (theirs, their_gradients) = both(
        {"heads": 0.4}, plan="spatial temporal local win", mixers=mixers, registers=2
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    for a, b in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------------------ identity


@pytest.mark.parametrize(
    "pruning", [{}, {"tokens": 1.0, "heads": 1, "first": 3}, {"tokens": FALLING, "heads": FALLING}]
)
@torch.no_grad()
def test_all_kept_is_the_model_bit_for_bit(pruning):
    assert torch.equal(build(pruning)(*inputs()).sample, build()(*inputs()).sample)


@torch.no_grad()
def test_attention_among_all_tokens_and_heads_is_attention_bit_for_bit():
    block: Any = build().blocks[0]
    attention = block.branches[0]
    x, grid = x64(2, 30, 24), Grid(*GRID)
    rope = tuple(table.double() for table in rope_tables(grid, 6))
    apart = tuple(table.expand(2, -1, -1) for table in rope)
    cascade = Cascade.of_all(x, Stage(30, 4, True, True))
    expected, _ = attention(x, grid, rope, {})
    for tables in (rope, apart):
        out, carry = attention(x, grid, tables, {PRUNED: cascade})
        assert torch.equal(out, expected)
    assert (cascade.received == 0).all()  # what is handed on is new, nothing is written into what was given
    torch.testing.assert_close(carry[PRUNED].received.sum(1), torch.full((2,), 30.0 * 4, dtype=torch.float64))


# ----------------------------------------------------------------------------------------------------- what is handed on


def test_order_is_kept_and_everything_is_put_back_by_its_last_value():
    x, numbers = x64(3, 11, 2), torch.arange(11.0).expand(3, 11)
    cascade, tokens = Cascade.of_all(x, Stage(11, 2, True, False)), torch.stack([numbers, 100 + numbers], dim=-1)
    expected = tokens.clone()
    for count in (8, 8, 3, 1):
        shown = Cascade(**{**vars(cascade), "received": torch.rand(cascade.received.shape).double()})
        tokens, cascade = shown.narrowed(tokens, Stage(count, 2, True, False))
        assert torch.equal(tokens[..., 0].long(), cascade.places) and cascade.places.shape == (3, count)
        assert (cascade.places.diff(dim=1) > 0).all()
        tokens = tokens + torch.tensor([0.0, 1000.0])  # the layer
        for b in range(3):
            expected[b, cascade.places[b], 1] += 1000.0
    assert torch.equal(put_back(tokens, {PRUNED: cascade}), expected)


def test_of_equals_the_first_are_kept():
    kept, rest = best(torch.tensor([[1.0, 3.0, 1.0, 3.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]]), 3)
    assert kept.tolist() == [[0, 1, 3], [0, 1, 2]] and rest.tolist() == [[2, 4], [3, 4]]


def test_a_share_is_reached_in_the_last_layer_and_nothing_comes_back():
    even = stages(Pruning(tokens=0.29, heads=0.5, first=2), 6, 100, 8)
    assert [s.tokens for s in even] == [100, 100, 82, 64, 46, 29]
    assert [s.heads for s in even] == [8, 8, 7, 6, 5, 4]
    assert [s.ranks_tokens for s in even] == [True] * 5 + [False]
    once = stages(Pruning(tokens=0.29, first=2, course="at_once"), 6, 100, 8)
    assert [s.tokens for s in once] == [100, 100, 29, 29, 29, 29]
    assert [s.ranks_tokens for s in once] == [True, True] + [False] * 4
    assert not any(s.ranks_heads for s in once)
    assert all(s.tokens == s.heads == 1 for s in stages(Pruning(tokens=1e-9, heads=1e-9, first=1), 2, 7, 3)[1:])


PRUNINGS = [{"tokens": 0.5}, {"heads": 0.5}, {"tokens": 0.3, "heads": 0.5, "first": 2, "course": "at_once"}]


@pytest.mark.parametrize("pruning", PRUNINGS)
def test_a_batch_equals_its_singles(pruning):
    model, (z, t, text) = build(pruning), inputs()
    batch = model(z, t, text).sample
    for i in range(2):
        one = slice(i, i + 1)
        torch.testing.assert_close(model(z[one], t[one], text[one]).sample, batch[one], rtol=0, atol=1e-12)


@pytest.mark.parametrize("pruning", PRUNINGS)
def test_gradient_checkpointing_changes_nothing(pruning):
    found = []
    for recompute in (False, True):
        model = build(pruning)
        if recompute:
            model.enable_gradient_checkpointing()
        out = model(*inputs()).sample
        out.square().mean().backward()
        found.append([out, *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_every_weight_of_a_layer_that_computes_one_token_has_a_gradient():
    model = build({"tokens": 0.01, "heads": 0.25})
    model(*inputs()).sample.square().mean().backward()
    dead = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # One token attends itself alone, whatever its query and key are.
    assert dead == {"blocks.3.mixing.0.branches.0.q_norm.gain", "blocks.3.mixing.0.branches.0.k_norm.gain"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_importance_is_summed_in_32_bits(dtype):
    model, (z, t, text) = build({"tokens": 0.5, "heads": 0.5}).to(dtype), inputs()
    seen = []
    model.blocks[3].register_forward_pre_hook(lambda block, given: seen.append(given[-1][PRUNED]))
    out = model(z.to(dtype), t, text.to(dtype)).sample
    assert out.dtype == dtype and out.isfinite().all()
    assert seen[0].received.dtype == seen[0].put_out.dtype == torch.float32


# ----------------------------------------------------------------------------------------------- over training, on disk


@torch.no_grad()
def test_a_model_at_a_step_is_the_model_with_that_share(tmp_path):
    model = build({"tokens": FALLING, "heads": {"kind": "stairs", "values": [1, 0.5], "at_steps": [6]}, "first": 2})
    for step, tokens, heads in ((0, 1.0, 1.0), (6, 0.65, 0.5), (30, 0.3, 0.5)):
        model.at_step(step)
        plain = build({"tokens": tokens, "heads": heads, "first": 2})
        assert torch.equal(model(*inputs()).sample, plain(*inputs()).sample)
        assert model.measured() == {"pruning/tokens": math.floor(tokens * 30 + 1e-9) / 30, "pruning/heads": heads}
    model.save_pretrained(tmp_path)
    loaded = VideoTransformer.from_pretrained(tmp_path, torch_dtype=torch.float64)
    assert torch.equal(loaded(*inputs()).sample, model(*inputs()).sample)  # by its last value
    assert VideoTransformer.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).measured() == model.measured()


def test_a_resumed_model_goes_on_where_it_was():
    plateau = {"kind": "plateau", "start": 1.0, "end": 0.25, "parts": 3, "patience": 2}
    losses = torch.rand(30, generator=torch.Generator().manual_seed(0)).tolist()

    def run(model, steps):
        seen = []
        for step in steps:
            model.at_step(step)
            seen.append(model.measured()["pruning/tokens"])
            model.observe(losses[step])
        return seen

    whole, first, second = (build({"tokens": plateau}) for _ in range(3))
    expected, begun = run(whole, range(30)), run(first, range(13))
    second.load_state_dict(first.state_dict())
    assert begun + run(second, range(13, 30)) == expected and len(set(expected)) == 4


def test_nothing_is_added_to_a_model_without_schedules():
    assert build({"tokens": 0.5, "heads": 0.5}).state_dict().keys() == build().state_dict().keys()
    assert build().pruner is None and isinstance(build({"tokens": 0.5}).pruner, Pruner)


def test_work_counts_what_is_left():
    n, c = 30, 24
    raster = {"joint": {"layout": "joint"}}
    pruning = {"tokens": 0.4, "heads": 0.5, "first": 2, "course": "at_once"}
    pruned, plain = build(pruning, mixers=raster), build(mixers=raster)
    grid = Grid(*GRID)

    def layer(tokens, heads, ranks):
        return 2 * tokens * c * (4 * c + 8 * c) + 4 * tokens**2 * c * heads // 4 + ranks * 2 * tokens**2 * c

    saved = plain.work(grid, 5).executed - pruned.work(grid, 5).executed
    assert saved == 4 * layer(n, 4, 0) - 2 * layer(n, 4, 1) - 2 * layer(12, 2, 0)
    assert pruned.work(grid, 5).dense == plain.work(grid, 5).executed
    words = [pruning_words(pruned.pruner, layer, grid) for layer in range(4)]
    assert words == [[], [], ["12 of 30 tokens", "2 of 4 heads"], ["12 of 30 tokens", "2 of 4 heads"]]


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"pruning": {"tokens": 0}}, "greater than 0"),
        ({"pruning": {"heads": {**FALLING, "end": 0}}}, "heads: 0 of its schedule"),
        ({"pruning": {"tokens": {**FALLING, "end": 1, "start": 0.5}}}, "from 0.5 to 1 rises, but this number may only fall"),
        ({"pruning": {"tokens": 0.5, "first": 4}}, "pruning.first: 4 is no layer of the plan, which has 0 to 3"),
        ({"pruning": {"tokens": 0.5, "first": 0}}, "greater than 0"),
        ({"registers": 2}, "pruning.tokens: registers .* write registers: 0"),
        ({"modulation": "none"}, "pruning.tokens: .* the token of time .* modulation: adaln"),
        ({"plan": "spatial"}, "layout spatial in mixers.spatial would differ in length; write layout: joint"),
        ({"plan": "tcn", "pruning": {"heads": 0.5}}, "no mixer of the plan has heads"),
        ({"plan": "joint tcn"}, "tcn in mixers.tcn runs along whole sequences"),
        ({"plan": "joint|joint"}, "shares them out in mixers.joint; write > or +"),
        ({"mixers": {"joint": {"pattern": {"kind": "local", "radius": 1}}}}, "no grid or blocks for local .* pattern: full"),
        ({"mixers": {"joint": {"normaliser": {"kind": "linear"}}}}, "linear in mixers.joint makes .* normaliser: softmax"),
        ({"mixers": {"joint": {"normaliser": {"kind": "poly_logits"}}}}, "poly_logits in mixers.joint makes"),
        ({"mixers": {"joint": {"reuse": {"what": "kv"}}}}, "write reuse: none in mixers.joint"),
        ({"mixers": {"joint": {"heads": {"0": {"sink": {"kind": "logit"}}}}}}, "they differ in mixers.joint"),
        (
            {"plan": "temporal", "mixers": {"temporal": {"kind": "attention", "memory": {"kind": "infini", "segment": 1}}}},
            "write memory: none",
        ),
        ({"pruning": {"heads": 0.5}, "mixers": {"joint": {"sink": {"kind": "logit"}}}}, "sink logit .* write sink: none"),
        ({"pruning": {"heads": 0.5}, "mixers": {"joint": {"normaliser": {"kind": "off_by_one"}}}}, "normaliser off_by_one"),
        ({"pruning": {"heads": 0.5}, "mixers": {"joint": {"pattern": {"kind": "topk"}}}}, "pruning.heads: topk .* every head"),
    ],
)  # fmt: skip
def test_what_has_no_meaning_is_refused_in_a_sentence(keys, sentence):
    given = {"depth": 4, "heads": 4, "plan": "joint", "pruning": {"tokens": 0.5}, **keys}
    given["mixers"] = {n: {"kind": "attention", **m} for n, m in given.get("mixers", {}).items()}
    with pytest.raises(ValidationError, match=sentence) as refusal:
        Model.model_validate(given)
    assert "\n" not in refusal.value.errors()[0]["msg"]


def test_what_prunes_nothing_is_never_refused():
    Model.model_validate({"depth": 1, "heads": 4, "plan": "spatial", "registers": 2, "pruning": {"first": 5}})
