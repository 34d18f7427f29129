"""Launches of modulated_norm to compile: pairwise over type, width, batch, rows of shift and scale, and views."""

import torch

from stgen.ops.modulated_norm import triton as kernels
from stgen.testing.compiled import Launch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def launch(
    dtype: torch.dtype,
    width: int,
    batch: int = 1,
    tokens: int = 32760,
    *,
    shared: bool = False,
    per_token: bool = False,
    float32: bool = False,
    part: bool = False,
    quick: bool = False,
    needs: tuple[str, ...] = ("LDG.128", "STG.128"),
) -> Launch:
    """Forward and backward.

    `shared`: the batch has one shift and scale; `per_token`: every token has its own; `float32`: they are float32;
    `part`: x and the gradient are parts of wider tensors.
    """

    def call() -> None:
        def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        x = empty(batch, tokens, 2 * width)[..., width:] if part else empty(batch, tokens, width)
        rows = (1 if shared else batch, tokens if per_token else 1)
        shift, scale = empty(*rows, 6, width, dtype=FP32 if float32 else dtype).unbind(2)[:2]
        kernels.forward(x, shift, scale, 1e-6)
        kernels.backward(x, x, scale, 1e-6)

    return Launch(call, quick=quick, needs=needs)


LAUNCHES: dict[str, Launch] = {
    "bf16 1152": launch(BF16, 1152, 2, quick=True),
    "bf16 3072 part": launch(BF16, 3072, part=True, quick=True),
    "fp32 384 per token": launch(FP32, 384, 4, per_token=True, quick=True),
    "bf16 64": launch(BF16, 64, 8),
    "bf16 128 per token": launch(BF16, 128, per_token=True, part=True),
    "bf16 256 float32": launch(BF16, 256, 2, float32=True),
    "bf16 384": launch(BF16, 384, 4),
    "bf16 512 shared": launch(BF16, 512, 2, shared=True),
    "bf16 768": launch(BF16, 768),
    "bf16 768 per token": launch(BF16, 768, 2, per_token=True, float32=True),
    "bf16 1024 part": launch(BF16, 1024, 2, part=True),
    "bf16 1152 float32": launch(BF16, 1152, 1, float32=True),
    "bf16 1152 per token": launch(BF16, 1152, per_token=True),
    "bf16 1152 few": launch(BF16, 1152, 1, 100),
    "bf16 1536": launch(BF16, 1536, 2, shared=True, float32=True),
    "bf16 2048 part": launch(BF16, 2048, part=True),
    "bf16 2304": launch(BF16, 2304, 2),
    "bf16 3072 per token": launch(BF16, 3072, 2, per_token=True, shared=True),
    "bf16 4096": launch(BF16, 4096),
    "bf16 4096 float32": launch(BF16, 4096, 2, float32=True),
    "fp16 1152": launch(FP16, 1152, 2, part=True),
    "fp16 3072": launch(FP16, 3072, per_token=True),
    "fp32 64": launch(FP32, 64, 2, part=True),
    "fp32 1152": launch(FP32, 1152),
    "fp32 4096": launch(FP32, 4096, 2),
    "bf16 1000": launch(BF16, 1000, needs=()),  # rows at multiples of 8, not 16, elements
}
