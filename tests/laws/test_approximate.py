"""Laws of what attention leaves out of its numbers (qk_topk, low bits), and of polynomial logits."""

import pytest
import torch
from pydantic import ValidationError

from stgen.attention.approximate import Approximation, fixed_point, integers, largest
from stgen.attention.normalisers import Polynomial
from stgen.attention.spec import Approximate, AttentionMixer, PolyLogits
from stgen.model import VideoTransformer
from stgen.ops.dense_attention import attention_map

GRID = (4, 3, 4)
FALLING = {"kind": "linear", "start": 4, "end": 2, "steps": 4, "every": 2}
LOCAL = {"kind": "local", "radius": 1}


def x64(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_largest_channels_are_kept_and_the_gradient_reaches_all():
    q = x64(2, 3, 5, 8)
    kept = largest(q, 3)
    for row, out in zip(q.flatten(0, 2), kept.flatten(0, 2), strict=True):
        order = row.abs().argsort(descending=True)
        assert torch.equal(out[order[:3]], row[order[:3]]) and not out[order[3:]].any()
    q.requires_grad_()
    Approximation(Approximate(qk_topk=3))(q, "q").sum().backward()
    assert torch.equal(q.grad, torch.ones_like(q))
    assert torch.equal(Approximation(Approximate(qk_topk=8))(q, "k"), q)  # k = d is the identity
    assert torch.equal(Approximation(Approximate(qk_topk=3))(q, "v"), q)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_integers_have_as_many_levels_as_their_bits_and_a_step_for_each_head(bits):
    x = x64(2, 3, 50, 8) * torch.tensor([1.0, 10.0, 0.01]).view(1, 3, 1, 1)
    out = integers(x, bits)
    for s in range(2):
        for h in range(3):
            step = x[s, h].abs().max() / (2 ** (bits - 1) - 1)
            numbers = out[s, h] / step
            torch.testing.assert_close(numbers, numbers.round(), rtol=0, atol=1e-9)
            assert numbers.abs().max().round() == 2 ** (bits - 1) - 1
            assert (out[s, h] - x[s, h]).abs().max() <= step / 2 * (1 + 1e-12)
    weights = x64(2, 3, 7, 7).softmax(-1)
    assert (
        len((integers(weights, bits, signed=False)[0, 0] / weights[0, 0].max() * (2**bits - 1)).round().unique())
        <= 2**bits
    )


def test_many_bits_are_the_identity_within_rounding():
    x = x64(2, 3, 50, 8)
    assert (integers(x, 16) - x).abs().max() <= x.abs().max() / 2**15
    assert (fixed_point(x, 16) - x).abs().max() <= 2.0**-17
    assert torch.equal(fixed_point(x, 2) * 4, (x * 4).round())
    assert not integers(torch.zeros(1, 1, 2, 2), 8).any()


@pytest.mark.parametrize("bits", [2, 3, 4, FALLING], ids=str)
@pytest.mark.parametrize("form", ["integer", "fixed"])
@pytest.mark.parametrize("name", ["q", "k", "v", "map"])
def test_the_gradient_passes_the_rounding_as_if_there_were_none(name, form, bits):
    """Exactly, at every number: the step follows the largest, so none is out of range. What is not named stays."""
    one = Approximation(Approximate(quantise=[name], form=form, bits=bits))
    x = (x64(2, 3, 9, 8) * 3).requires_grad_() if name != "map" else x64(2, 3, 9, 9).softmax(-1).requires_grad_()
    weights = x64(*x.shape, seed=1)
    for step, now in enumerate([4, 4, 3, 3, 2, 2] if bits is FALLING else [bits]):
        one.numbers.at_step(step)
        out = one(x, name)
        expected = fixed_point(x, now) if form == "fixed" else integers(x, now, signed=name != "map")
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)
        assert (out - x).abs().max() > 1e-3
        (gradient,) = torch.autograd.grad((out * weights).sum(), x)
        assert torch.equal(gradient, weights)
    assert all(one(x, other) is x for other in ("q", "k", "v", "map") if other != name)


def build(**mixer):
    torch.manual_seed(0)
    keys = dict(in_channels=3, grid=GRID, width=32, depth=2, heads=4, plan="a", text_width=8)
    return VideoTransformer(**keys, mixers={"a": mixer}).double()


def inputs():
    return x64(2, 3, *GRID), torch.tensor([100.0, 900.0]), x64(2, 5, 8, seed=1)


def trained(model, steps=2):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(steps):
        optimizer.zero_grad()
        latents, t, text = inputs()
        (model(latents, t, text).sample - latents.flip(-1)).square().mean().backward()
        optimizer.step()
    return model


