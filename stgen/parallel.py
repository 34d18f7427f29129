"""A model over the ranks of a run: whole on each (DDP), or in shards (FSDP2), of which there may be several copies (HSDP).

Either way a rank's gradients become the mean over all ranks, and names, shapes and dtypes are those of one process.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from stgen import flops, ranks, schema, shards
from stgen.build import Parts
from stgen.distributed_spec import unequal
from stgen.ranks import RankError

ROOM = 1 / 3  # of a GPU that whole weights and their state may fill before `auto` cuts them


@dataclass(frozen=True)
class Spread:
    """How a run lies on its ranks; `copies` x `shards` of them."""

    kind: str  # one, ddp or fsdp
    copies: int
    shards: int

    def words(self, cfg: schema.Config) -> str:
        """A line for the start of a run."""
        size, batch = ranks.size(), cfg.train.train_batch_size
        share = f"1 / {size} of each batch" if cfg.data.buckets else f"{batch // size} of {batch} clips each"
        lies = {
            "ddp": "whole weights on each (DDP)",
            "fsdp": f"weights, moments and averages in {self.shards} shards (FSDP2)"
            + (f", {self.copies} copies of them (HSDP)" if self.copies > 1 else ""),
        }
        return f"ranks       {size}, {share}; {lies[self.kind]}"


def spread_of(cfg: schema.Config, parts: Parts, device: torch.device) -> Spread:
    """What `distributed` means for these parts on these ranks. Raises RankError where it cannot be."""
    size, keys, kind = ranks.size(), cfg.distributed, cfg.distributed.kind
    if size == 1:
        return Spread("one", 1, 1)
    if kind == "auto":
        state = flops.STATE_BYTES * flops.trainable(parts.trained)
        room = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else float("inf")
        (kind, *_) = ranks.gather("fsdp" if state > ROOM * room else "ddp")
    if kind == "ddp":
        return Spread("ddp", size, 1)
    shards = keys.shards or size
    if size % shards:
        raise RankError(f"distributed.shards: {size} ranks are no multiple of {shards} shards; write null or a divisor")
    for name, parameter in nn.ModuleDict(parts.trained).named_parameters():
        if parameter.ndim == 0:
            raise RankError(f"distributed.kind: fsdp cannot cut {name}, a single number; write distributed.kind: ddp")
    return Spread("fsdp", size // shards, shards)


def check_batch(cfg: schema.Config) -> None:
    """Raise RankError unless every part of a batch can be shared equally."""
    if cfg.data.buckets:  # they have batches of their own, and are judged where these are known
        return
    if fault := unequal(cfg.train.train_batch_size, cfg.train.gradient_accumulation_steps, ranks.size()):
        raise RankError(fault)


def place(spread: Spread, parts: Parts, device: torch.device, precision: str = "no") -> None:
    """Put the parts on the device; FSDP2 cuts what is trained, layer by layer, so that no device ever holds all of it.

    precision: train.mixed_precision. With bf16 the weights of layers travel as such between ranks, gradients in float32.
    """
    if spread.kind == "fsdp":
        mesh = _mesh(spread, device)
        layers = [m for m in parts.transformer.modules() if type(m).__name__ in parts.transformer._repeated_blocks]
        # Layers return views, which FSDP2 warns of: they must not be changed in place. None are.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        half = policy(precision)
        for module in layers:
            fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=half)
        for module in parts.trained.values():
            # Also the outermost: what it gathers is dropped after each use, or writing averages would not reach it.
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    parts.to(device)


def policy(precision: str) -> MixedPrecisionPolicy:
    """How FSDP2 sends the weights of layers: bfloat16 halves what ranks exchange. Activations are autocast's to cast."""
    if precision != "bf16":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _mesh(spread: Spread, device: torch.device) -> DeviceMesh:
    if spread.copies == 1:
        return init_device_mesh(device.type, (spread.shards,), mesh_dim_names=("shards",))
    return init_device_mesh(device.type, (spread.copies, spread.shards), mesh_dim_names=("copies", "shards"))


class Learner:
    """The parts as gradients are computed with: under DDP in its wrappers, else as they are."""

    forward: nn.Module  # the transformer

    def __init__(self, spread: Spread, parts: Parts):
        self.parts, self.forward = parts, parts.transformer
        if spread.kind == "ddp":
            self.forward = _wrap(parts.transformer)
            if "text_encoder" in parts.trained:
                self.parts = replace(parts, text_encoder=_Called(_wrap(parts.text_encoder)))


def _wrap(module: nn.Module) -> DistributedDataParallel:
    # Buffers are the same on all ranks, for they come of sums over all of them. A weight that a step does not use has no
    # gradient on one process; here it must not be waited for.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions call broadcast_buffers by another name
        return DistributedDataParallel(module, broadcast_buffers=False, find_unused_parameters=True)


class _Called:
    """A learned text encoder that is called by its wrapper and is itself in all else."""

    def __init__(self, wrapper: DistributedDataParallel):
        self._wrapper, self.no_sync = wrapper, wrapper.no_sync

    def __call__(self, *args: Any) -> Any:
        return self._wrapper(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper.module, name)


def gathered(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights put together on the CPU of the first rank, nothing on the others; all ranks must call it."""
    full = ((name, shards.whole(tensor)) for name, tensor in weights.items())
    return {name: tensor.cpu() for name, tensor in full if ranks.is_first()}
