"""The optimiser's groups and state, gradient clipping, the averaged weights and the learning rate."""

import math

import pytest
import torch
from torch import nn

from stgen import schema
from stgen.checkpoint import CheckpointError, load, save
from stgen.ema import EMA
from stgen.optim import build, clip_and_check, load_state_tensors, named_parameters, state_tensors
from stgen.schedules import COURSES, lr_at


class Tiny(nn.Module):
    no_decay = ("table",)

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Parameter(torch.randn(2, 4))
        self.words = nn.Embedding(5, 4)
        self.inner = nn.Linear(4, 6)
        self.norm = nn.LayerNorm([2, 6])
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.register_buffer("count", torch.ones(3))

    def forward(self):
        return self.norm(self.inner(self.words(torch.tensor([1, 2])) + self.table)).pow(3).mean()


def train(module, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        module().backward()
        optimizer.step()


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def snapshot(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def test_groups():
    module = Tiny()
    names = named_parameters({"net": module})
    decayed, plain = build({"net": module}, schema.Optim(adam_weight_decay=0.3)).param_groups
    by_name = {name: p for name, p in names.items()}
    assert {n for n, p in by_name.items() if any(p is q for q in decayed["params"])} == {
        "net.inner.weight",
        "net.unused.weight",
    }
    assert len(decayed["params"]) + len(plain["params"]) == len(names) == 8
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert not any("frozen" in name for name in names)


def test_shared_parameter_is_listed_once():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    assert list(named_parameters({"a": first, "b": second})) == ["a.weight", "a.bias", "b.bias"]


def test_optimizer_state_round_trip_is_exact(tmp_path):
    """Through a file, with the parameters named in another order: the next steps are the same bit by bit."""
    module, resumed = Tiny(), Tiny(seed=1)
    optimizer = build({"net": module}, schema.Optim())
    train(module, optimizer, 3)
    tensors = state_tensors(optimizer, named_parameters({"net": module}))
    assert "net.inner.weight.exp_avg" in tensors
    folder = save(tmp_path, 3, {"optimizer": tensors}, {}, 1)

    resumed.load_state_dict(snapshot(module))
    again = build({"net": resumed}, schema.Optim())
    names = dict(reversed(named_parameters({"net": resumed}).items()))
    load_state_tensors(again, names, load(folder).tensors["optimizer"])
    train(module, optimizer, 2)
    train(resumed, again, 2)
    assert equal(module.state_dict(), resumed.state_dict())
    without = Tiny()
    train(without, build({"net": without}, schema.Optim()), 2)
    assert not torch.equal(without.inner.weight, module.inner.weight)


def test_optimizer_state_before_the_first_step():
    module, resumed = Tiny(), Tiny()
    optimizer, again = (build({"net": m}, schema.Optim()) for m in (module, resumed))
    load_state_tensors(
        again, named_parameters({"net": resumed}), state_tensors(optimizer, named_parameters({"net": module}))
    )
    train(module, optimizer, 1)
    train(resumed, again, 1)
    assert equal(module.state_dict(), resumed.state_dict())


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda t: t.pop("net.inner.bias.exp_avg"), "net.inner.bias.exp_avg is missing"),
        (lambda t: t.update(extra=torch.ones(1)), "extra is unexpected"),
        (lambda t: t.update({"net.table.exp_avg_sq": torch.ones(4, 2)}), "net.table.exp_avg_sq has shape [4, 2]"),
    ],
)
def test_optimizer_state_that_misfits_is_named(change, named):
    module = Tiny()
    optimizer, names = build({"net": module}, schema.Optim()), named_parameters({"net": module})
    tensors = state_tensors(optimizer, names)
    change(tensors)
    with pytest.raises(CheckpointError) as caught:
        load_state_tensors(optimizer, names, tensors)
    assert named in str(caught.value)


