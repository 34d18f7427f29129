"""The definition of dense attention: explicit products in plain PyTorch."""

import torch
from torch import Tensor


def dense_attention_reference(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over [S, heads, n, D]; rows without keys give zeros and zero gradients."""
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5  # [S, heads, n, m]
    if key_mask is None:
        return scores.softmax(-1) @ v
    mask = key_mask[:, None, None, :]  # [S, 1, 1, m]
    # The lowest finite number keeps a row without keys free of NaN; the product below then makes it zero.
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1) * mask
    return weights @ v
