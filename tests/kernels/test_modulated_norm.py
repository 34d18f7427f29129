"""modulated_norm's kernels in the interpreter, against float64, and as operators of PyTorch."""

import inspect
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from stgen.ops.modulated_norm import modulated_norm, unfit
from stgen.ops.modulated_norm import triton as true_kernels
from stgen.ops.modulated_norm.library import modulated_norm_backward_op, modulated_norm_op
from stgen.testing.errors import assert_as_exact, poisoned
from stgen.testing.guard import far_apart, guard
from stgen.testing.mutants import Mutant, assert_killed

EPS = 1e-6


@dataclass(frozen=True)
class Case:
    batch: int = 2
    tokens: int = 21
    width: int = 100
    rows: str = "batch"  # with a shift and scale of its own; also one (for all), token, token of all
    part: bool = False  # x is a part of a wider tensor
    tokens_first: bool = False  # so lies the gradient
    size: float = 1.0  # of the deviation of x
    offset: float = 0.5  # of its mean
    float32: bool = False  # shift and scale
    tiles: tuple[int, int, int] | None = (4, 12, 1)
    dtype: torch.dtype = torch.float16


def inputs_of(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, shift, scale and the gradient of the output."""
    torch.manual_seed(0)
    b, n, c = case.batch, case.tokens, case.width
    x = case.offset + case.size * torch.randn(b, n, 2 * c if case.part else c)
    g = torch.randn(n, b, c).transpose(0, 1) if case.tokens_first else torch.randn(b, n, c)
    shape = {"batch": (b, 1), "one": (1, 1), "token": (b, n), "token of all": (1, n)}[case.rows]
    modulation = torch.randn(*shape, 6, c).to(torch.float32 if case.float32 else case.dtype)
    shift, scale = modulation.unbind(2)[1:3]
    return x.to(case.dtype)[..., -c:], shift, scale, g.to(case.dtype)


def by_definition(inputs: tuple[Tensor, ...], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Output and gradients by the reference, in the types of the inputs or all in `dtype`."""
    *leaves, g = (x.detach().to(dtype or x.dtype) for x in inputs)
    out = modulated_norm(*(leaf.requires_grad_() for leaf in leaves), EPS, impl="reference")
    return [out.detach(), *torch.autograd.grad(out, leaves, g.to(out.dtype))]


def by_kernels(kernels: ModuleType, case: Case, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The same by the launchers, in memory that holds NaN at first."""
    x, shift, scale, g = inputs
    tiles = case.tiles and kernels.Tiles(*case.tiles)
    with poisoned():
        return [kernels.forward(x, shift, scale, EPS, tiles), *kernels.backward(g, x, scale, EPS, tiles)]


def compare(kernels: ModuleType, case: Case, inputs: tuple[Tensor, ...] | None = None) -> None:
    inputs = inputs or inputs_of(case)
    exact, baseline = by_definition(inputs, torch.float64), by_definition(inputs)
    with guard():
        found = by_kernels(kernels, case, inputs)
    types = [case.dtype, case.dtype, inputs[1].dtype, inputs[1].dtype]
    assert [x.dtype for x in found] == types and all(x.is_contiguous() for x in found)
    names = ("out", "dx", "dshift", "dscale")
    for name, x, e, b in zip(names, found, exact, baseline, strict=True):
        assert_as_exact(x, e, b.to(x.dtype), name=f"{name} of {case}")


# ------------------------------------------------------------------------------------------------------ quick checks


def check_plain(kernels: ModuleType) -> None:
    """Two runs of three tiles, the last of them ragged."""
    compare(kernels, Case())


def check_float32(kernels: ModuleType) -> None:
    compare(kernels, Case(dtype=torch.float32, tiles=None))


def check_per_token(kernels: ModuleType) -> None:
    compare(kernels, Case(rows="token"))


def check_shared(kernels: ModuleType) -> None:
    """One shift and scale for all, and one for each token of all batch entries, which PyTorch sums up."""
    compare(kernels, Case(rows="one"))
    compare(kernels, Case(rows="token of all", tokens=9))


def check_small_deviation(kernels: ModuleType) -> None:
    """A variance that eps is not small beside."""
    compare(kernels, Case(size=1e-3, offset=0.0, tokens=9))


def check_large_offset(kernels: ModuleType) -> None:
    """Squares that float16 does not hold, a mean far above the deviation, and a constant row."""
    x, shift, scale, g = inputs_of(case := Case(size=4.0, offset=1000.0, tokens=9))
    x[0, 3] = 7
    compare(kernels, case, (x, shift, scale, g))


def check_views(kernels: ModuleType) -> None:
    compare(kernels, Case(part=True, tokens_first=True, float32=True))


def check_far_apart(kernels: ModuleType) -> None:
    """Offsets of batch entries and of tokens beyond int32."""
    x, shift, scale, g = inputs_of(case := Case(3, 3, 16, tiles=(1, 2, 1), rows="token"))
    compare(kernels, case, (far_apart(x, 2**30 + 1), shift, scale, g))
    x, g = (far_apart(y.transpose(0, 1), 2**30 + 1).transpose(0, 1) for y in (x, g))
    compare(kernels, case, (x, shift, scale, g))


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS)
def test_quick(check):
    check(true_kernels)


# ------------------------------------------------------------------------------------------------------------ shapes

SHAPES = {
    "one of each": Case(1, 1, 2, tiles=None),
    "one token": Case(3, 1, 64, tiles=None),
    "width 1": Case(1, 5, 1, tiles=None),
    "width 16": Case(2, 70, 16, tiles=None),
    "width 72, part": Case(2, 33, 72, part=True, tiles=None),
    "width 384": Case(2, 19, 384, tiles=None),
    "width 1152": Case(1, 9, 1152, tiles=None),
    "width 1152, part": Case(2, 5, 1152, "one", part=True, tiles=None),
    "width 3072": Case(1, 3, 3072, tiles=None),
    "width 4096": Case(1, 5, 4096, tiles=None),
    "width 4095 per token": Case(1, 2, 4095, "token", tiles=None),
    "a run less one": Case(1, 11),
    "a run": Case(1, 12),
    "a run and one": Case(1, 13),
    "tiles of one row": Case(2, 7, 64, tiles=(1, 3, 1)),
    "a tile longer than the tokens": Case(2, 3, 32, tiles=(8, 8, 1)),
    "tokens first": Case(3, 10, 48, tokens_first=True),
    "float32 per token of all": Case(2, 10, 48, "token of all", float32=True),
    "float32 for all": Case(2, 10, 48, "one", float32=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_shapes(case, dtype):
    compare(true_kernels, replace(case, dtype=dtype))


@pytest.mark.parametrize("name", ["width 384", "a run and one", "float32 per token of all"])
def test_bfloat16(name):
    compare(true_kernels, replace(SHAPES[name], dtype=torch.bfloat16))


def test_order_of_programs_is_free():
    inputs = inputs_of(case := Case(batch=3))
    usual = by_kernels(true_kernels, case, inputs)
    with guard(shuffle=3):
        shuffled = by_kernels(true_kernels, case, inputs)
    assert all(torch.equal(a, b) for a, b in zip(usual, shuffled, strict=True))


def test_tiles_fit_shape():
    """As many runs as run at once, of whole tiles and about equal length; eight elements for each thread."""
    assert true_kernels.tiles_of(torch.Size([1, 32768, 1152])) == true_kernels.Tiles(1, 32, 8)
    assert true_kernels.tiles_of(torch.Size([2, 32768, 64])) == true_kernels.Tiles(16, 64, 4)
    assert true_kernels.tiles_of(torch.Size([1, 100, 4096])) == true_kernels.Tiles(1, 4, 16)
    assert true_kernels.tiles_of(torch.Size([5000, 10, 16])) == true_kernels.Tiles(64, 64, 4)


# --------------------------------------------------------------------------------------------------------- operators


def leaves_of(case: Case) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in inputs_of(case)[:3]]


@pytest.mark.parametrize("rows", ["batch", "token"])
def test_operators(rows):
    x, shift, scale = leaves_of(case := Case(2, 5, 16, rows))
    torch.library.opcheck(modulated_norm_op, (x, shift, scale, EPS))
    with torch.no_grad():
        torch.library.opcheck(modulated_norm_backward_op, (inputs_of(case)[3], x, scale, EPS))


def test_gradients_through_autograd():
    """Of a sum, whose gradient is one expanded number."""
    results = []
    for impl in ("reference", "triton"):
        leaves = leaves_of(Case(2, 9, 24, dtype=torch.float32))
        modulated_norm(*leaves, impl=impl).sum().backward()
        results.append([leaf.grad for leaf in leaves])
    for reference, kernel in zip(*results, strict=True):
        torch.testing.assert_close(kernel, reference, rtol=1e-4, atol=1e-5)


def test_compiled_whole():
    leaves = leaves_of(Case(2, 5, 16, dtype=torch.float32))

    def loss(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return modulated_norm(x, shift, scale, impl="triton").square().sum()

    expected = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for x, y in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(x, y)


def test_second_derivatives_are_refused():
    x, shift, scale = leaves_of(Case(1, 3, 16, dtype=torch.float32))
    out = modulated_norm(x, shift, scale, impl="triton")
    (grad,) = torch.autograd.grad(out.square().sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="modulated_norm_backward"):
        grad.sum().backward()


def test_unfit_calls():
    x, row = torch.zeros(2, 3, 8), torch.zeros(2, 1, 8)
    assert unfit(x, row, row) is None
    for call, reason in [
        ((x.double(), row.double(), row.double()), "x is torch.float64"),
        ((x[:, :0], row, row), "is empty"),
        ((torch.zeros(1, 1, 4097), torch.zeros(1, 1, 4097), torch.zeros(1, 1, 4097)), "4097 channels"),
        ((x, row[:1], row), "differ"),
        ((x, row.half(), row), "differ"),
        ((x.half(), row.bfloat16(), row.bfloat16()), "shift and scale are torch.bfloat16"),
    ]:
        assert reason in unfit(*call)
        with pytest.raises(ValueError, match=f"triton of modulated_norm cannot.*{reason}"):
            modulated_norm(*call, impl="triton")
    modulated_norm(x, row[:1], row)  # auto


def test_wrong_calls():
    x, row = torch.zeros(2, 3, 8), torch.zeros(2, 1, 8)
    for call, message in [
        ((x[0], row, row), r"x should have shape \[B, N, C\]"),
        ((x, row[0], row), r"shift should have shape .* got \[1, 8\]"),
        ((x, row, row[..., :1]), r"scale should have shape"),
        ((x, row, row.expand(2, 2, 8)), r"scale should have shape"),
        ((x, row, row, -1.0), "eps should be positive"),
        ((x, row, row, EPS, "cuda"), "impl should be auto, reference or triton, got 'cuda'"),
    ]:
        with pytest.raises(ValueError, match=message):
            modulated_norm(*call)


def test_definition():
    """Against the formula written out."""
    x, shift, scale, _ = (y.double() for y in inputs_of(Case(2, 3, 10)))
    n = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + EPS).sqrt()
    torch.testing.assert_close(modulated_norm(x, shift, scale), n * (1 + scale) + shift)


# ----------------------------------------------------------------------------------------------------------- mutants

MUTANTS = [
    Mutant("no eps", "/ C + eps)", "/ C)", check_small_deviation),
    Mutant("mean over the tile", "tl.sum(x, axis=1)[:, None] / C", "tl.sum(x, axis=1)[:, None] / 128", check_plain),
    Mutant("variance over the tile", "/ C + eps", "/ 128 + eps", check_plain),
    Mutant("no mean", "x - mean, 0.0", "x, 0.0", check_plain),
    Mutant("variance of masked columns", "tl.where(column < C, x - mean, 0.0)", "x - mean", check_plain),
    Mutant("variance of x", "tl.sum(centred * centred", "tl.sum(centred * x", check_large_offset),
    Mutant("forward in 16 bits", "x = following.to(tl.float32)", "x = following", check_large_offset),
    Mutant("scale without 1", "[0] * (1.0 + scale) + shift", "[0] * scale + shift", check_plain),
    Mutant("no shift", "(1.0 + scale) + shift", "(1.0 + scale)", check_plain),
    Mutant("scale for shift", "_load_one(SHIFT, batch, shift_steps", "_load_one(SCALE, batch, shift_steps", check_plain),
    Mutant("shift of the first entry", "_load_one(SHIFT, batch,", "_load_one(SHIFT, batch * 0,", check_plain),
    Mutant("shift of the first token", "_load(SHIFT, batch, row,", "_load(SHIFT, batch, row * 0,", check_per_token),
    Mutant("shift with the steps of x", "row, last, shift_steps", "row, last, x_steps", check_per_token),
    Mutant("tail not masked", "mask=(row < last) & (column < C), other", "mask=column < C, other", check_plain),
    Mutant("columns not masked", "mask=(row < last) & (column < C), other", "mask=row < last, other", check_plain),
    Mutant("run beyond the tokens", "tl.minimum(first + run, tokens)", "first + run", check_plain),
    Mutant("same tile again", "row + ROWS, last, x_steps, column, C)  #", "row, last, x_steps, column, C) #", check_plain),
    Mutant("prefetch of the same gradient", "_load(G, batch, row + ROWS,", "_load(G, batch, row,", check_plain),
    Mutant("gradient with the steps of x", "row + ROWS, last, g_steps", "row + ROWS, last, x_steps", check_views),
    Mutant("dx without scale", "h = g * (1.0 + scale)", "h = g", check_plain),
    Mutant("dx without the mean", "h - mean - n * slope", "h - n * slope", check_plain),
    Mutant("dx without the slope", "h - mean - n * slope", "h - mean", check_plain),
    Mutant("mean of h over the tile", "tl.sum(h, axis=1)[:, None] / C", "tl.sum(h, axis=1)[:, None] / COLUMNS", check_plain),
    Mutant("slope of g", "tl.sum(h * n,", "tl.sum(g * n,", check_plain),
    Mutant("dx without r", "(r * (h -", "((h -", check_large_offset),
    Mutant("sums of the last tile", "sum_shift += g", "sum_shift = g", check_plain),
    Mutant("dscale of x", "sum_scale += g * n", "sum_scale += g * x", check_plain),
    Mutant("dscale of a token", "(g * n).to(DSCALE", "(h * n).to(DSCALE", check_per_token),
    Mutant("partials in one place", "at = tl.program_id(0).to(tl.int64) * C", "at = 0 * C", check_plain),
    Mutant("partials of the first run", "part.sum_to_size(scale.shape)", "part[:, :1].sum_to_size(scale.shape)", check_plain),
    Mutant("one step for all tokens", "(0 if size == 1 else stride", "(0 if size < 4 else stride", check_far_apart),
    Mutant("offsets of 32 bits", "program = tl.program_id(0).to(tl.int64)", "program = tl.program_id(0)", check_far_apart),
]  # fmt: skip


def test_mutants_are_seeded():
    source = inspect.getsource(true_kernels)
    assert len(MUTANTS) >= 20
    assert [mutant.name for mutant in MUTANTS if source.count(mutant.old) != 1] == []


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_killed(mutant):
    assert_killed(mutant, true_kernels)
