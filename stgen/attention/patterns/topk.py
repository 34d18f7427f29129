"""Top-k attention: the keys with the largest scores.

Of single keys a row (Gupta et al., arXiv:2106.06899), or of key blocks a query block by pooled scores (MoBA,
arXiv:2502.13189, for video VSA, arXiv:2505.13389).
"""

from typing import Literal

from stgen.attention.pattern import Chosen, KeepRatio, Setting, kept_share


class TopK(Chosen):
    kind: Literal["topk"] = "topk"
    """The keys with the largest scores."""
    ratio: KeepRatio = 0.25
    """Share of the allowed keys (or key blocks) that a query (or query block) keeps; at least one."""
    level: Literal["block", "token"] = "block"
    """Choose blocks by the scores of pooled queries and keys, or single keys by their own (looks at every pair)."""

    @property
    def by_blocks(self) -> bool:  # type: ignore[override]
        return self.level == "block"

    def shares(self, setting: Setting):
        if self.level == "token":
            return kept_share(self.ratio, setting.places), 1.0  # some key of almost every block
        share = kept_share(self.ratio, setting.blocks)
        return share, share

    def choosing_flops(self, setting: Setting):
        from stgen.ops.cost import linear_flops

        scored = setting.places if self.level == "token" else setting.blocks
        return setting.heads * linear_flops(scored, setting.head_dim, scored)

    def chooser(self, setting: Setting):
        from stgen.ops.block_scores import top_blocks, top_keys

        choose = top_blocks if self.level == "block" else top_keys
        return lambda q, k, allowed: choose(q, k, allowed, self.ratio)
