"""Launches of norm_rope to compile: pairwise over type, head dimension, heads, blocks, gains, tables and views."""

import torch

from stgen.ops.norm_rope import triton as kernels
from stgen.testing.compiled import Launch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WIDE = ("LDG.128", "STG.128")
NARROW = ("LDG.64", "STG.64")  # where half a row is no multiple of 16 bytes


def launch(
    dtype: torch.dtype,
    head_dim: int,
    heads: int,
    block: int | None = None,
    *,
    tokens: int = 32760,
    batch: int = 1,
    norm: bool = True,
    rope: bool = True,
    split: bool = False,
    heads_first: bool = False,
    wide_gain: bool = False,
    means_back: bool = True,
    quick: bool = False,
    needs: tuple[str, ...] = WIDE,
) -> Launch:
    """Forward and backward. `split`: qkv is a part of a wider projection; `heads_first`: gradients lie so."""

    def call() -> None:
        def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        width = 3 * heads * head_dim
        projected = empty(batch, tokens, 2 * width)[..., width:] if split else empty(batch, tokens, width)
        gain = empty(head_dim, dtype=FP32 if wide_gain else dtype) if norm else None
        table = empty(tokens, head_dim // 2, dtype=FP32) if rope else None
        qkv = projected.unflatten(-1, (3, heads, head_dim))
        rest = (qkv, gain, gain, table, table, 1e-6, block)
        q, *_, pooled, _ = kernels.forward(*rest)
        g = empty(batch, heads, tokens, head_dim).transpose(1, 2) if heads_first else q
        dpooled = pooled if block and means_back else None
        kernels.backward(g, g, g, dpooled, dpooled, *rest)

    return Launch(call, quick=quick, needs=needs)


LAUNCHES: dict[str, Launch] = {
    "bf16 64": launch(BF16, 64, 16, quick=True),
    "bf16 64 blocks of 64": launch(BF16, 64, 16, 64, quick=True),
    "fp32 72 split": launch(FP32, 72, 16, split=True, quick=True),
    "bf16 64 heads first": launch(BF16, 64, 12, heads_first=True, batch=2),
    "bf16 64 split": launch(BF16, 64, 16, split=True, heads_first=True),
    "bf16 64 no norm": launch(BF16, 64, 16, norm=False),
    "bf16 64 no rope": launch(BF16, 64, 16, rope=False, heads_first=True),
    "bf16 64 neither": launch(BF16, 64, 16, 64, norm=False, rope=False),
    "bf16 64 blocks of 16": launch(BF16, 64, 24, 16, batch=2),
    "bf16 64 blocks of 64, means choose": launch(BF16, 64, 16, 64, means_back=False),
    "bf16 64 blocks of 192": launch(BF16, 64, 16, 192, heads_first=True),
    "bf16 64 few": launch(BF16, 64, 6, tokens=1000),
    "bf16 32": launch(BF16, 32, 16, 128, split=True),
    "bf16 72": launch(BF16, 72, 16, needs=NARROW),
    "bf16 72 heads first, blocks of 64": launch(BF16, 72, 16, 64, heads_first=True, needs=NARROW),
    "bf16 80": launch(BF16, 80, 15, split=True),
    "bf16 96": launch(BF16, 96, 12, 128, heads_first=True),
    "bf16 128": launch(BF16, 128, 12),
    "bf16 128 blocks of 128": launch(BF16, 128, 12, 128, split=True),
    "bf16 128 blocks of 192": launch(BF16, 128, 24, 192),
    "bf16 128 float32 gains": launch(BF16, 128, 40, wide_gain=True, heads_first=True),
    "bf16 256": launch(BF16, 256, 8, batch=4),
    "fp16 64 blocks of 64": launch(FP16, 64, 16, 64, split=True, wide_gain=True),
    "fp16 128": launch(FP16, 128, 24, norm=False, batch=2),
    "fp16 60": launch(FP16, 60, 10, needs=()),  # half a row is 60 bytes
    "fp32 64": launch(FP32, 64, 16),
    "fp32 128 blocks of 128": launch(FP32, 128, 12, 128, heads_first=True),
    "fp32 96 no rope": launch(FP32, 96, 16, 48, rope=False),
}
