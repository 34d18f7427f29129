"""The definition of RMS norm: PyTorch's own."""

from torch import Tensor
from torch.nn.functional import rms_norm


def rms_norm_reference(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * gain over the last axis."""
    return rms_norm(x, gain.shape, gain, eps)
