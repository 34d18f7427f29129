"""Linear attention's kernels in the interpreter, against float64, as operators of PyTorch; and its memories."""

from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from stgen.ops.linear_attention import linear_attention, linear_attention_segments, unfit
from stgen.ops.linear_attention import triton as true_kernels
from stgen.ops.linear_attention.cut import WITHIN, Cut
from stgen.ops.linear_attention.library import (
    linear_attention_backward_op,
    linear_attention_op,
    linear_attention_segments_backward_op,
    linear_attention_segments_op,
)
from stgen.ops.linear_attention.reference import linear_attention_segments_reference
from stgen.testing.errors import assert_as_exact, poisoned
from stgen.testing.guard import far_apart, guard
from stgen.testing.mutants import Mutant, assert_killed

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Case:
    n: int = 70
    features: int = 16
    head_dim: int = 16
    chunk: int | None = None
    prefix: int = 0
    keys: int | None = None  # without chunk; n unless given
    masked: bool = False
    sequences: int = 2
    heads: int = 1
    holes: bool = False  # queries and keys without features
    shift: float = 1.0  # mean of the values
    layout: str = "heads first"  # or places first, or packed: parts of one projection
    dtype: torch.dtype = FP32
    value: torch.dtype | None = None  # of v, where it is another

    @property
    def m(self) -> int:
        return self.prefix + self.n if self.chunk else self.keys or self.n


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    d_out: Tensor
    mask: Tensor | None


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "heads first":
        return x
    x = x.transpose(1, 2).contiguous()
    if layout == "packed":
        x = torch.stack([x, x, x], 2)[:, :, 1]
    return x.transpose(1, 2)


def inputs_of(case: Case) -> Inputs:
    torch.manual_seed(0)
    s, h, n, m, value = case.sequences, case.heads, case.n, case.m, case.value or case.dtype
    q, k = torch.rand(s, h, n, case.features), torch.rand(s, h, m, case.features)
    if case.holes:
        q[:, :, ::3], k[:, :, ::2] = 0, 0
        q[-1, :, :, 2:], k[-1, :, :, :2] = 0, 0  # the last sequence has no mass at all
    v, d_out = torch.randn(s, h, m, case.head_dim) + case.shift, torch.randn(s, h, n, case.head_dim)
    mask = None
    if case.masked:  # all keys of the last of several sequences
        mask = torch.rand(s, m) < 0.6
        mask[:, 0], mask[1:] = True, mask[1:] & (torch.arange(1, s)[:, None] < s - 1)
    tensors = (q.to(case.dtype), k.to(case.dtype), v.to(value), d_out.to(value))
    return Inputs(*(laid_out(x, case.layout) for x in tensors), mask)


def by_definition(case: Case, inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients, computed in `dtype`: by all weights in float64, by running sums as the kernels otherwise."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    impl = "reference" if dtype == torch.float64 else "state"
    out = linear_attention(*leaves, key_mask=inputs.mask, chunk=case.chunk, prefix=case.prefix, impl=impl)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs.d_out.to(dtype))]


def compare(kernels: ModuleType, case: Case, inputs: Inputs | None = None) -> None:
    inputs = inputs or inputs_of(case)
    exact, baseline = by_definition(case, inputs, torch.float64), by_definition(case, inputs, FP32)
    cut = Cut.of(case.n, case.m, case.chunk, case.prefix)
    given = (inputs.q, inputs.k, inputs.v, inputs.mask)
    with poisoned(), guard():
        out, memory = kernels.forward(*given, cut)
        found = [out, *kernels.backward(inputs.d_out, *given, memory, cut)]
    for name, like, got, good, base in zip(
        ("out", "dq", "dk", "dv"), (inputs.v, inputs.q, inputs.k, inputs.v), found, exact, baseline, strict=True
    ):
        assert got.dtype == like.dtype
        assert_as_exact(got, good, base.to(got.dtype), name=f"{name} of {case}")


# ----------------------------------------------------------------------------------------------------------- memories


@dataclass(frozen=True)
class Memory:
    segment: int = 20
    delta: bool = False
    given: bool = True  # an incoming state


