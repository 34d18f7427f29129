"""The harness of kernel tests is itself tested: repairs give a GPU's numbers, and every fault it is for is caught."""

import contextlib
import math
import sys
import types

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from stgen.testing.cost import H200, Work, balance, counters, occupancy, predict
from stgen.testing.errors import assert_as_exact, poisoned
from stgen.testing.guard import GuardError, far_apart, guard
from stgen.testing.interpreter import Patches, interpreting, repair
from stgen.testing.mutants import Mutant, assert_killed, mutated

pytestmark = pytest.mark.skipif(not interpreting(), reason="kernels run compiled here; this tests the interpreter")

bf16 = torch.bfloat16


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------ repairs


@triton.jit
def binary(A, B, C, OPERATION: tl.constexpr):
    i = tl.arange(0, 256)
    a, b = tl.load(A + i), tl.load(B + i)
    if OPERATION == "add":
        c = a + b
    elif OPERATION == "mul":
        c = a * b
    elif OPERATION == "div":
        c = a / b
    elif OPERATION == "max":
        c = tl.maximum(a, b)
    elif OPERATION == "abs":
        c = tl.abs(a)
    elif OPERATION == "where":
        c = tl.where(a < b, a, 0.0)
    elif OPERATION == "masked":
        c = tl.load(A + i, mask=i < 100, other=1.5)
    elif OPERATION == "row maximum":
        c = b + tl.max(a, 0)
    elif OPERATION == "bits":
        c = a.to(tl.int16, bitcast=True).to(tl.bfloat16, bitcast=True)
    elif OPERATION == "fp32 sum":
        c = a.to(tl.float32) + b
    tl.store(C + i, c)


EXPECTED = {
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a.float() / b.float(),
    "max": torch.maximum,
    "abs": lambda a, b: a.abs(),
    "where": lambda a, b: torch.where(a < b, a, 0.0),
    "masked": lambda a, b: torch.where(torch.arange(256) < 100, a, 1.5),
    "row maximum": lambda a, b: b + a.max(),
    "bits": lambda a, b: a,
    "fp32 sum": lambda a, b: a.float() + b,
}


@pytest.mark.parametrize("operation", EXPECTED)
def test_bf16_arithmetic_rounds_as_torch_does(operation):
    a, b = torch.randn(2, 256).to(bf16)
    expected = EXPECTED[operation](a, b)
    got = torch.empty_like(a if operation == "div" else expected)
    binary[(1,)](a, b, got, operation)
    assert torch.equal(got, expected.to(got.dtype))


