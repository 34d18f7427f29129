"""Scores of blocks of queries against blocks of keys, and supports made of the best: exact, ties to the lower index.

Nothing here carries a gradient, except `pool` and `block_scores`.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from stgen.ops.block_scores.reference import block_scores_reference, keep_top, pool_reference
from stgen.ops.block_scores.reference import keep_above as keep_above
from stgen.ops.block_scores.reference import keep_mass as keep_mass
from stgen.ops.block_scores.reference import masked_softmax as masked_softmax
from stgen.ops.support import BUILD_PAIRS, SOME, Support


def pool(x: Tensor, filled: Tensor, block: int) -> Tensor:
    """Means over blocks of the places that hold tokens: [S, heads, blocks, D], float32 or wider.

    Args:
        x: [S, heads, n, D].
        filled: [groups, heads or 1, n] bool, as `Support.attended` gives it.
        block: places of a block; the last may be ragged.
    """
    return pool_reference(x, spread(filled, x), block)


def block_scores(q: Tensor, k: Tensor, allowed: Support) -> Tensor:
    """Scores of pooled queries and keys: [S, heads, query blocks, key blocks], float32 or wider.

    Means are over the queries that may attend some key, and over the keys that some query may attend.
    """
    filled_q, filled_k = spread(allowed.per_query() > 0, q), spread(allowed.attended(), k)
    return block_scores_reference(q, k, filled_q, filled_k, allowed.block)


def spread(x: Tensor, like: Tensor) -> Tensor:
    """x [groups, heads or 1, ...] written out for each sequence and head of `like` [S, heads, ...]."""
    return x.repeat(like.shape[0] // x.shape[0], like.shape[1] // x.shape[1], *(1 for _ in x.shape[2:]))


def share_of(number: Tensor, ratio: float) -> Tensor:
    """max(1, floor(ratio * number)), and 0 of 0: how many of `number` keys are kept."""
    # 0.29 * 100 is 28.999999999999996: what a float lacks to the next whole number is not the user's meaning.
    return (number.double() * ratio + 1e-9).floor().long().clamp(min=1).minimum(number)


def of_blocks(kept: Tensor, allowed: Support) -> Support:
    """What `allowed` leaves of the block pairs in `kept` [S, heads, query blocks, key blocks] bool."""
    return Support.from_blocks(kept, allowed.queries, allowed.keys, allowed.block) & allowed


def over_blocks(filled: Tensor, queries: int, block: int) -> Support | None:
    """Every query over one key for each block that holds a token; None where all blocks do.

    filled [groups, heads or 1, m] bool.
    """
    present = pad(filled[:, :1], (0, -filled.shape[-1] % block)).unflatten(-1, (-1, block)).any(-1)
    if present.all():
        return None
    return Support.from_mask(present.unsqueeze(2).expand(-1, -1, queries, -1), (block, block))


@torch.no_grad()
def top_blocks(q: Tensor, k: Tensor, allowed: Support, ratio: float) -> Support:
    """The best share `ratio` of the allowed key blocks of each query block, by pooled scores; at least one."""
    scores = block_scores(q, k, allowed)
    kept = spread(allowed.kept, scores)
    return of_blocks(keep_top(scores, kept, share_of(kept.sum(-1), ratio)), allowed)


@torch.no_grad()
def top_keys(q: Tensor, k: Tensor, allowed: Support, ratio: float) -> Support:
    """The best share `ratio` of the allowed keys of each query, by its own scores; at least one.

    Looks at every pair, some blocks of queries at a time, which bounds its memory.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(wide) * q.shape[-1] ** -0.5, k.to(wide).transpose(-1, -2)
    rows, blocks = allowed.block[0], allowed.table.shape[2]
    step = max(1, BUILD_PAIRS // (q.shape[0] * q.shape[1] * allowed.keys * rows))
    parts = []
    for first in range(0, blocks, step):
        mask = spread(_rows(allowed, first, first + step).dense(), q)  # [S, heads, rows, m]
        scores = q[:, :, first * rows : (first + step) * rows] @ k
        parts.append(Support.from_mask(keep_top(scores, mask, share_of(mask.sum(-1), ratio)), allowed.block))
    return Support.join(parts, dim=2)


def _rows(support: Support, first: int, last: int) -> Support:
    """The part of the query blocks from `first` up to `last`."""
    table = support.table[:, :, first:last]
    bits = support.bits[support.slots[:, :, first:last][table == SOME]]
    queries = min(last * support.block[0], support.queries) - first * support.block[0]
    return Support(queries, support.keys, support.block, table, bits)
