"""The definition of attention within boxes: sequences folded out of the tokens, explicit products, autograd."""

from typing import NamedTuple

import torch
from torch import Tensor

from stgen.ops.boxes import Boxes
from stgen.ops.normaliser import Normaliser


class Attended(NamedTuple):
    """Output [B, N, heads, D], map [S, heads, n, sinks + n] and LSE [S, heads, n]."""

    out: Tensor
    map: Tensor
    lse: Tensor


def short_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    boxes: Boxes,
    normaliser: Normaliser,
    sink: Tensor | None = None,
    sink_k: Tensor | None = None,
    sink_v: Tensor | None = None,
    mask: Tensor | None = None,
) -> Attended:
    """Shapes as in `stgen.ops.short_attention.short_attention`."""
    there = boxes.present(q.device)  # [boxes, places]
    there = None if there is None else there.repeat(len(q), 1)[:, None, :, None]  # [S, 1, n, 1]
    q, k = boxes.fold(q), with_sink(boxes.fold(k), sink_k)  # [S, heads, n, D] and [S, heads, sinks + n, D]
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # scaled first: fp16 products overflow at 65504
    weights, mass, level = normaliser.weights(scores, _visible(there, mask, scores, k.shape[2] - q.shape[2]), sink)
    weights = (weights / mass.masked_fill(mass == 0, 1)).to(q.dtype)
    lse = normaliser.log_mass(mass, level)
    if there is not None:
        weights, lse = weights.masked_fill(~there, 0), lse.masked_fill(~there, -torch.inf)
    return Attended(apply_map_reference(weights, v, boxes, sink_v), weights, lse.squeeze(-1))


def apply_map_reference(weights: Tensor, v: Tensor, boxes: Boxes, sink_v: Tensor | None = None) -> Tensor:
    """P v: [B, N, heads, D]."""
    return boxes.unfold(weights.to(v.dtype) @ with_sink(boxes.fold(v), sink_v))


def with_sink(x: Tensor, rows: Tensor | None) -> Tensor:
    """Keys or values x [S, heads, n, D] with the rows [heads, sinks, D] before those of every sequence."""
    return x if rows is None else torch.cat([rows.to(x.dtype).expand(len(x), -1, -1, -1), x], dim=2)


def _visible(there: Tensor | None, mask: Tensor | None, scores: Tensor, sinks: int) -> Tensor | None:
    """Which of sink rows and keys each query sees, broadcasting to the scores; None for all."""
    if there is None and mask is None:
        return None
    keys = torch.ones(scores.shape[0], 1, 1, scores.shape[3] - sinks, dtype=torch.bool, device=scores.device)
    keys = keys if there is None else there.transpose(-1, -2)
    keys = keys if mask is None else keys & mask
    return torch.cat([keys.new_ones(*keys.shape[:-1], sinks), keys], dim=-1)
