"""Learned 0-1 masks: a small net scores pairs of blocks, and the best of each row are kept.

The scorer is trained straight through the choice (Bengio et al., arXiv:1308.3432): a kept pair has a gate of 1 that
carries the gradient of the sigmoid of its score. At a gate of 1 the gradient of the gate is that of a bias of 0.

With Gumbel noise on the scores the best of a row are a sample without replacement instead (Kool et al., arXiv:1903.06059;
straight through the top-k as in Xie & Ermon, arXiv:1901.10517), so that blocks with a low score are tried too. The noise
is a function of seed, layer and training step: however a batch is cut, recomputed or resumed, it is the same.
"""

from dataclasses import replace
from random import Random
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from stgen.attention.pattern import Chosen, KeepRatio, Setting, kept_share


class Learned(Chosen):
    kind: Literal["learned"] = "learned"
    """The key blocks that a small trained net scores highest."""
    ratio: KeepRatio = 0.25
    """Share of the allowed key blocks that a query block keeps; at least one."""
    width: PositiveInt = 16
    """Channels into which the net maps pooled queries and pooled keys; a score is their product."""
    gumbel: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Scale of Gumbel noise that is added to the scores in training, drawn anew each step and alike for all clips."""

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
        import torch
        from torch import nn

        from stgen.ops.block_scores import keep_top, of_blocks, pool, share_of, spread

        keys, width = self, self.width

        class Scorer(nn.Module):
            def __init__(self):
                super().__init__()
                self.to_q = nn.Linear(setting.head_dim, width, bias=False)
                self.to_k = nn.Linear(setting.head_dim, width, bias=False)
                self.step, self.seed = 0, torch.initial_seed()
                self.become(keys)

            def become(self, pattern):
                self.ratio = pattern.ratio

            def at_step(self, step):
                self.step = step

            def forward(self, q, k, allowed):
                # Queries and keys serve attention; only the net is trained to choose.
                pooled_q = pool(q.detach(), allowed.per_query() > 0, allowed.block[0]).to(self.to_q.weight.dtype)
                pooled_k = pool(k.detach(), allowed.attended(), allowed.block[1]).to(self.to_k.weight.dtype)
                scores = self.to_q(pooled_q) @ self.to_k(pooled_k).transpose(-1, -2) * width**-0.5
                scores = scores + self.noise(scores) if keys.gumbel and self.training else scores
                kept = spread(allowed.kept, scores)
                best = keep_top(scores.detach(), kept, share_of(kept.sum(-1), self.ratio))
                gate = scores.sigmoid().to(q.dtype)
                return replace(of_blocks(best, allowed), bias=gate - gate.detach())

            def noise(self, scores):
                """Gumbel noise for scores [S, heads, query blocks, key blocks], the same for all sequences."""
                key = Random(f"gumbel/{self.seed}/{setting.layer}/{self.step}").getrandbits(63)
                drawn = torch.rand(scores.shape[1:], generator=torch.Generator().manual_seed(key), dtype=torch.float64)
                return (-keys.gumbel * (-drawn.clamp(min=1e-300).log()).log()).to(scores)

        return Scorer()
