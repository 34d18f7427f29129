"""norm_rope's kernels in the interpreter, against float64, and as operators of PyTorch."""

import inspect
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from stgen.ops.norm_rope import norm_rope, unfit
from stgen.ops.norm_rope import triton as true_kernels
from stgen.ops.norm_rope.library import norm_rope_backward_op, norm_rope_op
from stgen.testing.errors import assert_as_exact, poisoned
from stgen.testing.guard import far_apart, guard
from stgen.testing.mutants import Mutant, assert_killed

EPS = 1e-6
NAMES = ("q", "k", "v", "pooled_q", "pooled_k", "dqkv", "dgain_q", "dgain_k")


@dataclass(frozen=True)
class Case:
    batch: int = 2
    tokens: int = 40
    heads: int = 2
    head_dim: int = 64
    block: int | None = None
    norm_q: bool = True
    norm_k: bool = True
    rope: bool = True
    layout: str = "packed"  # of qkv; also split (a part of a wider projection) or tokens first
    size: float = 1.0  # of the elements of qkv
    wide_gain: bool = False  # float32 gains
    without: tuple[str, ...] = ()  # gradients that do not come in
    tiles: tuple[int, int, int] | None = None
    dtype: torch.dtype = torch.float16


@dataclass(frozen=True)
class Inputs:
    qkv: Tensor
    gain_q: Tensor | None
    gain_k: Tensor | None
    tables: tuple[Tensor, Tensor] | None
    grads: dict[str, Tensor]  # of q, k, v and the means


