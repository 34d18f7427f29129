"""The largest of each row in linear time: quick-select (Hoare 1961; as top-k engine of SpAtten, arXiv:2012.09852, IV).

A row is split around pivots until its k-th largest score is found, not sorted. What is above that score is kept, and of
those equal to it the first. On a CPU `torch.topk` without order splits so (std::nth_element; where less than a 64th is
kept, a heap); `torch.kthvalue` does too, but takes 1.1 to 1.9 times as long (measured).
"""

import torch
from torch import Tensor

FEWEST = 32  # scores of a row; below, sorting takes as long (measured, benchmarks/selection.py)


def fits(scores: Tensor) -> bool:
    """Whether rows of scores are selected faster than sorted."""
    plain = type(scores) is Tensor and not torch.compiler.is_compiling()  # counts are read, so there must be numbers
    return plain and scores.device.type == "cpu" and scores.shape[-1] >= FEWEST and scores.numel() > 0


def keep_top_by_pivots(scores: Tensor, allowed: Tensor, counts: Tensor) -> Tensor:
    """What `reference.keep_top` keeps: of each row the `counts` [..., rows] largest allowed scores, the first of equal ones.

    scores [..., rows, m] without NaN, allowed likewise, bool -> bool.
    """
    scores = scores.masked_fill(~allowed, -torch.inf)
    counts = counts.expand(scores.shape[:-1]).unsqueeze(-1)
    least = _least_kept(scores, counts.clamp(1, scores.shape[-1]))
    kept = scores >= least
    if (crowded := kept.sum(-1, keepdim=True) > counts).any():
        rows = crowded.squeeze(-1)
        kept[rows] = _first_of_equal(scores[rows], least[rows], counts[rows])
    return kept & allowed


def _least_kept(scores: Tensor, counts: Tensor) -> Tensor:
    """The score of rank `counts` [..., rows, 1] in each row."""
    fewest, most = (int(x) for x in counts.aminmax())
    if fewest == most:
        return scores.topk(most, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    return scores.topk(most, dim=-1).values.gather(-1, counts.long() - 1)


def _first_of_equal(scores: Tensor, least: Tensor, counts: Tensor) -> Tensor:
    """What is above `least`, and as many of those equal to it, from the first on, as are missing to `counts`."""
    above, equal = scores > least, scores == least
    missing = counts - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= missing))
