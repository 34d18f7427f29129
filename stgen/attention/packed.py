"""What diffusers asks of an attention module, for one whose projections are packed from birth.

diffusers' modules have a layer each for queries, keys and values and may fuse them; these have one layer for all and may
be opened, so that an adapter finds `to_q`, `to_k` and `to_v` (LoRA, arXiv:2106.09685, section 4.2, adapts them apart).
Packed and opened compute the same; models are made, trained, saved and loaded packed.
"""

from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from torch import Tensor, nn


class Packed(AttentionModuleMixin):
    """A mixin for modules that have a linear layer `packed`, whose outputs are `pieces`."""

    fused_projections = True
    packed: str
    """The name of the packed layer."""
    pieces: list[tuple[str, int]]
    """Its outputs in order: `q`, `k` or `v`, and how many channels. Without any the layer is None."""
    processor: Any
    """Called with the module and what the module is called with; it computes what the module returns."""

    def project(self, x: Tensor) -> Tensor:
        """x [B, N, C] -> [B, N, channels of all pieces], in their order."""
        if self.fused_projections:
            return getattr(self, self.packed)(x)
        apart = {name: iter(self._layer(name)(x).split(sizes, dim=-1)) for name, sizes in self._sizes().items()}
        return torch.cat([next(apart[name]) for name, _ in self.pieces], dim=-1)

    @property
    def projections(self) -> list[nn.Linear]:
        """The layers, packed or apart, that the pieces come from."""
        if not self.pieces:
            return []
        return [getattr(self, self.packed)] if self.fused_projections else [self._layer(name) for name in self._sizes()]

    @torch.no_grad()
    def unfuse_projections(self) -> None:
        """Put a layer for queries, one for keys and one for values in the packed one's place."""
        if not self.fused_projections:
            return
        weights, biases = self._parts(_without_adapter(self, self.packed)) if self.pieces else ({}, {})
        delattr(self, self.packed)
        for name, rows in weights.items():
            setattr(self, f"to_{name}", _linear(rows, biases[name]))
        self.fused_projections = False

    @torch.no_grad()
    def fuse_projections(self) -> None:
        """Put the packed layer in place of those for queries, keys and values."""
        if self.fused_projections:
            return
        weights, biases = {}, {}
        for name, sizes in self._sizes().items():
            layer = _without_adapter(self, f"to_{name}")
            weights[name], biases[name] = iter(layer.weight.split(sizes)), iter(layer.bias.split(sizes))
            delattr(self, f"to_{name}")
        names = [name for name, _ in self.pieces]
        rows = [[next(of[name]) for name in names] for of in (weights, biases)]
        setattr(self, self.packed, _linear(*rows) if names else None)
        self.fused_projections = True

    def _sizes(self) -> dict[str, list[int]]:
        """Channels of the pieces of each name, in order."""
        return {name: [size for n, size in self.pieces if n == name] for name in dict(self.pieces)}

    def _parts(self, layer: nn.Linear) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
        """Rows of the packed weight and of its bias by name."""
        sizes = [size for _, size in self.pieces]
        found = []
        for packed in (layer.weight, layer.bias):
            rows = list(zip(self.pieces, packed.split(sizes), strict=True))
            found.append({name: [part for (n, _), part in rows if n == name] for name in dict(self.pieces)})
        return found[0], found[1]

    def _layer(self, name: str) -> nn.Linear:
        return getattr(self, f"to_{name}")


def _linear(weights: list[Tensor], biases: list[Tensor]) -> nn.Linear:
    """A linear layer with these rows one below the other."""
    weight, bias = torch.cat(weights), torch.cat(biases)
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    trained = weights[0].requires_grad
    layer.weight, layer.bias = nn.Parameter(weight, trained), nn.Parameter(bias, trained)
    return layer


def _without_adapter(module: Packed, name: str) -> nn.Linear:
    layer = getattr(module, name)
    if type(layer) is not nn.Linear:
        raise ValueError(
            f"{name} carries an adapter ({type(layer).__name__}), so the projections cannot be packed or opened; "
            "unload_lora() first, after fuse_lora() if its effect shall stay"
        )
    if layer.weight.is_meta:
        raise ValueError(
            f"{name} is offloaded, so the projections cannot be packed or opened; load adapters for to_q, to_k or to_v before "
            "enable_sequential_cpu_offload()"
        )
    return layer