def test_clipping():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert clip_and_check([parameter, nn.Parameter(torch.zeros(1))], 1.0) == 5.0
    assert torch.allclose(parameter.grad, torch.tensor([0.6, 0.8]))
    assert clip_and_check([parameter], 10.0) == pytest.approx(1.0)
    assert torch.allclose(parameter.grad, torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_leaves_the_gradients(bad):
    good, broken = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    good.grad, broken.grad = torch.tensor([30.0, 40.0]), torch.tensor([bad])
    assert not math.isfinite(clip_and_check([good, broken], 1.0))
    assert good.grad.tolist() == [30.0, 40.0]


def test_ema_by_hand():
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 1.0)
    ema = EMA({"net": module}, decay=0.5)
    nn.init.constant_(module.weight, 3.0)
    ema.update(1)  # decay (1 + 1) / (10 + 1)
    assert ema.state_tensors()["net.weight"].item() == pytest.approx(1 * 2 / 11 + 3 * 9 / 11)
    before = ema.state_tensors()["net.weight"].item()
    ema.update(1000)  # the ramp has passed 0.5
    assert ema.state_tensors()["net.weight"].item() == pytest.approx((before + 3) / 2)


def test_ema_swap_restores_bitwise_even_after_an_error():
    module = Tiny()
    ema = EMA({"net": module}, decay=0.9)
    with torch.no_grad():
        module.inner.weight.mul_(1.7)
        module.inner.bias[0] = math.nan
        module.count.zero_()
    raw = {key: value.clone().view(torch.uint8) for key, value in module.state_dict().items()}
    addresses = [p.data_ptr() for p in module.parameters()]
    with pytest.raises(RuntimeError, match="inside"), ema.applied():
        assert torch.equal(module.inner.weight, ema.state_tensors()["net.inner.weight"])
        assert not torch.equal(module.inner.weight.view(torch.uint8), raw["inner.weight"])
        assert module.count.sum() == 0
        raise RuntimeError("inside")
    assert equal({key: value.view(torch.uint8) for key, value in module.state_dict().items()}, raw)
    assert addresses == [p.data_ptr() for p in module.parameters()]


def test_ema_of_half_precision_weights_is_kept_in_float32():
    module = nn.Linear(2, 2).bfloat16()
    ema = EMA({"net": module}, decay=0.999)
    ema.update(5)
    assert {t.dtype for t in ema.state_tensors().values()} == {torch.float32}


def test_ema_state_round_trip():
    module = Tiny()
    ema, other = EMA({"net": module}, 0.9), EMA({"net": Tiny(seed=3)}, 0.9)
    assert not equal(ema.state_tensors(), other.state_tensors())
    other.load_state_tensors(ema.state_tensors())
    assert equal(ema.state_tensors(), other.state_tensors())
    partial = ema.state_tensors()
    del partial["net.table"]
    with pytest.raises(CheckpointError, match=r"net\.table is missing"):
        other.load_state_tensors(partial)


def lr(step, total=10, scheduler="linear", warmup_steps=0, min_ratio=0.0):
    return lr_at(step, total, scheduler=scheduler, warmup_steps=warmup_steps, min_ratio=min_ratio)


def test_lr_by_hand():
    assert [lr(s, warmup_steps=4) for s in (0, 1, 3, 4, 7, 9, 10)] == pytest.approx([0.25, 0.5, 1, 1, 0.5, 1 / 6, 0])
    assert [lr(s, scheduler="cosine", min_ratio=0.2) for s in (0, 5, 10)] == pytest.approx([1, 0.6, 0.2])
    assert lr(2, 8, "cosine") == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert {lr(s, scheduler="constant", min_ratio=0.3, warmup_steps=1) for s in range(12)} == {1.0}
    assert lr(15, min_ratio=0.1) == pytest.approx(0.1)


def test_a_warm_up_longer_than_the_run_is_cut():
    assert [lr(s, 4, warmup_steps=100) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert lr(0, 1, warmup_steps=1) == 1.0
    assert lr(4, 4, warmup_steps=100) == 1.0


@pytest.mark.parametrize("course", ["linear", "cosine"])
def test_courses_meet_their_ends(course):
    assert [COURSES[course](8.0, 2.0, p) for p in (-1, 0, 0.5, 1, 2)] == pytest.approx([8, 8, 5, 2, 2])
