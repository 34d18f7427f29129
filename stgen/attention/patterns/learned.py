"""Learned 0-1 masks: a small net scores pairs of blocks, and the best of each row are kept.

The scorer is trained straight through the choice (Bengio et al., arXiv:1308.3432): a kept pair has a gate of 1 that
carries the gradient of the sigmoid of its score. At a gate of 1 the gradient of the gate is that of a bias of 0.
"""

from dataclasses import replace
from typing import Literal

from pydantic import PositiveInt

from stgen.attention.pattern import Chosen, KeepRatio, Setting, kept_share


class Learned(Chosen):
    kind: Literal["learned"] = "learned"
    """The key blocks that a small trained net scores highest."""
    ratio: KeepRatio = 0.25
    """Share of the allowed key blocks that a query block keeps; at least one."""
    width: PositiveInt = 16
    """Channels into which the net maps pooled queries and pooled keys; a score is their product."""

    by_blocks = True

    def shares(self, setting: Setting):
        share = kept_share(self.ratio, setting.blocks)
        return share, share

    def choosing_flops(self, setting: Setting):
        from stgen.ops.cost import linear_flops

        blocks = setting.blocks
        maps = 2 * linear_flops(blocks, setting.head_dim, self.width)
        return setting.heads * (maps + linear_flops(blocks, self.width, blocks))

    def chooser(self, setting: Setting):
        from torch import nn

        from stgen.ops.block_scores import keep_top, of_blocks, pool, share_of, spread

        keys, width = self, self.width

        class Scorer(nn.Module):
            def __init__(self):
                super().__init__()
                self.to_q = nn.Linear(setting.head_dim, width, bias=False)
                self.to_k = nn.Linear(setting.head_dim, width, bias=False)
                self.become(keys)

            def become(self, pattern):
                self.ratio = pattern.ratio

            def forward(self, q, k, allowed):
                # Queries and keys serve attention; only the net is trained to choose.
                pooled_q = pool(q.detach(), allowed.per_query() > 0, allowed.block[0]).to(self.to_q.weight.dtype)
                pooled_k = pool(k.detach(), allowed.attended(), allowed.block[1]).to(self.to_k.weight.dtype)
                scores = self.to_q(pooled_q) @ self.to_k(pooled_k).transpose(-1, -2) * width**-0.5
                kept = spread(allowed.kept, scores)
                best = keep_top(scores.detach(), kept, share_of(kept.sum(-1), self.ratio))
                gate = scores.sigmoid().to(q.dtype)
                return replace(of_blocks(best, allowed), bias=gate - gate.detach())

        return Scorer()
