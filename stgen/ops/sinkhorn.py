"""Sinkhorn sorting of blocks: a matrix scaled to sums of 1, blocks mixed by it, and who attends them.

`filled` [groups, n] bool says which places hold tokens; sequence s of a batch uses group s % groups.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from stgen.ops.support import ALL, NONE, SOME, Support


def sinkhorn(scores: Tensor, iterations: int) -> Tensor:
    """exp(scores) with rows and columns scaled in turn to sum 1, columns last: [..., b, b].

    In log space, so that large scores do no harm (Sinkhorn 1964; arXiv:2002.11296, section 3).
    """
    for _ in range(iterations):
        scores = scores - scores.logsumexp(-1, keepdim=True)
        scores = scores - scores.logsumexp(-2, keepdim=True)
    return scores.exp()


def only_filled(scores: Tensor, filled: Tensor, block: int) -> Tensor:
    """Scores [S, heads, blocks, blocks] under which a block without tokens is sorted to itself and no other."""
    present = in_blocks(filled, block).any(-1)  # [groups, blocks]
    present = present.repeat(scores.shape[0] // len(present), 1).unsqueeze(1)
    alone = torch.full_like(scores, -torch.inf).diagonal_scatter(torch.zeros_like(scores[..., 0]), dim1=-2, dim2=-1)
    return torch.where(present.unsqueeze(-1) & present.unsqueeze(-2), scores, alone)


def sort_blocks(x: Tensor, sorting: Tensor, filled: Tensor, block: int) -> Tensor:
    """The blocks of x [S, heads, n, D], zero where there is no token, and after them the same blocks sorted.

    Sorted block b is the sum over j of sorting[b, j] times block j: [S, heads, 2 * blocks * block, D].
    """
    empty = ~filled.repeat(x.shape[0] // len(filled), 1)[:, None, :, None]
    own = pad(x.masked_fill(empty, 0), (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, block))
    mixed = (sorting.to(x.dtype) @ own.flatten(3)).view_as(own)
    return torch.cat([own.flatten(2, 3), mixed.flatten(2, 3)], dim=2)


def beside_sorted(filled: Tensor, block: int) -> Support:
    """Every query attends its own block and the sorted block of the same number, of the keys of `sort_blocks`.

    A place of a sorted block is a key where some block has a token at that place.
    """
    cut, places = in_blocks(filled, block), filled.shape[1]  # [groups, blocks, block]
    (groups, blocks, _), number = cut.shape, torch.arange(cut.shape[1], device=cut.device)
    keys = torch.stack([cut, cut.any(1, keepdim=True).expand_as(cut)], dim=2)  # [groups, blocks, 2, block]
    bits = cut[:, :, None, :, None] & keys[:, :, :, None]  # [groups, blocks, 2, block, block]
    kept = bits.sum((-2, -1))  # [groups, blocks, 2]
    pairs = (places - number * block).clamp(max=block).unsqueeze(-1) * block
    codes = (SOME + (kept == pairs) * (ALL - SOME)).masked_fill(kept == 0, NONE).to(torch.int8)
    table = torch.zeros(groups, 1, blocks, 2 * blocks, dtype=torch.int8, device=cut.device)
    table[:, 0, number, number], table[:, 0, number, blocks + number] = codes.unbind(-1)
    return Support(places, 2 * blocks * block, (block, block), table, bits[codes == SOME])


def in_blocks(filled: Tensor, block: int) -> Tensor:
    """[groups, n] -> [groups, blocks, block]."""
    return pad(filled, (0, -filled.shape[1] % block)).unflatten(1, (-1, block))