MIXERS = {
    "channels": {"layout": "spatial", "approximate": {"qk_topk": 3}},
    "queries and keys": {"layout": "temporal", "pattern": LOCAL, "approximate": {"quantise": ["q", "k", "v"], "bits": 4}},
    "map": {"layout": "joint", "normaliser": {"kind": "relu"}, "approximate": {"quantise": ["map"], "bits": 4}},
    "map of a pattern": {"layout": "joint", "pattern": LOCAL, "sink": {"kind": "tokens"}, "approximate": {"quantise": ["map"]}},
    "fixed point": {"layout": "joint", "approximate": {"quantise": ["q", "k"], "form": "fixed"}},
    "learned cubic": {"layout": "joint", "normaliser": {"kind": "poly_logits", "learned": True, "ratio": 0.5}},
    "cubic of a pattern": {"layout": "spatial", "pattern": LOCAL, "sink": {"kind": "logit"},
                           "normaliser": {"kind": "poly_logits"}},
    "map reuse": {"layout": "temporal", "normaliser": {"kind": "poly_logits"}, "reuse": {"what": "map"}},
}  # fmt: skip


@pytest.mark.parametrize("name", MIXERS)
def test_every_weight_moves_and_a_batch_equals_its_singles(name):
    model = trained(build(**MIXERS[name]))
    dead = [n for n, p in model.named_parameters() if p.grad is None or not (p.grad != 0).any()]
    assert not dead
    latents, t, text = inputs()
    batch = model(latents, t, text).sample
    for i in range(2):
        one = slice(i, i + 1)
        torch.testing.assert_close(model(latents[one], t[one], text[one]).sample, batch[one], atol=1e-10, rtol=0)


def same(a, b):
    torch.testing.assert_close(
        trained(build(**a))(*inputs()).sample, trained(build(**b))(*inputs()).sample, atol=1e-9, rtol=0
    )


@pytest.mark.parametrize(
    "keys", [{"layout": "spatial"}, {"layout": "joint", "pattern": LOCAL, "sink": {"kind": "logit"}}]
)
def test_what_leaves_nothing_out_is_the_mixer(keys):
    same(keys, {**keys, "normaliser": {"kind": "poly_logits", "clamp": 1e6}})
    same(keys, {**keys, "approximate": {"qk_topk": 8}})
    fine = {"quantise": ["q", "k", "v", "map"], "bits": 24}
    exact, rounded = (trained(build(**k)) for k in (keys, {**keys, "approximate": fine}))
    torch.testing.assert_close(rounded(*inputs()).sample, exact(*inputs()).sample, atol=1e-3, rtol=0)


def test_polynomial_logits_by_hand():
    keys = PolyLogits(coefficients=(0.1, 0.5, -0.2, 0.05), clamp=1.5, ratio=0.4)
    q, k = x64(2, 3, 5, 8) * 2, x64(2, 3, 6, 8, seed=1)
    s = (q @ k.mT * 8**-0.5).clamp(-1.5, 1.5)
    s = 0.1 + 0.5 * s - 0.2 * s**2 + 0.05 * s**3
    kept = torch.zeros_like(s, dtype=torch.bool).scatter(
        -1, s.argsort(dim=-1, descending=True, stable=True)[..., :2], True
    )
    expected = s.masked_fill(~kept, -torch.inf).softmax(-1)
    torch.testing.assert_close(attention_map(q, k, transform=Polynomial(keys, 3)), expected, rtol=0, atol=1e-7)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0] = False
    out = attention_map(q, k, mask, transform=Polynomial(keys, 3))
    assert not out[0].any() and torch.allclose(out[1], expected[1])


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"normaliser": {"kind": "linear"}, "approximate": {"quantise": ["map"]}}, "no map to quantise"),
        ({"reuse": {"what": "map"}, "approximate": {"quantise": ["map"]}}, "is rounded there"),
        ({"approximate": {"quantise": ["q", "q"]}}, "name each once"),
        (
            {"pattern": {"kind": "causal"}, "approximate": {"quantise": ["k"]}},
            "future ones included; under causal write form: fixed",
        ),
        ({"approximate": {"quantise": ["q"], "bits": 1}}, "greater than or equal to 2"),
        ({"approximate": {"bits": {"kind": "linear", "start": 4, "end": 8, "steps": 2}}}, "may only fall"),
        ({"normaliser": {"kind": "poly_logits", "clamp": 0}}, "greater than 0"),
    ],
)
def test_what_has_no_meaning_is_refused_in_a_sentence(keys, sentence):
    with pytest.raises(ValidationError, match=sentence):
        AttentionMixer.model_validate(keys)


def test_bits_follow_a_schedule_in_whole_numbers():
    one = Approximation(Approximate(quantise=["q"], bits={"kind": "linear", "start": 8, "end": 4, "steps": 8}))
    x, seen = x64(1, 1, 9, 4), []
    for step in range(10):
        one.numbers.at_step(step)
        seen.append(one.numbers.now.bits)
        torch.testing.assert_close(one(x, "q"), integers(x, seen[-1]), rtol=0, atol=1e-15)
    assert seen == [8, 8, 7, 6, 6, 6, 5, 4, 4, 4] and all(isinstance(bits, int) for bits in seen)
