"""Temporal convolutional network: residual levels of two dilated convolutions (Bai et al., arXiv:1803.01271, section 3)."""

from typing import Any

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

    def stream(self, x: Tensor, before: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The same for x [S, C, n] after what each convolution saw last, [S, C, reach]; and what they see last here."""
        reach = self.sides[0]
        x_seen = torch.cat([before[0], x], dim=-1)
        hidden = nn.functional.gelu(self.first(x_seen))
        hidden_seen = torch.cat([before[1], hidden], dim=-1)
        return x + self.second(hidden_seen), (x_seen[..., -reach:], hidden_seen[..., -reach:])


class TCNNet(nn.Module):
    def __init__(self, keys: TCN, width: int):
        super().__init__()
        self.keys, self.width = keys, width
        self.levels: Any = nn.ModuleList(Level(width, keys, 2**i) for i in range(keys.levels))

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """x [S, n, C], tokens of each sequence [S] or None for all, zeros behind them -> [S, n, C]."""
        present = None
        if lengths is not None:
            present = (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[:, None].to(x.dtype)
        x = x.transpose(1, 2)  # [S, C, n]
        for level in self.levels:
            x = level(x, present)
        return x.transpose(1, 2)

    def stream(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The same for sequences [S, n, C] that go on from a state, and the state after them; causal only."""
        x, after = x.transpose(1, 2), []  # [S, C, n]
        for level, before in zip(self.levels, state, strict=True):
            x, seen = level.stream(x, before)
            after.append(seen)
        return x.transpose(1, 2), tuple(after)

    def new_state(self, sequences: int, like: Tensor) -> Any:
        """The state before a sequence."""
        reaches = (level.sides[0] for level in self.levels)
        return tuple((like.new_zeros(sequences, self.width, reach),) * 2 for reach in reaches)

    def flops(self, tokens: int) -> int:
        return 2 * self.keys.levels * linear_flops(tokens, self.keys.kernel_size * self.width, self.width)
