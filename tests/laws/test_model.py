"""Laws of the block and the model: identity at the start, no dead weights, masks, plans, checkpointing."""

import math

import pytest
import torch
from torch.nn.functional import layer_norm
from torch.utils.flop_counter import FlopCounterMode

from stgen import blocks
from stgen.attention import layout, plan
from stgen.attention.attend import CrossAttention
from stgen.model import VideoTransformer
from stgen.tokens import Grid, coordinates, grid_of, patchify, rope_tables, rotate, sincos_positions, unpatchify

PLANS = ["joint", "spatial temporal", "spatial>temporal", "spatial+temporal", "spatial|temporal", "(height>width) win"]
WINDOW = {"win": {"kind": "attention", "layout": "window", "size": [2, 2, 2], "shift": [1, 1, 1]}}


def build(plan_text="spatial temporal", **changes):
    torch.manual_seed(0)
    keys = dict(in_channels=3, grid=(2, 3, 4), width=32, depth=2, heads=4, plan=plan_text, text_width=8, mixers=WINDOW)
    return VideoTransformer(**{**keys, **changes})


def inputs(batch=2, extents=(2, 3, 4), dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 3, *extents, generator=g, dtype=torch.float64).to(dtype)
    text = torch.randn(batch, 5, 8, generator=g, dtype=torch.float64).to(dtype)
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])[:batch]
    return latents, torch.tensor([100.0, 900.0])[:batch], text, mask


