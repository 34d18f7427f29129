"""The Triton kernels of stgen on one CUDA GPU, against the memory, the tensor cores and what PyTorch offers.

    python benchmarks/attention.py --json benchmarks/results/attention.json          (under 8 minutes)
    python benchmarks/attention.py --predict                                         (no GPU: the cost model's bounds)

Prints the ceilings first: bytes a second of a copy, bf16 products a second of 8192 x 8192 matrices. Then for each case
the time of our kernels, their share of the ceiling, and how many times as long the best of each group of rivals takes:

    SDPA               PyTorch's attention with each of its backends, on tensors that already lie in its layout
    SDPA with copies   the same from token-major q, k, v to a token-major output: by contiguous copies or by strided views
    flex               flex_attention, compiled, on the same block mask
    dense SDPA         what the sparsity is to be worth
    compiled           the definition in PyTorch, compiled

Samples are replays of CUDA graphs that make the same call on several sets of inputs in turn, at least four and four
times what the level-2 cache holds; times are medians of 50. What contenders put out is compared as well.
"""

import argparse
import fnmatch
import functools
import gc
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from stgen.ops.block_scores import top_blocks
from stgen.ops.block_sparse_attention import block_sparse_attention
from stgen.ops.block_sparse_attention.lists import BlockLists
from stgen.ops.boxes import Boxes, Extent
from stgen.ops.linear_attention import linear_attention
from stgen.ops.modulated_norm import modulated_norm
from stgen.ops.norm_rope import norm_rope
from stgen.ops.short_attention import apply_map, short_attention
from stgen.ops.short_attention import unfit as unfit_short
from stgen.ops.support import Support
from stgen.testing.cost import H200, Prediction, Work, predict

SAMPLES, WARM_UPS = 50, 5
SETS, MOST_SETS = 4, 24
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
MOST_SCORES = 1 << 31  # up to which the math backend, which holds them all, is asked
ALIKE = 2e-2  # relative rms distance of bf16 results up to which they are the same
OURS = "ours"
COPY, PRODUCTS = "copy bandwidth", "TFLOP/s"


@dataclass(frozen=True)
class On:
    """Where inputs lie."""

    device: torch.device
    dtype: torch.dtype

    def randn(self, seed: int, *shape: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32).to(self.dtype)


Run = Callable[[], Any]
Prepare = Callable[[On, int], tuple[list[Tensor], Run]]  # inputs of a seed, and a call on them


@dataclass(frozen=True)
class Contender:
    """Something to be timed. `group` is OURS or what goals compare with."""

    name: str
    group: str
    prepare: Prepare
    backward: bool = False
    comparable: bool = True  # whether its results are ours
    captured: bool = True  # False where a call waits for the GPU, so that no graph can hold it

    def make(self, on: On, seed: int) -> Run:
        """A call on inputs of its own: forward, or backward alone."""
        inputs, run = self.prepare(on, seed)
        if not self.backward:
            return torch.no_grad()(run)
        for x in inputs:
            x.requires_grad_()
        outputs = _tensors(run())
        d_outputs = [on.randn(1000 + seed + i, *out.shape) for i, out in enumerate(outputs)]
        return lambda: torch.autograd.grad(outputs, inputs, d_outputs, retain_graph=True)


@dataclass(frozen=True)
class Goal:
    """`of` is COPY (share of the ceiling), PRODUCTS (1e12 a second) or a group (times as long as ours)."""

    of: str
    at_least: float

    def __str__(self) -> str:
        if self.of == COPY:
            return f"{self.at_least:.0%} of {COPY}"
        return f"{self.at_least:g} {self.of}" if self.of == PRODUCTS else f"{self.at_least:.3g}x {self.of}"


@dataclass(frozen=True)
class Case:
    family: str
    name: str
    contenders: list[Contender]
    useful: Work  # of one call: what ceilings are compared with
    goals: tuple[Goal, ...] = ()
    dry: Callable[[], object] | None = None  # our launches on meta tensors
    executed: dict[str, Work] = field(
        default_factory=dict
    )  # by part of a kernel's name, where it is not the useful work


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [x for x in result if isinstance(x, Tensor)]


# ------------------------------------------------------------------------------------------------- attention in boxes


def packed(on: On, seed: int, tokens: int, heads: int, width: int) -> list[Tensor]:
    """q, k and v [1, N, heads, D] as views of one projection."""
    return [x.detach() for x in on.randn(seed, 1, tokens, 3, heads, width).unbind(2)]


def fold(x: Tensor, boxes: Boxes) -> Tensor:
    """[B, N, heads, D] -> [B * boxes, heads, places, D]; a view where strides allow it."""
    if boxes.is_cut:
        return boxes.fold(x)
    (t, h, w), (p, q, r) = boxes.counts, boxes.size
    x = x.unflatten(1, (t, p, h, q, w, r)).permute(0, 1, 3, 5, 7, 2, 4, 6, 8)
    return x.reshape(-1, x.shape[4], boxes.places, x.shape[8])


def unfold(x: Tensor, boxes: Boxes) -> Tensor:
    """The way back, contiguous."""
    if boxes.is_cut:
        return boxes.unfold(x).contiguous()
    (t, h, w), (p, q, r) = boxes.counts, boxes.size
    x = x.unflatten(2, (p, q, r)).unflatten(0, (-1, t, h, w)).permute(0, 1, 5, 2, 6, 3, 7, 4, 8)
    return x.reshape(x.shape[0], t * p * h * q * w * r, x.shape[7], x.shape[8]).contiguous()


