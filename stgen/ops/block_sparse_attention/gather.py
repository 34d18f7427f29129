"""Block-sparse attention in plain PyTorch: gather the key blocks of some query blocks, then multiply.

Nothing grows with n x m: one chunk of rows after the other is computed in the same memory, and the backward computes
the scores again, as FlashAttention does (arXiv:2205.14135, section 3.1). Gradients of keys and values are added up in
float32 and in the same order every time on a CPU.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag, pad

from stgen.ops.block_sparse_attention.chunks import Chunk, Plan
from stgen.ops.normaliser import Normaliser
from stgen.ops.support import Support

# Of the gradients of keys (or values) by pair of blocks: up to here they are kept and added up at the end, which saves a
# fifth of the backward; beyond, fresh pages cost more than that saves. Measured at 4096 and 16384 tokens, 6 to 107 MB.
KEPT_BYTES = 8 << 20


def block_sparse_attention_gather(
    q: Tensor, k: Tensor, v: Tensor, support: Support, normaliser: Normaliser, sink: Tensor | None, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Output [S, heads, n, D] and, where asked for, LSE [S, heads, n]."""
    dtype = q.dtype
    if dtype == torch.float16 and q.device.type == "cpu":  # no faster there than float32
        q, k, v = q.float(), k.float(), v.float()
    out, lse = _Gather.apply(q, k, v, sink, support.bias, support, normaliser, with_lse)  # type: ignore[misc]
    return out.to(dtype), lse


def _cut(x: Tensor, block: int) -> Tensor:
    """[S, heads, n, ...] -> [S * heads * blocks, block, ...], zeros after the end."""
    surplus = -x.shape[2] % block
    if surplus:
        x = pad(x, (0, 0) * (x.ndim - 3) + (0, surplus))
    return x.reshape(-1, block, *x.shape[3:])


def _joined(x: Tensor, like: Tensor) -> Tensor:
    """What `_cut` did undone: [S * heads * blocks, block, ...] -> [S, heads, n, ...], the first three those of `like`."""
    return x.reshape(*like.shape[:2], -1, *x.shape[2:])[:, :, : like.shape[2]]


def _not_zero(mass: Tensor) -> Tensor:
    """1 for the mass of a row without keys, whose weights are all zero."""
    return mass.masked_fill(mass == 0, 1)


# ---------------------------------------------------------------------------------------------------- steps of a chunk


