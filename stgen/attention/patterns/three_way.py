"""Three branches in parallel: compress, select, slide (NSA, arXiv:2502.11089, sections 3.2 and 3.3; VSA, arXiv:2505.13389).

out = sum over branches of sigmoid(gate_b(v)) * branch_b. `compress` attends the mean key and value of each block,
`select` the blocks whose mean scores highest against the mean query of the block, `slide` the keys near the query.
The choice of blocks carries no gradient; compress, which has the same scores, trains them.
"""

from math import prod
from typing import Annotated, Literal

from pydantic import Field, field_validator

from stgen.attention.pattern import KeepRatio, Radius, Remade, Setting, per_axis
from stgen.attention.patterns.local import Local

Branch = Literal["compress", "select", "slide"]


class ThreeWay(Remade):
    kind: Literal["three_way"] = "three_way"
    """Pooled blocks, the best blocks and the neighbourhood, attended in parallel and added with learned gates."""
    branches: Annotated[list[Branch], Field(min_length=1)] = ["compress", "select", "slide"]
    """Which of the branches there are."""
    ratio: KeepRatio = 0.125
    """select: share of the key blocks that a query block keeps; at least one."""
    radius: Radius = 2
    """slide: tokens to either side, one number or [frames, rows, columns]."""

    by_blocks = True

    @field_validator("branches")
    @classmethod
    def _once_each(cls, branches):
        if len(set(branches)) < len(branches):
            raise ValueError(f"branches names one of {branches} twice; name each once")
        return branches

    @property
    def near(self):
        return Local(radius=self.radius) if "slide" in self.branches else None

    def flops(self, setting: Setting):
        from stgen.ops.cost import attention_flops, linear_flops

        width, places, blocks = setting.width, setting.places, setting.blocks
        box = prod(2 * radius + 1 for radius in per_axis(self.radius))
        cost = {
            "compress": attention_flops(places, blocks, width),
            "select": linear_flops(blocks, width, blocks) + int(self.ratio * attention_flops(places, places, width)),
            "slide": attention_flops(places, min(box, places), width),
        }
        gates = linear_flops(places, width, len(self.branches))
        return gates + sum(cost[branch] for branch in self.branches)

    def mixer(self, setting: Setting):
        import torch
        from torch import nn

        from stgen.ops.block_scores import over_blocks, pool, top_blocks

        keys, branches = self, self.branches

        class Branches(nn.Module):
            def __init__(self):
                super().__init__()
                self.gate = nn.Parameter(torch.zeros(setting.heads, setting.head_dim, len(branches)))
                self.gate_bias = nn.Parameter(torch.zeros(setting.heads, 1, len(branches)))
                self.become(keys)

            def become(self, pattern):
                self.ratio = pattern.ratio

            def forward(self, q, k, v, allowed, attend, near=None):
                """`near`: the Support of the pattern's `near`, within `allowed`."""
                gates = (v @ self.gate.to(v.dtype) + self.gate_bias.to(v.dtype)).sigmoid()  # [S, heads, n, branches]
                outputs = [self.attend_branch(name, q, k, v, allowed, attend, near) for name in branches]
                return (torch.stack(outputs, dim=-1) * gates.unsqueeze(-2)).sum(-1)

            def attend_branch(self, name, q, k, v, allowed, attend, near):
                if name == "slide":
                    return attend(q, k, v, near)
                if name == "select":
                    return attend(q, k, v, top_blocks(q, k, allowed, self.ratio))
                filled, block = allowed.attended(), allowed.block[1]
                keys, values = (pool(x, filled, block).to(x.dtype) for x in (k, v))
                return attend(q, keys, values, over_blocks(filled, q.shape[2], block))

        return Branches()
