"""block_sparse_attention's kernels in the interpreter, against float64, and as an operator of PyTorch."""

import inspect
import math
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from stgen.ops.block_sparse_attention import block_sparse_attention, library, unfit
from stgen.ops.block_sparse_attention import triton as true_kernels
from stgen.ops.block_sparse_attention.lists import BlockLists, Lists
from stgen.ops.block_sparse_attention.reference import block_sparse_attention_reference
from stgen.ops.normaliser import Normaliser
from stgen.ops.support import Support
from stgen.testing.errors import assert_as_exact, poisoned
from stgen.testing.guard import far_apart, guard
from stgen.testing.mutants import Mutant, assert_killed

POLY_CUT, POLY_E_CUT = Normaliser("poly", -2.0), Normaliser("poly_e", -6.0)


@dataclass(frozen=True)
class Case:
    n: int = 100
    m: int = 140
    block: tuple[int, int] = (64, 64)
    head_dim: int = 32
    sequences: int = 1
    groups: int = 1
    heads: int = 1
    shared: int = 1  # heads of q for one of k
    tables: int = 1  # heads of the support
    normaliser: Normaliser | str = "softmax"
    sink: bool = False
    bias: bool = False
    lse: bool = True
    fast: bool = False
    descriptors: bool = False
    size: float = 1.0  # of q
    kinds: tuple[int, ...] = (0, 1, 1, 2)  # of pairs of blocks, at random: empty, partial, whole
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    sink: Tensor | None
    support: Support
    d_out: Tensor
    d_lse: Tensor | None

    def leaves(self, dtype: torch.dtype) -> list[Tensor | None]:
        """q, k, v, sink and bias to differentiate, those of q's dtype in another one."""
        found = [x.detach().to(dtype) for x in (self.q, self.k, self.v)]
        others = (None if x is None else x.detach().to(max(dtype, torch.float32, key=_bits)) for x in self.extras())
        return [None if x is None else x.requires_grad_() for x in (*found, *others)]

    def extras(self) -> tuple[Tensor | None, Tensor | None]:
        return self.sink, self.support.bias


