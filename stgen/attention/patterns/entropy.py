"""Dynamic masks: a query block keeps the more key blocks, the more evenly its scores are spread.

Pooled scores are softmaxed over the allowed key blocks; e to the entropy of a row is the number of blocks that it
attends in effect. Counts are proportional to that number, between 1 and the row's allowed blocks, and sum over the
query blocks of a sequence and head to `ratio` of the allowed pairs of blocks. (A budget shared out by need, as
Ada-KV does over heads, arXiv:2407.11550; top-p selection without a budget is in arXiv:2502.02770.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from stgen.attention.pattern import Chosen, KeepRatio, Setting, kept_share

if TYPE_CHECKING:
    from torch import Tensor

HALVINGS = 40  # of the interval that holds the factor sought: shares are then exact to 1e-10


class Entropy(Chosen):
    kind: Literal["entropy"] = "entropy"
    """The key blocks with the largest pooled scores, more of them where the scores are spread evenly."""
    ratio: KeepRatio = 0.25
    """Share of the allowed pairs of blocks that a sequence keeps in each head; a query block keeps at least one."""

    sees_all_queries = True
    by_blocks = True

    def shares(self, setting: Setting):
        share = kept_share(self.ratio, setting.blocks)
        return share, share

    def choosing_flops(self, setting: Setting):
        from stgen.ops.cost import linear_flops

        blocks = setting.blocks
        return setting.heads * linear_flops(blocks, setting.head_dim, blocks)

    def chooser(self, setting: Setting):
        from stgen.ops.block_scores import block_scores, keep_top, masked_softmax, of_blocks, spread

        def choose(q, k, allowed):
            scores = block_scores(q.detach(), k.detach(), allowed)  # [S, heads, query blocks, key blocks]
            kept = spread(allowed.kept, scores)
            weights = masked_softmax(scores, kept)
            effective = (-weights.xlogy(weights).sum(-1)).exp()  # [S, heads, query blocks]
            return of_blocks(keep_top(scores, kept, shared_out(effective, kept.sum(-1), self.ratio)), allowed)

        return choose


def shared_out(need: Tensor, most: Tensor, ratio: float) -> Tensor:
    """Whole numbers [..., rows] in proportion to `need`, at least 1 and at most `most`, that sum to ratio * sum(most).

    The sum is rounded to the nearest whole number, and is not below one for each row. Largest remainders round up; of
    equal ones that of the lower row.
    """
    need, least = need.double(), most.clamp(max=1)
    total = (most.sum(-1, keepdim=True) * ratio).round().maximum(least.sum(-1, keepdim=True))

    def at(factor):
        return (factor * need).maximum(least).minimum(most)

    low = need.new_zeros(total.shape)
    high = (most / need).amax(-1, keepdim=True)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        enough = at(middle).sum(-1, keepdim=True) >= total
        low, high = middle.where(~enough, low), middle.where(enough, high)
    shares = at(high)
    counts = shares.floor()
    rank = (shares - counts).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (counts + (rank < total - counts.sum(-1, keepdim=True))).long()
