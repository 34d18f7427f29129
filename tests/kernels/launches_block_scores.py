"""Launches of block selection, compiled ahead of time."""

from functools import partial

import torch
from torch import Tensor

from stgen.ops.block_scores import triton as kernels
from stgen.testing.compiled import Launch


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def select(rule: str, heads: int, rows: int, columns: int, width: int) -> None:
    counts = meta(2, heads, rows, dtype=torch.int32) if rule == "top" else None
    kept, _, _ = kernels.select(
        meta(2, heads, rows, columns), meta(1, 1, rows, columns, dtype=torch.bool), counts, rule, 0.9, width
    )
    kernels.transpose(kept, rows)


def score(heads: int, rows: int, columns: int, depth: int) -> None:
    kernels.scores(meta(2, heads, rows, depth), meta(2, heads, columns, depth))


def pool(places: int, depth: int, block: int, dtype: torch.dtype) -> None:
    x = meta(2, places, 3, 16, depth, dtype=dtype)[:, :, 1].transpose(1, 2)  # of a packed projection
    kernels.pool(x, meta(1, 1, places, dtype=torch.bool), block)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SELECT = [  # rule, heads, rows, columns, width
    ("top", 16, 625, 625, 62),
    ("top", 40, 1181, 1181, 118),
    ("top", 16, 4096, 4096, 410),
    ("top", 2, 16, 16, 4),
    ("top", 3, 100, 257, 25),
    ("mass", 16, 625, 625, 625),
    ("mass", 16, 4096, 4096, 4096),
    ("mass", 2, 64, 64, 64),
    ("above", 16, 625, 625, 625),
    ("above", 16, 4096, 4096, 4096),
    ("above", 3, 100, 257, 257),
]
POOL = [  # places, depth, block, dtype
    (40000, 128, 64, BF16),
    (40000, 64, 64, FP16),
    (40000, 64, 128, FP32),
    (9999, 72, 60, BF16),
    (9999, 80, 1000, FP16),
    (4096, 128, 16, FP32),
    (4096, 32, 64, BF16),
]
SCORE = [
    (16, 625, 625, 128),
    (16, 625, 625, 64),
    (40, 1181, 1181, 128),
    (3, 100, 257, 72),
    (2, 1, 7, 16),
    (16, 4096, 4096, 128),
]

LAUNCHES = {
    **{
        f"{a[0]} {a[1]} heads {a[2]} x {a[3]}": Launch(partial(select, *a), quick=a in (SELECT[0], SELECT[5]))
        for a in SELECT
    },
    **{
        f"pool {a[0]} x {a[1]} block {a[2]} {a[3]}": Launch(partial(pool, *a), quick=a == POOL[0], needs=("LDG.128",))
        for a in POOL
    },
    **{f"scores {a}": Launch(partial(score, *a), needs=("no TF32",)) for a in SCORE},
}  # fmt: skip
