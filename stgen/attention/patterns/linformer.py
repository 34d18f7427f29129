"""Linformer: keys and values projected along the sequence to a few (arXiv:2006.04768, section 4)."""

from typing import Literal

from pydantic import PositiveInt

from stgen.attention.pattern import PatternError, Remade, Setting


class Linformer(Remade):
    kind: Literal["linformer"] = "linformer"
    """A few keys, each a learned mixture of all; sequences must have the length of the training grid's."""
    keys: PositiveInt = 64
    """How many."""

    def flops(self, setting: Setting):
        from stgen.ops.cost import attention_flops, linear_flops

        width = setting.width
        projections = 2 * linear_flops(self.keys, setting.places, width)
        return projections + attention_flops(setting.places, self.keys, width)

    def mixer(self, setting: Setting):
        import torch
        from torch import nn

        rows, places = self.keys, setting.places

        class Projection(nn.Module):
            """K' = E K and V' = F V, E and F shared by the heads."""

            def __init__(self):
                super().__init__()
                # Sums over `places` independent keys then have the size of one.
                self.E = nn.Parameter(torch.randn(rows, places) * places**-0.5)
                self.F = nn.Parameter(torch.randn(rows, places) * places**-0.5)

            def forward(self, q, k, v, allowed, attend, near=None):
                if k.shape[2] != places:
                    raise PatternError(
                        f"pattern: linformer has learned to mix sequences of {places} places and cannot mix "
                        f"{k.shape[2]}; train and sample on one grid, or write pattern: convolution"
                    )
                empty = ~allowed.attended()[:, :1, :, None]  # [groups, 1, places, 1]
                empty = empty.repeat(k.shape[0] // empty.shape[0], 1, 1, 1)
                keys = self.E.to(k.dtype) @ k.masked_fill(empty, 0)
                values = self.F.to(v.dtype) @ v.masked_fill(empty, 0)
                return attend(q, keys, values, None)

        return Projection()
