"""Random attention: a few random key blocks for each query block (BigBird, arXiv:2007.14062, section 2).

The blocks are those of the smallest hash of (seed, layer, query block, key block), so they are the same on every
device, rank and run, whichever rows are asked for.
"""

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from stgen.attention.pattern import Fixed

WORD = (1 << 32) - 1


class Random(Fixed):
    kind: Literal["random"] = "random"
    """Random key blocks, drawn once for each layer."""
    blocks: PositiveInt = 2
    """Key blocks of a query block; as many as a sequence has is full attention."""
    seed: NonNegativeInt = 0
    """Another seed draws other blocks."""

    by_blocks = True

    def allows(self, q, k, frame):
        import torch

        every = torch.arange(frame.blocks, device=q.block.device)
        drawn = min(self.blocks, frame.blocks)
        last = self._rank(q.block, every, frame).topk(drawn, largest=False).values.amax(-1, keepdim=True)
        return self._rank(q.block, k.block, frame) <= last

    def _rank(self, query, key, frame):
        """Key blocks are drawn in the order of this number; it ends in the block's own, so no two are equal."""
        drawn = _mixed(_mixed(_mixed(_mixed(self.seed & WORD) ^ frame.layer) ^ query) ^ key)
        return (drawn >> 1) * frame.blocks + key


def _mixed(x):
    """Bijection of 32-bit numbers that scatters neighbours; its factors keep products within 63 bits."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & WORD
    x = ((x ^ (x >> 15)) * 0x46CA68B5) & WORD
    return x ^ (x >> 16)
