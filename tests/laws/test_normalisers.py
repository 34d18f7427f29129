"""From a normaliser's keys to what attends, and what its features promise."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from stgen.attention import spec
from stgen.attention.normalisers import Favor, Features, build, orthogonal_rows
from stgen.attention.sinks import Sink
from stgen.ops.dense_attention import dense_attention
from stgen.ops.linear_attention import linear_attention
from stgen.ops.normaliser import Normaliser

FEATURES = ("elu", "relu", "favor", "learned")


def features(kind: str, head_dim: int = 6, **keys) -> Features:
    built = build(spec.Linear(features=kind, **keys), heads=2, head_dim=head_dim, seed=3)  # type: ignore[arg-type]
    assert isinstance(built, Features)
    return built


def random_qkv(n: int, head_dim: int = 6, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, n, head_dim, generator=g, dtype=torch.float64)
    return q * scale, k * scale, v


@pytest.mark.parametrize(
    ("section", "built"),
    [
        (spec.Softmax(), Normaliser("softmax")),
        (spec.OffByOne(), Normaliser("softmax")),
        (spec.Relu(), Normaliser("relu")),
        (spec.Relu2(), Normaliser("relu2")),
        (spec.Poly(), Normaliser("poly")),
        (spec.Poly(base="e", cut=-6.0), Normaliser("poly_e", -6.0)),
    ],
)
def test_normalisers_of_scores_are_named_for_the_kernels(section, built):
    assert build(section, heads=2, head_dim=6, seed=0) == built


def test_only_off_by_one_brings_a_sink():
    q = torch.randn(1, 3, 2, 4)
    logits = Sink(spec.NoSink(), spec.OffByOne(), 3, 4).logit(q)
    assert logits is not None and torch.equal(logits, torch.zeros(3))
    assert all(Sink(spec.NoSink(), other, 3, 4).logit(q) is None for other in (spec.Softmax(), spec.Linear()))


@pytest.mark.parametrize("chunk", [None, 1, 4])
@pytest.mark.parametrize("kind", FEATURES)
def test_masked_linear_attention_is_that_of_running_sums(kind, chunk):
    q, k, v = random_qkv(17)
    phi = features(kind).double()
    mask = torch.rand(2, 17, generator=torch.Generator().manual_seed(1)) < 0.7
    results = []
    for impl in ("reference", "state"):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = linear_attention(
            phi(inputs[0], True), phi(inputs[1], False), inputs[2], key_mask=mask, chunk=chunk, impl=impl
        )
        weights = [*inputs, *phi.parameters()]
        results.append([out, *torch.autograd.grad(out.square().sum(), weights)])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-11)
        assert exact.any()


@pytest.mark.parametrize("kind", FEATURES)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
def test_features_are_finite_and_never_negative(kind, scale):
    q, k, _ = random_qkv(9, scale=scale)
    for x, is_query in ((q.float(), True), (k.float(), False)):
        phi = features(kind)(x.requires_grad_(), is_query)
        phi.square().sum().backward()
        assert phi.isfinite().all() and (phi >= 0).all() and phi.any(-1).float().mean() > 0.1
        assert x.grad is not None and x.grad.isfinite().all()


def test_elu_features_are_elu_plus_one():
    x = torch.linspace(-3, 3, 13, dtype=torch.float64, requires_grad=True)  # holds 0, where the slope is 1
    ours, theirs = features("elu")(x, True), nn.functional.elu(x) + 1
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), x), torch.autograd.grad(theirs.sum(), x))
    assert float(features("elu")(torch.tensor([-30.0]), True)) == pytest.approx(9.3576e-14, rel=1e-4)


@pytest.mark.parametrize("kind", FEATURES)
def test_sixteen_bits_and_autocast_give_features_in_float32(kind):
    q = random_qkv(5)[0].bfloat16()
    exact = features(kind)(q.float(), True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(features(kind)(q, True), exact)


# --------------------------------------------------------------------------------------------------------------- favor


def favor_error(size: int, seeds: range) -> float:
    """Root mean square over draws of the distance from softmax attention, relative to its size."""
    q, k, v = random_qkv(12, scale=0.4)  # |q|, |k| of about 1: beyond 2 the estimate's tails are too heavy to count on
    exact = dense_attention(q, k, v, impl="reference")
    errors = []
    for seed in seeds:
        phi = Favor(2, 6, size, 0, seed).double()
        errors.append((linear_attention(phi(q, True), phi(k, False), v) - exact).square().mean())
    return float((torch.stack(errors).mean() / exact.square().mean()).sqrt())


def test_favor_nears_softmax_as_its_features_grow():
    errors = [favor_error(size, range(20)) for size in (24, 96, 384, 1536)]
    # Monte Carlo: four times the features halve the error; measured 0.48 to 0.53 of it.
    assert all(0.4 < after / before < 0.6 for before, after in pairwise(errors)), errors
    assert errors[-1] < 0.04, errors


def test_favor_estimates_the_kernel_without_bias():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 4, generator=g, dtype=torch.float64) / 2
    products = []
    for seed in range(4000):
        phi = Favor(1, 4, 8, 0, seed).double()
        w = phi.projection.mT
        stabiliser = [((x * 4**-0.25) @ w - x.square().sum(-1, keepdim=True) / 4).max().exp() for x in (q, k)]
        products.append((phi(q, True) * phi(k, False)).sum() * stabiliser[0] * stabiliser[1])
    products = torch.stack(products)
    kernel = ((q * k).sum() / 2).exp()
    assert (products.mean() - kernel).abs() < 4 * products.std() / 4000**0.5
    assert products.std() / 4000**0.5 < 0.05 * kernel


def test_constants_of_favor_cancel():
    q, k, v = random_qkv(7)
    phi = features("favor").double()
    shifted = torch.tensor([3.0, -2.0], dtype=torch.float64)[:, None, None, None]  # another constant a sequence
    out = linear_attention(phi(q, True), phi(k, False), v)
    torch.testing.assert_close(linear_attention(phi(q, True), phi(k, False) * shifted.exp(), v), out)
    alone = [linear_attention(phi(q[:, :, i : i + 1], True), phi(k, False), v) for i in range(7)]
    torch.testing.assert_close(torch.cat(alone, dim=2), out)


@pytest.mark.parametrize("size", [3, 6, 15])
def test_random_rows_are_orthogonal_within_blocks_and_gaussian_in_length(size):
    rows = orthogonal_rows(2000, size, 6, torch.Generator().manual_seed(0)).double()
    assert rows.shape == (2000, size, 6)
    for block in rows.split(6, dim=1):
        products = block @ block.mT
        assert (products - products.diagonal(dim1=1, dim2=2).diag_embed()).abs().max() < 1e-4
    # Each row is a standard Gaussian: mean squared length 6, no direction preferred, not even by sign.
    assert abs(float(rows.square().sum(-1).mean()) - 6) < 0.15
    assert rows.mean(0).abs().max() < 5 / 2000**0.5
    assert (rows.square().mean(0) - 1).abs().max() < 5 * (2 / 2000) ** 0.5


def test_heads_and_seeds_have_random_features_of_their_own():
    one, other = features("favor"), Favor(2, 6, 6, 0, 4)
    assert isinstance(one, Favor)
    assert not torch.allclose(one.projection[0], one.projection[1])
    assert not torch.allclose(one.projection, other.projection)
    assert torch.equal(one.projection, Favor(2, 6, 6, 0, 3).projection)


def test_redraws_depend_on_the_step_alone():
    def at(*steps: int) -> Tensor:
        phi = Favor(2, 6, 8, 10, 3)
        for step in steps:
            phi.at_step(step)
        return phi.projection.clone()

    assert torch.equal(at(0, 9), at()) and not torch.allclose(at(10), at())
    assert torch.equal(at(0, 5, 10, 19, 20, 25), at(29)) and not torch.allclose(at(29), at(19))
    resumed = Favor(2, 6, 8, 10, 3)
    resumed.load_state_dict({"projection": at(29)})
    assert torch.equal(resumed.projection, at(29))
    resumed.at_step(5)  # a run that starts over from these weights
    assert torch.equal(resumed.projection, at())


def test_without_redraws_loaded_features_stay():
    phi, other = Favor(2, 6, 8, 0, 3), Favor(2, 6, 8, 0, 4)
    other.load_state_dict(copy.deepcopy(phi.state_dict()))
    other.at_step(100)
    assert torch.equal(other.projection, phi.projection)


def test_learned_features_start_from_their_seed():
    weights = [next(features("learned", size=9).parameters()) for _ in range(2)]
    assert weights[0].shape == (2, 9, 6) and torch.equal(*weights)
