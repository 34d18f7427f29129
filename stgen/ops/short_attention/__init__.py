"""Attention within boxes: many short sequences of a video's tokens, without moving the tokens.

Temporal attention, attention along rows or columns, in windows and within small frames: sequences of up to 128 places,
of which the kernels take whole rows at once, at the addresses where the tokens lie.
"""

from typing import Literal

import torch
from torch import Tensor

from stgen.ops import dispatch
from stgen.ops.boxes import Boxes
from stgen.ops.normaliser import Normaliser
from stgen.ops.short_attention.reference import apply_map_reference, short_attention_reference

Impl = Literal["auto", "reference", "triton"]

MOST_PLACES = 128  # of a sequence, whose rows a program holds whole
MOST_KEYS = 144  # those of a sequence and the rows of its sink
MOST_WIDTH = 128  # of a head
MOST_PLACES_IN_FLOAT32 = 32  # which is multiplied in registers, without tensor cores
MOST_PLACES_BEFORE_HOPPER = 64  # where tensor cores take all operands from registers; half of it with rows of a sink
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def short_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    boxes: Boxes,
    normaliser: Normaliser | str = "softmax",
    sink: Tensor | None = None,
    *,
    sink_k: Tensor | None = None,
    sink_v: Tensor | None = None,
    mask: Tensor | None = None,
    return_map: bool = False,
    return_lse: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Attention of the tokens in each box over each other; S = B * boxes.count sequences of n = boxes.places.

    Empty places of cut boxes are neither attended nor written; their rows are 0 in the map and -inf in the LSE.

    Args:
        q, k, v: [B, N, heads, D] tokens in raster order.
        boxes: which tokens share a sequence.
        normaliser: a `Normaliser` or the name of its kind.
        sink: [heads] score of a further key that has no value.
        sink_k, sink_v: [heads, sinks, D] keys and values before those of every sequence, which every query attends.
        mask: bool, true where a query may attend a key; broadcasts to [S, heads, n, n]. A row without keys gives zeros.
        return_map, return_lse: return these as well.
        impl: `reference` (explicit products), `triton` (kernels) or `auto`.

    Returns:
        [B, N, heads, D]; a tuple with the map [S, heads, n, sinks + n] and the LSE [S, heads, n] float32 after it if
        these are asked for. All are differentiable.

    Raises:
        ValueError: shapes that do not go together, or an unknown impl or one that cannot do what is asked.
    """
    normaliser = Normaliser.of(normaliser)
    normaliser.check_sink(sink, q.shape[2])
    _check(q, k, v, boxes, sink_k, sink_v, mask)
    if return_lse and normaliser.by_count:
        raise ValueError(
            f"normaliser {normaliser.kind} divides by the number of keys and has no LSE; do not ask for it"
        )
    why = unfit(q, boxes, sink_v)
    if _chosen(impl, q, why) == "reference":
        out, weights, lse = short_attention_reference(q, k, v, boxes, normaliser, sink, sink_k, sink_v, mask)
    else:
        from stgen.ops.short_attention.library import numbers, short_attention_op

        q, k, v = (_rows_whole(x) for x in (q, k, v))
        out, weights, lse = short_attention_op(
            q, k, v, sink, sink_k, sink_v, mask,
            numbers(boxes), normaliser.kind, normaliser.cut, return_map, return_lse,
        )  # fmt: skip
    asked = (out, *([weights] if return_map else []), *([lse] if return_lse else []))
    return asked if len(asked) > 1 else out


def apply_map(weights: Tensor, v: Tensor, boxes: Boxes, sink_v: Tensor | None = None, impl: Impl = "auto") -> Tensor:
    """P v within boxes, with a map that `short_attention` returned.

    Args:
        weights: [S, heads, n, sinks + n].
        v: [B, N, heads, D]; `sink_v` [heads, sinks, D] before it in every sequence.
        boxes, impl: as in `short_attention`.

    Returns:
        [B, N, heads, D]; differentiable in the map, v and sink_v.
    """
    _check(v, v, v, boxes, sink_v, sink_v, None)
    sinks = 0 if sink_v is None else sink_v.shape[1]
    shape = [len(v) * boxes.count, v.shape[2], boxes.places, sinks + boxes.places]
    if list(weights.shape) != shape:
        raise ValueError(f"weights should have shape {shape}, got {list(weights.shape)}")
    if _chosen(impl, v, unfit(v, boxes, sink_v)) == "reference":
        return apply_map_reference(weights, v, boxes, sink_v)
    from stgen.ops.short_attention.library import apply_map_op, numbers

    return apply_map_op(_rows_whole(weights), _rows_whole(v), sink_v, numbers(boxes))


def takes_kernels(q: Tensor, boxes: Boxes, sink_v: Tensor | None = None) -> bool:
    """Whether `auto` takes the kernels for tokens like q [B, N, heads, D]."""
    return dispatch.by_kernels("short_attention", q, unfit(q, boxes, sink_v), _trial, q.shape[3])


def _trial(device: torch.device, dtype: torch.dtype, width: int) -> None:
    """The smallest forward and backward pass of the kernels."""
    q, k, v = torch.zeros(3, 1, 2, 1, width, dtype=dtype, device=device).requires_grad_()
    short_attention(q, k, v, Boxes((2, 1, 1), (2, 1, 1)), impl="triton").sum().backward()  # type: ignore[union-attr]


def unfit(q: Tensor, boxes: Boxes, sink_v: Tensor | None = None) -> str | None:
    """Why the kernels cannot do this, in one clause; None where they can."""
    sinks = 0 if sink_v is None else sink_v.shape[1]
    if q.dtype not in DTYPES:
        return f"they take float16, bfloat16 and float32, not {str(q.dtype).removeprefix('torch.')}"
    if q.dtype == torch.float32 and boxes.places > MOST_PLACES_IN_FLOAT32:
        return f"boxes have {boxes.places} places, and in float32 they hold up to {MOST_PLACES_IN_FLOAT32}"
    most = MOST_PLACES_BEFORE_HOPPER // (2 if sinks else 1)
    if boxes.places > most and q.is_cuda and torch.cuda.get_device_capability(q.device) < (9, 0):
        return (
            f"boxes have {boxes.places} places and {sinks} sink rows, and before Hopper they hold up to {most} places"
        )
    if boxes.places > MOST_PLACES or boxes.places + sinks > MOST_KEYS:
        return (
            f"boxes have {boxes.places} places and {sinks} sink rows, and they hold up to {MOST_PLACES} places, "
            f"{MOST_KEYS} with those rows"
        )
    if q.shape[3] > MOST_WIDTH:
        return f"heads are {q.shape[3]} wide, and they hold up to {MOST_WIDTH}"
    return None


def _chosen(impl: str, q: Tensor, why: str | None) -> str:
    if impl not in ("auto", "reference", "triton"):
        raise ValueError(f"impl should be auto, reference or triton, got {impl!r}")
    if impl == "triton" and (why := why or dispatch.off_gpu(q)) is not None:
        raise ValueError(f"impl triton: the kernels of short_attention cannot do this: {why}; take impl: auto")
    if impl == "auto":
        by_kernels = dispatch.by_kernels("short_attention", q, why, _trial, q.shape[3])
        return "triton" if by_kernels else "reference"
    return impl


def _check(
    q: Tensor, k: Tensor, v: Tensor, boxes: Boxes, sink_k: Tensor | None, sink_v: Tensor | None, mask: Tensor | None
) -> None:
    tokens = boxes.grid[0] * boxes.grid[1] * boxes.grid[2]
    if q.ndim != 4 or q.shape[1] != tokens:
        raise ValueError(f"q should have shape [B, {tokens}, heads, D] on a grid of {boxes.grid}, got {list(q.shape)}")
    if not (q.shape == k.shape == v.shape and q.dtype == k.dtype == v.dtype):
        raise ValueError(
            f"q, k and v should be alike, got {list(q.shape)} {q.dtype}, {list(k.shape)} {k.dtype} and "
            f"{list(v.shape)} {v.dtype}"
        )
    if (sink_k is None) != (sink_v is None):
        raise ValueError("sink_k and sink_v belong together; give both or neither")
    heads, width = q.shape[2:]
    for name, rows in (("sink_k", sink_k), ("sink_v", sink_v)):
        if rows is not None and (
            rows.ndim != 3 or rows.shape[0] != heads or rows.shape[2] != width or not len(rows[0])
        ):
            raise ValueError(f"{name} should have shape [{heads}, sinks, {width}], got {list(rows.shape)}")
    if sink_k is not None and sink_v is not None and sink_k.shape != sink_v.shape:
        raise ValueError(f"sink_k and sink_v should be alike, got {list(sink_k.shape)} and {list(sink_v.shape)}")
    if mask is not None:
        full = (len(q) * boxes.count, heads, boxes.places, boxes.places)
        fits = mask.ndim == 4 and all(m in (1, n) for m, n in zip(mask.shape, full, strict=True))
        if mask.dtype != torch.bool or not fits:
            raise ValueError(f"mask should be bool and broadcast to {list(full)}, got {mask.dtype} {list(mask.shape)}")


def _rows_whole(x: Tensor) -> Tensor:
    """The same with its last axis contiguous, as kernels need it."""
    return x if x.stride(-1) == 1 else x.contiguous()
