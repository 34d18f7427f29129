"""Sinkhorn attention: every block attends itself and one other block, made by softly sorting all blocks.

Sparse Sinkhorn attention (arXiv:2002.11296, section 3) with the scores of pooled queries and keys as sorting scores.
"""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from stgen.attention.pattern import Remade, Setting


class Sinkhorn(Remade):
    kind: Literal["sinkhorn"] = "sinkhorn"
    """Keys of the query's block, and of a second block that a soft sorting of all blocks puts beside it."""
    iterations: PositiveInt = 8
    """Rounds of scaling rows, then columns, of the sorting matrix to sum 1."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the scores; the lower, the nearer the sorting comes to a permutation, and the more rounds it takes."""

    by_blocks = True

    def flops(self, setting: Setting):
        from stgen.ops.cost import attention_flops, linear_flops

        width, blocks = setting.width, setting.blocks
        scores = linear_flops(blocks, width, blocks)
        sorting = 2 * linear_flops(blocks, blocks, setting.block * width)
        return scores + sorting + attention_flops(setting.places, 2 * setting.block, width)

    def mixer(self, setting: Setting):
        import torch
        from torch import nn

        from stgen.ops.block_scores import block_scores
        from stgen.ops.sinkhorn import beside_sorted, only_filled, sinkhorn, sort_blocks

        keys = self

        class Sorting(nn.Module):
            def __init__(self):
                super().__init__()
                self.measured: dict[str, torch.Tensor] = {}  # for the log: how far rows are from sum 1, at most

            def forward(self, q, k, v, allowed, attend, near=None):
                filled, block = allowed.attended()[:, 0], allowed.block[1]  # [groups, n]
                scores = only_filled(block_scores(q, k, allowed) / keys.temperature, filled, block)
                sorting = sinkhorn(scores, keys.iterations)  # [S, heads, query blocks, key blocks]
                self.measured["sinkhorn_residual"] = (sorting.sum(-1) - 1).abs().amax().detach()
                both = (sort_blocks(x, sorting, filled, block) for x in (k, v))  # [S, heads, 2 * blocks * block, D]
                return attend(q, *both, beside_sorted(filled, block))

        return Sorting()