@triton.jit
def copy(A, B, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(B + i, tl.load(A + i, mask=i < n), mask=i < n)


@pytest.mark.parametrize("to", [torch.float32, torch.float16, torch.int32])
def test_bf16_casts_round_to_nearest_even(to):
    x = (torch.randn(256) * 100).to(to)
    special = torch.tensor([1.00390625, 1.01171875, torch.inf, -torch.inf, torch.nan, -0.0, 3.4e38, 1e-40])
    x[:8] = special.to(to) if to.is_floating_point else x[:8]
    if to == torch.float32:
        x.view(torch.int32)[8] = 2**31 - 1  # the NaN that rounding up would make -0
    down, up = torch.empty(256, dtype=bf16), torch.empty_like(x)
    copy[(1,)](x, down, 256, 256)
    assert torch.equal(down.nan_to_num(7), x.to(bf16).nan_to_num(7))
    if to.is_floating_point:
        copy[(1,)](down, up, 256, 256)
        assert torch.equal(up.nan_to_num(7), down.to(to).nan_to_num(7))


@triton.jit
def product(A, B, C, PRECISION: tl.constexpr):
    i, j = tl.arange(0, 32)[:, None], tl.arange(0, 32)[None, :]
    tl.store(
        C + i * 32 + j, tl.dot(tl.load(A + i * 32 + j), tl.trans(tl.load(B + i * 32 + j)), input_precision=PRECISION)
    )


@pytest.mark.parametrize(
    ("dtype", "precision", "low", "high"),
    [(bf16, "tf32", 0, 1e-6), (torch.float32, "tf32", 1e-4, 1e-3), (torch.float32, "ieee", 0, 1e-6)],
)
def test_dots_have_the_errors_of_their_precision(dtype, precision, low, high):
    a, b = torch.randn(2, 32, 32).to(dtype)
    got = torch.empty(32, 32)
    product[(1,)](a, b, got, precision)
    exact = a.double() @ b.double().T
    assert low <= (got - exact).norm() / exact.norm() <= high


@triton.jit
def gather_add(A, Index, Sum, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.atomic_add(Sum + tl.load(Index + i), tl.load(A + tl.program_id(0) * BLOCK + i))


def test_bf16_atomics_add_up_lanes_that_share_an_address():
    a, total = torch.ones(64, dtype=bf16), torch.zeros(4, dtype=bf16)
    gather_add[(4,)](a, torch.arange(16) % 4, total, 16)
    assert total.tolist() == [16] * 4


@triton.jit
def sum_of_first(X, Count, Y):
    total = 0.0
    for i in range(tl.load(Count)):
        for _ in tl.range(0, tl.load(Count)):
            total += tl.load(X + i)
    tl.store(Y, total)


def test_loops_may_end_at_loaded_numbers():
    y = torch.empty(1)
    sum_of_first[(1,)](torch.arange(5.0), torch.tensor([3], dtype=torch.int32), y)
    assert y.item() == 3 * (0 + 1 + 2)


def test_repair_twice_is_once_and_unknown_names_are_told():
    from triton.runtime.interpreter import InterpreterBuilder

    before = InterpreterBuilder.create_dot
    repair()
    assert InterpreterBuilder.create_dot is before
    with pytest.raises(RuntimeError, match=r"has no InterpreterBuilder.nothing.*3.6 and 3.9"):
        Patches().on(InterpreterBuilder, "nothing")


# ------------------------------------------------------------------------------------------------ guard


@triton.jit
def copy_unmasked(A, B, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(B + i, tl.load(A + i), mask=i < n)


@triton.jit
def add_into(A, B, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(B + i, tl.load(B + i) + tl.load(A + tl.program_id(0) * BLOCK + i))


@triton.jit
def store_all(A, B, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(B + i, tl.load(A + tl.program_id(0) * BLOCK + i))


@triton.jit
def add_left_neighbour(A, B, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(B + i, tl.load(A + i) + tl.load(B + i - BLOCK, mask=i >= BLOCK, other=0.0))


@triton.jit
def scatter(A, Index, B, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(B + tl.load(Index + i), tl.load(A + i))


@triton.jit
def do(X, KIND: tl.constexpr):
    i = tl.arange(0, 16)
    if KIND == "load" or KIND == "load and store":
        tl.load(X + i)
    if KIND == "store" or KIND == "load and store":
        tl.store(X + i, 1.0)
    if KIND == "atomic":
        tl.atomic_add(X + i, 1.0)


@triton.jit
def do_all_and_last(X, ALL: tl.constexpr, LAST: tl.constexpr):
    if tl.program_id(0) < tl.num_programs(0) - 1:
        do(X, ALL)
    else:
        do(X, LAST)


@triton.jit
def offset_of_program(Y, stride):
    tl.store(Y + tl.program_id(0), tl.program_id(0) * stride)


@triton.jit
def copy_rows(A, B, stride, columns, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    j = tl.arange(0, BLOCK)
    if WIDE:
        tl.store(B + row * columns + j, tl.load(A + row.to(tl.int64) * stride + j, mask=j < columns), mask=j < columns)
    else:
        tl.store(B + row * columns + j, tl.load(A + row * stride + j, mask=j < columns), mask=j < columns)


@triton.jit
def copy_described(a, b, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS
    b.store([row, 0], a.load([row, 0]))


def test_guard_lets_correct_kernels_pass():
    a = torch.randn(50)
    b = torch.full((50,), torch.nan)
    with guard(), guard(shuffle=1):
        copy[(4,)](a, b, 50, 16)
        gather_add[(4,)](torch.randn(64), torch.arange(16) % 4, torch.zeros(4), 16)
        scatter[(1,)](torch.ones(16), torch.zeros(16, dtype=torch.int64), torch.zeros(1), 16)
        offset_of_program[(3,)](torch.zeros(3, dtype=torch.int32), 2**30 - 1)
    assert torch.equal(a, b)


def test_loads_out_of_bounds_are_told():
    with (
        pytest.raises(GuardError, match=r"copy_unmasked: program \(3, 0, 0\): load .* 14 of 16 lanes, first 50 .* A"),
        guard(),
    ):
        copy_unmasked[(4,)](torch.zeros(50), torch.zeros(50), 50, 16)


def test_stores_out_of_bounds_are_told():
    with (
        pytest.raises(GuardError, match=r"program \(2, 0, 0\): store out of bounds in 8 of 16 lanes, first 40 .* B"),
        guard(),
    ):
        copy[(4,)](torch.zeros(50), torch.zeros(40), 50, 16)


def test_gaps_of_strided_views_are_out_of_bounds():
    left_halves = torch.zeros(4, 20)[:, :10]
    with pytest.raises(GuardError, match="load out of bounds in 6 of 16 lanes, first 10"), guard():
        copy_unmasked[(1,)](left_halves, torch.zeros(16), 16, 16)
    with guard():
        copy_rows[(4,)](left_halves, torch.zeros(4, 10), 20, 10, True, 16)


def test_overruns_into_another_argument_are_out_of_bounds():
    room = torch.zeros(100)
    with (
        pytest.raises(GuardError, match="load out of bounds in 14 of 16 lanes, first 50 elements after the first of A"),
        guard(),
    ):
        copy_unmasked[(4,)](room[:50], room[50:], 50, 16)


def test_atomics_out_of_bounds_are_told():
    with pytest.raises(GuardError, match="atomic out of bounds"), guard():
        gather_add[(1,)](torch.ones(16), torch.arange(16), torch.zeros(15), 16)


def test_descriptors_are_bounded_by_their_shape_and_by_their_tensor():
    a, b = torch.randn(20, 16), torch.full((20, 16), torch.nan)
    with guard():
        copy_described[(2,)](describe(a), describe(b), 16)
    assert torch.equal(a, b)
    room = torch.zeros(40, 16)
    too_long = TensorDescriptor(room[:20], [24, 16], [16, 1], [16, 16])
    with pytest.raises(GuardError, match="load out of bounds in 64 of 128 lanes"), guard():
        copy_described[(2,)](too_long, describe(room[20:]), 16)


def describe(x):
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [16, 16])


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        (add_into, "race: load by program .* store by program number 0; 0 elements after the first of B"),
        (store_all, "race: store by program .* store by program number 0"),
        (add_left_neighbour, "race: load by program .* store by program number 0"),
    ],
)
def test_races_between_programs_are_told(kernel, fault):
    with pytest.raises(GuardError, match=fault), guard():
        kernel[(4,)](torch.randn(64), torch.zeros(64), 16)


@pytest.mark.parametrize(
    ("first", "last", "race"),
    [
        ("load", "load", None),
        ("load", "store", "store by .* load by several"),
        ("load", "load and store", "store by .* load by several"),
        ("load", "atomic", "atomic by .* load by several"),
        ("store", "load", "store by program .* store by program number 0"),
        ("atomic", "load", "load by .* atomic by several"),
        ("atomic", "store", "store by .* atomic by several"),
        ("atomic", "atomic", None),
    ],
)
def test_what_programs_may_do_to_memory_of_another(first, last, race):
    context = contextlib.nullcontext() if race is None else pytest.raises(GuardError, match=race)
    with context, guard():
        do_all_and_last[(3,)](torch.zeros(16), first, last)


@pytest.mark.parametrize(("last", "race"), [("load", "load by .* store by"), ("atomic", "atomic by .* store by")])
def test_what_one_program_stores_is_its_own(last, race):
    with pytest.raises(GuardError, match=race), guard():
        do_all_and_last[(2,)](torch.zeros(16), "store", last)


def test_neighbouring_elements_of_a_narrow_view_are_apart():
    room = torch.zeros(64)
    with guard():
        copy[(16,)](room, room[32:].view(torch.float16), 16, 1)


def test_a_store_after_others_load_is_a_race():
    x = torch.randn(64)
    with pytest.raises(GuardError, match=r"race: store by program .* load by program number 1"), guard(shuffle=0):
        add_left_neighbour[(2,)](torch.zeros(64), x, 32)


def test_lanes_that_store_different_values_at_one_address_are_told():
    with (
        pytest.raises(GuardError, match=r"two lanes of program \(0, 0, 0\) store different values, 1 elements after"),
        guard(),
    ):
        scatter[(1,)](torch.arange(16.0), torch.tensor([0] + [1] * 2 + list(range(2, 15))), torch.zeros(16), 16)


def test_shuffled_programs_run_each_once_in_another_order():
    x = torch.randn(64)
    usual, shuffled = torch.zeros(64), torch.zeros(64)
    add_left_neighbour[(4,)](x, usual, 16)
    with guard(races=False, shuffle=1):
        add_left_neighbour[(4,)](x, shuffled, 16)
        copied = torch.zeros(64)
        copy[(4,)](x, copied, 64, 16)
    assert not torch.equal(usual, shuffled)
    assert torch.equal(copied, x)


def test_int32_overflow_is_told():
    with pytest.raises(GuardError, match=r"program \(2, 0, 0\): int32 multiply overflows, .* 2147483650;"), guard():
        offset_of_program[(3,)](torch.zeros(3, dtype=torch.int32), 2**30 + 1)


def test_offsets_beyond_int32_reach_the_right_memory_only_if_wide():
    x = torch.randn(3, 10).half()
    far, y = far_apart(x), torch.zeros_like(x)
    assert torch.equal(far, x) and far.stride() == (2**30, 1)
    with guard():
        copy_rows[(3,)](far, y, far.stride(0), 10, True, 16)
    assert torch.equal(x, y)
    for int32, fault in ((True, "int32 multiply overflows"), (False, "load out of bounds in 10 of 10 lanes")):
        with pytest.raises(GuardError, match=fault), guard(int32=int32):
            copy_rows[(3,)](far, y, far.stride(0), 10, False, 16)


@pytest.mark.parametrize(("slices", "stride"), [(2, 2**30), (3, 2**31)])
def test_slices_that_would_show_no_overflow_are_refused(slices, stride):
    with pytest.raises(ValueError, match="the stride should fit int32"):
        far_apart(torch.zeros(slices, 2), stride)


# ------------------------------------------------------------------------------------------------ errors and mutants


def test_errors_are_measured_by_the_baseline():
    exact = torch.randn(100, dtype=torch.float64)
    baseline = exact * (1 + 1e-3)
    assert_as_exact(exact * (1 + 1.4e-3), exact, baseline)
    with pytest.raises(AssertionError, match=r"dq: relative rms error 0.0016 > 0.0015"):
        assert_as_exact(exact * (1 + 1.6e-3), exact, baseline, name="dq")
    assert_as_exact(exact * (1 + 1.6e-3), exact, baseline, factor=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, bf16])
def test_rounding_alone_passes_even_beside_an_exact_baseline(dtype):
    exact = torch.randn(1000, dtype=torch.float64)
    assert_as_exact(exact.to(dtype), exact, exact)


def test_one_bad_element_among_many_is_told():
    exact = torch.randn(100_000, dtype=torch.float64)
    got = exact.to(bf16)
    got[5] += 0.2
    with pytest.raises(AssertionError, match=r"largest error .* at 5 of 100000"):
        assert_as_exact(got, exact, exact.to(bf16))


def test_infinities_should_agree_and_all_else_be_finite():
    exact = torch.tensor([0.5, -torch.inf], dtype=torch.float64)
    assert_as_exact(exact.float(), exact, exact.float())
    for wrong in ([0.5, 0.0], [0.5, torch.inf], [torch.nan, -torch.inf], [0.5, torch.nan]):
        with pytest.raises(AssertionError, match="1 of 2 elements are NaN"):
            assert_as_exact(torch.tensor(wrong), exact, exact.float())


def test_results_that_should_be_zero_are_zero():
    zero = torch.zeros(8, dtype=torch.float64)
    assert_as_exact(zero.half(), zero, zero.half())
    with pytest.raises(AssertionError, match="largest error"):
        assert_as_exact(zero.half() + 1e-4, zero, zero.half())


def test_noise_of_float64_where_terms_cancel_is_zero():
    noise = torch.randn(8, dtype=torch.float64) * 1e-17
    assert_as_exact(torch.full((8,), 1e-8), noise, torch.zeros(8))
    with pytest.raises(AssertionError, match="largest error"):
        assert_as_exact(torch.full((8,), 1e-5), noise, torch.zeros(8))


def test_poisoned_memory_shows_what_is_not_written():
    x = torch.randn(50)
    with poisoned():
        made = [torch.empty_like(x), x.new_empty(50), torch.empty(50), torch.empty_strided((50,), (1,))]
        copy[(2,)](x, made[0], 50, 16)
        assert torch.empty(3, dtype=torch.int64).shape == (3,)
    assert torch.equal(made[0][:32], x[:32])
    assert made[0][32:].isnan().all()
    assert all(m.isnan().all() for m in made[1:])
    assert torch.empty_like(x).shape == (50,)


@pytest.fixture
def module():
    """This file, as if it were the triton.py of an op."""
    return sys.modules[__name__]


def check_copy(kernels: types.ModuleType):
    x, y = torch.randn(50), torch.zeros(50)
    kernels.copy[(4,)](x, y, 50, 16)
    assert torch.equal(x, y)


def test_mutants_are_copies_with_one_edit(module):
    edit = "tl.store(B + i, tl.load(A + i, mask=i < n), mask=i < " + "n)"
    copy_ = mutated(module, edit, edit[:-2] + "n - 1)")
    assert copy_ is not module and sys.modules[module.__name__] is module
    check_copy(module)
    with pytest.raises(AssertionError):
        check_copy(copy_)
    for old, reason in (("copy_of_nothing" + "_here", "occurs 0 times"), ("tl.load", r"occurs \d\d times")):
        with pytest.raises(ValueError, match=reason):
            mutated(module, old, "x")


def test_mutants_should_die_by_an_assertion(module):
    edit = "tl.store(B + i, tl.load(A + i, mask=i < n), mask=i < " + "n)"
    assert_killed(Mutant("short", edit, edit[:-2] + "n - 1)", check_copy), module)
    assert_killed(Mutant("out of bounds", edit, edit[:-2] + "n + 1)", check_copy), module)
    with pytest.raises(AssertionError, match="mutant 'same' survived check_copy"):
        assert_killed(Mutant("same", edit, edit + "  #", check_copy), module)
    with pytest.raises(AssertionError, match=r"mutant 'typo' died of .*not by an assertion"):
        assert_killed(Mutant("typo", edit, "nonsense" + "(A)", check_copy), module)


def test_mutants_of_kernels_that_import_others_work():
    import stgen.ops.normaliser.triton as normaliser

    copy_ = mutated(normaliser, "return tl.exp2(s - level)", "return tl.exp2(level - s)")
    assert copy_.kernel_kind is not normaliser.kernel_kind and copy_.KINDS is normaliser.KINDS


# ------------------------------------------------------------------------------------------------ cost


@triton.jit
def exponential_scores(A, B, C, n, m, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, WIDTH)
    a = tl.load(A + i * WIDTH + d[None, :], mask=i < n, other=0.0)
    for start in range(0, m, COLUMNS):
        j = start + tl.arange(0, COLUMNS)[None, :]
        b = tl.load(B + j * WIDTH + d[:, None], mask=j < m, other=0.0)
        tl.store(C + i * m + j, tl.exp2(tl.dot(a, b)), mask=(i < n) & (j < m))


@pytest.mark.parametrize(("n", "m"), [(64, 64), (70, 100), (1, 33)])
def test_counters_agree_with_closed_formulas(n, m):
    width, rows, columns = 16, 32, 32
    a, b = torch.randn(n, width).half(), torch.randn(m, width).half()
    programs, tiles = -(-n // rows), -(-m // columns)
    with counters() as counts:
        exponential_scores[(programs,)](a, b, torch.empty(n, m), n, m, width, rows, columns)
    assert counts.programs == programs
    assert counts.flops == programs * tiles * rows * columns * width * 2
    assert counts.exponentials == programs * tiles * rows * columns
    assert counts.loaded == (n + programs * m) * width * a.element_size()
    assert (counts.stored, counts.updated) == (n * m * 4, 0)


@pytest.mark.parametrize(
    ("registers", "shared_kib", "warps", "blocks"),
    [
        (32, 0, 4, 16),
        (128, 0, 8, 2),
        (168, 0, 4, 3),
        (144, 0, 2, 6),
        (255, 0, 8, 1),
        (255, 0, 16, 0),
        (64, 100, 4, 2),
        (64, 228, 4, 0),
    ],
)
def test_occupancy_of_a_hopper_multiprocessor(registers, shared_kib, warps, blocks):
    assert occupancy(registers, shared_kib * 1024, warps) == blocks


def test_predictions_bound_by_the_slowest_unit_and_by_their_sum():
    work = Work(flops=790e9, bytes=4.3e8)  # 1 ms of products, 0.1 ms of memory
    even = predict(work, (132 * 2, 1, 1), 128, 0, 8)
    assert (even.bound, even.blocks, even.waves, even.efficiency) == ("tensor cores", 2, 1.0, 1.0)
    assert math.isclose(even.optimistic, 1e-3) and math.isclose(even.pessimistic, 1.1e-3)
    ragged = predict(work, (132 * 2 + 1, 1, 1), 128, 0, 8)
    assert math.isclose(ragged.optimistic, 2e-3 * 264 / 265, rel_tol=0.01)
    with pytest.raises(ValueError, match="does not fit on a multiprocessor of H200"):
        predict(work, (1,), 128, 400 * 1024, 8)


def test_balance_is_that_of_greedy_scheduling():
    assert balance([1, 1, 1, 1], 2) == 1
    assert balance([1, 1, 2, 4], 2) == (8 / 2) / 5
    uneven = predict(Work(flops=1e9), (4,), 128, 0, 8, programs=[1, 1, 1, 5])
    assert uneven.efficiency == 8 / (H200.multiprocessors * 2) / 5
