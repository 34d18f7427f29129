"""The definition of attention: explicit products in plain PyTorch, gradients by autograd."""

from collections.abc import Callable

import torch
from torch import Tensor

from stgen.ops.normaliser import Normaliser

SOFTMAX = Normaliser("softmax")
Transform = Callable[[Tensor, Tensor | None], Tensor]


def attention_map_reference(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None = None,
    normaliser: Normaliser = SOFTMAX,
    sink: Tensor | None = None,
    bias: Tensor | None = None,
    transform: Transform | None = None,
) -> Tensor:
    """The map P [S, heads, n, m] with out = P v; rows without keys are zero and give no gradient.

    Args:
        q, k: [S, heads, n, D] and [S, heads, m, D].
        mask: bool, true where a key may be attended; `bias` is added to the scores. Both broadcast to the map.
        sink: [heads] score of a further key without value.
        transform: of scores and mask, what f sees instead of the scores.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # scaled first: fp16 products overflow at 65504
    scores = scores if bias is None else scores + bias
    scores = scores if transform is None else transform(scores, mask)
    if normaliser.kind == "softmax" and sink is None:  # the same by PyTorch's own kernel, for speed
        if mask is None:
            return scores.softmax(-1)
        # The lowest finite number keeps a row without keys free of NaN; the product then makes it zero.
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1) * mask
    weights, mass, _ = normaliser.weights(scores, mask, sink)
    return (weights / mass.masked_fill(mass == 0, 1)).to(scores.dtype)


def dense_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    normaliser: Normaliser = SOFTMAX,
    sink: Tensor | None = None,
) -> Tensor:
    """P v over [S, heads, n, D] with one mask of keys [S, m] for all queries of a sequence."""
    mask = None if key_mask is None else key_mask[:, None, None, :]  # [S, 1, 1, m]
    return attention_map_reference(q, k, mask, normaliser, sink) @ v