def short_case(
    family: str,
    boxes: Boxes,
    heads: int,
    width: int,
    backward: bool,
    goals: Sequence[Goal] = (),
    backends: Sequence[str] = (),
) -> Case:
    """short_attention against SDPA in the same boxes."""
    tokens = math.prod(boxes.grid)
    present = boxes.present()

    def ours(on: On, seed: int) -> tuple[list[Tensor], Run]:
        q, k, v = packed(on, seed, tokens, heads, width)
        return [q, k, v], lambda: short_attention(q, k, v, boxes, impl="triton")

    def sdpa(backend: str, how: str) -> Prepare:
        def prepare(on: On, seed: int) -> tuple[list[Tensor], Run]:
            mask = None if present is None else present.to(on.device)[:, None, None, :]
            inputs = packed(on, seed, tokens, heads, width)
            if how == "alone":
                inputs = [fold(x, boxes).contiguous() for x in inputs]

            def run() -> Tensor:
                q, k, v = inputs if how == "alone" else (fold(x, boxes) for x in inputs)
                if how == "copies":
                    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
                with sdpa_kernel(BACKENDS[backend]):
                    out = scaled_dot_product_attention(q, k, v, attn_mask=mask)
                return out if how == "alone" else unfold(out, boxes)

            return inputs, run

        return prepare

    contenders = [Contender(OURS, OURS, ours, backward)]
    for backend in backends or BACKENDS:
        contenders += [
            Contender(backend, "SDPA", sdpa(backend, "alone"), backward, comparable=False),
            Contender(f"{backend}, contiguous", "SDPA with copies", sdpa(backend, "copies"), backward),
            Contender(f"{backend}, strided", "SDPA with copies", sdpa(backend, "views"), backward),
        ]
    n, sequences = boxes.places, boxes.count
    what = f"{n} places, {'x'.join(map(str, boxes.size))} of {'x'.join(map(str, boxes.grid))}"
    what += f" shifted {list(boxes.shift)}" if any(boxes.shift) else ""
    return Case(
        family,
        f"{family} {what}, {heads}x{width}, {_direction(backward)}",
        contenders,
        _short_work(tokens, sequences, heads, n, width, backward),
        tuple(goals),
        functools.partial(_dry_short, boxes, heads, width, backward),
        {"": _short_work(tokens, sequences, heads, max(16, _power(n)), _padded(width), backward)},
    )


def _short_work(tokens: int, sequences: int, heads: int, n: int, width: int, backward: bool) -> Work:
    """Products of n x n scores; q, k, v, out once, in the backward q, k, v, d_out and three gradients."""
    scores = sequences * heads * n * n
    return Work(
        flops=(10 if backward else 4) * scores * width,
        bytes=(7 if backward else 4) * tokens * heads * width * 2,
        exponentials=scores,
        fp32=(14 if backward else 8) * scores,
    )


def _direction(backward: bool) -> str:
    return "backward" if backward else "forward"


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _padded(width: int) -> int:
    """The width of tiles that hold a head: 72 is 64 + 16."""
    return width if width == _power(width) else _power(width) // 2 + max(16, _power(width - _power(width) // 2))


def _dry_short(boxes: Boxes, heads: int, width: int, backward: bool, with_sink: bool = False) -> None:
    from stgen.ops.normaliser import Normaliser
    from stgen.ops.short_attention import triton as kernels

    q, k, v = _meta(1, math.prod(boxes.grid), 3, heads, width).unbind(2)
    sink = _meta(heads, dtype=torch.float32) if with_sink else None
    if backward:
        kernels.backward(_meta(*q.shape), None, None, q, k, v, boxes, Normaliser(), sink)
    else:
        kernels.forward(q, k, v, boxes, Normaliser(), sink)


def _dry_reuse(boxes: Boxes, heads: int, width: int) -> None:
    from stgen.ops.short_attention import triton as kernels

    v = _meta(1, math.prod(boxes.grid), 3, heads, width)[:, :, 2]
    kernels.apply_forward(_meta(boxes.count, heads, boxes.places, boxes.places), v, boxes)


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


TEMPORAL_GRIDS = {16: (16, 64, 64), 32: (32, 64, 32), 64: (64, 32, 32), 128: (128, 32, 16)}  # 65536 tokens each


def temporal_cases() -> Iterator[Case]:
    forward = {16: (0.8, 4.0), 32: (0.8, 2.5), 64: (0.8, 1.5), 128: (None, 1.0)}
    for n, grid in TEMPORAL_GRIDS.items():
        boxes = Boxes(grid, (n, 1, 1))
        share, ratio = forward[n]
        goals = [Goal("SDPA with copies", ratio), *([Goal(COPY, share)] if share else [])]
        goals += [Goal("SDPA", 2.0)] if n == 16 else []
        yield short_case("temporal", boxes, 16, 64, False, goals)
        goals = [Goal(COPY, 0.75), *([Goal("SDPA with copies", 5.0)] if n == 16 else [])] if n < 128 else []
        yield short_case("temporal", boxes, 16, 64, True, goals)
    for n in (16, 64):
        for width in (72, 128):
            for backward in (False, True):
                boxes = Boxes(TEMPORAL_GRIDS[n], (n, 1, 1))
                yield short_case("temporal", boxes, 16, width, backward, backends=("flash", "cudnn", "efficient"))


def box_cases() -> Iterator[Case]:
    backends = ("flash", "cudnn", "efficient")
    for backward in (False, True):
        yield short_case("width", Boxes((16, 64, 64), (1, 1, 64)), 16, 64, backward, backends=backends)
        yield short_case("window", Boxes((16, 64, 64), (1, 8, 8)), 16, 64, backward, backends=backends)
        shifted = Boxes((16, 64, 64), (4, 4, 4), (2, 2, 2))
        yield short_case("window", shifted, 16, 64, backward, backends=("cudnn", "efficient"))