def compare_memory(kernels: ModuleType, case: Case, memory: Memory) -> None:
    inputs, sizes = inputs_of(case), (case.sequences, case.heads, case.features)
    state = torch.randn(*sizes, case.head_dim), torch.rand(sizes) + 0.5
    d_last = torch.randn(*sizes, case.head_dim), torch.randn(sizes)
    state = state if memory.given else tuple(torch.zeros_like(x) for x in state)

    def by_definition(dtype: torch.dtype) -> list[Tensor]:
        given = (inputs.q, inputs.k, inputs.v, *state)
        leaves = [x.detach().to(dtype).requires_grad_() for x in given]
        out, last = linear_attention_segments_reference(*leaves[:3], memory.segment, tuple(leaves[3:]), memory.delta)
        grads = [x.to(dtype) for x in (inputs.d_out, *d_last)]
        return [x.detach() for x in (out, *last, *torch.autograd.grad((out, *last), leaves, grads))]

    rest = memory.segment, memory.delta
    with poisoned(), guard():
        out, states = kernels.forward_memory(inputs.q, inputs.k, inputs.v, state if memory.given else None, *rest)
        *grads, d_first = kernels.backward_memory(inputs.d_out, d_last, inputs.q, inputs.k, inputs.v, states, *rest)
    found = [out, *(x[:, :, -1] for x in states), *grads, *d_first]
    names = ("out", "M", "z", "dq", "dk", "dv", "dM", "dz")
    for name, got, good, base in zip(names, found, by_definition(torch.float64), by_definition(FP32), strict=True):
        assert got.dtype == (FP32 if name in ("M", "z", "dM", "dz") else case.dtype)
        # Under the delta rule a state is as exact as the values that are read from it, and those as the inputs.
        got, base = got.to(case.dtype), base.to(case.dtype)
        assert_as_exact(got, good, base, name=f"{name} of {case} {memory}")


# ------------------------------------------------------------------------------------------------------- quick checks


def check_plain(kernels: ModuleType) -> None:
    compare(kernels, Case(n=40, keys=70, heads=2, layout="packed"))


def check_split(kernels: ModuleType) -> None:
    """Enough keys for several programs, the last one with fewer."""
    compare(kernels, Case(n=20, keys=1400, sequences=1))


def check_ragged(kernels: ModuleType) -> None:
    """Places behind the last one hold other numbers, not the end of memory."""
    case = Case(n=45, chunk=40, sequences=1)
    longer = inputs_of(replace(case, n=60))
    compare(kernels, case, Inputs(*(x[:, :, :45] for x in (longer.q, longer.k, longer.v, longer.d_out)), None))


def check_mask(kernels: ModuleType) -> None:
    compare(kernels, Case(masked=True))


def check_half(kernels: ModuleType) -> None:
    compare(kernels, Case(n=90, features=20, head_dim=72, dtype=FP16, shift=4))


def check_range_of_half(kernels: ModuleType) -> None:
    """States and masses far beyond the range of float16."""
    case = Case(n=600, sequences=1, dtype=FP16)
    inputs = inputs_of(case)
    compare(kernels, case, replace(inputs, q=200 * inputs.q, k=200 * inputs.k, v=50 * inputs.v))


def check_holes(kernels: ModuleType) -> None:
    compare(kernels, Case(n=30, holes=True))
    compare(kernels, Case(n=30, chunk=8, holes=True))


def check_frames(kernels: ModuleType) -> None:
    compare(kernels, Case(n=100, chunk=40, prefix=35, heads=2, masked=True, layout="places first"))


def check_causal(kernels: ModuleType) -> None:
    compare(kernels, Case(n=75, chunk=7, prefix=5, masked=True))


def check_columns(kernels: ModuleType) -> None:
    """Several tiles of the head dimension."""
    compare(kernels, Case(n=40, head_dim=72, chunk=8, sequences=1))


def check_memory(kernels: ModuleType) -> None:
    compare_memory(kernels, Case(heads=2), Memory())


def check_delta(kernels: ModuleType) -> None:
    compare_memory(kernels, Case(n=50, head_dim=72), Memory(delta=True))


def check_long_segments(kernels: ModuleType) -> None:
    compare_memory(kernels, Case(n=150, sequences=1), Memory(60, delta=True))


def check_delta_holes(kernels: ModuleType) -> None:
    compare_memory(kernels, Case(n=45, holes=True), Memory(delta=True, given=False))


def check_far_apart(kernels: ModuleType) -> None:
    """Offsets of sequences, heads and places beyond int32, from strides within it."""
    case = Case(n=3, keys=3, sequences=3, heads=3)
    inputs = inputs_of(case)
    for axis in range(3):
        moved = [far_apart(x.transpose(0, axis), 2**30 + 8).transpose(0, axis) for x in (inputs.q, inputs.k, inputs.v)]
        d_out = far_apart(inputs.d_out.transpose(0, axis), 2**30 + 8).transpose(0, axis)
        compare(kernels, case, Inputs(*moved, d_out, None))


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS)
def test_quick(check):
    check(true_kernels)


