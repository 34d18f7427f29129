"""Kernels of modulated_norm: a program takes a run of rows of one batch entry, a tile [ROWS, C] at a time.

Everything between a load and a store is float32. With n = (x - mean) r, r = 1 / sqrt(variance + eps), and incoming
gradient g:
    dx = r (h - mean(h) - n mean(h n)),  h = g (1 + scale),    dshift = sum of g,    dscale = sum of g n.
Where shift and scale are one row for all tokens, they are loaded once for a run, and the sums over a run are written as
float32 partials [B, runs, C], which PyTorch adds up. Where every token has its own, nothing is summed.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (kernels are annotated for the compiler and called with plain numbers)

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 1024  # of a tile at least; 8 for each thread, one 128-bit access for 16-bit types
PROGRAMS = 1024  # runs of all batch entries: about 8 for each multiprocessor of an H100, at once
SHORTEST = 4  # tiles of a run, so that partials stay small beside x


@dataclass(frozen=True)
class Tiles:
    """How the work is cut: rows of a tile, rows of a run (whole tiles), warps of a program."""

    rows: int
    run: int
    warps: int


def tiles_of(shape: torch.Size) -> Tiles:
    """The cut for x [B, N, C]: as many runs as run at once, of equal length."""
    batch, tokens, width = shape
    columns = triton.next_power_of_2(width)
    rows = max(1, ELEMENTS // columns)
    tiles = triton.cdiv(tokens, rows)
    runs = max(1, min(tiles // SHORTEST, PROGRAMS // batch))
    return Tiles(rows, triton.cdiv(tiles, runs) * rows, max(rows * columns // 256, 1))


def forward(x: Tensor, shift: Tensor, scale: Tensor, eps: float, tiles: Tiles | None = None) -> Tensor:
    """x [B, N, C], shift and scale [B or 1, N or 1, C], last strides of 1 -> [B, N, C], contiguous."""
    tiles = tiles or tiles_of(x.shape)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _forward[(len(x) * triton.cdiv(x.shape[1], tiles.run),)](
        *(x, shift, scale, out, _steps(x), _steps(shift), _steps(scale), x.shape[1], tiles.run, eps),
        **_constants(x, scale, tiles),
    )
    return out


def backward(
    g: Tensor, x: Tensor, scale: Tensor, eps: float, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, contiguous, and of shift and scale, which are alike, from g [B, N, C] with a last stride of 1."""
    tiles = tiles or tiles_of(x.shape)
    batch, tokens, width = x.shape
    runs = triton.cdiv(tokens, tiles.run)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if scale.shape[1] == 1:
        sums = [x.new_empty(batch, runs, width, dtype=torch.float32) for _ in range(2)]
    else:
        sums = [x.new_empty(x.shape, dtype=scale.dtype if len(scale) == batch else torch.float32) for _ in range(2)]
    _backward[(batch * runs,)](
        *(g, x, scale, dx, *sums, _steps(g), _steps(x), _steps(scale), tokens, tiles.run, eps),
        **_constants(x, scale, tiles),
    )
    dshift, dscale = (part.sum_to_size(scale.shape).to(scale.dtype) for part in sums)
    return dx, dshift, dscale


def _steps(x: Tensor) -> tuple[int, int]:
    """Strides of batch and token, 0 where there is one for all."""
    batch, token = (0 if size == 1 else stride for size, stride in zip(x.shape[:2], x.stride()[:2], strict=True))
    return batch, token


def _constants(x: Tensor, scale: Tensor, tiles: Tiles) -> dict[str, int | bool]:
    return {
        "C": x.shape[2],
        "COLUMNS": triton.next_power_of_2(x.shape[2]),
        "ROWS": tiles.rows,
        "PER_TOKEN": scale.shape[1] != 1,
        "num_warps": tiles.warps,
    }


@triton.jit
def _run(tokens, run):
    """The batch entry of this program, its first row and the one after its last."""
    runs = tl.cdiv(tokens, run)
    program = tl.program_id(0).to(tl.int64)
    first = program % runs * run
    return program // runs, first, tl.minimum(first + run, tokens)


@triton.jit
def _load(X, batch, row, last, steps, column, C: tl.constexpr):
    """Rows of a batch entry up to the last, [ROWS, COLUMNS]."""
    return tl.load(X + batch * steps[0] + row * steps[1] + column, mask=(row < last) & (column < C), other=0.0)


