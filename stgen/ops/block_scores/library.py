"""The kernels of block selection as operators of PyTorch: opaque to torch.compile, and without gradients."""

import torch
from torch import Tensor


@torch.library.custom_op("stgen::pool_blocks", mutates_args=())
def pool_op(x: Tensor, filled: Tensor, block: int) -> Tensor:
    """Means of blocks: [S, heads, blocks, D] float32."""
    from stgen.ops.block_scores.triton import pool

    return pool(x, filled, block)


@pool_op.register_fake
def _(x, filled, block):
    sequences, heads, places, depth = x.shape
    return x.new_empty(sequences, heads, -(-places // block), depth, dtype=torch.float32)


@torch.library.custom_op("stgen::select_blocks", mutates_args=())
def select_op(
    q: Tensor, k: Tensor, allowed: Tensor, counts: Tensor | None, rule: str, share: float, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The kept table of pooled q and k, how many blocks each row keeps, and their lists."""
    from stgen.ops.block_scores.triton import scores, select

    return select(scores(q, k), allowed, counts, rule, share, width)


@select_op.register_fake
def _(q, k, allowed, counts, rule, share, width):
    sequences, heads, rows, _ = q.shape
    return (
        q.new_empty(sequences, heads, rows, k.shape[2], dtype=torch.bool),
        q.new_empty(sequences, heads, rows, dtype=torch.int32),
        q.new_empty(sequences, heads, rows, width, dtype=torch.int32),
    )


@torch.library.custom_op("stgen::transpose_blocks", mutates_args=())
def transpose_op(kept: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """How many rows keep each column, and their lists."""
    from stgen.ops.block_scores.triton import transpose

    return transpose(kept, width)


@transpose_op.register_fake
def _(kept, width):
    sequences, heads, _, columns = kept.shape
    number = kept.new_empty(sequences, heads, columns, dtype=torch.int32)
    return number, kept.new_empty(sequences, heads, columns, width, dtype=torch.int32)
