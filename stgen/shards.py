"""Tensors that lie in shards over the ranks of a run, and the files of a checkpoint that hold them.

Here a tensor is cut into runs of rows, as FSDP2 does. A group of a checkpoint is one file, `ema.safetensors`, or one from
each shard, `ema-0-of-4.safetensors` to `ema-3-of-4.safetensors`: the rows of a tensor lie in them in order, and what is
not cut lies in the first. So any number of ranks, or one process, reads what any other number wrote.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

Groups = Mapping[str, Mapping[str, Tensor]]


def is_cut(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """The rows that lie on this rank, or the whole tensor where it is not cut."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor put together; all ranks must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, target: Tensor) -> Tensor:
    """A whole tensor, the same on all ranks, as `target` lies on them; nothing is sent."""
    if not isinstance(target, DTensor):
        return tensor
    return distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements, src_data_rank=None)


def place(tensors: Mapping[str, Tensor]) -> tuple[int, int, int] | None:
    """(shard, of how many, copy) that this rank holds of tensors that are cut; None where none is."""
    for tensor in tensors.values():
        if isinstance(tensor, DTensor):
            mesh = tensor.device_mesh  # ("shards",) or ("copies", "shards")
            copy = mesh.get_local_rank("copies") if mesh.ndim > 1 else 0
            return mesh.get_local_rank("shards"), mesh.shape[-1], copy
    return None


def group_of(name: str, shard: int, of: int) -> str:
    """The name, without suffix, of the file that holds a shard of a group."""
    return f"{name}-{shard}-of-{of}"


def joined(files: Groups) -> dict[str, dict[str, Tensor]]:
    """The groups that files of a checkpoint hold, each tensor put together. Raises ValueError where a shard is missing."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name in sorted(files):
        found = re.fullmatch(r"(.+)-(\d{1,6})-of-(\d{1,6})", name)
        group, shard, of = (found[1], int(found[2]), int(found[3])) if found else (name, 0, 1)
        if group in groups and shard == 0:
            raise ValueError(f"{group} is held twice")
        if shard == 0:
            names = [name, *(group_of(group, i, of) for i in range(1, of))]
            if absent := [each for each in names if each not in files]:
                raise ValueError(f"{absent[0]}.safetensors is missing")
            groups[group] = _in_order([files[each] for each in names])
        elif group_of(group, 0, of) not in files or shard >= of:
            raise ValueError(f"{name}.safetensors is of no group")
    return groups


def _in_order(shards: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all shards, rows in order."""
    if len(shards) == 1:
        return dict(shards[0])
    names = dict.fromkeys(name for shard in shards for name in shard)
    return {name: _stacked(name, [shard[name] for shard in shards if name in shard]) for name in names}


def _stacked(name: str, rows: list[Tensor]) -> Tensor:
    if len(rows) == 1:
        return rows[0]
    if any(not part.ndim or part.shape[1:] != rows[0].shape[1:] or part.dtype != rows[0].dtype for part in rows):
        raise ValueError(f"the shards of {name} do not fit together")
    return torch.cat(rows)
