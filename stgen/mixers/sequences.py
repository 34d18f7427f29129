"""A mixer without a map as a branch of the plan: tokens go out as sequences, through it, and come back."""

from typing import Any

import torch
from torch import Tensor, nn

from stgen.attention import layout
from stgen.attention.reuse import Carry, Kept
from stgen.mixers.recurrent import RecurrentNet
from stgen.mixers.spec import TCN, TokenMixer
from stgen.mixers.tcn import TCNNet
from stgen.ops.cost import Work
from stgen.tokens import Grid


class SequenceMixer(nn.Module):
    """Runs a net over the sequences of a layout. Global tokens (registers) stand in no sequence and get nothing."""

    def __init__(self, name: str, keys: TokenMixer, width: int, registers: int, number: int = 0):
        """`number`: of the use in the plan, by which it finds in the carry what a stream remembers."""
        super().__init__()
        self.name, self.keys, self.registers, self.number = name, keys, registers, number
        self.layout = layout.build(keys.layout, keys.size)
        self.net = TCNNet(keys, width) if isinstance(keys, TCN) else RecurrentNet(keys, width)

    def forward(self, x: Tensor, grid: Grid, rope: Any, carry: Carry) -> tuple[Tensor, Carry]:
        """x [B, registers + N, C] -> the same shape; it knows places by their order and leaves nothing for later layers.

        Where the carry holds the state after earlier frames it goes on from there, and leaves the state after these.
        """
        own = self.layout.fold(x[:, self.registers :, None], grid)[:, 0]  # [S, n, C]
        if self.number in carry:
            out, state = self.net.stream(own, carry[self.number].memory)
            carry = {**carry, self.number: Kept(memory=state)}
            return self.layout.unfold(out[:, None], grid)[:, :, 0], carry
        present = self.layout.key_mask(grid, x.device)  # [sequences of a clip, n]
        if present is None:
            out = self.net(own, None)
        else:  # tokens of a cut window stand together, so that its sequence is as short as they are many
            order = present.logical_not().to(torch.int8).argsort(dim=-1, stable=True)
            order = order.repeat(len(own) // len(order), 1)[..., None].expand_as(own)
            lengths = present.sum(-1).repeat(len(own) // len(present))  # [S]
            mixed = self.net(own.gather(1, order), lengths)
            out = torch.empty_like(mixed).scatter(1, order, mixed)
        out = self.layout.unfold(out[:, None], grid)[:, :, 0]  # [B, N, C]
        return nn.functional.pad(out, (0, 0, self.registers, 0)), carry

    def new_memories(self, batch: int, chunk: Grid, like: Tensor) -> dict[int, Any]:
        """What it carries over time, of a video that has not begun, by number of the use; nothing where it sees one frame."""
        if not self.keys.mixes_time:
            return {}
        return {self.number: self.net.new_state(batch * self.layout.sequence(chunk)[0], like)}

    def work(self, grid: Grid) -> Work:
        """Operations of a forward pass over one clip; there is no map that could be dense."""
        flops = self.net.flops(grid.tokens)
        return Work(flops, flops)

    def words(self, grid: Grid) -> str:
        """What it does, for people."""
        count, length = self.layout.sequence(grid)
        return f"{self.name}: {self.keys.kind} over {count} sequence{'s' * (count > 1)} of {length}"
