"""Launches of linear attention, compiled ahead of time: a cover of dtype, sizes, mask, chunk, memories."""

from functools import partial

import torch
from torch import Tensor

from stgen.ops.linear_attention import triton as kernels
from stgen.ops.linear_attention.cut import Cut
from stgen.testing.compiled import Launch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def inputs(
    n: int, m: int, features: int, head_dim: int, dtype: torch.dtype, value: torch.dtype, heads: int = 16
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """phi_q, phi_k, v and dout with heads next to places, as views of projections."""
    sizes = ((n, features, dtype), (m, features, dtype), (m, head_dim, value), (n, head_dim, value))
    q, k, v, g = (meta(2, places, heads, width, dtype=kind).transpose(1, 2) for places, width, kind in sizes)
    return q, k, v, g


def attend(
    n: int,
    features: int,
    head_dim: int,
    dtype: torch.dtype = BF16,
    chunk: int | None = None,
    prefix: int = 0,
    masked: bool = False,
    value: torch.dtype | None = None,
) -> None:
    q, k, v, g = inputs(n, prefix + n, features, head_dim, dtype, value or dtype)
    mask = meta(2, prefix + n, dtype=torch.bool) if masked else None
    cut = Cut.of(n, prefix + n, chunk, prefix)
    _, memory = kernels.forward(q, k, v, mask, cut)
    kernels.backward(g, q, k, v, mask, memory, cut)


def remember(
    n: int, features: int, head_dim: int, dtype: torch.dtype, segment: int, delta: bool, given: bool = True
) -> None:
    q, k, v, g = inputs(n, n, features, head_dim, dtype, dtype)
    last = meta(2, 16, features, head_dim, dtype=FP32), meta(2, 16, features, dtype=FP32)
    _, states = kernels.forward_memory(q, k, v, last if given else None, segment, delta)
    kernels.backward_memory(g, last, q, k, v, states, segment, delta)


WIDE = ("HGMMA", "LDG.128")
LAUNCHES = {
    "bf16 64": Launch(partial(attend, 32768, 64, 64), quick=True, needs=WIDE),
    "bf16 128": Launch(partial(attend, 32768, 128, 128), needs=WIDE),
    "bf16 64 x 128, mask": Launch(partial(attend, 9999, 64, 128, masked=True), needs=WIDE),
    "bf16 128 x 64, one sequence of many": Launch(partial(attend, 600, 128, 64), needs=WIDE),
    "bf16 72 x 80": Launch(partial(attend, 5000, 72, 80), needs=WIDE),
    "bf16 5 x 3": Launch(partial(attend, 77, 5, 3)),
    "fp16 64": Launch(partial(attend, 32768, 64, 64, FP16), needs=WIDE),
    "fp16 32 x 96, mask": Launch(partial(attend, 1000, 32, 96, FP16, masked=True), needs=WIDE),
    "fp32 64": Launch(partial(attend, 32768, 64, 64, FP32), needs=("no TF32", "LDG.128")),
    "fp32 128, mask": Launch(partial(attend, 32768, 128, 128, FP32, masked=True), needs=("no TF32", "LDG.128")),
    "fp32 features, bf16 values": Launch(partial(attend, 3000, 64, 72, FP32, value=BF16), needs=("no TF32", "LDG.128")),
    "frames bf16 64": Launch(partial(attend, 31200, 64, 64, chunk=1560), needs=WIDE),
    "frames bf16 128, prefix, mask": Launch(partial(attend, 31200, 128, 128, BF16, 1560, 4, True), needs=WIDE),
    "frames fp16 64, prefix": Launch(partial(attend, 8000, 64, 64, FP16, 100, 70), needs=WIDE),
    "frames fp32 64, mask": Launch(partial(attend, 8000, 64, 64, FP32, 100, 3, True), needs=("no TF32",)),
    "causal bf16 64": Launch(partial(attend, 8192, 64, 64, chunk=1), quick=True, needs=("HMMA", "LDG.128")),
    "causal bf16 128, prefix, mask": Launch(partial(attend, 8192, 128, 128, BF16, 7, 9, True), needs=("HMMA",)),
    "causal fp16 64 x 72": Launch(partial(attend, 8192, 64, 72, FP16, 16), needs=("HMMA",)),
    "causal fp32 64, mask": Launch(partial(attend, 8192, 64, 64, FP32, 16, 0, True), needs=("no TF32",)),
    "memory bf16 64": Launch(partial(remember, 31200, 64, 64, BF16, 1560, False), needs=WIDE),
    "memory fp16 128, empty": Launch(partial(remember, 31200, 128, 128, FP16, 1560, False, False), needs=WIDE),
    "memory fp32 64 x 32": Launch(partial(remember, 3000, 64, 32, FP32, 300, False), needs=("no TF32",)),
    "delta bf16 64": Launch(partial(remember, 31200, 64, 64, BF16, 1560, True), quick=True, needs=WIDE),
    "delta bf16 128": Launch(partial(remember, 31200, 128, 128, BF16, 1560, True), needs=WIDE),
    "delta fp16 128 x 64, empty": Launch(partial(remember, 3000, 128, 64, FP16, 100, True, False), needs=WIDE),
    "delta fp16 64 x 80": Launch(partial(remember, 3000, 64, 80, FP16, 100, True), needs=WIDE),
    "delta fp32 64": Launch(partial(remember, 3000, 64, 64, FP32, 300, True), needs=("no TF32",)),
    "delta fp32 128": Launch(partial(remember, 3000, 128, 128, FP32, 300, True), needs=("no TF32",)),
}
