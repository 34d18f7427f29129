"""Temporal convolutional network: residual levels of two dilated convolutions (Bai et al., arXiv:1803.01271, section 3)."""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.parametrizations import weight_norm

from stgen.mixers.spec import TCN
from stgen.ops.cost import linear_flops


class Level(nn.Module):
    """x + conv(gelu(conv(x))), both of one dilation; places beyond a sequence's end hold zeros."""

    def __init__(self, width: int, keys: TCN, dilation: int):
        super().__init__()
        reach = (keys.kernel_size - 1) * dilation
        self.sides = (reach, 0) if keys.causal else (reach // 2, reach // 2)
        convolutions = [nn.Conv1d(width, width, keys.kernel_size, dilation=dilation) for _ in range(2)]
        self.first, self.second = (weight_norm(c) if keys.weight_norm else c for c in convolutions)

    def forward(self, x: Tensor, present: Tensor | None) -> Tensor:
        """x [S, C, n], present [S, 1, n] or None for all -> [S, C, n]."""
        hidden = nn.functional.gelu(self.first(pad(x, self.sides)))
        hidden = hidden if present is None else hidden * present
        update = self.second(pad(hidden, self.sides))
        return x + (update if present is None else update * present)


class TCNNet(nn.Module):
    def __init__(self, keys: TCN, width: int):
        super().__init__()
        self.keys, self.width = keys, width
        self.levels = nn.ModuleList(Level(width, keys, 2**i) for i in range(keys.levels))

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """x [S, n, C], tokens of each sequence [S] or None for all, zeros behind them -> [S, n, C]."""
        present = None
        if lengths is not None:
            present = (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[:, None].to(x.dtype)
        x = x.transpose(1, 2)  # [S, C, n]
        for level in self.levels:
            x = level(x, present)
        return x.transpose(1, 2)

    def flops(self, tokens: int) -> int:
        return 2 * self.keys.levels * linear_flops(tokens, self.keys.kernel_size * self.width, self.width)
