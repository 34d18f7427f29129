"""Laws of the block and the model: identity at the start, no dead weights, masks, plans, checkpointing."""

import pytest
import torch

from stgen.attention import layout, plan
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
