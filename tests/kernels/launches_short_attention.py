"""Launches of short_attention's kernels to compile ahead of time: a cover of pairs of what they are specialised to."""

from functools import partial

import torch
from torch import Tensor

from stgen.ops.boxes import Boxes, Extent
from stgen.ops.normaliser import Normaliser
from stgen.ops.short_attention import triton as kernels
from stgen.testing.compiled import Launch

HALF, BF16, FULL = torch.float16, torch.bfloat16, torch.float32
POLY, POLY_E = Normaliser("poly", -6.0), Normaliser("poly_e", -6.0)


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attend(
    backward: bool, places: int, head_dim: int, dtype: torch.dtype = BF16, boxes: Boxes | None = None, heads: int = 16,
    normaliser: Normaliser | None = None, sink: bool = False, sinks: int = 0, mask: str = "", extra: bool = False,
) -> None:  # fmt: skip
    """Temporal sequences of so many places if no boxes are given; `extra` asks for map and LSE."""
    boxes, normaliser = boxes or Boxes((places, 32, 32), (places, 1, 1)), normaliser or Normaliser()
    tokens, n = boxes.grid[0] * boxes.grid[1] * boxes.grid[2], boxes.places
    rows = (2 * boxes.count, heads, n)
    q, k, v = empty(2, tokens, 3, heads, head_dim, dtype=dtype).unbind(2)
    sink_k = empty(heads, sinks, head_dim, dtype=FULL) if sinks else None
    of_keys = {"": None, "static": (1, 1, n, n), "keys": (rows[0], 1, 1, n), "full": (*rows, n)}[mask]
    given = (q, k, v, boxes, normaliser, empty(heads, dtype=FULL) if sink else None, sink_k, sink_k)
    given += (None if of_keys is None else empty(*of_keys, dtype=torch.bool),)
    has_lse = extra and not normaliser.by_count
    if not backward:
        kernels.forward(*given, extra, has_lse)
        return
    d_map = empty(*rows, sinks + n, dtype=dtype) if extra else None
    kernels.backward(empty(*q.shape, dtype=dtype), d_map, empty(*rows, dtype=FULL) if has_lse else None, *given)


def apply(backward: bool, places: int, head_dim: int, dtype: torch.dtype = BF16, sinks: int = 0) -> None:
    boxes, heads = Boxes((places, 32, 32), (places, 1, 1)), 16
    v = empty(2, places * 1024, 3, heads, head_dim, dtype=dtype)[:, :, 2]
    weights = empty(2 * boxes.count, heads, places, sinks + places, dtype=dtype)
    given = (weights, v, boxes, empty(heads, sinks, head_dim, dtype=FULL) if sinks else None)
    if backward:
        kernels.apply_backward(empty(*v.shape, dtype=dtype), *given)
    else:
        kernels.apply_forward(*given)


def windows(t: int, h: int, w: int) -> Boxes:
    """Shifted ones, which the border cuts."""
    grid: Extent = (3 * t, 4 * h, 4 * w)
    return Boxes(grid, (t, h, w), (t // 2, h // 2, w // 2))


WIDE = ("HMMA", "LDG.128")
HOPPER = ("sm_90",)  # has the registers for more than 64 places, or 32 and rows of a sink

LAUNCHES = {
    "forward 16 x 64": Launch(partial(attend, False, 16, 64), True, WIDE),
    "backward 16 x 64": Launch(partial(attend, True, 16, 64), True, WIDE),
    "forward 16 x 72 masked": Launch(partial(attend, False, 16, 72, HALF, mask="static", sink=True), False, WIDE),
    "backward 16 x 72": Launch(partial(attend, True, 16, 72), True, WIDE),
    "forward 16 x 128 map": Launch(partial(attend, False, 13, 128, sinks=4, extra=True), False, WIDE),
    "backward 16 x 128 sink": Launch(partial(attend, True, 16, 128, sink=True, normaliser=POLY), False, WIDE),
    "backward 16 x 64 sink rows": Launch(partial(attend, True, 16, 64, sinks=4, extra=True), False, WIDE),
    "backward 8 x 32 windows": Launch(partial(attend, True, 0, 32, HALF, windows(2, 2, 2), mask="keys"), False, WIDE),
    "backward 16 x 60 few heads": Launch(partial(attend, True, 16, 60, heads=3, mask="full"), False, ("HMMA",)),
    "forward 16 float32": Launch(partial(attend, False, 16, 64, FULL, sink=True), False, ("no TF32",)),
    "backward 16 float32": Launch(partial(attend, True, 16, 64, FULL), False, ("no TF32",)),
    "backward 16 x 128 float32": Launch(partial(attend, True, 16, 128, FULL), False, ("no TF32",)),
    "forward 32 x 64": Launch(partial(attend, False, 32, 64, mask="static", extra=True), False, WIDE),
    "backward 32 x 64": Launch(partial(attend, True, 32, 64, HALF, sink=True), False, WIDE),
    "backward 24 x 80": Launch(partial(attend, True, 24, 80, normaliser=Normaliser("relu2"), sinks=2), False, WIDE),
    "forward 32 x 128": Launch(partial(attend, False, 32, 128, normaliser=POLY_E), False, WIDE),
    "backward 32 x 128": Launch(partial(attend, True, 32, 128, mask="keys"), False, WIDE),
    "backward 32 x 128 sink rows": Launch(partial(attend, True, 32, 128, HALF, sinks=4), False, WIDE),
    "backward 32 float32": Launch(partial(attend, True, 32, 64, FULL, mask="static"), False, ("no TF32",)),
    "forward 64 x 64 windows": Launch(partial(attend, False, 0, 64, BF16, windows(4, 4, 4)), False, WIDE),
    "backward 64 x 64": Launch(partial(attend, True, 0, 64, BF16, windows(4, 4, 4), sink=True), False, WIDE),
    "backward 64 x 72": Launch(partial(attend, True, 49, 72, HALF, normaliser=Normaliser("relu")), False, WIDE),
    "backward 64 x 128": Launch(partial(attend, True, 64, 128), False, WIDE),
    "backward 64 x 64 sink rows": Launch(partial(attend, True, 64, 64, sinks=4), False, WIDE, HOPPER),
    "backward 64 x 64 everything": Launch(
        partial(attend, True, 64, 64, sink=True, sinks=4, mask="full", extra=True), False, WIDE, HOPPER
    ),
    "forward 128 x 64": Launch(partial(attend, False, 128, 64, sinks=16), False, WIDE, HOPPER),
    "backward 128 x 64": Launch(partial(attend, True, 128, 64, sink=True, mask="static"), False, WIDE, HOPPER),
    "backward 128 x 128": Launch(partial(attend, True, 100, 128), False, WIDE, HOPPER),
    "apply 16 x 64": Launch(partial(apply, False, 16, 64), False, WIDE),
    "apply backward 16 x 72 sinks": Launch(partial(apply, True, 16, 72, HALF, 2), False, WIDE),
    "apply backward 64 x 128": Launch(partial(apply, True, 64, 128), False, WIDE),
}
