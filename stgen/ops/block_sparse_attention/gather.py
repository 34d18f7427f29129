"""Block-sparse attention in plain PyTorch: gather the key blocks of some query blocks, then multiply.

Nothing grows with n x m: one chunk of rows after the other is computed in the same memory, and the backward computes
the scores again, as FlashAttention does (arXiv:2205.14135, section 3.1). Gradients of keys and values are added up in
float32, chunk after chunk, hence in the same order every time on a CPU.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from stgen.ops.block_sparse_attention.chunks import Chunk, Plan, plan
from stgen.ops.normaliser import Normaliser
from stgen.ops.support import Support


def block_sparse_attention_gather(
    q: Tensor, k: Tensor, v: Tensor, support: Support, normaliser: Normaliser, sink: Tensor | None, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Output [S, heads, n, D] and, where asked for, LSE [S, heads, n]."""
    dtype = q.dtype
    if dtype == torch.float16 and q.device.type == "cpu":  # no faster there than float32
        q, k, v = q.float(), k.float(), v.float()
    out, lse = _Gather.apply(q, k, v, sink, support.bias, support, normaliser, with_lse)  # type: ignore[misc]
    return out.to(dtype), lse


# -------------------------------------------------------------------------------------------------------------- blocks


def _cut(x: Tensor, block: int) -> Tensor:
    """[S, heads, n, ...] -> [S * heads * blocks, block, ...], zeros after the end."""
    surplus = -x.shape[2] % block
    if surplus:
        x = pad(x, (0, 0) * (x.ndim - 3) + (0, surplus))
    return x.reshape(-1, block, *x.shape[3:])


def _joined(x: Tensor, like: Tensor) -> Tensor:
    """What `_cut` did undone: [S * heads * blocks, block, ...] -> [S, heads, n, ...], the first three those of `like`."""
    return x.reshape(*like.shape[:2], -1, *x.shape[2:])[:, :, : like.shape[2]]


class _Scratch:
    """Memory that one chunk after the other uses: fresh pages cost more than what is computed on them."""

    def __init__(self, like: Tensor):
        self.like, self.buffers = like, {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape)
        if name not in self.buffers or len(self.buffers[name]) < size:
            self.buffers[name] = self.like.new_empty(size, dtype=dtype)
        return self.buffers[name][:size].view(shape)

    def take(self, name: str, blocks: Tensor, index: Tensor) -> Tensor:
        """Some of the blocks [.., block, D]."""
        return torch.index_select(blocks, 0, index, out=self(name, (len(index), *blocks.shape[1:]), blocks.dtype))

    def product(self, name: str, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
        """scale * a b: [R, i, j] and [R, j, l] -> [R, i, l]."""
        out = self(name, (len(a), a.shape[1], b.shape[2]), a.dtype)
        return torch.baddbmm(a.new_zeros(1, 1, 1), a, b, beta=0, alpha=scale, out=out)

    def cast(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x if x.dtype == dtype else self(name, tuple(x.shape), dtype).copy_(x)


# ------------------------------------------------------------------------------------------------------ scores, weights


class _Scores:
    """Scores of a chunk, in `dtype`; hidden ones are `lowest`."""

    def __init__(self, support: Support, masks: Tensor, dtype: torch.dtype, lowest: float):
        self.block, self.masks, self.dtype, self.lowest = support.block, masks, dtype, lowest
        self.bias = None if support.bias is None else support.bias.detach().flatten().to(dtype)

    def __call__(self, chunk: Chunk, q: Tensor, keys: Tensor, scratch: _Scratch) -> Tensor:
        """Queries [R, block queries, D], keys [R, L * block keys, D] -> [R, block queries, L * block keys]."""
        scores = scratch.product("products", q, keys.mT, q.shape[-1] ** -0.5)
        scores = scratch.cast("scores", scores, self.dtype)
        if self.bias is not None:
            by_block = scores.unflatten(-1, (-1, self.block[1]))  # [R, block queries, L, block keys]
            by_block += self.bias[chunk.pairs].view(len(q), 1, -1, 1)
        return self.hide(chunk, scores, self.lowest, scratch)

    def hide(self, chunk: Chunk, scores: Tensor, value: float, scratch: _Scratch) -> Tensor:
        """The same tensor with `value` where a key is hidden."""
        if chunk.masks is not None:
            hidden = scratch.take("hidden", self.masks, chunk.masks).view(len(scores), -1, *self.block)
            scores.unflatten(-1, (-1, self.block[1])).masked_fill_(hidden.transpose(1, 2), value)
        return scores


class _Fused:
    """Softmax without sink and LSE by PyTorch's own kernels; the backward needs nothing but q, k and v."""

    def __init__(self, q: Tensor, support: Support, masks: Tensor):
        # The lowest finite number, not -inf: a row without keys stays free of NaN.
        self.scores = _Scores(support, masks, q.dtype, torch.finfo(q.dtype).min)

    def forward(self, chunk: Chunk, scores: Tensor, values: Tensor, scratch: _Scratch) -> Tensor:
        """out [R, block queries, D] of scores and values."""
        return scratch.product("out", self.weights(chunk, scores, scratch), values)

    def backward(
        self, chunk: Chunk, scores: Tensor, values: Tensor, d_out: Tensor, scratch: _Scratch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """P, dO and dS of a chunk; the first two such that dV = P^T dO."""
        weights, d_out = self.weights(chunk, scores, scratch), scratch.take("d_out", d_out, chunk.rows)
        d_scores = scratch.product("d_scores", d_out, values.mT)
        torch._softmax_backward_data(d_scores, weights, -1, weights.dtype, grad_input=d_scores)
        return weights, d_out, d_scores

    def weights(self, chunk: Chunk, scores: Tensor, scratch: _Scratch) -> Tensor:
        return self.scores.hide(chunk, torch.softmax(scores, -1, out=scores), 0, scratch)