def trained(model, steps=3):
    """A few steps of training, so that gates are open."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    latents, t, text, mask = inputs(dtype=model.dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(latents, t, text, mask).sample - latents.flip(-1)).square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("conditioning", ["adaln", "cross", "both"])
@pytest.mark.parametrize("placement", ["sequential", "parallel"])
@pytest.mark.parametrize("text", PLANS)
def test_blocks_start_as_identity_and_every_weight_moves_by_the_second_step(text, placement, conditioning):
    model = build(text, mlp_placement=placement, conditioning=conditioning)
    x = torch.randn(2, 24, 32)
    mask = torch.ones(2, 5, dtype=torch.bool)
    shared = model.modulation(torch.randn(2, 32)).unflatten(-1, (6, -1))
    for block in model.blocks:
        out = block(x, Grid(2, 3, 4), None, shared, torch.randn(2, 5, 32), mask, {})
        torch.testing.assert_close(out, x, rtol=0, atol=0)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    latents, t, embeds, mask = inputs()
    for _ in range(2):
        optimizer.zero_grad()
        model(latents, t, embeds, mask).sample.square().mean().backward()
        optimizer.step()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not (p.grad != 0).any()]
    assert not dead


def opened(text, **changes):
    """A model of one layer in float64 whose weights, gates included, are all drawn at random."""
    model = build(text, depth=1, **changes).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def layer_by_hand(block, terms, x, shared, text, mask):
    """A layer written out: its terms, found by the name of their first mixer, in the order of the plan."""
    mixer_shared, mlp_shared = shared.chunk(2, dim=1)  # shift, scale and gate each
    named = {mixing.branches[0].mixers[0].use.name: mixing for mixing in block.mixing}
    h = x
    for names in terms:
        term = named[names[0]]
        shift, scale, gate = (mixer_shared + term.modulation.table).unsqueeze(2).unbind(1)
        h = layer_norm(x, (32,), eps=1e-6) * (1 + scale) + shift
        x = x + gate * sum(branch(h, Grid(2, 3, 4), None, {})[0] for branch in term.branches)
    if block.parallel_mlp:
        x = x + (mlp_shared[:, 2] + block.mlp_modulation.table[0])[:, None] * block.mlp(h)
    prompting = block.prompting
    x = x + prompting.gate * prompting.cross_attn(prompting.norm(x), text, mask)
    if block.parallel_mlp:
        return x
    shift, scale, gate = (mlp_shared + block.mlp_modulation.table).unsqueeze(2).unbind(1)
    return x + gate * block.mlp(layer_norm(x, (32,), eps=1e-6) * (1 + scale) + shift)


@pytest.mark.parametrize("placement", ["sequential", "parallel"])
@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("spatial>temporal>height", [["spatial"], ["temporal"], ["height"]]),
        ("temporal > spatial", [["temporal"], ["spatial"]]),
        ("height > spatial+temporal", [["height"], ["spatial", "temporal"]]),
    ],
)
def test_a_layer_is_its_terms_in_the_order_of_the_plan_then_the_prompt_then_the_mlp(text, terms, placement):
    """The MLP stands behind them, or beside the last term, whose normed input it reads."""
    block = opened(text, mlp_placement=placement, conditioning="cross").blocks[0]
    g = torch.Generator().manual_seed(3)
    x, shared, words = (torch.randn(2, *shape, generator=g).double() for shape in ((24, 32), (6, 32), (5, 32)))
    mask = inputs()[3]
    out = block(x, Grid(2, 3, 4), None, shared, words, mask, {})
    torch.testing.assert_close(out, layer_by_hand(block, terms, x, shared, words, mask), rtol=0, atol=1e-9)
    turned = layer_by_hand(block, terms[::-1], x, shared, words, mask)
    assert (turned - out).abs().max() > 1e-2  # else the law would be empty


@pytest.mark.parametrize("modulated", [True, False])
def test_a_parallel_mlp_saves_a_norm_and_costs_as_much(modulated, monkeypatch):
    norms, flops, work = [], [], []
    monkeypatch.setattr(blocks, "modulated_norm", lambda *given: norms.append(1) or _modulated_norm(*given))
    for placement in ("sequential", "parallel"):
        block = opened("spatial", mlp_placement=placement, modulated=modulated).blocks[0]
        registers = 0 if modulated else 1
        for module in block.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.register_forward_hook(lambda *_: norms.append(1))
        norms.clear()
        with FlopCounterMode(display=False) as counter:
            shared = torch.randn(2, 6, 32).double() if modulated else None
            block(torch.randn(2, registers + 24, 32).double(), Grid(2, 3, 4), None, shared, None, None, {})
        flops.append(counter.get_total_flops())
        work.append((len(norms), block.work(Grid(2, 3, 4), 5)))
    assert [count for count, _ in work] == [2, 1]
    assert flops[0] == flops[1] > 0 and work[0][1] == work[1][1]


_modulated_norm = blocks.modulated_norm


def test_an_added_mixer_whose_output_is_zero_changes_nothing():
    """`a>b` with b zeroed is `a`, and so is `a+b`."""
    alone = trained(build("spatial", depth=1))
    for text in ("spatial>temporal", "spatial+temporal"):
        both = build(text, depth=1)
        names = dict(alone.named_parameters())
        for name, parameter in both.named_parameters():
            source = names.get(name)
            parameter.data.copy_(source if source is not None else torch.zeros_like(parameter))
        torch.testing.assert_close(both(*inputs()).sample, alone(*inputs()).sample, rtol=0, atol=1e-6)


def test_latte_variants_have_the_parameters_that_their_plans_state():
    """Of a layer of width C: attention 4 C^2 + 4 C + 2 D, MLP 8 C^2 + 5 C, a table 3 C a term and one for the MLP."""
    c, d = 32, 8
    attention, mlp, table = 4 * c * c + 4 * c + 2 * d, 8 * c * c + 5 * c, 3 * c
    expected = {
        "spatial": attention + mlp + 2 * table,
        "spatial>temporal": 2 * attention + mlp + 3 * table,
        "spatial+temporal": 2 * attention + mlp + 2 * table,
        "spatial|temporal": attention + mlp + 2 * table,
    }
    for text, count in expected.items():
        block = build(text, depth=1).blocks[0]
        assert sum(p.numel() for p in block.parameters()) == count, text


def test_split_heads_are_the_two_layouts_side_by_side():
    attention = trained(build("spatial|temporal", depth=1)).double().blocks[0].mixing[0].branches[0]
    x, grid = torch.randn(2, 24, 32, dtype=torch.float64), Grid(2, 3, 4)
    parts = []
    for name, projected in zip(("spatial", "temporal"), attention.to_qkv(x).chunk(2, dim=-1), strict=True):
        q, k, v = projected.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)  # [B, heads, N, D] each
        scores = attention.q_norm(q) @ attention.k_norm(k).transpose(-1, -2) * 8**-0.5
        same = layout.build(name).same_sequence(grid)
        parts.append((scores.masked_fill(~same, -torch.inf).softmax(-1) @ v).transpose(1, 2))
    out, _ = attention(x, grid, None, {})
    torch.testing.assert_close(out, attention.to_out(torch.cat(parts, 2).flatten(2)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("conditioning", ["adaln", "cross", "both"])
def test_padding_of_the_prompt_has_no_effect(conditioning):
    model = trained(build(conditioning=conditioning))
    latents, t, text, mask = inputs()
    expected = model(latents, t, text, mask).sample
    poisoned = text.masked_fill(~mask.unsqueeze(-1), 1e3)
    torch.testing.assert_close(model(latents, t, poisoned, mask).sample, expected, rtol=0, atol=1e-5)
    assert (model(latents, t, text + 1.0, mask).sample - expected).abs().max() > 1e-4  # real words do have one


def test_cross_attention_is_a_loop_over_tokens_and_words():
    """Clips with all words, two and none of them, in values and all gradients."""
    torch.manual_seed(0)
    attention, heads, depth = CrossAttention(12, 3).double(), 3, 4
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x, text = (torch.randn(3, n, 12, dtype=torch.float64, requires_grad=True) for n in (4, 5))
    mask = torch.arange(5) < torch.tensor([5, 2, 0])[:, None]

    def normed(row, gain):
        return row / (row.square().mean() + 1e-6).sqrt() * gain

    def row_of(b, i):
        parts, weight, bias = [], attention.to_kv.weight, attention.to_kv.bias
        for head in range(heads):
            own = slice(depth * head, depth * (head + 1))
            q = normed(attention.to_q.weight[own] @ x[b, i] + attention.to_q.bias[own], attention.q_norm.gain)
            words = [text[b, j] for j in range(5) if mask[b, j]]
            keys = [normed(weight[:12][own] @ word + bias[:12][own], attention.k_norm.gain) for word in words]
            values = [weight[12:][own] @ word + bias[12:][own] for word in words]
            mass = [torch.exp(q @ key / math.sqrt(depth)) for key in keys]
            parts.append(sum((m * v for m, v in zip(mass, values, strict=True)), 0 * q) / (sum(mass) if mass else 1))
        return attention.to_out.weight @ torch.cat(parts) + attention.to_out.bias

    expected = torch.stack([torch.stack([row_of(b, i) for i in range(4)]) for b in range(3)])
    out = attention(x, text, mask)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(out[2], attention.to_out.bias.expand(4, -1), rtol=0, atol=0)
    weights, given = torch.randn_like(out), [x, text, *attention.parameters()]
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), given) for y in (out, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    every = attention(x, text, None)
    torch.testing.assert_close(every[0], out[0], rtol=0, atol=1e-12)
    assert (every[1] - out[1]).abs().max() > 1e-2


def test_a_batch_equals_its_singles():
    model = trained(build(conditioning="both"))
    latents, t, text, mask = inputs()
    batch = model(latents, t, text, mask).sample
    for i in range(2):
        one = slice(i, i + 1)
        torch.testing.assert_close(
            model(latents[one], t[one], text[one], mask[one]).sample, batch[one], atol=1e-5, rtol=0
        )


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        model = trained(build(conditioning="both"))
        if recompute:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        model(*inputs()).sample.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_save_and_load_give_the_same_output(tmp_path):
    model = trained(build("(height>width) win", positions="learned", conditioning="both"))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").exists()
    again = VideoTransformer.from_pretrained(tmp_path)
    torch.testing.assert_close(again(*inputs()).sample, model(*inputs()).sample, rtol=0, atol=0)


def test_shift_applies_to_every_second_layer_of_a_window():
    model = build("win", depth=4)
    shifts = [block.branches[0].mixers[0].runs[0].layout.shift for block in model.blocks]
    assert shifts == [(0, 0, 0), (1, 1, 1), (0, 0, 0), (1, 1, 1)]


def test_tokens_on_two_sides_of_a_border_meet_in_the_next_shifted_layer():
    """Windows of 2 x 2 x 2: of each pair one layer lets neither see the other, nor do two of them unless they shift."""
    grid = (4, 4, 6)
    pairs = [((1, 0, 0), (2, 0, 0)), ((0, 1, 0), (0, 2, 0)), ((0, 0, 3), (0, 0, 4)), ((1, 1, 1), (2, 2, 2))]

    def meets(depth, shift):
        window = {"kind": "attention", "layout": "window", "size": [2, 2, 2], "shift": shift}
        model = build("win", depth=depth, grid=grid, mixers={"win": window}).double()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
        latents, t, text, mask = inputs(extents=grid, dtype=torch.float64)
        out = model(latents.requires_grad_(), t, text, mask).sample
        found = []
        for one, other in pairs:
            (gradient,) = torch.autograd.grad(out[0, :, *one].sum(), latents, retain_graph=True)
            found.append(bool((gradient[0, :, *other] != 0).any()))
        return found

    assert meets(1, [1, 1, 1]) == [False] * 4  # the first layer does not shift
    assert meets(2, [0, 0, 0]) == [False] * 4
    assert meets(2, [1, 1, 1]) == [True] * 4
    assert meets(2, [1, 0, 0]) == [True, False, False, False]


def test_rope_and_sincos_serve_other_grids_and_learned_positions_refuse_them():
    latents, t, text, mask = inputs(extents=(4, 3, 4))
    for positions in ("rope", "sincos", "none"):
        assert build(positions=positions)(latents, t, text, mask).sample.shape == latents.shape
    with pytest.raises(ValueError, match="learned positions hold for the grid 2x3x4 of training, not for 4x3x4"):
        build(positions="learned")(latents, t, text, mask)


def test_rope_scores_depend_on_offsets_alone():
    grid = Grid(4, 5, 6)
    where = coordinates(grid)
    q, k = torch.randn(2, 1, 1, 1, 12, dtype=torch.float64).expand(2, 1, grid.tokens, 1, 12).unbind(0)
    tables = tuple(table.double() for table in rope_tables(grid, 12))
    scores = (rotate(q, tables)[0, :, 0] @ rotate(k, tables)[0, :, 0].T).flatten()  # [N * N]
    offsets = (where[:, None] - where[None]).reshape(-1, 3)
    _, group = offsets.unique(dim=0, return_inverse=True)
    for g in group.unique()[::7]:
        same = scores[group == g]
        torch.testing.assert_close(same, same[:1].expand_as(same), rtol=0, atol=1e-6)
    assert scores.std() > 1e-3


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("order", ["raster", "tile"])
def test_scores_of_an_attention_depend_on_offsets_alone(order, registers):
    """Of tokens that are all alike; registers stand nowhere, so that two of them score alike wherever they lie."""
    grid = Grid(3, 4, 5)
    keys = {"joint": {"layout": "joint", "order": order, "block": [2, 2, 2]}}
    model = opened("joint", grid=(grid.t, grid.h, grid.w), mixers=keys, registers=registers, width=48)
    attention = model.blocks[0].branches[0]
    heads = attention.mixers[0].runs[0]
    x = torch.randn(48, generator=torch.Generator().manual_seed(2)).double().expand(1, registers + grid.tokens, 48)
    q, k, _ = attention.projected(attention.to_qkv(x), "qkv", model._rope(grid, x.device, None))
    weights = heads.map(q, k, grid)[0]  # [heads, registers + n, registers + n]
    where, filled = layout.places(heads.layout, grid)
    own = registers + filled[0].nonzero().flatten()
    scores = weights[:, own][:, :, own].log()
    scores = scores - scores.diagonal(dim1=1, dim2=2)[..., None]  # of a row against that of offset 0
    at = where[0][filled[0]]
    _, group = (at[:, None] - at).flatten(0, 1).unique(dim=0, return_inverse=True)
    for same in (scores.flatten(1)[:, group == g] for g in group.unique()[::5]):
        torch.testing.assert_close(same, same[:, :1].expand_as(same), rtol=0, atol=1e-5)
    assert scores.std() > 0.02
    among = weights[:, :registers, :registers].log()
    assert all((one - one.flatten()[0]).abs().max() < 1e-12 for one in among if registers)


def test_rope_refuses_an_odd_head():
    with pytest.raises(ValueError, match="head dimension 7 is odd"):
        rope_tables(Grid(1, 1, 1), 7)


@pytest.mark.parametrize("patch", [(1, 1, 1), (2, 1, 2), (1, 3, 2)])
def test_patches_round_trip(patch):
    x = torch.randn(2, 3, 2, 3, 4)
    grid = grid_of((2, 3, 4), patch)
    tokens = patchify(x, patch)
    assert tokens.shape == (2, grid.tokens, 3 * patch[0] * patch[1] * patch[2])
    torch.testing.assert_close(unpatchify(tokens, grid, patch), x, rtol=0, atol=0)


def test_patches_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="3 latent rows are not divisible by 2"):
        grid_of((2, 3, 4), (1, 2, 2))


def test_sincos_positions_are_distinct():
    table = sincos_positions(Grid(3, 4, 5), 30)
    assert table.shape == (60, 30)
    assert (torch.cdist(table, table) + torch.eye(60) * 9).min() > 0.05


def test_flops_are_counted_where_they_happen():
    """Against a count by hand: factorised attention costs 4 T N^2 C + 4 N T^2 C, joint 4 (T N)^2 C."""
    grid, c, n = Grid(2, 3, 4), 32, 12

    def flops(module):
        return module.work(grid, 5).executed

    outside = flops(build("joint", depth=2)) - sum(flops(block) for block in build("joint", depth=2).blocks)
    linear = 2 * 24 * c * (3 * c + c + 8 * c)
    joint = linear + 4 * 24 * 24 * c
    spatial, temporal = linear + 2 * 4 * n * n * c, linear + n * 4 * 2 * 2 * c
    assert flops(build("joint", depth=2)) - outside == 2 * joint
    assert flops(build("spatial temporal", depth=2)) - outside == spatial + temporal


@pytest.mark.parametrize("grid", [(2, 3, 4), (4, 3, 4), (2, 6, 4), (6, 6, 4), (1, 1, 1)])
def test_maps_of_space_and_time_grow_as_stated(grid):
    """4 T N^2 C and 4 N T^2 C beside the projections, as counted and as PyTorch counts what is computed."""
    (t, h, w), c = grid, 32
    n, place = h * w, Grid(*grid)
    stated = {"spatial": 4 * t * n**2 * c, "temporal": 4 * n * t**2 * c, "joint": 4 * (t * n) ** 2 * c}
    for text, cost in stated.items():
        attention = build(text, depth=1, grid=grid).blocks[0].branches[0].double()
        projections = 2 * t * n * c * 4 * c
        assert attention.work(place).executed == projections + cost
        with FlopCounterMode(display=False) as counter:
            attention(torch.randn(1, t * n, c).double(), place, None, {})
        assert counter.get_total_flops() == projections + cost


@pytest.mark.parametrize(
    ("text", "depth", "layers"),
    [
        ("a b", 4, ["a", "b", "a", "b"]),
        ("a*2 b*3", 5, ["a", "a", "b", "b", "b"]),
        ("(a b)*3 c", 7, ["a", "b", "a", "b", "a", "b", "c"]),
        ("a > b", 2, ["a > b", "a > b"]),
        ("a+b", 1, ["a + b"]),
        ("a | b", 2, ["a|b", "a|b"]),
        ("x > a + b|c", 1, ["x > a + b|c"]),
        ("(a>b)*2 c", 3, ["a > b", "a > b", "c"]),
    ],
)
def test_plans_are_read_as_the_grammar_says(text, depth, layers):
    assert [str(layer) for layer in plan.parse(text, depth)] == layers


@pytest.mark.parametrize(
    ("text", "depth", "reason"),
    [
        ("", 1, "name is missing at the end"),
        ("a b", 3, "do not tile depth 3"),
        ("a*2 b", 4, "gives 3 layers but depth is 4"),
        ("a*", 1, "whole number"),
        ("a>", 1, "name is missing at the end"),
        ("(a", 1, "not closed"),
        ("a)", 1, "')' is not expected"),
        ("a*2>b", 1, "joins single layers"),
        ("a|(b+c)", 1, "cannot split a group"),
        ("a+(b>c)", 1, "cannot add a group"),
        ("a & b", 1, "missing before '&'"),
        ("(" * 2000, 1, "longer than"),
    ],
)
def test_plans_that_cannot_be_read_are_refused_in_a_sentence(text, depth, reason):
    with pytest.raises(ValueError) as caught:
        plan.parse(text, depth)
    assert reason in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 250