# ------------------------------------------------------------------------------------------------------------- shapes

SHAPES = {
    "one query": Case(1, keys=3, shift=0),
    "two keys, many queries": Case(9, keys=2, shift=0),
    "a tile less one": Case(31, sequences=1),
    "a tile": Case(32, sequences=1),
    "a tile and one": Case(33, sequences=1),
    "odd sizes": Case(65, 5, 3, keys=77),
    "128 features": Case(40, 128, 128, sequences=1),
    "72 by 80, mask": Case(50, 72, 80, masked=True),
    "heads, packed": Case(40, 32, 64, heads=3, layout="packed"),
    "a chunk less one": Case(2 * WITHIN - 1, chunk=WITHIN - 1, sequences=1),
    "a chunk": Case(2 * WITHIN, chunk=WITHIN, sequences=1),
    "a chunk and one": Case(2 * WITHIN + 3, chunk=WITHIN + 1, sequences=1),
    "causal": Case(50, chunk=1, prefix=1),
    "frames, ragged, mask": Case(90, 20, 40, chunk=40, prefix=3, masked=True),
    "one chunk, long prefix": Case(20, chunk=50, prefix=90, heads=2),
    "causal, 128 features": Case(40, 128, 64, chunk=5, prefix=4, sequences=1),
}
MEMORIES = {
    "short last": (Case(50), Memory()),
    "one segment": (Case(30), Memory(40)),
    "128 features, empty": (Case(40, 128, 48, sequences=1), Memory(15, given=False)),
    "delta": (Case(50, 20, 40, sequences=1, heads=2, layout="places first"), Memory(delta=True)),
    "delta, one segment": (Case(30), Memory(40, delta=True)),
    "delta, empty": (Case(40, 16, 16), Memory(15, True, False)),
    "delta, 128 features": (Case(50, 128, 64, sequences=1), Memory(25, True)),
}


@pytest.mark.parametrize("dtype", [FP32, FP16])
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_shapes(case, dtype):
    compare(true_kernels, replace(case, dtype=dtype))


@pytest.mark.parametrize("dtype", [FP32, FP16])
@pytest.mark.parametrize(("case", "memory"), MEMORIES.values(), ids=MEMORIES)
def test_memories(case, memory, dtype):
    compare_memory(true_kernels, replace(case, dtype=dtype), memory)


@pytest.mark.parametrize("name", ["72 by 80, mask", "frames, ragged, mask", "causal"])
def test_bfloat16(name):
    compare(true_kernels, replace(SHAPES[name], dtype=BF16))


def test_bfloat16_delta():
    compare_memory(true_kernels, replace(MEMORIES["delta"][0], dtype=BF16), Memory(delta=True))


def test_features_of_32_bits_and_values_of_16():
    compare(true_kernels, Case(n=40, chunk=8, value=BF16))


