"""One layer of the transformer: mixers in turn, the prompt, the MLP, each modulated and gated by time and text.

The modulation is adaLN-single (PixArt-alpha, arXiv:2310.00426, section 2.3): one projection of the conditioning serves
all layers, each layer adds its own table. Gates start at zero, so a layer starts as the identity; nothing else that
lies on the same path does, or neither factor would ever receive a gradient.
"""

import torch
from torch import Tensor, nn

from stgen.attention.attend import Attention, CrossAttention
from stgen.attention.reuse import Carry, Use
from stgen.mixers.sequences import SequenceMixer
from stgen.ops.cost import Work, linear_flops
from stgen.ops.modulated_norm import modulated_norm
from stgen.tokens import Grid


class ModulationTable(nn.Module):
    """A layer's own offsets to the shared shift, scale and gate."""

    no_decay = ("table",)

    def __init__(self, width: int, rows: int = 3):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(rows, width))

    def forward(self, shared: Tensor) -> tuple[Tensor, ...]:
        """shared [B, rows, C] -> as many of [B, 1, C]: shift, scale and gate, or the gate alone; B may count frames."""
        # In the type of `shared`: mixed precision then keeps the residual stream, and its traffic, in bfloat16.
        return (shared + self.table.to(shared.dtype)).unsqueeze(2).unbind(1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, N, C] normed, scaled and shifted by [B, 1, C], or by [B * frames, 1, C] frame by frame."""
    rows = x.reshape(len(shift), -1, x.shape[-1])
    return modulated_norm(rows, shift, scale).view(x.shape)


def gated(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """x + gate * update for x [B, N, C] and a gate [B, 1, C], or [B * frames, 1, C] frame by frame."""
    rows = (len(gate), -1, x.shape[-1])
    return torch.addcmul(x.reshape(rows), gate, update.reshape(rows)).view(x.shape)


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.act = nn.GELU()  # exact: on a CPU faster than the tanh form (1.09x a step, bf16, measured)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Mixing(nn.Module):
    """One term of a layer: branches on one modulated, normed input, their outputs added."""

    def __init__(self, width: int, branches: nn.ModuleList):
        super().__init__()
        self.modulation = ModulationTable(width)
        self.branches = branches

    def forward(self, x: Tensor, grid: Grid, rope, shared: Tensor, carry: Carry) -> tuple[Tensor, Tensor, Carry]:
        """x [B, N, C] with the gated output of the branches added, the modulated input they were given, the carry."""
        shift, scale, gate = self.modulation(shared)
        h = modulate(x, shift, scale)
        update, carry = self.branches[0](h, grid, rope, carry)
        for branch in self.branches[1:]:
            more, carry = branch(h, grid, rope, carry)
            update = update + more
        return gated(x, gate, update), h, carry


class Prompting(nn.Module):
    """Cross-attention to the prompt, gated per channel from zero."""

    no_decay = ("gate",)

    def __init__(self, width: int, heads: int, qk_norm: bool):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.cross_attn = CrossAttention(width, heads, qk_norm)
        self.gate = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, text: Tensor, text_mask: Tensor | None) -> Tensor:
        update = self.cross_attn(self.norm(x), text, text_mask)
        return torch.addcmul(x, self.gate.to(update.dtype), update)


def _branch(
    width: int, heads: int, uses: tuple[Use, ...], grid: Grid, qk_norm: bool, registers: int
) -> Attention | SequenceMixer:
    if uses[0].has_map:
        return Attention(width, heads, uses, grid, qk_norm, registers)
    return SequenceMixer(uses[0].name, uses[0].keys, width, registers)


class Block(nn.Module):
    """A layer of the plan: its terms in turn, then the prompt, then the MLP (or the MLP beside the last term)."""

    def __init__(
        self,
        width: int,
        heads: int,
        terms: tuple[tuple[tuple[Use, ...], ...], ...],
        grid: Grid,
        *,
        mlp_ratio: float,
        parallel_mlp: bool,
        cross: bool,
        qk_norm: bool,
        registers: int,
    ):
        super().__init__()
        self.registers = registers
        self.mixing = nn.ModuleList(
            Mixing(width, nn.ModuleList(_branch(width, heads, uses, grid, qk_norm, registers) for uses in branches))
            for branches in terms
        )
        self.prompting = Prompting(width, heads, qk_norm) if cross else None
        self.parallel_mlp = parallel_mlp
        self.mlp_modulation = ModulationTable(width, rows=1 if parallel_mlp else 3)
        self.mlp = MLP(width, int(width * mlp_ratio))

    @property
    def branches(self) -> list[Attention | SequenceMixer]:
        """Every mixer or group of mixers of the layer, in the order of its plan."""
        found = (module for mixing in self.mixing for module in mixing.modules())
        return [module for module in found if isinstance(module, Attention | SequenceMixer)]

    def forward(
        self,
        x: Tensor,
        grid: Grid,
        rope: tuple[Tensor, Tensor] | None,
        shared: Tensor,
        text: Tensor | None,
        text_mask: Tensor | None,
        carry: Carry,
    ) -> tuple[Tensor, Carry]:
        """x [B, N, C]; shared modulation [B, 6, C], mixers' three then the MLP's; text [B, L, C] -> [B, N, C].

        With a time for every frame the modulation is [B * frames, 6, C].

        `carry` is what earlier layers left for later ones; it is returned with what this layer leaves.
        """
        mixer_shared, mlp_shared = shared.chunk(2, dim=1)
        *shift_scale, gate = self.mlp_modulation(mlp_shared[:, 2:] if self.parallel_mlp else mlp_shared)
        h = x
        for mixing in self.mixing:
            x, h, carry = mixing(x, grid, rope, mixer_shared, carry)
        if self.parallel_mlp:
            x = gated(x, gate, self.mlp(h))
        if self.prompting is not None:
            x = self.prompting(x, text, text_mask)
        if not self.parallel_mlp:
            x = gated(x, gate, self.mlp(modulate(x, *shift_scale)))
        return x, carry

    def work(self, grid: Grid, text_tokens: int) -> Work:
        """Operations of a forward pass over one clip."""
        tokens = self.registers + grid.tokens
        rest = 2 * linear_flops(tokens, self.mlp.up.in_features, self.mlp.up.out_features)
        if self.prompting is not None:
            rest += self.prompting.cross_attn.flops(tokens, text_tokens)
        return sum((branch.work(grid) for branch in self.branches), Work(rest, rest))