class _Task(ABC):
    """Tensors cut into blocks, and the steps that all kinds of weights take with a chunk."""

    lowest = -torch.inf  # score of a hidden key

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, support: Support, plan: Plan, scores_dtype: torch.dtype):
        (bq, bk), self.plan, self.block = support.block, plan, support.block
        self.q = plan.sort(_cut(q, bq))  # [rows, block queries, D]; all that has rows is sorted
        self.k, self.v = _cut(k, bk), _cut(v, bk)  # [sequences * heads * key blocks, block keys, D]
        self.stats = torch.promote_types(q.dtype, torch.float32)  # of what is added up
        self.scores_dtype, self.scale = scores_dtype, q.shape[-1] ** -0.5
        self.bias = None if support.bias is None else support.bias.detach().flatten().to(scores_dtype)
        self.nothing = self.q.new_zeros(1, 1, 1)  # what `product` adds to
        self.buffers: dict[str, Tensor] = {}

    def scratch(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory that one chunk after the other uses: fresh pages cost more than what is computed on them."""
        size = math.prod(shape)
        if name not in self.buffers or len(self.buffers[name]) < size:
            self.buffers[name] = self.q.new_empty(size, dtype=dtype)
        return self.buffers[name][:size].view(shape)

    def take(self, name: str, blocks: Tensor, index: Tensor) -> Tensor:
        """Some of the blocks of a tensor."""
        out = self.scratch(name, (len(index), *blocks.shape[1:]), blocks.dtype)
        return torch.index_select(blocks, 0, index, out=out)

    def product(self, out: str | Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
        """scale * a b: [R, i, j] and [R, j, l] -> [R, i, l], in scratch memory or in a tensor."""
        if isinstance(out, str):
            out = self.scratch(out, (len(a), a.shape[1], b.shape[2]), a.dtype)
        return torch.baddbmm(self.nothing, a, b, beta=0, alpha=scale, out=out)

    def cast(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x if x.dtype == dtype else self.scratch(name, tuple(x.shape), dtype).copy_(x)

    def load(self, blocks: Tensor, chunk: Chunk) -> Tensor:
        """Keys or values [R, L * block keys, D] of a chunk, in the same memory, which is in cache: one after the other."""
        rows = chunk.rows.stop - chunk.rows.start
        return self.take("blocks", blocks, chunk.blocks).view(rows, -1, blocks.shape[-1])

    def scores(self, chunk: Chunk, keys: Tensor) -> Tensor:
        """[R, block queries, L * block keys]"""
        scores = self.cast(
            "scores", self.product("products", self.q[chunk.rows], keys.mT, self.scale), self.scores_dtype
        )
        if self.bias is not None:
            scores.unflatten(-1, (-1, self.block[1])).add_(self.bias[chunk.pairs].view(len(scores), 1, -1, 1))
        return self.hide(chunk, scores, self.lowest)

    def hide(self, chunk: Chunk, scores: Tensor, value: float) -> Tensor:
        """The same tensor with `value` where a key is hidden."""
        if chunk.masks is not None:
            hidden = self.take("hidden", self.plan.masks, chunk.masks).view(len(scores), -1, *self.block)
            scores.unflatten(-1, (-1, self.block[1])).masked_fill_(hidden.transpose(1, 2), value)
        return scores

    def totals(self) -> "list[_Kept] | list[_Added]":
        """Where the gradients of keys and of values are added up."""
        pairs, like = self.plan.pairs, (self.k, self.v)
        if 0 < pairs * self.k[0].numel() * self.k.element_size() <= KEPT_BYTES:
            parts = self.k.new_empty(2, pairs, *self.k.shape[1:])
            return [_Kept(self, x, part) for x, part in zip(like, parts, strict=True)]
        return [_Added(self, x) for x in like]

    # ---- what kinds of weights do in their own way

    @abstractmethod
    def attend(self, chunk: Chunk, scores: Tensor, out: Tensor) -> None:
        """Write the rows of `out` [rows, block queries, D]. Takes the memory of the scores."""

    def d_sums(self, chunk: Chunk, d_out: Tensor) -> Tensor:
        """Gradient [R, block queries, D] of weights V, from that of all outputs."""
        return d_out[chunk.rows]

    @abstractmethod
    def derive(self, chunk: Chunk, scores: Tensor, d_weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and dS of a chunk. Takes the memory of the scores and of their gradient."""

    def found(self, out: Tensor) -> tuple[Tensor, ...]:
        """What the backward needs besides q, k and v, once the chunks are through."""
        return ()

    def resume(self, d_lse: Tensor | None, found: list[Tensor]) -> None:  # noqa: B027 (nothing to take up is usual)
        """Take it up, and the gradient of the LSE [rows, block queries]."""

    def lse(self) -> Tensor | None:
        """LSE [rows, block queries] of the chunks that are through; None where no one asks for it."""
        return None

    def d_sink(self) -> Tensor | None:
        return None


class _Fused(_Task):
    """Softmax without sink and LSE, by PyTorch's own kernels; the backward needs nothing but q, k and v."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, support: Support, plan: Plan):
        super().__init__(q, k, v, support, plan, q.dtype)
        self.lowest = torch.finfo(q.dtype).min  # finite, so that rows without keys stay free of NaN

    def attend(self, chunk: Chunk, scores: Tensor, out: Tensor) -> None:
        weights = self.weights(chunk, scores)
        self.product(out[chunk.rows], weights, self.load(self.v, chunk))

    def weights(self, chunk: Chunk, scores: Tensor) -> Tensor:
        return self.hide(chunk, torch.softmax(scores, -1, out=scores), 0)

    def derive(self, chunk: Chunk, scores: Tensor, d_weights: Tensor) -> tuple[Tensor, Tensor]:
        weights = self.weights(chunk, scores)
        torch._softmax_backward_data(d_weights, weights, -1, weights.dtype, grad_input=d_weights)
        return weights, d_weights


class _General(_Task):
    """Any normaliser, with sink and LSE, from the mass and the level of each query."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, support: Support, plan: Plan, normaliser: Normaliser, sink: Tensor | None
    ):
        super().__init__(q, k, v, support, plan, torch.promote_types(q.dtype, torch.float32))
        self.normaliser, self.logits, self.sink, self.sequences = normaliser, sink, None, len(q)
        # Mass and level of a row without keys, [rows, block queries, 1]; those of the others are filled in.
        self.mass, self.level = self.q.new_zeros((2, *self.q.shape[:2], 1), dtype=self.stats)
        if normaliser.by_count:
            counts = support.per_query().repeat(len(q) // support.groups, 1, 1).expand(q.shape[:3])
            self.mass = plan.sort(_cut(counts, support.block[0])).unsqueeze(-1).to(self.stats)
        if sink is not None:
            each = sink.detach().to(self.stats).repeat(len(q))  # [sequences * heads]
            each = plan.sort(each.repeat_interleave(len(self.q) // len(each)))
            self.sink = each[:, None, None].expand_as(self.level)
            self.level = normaliser.level(self.sink).contiguous()
            self.mass = normaliser.weight(self.sink, self.level)

    def attend(self, chunk: Chunk, scores: Tensor, out: Tensor) -> None:
        """The same; writes the rows of mass and level too."""
        rows, normaliser = chunk.rows, self.normaliser
        if not normaliser.by_count:
            top = scores.amax(-1, keepdim=True)
            self.level[rows] = normaliser.level(top if self.sink is None else torch.maximum(top, self.sink[rows]))
        level = self.level[rows]
        weights = normaliser.weight(scores, level, out=scores)
        if not normaliser.by_count:
            mass = weights.sum(-1, keepdim=True)
            self.mass[rows] = mass if self.sink is None else mass + normaliser.weight(self.sink[rows], level)
        weights = self.cast("weights", weights, self.q.dtype)
        sums = self.product("sums", weights, self.load(self.v, chunk))
        out[rows] = self.cast("sums stats", sums, self.stats).div_(_not_zero(self.mass[rows]))

    def lse(self) -> Tensor:
        return self.normaliser.log_mass(self.mass, self.level).squeeze(-1)

    def found(self, out: Tensor) -> tuple[Tensor, ...]:
        return self.mass, self.level, out

    def resume(self, d_lse: Tensor | None, found: list[Tensor]) -> None:
        self.mass, self.level, self.out = found
        self.inverse = 1 / _not_zero(self.mass)
        # delta = (dO . O - dLSE) / mass, whose first term comes with the chunks
        self.delta = torch.zeros_like(self.mass) if d_lse is None else -d_lse.unsqueeze(-1) * self.inverse

    def d_sums(self, chunk: Chunk, d_out: Tensor) -> Tensor:
        """dO / mass, for the weights are f; writes the rows of delta too."""
        rows = chunk.rows
        d_sums = d_out[rows] * self.inverse[rows]
        if not self.normaliser.by_count:  # whose mass does not depend on the scores
            self.delta[rows] += (d_sums * self.out[rows]).sum(-1, keepdim=True)
        return d_sums.to(self.q.dtype)

    def derive(self, chunk: Chunk, scores: Tensor, d_weights: Tensor) -> tuple[Tensor, Tensor]:
        """f and dS = f' (df - delta)"""
        rows, level, dtype = chunk.rows, self.level[chunk.rows], self.q.dtype
        weights = self.normaliser.weight(scores, level, out=scores)
        d_scores = self.cast("d_scores stats", d_weights, self.stats)
        d_scores.sub_(self.delta[rows]).mul_(self.normaliser.slope(scores, level, weights))
        return self.cast("weights", weights, dtype), self.cast("d_weights", d_scores, dtype)

    def d_sink(self) -> Tensor | None:
        """[heads]: the sink is a key without value."""
        if self.sink is None or self.logits is None:
            return None
        slope = self.normaliser.slope(self.sink, self.level, self.normaliser.weight(self.sink, self.level))
        total = self.plan.unsort(-slope * self.delta).view(self.sequences, len(self.logits), -1).sum((0, 2))
        return total.to(self.logits.dtype)


# ------------------------------------------------------------------------------------- gradients of keys and of values


class _Added:
    """Parts of a chunk are added, in float32, to the sums of all blocks."""

    def __init__(self, task: _Task, like: Tensor):
        self.task, self.sums = task, torch.zeros_like(like, dtype=task.stats)

    def product(self, chunk: Chunk, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
        """Add scale * a b [R, L * block keys, D]. Takes the memory of the chunk's keys, which have done their part."""
        part = self.task.product("blocks", a, b, scale)
        part = self.task.cast("part stats", part, self.task.stats)
        self.sums.index_add_(0, chunk.blocks, part.view(-1, *self.sums.shape[1:]))

    def result(self) -> Tensor:
        """[blocks, block keys, D]"""
        return self.sums


class _Kept:
    """Parts are kept and added up at the end, each block's in one go: less traffic, and the sums need no float32."""

    def __init__(self, task: _Task, like: Tensor, parts: Tensor):
        self.task, self.like, self.parts = task, like, parts  # parts: [pairs, block keys, D]

    def product(self, chunk: Chunk, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
        """Keep scale * a b [R, L * block keys, D]."""
        self.task.product(self.parts[chunk.places].view(len(a), -1, self.like.shape[2]), a, b, scale)

    def result(self) -> Tensor:
        """[blocks, block keys, D]"""
        order, first = self.task.plan.incoming
        return embedding_bag(order, self.parts.flatten(1), first, mode="sum").view_as(self.like)


# ----------------------------------------------------------------------------------------------------------- operation


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        bias: Tensor | None,  # the support's, here so that it gets a gradient
        support: Support,
        normaliser: Normaliser,
        with_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        plan = Plan.of(support, q.shape[0], q.shape[1], q.element_size())
        task = _task(q, k, v, support, plan, normaliser, sink, with_lse)
        out = plan.blank(task.q)  # [rows, block queries, D]
        for chunk in plan.chunks:
            task.attend(chunk, task.scores(chunk, task.load(task.k, chunk)), out)
        ctx.save_for_backward(q, k, v, sink, *task.found(out))
        ctx.options = support, plan, normaliser, with_lse
        lse = task.lse() if with_lse else None
        return _joined(plan.unsort(out), q), None if lse is None else _joined(plan.unsort(lse), q)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        (q, k, v, sink, *found), (support, plan, normaliser, with_lse) = ctx.saved_tensors, ctx.options
        d_out = plan.sort(_cut(d_out, support.block[0]))
        d_lse = None if d_lse is None else plan.sort(_cut(d_lse, support.block[0]))
        task = _task(q, k, v, support, plan, normaliser, sink, with_lse)
        task.resume(d_lse, found)
        d_q, (d_k, d_v) = plan.blank(task.q), task.totals()
        d_bias = None if task.bias is None else torch.zeros_like(task.bias, dtype=task.stats)
        for chunk in plan.chunks:
            d_sums = task.d_sums(chunk, d_out)
            d_weights = task.product("d_weights", d_sums, task.load(task.v, chunk).mT)
            keys = task.load(task.k, chunk)
            weights, d_scores = task.derive(chunk, task.scores(chunk, keys), d_weights)
            task.product(d_q[chunk.rows], d_scores, keys, task.scale)
            d_k.product(chunk, d_scores.mT, task.q[chunk.rows], task.scale)
            d_v.product(chunk, weights.mT, d_sums)
            if d_bias is not None:
                by_block = d_scores.unflatten(-1, (-1, support.block[1]))
                d_bias.index_add_(0, chunk.pairs, by_block.sum((1, 3), dtype=task.stats).flatten())
        sums = plan.unsort(d_q), d_k.result(), d_v.result()
        d_q, d_k, d_v = (_joined(d, x).to(x.dtype) for d, x in zip(sums, (q, k, v), strict=True))
        d_bias = None if d_bias is None else d_bias.view_as(support.bias).to(support.bias.dtype)
        return d_q, d_k, d_v, task.d_sink(), d_bias, None, None, None


def _task(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    support: Support,
    plan: Plan,
    normaliser: Normaliser,
    sink: Tensor | None,
    with_lse: bool,
) -> _Task:
    if normaliser.kind == "softmax" and sink is None and not with_lse:
        return _Fused(q, k, v, support, plan)
    return _General(q, k, v, support, plan, normaliser, sink)
