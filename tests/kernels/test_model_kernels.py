"""A model computed by the kernels (here in Triton's interpreter) is the model computed by PyTorch: values, gradients, curve."""

import logging

import pytest
import torch

from stgen.model import VideoTransformer
from stgen.ops import dispatch

GRID = (4, 2, 4)
LOCAL = {"kind": "local", "radius": 1}
MIXERS = {
    "temporal": {"layout": "temporal"},
    "causal": {"layout": "temporal", "pattern": {"kind": "causal"}, "normaliser": {"kind": "off_by_one"}},
    "height": {"layout": "height", "normaliser": {"kind": "poly"}, "sink": {"kind": "logit"}},
    "sink tokens": {"layout": "spatial", "pattern": LOCAL, "sink": {"kind": "tokens", "count": 2}},
    "relu": {"layout": "width", "normaliser": {"kind": "relu"}},
    "shifted windows": {"layout": "window", "size": [2, 2, 4], "shift": [1, 1, 2], "pattern": LOCAL},
    "map reuse": {"layout": "temporal", "sink": {"kind": "tokens", "count": 2}, "reuse": {"what": "map"}},
    "support reuse": {"layout": "spatial", "block": [1, 2, 2], "pattern": {"kind": "topk"}, "reuse": {"what": "support"}},
    "kv reuse": {"layout": "spatial", "reuse": {"what": "kv"}},
    "blocks": {"layout": "joint", "order": "tile", "block": [2, 2, 4], "pattern": {"kind": "topk", "ratio": 0.4}},
    "linear": {"layout": "joint", "normaliser": {"kind": "linear", "features": "elu"}},
    "heads": {"layout": "temporal", "heads": {"0": {"pattern": LOCAL}, "1": {"normaliser": {"kind": "relu2"}}}},
}  # fmt: skip


def build(mixer, **changes):
    torch.manual_seed(0)
    keys = dict(in_channels=3, grid=GRID, width=64, depth=2, heads=2, plan="a", text_width=8, mixers={"a": mixer})
    return VideoTransformer(**{**keys, **changes})


def batch(seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, *GRID, generator=g), torch.tensor([100.0, 900.0]), torch.randn(2, 5, 8, generator=g)


def curve(model, steps):
    """Losses of a few steps of training, and the gradients of the last."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for step in range(steps):
        optimizer.zero_grad()
        latents, t, text = batch(step)
        loss = (model(latents, t, text).sample - latents.flip(-1)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture
def kernels_on_cpu(monkeypatch):
    """`auto` takes the kernels, which the interpreter runs."""
    dispatch._works.cache_clear()
    dispatch._told.cache_clear()
    monkeypatch.setattr(dispatch, "is_gpu", lambda x: x.dtype != torch.float64)
    yield
    dispatch._works.cache_clear()


QUICK = ("temporal", "sink tokens", "blocks")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MIXERS])
def test_a_model_with_kernels_is_the_model(name, kernels_on_cpu, monkeypatch, caplog):
    with caplog.at_level(logging.INFO, "stgen"):
        losses, gradients = curve(build(MIXERS[name]), steps=2)
    taken = {record.args[0] for record in caplog.records if record.args and record.args[-1] == "triton"}
    assert taken & {"short_attention", "block_sparse_attention", "linear_attention"}, caplog.text
    monkeypatch.setattr(dispatch, "is_gpu", lambda x: False)
    expected, own = curve(build(MIXERS[name]), steps=2)
    assert losses == pytest.approx(expected, rel=1e-5)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, own[key], rtol=1e-3, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.slow
def test_training_with_kernels_draws_the_same_curve(kernels_on_cpu, monkeypatch):
    mixers = {"a": MIXERS["sink tokens"], "b": MIXERS["causal"], "c": MIXERS["blocks"]}
    keys = dict(plan="a b c", depth=3, mixers=mixers)
    losses, _ = curve(build(None, **keys), steps=20)
    monkeypatch.setattr(dispatch, "is_gpu", lambda x: False)
    expected, _ = curve(build(None, **keys), steps=20)
    assert losses == pytest.approx(expected, rel=1e-3)
    assert losses[-1] < 0.9 * losses[0]


def test_kernels_that_do_not_compile_cost_a_warning_and_not_the_run(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "is_gpu", lambda x: True)

    def trial(device, dtype):
        raise RuntimeError("no such target: sm_42\nand a long story")

    x = torch.zeros(1)
    assert not dispatch.by_kernels("an_op", x, None, trial)
    assert not dispatch.by_kernels("an_op", x, None, trial)
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "an_op: the Triton kernels do not run on cpu in float32 (no such target: sm_42); PyTorch computes it, slower. "
        "`stgen doctor` says more"
    ]
    assert not dispatch.by_kernels("an_op", x, "they know no such thing", lambda *_: None)