def sink_cases(grid: Extent = TEMPORAL_GRIDS[16]) -> Iterator[Case]:
    """What a logit sink and reusing a map cost, beside the attention without."""
    boxes, heads, width = Boxes(grid, (16, 1, 1)), 16, 64
    tokens = math.prod(boxes.grid)

    def attention(with_sink: bool) -> Prepare:
        def prepare(on: On, seed: int) -> tuple[list[Tensor], Run]:
            q, k, v = packed(on, seed, tokens, heads, width)
            sink = on.randn(seed, heads).float() if with_sink else None
            leaves = [q, k, v] if sink is None else [q, k, v, sink]
            return leaves, lambda: short_attention(q, k, v, boxes, sink=sink, impl="triton")

        return prepare

    def reused(on: On, seed: int) -> tuple[list[Tensor], Run]:
        v = packed(on, seed, tokens, heads, width)[2]
        weights = on.randn(seed, boxes.count, heads, 16, 16).softmax(-1)
        return [weights, v], lambda: apply_map(weights, v, boxes, impl="triton")

    for backward, most in ((False, 1.01), (True, 1.02)):
        yield Case(
            "sink",
            f"temporal 16 with a logit sink, {heads}x{width}, {_direction(backward)}",
            [
                Contender(OURS, OURS, attention(True), backward),
                Contender("ours without", "without sink", attention(False), backward, comparable=False),
            ],
            _short_work(tokens, boxes.count, heads, 16, width, backward),
            (Goal("without sink", 1 / most),),
            functools.partial(_dry_short, boxes, heads, width, backward, with_sink=True),
            {"": _short_work(tokens, boxes.count, heads, 16, width, backward)},
        )
    yield Case(
        "reuse",
        f"temporal 16, a map used again, {heads}x{width}, forward",
        [
            Contender(OURS, OURS, reused),
            Contender("ours", "whole attention", attention(False), comparable=False),
        ],
        Work(bytes=2 * heads * (boxes.count * 256 + 2 * tokens * width)),
        (Goal("whole attention", 1 / 0.65),),
        functools.partial(_dry_reuse, boxes, heads, width),
    )


# ----------------------------------------------------------------------------------------------- spatial, with norms


def _qkv(on: On, seed: int, tokens: int, heads: int, width: int) -> list[Tensor]:
    """qkv [1, N, 3, heads, D], two gains and the tables of RoPE."""
    angles = torch.arange(tokens, device=on.device)[:, None] * 100.0 ** -torch.linspace(
        0, 1, width // 2, device=on.device
    )
    gains = [1 + on.randn(seed + i, width).float() / 8 for i in (1, 2)]
    return [on.randn(seed, 1, tokens, 3, heads, width), *gains, angles.cos(), angles.sin()]


def spatial_case(side: int, frames: int, heads: int, width: int, backward: bool, goal: float | None) -> Case:
    """Norm, RoPE and attention within frames: ours, with whichever attention is the best in this layout, against SDPA."""
    boxes, tokens = Boxes((frames, side, side), (1, side, side)), frames * side * side

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return unfold(scaled_dot_product_attention(fold(q, boxes), fold(k, boxes), fold(v, boxes)), boxes)

    def ours(on: On, seed: int) -> tuple[list[Tensor], Run]:
        qkv, gain_q, gain_k, cos, sin = _qkv(on, seed, tokens, heads, width)

        def run() -> Any:
            q, k, v = norm_rope(qkv, gain_q, gain_k, (cos, sin), impl="triton")[:3]
            if unfit_short(q, boxes) is None:
                return short_attention(q, k, v, boxes, impl="triton")
            with sdpa_kernel([BACKENDS["cudnn"], BACKENDS["flash"], BACKENDS["math"]], set_priority=True):
                return attend(q, k, v)

        return [qkv, gain_q, gain_k], run

    def pipeline(backend: str) -> Prepare:
        compiled = _compiled(norm_rope)

        def prepare(on: On, seed: int) -> tuple[list[Tensor], Run]:
            qkv, gain_q, gain_k, cos, sin = _qkv(on, seed, tokens, heads, width)

            def run() -> Tensor:
                q, k, v = compiled(qkv, gain_q, gain_k, (cos, sin), impl="reference")
                with sdpa_kernel(BACKENDS[backend]):
                    return attend(q, k, v)

            return [qkv, gain_q, gain_k], run

        return prepare

    rivals = [Contender(f"compiled norm, {b}", "SDPA", pipeline(b), backward) for b in ("flash", "cudnn", "efficient")]
    return Case(
        "spatial",
        f"spatial {side * side} places with norm and RoPE, {heads}x{width}, {_direction(backward)}",
        [Contender(OURS, OURS, ours, backward), *rivals],
        _short_work(tokens, frames, heads, side * side, width, backward),
        () if goal is None else (Goal("SDPA", goal),),
    )


def spatial_cases() -> Iterator[Case]:
    for side, goal in ((16, 1.25), (24, 1.1), (32, 0.95)):
        frames = 65536 // side**2
        yield spatial_case(side, frames, 16, 64, False, goal)
        yield spatial_case(side, frames, 16, 64, True, None)
    yield spatial_case(16, 256, 16, 72, False, None)


@functools.cache
def _compiled(function: Callable) -> Callable:
    """Compiled on a GPU; elsewhere, in tests, as it is."""
    return torch.compile(function, dynamic=False) if torch.cuda.is_available() else function


# ---------------------------------------------------------------------------------------------------- by block lists

BLOCK = 64


@functools.cache
def random_blocks(tokens: int, heads: int, density: float) -> Tensor:
    """As many random key blocks for each query block of each head: [1, heads, blocks, blocks] bool."""
    blocks = tokens // BLOCK
    scores = torch.rand(1, heads, blocks, blocks, generator=torch.Generator().manual_seed(0))
    chosen = scores.topk(max(1, round(density * blocks)), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)


def block_mask(kept: Tensor) -> BlockMask:
    """The same for flex_attention: all blocks whole."""
    order = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True).int()
    none, tokens = torch.zeros_like(kept.sum(-1), dtype=torch.int32), kept.shape[-1] * BLOCK
    return BlockMask.from_kv_blocks(
        none,
        torch.zeros_like(order),
        kept.sum(-1).int(),
        order,
        BLOCK_SIZE=(BLOCK, BLOCK),
        seq_lengths=(tokens, tokens),
    )


