"""Which implementation `auto` takes. A named one is never exchanged for another.

Measured forward and backward with one thread of a Xeon with AMX, 4 heads x 64, torch 2.15 (milliseconds):

| dense, queries x keys x sequences | reference | SDPA | by blocks |
|---|---|---|---|
| softmax bf16, 64 x 64 x 64; 128 x 128 x 16 | 8; 5 | 46; 22 | 30; 21 |
| softmax bf16, D = 32, 129 x 129 x 15; 256 x 256 x 8; 512 x 512 x 4 | 6; 9; 15 | 27; 16; 24 | 29; 15; 28 |
| the same, 1024 x 1024 x 2 | 56 | 32 | 52 |
| the same, 129; 256; 512, forward alone | 2.0; 2.9; 6.2 | 1.4; 1.6; 3.2 | - |
| softmax fp32, 128 x 128 x 16; 2048 x 2048 x 1 | 11; 284 | 12; 131 | 23; 186 |
| sink fp32, 128 x 128 x 16; 256 x 256 x 8; 1024 x 1024 x 1 | 19; 37; 79 | - | 18; 33; 53 |

| sparse fp32, blocks of 16, half of them kept | reference | gather |
|---|---|---|
| 128 x 128 x 4 (2^18 scores) | 4.4 | 6.4 |
| 128 x 128 x 32 (2^21 scores) | 57 | 46 |
"""

import logging
import os
from collections.abc import Callable, Hashable
from functools import cache

import torch
from torch import Tensor

log = logging.getLogger("stgen")

SHORT_ON_CPU = 128  # keys; up to here explicit products beat PyTorch's kernel
SHORT_IN_TRAINING = 512  # keys; up to here they beat its backward pass in 16 bits
SHORT_BY_BLOCKS = 256  # keys; up to here explicit products beat those by blocks, or lose little
FEW_SCORES = 1 << 18  # of all sequences and heads; up to here calls cost more than products


def dense(q: Tensor, keys: int, plain: bool) -> str:
    """For queries [S, heads, n, D] that attend all of `keys`; `plain` is softmax without a sink."""
    on_cpu = q.device.type == "cpu"
    if plain:
        short = SHORT_IN_TRAINING if q.requires_grad and q.itemsize == 2 else SHORT_ON_CPU
        impl = "reference" if on_cpu and keys <= short else "sdpa"
    else:
        impl = "reference" if keys <= SHORT_BY_BLOCKS else "blocks"
    _tell("dense_attention", impl, q.device.type)
    return impl


def block_sparse(q: Tensor, keys: int) -> str:
    """For queries [S, heads, n, D] that attend some of `keys`."""
    scores = q.shape[0] * q.shape[1] * q.shape[2] * keys
    impl = "reference" if scores <= FEW_SCORES else "gather"
    _tell("block_sparse_attention", impl, q.device.type)
    return impl


def by_kernels(op: str, x: Tensor, unfit: str | None, trial: Callable[..., None], *shape: Hashable) -> bool:
    """Whether `auto` takes the Triton kernels of an op for a tensor like x.

    It does on a GPU, where nothing makes the call `unfit`, and where `trial(device, dtype, *shape)`, the op's smallest
    forward and backward pass, runs: a kernel that does not compile on this machine costs a warning, not the run.
    """
    if unfit is not None or not is_gpu(x):
        return False
    works = torch.compiler.is_compiling() or _works(op, trial, x.device, x.dtype, *shape)
    if works:
        _tell(op, "triton", x.device.type)
    return works


def is_gpu(x: Tensor) -> bool:
    """Whether x lies where Triton compiles for."""
    return x.device.type == "cuda"


def off_gpu(x: Tensor) -> str | None:
    """Why a named kernel cannot run where x lies, as a clause; None if it can."""
    if torch.compiler.is_compiling() or is_gpu(x) or os.environ.get("TRITON_INTERPRET", "0") == "1":
        return None
    return f"tensors are on {x.device.type}, where Triton only interprets (TRITON_INTERPRET=1), not on a GPU"


@cache
def _works(op: str, trial: Callable[..., None], device: torch.device, dtype: torch.dtype, *shape: Hashable) -> bool:
    try:
        with torch.enable_grad():
            trial(device, dtype, *shape)
    except Exception as error:  # whatever a compiler or a driver may raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        log.warning(
            "%s: the Triton kernels do not run on %s in %s (%s); PyTorch computes it, slower. `stgen doctor` says more",
            op, device, str(dtype).removeprefix("torch."), reason,
        )  # fmt: skip
        return False
    return True


def _tell(op: str, impl: str, device: str) -> None:
    """Once for each choice."""
    if not torch.compiler.is_compiling():
        _told(op, impl, device)


@cache
def _told(op: str, impl: str, device: str) -> None:
    log.info("%s on %s: %s", op, device, impl)