def inputs_of(case: Case) -> Inputs:
    torch.manual_seed(0)
    b, n, h, d = case.batch, case.tokens, case.heads, case.head_dim
    qkv = case.size * torch.randn(b, n, 3 * h * d).to(case.dtype)
    if case.layout == "split":
        qkv = torch.nn.functional.pad(qkv, (8, 24))[..., 8:-24]
    if case.layout == "tokens first":
        qkv = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    gains = [torch.rand(d).add(0.5).to(torch.float32 if case.wide_gain else case.dtype) for _ in range(2)]
    angles = 6 * torch.rand(n, d // 2)
    grads = {name: torch.randn(b, n, h, d).to(case.dtype) for name in "qkv"}
    grads["k"] = grads["k"].transpose(1, 2).contiguous().transpose(1, 2)  # heads first, as attention may leave it
    if case.block:
        # As large as the others at a token, or errors in them would not show.
        shape = (b, h, -(-n // case.block), d)
        grads |= {name: case.block * torch.randn(shape) for name in ("pooled_q", "pooled_k")}
    return Inputs(
        qkv.unflatten(-1, (3, h, d)),
        gains[0] if case.norm_q else None,
        gains[1] if case.norm_k else None,
        (angles.cos(), angles.sin()) if case.rope else None,
        {name: grad for name, grad in grads.items() if name not in case.without},
    )


def by_definition(case: Case, inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """All outputs and gradients by the reference, computed in `dtype`."""
    names = ("qkv", "gain_q", "gain_k")
    leaves = {name: getattr(inputs, name) for name in names if getattr(inputs, name) is not None}
    leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in leaves.items()}
    tables = inputs.tables and (inputs.tables[0].to(dtype), inputs.tables[1].to(dtype))
    given = [leaves.get(name) for name in names]
    out = dict(zip(NAMES, norm_rope(*given, tables, EPS, block=case.block, impl="reference"), strict=False))
    heads = [out[name] for name in inputs.grads]
    grads = [grad.to(out[name].dtype) for name, grad in inputs.grads.items()]
    back = torch.autograd.grad(heads, list(leaves.values()), grads, materialize_grads=True)
    return {k: v.detach() for k, v in out.items()} | {f"d{name}": grad for name, grad in zip(leaves, back, strict=True)}


def by_kernels(kernels: ModuleType, case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """The same by the launchers, in memory that holds NaN at first."""
    cos, sin = inputs.tables or (None, None)
    rest = (inputs.qkv, inputs.gain_q, inputs.gain_k, cos, sin, EPS, case.block)
    tiles = case.tiles and kernels.Tiles(*case.tiles)
    rows = {name: inputs.grads.get(name, torch.zeros_like(inputs.qkv[:, :, 0])) for name in "qkv"}
    with poisoned():
        out = kernels.forward(*rest, tiles)
        back = kernels.backward(*rows.values(), *(inputs.grads.get(f"pooled_{n}") for n in "qk"), *rest, tiles)
    found = dict(zip(NAMES, (*out, *back), strict=True))
    return {name: x for name, x in found.items() if x is not None and x.numel()}


def compare(kernels: ModuleType, case: Case, inputs: Inputs | None = None) -> None:
    inputs = inputs or inputs_of(case)
    exact, baseline = by_definition(case, inputs, torch.float64), by_definition(case, inputs, case.dtype)
    with guard():
        found = by_kernels(kernels, case, inputs)
    assert found.keys() == exact.keys()
    for name, x in found.items():
        assert x.is_contiguous()
        assert_as_exact(x, exact[name], baseline[name], name=f"{name} of {case}")


# ------------------------------------------------------------------------------------------------------ quick checks


def check_plain(kernels: ModuleType) -> None:
    compare(kernels, Case())


def check_float32(kernels: ModuleType) -> None:
    compare(kernels, Case(dtype=torch.float32))


def check_blocks(kernels: ModuleType) -> None:
    """A ragged last block, no powers of two; in the backward a tile that reaches beyond it."""
    compare(kernels, Case(tokens=23, block=12))


def check_tiles_of_a_block(kernels: ModuleType) -> None:
    """Blocks of several tiles, the last tile cut by the block and by the tokens."""
    compare(kernels, Case(batch=1, tokens=41, block=24, tiles=(16, 1, 1)))


def check_groups_of_heads(kernels: ModuleType) -> None:
    """Programs of two heads, the last of one."""
    compare(kernels, Case(tokens=24, heads=3, tiles=(16, 2, 1)))


def check_small_elements(kernels: ModuleType) -> None:
    """Squares that eps is not small beside."""
    compare(kernels, Case(tokens=16, heads=1, size=1e-3))


def check_large_elements(kernels: ModuleType) -> None:
    """Squares that float16 does not hold, and an empty row."""
    inputs = inputs_of(case := Case(tokens=16, heads=1, size=3e3))
    inputs.qkv[0, 3] = 0
    compare(kernels, case, inputs)


def check_views(kernels: ModuleType) -> None:
    """A part of a wider projection, with a head dimension that strides are no multiples of 16 with."""
    compare(kernels, Case(tokens=24, heads=3, head_dim=24, layout="split"))


def check_one_gain(kernels: ModuleType) -> None:
    for norm_q in (False, True):
        compare(kernels, Case(batch=1, tokens=16, heads=2, block=16, norm_q=norm_q, norm_k=not norm_q, wide_gain=True))


def check_far_apart(kernels: ModuleType) -> None:
    """Offsets of batch entries, tokens and heads beyond int32, from odd strides within it."""
    inputs = inputs_of(case := Case(batch=3, tokens=3, heads=3, head_dim=16, tiles=(4, 3, 1)))
    for order in ((0, 1, 2, 3, 4), (1, 0, 2, 3, 4), (3, 0, 1, 2, 4)):
        back = [order.index(axis) for axis in range(5)]
        slices = far_apart(inputs.qkv.permute(order), 2**30 + 1)
        compare(kernels, case, replace(inputs, qkv=slices.permute(back)))


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS)
def test_quick(check):
    check(true_kernels)


# ------------------------------------------------------------------------------------------------------------ shapes

SHAPES = {
    "one of each": Case(1, 1, 1),
    "one token, blocks": Case(3, 1, 2, block=4),
    "a tile less one": Case(1, 31, 2),
    "a tile": Case(1, 32, 2),
    "a tile and one": Case(1, 33, 2),
    "head dimension 2": Case(1, 20, 2, 2),
    "head dimension 60": Case(1, 20, 2, 60, block=10),
    "head dimension 72": Case(2, 17, 2, 72, layout="split"),
    "head dimension 80": Case(1, 17, 2, 80),
    "head dimension 128": Case(1, 33, 2, 128, block=32),
    "head dimension 256": Case(1, 9, 1, 256),
    "blocks of one": Case(1, 10, 2, 16, block=1),
    "a block less one": Case(1, 15, 2, 32, block=16),
    "a block and one": Case(1, 17, 2, 32, block=16),
    "one long block": Case(1, 70, 1, block=100),
    "tokens first": Case(3, 20, 2, 32, layout="tokens first"),
    "no norm": Case(1, 20, 2, norm_q=False, norm_k=False, block=8),
    "no rope": Case(1, 20, 2, rope=False, block=8),
    "neither": Case(1, 20, 2, norm_q=False, norm_k=False, rope=False),
    "means of q alone": Case(1, 20, 2, 32, block=8, without=("q", "k", "v", "pooled_k")),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_shapes(case, dtype):
    compare(true_kernels, replace(case, dtype=dtype))


@pytest.mark.parametrize("name", ["head dimension 72", "a block and one", "head dimension 128"])
def test_bfloat16(name):
    compare(true_kernels, replace(SHAPES[name], dtype=torch.bfloat16))


def test_order_of_programs_is_free():
    inputs = inputs_of(case := Case(tokens=41, block=16, tiles=(16, 2, 1)))
    usual = by_kernels(true_kernels, case, inputs)
    with guard(shuffle=3):
        shuffled = by_kernels(true_kernels, case, inputs)
    assert all(torch.equal(usual[name], shuffled[name]) for name in usual)


def test_tiles_fit_shape():
    """A thread has 8 elements of a tile or 4, a program about 128 rows, unless there would be few programs."""
    assert true_kernels.tiles_of(torch.Size([1, 32768, 3, 16, 64]), None) == true_kernels.Tiles(32, 4, 4)
    assert true_kernels.tiles_of(torch.Size([1, 32768, 3, 16, 64]), 64) == true_kernels.Tiles(32, 2, 4)
    assert true_kernels.tiles_of(torch.Size([1, 32768, 3, 12, 128]), 192) == true_kernels.Tiles(16, 1, 4)
    assert true_kernels.tiles_of(torch.Size([1, 1024, 3, 16, 64]), None) == true_kernels.Tiles(32, 1, 4)
    assert true_kernels.tiles_of(torch.Size([8, 32768, 3, 16, 72]), 4) == true_kernels.Tiles(4, 16, 2)


# --------------------------------------------------------------------------------------------------------- operators


def given(case: Case) -> list:
    """Arguments of the public function that ask for gradients."""
    inputs = inputs_of(case)
    leaves = [inputs.qkv.detach(), inputs.gain_q, inputs.gain_k]
    return [None if leaf is None else leaf.requires_grad_() for leaf in leaves] + [inputs.tables]


@pytest.mark.parametrize("case", [Case(1, 9, 2, 16), Case(1, 9, 2, 16, 4, norm_k=False, rope=False)])
def test_operators(case):
    qkv, gain_q, gain_k, tables = given(case)
    cos, sin = tables or (None, None)
    torch.library.opcheck(norm_rope_op, (qkv, gain_q, gain_k, cos, sin, EPS, case.block))
    grads = [inputs_of(case).grads.get(name) for name in ("q", "k", "v", "pooled_q", "pooled_k")]
    with torch.no_grad():
        torch.library.opcheck(norm_rope_backward_op, (*grads, qkv, gain_q, gain_k, cos, sin, EPS, case.block))


@pytest.mark.parametrize("block", [None, 8])
def test_gradients_through_autograd(block):
    """Expanded gradients, and none for the means, which only choose."""
    case = Case(1, 20, 2, 32, block, dtype=torch.float32)
    results = []
    for impl in ("reference", "triton"):
        *leaves, tables = given(case)
        q, k, v, *_ = norm_rope(*leaves, tables, EPS, block=block, impl=impl)
        (q.sum() + 2 * (k * k).sum() + v.sum()).backward()
        results.append([leaf.grad for leaf in leaves])
    for reference, kernel in zip(*results, strict=True):
        torch.testing.assert_close(kernel, reference, rtol=1e-4, atol=1e-4)


def test_values_alone_give_gradients():
    case = Case(1, 20, 2, 32, dtype=torch.float32)
    qkv, gain_q, gain_k, tables = given(case)
    norm_rope(qkv, gain_q, gain_k, tables, EPS, impl="triton")[2].sum().backward()
    assert torch.equal(qkv.grad, torch.tensor([0.0, 0.0, 1.0])[:, None, None].expand_as(qkv))
    assert not gain_q.grad.any() and not gain_k.grad.any()


def test_compiled_whole():
    *leaves, tables = given(Case(1, 9, 2, 16, 4, dtype=torch.float32))

    def loss(qkv: Tensor, gain_q: Tensor, gain_k: Tensor) -> Tensor:
        return sum((x * x).sum() for x in norm_rope(qkv, gain_q, gain_k, tables, EPS, block=4, impl="triton"))

    expected = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for x, y in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(x, y)


def test_second_derivatives_are_refused():
    *leaves, tables = given(Case(1, 4, 1, 16, dtype=torch.float32))
    q, _, _ = norm_rope(*leaves, tables, EPS, impl="triton")
    (grad,) = torch.autograd.grad((q * q).sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="norm_rope_backward"):
        grad.sum().backward()


def test_unfit_calls():
    qkv, gain = torch.zeros(1, 4, 3, 2, 6), torch.ones(6)
    tables = (torch.zeros(4, 3), torch.zeros(4, 3))
    assert unfit(qkv, gain, gain, tables) is None
    for call, reason in [
        ((qkv.double(), None, None, None), "float64"),
        ((qkv[..., :5], None, None, None), "head dimension 5"),
        ((torch.zeros(1, 1, 3, 1, 1024), None, None, None), "head dimension 1024"),
        ((qkv[:, :0], None, None, None), "empty"),
        ((qkv, None, None, (tables[0].double(), tables[1])), "tables are torch.float64"),
    ]:
        assert reason in unfit(*call)
        with pytest.raises(ValueError, match=f"triton of norm_rope cannot.*{reason}"):
            norm_rope(*call, impl="triton")
        norm_rope(*call)  # auto


def test_wrong_calls():
    qkv, gain = torch.zeros(1, 4, 3, 2, 6), torch.ones(6)
    tables = (torch.zeros(4, 3), torch.zeros(4, 3))
    for call, options, message in [
        ((qkv[:, :, :2], gain, gain, tables), {}, r"qkv should have shape \[B, N, 3"),
        ((qkv, gain[:3], gain, tables), {}, r"gain_q should have shape \[6\]"),
        ((qkv, gain, gain[:3], tables), {}, r"gain_k should have shape \[6\]"),
        ((qkv, gain, gain, (tables[0], tables[1][:3])), {}, r"tables should have shape \[4, 3\]"),
        ((qkv, gain, gain, (tables[0], tables[1].clone().requires_grad_())), {}, "tables are constants"),
        ((qkv, gain, gain, tables, 0.0), {}, "eps should be positive"),
        ((qkv, gain, gain, tables), {"block": 0}, "block should be at least 1"),
        ((qkv, gain, gain, tables), {"impl": "cuda"}, "impl should be auto, reference or triton, got 'cuda'"),
    ]:
        with pytest.raises(ValueError, match=message):
            norm_rope(*call, **options)


def test_definition_is_rotation_of_normed_rows():
    """Against the formula written out, element by element."""
    inputs = inputs_of(case := Case(1, 5, 1, 4, block=2, dtype=torch.float32))
    x, gain, (cos, sin) = inputs.qkv.double(), inputs.gain_k.double(), (t.double() for t in inputs.tables)
    _, k, v, _, pooled = norm_rope(x, inputs.gain_q.double(), gain, (cos, sin), EPS, block=case.block)
    for n in range(5):
        y = x[0, n, 1, 0] / (x[0, n, 1, 0].square().mean() + EPS).sqrt() * gain
        for i in range(2):
            turned = torch.complex(y[i], y[i + 2]) * torch.complex(cos[n, i], sin[n, i])
            torch.testing.assert_close(torch.stack([k[0, n, 0, i], k[0, n, 0, i + 2]]), torch.view_as_real(turned))
    assert torch.equal(v, x[:, :, 2])
    means = [k[0, :2, 0].mean(0), k[0, 2:4, 0].mean(0), k[0, 4, 0]]
    torch.testing.assert_close(pooled[0, 0], torch.stack(means))


# ----------------------------------------------------------------------------------------------------------- mutants

MUTANTS = [
    Mutant("no eps", "/ D + eps)", "/ D)", check_small_elements),
    Mutant("mean of squares over half", "axis=1) / D + eps", "axis=1) / (D // 2) + eps", check_plain),
    Mutant("norm sees one half", "a * a + b * b, axis", "a * a, axis", check_plain),
    Mutant("norm in 16 bits", "    a, b = a.to(tl.float32), b.to(tl.float32)\n    if NORM", "    if NORM", check_large_elements),
    Mutant("turned the other way", "a * cos - b * sin, a * sin + b * cos", "a * cos + b * sin, b * cos - a * sin", check_plain),
    Mutant("sine of the second half", "a * sin + b * cos", "b * sin + b * cos", check_plain),
    Mutant("turned on, not back", "a * cos + b * sin, b * cos - a * sin", "a * cos - b * sin, a * sin + b * cos", check_plain),
    Mutant("table of every other token", "_rows(token, 1, D // 2, TOKENS)", "_rows(token, 1, D, TOKENS)", check_plain),
    Mutant("gain of the first half", "return a.to(tl.float32), b", "return a.to(tl.float32), a", check_plain),
    Mutant("gain not in dx", "a, b = a * gain_a, b * gain_b", "a, b = a * gain_a, b", check_plain),
    Mutant("dx without the mean", "r * (b - n_b * mean)", "r * b", check_plain),
    Mutant("mean of dx not over D", "axis=1)[:, None] / D\n", "axis=1)[:, None]\n", check_plain),
    Mutant("dx without r", "a, b = r * (a -", "a, b = (a -", check_plain),
    Mutant("gain gradient of the input", "sum_a + a * n_a", "sum_a + a * x_a", check_large_elements),
    Mutant("gain gradient of the last head", "sum_b + b * n_b", "b * n_b", check_groups_of_heads),
    Mutant("gain gradient of the first program", "part.sum(0)", "part[0]", check_plain),
    Mutant("partials in one place", "tl.program_id(0).to(tl.int64) * D", "0 * D", check_plain),
    Mutant("tail not masked", "(place < BLOCK - start) & (place < tokens - first)", "place < BLOCK - start", check_plain),
    Mutant("block not masked", "(place < BLOCK - start) & (place < tokens - first)", "place < tokens - first", check_blocks),
    Mutant("half not masked", "return column, column < D // 2", "return column, column < HALF", check_views),
    Mutant("first batch entry alone", "program // groups % blocks", "program // groups", check_plain),
    Mutant("heads beyond the last", "tl.minimum(each, heads - first)", "each", check_groups_of_heads),
    Mutant("groups of one head", "program % groups * each", "program % groups", check_groups_of_heads),
    Mutant("last block not written", "triton.cdiv(tokens, block or tiles.tokens)", "tokens // 32", check_plain),
    Mutant("ragged block by its size", "tl.minimum(BLOCK, tokens - block * BLOCK)", "BLOCK", check_blocks),
    Mutant("means of the last tile", "sum_qa + q_a, sum_qb + q_b", "q_a, q_b", check_tiles_of_a_block),
    Mutant("means of q for k", "tl.sum(sum_ka, 0) / length", "tl.sum(sum_qa, 0) / length", check_blocks),
    Mutant("mean's gradient not shared", "a + pooled_a / length", "a + pooled_a", check_blocks),
    Mutant("mean's gradient of the first block", "token + tl.arange(0, TOKENS)[:, None]) //", "token) //", check_blocks),
    Mutant("empty blocks divide", "tokens - block * BLOCK), 1)", "tokens - block * BLOCK), 0)", check_blocks),
    Mutant("mean's gradient of q for k", "k_a, k_b, DPOOLED_K, batch", "k_a, k_b, DPOOLED_Q, batch", check_blocks),
    Mutant("means of the first head", "(batch * heads + head) * tl.cdiv", "(batch * heads) * tl.cdiv", check_blocks),
    Mutant("stride of heads for tokens", "token * strides[1]", "token * strides[2]", check_tiles_of_a_block),
    Mutant("rows not in units", "apart * UNIT", "apart", check_plain),
    Mutant("batch of 32 bits", "program // groups // blocks,", "(program // groups // blocks).to(tl.int32),", check_far_apart),
    Mutant("tokens of 32 bits", "[:, None].to(tl.int64) * apart", "[:, None] * apart", check_far_apart),
    Mutant("heads of 32 bits", "= program % groups * each", "= (program % groups * each).to(tl.int32)", check_far_apart),
    Mutant("dk with the strides of dq", "head, strides_k, UNIT", "head, strides_q, UNIT", check_plain),
    Mutant("dv in the place of dk", "out + 2 * heads * D", "out + heads * D", check_plain),
    Mutant("gain of q for k", "_place(k_a, k_b, gain_ka,", "_place(k_a, k_b, gain_qa,", check_plain),
]  # fmt: skip


def test_mutants_are_seeded():
    source = inspect.getsource(true_kernels)
    assert len(MUTANTS) >= 20
    assert [mutant.name for mutant in MUTANTS if source.count(mutant.old) != 1] == []


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_killed(mutant):
    assert_killed(mutant, true_kernels)