@pytest.mark.parametrize("chunk", [None, 8, 40])
def test_order_of_programs_changes_nothing(chunk):
    case = Case(n=70, chunk=chunk, sequences=1, heads=2)
    inputs, cut = inputs_of(case), Cut.of(case.n, case.m, chunk, 0)
    results = []
    for seed in (None, 1):
        with guard(shuffle=seed):
            out, memory = true_kernels.forward(inputs.q, inputs.k, inputs.v, None, cut)
            grads = true_kernels.backward(inputs.d_out, inputs.q, inputs.k, inputs.v, None, memory, cut)
        results.append((out, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---------------------------------------------------------------------------------------------- the definition itself


def segment_by_segment(q: Tensor, k: Tensor, v: Tensor, segment: int, delta: bool) -> Tensor:
    """One head, one place after the other, from an empty memory: q, k [n, F], v [n, D]."""
    writes: list[tuple[Tensor, Tensor]] = []  # key and what was written for it
    out = []
    for first in range(0, len(q), segment):
        last = min(first + segment, len(q))

        def read(x: Tensor) -> Tensor:
            weights = [x @ key for key, _ in writes]  # noqa: B023
            total = sum(weights, x.new_zeros(()))
            values = sum((w * value for w, (_, value) in zip(weights, writes, strict=True)), x.new_zeros(v.shape[1]))  # noqa: B023
            return values / total if total > 0 else torch.zeros_like(values)

        out += [read(q[i]) for i in range(first, last)]
        writes += [(k[i], v[i] - read(k[i]) if delta else v[i]) for i in range(first, last)]
    return torch.stack(out)


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("segment", [1, 4, 11, 20])
def test_segments_read_what_earlier_ones_wrote(segment, delta):
    inputs = inputs_of(Case(11, 3, 2, sequences=1, dtype=torch.float64, holes=segment == 4))
    out, _ = linear_attention_segments(inputs.q, inputs.k, inputs.v, segment, delta=delta)
    expected = segment_by_segment(inputs.q[0, 0], inputs.k[0, 0], inputs.v[0, 0], segment, delta)
    torch.testing.assert_close(out[0, 0], expected, rtol=0, atol=1e-12)
    assert not out[:, :, :segment].any()


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_sequence_may_be_read_in_parts(impl, delta):
    inputs = inputs_of(Case(48))
    whole, last = linear_attention_segments(inputs.q, inputs.k, inputs.v, 8, delta=delta, impl=impl)
    parts, state = [], None
    for q, k, v in zip(*(x.split(24, dim=2) for x in (inputs.q, inputs.k, inputs.v)), strict=True):
        out, state = linear_attention_segments(q, k, v, 8, state, delta=delta, impl=impl)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("delta", [False, True])
def test_gradients_of_memories_are_those_of_finite_differences(delta):
    inputs = inputs_of(Case(5, 3, 2, sequences=1, dtype=torch.float64))
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    state = [torch.rand(1, 1, 3, 2).double().requires_grad_(), torch.rand(1, 1, 3).double().requires_grad_()]

    def run(q, k, v, m, z):
        out, last = linear_attention_segments(q, k, v, 2, (m, z), delta=delta)
        return out, *last

    assert torch.autograd.gradcheck(run, [*leaves, *state])


def test_sixteen_bits_under_autocast_keep_a_state_of_thirty_two():
    inputs = inputs_of(Case(40, dtype=BF16))
    with torch.autocast("cpu", BF16):
        out, state = linear_attention_segments(inputs.q, inputs.k, inputs.v, 10)
    assert out.dtype == BF16 and all(x.dtype == FP32 for x in state)


# ---------------------------------------------------------------------------------------------- operators of PyTorch


def leaves_of(inputs: Inputs) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]


@pytest.mark.parametrize("case", [Case(20, masked=True, sequences=1), Case(20, chunk=4, prefix=2, sequences=1)])
def test_operator(case):
    inputs = inputs_of(case)
    rest = inputs.mask, case.chunk, case.prefix
    torch.library.opcheck(linear_attention_op, (*leaves_of(inputs), *rest))
    with torch.no_grad():
        _, m, z = linear_attention_op(inputs.q, inputs.k, inputs.v, *rest)
        given = (inputs.d_out, inputs.q, inputs.k, inputs.v, inputs.mask, m, z, case.chunk, case.prefix)
        torch.library.opcheck(linear_attention_backward_op, given)


def test_operator_of_memories():
    inputs = inputs_of(Case(12, sequences=1))
    m, z = torch.rand(1, 1, 16, 16, requires_grad=True), torch.rand(1, 1, 16, requires_grad=True)
    torch.library.opcheck(linear_attention_segments_op, (*leaves_of(inputs), m, z, 8, True))
    with torch.no_grad():
        _, _, _, ms, zs = linear_attention_segments_op(inputs.q, inputs.k, inputs.v, m, z, 8, True)
        given = (inputs.d_out, m, z, inputs.q, inputs.k, inputs.v, ms, zs, 8, True)
        torch.library.opcheck(linear_attention_segments_backward_op, given)


@pytest.mark.parametrize("chunk", [None, 4, 40])
def test_gradients_through_autograd(chunk):
    """Of an expanded gradient, whose rows share memory."""
    grads = []
    for impl in ("reference", "triton"):
        leaves = leaves_of(inputs_of(Case(45, chunk=chunk)))
        linear_attention(*leaves, chunk=chunk, impl=impl).sum().backward()
        grads.append([x.grad for x in leaves])
    for exact, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("used", ["out", "state", "both"])
def test_gradients_of_memories_through_autograd(used):
    grads = []
    for impl in ("reference", "triton"):
        leaves = leaves_of(inputs_of(Case(45)))
        start = torch.ones(2, 1, 16, 16, requires_grad=True), torch.ones(2, 1, 16, requires_grad=True)
        out, (m, z) = linear_attention_segments(*leaves, 20, start, delta=True, impl=impl)
        loss = (out.square().sum() if used != "state" else 0) + (m.sum() + z.sum() if used != "out" else 0)
        grads.append(torch.autograd.grad(loss, [*leaves, *start], materialize_grads=True))
    for exact, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-3)