@triton.jit
def _load_one(X, batch, steps, column, C: tl.constexpr):
    """The one row that all tokens of a batch entry share, [1, COLUMNS]."""
    return tl.load(X + batch * steps[0] + column, mask=column < C, other=0.0).to(tl.float32)


@triton.jit
def _normed(x, eps, column, C: tl.constexpr):
    """Rows without their mean and over their deviation, n, and one over that, r [ROWS, 1]."""
    mean = tl.sum(x, axis=1)[:, None] / C
    centred = tl.where(column < C, x - mean, 0.0)
    r = tl.rsqrt(tl.sum(centred * centred, axis=1)[:, None] / C + eps)
    return centred * r, r


@triton.jit
def _forward(
    X, SHIFT, SCALE, OUT, x_steps, shift_steps, scale_steps, tokens, run, eps,
    C: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, PER_TOKEN: tl.constexpr,
):  # fmt: skip
    batch, first, last = _run(tokens, run)
    column = tl.arange(0, COLUMNS)[None, :]
    if not PER_TOKEN:
        shift = _load_one(SHIFT, batch, shift_steps, column, C)
        scale = _load_one(SCALE, batch, scale_steps, column, C)
    row = first + tl.arange(0, ROWS)[:, None]
    following = _load(X, batch, row, last, x_steps, column, C)
    for _ in range(first, last, ROWS):
        x = following.to(tl.float32)
        following = _load(X, batch, row + ROWS, last, x_steps, column, C)  # on its way while this tile is computed
        if PER_TOKEN:
            shift = _load(SHIFT, batch, row, last, shift_steps, column, C).to(tl.float32)
            scale = _load(SCALE, batch, row, last, scale_steps, column, C).to(tl.float32)
        out = _normed(x, eps, column, C)[0] * (1.0 + scale) + shift
        at = OUT + (batch * tokens + row) * C + column
        tl.store(at, out.to(OUT.dtype.element_ty), mask=(row < last) & (column < C))
        row += ROWS


@triton.jit
def _backward(
    G, X, SCALE, DX, DSHIFT, DSCALE, g_steps, x_steps, scale_steps, tokens, run, eps,
    C: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, PER_TOKEN: tl.constexpr,
):  # fmt: skip
    batch, first, last = _run(tokens, run)
    column = tl.arange(0, COLUMNS)[None, :]
    if not PER_TOKEN:
        scale = _load_one(SCALE, batch, scale_steps, column, C)
    sum_shift = tl.zeros([ROWS, COLUMNS], tl.float32)
    sum_scale = sum_shift
    row = first + tl.arange(0, ROWS)[:, None]
    following_g = _load(G, batch, row, last, g_steps, column, C)
    following_x = _load(X, batch, row, last, x_steps, column, C)
    for _ in range(first, last, ROWS):
        g, x = following_g.to(tl.float32), following_x.to(tl.float32)
        following_g = _load(G, batch, row + ROWS, last, g_steps, column, C)  # as in the forward
        following_x = _load(X, batch, row + ROWS, last, x_steps, column, C)
        if PER_TOKEN:
            scale = _load(SCALE, batch, row, last, scale_steps, column, C).to(tl.float32)
        n, r = _normed(x, eps, column, C)
        h = g * (1.0 + scale)
        mean = tl.sum(h, axis=1)[:, None] / C
        slope = tl.sum(h * n, axis=1)[:, None] / C
        at = (batch * tokens + row) * C + column
        mask = (row < last) & (column < C)
        tl.store(DX + at, (r * (h - mean - n * slope)).to(DX.dtype.element_ty), mask=mask)
        if PER_TOKEN:
            tl.store(DSHIFT + at, g.to(DSHIFT.dtype.element_ty), mask=mask)
            tl.store(DSCALE + at, (g * n).to(DSCALE.dtype.element_ty), mask=mask)
        else:
            sum_shift += g
            sum_scale += g * n
        row += ROWS
    if not PER_TOKEN:
        at = tl.program_id(0).to(tl.int64) * C + column
        tl.store(DSHIFT + at, tl.sum(sum_shift, axis=0)[None, :], mask=column < C)
        tl.store(DSCALE + at, tl.sum(sum_scale, axis=0)[None, :], mask=column < C)