def _bits(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits


def support_of(case: Case) -> Support:
    """Whole, partial and empty pairs of blocks, and a row without keys where there are several."""
    (bq, bk), shape = case.block, (case.groups, case.tables)
    codes = torch.tensor(case.kinds)[torch.randint(len(case.kinds), (*shape, -(-case.n // bq), -(-case.m // bk)))]
    codes = codes.repeat_interleave(bq, 2).repeat_interleave(bk, 3)[:, :, : case.n, : case.m]
    mask = (codes == 2) | ((codes == 1) & (torch.rand(codes.shape) < 0.5))
    if case.n > 5 and 0 in case.kinds:
        mask[:, :, 5] = False
    support = Support.from_mask(mask, case.block)
    return replace(support, bias=torch.randn(support.table.shape)) if case.bias else support


def inputs_of(case: Case) -> Inputs:
    """q is a view of a packed projection, k and v of another; the gradient is token-major too."""
    torch.manual_seed(0)
    shape = (case.sequences, case.n, 2, case.heads, case.head_dim)
    q, d_out = torch.randn(shape).transpose(1, 3).unbind(2)  # [S, heads, n, D]
    k, v = torch.randn(case.sequences, case.m, 2, case.heads // case.shared, case.head_dim).transpose(1, 3).unbind(2)
    q, k, v, d_out = (x.to(case.dtype) for x in (q * case.size, k, v, d_out))
    sink = torch.randn(case.heads) if case.sink else None
    lse = case.lse and not Normaliser.of(case.normaliser).by_count
    return Inputs(q, k, v, sink, support_of(case), d_out, torch.randn(q.shape[:3]) if lse else None)


def by_kernels(kernels: ModuleType, case: Case, x: Inputs) -> dict[str, Tensor]:
    """Results of the launchers, in memory that holds NaN before."""
    normaliser, lists = Normaliser.of(case.normaliser), BlockLists.of(x.support)
    given = lists, normaliser, x.sink, x.support.bias
    with poisoned():
        rows = out, level, mass = kernels.forward(x.q, x.k, x.v, *given, case.descriptors)
        d_mass = None if x.d_lse is None else torch.where(mass == 0, 0, x.d_lse / mass)
        grads = kernels.backward(x.d_out, d_mass, x.q, x.k, x.v, *rows, *given, case.fast, case.descriptors)
    found = dict(zip(("out", "dq", "dk", "dv", "dsink", "dbias"), (out, *grads), strict=True))
    if x.d_lse is not None:
        unit = math.log(2) if normaliser.kind in ("softmax", "poly") else 1.0
        found["lse"] = (mass.log() + level * unit).where(mass > 0, -torch.inf)
    return {name: result for name, result in found.items() if result is not None}


def by_reference(case: Case, x: Inputs, dtype: torch.dtype, d_lse: Tensor | None = None) -> dict[str, Tensor]:
    """The definition and autograd, of the same rounded inputs."""
    leaves, normaliser = x.leaves(dtype), Normaliser.of(case.normaliser)
    q, k, v, sink, bias = leaves
    d_lse = x.d_lse if d_lse is None else d_lse
    support = replace(x.support, bias=bias)
    out, lse = block_sparse_attention_reference(q, k, v, support, normaliser, sink, d_lse is not None)
    loss = (out * x.d_out.to(dtype)).sum().double()
    if d_lse is not None:
        loss = loss + (lse.where(lse.isfinite(), 0) * d_lse).sum().double()
    names = [name for name, leaf in zip(("dq", "dk", "dv", "dsink", "dbias"), leaves, strict=True) if leaf is not None]
    grads = torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None])
    found = {"out": out.detach(), **dict(zip(names, grads, strict=True))}
    return found if d_lse is None else {**found, "lse": lse.detach()}


def check(kernels: ModuleType, case: Case) -> dict[str, Tensor]:
    """Values and gradients about as exact as the definition's in the same dtype.

    Gradients of sink and bias are small differences of sums, in which the kernels take the output as they rounded it,
    as FlashAttention does. That is the same as another gradient of the LSE, with which they should be as exact.
    """
    x = inputs_of(case)
    found, exact = by_kernels(kernels, case, x), by_reference(case, x, torch.float64)
    baseline = by_reference(case, x, case.dtype)
    assert found.keys() == exact.keys()
    if not Normaliser.of(case.normaliser).by_count and (case.sink or case.bias):
        rounding = ((found["out"].double() - exact["out"]) * x.d_out.double()).sum(-1)
        shifted = by_reference(case, x, torch.float64, (0 if x.d_lse is None else x.d_lse) - rounding)
        exact |= {name: shifted[name] for name in ("dsink", "dbias") if name in shifted}
    for name, result in found.items():
        assert_as_exact(result, exact[name].double(), baseline[name].to(result.dtype), name=name)
    return found


# ------------------------------------------------------------------------------------------------ checks of a few parts


def check_softmax(kernels):
    check(kernels, Case())


def check_half(kernels):
    check(kernels, Case(dtype=torch.float16, sequences=2))


def check_descriptors(kernels):
    check(kernels, Case(dtype=torch.float16, descriptors=True, heads=2, head_dim=72))


def check_whole_blocks(kernels):
    check(kernels, Case(n=64, m=128, kinds=(2,)))


def check_partial_blocks(kernels):
    check(kernels, Case(n=64, m=128, kinds=(1,)))


def check_whole_and_ragged(kernels):
    check(kernels, Case(n=64, m=100, kinds=(2,)))


def check_below_zero(kernels):
    """A row whose scores are all far below zero: what it summed before it met a key weighs nothing, not 2^1000."""
    case = Case(n=16, m=32, block=(16, 16), head_dim=16, kinds=(2,), lse=False)
    x = inputs_of(case)
    q, k = torch.full_like(x.q, 30.0), torch.full_like(x.k, -12.0)
    out, *_ = kernels.forward(q, k, x.v, BlockLists.of(x.support), Normaliser())
    assert out.isfinite().all()
    torch.testing.assert_close(out, x.v.mean(2, keepdim=True).expand_as(out), rtol=0, atol=1e-6)


def check_high_sink(kernels):
    """A sink so high that only its own level keeps the mass finite."""
    case = Case(n=16, m=16, block=(16, 16), head_dim=16, kinds=(2,), sink=True)
    found = by_kernels(kernels, case, replace(inputs_of(case), sink=torch.tensor([300.0])))
    assert (found["out"] == 0).all()
    torch.testing.assert_close(found["lse"], torch.full_like(found["lse"], 300.0))


def check_two_heads(kernels):
    check(kernels, Case(heads=2, n=32, m=64))


def check_blocks_in_parts(kernels):
    """Blocks of several tiles, and of words that lie apart."""
    check(kernels, Case(n=200, m=200, block=(128, 128), kinds=(1, 2), dtype=torch.float16, bias=True))


def check_small_blocks(kernels):
    check(kernels, Case(n=40, m=50, block=(16, 16), head_dim=16, sink=True))


def check_narrow_tiles(kernels):
    """Several tiles of keys in a word."""
    check(kernels, Case(n=32, m=70, block=(16, 64), head_dim=80, kinds=(1,)))


def check_sink(kernels):
    check(kernels, Case(sink=True, heads=2, n=64, m=70, head_dim=16))


def check_bias(kernels):
    check(kernels, Case(bias=True, sequences=2, heads=2, n=33, m=80, block=(32, 32), head_dim=16))


def check_bias_in_fast(kernels):
    check(kernels, Case(bias=True, heads=2, n=70, m=64, tables=2, fast=True))


def check_relu(kernels):
    check(kernels, Case(normaliser="relu"))
    check(kernels, Case(normaliser="relu", n=32, m=100, kinds=(2,)))


def check_relu2(kernels):
    check(kernels, Case(normaliser="relu2"))


def check_poly(kernels):
    check(kernels, Case(normaliser="poly", sink=True))


def check_poly_cut(kernels):
    check(kernels, Case(normaliser=POLY_CUT, sink=True))


def check_poly_e(kernels):
    check(kernels, Case(normaliser="poly_e", sink=True))


def check_shared_heads(kernels):
    check(kernels, Case(heads=4, shared=2, tables=4, n=32, m=64))


def check_groups(kernels):
    check(kernels, Case(sequences=4, groups=2, heads=2, tables=2, n=32, m=64))


def check_fast(kernels):
    check(kernels, Case(fast=True, sink=True))


def check_large_logits(kernels):
    found = check(kernels, Case(size=20.0, sink=True, kinds=(1,), m=64))
    assert found["lse"].abs().max() > 70


def check_one_place(kernels):
    check(kernels, Case(n=1, m=1, kinds=(2,), block=(16, 16), head_dim=16))


def check_rows_without_keys(kernels):
    """Zeros, LSE -inf; also where nothing at all is kept."""
    for kinds in ((0, 1), (0,)):
        found = check(kernels, Case(kinds=kinds, fast=True))
        assert (found["out"][:, :, 5] == 0).all() and (found["dq"][:, :, 5] == 0).all()
        assert (found["lse"][:, :, 5] == -torch.inf).all()


def check_far(kernels):
    """Sequences and heads so far apart that the offset of the third is no int32."""
    case = Case(n=16, m=16, block=(16, 16), head_dim=16, sequences=3, heads=3, kinds=(2,), lse=False)
    x = inputs_of(case)
    near = by_kernels(kernels, case, x)
    given = BlockLists.of(x.support), Normaliser()
    for axis in (0, 1):
        q, k, v, d_out = (far_apart(t.transpose(0, axis)).transpose(0, axis) for t in (x.q, x.k, x.v, x.d_out))
        rows = kernels.forward(q, k, v, *given)
        grads = kernels.backward(d_out, None, q, k, v, *rows, *given)
        for name, result in zip(("out", "dq", "dk", "dv"), (rows[0], *grads), strict=False):
            assert torch.equal(result, near[name]), name


def check_programs_do_not_meet(kernels):
    """No races, and the same bit for bit in whatever order programs run."""
    case = Case(heads=2, bias=True, sink=True, n=40, m=50, block=(32, 32))
    x = inputs_of(case)
    with guard():
        usual = by_kernels(kernels, case, x)
    with guard(races=False, shuffle=1):
        other = by_kernels(kernels, case, x)
    assert all(torch.equal(usual[name], other[name]) for name in usual)


CHECKS = [check for name, check in globals().items() if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_quick(check):
    check(true_kernels)


# -------------------------------------------------------------------------------------------------------------- shapes

SHAPES = {
    "one place": Case(n=1, m=1, block=(16, 32)),
    "below a block": Case(n=63, m=63, kinds=(1,), sink=True),
    "a block": Case(n=64, m=64, kinds=(2,)),
    "above a block": Case(n=65, m=65, fast=True, bias=True),
    "128 x 64": Case(n=130, m=70, block=(128, 64), head_dim=64),
    "128 x 128": Case(n=130, m=130, block=(128, 128), fast=True),
    "32 x 16": Case(n=70, m=40, block=(32, 16), head_dim=64, bias=True),
    "16 x 128": Case(n=20, m=300, block=(16, 128)),
    "width 72": Case(n=33, m=40, block=(32, 32), head_dim=72, sink=True),
    "width 80": Case(n=40, m=33, block=(32, 32), head_dim=80, fast=True),
    "width 128": Case(n=32, m=60, block=(32, 32), head_dim=128),
    "width 40": Case(head_dim=40, heads=3, m=64),
    "groups and tables": Case(sequences=4, groups=2, heads=2, tables=2, n=16, m=60, block=(16, 32), bias=True),
    "shared heads": Case(heads=4, shared=4, n=64, m=70, fast=True),
    "relu": Case(normaliser="relu", bias=True),
    "relu2": Case(normaliser="relu2", fast=True),
    "poly": Case(normaliser="poly", bias=True, fast=True),
    "poly_e": Case(normaliser=POLY_E_CUT, bias=True),
    "large logits": Case(size=20.0, n=64),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_shapes(name, dtype):
    described = dtype == torch.float16 and not SHAPES[name].fast
    check(true_kernels, replace(SHAPES[name], dtype=dtype, descriptors=described))


@pytest.mark.parametrize("name", ["128 x 64", "above a block", "poly"])
def test_shapes_in_bfloat16(name):
    check(true_kernels, replace(SHAPES[name], dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_as_exact_as_pytorchs_own_kernel(dtype):
    case = Case(n=128, m=150, head_dim=64, kinds=(1, 2), dtype=dtype, lse=False)
    x = inputs_of(case)
    found, exact = by_kernels(true_kernels, case, x), by_reference(case, x, torch.float64)
    q, k, v = (t.detach().requires_grad_() for t in (x.q, x.k, x.v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=x.support.dense())
    theirs = [out.detach(), *torch.autograd.grad(out, (q, k, v), x.d_out)]
    for name, baseline in zip(("out", "dq", "dk", "dv"), theirs, strict=True):
        assert_as_exact(found[name], exact[name], baseline, name=name)


# --------------------------------------------------------------------------------------------------------------- lists


def listed(lists: Lists, row: tuple[int, ...]) -> tuple[list[int], list[int], list[int]]:
    """Whole blocks, partial ones and their slots of a row."""
    first, whole, count = (int(x[row]) for x in lists[:3])
    blocks, slots = (x[first : first + count].tolist() for x in lists[3:])
    return blocks[:whole], blocks[whole:], slots[whole:]


@pytest.mark.parametrize("m", [128, 140])
def test_lists_are_the_table_and_its_transpose(m):
    support = support_of(Case(n=200, m=m, block=(32, 16), groups=2, tables=2))
    lists, transposed = BlockLists.of(support), support.table.transpose(2, 3)
    last = -(-m // 16) - 1 if m % 16 else -1
    for table, found, slots in (
        (support.table, lists.by_query, support.slots),
        (transposed, lists.by_key, support.slots.transpose(2, 3)),
    ):
        for row in torch.cartesian_prod(*(torch.arange(x) for x in table.shape[:3])).tolist():
            codes, key = table[tuple(row)].clone(), row[2] if found is lists.by_key else None
            is_cut = torch.arange(len(codes)) == last if key is None else torch.full_like(codes, key == last) > 0
            whole, partial, slot = listed(found, tuple(row))
            assert whole == torch.nonzero((codes == 2) & ~is_cut).flatten().tolist()
            expected = torch.nonzero((codes == 1) | ((codes == 2) & is_cut)).flatten().tolist()
            assert partial == expected
            assert slot == [int(slots[tuple(row)][i]) if codes[i] == 1 else -1 for i in expected]
    assert BlockLists.of(support) is lists


def test_words_hold_the_bits():
    support = support_of(Case(n=70, m=90, block=(32, 64), kinds=(1,)))
    words = BlockLists.of(support).bits
    places = torch.arange(64)
    bits = (words[..., places // 32] >> (places % 32)) & 1
    assert torch.equal(bits.bool(), support.bits)


def test_lists_at_equal_distances_are_read_as_well():
    """As a selector writes that keeps k blocks: room for one more than there are, and rubbish in it."""
    case = Case(n=64, m=96, block=(16, 16), kinds=(0, 2, 2))
    x = inputs_of(case)
    q_lists = BlockLists.of(x.support).by_query
    rows, width = q_lists.count.numel(), int(q_lists.count.max()) + 1
    blocks = torch.full((rows, width), 10**6, dtype=torch.int32)
    blocks[torch.arange(width) < q_lists.count.view(-1, 1)] = q_lists.blocks
    first = (torch.arange(rows) * width).view_as(q_lists.first)
    slots = torch.full_like(blocks, -1)
    slots[torch.arange(width) < q_lists.count.view(-1, 1)] = q_lists.slots
    fixed = q_lists._replace(first=first, blocks=blocks.flatten(), slots=slots.flatten())
    expected = by_kernels(true_kernels, case, x)["out"]
    lists = BlockLists.of(x.support)._replace(by_query=fixed)
    assert torch.equal(true_kernels.forward(x.q, x.k, x.v, lists, Normaliser())[0], expected)


def test_memory_grows_with_the_lists():
    near = torch.eye(512, dtype=torch.bool)[None, None]
    lists = BlockLists.of(Support.from_blocks(near, 512 * 16, 512 * 16, (16, 16)))
    assert sum(x.numel() for x in lists.tensors()) < 12 * 512


# ----------------------------------------------------------------------------------------------------------- operators


def public(x: Inputs, case: Case, impl: str, **options) -> dict[str, Tensor]:
    q, k, v, sink, bias = leaves = x.leaves(case.dtype)
    support = replace(x.support, bias=bias)
    out, lse = block_sparse_attention(q, k, v, support, case.normaliser, sink, return_lse=True, impl=impl, **options)
    loss = (out * x.d_out).sum() + (lse.where(lse.isfinite(), 0) * x.d_lse).sum()
    return {"out": out, "lse": lse, **dict(enumerate(torch.autograd.grad(loss, [t for t in leaves if t is not None])))}


@pytest.mark.parametrize("impl", ["reference", "gather"])
@pytest.mark.parametrize("backward", ["deterministic", "fast"])
def test_the_public_operation_is_the_others(impl, backward):
    case = Case(n=32, m=40, block=(32, 32), heads=4, shared=2, tables=4, sink=True, bias=True)
    x = inputs_of(case)
    ours, theirs = public(x, case, "triton", backward=backward), public(x, case, impl)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=2e-5, atol=2e-5)


def test_orders_sort_and_keep_the_lists():
    torch.manual_seed(0)
    order = torch.stack([torch.randperm(64) for _ in range(2)])[None]  # one for each head
    support = replace(
        support_of(Case(n=64, m=64, tables=2, block=(16, 16))), query_order=order, key_order=order.flip(-1)
    )
    q, k, v = torch.randn(1, 2, 64, 16), *torch.randn(2, 1, 1, 64, 16)
    ours, theirs = (block_sparse_attention(q, k, v, support, impl=impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert BlockLists in support.memo


def operands(case: Case) -> tuple:
    x = inputs_of(case)
    q, k, v, sink, bias = x.leaves(case.dtype)
    lists, normaliser = BlockLists.of(x.support), Normaliser.of(case.normaliser)
    return q, k, v, sink, bias, lists.tensors(), list(lists.block), normaliser.kind, normaliser.cut, case.fast


@pytest.mark.parametrize("case", [Case(n=20, m=20, block=(16, 16), head_dim=16, sink=True, bias=True)], ids=["all"])
def test_operators_are_what_they_say(case):
    given = operands(case)
    torch.library.opcheck(library.forward_op, given)
    out, level, mass = (x.detach() for x in library.forward_op(*given))
    rest = tuple(x.detach() if isinstance(x, Tensor) else x for x in given)
    torch.library.opcheck(library.backward_op, (out, mass, *rest[:3], out, level, mass, *rest[3:]))


def test_a_second_derivative_is_refused():
    q, *others = operands(Case(n=16, m=16, block=(16, 16), head_dim=16))
    (first,) = torch.autograd.grad(library.forward_op(q, *others)[0].square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


def test_compiles_without_a_break():
    case = Case(n=40, m=40, block=(16, 16), head_dim=16, sink=True)
    x = inputs_of(case)
    support = x.support
    BlockLists.of(support)  # as after a first step

    def loss(q, k, v, sink):
        out, lse = block_sparse_attention(2 * q, k, v, support, sink=sink, return_lse=True, impl="triton")
        return out.square().sum() + lse.where(lse.isfinite(), 0).sum()

    leaves = [leaf for leaf in x.leaves(torch.float32) if leaf is not None]
    eager, compiled = (torch.autograd.grad(f(*leaves), leaves) for f in (loss, torch.compile(loss, fullgraph=True)))
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def refused(match: str, **changed):
    q = torch.randn(1, 2, 32, 16)
    given = {"q": q, "k": q, "v": q, "support": Support.full(32, 32, (16, 16)), "impl": "triton", **changed}
    with pytest.raises(ValueError, match=match):
        block_sparse_attention(**given)


def test_what_kernels_cannot_do_is_refused(monkeypatch):
    q = torch.randn(1, 2, 32, 16)
    assert unfit(q, Support.full(32, 32, (16, 16))) is None
    wide, exact = torch.randn(1, 2, 32, 160), q.double()
    refused("which takes head dimensions up to 128, not 160", q=wide, k=wide, v=wide)
    refused("which takes float32, float16 and bfloat16, not float64", q=exact, k=exact, v=exact)
    refused("which takes blocks of 16, 32, 64 and 128 places, not 16 x 8", support=Support.full(32, 32, (16, 8)))
    refused("fewer heads of k divide q's", k=torch.randn(1, 3, 32, 16), v=torch.randn(1, 3, 32, 16))
    refused("deterministic or fast, got 'quick'", backward="quick")
    refused("auto, reference, gather or triton, got 'cuda'", impl="cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    refused("which takes tensors on a GPU, not on cpu")


# ------------------------------------------------------------------------------------------------------- seeded faults

MUTANTS = [
    Mutant(
        "scale", "(c.SCALE * unit(c.KIND))\n    bits", "(c.SCALE * c.SCALE * unit(c.KIND))\n    bits", check_softmax
    ),
    Mutant("scale of dQ", "_put(d_q, sums * c.SCALE", "_put(d_q, sums", check_softmax),
    Mutant("scale of dK", "sums_k * c.SCALE", "sums_k", check_softmax),
    Mutant("scale of fast dQ", 'input_precision="ieee")) * c.SCALE', 'input_precision="ieee"))', check_fast),
    Mutant("unit of the scores of dK", "* (c.SCALE * unit(c.KIND))  # [TK, TQ]", "* c.SCALE", check_softmax),
    Mutant("no mask", "& 1 != 0, s,", "& 1 >= 0, s,", check_partial_blocks),
    Mutant("second word", "_word(words, 1, slot", "_word(words, 0, slot", check_half),
    Mutant("word of a later tile", "+ column // 32\n", "\n", check_blocks_in_parts),
    Mutant("bits of a later byte", " >> columns // 8 * 8", "", check_partial_blocks),
    Mutant("bits within a byte", "word >> columns % 8 >>", "word >>", check_partial_blocks),
    Mutant("bits of a later tile", "columns += column % 32", "columns += 0", check_narrow_tiles),
    Mutant("slot", "(slot.to(tl.int64) * c.BQ + rows)", "rows", check_partial_blocks),
    Mutant(
        "row of a later tile", "rows, columns = row + tl.arange", "rows, columns = tl.arange", check_blocks_in_parts
    ),
    Mutant("keys' end", "left - number * 32, 0), 32)", "left - number * 32 + 1, 0), 32)", check_whole_and_ragged),
    Mutant("ragged whole block", ">= 0, other=-1)", ">= 0, other=0)", check_whole_and_ragged),
    Mutant("queries' end", "[:, None] < length) &", "[:, None] <= length) &", check_softmax),
    Mutant("last block", "mass, 0, whole, queries", "mass, 0, whole - 1, queries", check_whole_blocks),
    Mutant("first block of dK", "sums_v, 0, whole, keys", "sums_v, 1, whole, keys", check_whole_blocks),
    Mutant("partial blocks of dQ", "_queries(sums, whole, count", "_queries(sums, whole, whole", check_partial_blocks),
    Mutant("rescale of the mass", "mass * shrink, raised", "mass, raised", check_softmax),
    Mutant("rescale of the sums", "sums * shrink[:, None], mass", "sums, mass", check_softmax),
    Mutant("empty level", "shrink = tl.exp2(level - ", "shrink = tl.exp2(level_of(level, c.KIND) - ", check_below_zero),
    Mutant("whole level", "return tl.ceil(top)", "return top", check_poly),
    Mutant("level in two passes", "level = _top(level, whole, count", "level = _top(level, whole, whole", check_poly_e),
    Mutant("sink in the level", "tl.maximum(level, logit)", "tl.maximum(level, logit - 1000.0)", check_high_sink),
    Mutant("sink in the mass", "mass += weight_of(logit", "mass += 0.0 * weight_of(logit", check_sink),
    Mutant("gradient of the sink", "-slope * inverse * delta", "-slope * delta", check_sink),
    Mutant("delta", "delta = tl.sum(o * d_o, 1)", "delta = tl.sum(o * o, 1)", check_softmax),
    Mutant("gradient of the LSE", "delta -= tl.load(d_mass", "delta += tl.load(d_mass", check_softmax),
    Mutant("folded mass", "row_level += tl.log2(", "row_level += tl.exp2(", check_half),
    Mutant("dQ without delta", "(_product(d_o, values) - delta[:, None])", "_product(d_o, values)", check_softmax),
    Mutant("dK without delta", "(_product(values, d_o) - delta[None, :])", "_product(values, d_o)", check_softmax),
    Mutant("slope of poly", "weight * inverse, slope * inverse", "weight * inverse, weight * inverse", check_poly),
    Mutant("number of keys", "if MASKED else c.TK", "if MASKED else c.TK + 1", check_relu),
    Mutant("number of kept keys", '"-inf"), 0.0, 1.0', '"-inf"), 1.0, 1.0', check_relu2),
    Mutant("no keys", "tl.where(mass == 0, 1.0, mass)[:, None]", "mass[:, None]", check_rows_without_keys),
    Mutant("bias of a block", "tl.load(bias + block).to", "tl.load(bias).to", check_bias),
    Mutant("bias of dK", "block.to(tl.int64) * key_blocks)", "block.to(tl.int64))", check_bias),
    Mutant(
        "gradient of the bias", "(block * c.BK + column) // c.TK, tl", "block * c.BK // c.TK, tl", check_blocks_in_parts
    ),
    Mutant(
        "gradient of the bias, fast", "tile = tile * (key_blocks", "tile = of_head * (key_blocks", check_bias_in_fast
    ),
    Mutant("group", "sequence % sizes.groups", "sequence // sizes.groups", check_groups),
    Mutant("table of a head", "head % sizes.table_heads", "0 * head", check_shared_heads),
    Mutant("heads that share", "head_k * c.SHARED + member", "head_k * c.SHARED", check_shared_heads),
    Mutant("stride", "head.to(tl.int64) * x.strides[1]", "head.to(tl.int64) * x.strides[2]", check_two_heads),
    Mutant("far", "x.x + base * c.VECTOR + within", "x.x + (base * c.VECTOR).to(tl.int32) + within", check_far),
    Mutant(
        "race",
        'tl.atomic_add(places, part, mask=_inside(start, q.length, c.TQ, c), sem="relaxed")',
        "tl.store(places, part, mask=_inside(start, q.length, c.TQ, c))",
        check_fast,
    ),
    Mutant("descriptor", "head, row, 0])", "head, row + 1, 0])", check_descriptors),
]


def test_mutants_are_seeded():
    source = inspect.getsource(true_kernels)
    assert len(MUTANTS) >= 20
    assert all(source.count(mutant.old) == 1 for mutant in MUTANTS)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_killed(mutant):
    assert_killed(mutant, true_kernels)