def test_compiles_without_breaking_the_graph():
    leaves = leaves_of(inputs_of(Case(20, sequences=1)))

    def loss(q, k, v):
        out, (m, _) = linear_attention_segments(q, k, v, 8, impl="triton")
        return (linear_attention(q, k, v, chunk=4, impl="triton") * out).sum() + m.sum()

    expected = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for x, y in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(x, y)


def test_second_derivatives_are_refused():
    leaves = leaves_of(inputs_of(Case(20, sequences=1)))
    out = linear_attention(*leaves, impl="triton")
    (grad,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="linear_attention_backward"):
        grad.sum().backward()


def test_unfit_calls():
    phi, v = torch.ones(1, 1, 4, 3), torch.ones(1, 1, 4, 2)
    wide = torch.ones(1, 1, 4, 129)
    for call, reason in [
        ((phi.double(), phi, v), "phi_q is float64"),
        ((phi, wide, v), "the last axis of phi_k is 129"),
        ((phi[:, :, :0], phi, v), "phi_q is empty"),
        ((phi, phi.half(), v), "phi_q and phi_k differ in type"),
    ]:
        assert reason in (unfit(*call) or "")
    with pytest.raises(ValueError, match="triton cannot do this linear attention: v is float64"):
        linear_attention(phi, phi, v.double(), impl="triton")
    with pytest.raises(ValueError, match="phi_q is float64"):
        linear_attention_segments(phi.double(), phi, v, 2, impl="triton")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"impl": "fast"}, "impl should be auto, reference or triton, got 'fast'"),
        ({"segment": 0}, "segment should be at least 1 place, got 0"),
        ({"v": torch.ones(1, 1, 5, 2)}, "should have the same sequences, heads and places"),
        ({"state": (torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3))}, r"shape \[1, 1, 3, 2\] here, got \[1, 1, 3, 3\]"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    phi, v = torch.ones(1, 1, 4, 3), torch.ones(1, 1, 4, 2)
    with pytest.raises(ValueError, match=message):
        linear_attention_segments(**{"phi_q": phi, "phi_k": phi, "v": v, "segment": 2, **options})


# ------------------------------------------------------------------------------------------------------------ mutants

