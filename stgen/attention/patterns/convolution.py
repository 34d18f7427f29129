"""Convolutional compression: one key and one value for each block, by a strided depthwise convolution.

Memory-compressed attention (Liu et al., arXiv:1801.10198) with kernel and stride of one block.
"""

from typing import Literal

from stgen.attention.pattern import PatternError, Remade, Setting


class Convolution(Remade):
    kind: Literal["convolution"] = "convolution"
    """One key for each block of the sequence, a learned mixture of the block's own; at first their mean."""

    by_blocks = True

    def flops(self, setting: Setting):
        from stgen.ops.cost import attention_flops, linear_flops

        width, blocks = setting.width, setting.blocks
        weighing = 2 * linear_flops(setting.places, 1, width)
        return weighing + attention_flops(setting.places, blocks, width)

    def mixer(self, setting: Setting):
        import torch
        from torch import nn

        from stgen.ops.block_scores import over_blocks, pool

        class Compression(nn.Module):
            def __init__(self):
                super().__init__()
                shape = (setting.heads, setting.block, setting.head_dim)
                self.for_k, self.for_v = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))

            def forward(self, q, k, v, allowed, attend, near=None):
                filled, block = allowed.attended(), allowed.block[1]
                if block != setting.block:
                    raise PatternError(
                        f"pattern: convolution has learned weights for blocks of {setting.block} places, not of "
                        f"{block}; train and sample on grids that blocks of the same size fit"
                    )
                blocks = -(-k.shape[2] // block)
                keys, values = (
                    pool(x * weight.repeat(1, blocks, 1)[:, : x.shape[2]], filled, block).to(x.dtype)
                    for x, weight in ((k, self.for_k), (v, self.for_v))
                )
                return attend(q, keys, values, over_blocks(filled, q.shape[2], block))

        return Compression()
