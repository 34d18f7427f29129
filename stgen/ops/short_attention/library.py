"""The kernels as operators of PyTorch, so that torch.compile, export and autograd know them.

Boxes and the normaliser are plain numbers here; outputs that were not asked for are empty tensors.
"""

import torch
from torch import Tensor

from stgen.ops.boxes import Boxes
from stgen.ops.normaliser import Normaliser


def numbers(boxes: Boxes) -> list[int]:
    return [*boxes.grid, *boxes.size, *boxes.shift]


def _boxes(numbers: list[int]) -> Boxes:
    a, b, c, d, e, f, g, h, i = numbers
    return Boxes((a, b, c), (d, e, f), (g, h, i))


def _normaliser(kind: str, cut: float | None) -> Normaliser:
    return Normaliser(kind, cut)  # type: ignore[arg-type]


def _or_empty(x: Tensor | None, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty(0, dtype=dtype) if x is None else x


def _if_any(x: Tensor | None) -> Tensor | None:
    return None if x is None or not x.numel() else x


def _rows_whole(x: Tensor) -> Tensor:
    """The same with its last axis contiguous, as kernels need it."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


# ---------------------------------------------------------------------------------------------------------- attention


@torch.library.custom_op("stgen::short_attention", mutates_args=())
def short_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    sink_k: Tensor | None,
    sink_v: Tensor | None,
    mask: Tensor | None,
    boxes: list[int],
    kind: str,
    cut: float | None,
    with_map: bool,
    with_lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from stgen.ops.short_attention import triton

    normaliser = _normaliser(kind, cut)
    out, weights, lse = triton.forward(
        q, k, v, _boxes(boxes), normaliser, sink, sink_k, sink_v, mask, with_map, with_lse
    )
    return out, _or_empty(weights, q), _or_empty(lse, q, torch.float32)


@short_attention_op.register_fake
def _(q, k, v, sink, sink_k, sink_v, mask, boxes, kind, cut, with_map, with_lse):
    geometry, heads = _boxes(boxes), q.shape[2]
    rows = (q.shape[0] * geometry.count, heads, geometry.places)
    columns = geometry.places + (0 if sink_k is None else sink_k.shape[1])
    weights = q.new_empty((*rows, columns) if with_map else 0)
    return q.new_empty(q.shape), weights, q.new_empty(rows if with_lse else 0, dtype=torch.float32)


@torch.library.custom_op("stgen::short_attention_backward", mutates_args=())
def short_attention_backward_op(
    d_out: Tensor,
    d_map: Tensor | None,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    sink_k: Tensor | None,
    sink_v: Tensor | None,
    mask: Tensor | None,
    boxes: list[int],
    kind: str,
    cut: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from stgen.ops.short_attention import triton

    normaliser = _normaliser(kind, cut)
    given = (q, k, v, _boxes(boxes), normaliser, sink, sink_k, sink_v, mask)
    d_qkv, *d_sinks = triton.backward(_rows_whole(d_out), None if d_map is None else _rows_whole(d_map), d_lse, *given)
    d_sink, d_sink_k, d_sink_v = (
        _or_empty(d if x is None or d is None else d.to(x.dtype), q)
        for d, x in zip(d_sinks, (sink, sink_k, sink_v), strict=True)
    )
    return d_qkv, d_sink, d_sink_k, d_sink_v


@short_attention_backward_op.register_fake
def _(d_out, d_map, d_lse, q, k, v, sink, sink_k, sink_v, mask, boxes, kind, cut):
    d_sinks = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (sink, sink_k, sink_v))
    return q.new_empty(*q.shape[:2], 3, *q.shape[2:]), *d_sinks


def _keep(ctx, inputs, output):
    *tensors, boxes, kind, cut, with_map, with_lse = inputs
    ctx.save_for_backward(*tensors)
    ctx.rest, ctx.asked = (boxes, kind, cut), (with_map, with_lse)
    ctx.set_materialize_grads(False)


def _backward(ctx, d_out, d_map, d_lse):
    q, *_ = tensors = ctx.saved_tensors
    with_map, with_lse = ctx.asked
    d_out = torch.zeros_like(q) if d_out is None else d_out
    d_map, d_lse = d_map if with_map else None, d_lse if with_lse else None
    d_qkv, *d_sinks = short_attention_backward_op(d_out, d_map, d_lse, *tensors, *ctx.rest)
    return *d_qkv.unbind(2), *(_if_any(d) for d in d_sinks), *[None] * 6


short_attention_op.register_autograd(_backward, setup_context=_keep)


# ---------------------------------------------------------------------------------------------------------- a given map


@torch.library.custom_op("stgen::apply_map", mutates_args=())
def apply_map_op(weights: Tensor, v: Tensor, sink_v: Tensor | None, boxes: list[int]) -> Tensor:
    from stgen.ops.short_attention import triton

    return triton.apply_forward(weights, v, _boxes(boxes), sink_v)


@apply_map_op.register_fake
def _(weights, v, sink_v, boxes):
    return v.new_empty(v.shape)


@torch.library.custom_op("stgen::apply_map_backward", mutates_args=())
def apply_map_backward_op(
    d_out: Tensor, weights: Tensor, v: Tensor, sink_v: Tensor | None, boxes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    from stgen.ops.short_attention import triton

    d_map, dv, d_sink_v = triton.apply_backward(_rows_whole(d_out), weights, v, _boxes(boxes), sink_v)
    return d_map, dv, _or_empty(d_sink_v if sink_v is None or d_sink_v is None else d_sink_v.to(sink_v.dtype), v)


@apply_map_backward_op.register_fake
def _(d_out, weights, v, sink_v, boxes):
    return (
        weights.new_empty(weights.shape),
        v.new_empty(v.shape),
        v.new_empty(0) if sink_v is None else sink_v.new_empty(sink_v.shape),
    )


def _keep_map(ctx, inputs, output):
    *tensors, ctx.boxes = inputs
    ctx.save_for_backward(*tensors)


def _map_backward(ctx, d_out):
    d_map, dv, d_sink_v = apply_map_backward_op(d_out, *ctx.saved_tensors, ctx.boxes)
    return d_map, dv, _if_any(d_sink_v), None


apply_map_op.register_autograd(_map_backward, setup_context=_keep_map)