MUTANTS = [
    Mutant("z of the mask's keys", "return inside & (tl.load(mask", "return inside | (tl.load(mask", check_mask),
    Mutant("mask of the first sequence", "(sequence_head // heads).to(tl.int64) * stride", "0 * stride", check_mask),
    Mutant("inverse without mass", "mass == 0.0, 0.0, 1.0 /", "mass == 0.0, 1.0, 1.0 /", check_delta_holes),
    Mutant("low halves left out", "acc = tl.dot(a_high, b_low, acc)", "acc = acc", check_half),
    Mutant("low halves of weights left out", "acc = tl.dot(a_low, b_high, acc)", "acc = acc", check_half),
    Mutant("state in the type of the inputs", "if a.dtype != tl.bfloat16:", "if False:", check_half),
    Mutant("head's stride for the sequence",
           "sequence * (strides[0] * VEC)", "sequence * (strides[1] * VEC)", check_plain),
    Mutant("strides in 32 bits", "(sequence_head // heads).to(tl.int64), (sequence_head % heads).to(tl.int64)",
           "sequence_head // heads, sequence_head % heads", check_far_apart),
    Mutant("last range too long", "tl.minimum(prefix + number * size, rows)", "prefix + number * size", check_ragged),
    Mutant("prefix in every range", "tl.where(number == 0, 0, prefix + (number - 1) * size)",
           "tl.where(number == 0, 0, (number - 1) * size)", check_frames),
    Mutant("sums of the first tile", "for start in range(first, last, BLOCK_N):\n        row = (start",
           "for start in range(first, last, BLOCK_N):\n        row = (first", check_split),
    Mutant("z unweighted", "tl.load(weight + at, mask=inside, other=0.0)[:, None], 0)",
           "tl.load(scale + at, mask=inside, other=0.0)[:, None], 0)", check_plain),
    Mutant("gradients not divided by the mass",
           "y = y.to(tl.float32) * tl.load(scale + at, mask=inside, other=0.0)[:, None]",
           "y = y.to(tl.float32)", check_plain),
    Mutant("no running sum", "carry += tl.load(at", "carry = tl.load(at", check_frames),
    Mutant("gradients summed forward", "_scan(d_memory, reverse=True)", "_scan(d_memory)", check_frames),
    Mutant("later chunks seen", "(keys // chunk)[None, :] <= (queries // chunk)[:, None]",
           "(keys // chunk)[None, :] >= (queries // chunk)[:, None]", check_causal),
    Mutant("own chunk unseen", "(keys // chunk)[None, :] <= (queries // chunk)[:, None]",
           "(keys // chunk)[None, :] < (queries // chunk)[:, None]", check_causal),
    Mutant("mass without the segment", "mass += tl.sum(w, 1)\n    inverse = _inverse(mass)\n    for",
           "inverse = _inverse(mass)\n    for", check_causal),
    Mutant("first columns alone", "d = column + tl.arange(0, BLOCK_D)\n        num =",
           "d = tl.arange(0, BLOCK_D)\n        num =", check_columns),
    Mutant("output not divided", "num * inverse[:, None], D)", "num, D)", check_plain),
    Mutant("no gradient through the mass", "c = -(dot * inverse) * inverse", "c = dot * 0.0", check_plain),
    Mutant("mass divided by once", "c = -(dot * inverse) * inverse", "c = -(dot * inverse)", check_plain),
    Mutant("dq without z",
           "dq = dq * inverse[:, None] + c[:, None] * z[None, :]", "dq = dq * inverse[:, None]", check_plain),
    Mutant("dq without the segment", "dq = _product(dw, k_tile, dq, EXACT)", "dq = dq", check_causal),
    Mutant("dw without its mass", "dw = tl.where(seen, dw * inverse[:, None] + c[:, None], 0.0)\n        dk",
           "dw = tl.where(seen, dw * inverse[:, None], 0.0)\n        dk", check_causal),
    Mutant("dw of unseen pairs", "dw = tl.where(seen, dw * inverse[:, None] + c[:, None], 0.0)\n        dq",
           "dw = dw * inverse[:, None] + c[:, None]\n        dq", check_causal),
    Mutant("dv without the segment", "dv = _product(tl.trans(w), g.to(tl.float32) * inverse[:, None], dv, EXACT)",
           "dv = dv", check_causal),
    Mutant("dv of masked keys", "dv = tl.where(shown[:, None], dv, 0.0)", "dv = dv + 1.0", check_mask),
    Mutant("dk of masked keys", "tl.where(shown[:, None], dk + _total(d_total, after, f, F)[None, :], 0.0)",
           "dk + _total(d_total, after, f, F)[None, :]", check_mask),
    Mutant("dk without z", "dk + _total(d_total, after, f, F)[None, :], 0.0)", "dk, 0.0)", check_plain),
    Mutant("delta adds what is there",
           "v_tile.to(tl.float32) - a, next_m", "v_tile.to(tl.float32) + a, next_m", check_delta),
    Mutant("delta's z not written", "next_z += tl.sum(k_tile.to(tl.float32), 0)", "next_z += 0.0", check_delta),
    Mutant("delta reads what it writes",
           "m, z, number = next_m, next_z, number + 1", "z, number = next_z, number + 1", check_delta),
    Mutant("delta's gradient through M left out", "next_r = _product(tl.trans(k_tile), -du, next_r, EXACT)",
           "next_r = next_r", check_delta),
    Mutant("delta's gradient through z left out", "return d_state, d_total + behind.sum(3)",
           "return d_state, d_total", check_delta),
    Mutant("z of the state while it is summed",
           "inverse = _inverse(tl.sum(k_tile.to(tl.float32) * z[None, :], 1))\n            a = ",
           "inverse = _inverse(tl.sum(k_tile.to(tl.float32) * next_z[None, :], 1))\n            a = ", check_long_segments),
    Mutant("parts of the first tile", "d_total + behind.sum(3)", "d_total + behind[..., 0, :]", check_delta),
    Mutant("dk without h", "dk = _product(-dv * inverse[:, None], tl.trans(m), dk, EXACT)", "dk = dk", check_delta),
    Mutant("dk without e", "dk += e[:, None] * z[None, :]", "dk += 0.0", check_delta),
    Mutant("incoming state ignored", "            _put_in(states, 0, memory)", "            pass", check_memory),
    Mutant("gradient of the last state ignored", "_put_in(d_states, -1, d_last)", "pass", check_memory),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_killed(mutant):
    assert_killed(mutant, true_kernels)
