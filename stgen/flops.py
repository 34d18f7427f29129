"""What a run costs, summed from what each operation counts: FLOPs, parameters and memory."""

import torch
from torch import nn

from stgen.model import VideoTransformer
from stgen.ops.cost import Work
from stgen.tokens import Grid

STATE_BYTES = 20  # of a trained number in float32: weight, gradient, two moments, average


def trainable(modules: dict[str, nn.Module]) -> int:
    """Number of trained parameters."""
    return sum(p.numel() for module in modules.values() for p in module.parameters() if p.requires_grad)


def step_work(transformer: VideoTransformer, grid: Grid, text_tokens: int, batch: int, recompute: float) -> Work:
    """FLOPs of an optimiser step over `batch` clips; with gradient checkpointing, of a share of
    the layers or all (1), these count twice in the forward pass."""
    return transformer.work(grid, text_tokens) * ((3 + recompute) * batch)


def activation_bytes(
    transformer: VideoTransformer, latent_shape: tuple[int, ...], text_shape: tuple[int, int], batch: int, bf16: bool
) -> int:
    """Bytes that autograd keeps for the backward pass of `batch` clips, counted on tensors without storage.

    The model may live in a FakeTensorMode; call this inside the same mode.
    """
    kept: dict[int, int] = {}
    parameters = {p.untyped_storage()._cdata for p in transformer.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage.nbytes()
            holders.append(tensor)  # keeps the storage alive, so that its address is not used again
        return tensor

    holders: list[torch.Tensor] = []
    latents = torch.empty(batch, *latent_shape)
    text = torch.empty(batch, *text_shape, requires_grad=True)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        transformer(latents, torch.empty(batch), text)
    return sum(kept.values())


def readable(number: float, unit: str = "") -> str:
    """1234567 -> `1.23 M`; bytes in powers of 1000 as well."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}".rstrip()
