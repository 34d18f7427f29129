"""The definition of block scores, and of what is kept of them: plain PyTorch.

Scores of blocks are those of their means, as in MoBA (arXiv:2502.13189, section 2.2) and VSA (arXiv:2505.13389,
section 2): the mean of a block is taken over the places that hold tokens.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad


def pool_reference(x: Tensor, filled: Tensor, block: int) -> Tensor:
    """Means over the filled places of each block: x [..., n, D], filled [..., n] -> [..., blocks, D], at least float32.

    A block without tokens has mean 0.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32)).masked_fill(~filled.unsqueeze(-1), 0)
    total = pad(x, (0, 0, 0, -x.shape[-2] % block)).unflatten(-2, (-1, block)).sum(-2)
    number = pad(filled, (0, -filled.shape[-1] % block)).unflatten(-1, (-1, block)).sum(-1, keepdim=True)
    return total / number.clamp(min=1)


def block_scores_reference(q: Tensor, k: Tensor, filled_q: Tensor, filled_k: Tensor, block: tuple[int, int]) -> Tensor:
    """Scores of pooled queries and keys, scaled by D^-0.5: [..., query blocks, key blocks]."""
    pooled_q, pooled_k = pool_reference(q, filled_q, block[0]), pool_reference(k, filled_k, block[1])
    return pooled_q @ pooled_k.transpose(-1, -2) * q.shape[-1] ** -0.5


def keep_top(scores: Tensor, allowed: Tensor, counts: Tensor) -> Tensor:
    """The `counts` [..., rows] largest allowed scores of each row; of equal ones that of the lower index comes first.

    scores [..., rows, m], allowed likewise, bool -> bool. A row never keeps more than it is allowed.
    """
    order = _descending(scores, allowed)
    first = torch.arange(scores.shape[-1], device=scores.device) < counts.unsqueeze(-1)
    return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, first.expand_as(order)) & allowed


def keep_mass(scores: Tensor, allowed: Tensor, mass: float) -> Tensor:
    """Top-p: the fewest largest scores of each row whose softmax over the allowed ones sums to `mass` or more."""
    order = _descending(scores, allowed)
    weights = masked_softmax(scores, allowed).gather(-1, order)
    before = weights.cumsum(-1) - weights  # the first of a row is always kept
    return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, before < mass) & allowed


def keep_above(scores: Tensor, allowed: Tensor, threshold: float) -> Tensor:
    """Scores whose softmax over the allowed ones of the row is `threshold` or more, and always the largest."""
    largest = keep_top(scores, allowed, torch.ones_like(scores[..., 0], dtype=torch.int64))
    return ((masked_softmax(scores, allowed) >= threshold) & allowed) | largest


def masked_softmax(scores: Tensor, allowed: Tensor) -> Tensor:
    """Softmax of each row over its allowed scores; zeros where none is allowed."""
    return scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1) * allowed


def _descending(scores: Tensor, allowed: Tensor) -> Tensor:
    """Indices of each row by falling score, those not allowed last."""
    return scores.masked_fill(~allowed, -torch.inf).argsort(dim=-1, descending=True, stable=True)


def lists_reference(kept: Tensor, width: int) -> Tensor:
    """Indices of what each row keeps, ascending, then the first of them again or 0: [..., m] -> [..., width] int32."""
    order = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    found, first = kept.sum(-1, keepdim=True), order[..., :1] * kept.any(-1, keepdim=True)
    lists = torch.where(torch.arange(kept.shape[-1], device=kept.device) < found, order, first)
    return pad(lists[..., :width], (0, max(0, width - kept.shape[-1]))).to(torch.int32)
