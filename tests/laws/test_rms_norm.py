"""RMS norm in one node against PyTorch's own: values, gradients, error in low precision."""

import pytest
import torch

from stgen.ops.rms_norm import rms_norm
from stgen.ops.rms_norm.reference import rms_norm_reference


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 7, 3, 8), (1, 4, 1, 64)])
def test_values_and_gradients_are_those_of_the_definition(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    gain = torch.randn(shape[-1], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(rms_norm(x, gain), rms_norm_reference(x, gain, 1e-6), rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(rms_norm, (x, gain))


def test_a_row_of_zeros_gives_zeros_and_finite_gradients():
    x = torch.zeros(2, 8, requires_grad=True)
    rms_norm(x, torch.ones(8)).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_strided_views_are_read_right():
    qkv = torch.randn(2, 6, 3, 4, 8)
    gain = torch.randn(8)
    torch.testing.assert_close(rms_norm(qkv[:, :, 1], gain), rms_norm_reference(qkv[:, :, 1].contiguous(), gain, 1e-6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_as_exact_as_pytorchs_own(dtype):
    torch.manual_seed(0)
    x, gain, weight = torch.randn(64, 64).to(dtype), torch.randn(64).to(dtype), torch.randn(64, 64)

    def results(function, dtype):
        inputs = [t.to(dtype).requires_grad_() for t in (x.clone(), gain.clone())]
        out = function(*inputs, 1e-6)
        return [out, *torch.autograd.grad((out * weight.to(out.dtype)).sum(), inputs)]

    exact = results(rms_norm_reference, torch.float64)
    for ours, theirs, truth in zip(results(rms_norm, dtype), results(rms_norm_reference, dtype), exact, strict=True):

        def error(t, truth=truth):
            return float(((t.double() - truth).norm() / truth.norm()).detach())

        # PyTorch's own computes inside in float32 and rounds once; here each product is rounded.
        assert error(ours) <= max(1.5 * error(theirs), 4 * torch.finfo(dtype).eps)
