"""Linear attention against its definition: values and gradients, chunks, prefixes, rows without mass, precision."""

import pytest
import torch
from torch import Tensor

from stgen.ops.linear_attention import linear_attention
from stgen.ops.linear_attention.reference import chunk_mask

CASES = {
    # n, chunk, prefix; features are 5, so that chunks of 1 and 2 share segments and those of 3 and more do not
    "global": (13, None, 0),
    "global, prefix": (13, None, 4),
    "one place": (1, None, 0),
    "one place, causal": (1, 1, 0),
    "causal": (13, 1, 0),
    "segments": (13, 2, 0),
    "segments, prefix": (13, 2, 3),
    "frames": (13, 4, 0),
    "frames, prefix": (13, 4, 1),
    "whole frames": (12, 6, 2),
    "one frame": (7, 9, 0),
}


def random_inputs(n: int, prefix: int, heads: int = 2) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = (2, heads, n, 5), (2, heads, prefix + n, 5), (2, heads, prefix + n, 3)
    phi_q, phi_k, v = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    return [x.requires_grad_() for x in (phi_q.abs(), phi_k.abs(), v)]


def random_mask(places: int) -> Tensor:
    """Some keys of the first sequence are left out, and every key of the second."""
    mask = torch.rand(2, places, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[0, 0], mask[1] = True, False
    return mask


def by_hand(phi_q: Tensor, phi_k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """One query after the other, over the keys that `seen` [S, n, m] names."""
    out = torch.zeros(*phi_q.shape[:-1], v.shape[-1], dtype=v.dtype)
    for s, h, i in torch.cartesian_prod(*(torch.arange(size) for size in phi_q.shape[:-1])).tolist():
        keys = seen[s, i]
        weights = phi_k[s, h, keys] @ phi_q[s, h, i]
        if weights.sum() > 0:
            out[s, h, i] = weights @ v[s, h, keys] / weights.sum()
    return out


@pytest.mark.parametrize("impl", ["reference", "state", "auto"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_every_implementation_is_the_sum_over_the_keys_that_are_seen(case, masked, impl):
    n, chunk, prefix = CASES[case]
    inputs = random_inputs(n, prefix)
    mask = random_mask(prefix + n) if masked else None
    place, key = torch.arange(n)[:, None], torch.arange(prefix + n)
    seen = torch.ones(2, n, prefix + n, dtype=torch.bool)
    if chunk is not None:  # written unlike the op's own mask
        seen &= (key < prefix) | (key - prefix < (place // chunk + 1) * chunk)
    if mask is not None:
        seen &= mask[:, None]
    out = linear_attention(*inputs, key_mask=mask, chunk=chunk, prefix=prefix, impl=impl)
    torch.testing.assert_close(out, by_hand(*inputs, seen), rtol=0, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_the_state_are_those_of_the_definition(case, masked):
    n, chunk, prefix = CASES[case]
    mask = random_mask(prefix + n) if masked else None
    weight = torch.randn(2, 2, n, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    grads = []
    for impl in ("state", "reference"):
        inputs = random_inputs(n, prefix)
        out = linear_attention(*inputs, key_mask=mask, chunk=chunk, prefix=prefix, impl=impl)
        grads.append(torch.autograd.grad((out * weight).sum(), inputs))
    for ours, exact in zip(*grads, strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-11)
    assert grads[1][2][0].any()


@pytest.mark.parametrize("chunk", [None, 2, 4])
def test_gradients_are_those_of_finite_differences(chunk):
    inputs = random_inputs(6, 1, heads=1)
    assert torch.autograd.gradcheck(lambda *x: linear_attention(*x, chunk=chunk, prefix=1, impl="state"), inputs)


@pytest.mark.parametrize("impl", ["reference", "state"])
@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_without_mass_output_and_gradient_are_zero(chunk, impl):
    phi_q, phi_k, v = (x.detach() for x in random_inputs(9, 0))
    phi_q[0, 0, 3] = 0  # a query without features; the second head's queries share none with its keys
    phi_q[:, 1, :, 2:] = 0
    phi_k[:, 1, :, :2] = 0
    inputs = [x.requires_grad_() for x in (phi_q, phi_k, v)]
    out = linear_attention(*inputs, chunk=chunk, impl=impl)
    assert not out[0, 0, 3].any() and not out[:, 1].any() and out[0, 0, 2].all()
    dq, dk, dv = torch.autograd.grad(out.square().sum() + out.sum(), inputs)
    assert not dq[0, 0, 3].any() and not any(x[:, 1].any() for x in (dq, dk, dv))
    assert all(x.isfinite().all() and x[:, 0].any() for x in (dq, dk, dv))


@pytest.mark.parametrize("chunk", [1, 3, 5, 8])
def test_nothing_leaks_from_later_chunks(chunk):
    phi_q, phi_k, v = random_inputs(16, 2)
    out = linear_attention(phi_q, phi_k, v, chunk=chunk, prefix=2, impl="state")
    end = chunk * (6 // chunk + 1)  # of place 6's chunk
    for grad in torch.autograd.grad(out[:, :, 6].sum(), (phi_k, v)):
        assert not grad[:, :, 2 + end :].any() and grad[:, :, : 2 + end].abs().sum((0, 1, 3)).all()


@pytest.mark.parametrize("chunk", [None, 1, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_cost_no_more_than_rounding_the_output(dtype, chunk):
    g = torch.Generator().manual_seed(0)
    phi_q, phi_k, v = (torch.rand(1, 2, 2048, 16, generator=g).to(dtype) for _ in range(3))
    exact = linear_attention(phi_q.double(), phi_k.double(), v.double(), chunk=chunk, impl="reference")
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = linear_attention(phi_q, phi_k, v, chunk=chunk, impl="state")
        assert out.dtype == dtype
        assert (out.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("chunk", [None, 1, 1000])
def test_what_the_backward_pass_needs_grows_with_the_places_not_their_pairs(chunk):
    n = 1 << 15
    phi = torch.ones(1, 1, n, 2, requires_grad=True)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        linear_attention(phi, phi, torch.ones(1, 1, n, 2), chunk=chunk)
    assert sum(sizes) < 100 * n  # every pair would be 32 768 n


def test_chunks_of_one_place_are_causal():
    assert torch.equal(chunk_mask(4, 1, 0), torch.ones(4, 4).tril().bool())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"impl": "fast"}, "impl should be auto, reference or state, got 'fast'"),
        ({"prefix": 9}, "between 0 and the number of keys 6, got 9"),
        ({"chunk": 0}, "chunk should be at least 1 place, got 0"),
        ({"chunk": 2, "prefix": 1}, "prefix and queries, 1 \\+ 6, got 6"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        linear_attention(*random_inputs(6, 0), **options)
