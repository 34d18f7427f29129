"""One of several processes that norm parts of a batch together; imports little, since each process starts anew."""

import torch
from pydantic import TypeAdapter

from stgen.norm_spec import Norm
from stgen.norms import build


def x64(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def norm64(keys, width=5):
    """A norm in float64 whose weights are not those of the start."""
    norm = build(TypeAdapter(Norm).validate_python(keys), width).double()
    for i, parameter in enumerate(norm.parameters()):
        parameter.data += x64(*parameter.shape, seed=10 + i) * 0.3
    return norm


def normed_twice(norm, x, weights):
    """Output, gradients and buffers after two batches, of which the second has a loss."""
    x = x.clone().requires_grad_()
    norm(x)
    out = norm(x)
    (out * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in norm.named_parameters()}
    return {"out": out.detach(), "x": x.grad}, gradients, dict(norm.named_buffers())


def work(rank: int, meeting: str, keys: dict, cuts: list[int], out: str) -> None:
    """Norm the part of `rank`, of cuts[rank] clips, and save what came of it."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=len(cuts))
    x, weights = x64(sum(cuts), 4, 5) * 2 + 1, x64(sum(cuts), 4, 5, seed=3)
    torch.save(normed_twice(norm64(keys), x.split(cuts)[rank], weights.split(cuts)[rank]), f"{out}-{rank}")
    torch.distributed.destroy_process_group()
