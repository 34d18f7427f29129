"""The definition of linear attention: explicit products under a mask, every weight written out."""

import torch
from torch import Tensor


def linear_attention_reference(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, key_mask: Tensor | None = None, chunk: int | None = None, prefix: int = 0
) -> Tensor:
    """sum_j w_ij v_j / sum_j w_ij, w_ij = phi_q_i · phi_k_j; a row without mass gives zeros and zero gradients."""
    weights = phi_q @ phi_k.transpose(-1, -2)  # [S, heads, n, m]
    if key_mask is not None:
        weights = weights.masked_fill(~key_mask[:, None, None, :], 0)
    if chunk is not None:
        weights = weights.masked_fill(~chunk_mask(phi_q.shape[-2], chunk, prefix, phi_q.device), 0)
    mass = weights.sum(-1, keepdim=True)
    empty = mass == 0
    return (weights @ v / mass.masked_fill(empty, 1)).masked_fill(empty, 0)


def chunk_mask(n: int, chunk: int, prefix: int, device: torch.device | str = "cpu") -> Tensor:
    """Block-causal mask [n, prefix + n]: place i sees the prefix and all chunks up to and including its own."""
    number = torch.arange(n, device=device) // chunk
    seen = torch.ones(n, prefix, dtype=torch.bool, device=device)
    return torch.cat([seen, number[None] <= number[:, None]], dim=-1)
