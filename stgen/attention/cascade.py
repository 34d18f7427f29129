"""Cascade pruning at work (SpAtten, arXiv:2012.09852, section III): who is left, and what they have shown.

A token's importance is the column mass of the maps, summed over heads and layers so far; a head's is the sum of the
magnitudes it put out. The least of a clip are left out for all later layers, ties to the higher index; those that are
left keep their order. Choosing carries no gradient; values do, also those that are put back.

What a layer hands to the next stands in the carry under `PRUNED`. Blocks see the tokens that are left as a clip of
one token a frame; rotary tables are gathered for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from stgen.attention.numbers import Numbers
from stgen.attention.pruning import Pruning, Stage, stages
from stgen.ops.cost import Work, linear_flops
from stgen.tokens import Grid

PRUNED = "pruned"  # key of the carry

Rope = tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Cascade:
    """What is left of each clip of a batch."""

    stage: Stage  # of the layer that reads this
    places: Tensor  # [B, n] numbers of the tokens that are left, ascending
    heads: Tensor  # [B, h] likewise of the heads
    received: Tensor  # [B, n] column mass of those tokens so far
    put_out: Tensor  # [B, heads] magnitude that all heads put out so far
    left_out: tuple[tuple[Tensor, Tensor], ...] = ()  # places [B, d] and last values [B, d, C] of the others

    @staticmethod
    def of_all(x: Tensor, stage: Stage) -> Cascade:
        """All tokens and heads of the clips x [B, N, C], before the first layer."""
        wide = torch.promote_types(x.dtype, torch.float32)
        tokens, heads = (torch.arange(n, device=x.device).expand(len(x), -1) for n in (stage.tokens, stage.heads))
        return Cascade(stage, tokens, heads, torch.zeros_like(tokens, dtype=wide), torch.zeros_like(heads, dtype=wide))

    def narrowed(self, x: Tensor, stage: Stage) -> tuple[Tensor, Cascade]:
        """x [B, n, C] and the cascade, less what layer `stage` leaves out."""
        cascade = replace(self, stage=stage)
        if stage.heads < self.heads.shape[1]:
            kept, _ = best(self.put_out.gather(1, self.heads), stage.heads)
            cascade = replace(cascade, heads=self.heads.gather(1, kept))
        if stage.tokens < self.places.shape[1]:
            kept, rest = best(self.received, stage.tokens)
            last = (self.places.gather(1, rest), take(x, rest))
            cascade = replace(
                cascade,
                places=self.places.gather(1, kept),
                received=self.received.gather(1, kept),
                left_out=(*self.left_out, last),
            )
            x = take(x, kept)
        return x, cascade

    def mixed(self, mixer: Any, q: Tensor, k: Tensor, v: Tensor, grid: Grid, carry: Any) -> tuple[Tensor, Any]:
        """What `mixer` (`attend.Mixer`) puts out by the heads that are left, zero for the others, and the carry after it.

        q, k, v [B, n, heads, D] of the tokens that are left.
        """
        few = self.heads.shape[1] < q.shape[2]
        where = self.heads[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
        q, k, v = (x.gather(2, where) if few else x for x in (q, k, v))
        out, _ = mixer(q, k, v, grid, carry)  # [B, n, heads left, D]
        seen = self
        if self.stage.ranks_tokens:
            seen = replace(seen, received=self.received + mixer.runs[0].column_mass(q, k))
        if self.stage.ranks_heads:
            seen = replace(seen, put_out=self.put_out.scatter_add(1, self.heads, magnitude(out).to(self.put_out)))
        if few:
            out = out.new_zeros(*out.shape[:2], self.put_out.shape[1], out.shape[3]).scatter(2, where, out)
        return out, {**carry, PRUNED: seen}


class Pruner(nn.Module):
    """The `model.pruning` keys at work in a model of `depth` layers and so many heads.

    `tokens` is their number in a training clip, for which `measured` tells what is kept.
    """

    def __init__(self, keys: Pruning, depth: int, heads: int, tokens: int):
        super().__init__()
        self.depth, self.heads, self.tokens = depth, heads, tokens
        self.numbers = Numbers(keys)

    def stages(self, tokens: int) -> list[Stage]:
        """What each layer computes of a clip of so many tokens, its scheduled shares as they are now."""
        return stages(self.numbers.now, self.depth, tokens, self.heads)

    def forward(
        self, layer: int, x: Tensor, carry: Any, grid: Grid, rope: Rope, shared: Tensor | None
    ) -> tuple[Tensor, Any, Grid, Rope, Tensor | None]:
        """What block `layer` is to be given in place of its arguments.

        x [B, n, C] are the tokens that the layer before had; grid, tables and modulation [B or B * frames, 6, C] those of
        whole clips.
        """
        here, last = (self.stages(grid.tokens)[i] for i in (layer, -1))
        if (last.tokens, last.heads) == (grid.tokens, self.heads):
            return x, carry, grid, rope, shared
        cascade = carry[PRUNED] if PRUNED in carry else Cascade.of_all(x, here)
        x, cascade = cascade.narrowed(x, here)
        carry = {**carry, PRUNED: cascade}
        if here.tokens == grid.tokens:
            return x, carry, grid, rope, shared
        rope = rope and (rope[0][cascade.places], rope[1][cascade.places])  # [B, n, D/2]
        if shared is not None and len(shared) > len(x):
            shared = of_tokens(shared, cascade.places // (grid.h * grid.w))
        return x, carry, left(grid, here), rope, shared

    @property
    def measured(self) -> dict[str, float]:
        """Share of the tokens and of the heads that the last layer computes."""
        last = self.stages(self.tokens)[-1]
        return {"tokens": last.tokens / self.tokens, "heads": last.heads / self.heads}

    def work(self, layer: int, block: Any, grid: Grid, text_tokens: int) -> Work:
        """Operations of block `layer` over one clip, ranking included.

        A head that is left out saves its map; its part of the projections is computed.
        """
        stage, dense = self.stages(grid.tokens)[layer], block.work(grid, text_tokens).dense
        grid = left(grid, stage)
        executed = block.work(grid, text_tokens).executed
        for mixer in (mixer for branch in block.branches for mixer in getattr(branch, "mixers", ())):
            executed -= mixer.work(grid).executed * (self.heads - stage.heads) // self.heads
            channels = stage.heads * mixer.runs[0].head_dim
            executed += linear_flops(stage.tokens, channels, stage.tokens) if stage.ranks_tokens else 0
        return Work(executed, dense)


def left(grid: Grid, stage: Stage) -> Grid:
    """The tokens that a layer computes, as blocks see them."""
    return grid if stage.tokens == grid.tokens else Grid(stage.tokens, 1, 1)


def of_tokens(shared: Tensor, frames: Tensor) -> Tensor:
    """Modulation of frames [B * T, 6, C] as that of the tokens [B, n] that stand in `frames`: [B * n, 6, C]."""
    rows = take(shared.flatten(1).unflatten(0, (len(frames), -1)), frames)  # [B, n, 6 C]
    return rows.flatten(0, 1).unflatten(-1, shared.shape[1:])


def put_back(x: Tensor, carry: Any) -> Tensor:
    """x [B, n, C] after the last layer with what was left out by its last value, each token in its place: [B, N, C]."""
    if PRUNED not in carry or not carry[PRUNED].left_out:
        return x
    places, values = zip((carry[PRUNED].places, x), *carry[PRUNED].left_out, strict=True)
    return take(torch.cat(values, dim=1), torch.cat(places, dim=1).argsort(dim=1))


def place_apart(place: Callable[..., Any], packed: Tensor, *rest: Any) -> Any:
    """`norm_rope` for packed [B, n, 3, heads, D] whose tables [B, n, D/2], the last of `rest`, differ from clip to clip."""
    *gains, (cos, sin) = rest
    q, k, v = place(packed.flatten(0, 1).unsqueeze(0), *gains, (cos.flatten(0, 1), sin.flatten(0, 1)))
    return tuple(x.squeeze(0).unflatten(0, packed.shape[:2]) for x in (q, k, v))


def best(importance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of each row of importance [B, n] where the `count` largest stand, and where the others do, both ascending."""
    order = importance.argsort(dim=1, descending=True, stable=True)
    return order[:, :count].sort(dim=1).values, order[:, count:].sort(dim=1).values


def take(x: Tensor, at: Tensor) -> Tensor:
    """The tokens of x [B, n, C] at the places `at` [B, m]: [B, m, C]."""
    return x.gather(1, at.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def magnitude(out: Tensor) -> Tensor:
    """Sum of the magnitudes that each head puts out: [B, n, heads, D] -> [B, heads], float32 at least."""
    return vector_norm(out.detach(), 1, dim=(1, 3), dtype=torch.promote_types(out.dtype, torch.float32))
