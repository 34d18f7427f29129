"""The definition of linear attention: explicit products under a mask, every weight written out; memories in a loop."""

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


def linear_attention_segments_reference(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, segment: int, state: tuple[Tensor, Tensor], delta: bool = False
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Each segment reads the memory M, z of those before it and is then added to it (arXiv:2404.07143, section 2.1)."""
    m, z = state  # [S, heads, F, D], [S, heads, F]
    out = []
    for q, k, u in zip(*(x.split(segment, dim=2) for x in (phi_q, phi_k, v)), strict=True):
        out.append(_recalled(q, m, z))
        new = u - _recalled(k, m, z) if delta else u
        m, z = m + k.transpose(-1, -2) @ new, z + k.sum(2)
    return torch.cat(out, dim=2), (m, z)


def _recalled(phi: Tensor, m: Tensor, z: Tensor) -> Tensor:
    """phi M / (phi · z): [S, heads, places, D], zeros where there is no mass."""
    mass = phi @ z.unsqueeze(-1)  # [S, heads, places, 1]
    empty = mass == 0
    return (phi @ m / mass.masked_fill(empty, 1)).masked_fill(empty, 0)