FLEX_TILES = {name: BLOCK for name in ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")}


def _transposed(on: On, seed: int, tokens: int, heads: int, width: int) -> list[Tensor]:
    """q, k, v [1, heads, N, D] as views of token-major tensors."""
    return [on.randn(seed + i, 1, tokens, heads, width).transpose(1, 2) for i in range(3)]


def sparse(tokens: int, heads: int, width: int, density: float, sink: bool = False, **options: Any) -> Prepare:
    def prepare(on: On, seed: int) -> tuple[list[Tensor], Run]:
        q, k, v = _transposed(on, seed, tokens, heads, width)
        kept = random_blocks(tokens, heads, density).to(on.device)
        support = Support.from_blocks(kept, tokens, tokens, (BLOCK, BLOCK))
        logit = on.randn(seed, heads).float() if sink else None
        leaves = [q, k, v] if logit is None else [q, k, v, logit]
        return leaves, lambda: block_sparse_attention(q, k, v, support, sink=logit, impl="triton", **options)

    return prepare


def dense(tokens: int, heads: int, width: int, backend: str) -> Prepare:
    def prepare(on: On, seed: int) -> tuple[list[Tensor], Run]:
        q, k, v = _transposed(on, seed, tokens, heads, width)

        def run() -> Tensor:
            with sdpa_kernel(BACKENDS[backend]):
                return scaled_dot_product_attention(q, k, v)

        return [q, k, v], run

    return prepare


def flex(tokens: int, heads: int, width: int, density: float, **options: Any) -> Prepare:
    compiled = _compiled(flex_attention)

    def prepare(on: On, seed: int) -> tuple[list[Tensor], Run]:
        q, k, v = _transposed(on, seed, tokens, heads, width)
        mask = block_mask(random_blocks(tokens, heads, density).to(on.device))
        return [q, k, v], lambda: compiled(q, k, v, block_mask=mask, kernel_options={**FLEX_TILES, **options})

    return prepare


TOKENS, HEADS, WIDTH = 637 * BLOCK, 16, 128  # the shape of Video Sparse Attention (arXiv:2505.13389): 40768 tokens


def sparse_cases() -> Iterator[Case]:
    shape = (TOKENS, HEADS, WIDTH)
    denses = {b: Contender(b, "dense SDPA", dense(*shape, b), comparable=False) for b in ("cudnn", "flash")}
    back = {b: replace(contender, backward=True) for b, contender in denses.items()}
    products, whole = {0.1: 500}, {0.1: 6.0, 0.2: 3.0}
    for density in (0.1, 0.05, 0.2):
        ours = Contender(OURS, OURS, sparse(*shape, density))
        flexes = [
            Contender("flex", "flex", flex(*shape, density)),
            Contender("flex, TMA", "flex", flex(*shape, density, USE_TMA=True)),
        ]
        goals = [Goal(PRODUCTS, products[density]), Goal("flex", 1.3)] if density in products else []
        yield sparse_case(density, "forward", [ours, *flexes], goals)
        goals = [Goal("dense SDPA", whole[density])] if density in whole else []
        yield selected_case(density, list(denses.values()), goals)
        goals = [Goal(PRODUCTS, 260), Goal("dense SDPA", 4.0)] if density == 0.1 else []
        rivals = [replace(flexes[0], backward=True), *(back.values() if density == 0.1 else [])]
        yield sparse_backward_case(density, rivals, goals, fast=False)
        goals = [Goal(PRODUCTS, 400), Goal("dense SDPA", 6.0)] if density == 0.1 else []
        yield sparse_backward_case(density, [back["cudnn"]] if density == 0.1 else [], goals, fast=True)
    with_sink = Contender(OURS, OURS, sparse(*shape, 0.1, sink=True))
    without = Contender("ours without", "without sink", sparse(*shape, 0.1), comparable=False)
    yield sparse_case(0.1, "forward with a logit sink", [with_sink, without], [Goal("without sink", 1 / 1.01)])


def sparse_backward_case(density: float, rivals: list[Contender], goals: Sequence[Goal], fast: bool) -> Case:
    ours = Contender(
        OURS, OURS, sparse(TOKENS, HEADS, WIDTH, density, backward="fast" if fast else "deterministic"), backward=True
    )
    what = f"backward, {'fast' if fast else 'deterministic'}"
    return sparse_case(density, what, [ours, *rivals], goals, backward=True, fast=fast)


def sparse_case(
    density: float,
    what: str,
    contenders: list[Contender],
    goals: Sequence[Goal] = (),
    backward: bool = False,
    fast: bool = False,
) -> Case:
    kept = max(1, round(density * TOKENS / BLOCK)) * BLOCK  # keys of each query
    scores, size = HEADS * TOKENS * kept, HEADS * TOKENS * WIDTH * 2  # bytes of a tensor
    flops = 2 * scores * WIDTH  # of one product
    executed = {"_forward": Work(2 * flops, 4 * size, scores, 6 * scores), "_rows": Work(bytes=2 * size)}
    if fast:  # five products, and dQ added up in float32 in the level-2 cache
        executed["_keys"] = Work(5 * flops, 8 * size, scores, 12 * scores)
    else:
        executed["_queries"] = Work(3 * flops, 5 * size, scores, 10 * scores)
        executed["_keys"] = Work(4 * flops, 6 * size, scores, 12 * scores)
    return Case(
        "sparse",
        f"block-sparse {TOKENS} tokens, {HEADS}x{WIDTH}, {density:.0%} of blocks kept, {what}",
        contenders,
        Work(flops=(5 if backward else 2) * flops, bytes=(8 if backward else 4) * size),
        tuple(goals),
        functools.partial(_dry_sparse, density, backward, fast, "sink" in what),
        executed,
    )


def _dry_sparse(density: float, backward: bool, fast: bool, with_sink: bool) -> None:
    from stgen.ops.block_sparse_attention import triton as kernels
    from stgen.ops.normaliser import Normaliser

    support = Support.from_blocks(random_blocks(TOKENS, HEADS, density), TOKENS, TOKENS, (BLOCK, BLOCK))
    lists = BlockLists.from_tensors([x.to("meta") for x in BlockLists.of(support).tensors()], support.block)
    q, k, v = (_meta(1, TOKENS, HEADS, WIDTH).transpose(1, 2) for _ in range(3))
    sink = _meta(HEADS, dtype=torch.float32) if with_sink else None
    if backward:
        rows = _meta(1, HEADS, TOKENS, dtype=torch.float32)
        kernels.backward(q, None, q, k, v, q, rows, rows, lists, Normaliser(), fast=fast, descriptors=True)
    else:
        kernels.forward(q, k, v, lists, Normaliser(), sink, descriptors=True)


def selected_case(density: float, denses: list[Contender], goals: Sequence[Goal]) -> Case:
    """Choosing the blocks by pooled scores and attending them, against dense attention; and choosing alone."""

    def chosen(on: On, seed: int) -> tuple[list[Tensor], Run]:
        q, k, v = _transposed(on, seed, TOKENS, HEADS, WIDTH)
        return [q, k, v], lambda: block_sparse_attention(q, k, v, select(q, k, density), impl="triton")

    return Case(
        "sparse",
        f"block-sparse {TOKENS} tokens, {HEADS}x{WIDTH}, {density:.0%} of blocks kept, forward with selection",
        [Contender(OURS, OURS, chosen, captured=False), *denses],
        Work(flops=4 * density * HEADS * TOKENS**2 * WIDTH),
        tuple(goals),
    )


def select(q: Tensor, k: Tensor, density: float) -> Support:
    every = Support.full(q.shape[2], k.shape[2], (BLOCK, BLOCK), q.device)
    support = top_blocks(q, k, every, density)
    BlockLists.of(support)
    return support


def selection_cases() -> Iterator[Case]:
    """Scores of pooled blocks, the best of them, and their lists, beside the attention that they serve."""

    def ours(on: On, seed: int) -> tuple[list[Tensor], Run]:
        q, k, _ = _transposed(on, seed, TOKENS, HEADS, WIDTH)
        return [q, k], lambda: select(q, k, 0.1)

    yield Case(
        "selection",
        f"selection of 10% of blocks, {TOKENS} tokens, {HEADS}x{WIDTH}",
        [
            Contender(OURS, OURS, ours, captured=False),
            Contender("ours", "attention itself", sparse(TOKENS, HEADS, WIDTH, 0.1), comparable=False),
        ],
        Work(bytes=2 * HEADS * TOKENS * WIDTH * 2),
        (Goal("attention itself", 25),),
    )


# ------------------------------------------------------------------------------------------------ sums, norms, a block


def linear_cases(tokens: int = 40960, heads: int = 16, width: int = 64) -> Iterator[Case]:
    """Over all keys, and over those of frames up to the own one."""

    def attention(impl: Any, chunk: int | None, compiled: bool = False) -> Prepare:
        op = _compiled(linear_attention) if compiled else linear_attention

        def prepare(on: On, seed: int) -> tuple[list[Tensor], Run]:
            q, k, v = _transposed(on, seed, tokens, heads, width)
            q, k = q.relu().detach(), k.relu().detach()
            return [q, k, v], lambda: op(q, k, v, chunk=chunk, impl=impl)

        return prepare

    for chunk in (None, tokens // 16):
        for backward in (False, True):
            contenders = [
                Contender(OURS, OURS, attention("triton", chunk), backward),
                Contender("running sums", "PyTorch", attention("state", chunk), backward),
            ]
            if chunk is None:
                contenders += [Contender("running sums", "compiled", attention("state", chunk, True), backward)]
            what = f"{'over all' if chunk is None else 'causal by frame'}, {_direction(backward)}"
            size, products = tokens * heads * width * 2, 2 * tokens * heads * width**2
            yield Case(
                "linear",
                f"linear attention {tokens} tokens, {heads}x{width}, {what}",
                contenders,
                Work((5 if backward else 2) * products, (9 if backward else 4) * size),
                dry=functools.partial(_dry_linear, tokens, heads, width, chunk, backward),
                executed=_linear_work(size, products, backward),
            )


NOT_COUNTED = Work()  # a few programs that wait for memory, of which the cost model knows nothing


def _linear_work(size: int, products: int, backward: bool) -> dict[str, Work]:
    """By kernel. A product with a float32 state is made of three in TF32, each of which takes twice as long."""
    slow = 6 * products
    if not backward:
        return {"_sum": Work(products, 2 * size), "_scan": NOT_COUNTED, "_read": Work(slow, 2 * size)}
    return {
        "_read_backward": Work(2 * slow, 3 * size),
        "_sum": Work(slow, 2 * size),
        "_scan": NOT_COUNTED,
        "_keys": Work(2 * slow, 4 * size),
    }


def _dry_linear(tokens: int, heads: int, width: int, chunk: int | None, backward: bool) -> None:
    from stgen.ops.linear_attention import triton as kernels
    from stgen.ops.linear_attention.cut import Cut

    cut = Cut.of(tokens, tokens, chunk, 0)
    q, k, v = (_meta(1, tokens, heads, width).transpose(1, 2) for _ in range(3))
    if backward:
        state = _meta(1, heads, cut.ranges, width, width, dtype=torch.float32)
        kernels.backward(q, q, k, v, None, (state, state[..., 0]), cut)
    else:
        kernels.forward(q, k, v, None, cut)


def norm_cases(tokens: int = 65536) -> Iterator[Case]:
    """norm_rope and modulated_norm, which read and write each tensor once."""
    heads, width, channels = 16, 64, 1152

    def norms(impl: Any, compiled: bool = False) -> Prepare:
        op = _compiled(norm_rope) if compiled else norm_rope

        def prepare(on: On, seed: int) -> tuple[list[Tensor], Run]:
            qkv, gain_q, gain_k, cos, sin = _qkv(on, seed, tokens, heads, width)
            return [qkv, gain_q, gain_k], lambda: op(qkv, gain_q, gain_k, (cos, sin), impl=impl)

        return prepare

    def modulated(impl: Any, compiled: bool = False) -> Prepare:
        op = _compiled(modulated_norm) if compiled else modulated_norm

        def prepare(on: On, seed: int) -> tuple[list[Tensor], Run]:
            x, shift, scale = (on.randn(seed + i, 4, n, channels) for i, n in enumerate((tokens // 4, 1, 1)))
            return [x, shift, scale], lambda: op(x, shift, scale, impl=impl)

        return prepare

    def dry_norms(backward: bool) -> None:
        from stgen.ops.norm_rope import triton as kernels

        qkv, gain = _meta(1, tokens, 3, heads, width), _meta(width, dtype=torch.float32)
        table = _meta(tokens, width // 2, dtype=torch.float32)
        if backward:
            d = _meta(1, tokens, heads, width)
            kernels.backward(d, d, d, None, None, qkv, gain, gain, table, table, 1e-6, None)
        else:
            kernels.forward(qkv, gain, gain, table, table, 1e-6, None)

    def dry_modulated(backward: bool) -> None:
        from stgen.ops.modulated_norm import triton as kernels

        x, row = _meta(4, tokens // 4, channels), _meta(4, 1, channels)
        kernels.backward(x, x, row, 1e-6) if backward else kernels.forward(x, row, row, 1e-6)

    passes = {"norm_rope": (6, 8), "modulated_norm": (2, 3)}  # over a tensor, forward and backward
    sizes = {"norm_rope": tokens * heads * width * 2, "modulated_norm": tokens * channels * 2}
    shapes = {
        "norm_rope": f"{tokens} tokens, {heads}x{width}",
        "modulated_norm": f"{tokens} tokens, {channels} channels",
    }
    for name, contend, dry in (("norm_rope", norms, dry_norms), ("modulated_norm", modulated, dry_modulated)):
        for backward in (False, True):
            yield Case(
                "norm",
                f"{name} {shapes[name]}, {_direction(backward)}",
                [
                    Contender(OURS, OURS, contend("triton"), backward),
                    Contender("eager", "PyTorch", contend("reference"), backward),
                    Contender("compiled", "compiled", contend("reference", True), backward),
                ],
                Work(bytes=passes[name][backward] * sizes[name]),
                (),
                lambda dry=dry, backward=backward: dry(backward),
            )


def copies_of_a_block() -> dict[str, Any]:
    """Kernels that copy, in a spatial and a temporal attention layer, forward and backward. The goal is none."""
    from torch.profiler import ProfilerActivity, profile

    from stgen.attention import plan, reuse
    from stgen.attention.attend import Attention
    from stgen.attention.spec import AttentionMixer
    from stgen.tokens import Grid, rope_tables

    on, grid, width, heads = On(torch.device("cuda"), torch.bfloat16), Grid(16, 16, 16), 1024, 16
    mixers = {name: AttentionMixer.model_validate({"layout": name}) for name in ("spatial", "temporal")}
    uses = reuse.place(plan.parse("spatial temporal", 2), mixers, heads)
    layers = [Attention(width, heads, layer[0][0], grid).to(on.device, on.dtype) for layer in uses]
    x = on.randn(0, 2, grid.tokens, width).requires_grad_()
    rope = rope_tables(grid, width // heads, on.device)

    def step() -> None:
        out = x
        for layer in layers:
            out = layer(out, grid, rope, {})[0]
        out.backward(torch.ones_like(out))

    step()
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        step()
        torch.cuda.synchronize()
    names = sorted({event.key for event in prof.key_averages()})
    copies = [name for name in names if any(word in name.lower() for word in ("copy", "memcpy", "catarray"))]
    return {"kernels": names, "copies": copies, "goals": [{"goal": "no copy kernels", "met": not copies}]}


FAMILIES: dict[str, Callable[[], Iterator[Case]]] = {
    "temporal": temporal_cases,
    "boxes": box_cases,
    "sparse": sparse_cases,
    "selection": selection_cases,
    "spatial": spatial_cases,
    "sink": sink_cases,
    "linear": linear_cases,
    "norm": norm_cases,
}
QUICK = (
    "temporal 16 *16x64*",
    "*10% of blocks kept, forward",
    "*10% of blocks kept, backward, *",
    "norm_rope*",
    "linear*over all*",
)


def cases(wanted: Sequence[str], quick: bool) -> Iterator[Case]:
    """Those of the families, or whose names contain or match one of the words."""
    for family, make in FAMILIES.items():
        for case in make():
            named = not wanted or any(w == family or fnmatch.fnmatch(case.name, f"*{w}*") for w in wanted)
            if named and (not quick or any(fnmatch.fnmatch(case.name, pattern) for pattern in QUICK)):
                yield case


# ------------------------------------------------------------------------------------------------------------- timing


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a call: median, and the tenth and ninetieth percentile."""

    median: float
    low: float
    high: float
    captured: bool


LONG_MS = 1.0  # a sample is one such call, and not one on each set of inputs


def time_calls(calls: Sequence[Run], samples: int, captured: bool) -> Timing:
    """Replays of graphs that hold the calls; or, where a graph cannot hold them, the calls themselves."""
    groups = [[call] for call in calls] if _elapsed(calls[0]) > LONG_MS else [list(calls)]
    runs = [_graph(group).replay if captured else functools.partial(_each, group) for group in groups]
    for i in range(WARM_UPS):
        runs[i % len(runs)]()
    spent = [_elapsed(runs[i % len(runs)]) / len(groups[0]) for i in range(samples)]
    cuts = statistics.quantiles(spent, n=10)
    return Timing(statistics.median(spent), cuts[0], cuts[-1], captured)


def _graph(calls: Sequence[Run]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    # The backward's thread allocates while this one captures.
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        _each(calls)
    return graph


def _each(calls: Sequence[Run]) -> None:
    for call in calls:
        call()


def _elapsed(run: Run) -> float:
    """Milliseconds on the GPU."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def measured(contender: Contender, case: Case, on: On, samples: int) -> tuple[Timing, list[Tensor]]:
    """The time of a contender, and its results on the first set of inputs."""
    cache = torch.cuda.get_device_properties(on.device).L2_cache_size
    sets = min(MOST_SETS, max(SETS, math.ceil(4 * cache / max(case.useful.bytes, 1))))
    stream = torch.cuda.Stream()  # the backward runs on the stream of its forward, and no graph holds the default one
    with torch.cuda.stream(stream):
        calls = [contender.make(on, seed) for seed in range(sets)]
        results = [x.detach().clone() for x in _tensors(calls[0]())]  # compiles
        _each(calls)
        stream.synchronize()
        timing = time_calls(calls, samples, contender.captured)
    return timing, results


def distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The largest relative rms distance of results."""
    return max(float((x.float() - y.float()).norm() / y.float().norm()) for x, y in zip(a, b, strict=True))


def measure(case: Case, on: On, samples: int, ceilings: dict[str, float]) -> dict[str, Any]:
    """All contenders of a case; what one cannot do it says, and the others go on."""
    rows, reference = [], None
    for contender in case.contenders:
        row: dict[str, Any] = {"name": contender.name, "group": contender.group}
        rows.append(row)
        if contender.name.startswith("math") and case.useful.exponentials > MOST_SCORES:
            row["failure"] = "its scores do not fit into memory"
            continue
        try:
            timing, results = measured(contender, case, on, samples)
        except Exception as error:  # whatever a compiler, a driver or a backend may raise
            row["failure"] = _first(error)
        else:
            row |= {"ms": timing.median, "low_ms": timing.low, "high_ms": timing.high, "graph": timing.captured}
            if contender.group == OURS:
                reference = results
            elif contender.comparable and reference is not None:
                row["distance"] = distance(reference, results)
            del results
        gc.collect()
        torch.cuda.empty_cache()
    return {"family": case.family, "case": case.name, "contenders": rows, **judged(case, rows, ceilings)}


def judged(case: Case, rows: list[dict[str, Any]], ceilings: dict[str, float]) -> dict[str, Any]:
    """Our share of the ceilings, how many times as long the best of each group takes, and which goals are met."""
    ours = next(row for row in rows if row["group"] == OURS)
    if "ms" not in ours:
        return {"failure": ours["failure"], "goals": [{"goal": str(goal), "met": False} for goal in case.goals]}
    seconds = ours["ms"] / 1e3
    rivals = sorted((row for row in rows if "ms" in row and row["group"] != OURS), key=lambda row: -row["ms"])
    best = {row["group"]: row for row in rivals}  # the fastest comes last
    reached = {group: row["ms"] / ours["ms"] for group, row in best.items()}
    reached |= {
        COPY: case.useful.bytes / seconds / ceilings["copy_bytes"],
        PRODUCTS: case.useful.flops / seconds / 1e12,
    }
    goals = [
        {"goal": str(goal), "reached": reached.get(goal.of), "met": reached.get(goal.of, 0.0) >= goal.at_least}
        for goal in case.goals
    ]
    return {
        "ms": ours["ms"],
        "share_of_copy": reached[COPY],
        "tflops": reached[PRODUCTS],
        "best": {group: {"name": row["name"], "ms": row["ms"], "times": reached[group]} for group, row in best.items()},
        "distance": max((row["distance"] for row in rows if "distance" in row), default=None),
        "goals": goals,
    }


def measure_ceilings(on: On, samples: int) -> dict[str, float]:
    """Bytes a second of a copy of 1 GiB, read and written; products a second of 8192 x 8192 matrices."""
    source, target = (torch.empty(1 << 29, dtype=torch.bfloat16, device=on.device) for _ in range(2))
    a, b, out = (on.randn(i, 8192, 8192) for i in range(3))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        copy, product = (lambda: target.copy_(source)), (lambda: torch.mm(a, b, out=out))
        _each([copy, product])
        stream.synchronize()
        seconds = [time_calls([call], samples, True).median / 1e3 for call in (copy, product)]
    return {"copy_bytes": 2 * source.nbytes / seconds[0], "gemm_flops": 2 * 8192**3 / seconds[1]}


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


# --------------------------------------------------------------------------------------------------------- prediction

TARGET = "sm_90"


def predicted(case: Case) -> dict[str, Any]:
    """Bounds of the cost model for our launches, compiled ahead of time for the H200; nothing is measured."""
    from stgen.testing.compiled import Report, dry_launch

    if case.dry is None:
        return {"failure": "made of several operations"}
    try:
        reports: list[Report]
        with dry_launch(TARGET) as reports:
            case.dry()
        parts = [_predicted_launch(case, report) for report in reports]
    except Exception as error:  # one launch that does not compile should not hide the others
        return {"failure": _first(error)}
    low, high = sum(p.optimistic for p in parts), sum(p.pessimistic for p in parts)
    kernels = [
        {"kernel": r.name, "registers": r.registers, "spill_bytes": r.spill_bytes, "shared_bytes": r.shared_bytes,
         "blocks": p.blocks, "waves": p.waves, "bound": p.bound if p.pessimistic else "not counted",
         "ms": [1e3 * p.optimistic, 1e3 * p.pessimistic]}
        for r, p in zip(reports, parts, strict=True)
    ]  # fmt: skip
    rates = {COPY: case.useful.bytes / H200.bandwidth, PRODUCTS: case.useful.flops / 1e12}
    goals = []
    for goal in case.goals:
        if goal.of not in rates:
            goals.append({"goal": str(goal), "met": "needs a measurement"})
            continue
        worst, best = rates[goal.of] / high, rates[goal.of] / low
        met = "predicted" if worst >= goal.at_least else "possible" if best >= goal.at_least else "out of reach"
        goals.append({"goal": str(goal), "reached": [worst, best], "met": met})
    return {
        "ms": [1e3 * low, 1e3 * high],
        "share_of_copy": [rates[COPY] / high, rates[COPY] / low],
        "tflops": [rates[PRODUCTS] / high, rates[PRODUCTS] / low],
        "kernels": kernels,
        "goals": goals,
    }


def _predicted_launch(case: Case, report: Any) -> Prediction:
    work = next((work for part, work in case.executed.items() if part in report.name), case.useful)
    return predict(work, report.grid, report.registers, report.shared_bytes, report.num_warps)


# ---------------------------------------------------------------------------------------------------------- reporting


def machine() -> dict[str, Any]:
    about: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": metadata.version("triton"),
    }
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        about |= {
            "device": device.name,
            "capability": f"{device.major}.{device.minor}",
            "memory_gib": round(device.total_memory / 2**30, 1),
            "multiprocessors": device.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return about


def line(result: dict[str, Any]) -> str:
    """A row of the table of measurements."""
    if "failure" in result:
        return f"| {result['case']} | failed: {result['failure']} | | | | |"
    best = "; ".join(f"{x['times']:.2f}x {group} ({x['name']}, {x['ms']:.3g})" for group, x in result["best"].items())
    failed = [f"{row['name']} ({row['group']}): {row['failure']}" for row in result["contenders"] if "failure" in row]
    unlike = "" if (d := result["distance"]) is None else f"{d:.1g}" + (" NOT ALIKE" if not d <= ALIKE else "")
    cells = [f"{result['ms']:.4g}", *_rates(result["share_of_copy"], result["tflops"]), best, unlike]
    goals = "; ".join(f"{goal['goal']}: {'yes' if goal['met'] else 'NO'}" for goal in result["goals"])
    row = f"| {result['case']} | {' | '.join(cells)} | {goals} |"
    return "\n".join([row, *(f"<!-- {text} -->" for text in failed)])


def _rates(share: float, tflops: float) -> tuple[str, str]:
    return f"{share:.0%}", f"{tflops:.0f}" if tflops else "-"


def predicted_line(name: str, result: dict[str, Any]) -> str:
    if "failure" in result:
        return f"| {name} | no prediction: {result['failure']} | | | | |"

    def span(bounds: Sequence[float], form: str) -> str:
        return f"{bounds[0]:{form}}–{bounds[1]:{form}}"

    kernels = "; ".join(
        f"{k['kernel']}: {k['registers']} registers, {k['shared_bytes'] / 1024:.0f} KiB, {k['blocks']} blocks, {k['bound']}"
        + (f", SPILLS {k['spill_bytes']} B" if k["spill_bytes"] else "")
        for k in result["kernels"]
    )
    goals = "; ".join(f"{goal['goal']}: {goal['met']}" for goal in result["goals"])
    cells = [span(result[key], form) for key, form in (("ms", ".3g"), ("share_of_copy", ".0%"))]
    cells += [span(result["tflops"], ".0f") if result["tflops"][1] else "-"]
    return f"| {name} | {' | '.join(cells)} | {kernels} | {goals} |"


HEADER = "| case | ms | of copy | TFLOP/s | best of each group, times as long (ms) | distance | goals |\n|" + "---|" * 7
PREDICTED_HEADER = "| case | ms | of copy | TFLOP/s | kernels | goals |\n|" + "---|" * 6


def run_predictions(chosen: Iterator[Case]) -> dict[str, Any]:
    print(f"PREDICTED, NOT MEASURED: the cost model's bounds for an {H200.name}, kernels compiled for {TARGET}.")
    print("Low: everything overlaps; high: nothing does. Rivals are not predicted.\n")
    print(PREDICTED_HEADER)
    results = []
    for case in chosen:
        results.append({"family": case.family, "case": case.name, **predicted(case)})
        print(predicted_line(case.name, results[-1]), flush=True)
    return {"predicted": True, "measured": False, "machine": machine(), "gpu": H200.name, "results": results}


def run_measurements(chosen: Iterator[Case], args: argparse.Namespace) -> dict[str, Any]:
    start, samples = time.monotonic(), 10 if args.quick else SAMPLES
    about, on = machine(), On(torch.device("cuda"), torch.bfloat16)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    ceilings = measure_ceilings(on, samples)
    print(f"copy {ceilings['copy_bytes'] / 1e12:.2f} TB/s, bf16 products {ceilings['gemm_flops'] / 1e12:.0f} TFLOP/s\n")
    print(HEADER)
    results = []
    for case in chosen:
        if time.monotonic() - start > 60 * args.minutes:
            results.append({"family": case.family, "case": case.name, "failure": "out of time", "goals": []})
        else:
            results.append(measure(case, on, samples, ceilings))
        print(line(results[-1]), flush=True)
    block = None
    if not args.cases or "block" in args.cases:
        try:
            block = copies_of_a_block()
            print(
                f"\ncopies in a spatial and a temporal layer, forward and backward: {', '.join(block['copies']) or 'none'}"
            )
        except Exception as error:
            block = {"failure": _first(error)}
            print(f"\ncopies in a spatial and a temporal layer: {block['failure']}")
    goals = [goal for result in results for goal in result["goals"]]
    print(f"\n{sum(goal['met'] for goal in goals)} of {len(goals)} goals met, {time.monotonic() - start:.0f} s")
    return {
        "predicted": False,
        "measured": True,
        "machine": about,
        "ceilings": ceilings,
        "results": results,
        "block": block,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--cases",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"families ({', '.join(FAMILIES)}, block) or parts of names",
    )
    add("--quick", action="store_true", help="one case of most families, ten samples")
    add("--predict", action="store_true", help="no GPU: compile ahead of time and print the cost model's bounds")
    add("--minutes", type=float, default=7.5, help="cases that would begin later are left out; default: 7.5")
    add("--json", type=Path, metavar="FILE", help="write all numbers, device and versions to FILE")
    args = parser.parse_args()
    if not args.predict and not torch.cuda.is_available():
        sys.exit(
            "there is no CUDA device to measure on; run this on a GPU, or say --predict for the cost model's bounds"
        )
    chosen = cases(args.cases, args.quick)
    result = run_predictions(chosen) if args.predict else run_measurements(chosen, args)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {args.json}")


if __name__ == "__main__":
    main()
