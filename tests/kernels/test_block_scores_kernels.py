"""Block selection's kernels in the interpreter, against sorting in PyTorch; sets and lists are compared exactly."""

from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor

from stgen.ops import block_scores as ops
from stgen.ops.block_scores import library
from stgen.ops.block_scores import triton as true_kernels
from stgen.ops.block_scores.reference import keep_above, keep_mass, keep_top, pool_reference
from stgen.ops.support import Support
from stgen.testing.errors import poisoned
from stgen.testing.guard import far_apart, guard
from stgen.testing.mutants import Mutant, assert_killed


@dataclass(frozen=True)
class Case:
    rule: str = "top"
    rows: int = 4
    columns: int = 13
    sequences: int = 2
    heads: int = 2
    groups: int = 1
    allowed_heads: int = 1
    share: float = 0.6
    ties: bool = False  # scores that are multiples of a half, both zeros among them
    size: float = 1.0
    shift: float = 0.0
    width: int | None = None
    whole: bool = False  # every block allowed


def scores_of(case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scores, what is allowed, and counts from none to more than there are."""
    g = torch.Generator().manual_seed(0)
    shape = case.sequences, case.heads, case.rows, case.columns
    scores = case.size * torch.randn(shape, generator=g) + case.shift
    if case.ties:
        scores = (2 * scores).round() / 2  # where a score rounds to zero it keeps its sign
    allowed = torch.rand(case.groups, case.allowed_heads, case.rows, case.columns, generator=g) < 0.7
    allowed[..., 0, :] = False
    most = case.width or case.columns + 1
    counts = torch.randint(0, most + 1, shape[:3], generator=g, dtype=torch.int32) if case.rule == "top" else None
    return scores, allowed | case.whole, counts


def kept_by_sorting(case: Case, scores: Tensor, allowed: Tensor, counts: Tensor | None) -> Tensor:
    allowed = ops.spread(allowed, scores)
    if case.rule == "top":
        assert counts is not None
        return keep_top(scores, allowed, counts)
    return (keep_mass if case.rule == "mass" else keep_above)(scores, allowed, case.share)


def listed(kept: Tensor, width: int) -> Tensor:
    """Lists in plain Python, padded with the first entry or 0."""
    rows = [[j for j, keep in enumerate(row) if keep] for row in kept.flatten(0, -2).tolist()]
    filled = [(row + [row[0] if row else 0] * width)[:width] for row in rows]
    return torch.tensor(filled, dtype=torch.int32).view(*kept.shape[:-1], width)


def compare(kernels: ModuleType, case: Case) -> None:
    scores, allowed, counts = scores_of(case)
    width = case.width or case.columns
    with poisoned(), guard():
        kept, number, lists = kernels.select(scores, allowed, counts, case.rule, case.share, width)
        turned_number, turned = kernels.transpose(kept, case.rows)
    expected = kept_by_sorting(case, scores, allowed, counts)
    assert torch.equal(kept, expected)
    assert torch.equal(number, expected.sum(-1, dtype=torch.int32))
    assert torch.equal(lists, listed(expected, width))
    assert torch.equal(turned_number, expected.sum(-2, dtype=torch.int32))
    assert torch.equal(turned, listed(expected.mT, case.rows))


# ------------------------------------------------------------------------------------------------------- quick checks


def check_top(kernels: ModuleType) -> None:
    compare(kernels, Case(sequences=1))


def check_ties(kernels: ModuleType) -> None:
    compare(kernels, Case(ties=True, rows=6, heads=1))


def check_neighbours(kernels: ModuleType) -> None:
    """Both zeros, which are equal, the least numbers beside them, infinities, and neighbours of float32."""
    row = torch.tensor([-0.0, 0.0, torch.inf, -torch.inf, -1.0, 1e-45, -1e-45, 3.0, 3.0000002, 3.0000002])
    scores, counts = row.expand(1, 1, 11, 10), torch.arange(11, dtype=torch.int32).view(1, 1, 11)
    allowed = torch.ones(1, 1, 11, 10, dtype=torch.bool)
    with guard():
        kept, _, _ = kernels.select(scores, allowed, counts, "top", 0.0, 10)
    assert torch.equal(kept, keep_top(scores, allowed, counts))


def check_large(kernels: ModuleType) -> None:
    """Scores far from 1, and far from 0."""
    compare(kernels, Case(size=1e6, sequences=1))
    compare(kernels, Case("above", shift=200, sequences=1, share=0.15))


def check_groups(kernels: ModuleType) -> None:
    compare(kernels, Case(groups=2, allowed_heads=2, sequences=4, rows=2, columns=5))


def check_mass(kernels: ModuleType) -> None:
    compare(kernels, Case("mass", rows=5))


def check_mass_ties(kernels: ModuleType) -> None:
    compare(kernels, Case("mass", ties=True, heads=1, share=0.5))


def check_all_the_mass(kernels: ModuleType) -> None:
    compare(kernels, Case("mass", share=1.0, sequences=1))


def check_above(kernels: ModuleType) -> None:
    compare(kernels, Case("above", share=0.15, rows=6))
    compare(kernels, Case("above", share=0.9, ties=True))


def check_width(kernels: ModuleType) -> None:
    """Lists that are narrower than rows, and a width that bounds the counts."""
    compare(kernels, Case(columns=20, width=5, sequences=1))
    scores, allowed, _ = scores_of(Case(sequences=1))
    many = torch.full(scores.shape[:3], 9, dtype=torch.int32)
    with guard():
        kept, number, _ = kernels.select(scores, allowed, many, "top", 0.0, 3)
    assert torch.equal(kept, keep_top(scores, ops.spread(allowed, scores), many.clamp(max=3)))
    assert int(number.max()) == 3


def check_long_columns(kernels: ModuleType) -> None:
    """Several tiles of rows and of columns in the transposed lists."""
    kept = torch.rand(1, 2, 150, 40, generator=torch.Generator().manual_seed(0)) < 0.05
    with poisoned(), guard():
        number, lists = kernels.transpose(kept, 20)
    assert torch.equal(number, kept.sum(-2, dtype=torch.int32)) and torch.equal(lists, listed(kept.mT, 20))


def check_pool(kernels: ModuleType) -> None:
    g = torch.Generator().manual_seed(0)
    for shape, block, groups, heads, layout in (
        ((4, 2, 75, 24), 16, 2, 1, (0, 2, 1, 3)),
        ((2, 3, 30, 20), 7, 1, 3, (1, 2, 0, 3)),
        ((1, 1, 900, 128), 200, 1, 1, (0, 1, 2, 3)),
    ):
        x = torch.randn(shape, generator=g)
        x = x.permute(layout).contiguous().permute([layout.index(axis) for axis in range(4)])
        filled = torch.rand(groups, heads, shape[2], generator=g) < 0.7
        filled[0, 0, :block] = False
        with poisoned(), guard():
            means = kernels.pool(x, filled, block)
        expected = pool_reference(x.double(), ops.spread(filled, x), block).float()
        torch.testing.assert_close(means, expected, rtol=1e-5, atol=1e-6)


def check_scores(kernels: ModuleType) -> None:
    g = torch.Generator().manual_seed(0)
    for rows, columns, depth in ((70, 130, 40), (3, 5, 16)):
        q, k = torch.randn(2, 2, rows, depth, generator=g), torch.randn(2, 2, columns, depth, generator=g)
        with poisoned(), guard():
            scores = kernels.scores(q, k)
        torch.testing.assert_close(scores, q @ k.mT * depth**-0.5, rtol=1e-5, atol=1e-5)


def check_far_apart(kernels: ModuleType) -> None:
    x, filled = torch.randn(3, 3, 5, 8), torch.ones(1, 1, 5, dtype=torch.bool)
    for axis in range(3):
        moved = far_apart(x.transpose(0, axis), 2**30 + 8).transpose(0, axis)
        with poisoned(), guard():
            means = kernels.pool(moved, filled, 4)
        torch.testing.assert_close(means, pool_reference(x, ops.spread(filled, x), 4), rtol=1e-5, atol=1e-6)


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS)
def test_quick(check):
    check(true_kernels)


# ------------------------------------------------------------------------------------------------------------- shapes

SHAPES = {
    "one of each": Case(rows=1, columns=1, sequences=1, heads=1, whole=True),
    "one column": Case(rows=3, columns=1, sequences=1),
    "a power of two less one": Case(columns=15, sequences=1),
    "a power of two": Case(columns=16, sequences=1),
    "a power of two and one": Case(columns=17, sequences=1),
    "many ties": Case(columns=130, rows=4, ties=True, heads=1, sequences=1),
    "long": Case(columns=1000, rows=2, heads=1, sequences=1),
    "longest": Case(columns=4096, rows=2, heads=1, sequences=1, ties=True),
    "mass, one column": Case("mass", rows=3, columns=1, sequences=1),
    "mass, little": Case("mass", columns=33, share=0.05, sequences=1),
    "mass, most": Case("mass", columns=40, share=0.95, sequences=1),
    "mass, long": Case("mass", columns=700, rows=2, share=0.7, sequences=1, heads=1),
    "mass, a peak": Case("mass", columns=20, size=40, sequences=1),
    "above, one column": Case("above", rows=3, columns=1, sequences=1),
    "above, none but the best": Case("above", columns=40, share=1.0),
    "above, long": Case("above", columns=1000, rows=3, share=0.002, heads=1),
    "groups of sequences": Case("above", groups=2, sequences=4, share=0.1),
    "groups of heads": Case("mass", allowed_heads=2, heads=4, rows=2, sequences=1),
}


@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_shapes(case):
    compare(true_kernels, case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pools_of_sixteen_bits(dtype):
    x, filled = torch.randn(1, 2, 50, 72).to(dtype), torch.ones(1, 1, 50, dtype=torch.bool)
    means = true_kernels.pool(x, filled, 16)
    assert means.dtype == torch.float32
    torch.testing.assert_close(means, pool_reference(x, ops.spread(filled, x), 16), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", ["top", "mass", "above"])
def test_order_of_programs_changes_nothing(rule):
    scores, allowed, counts = scores_of(Case(rule, columns=40, sequences=1))
    results = []
    for seed in (None, 1):
        with guard(shuffle=seed):
            kept, number, lists = true_kernels.select(scores, allowed, counts, rule, 0.5, 40)
            results.append((kept, number, lists, *true_kernels.transpose(kept, 4)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --------------------------------------------------------------------------------------------------- public functions


def pools(rows: int = 6, columns: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randint(-3, 4, (1, 2, n, 16), generator=g).float() for n in (rows, columns))  # sums are exact
    return q, k, torch.rand(1, 1, rows, columns, generator=g) < 0.7


@pytest.mark.parametrize(
    "rule", [{"top": torch.arange(6)}, {"mass": 0.7}, {"above": 0.2}], ids=["top", "mass", "above"]
)
def test_selections_agree(rule):
    given = pools()
    ours, exact = (ops.select_blocks(*given, **rule, impl=impl) for impl in ("triton", "reference"))
    assert all(torch.equal(a, b) for a, b in zip(ours, exact, strict=True))
    turned = [x.transposed(impl=impl) for x, impl in ((ours, "triton"), (exact, "reference"))]
    assert all(torch.equal(a, b) for a, b in zip(*turned, strict=True))
    assert torch.equal(exact.lists, listed(exact.kept, 9)) and torch.equal(turned[1][1], listed(exact.kept.mT, 6))


@pytest.mark.parametrize("width", [3, 9])
def test_reference_lists_have_their_width(width):
    top = torch.full((6,), 20)
    ours, exact = (ops.select_blocks(*pools(), top=top, width=width, impl=impl) for impl in ("triton", "reference"))
    assert exact.lists.shape[-1] == width and int(exact.counts.max()) <= width
    assert all(torch.equal(a, b) for a, b in zip(ours, exact, strict=True))
    assert exact.transposed(width=8)[1].shape[-1] == 8


@pytest.mark.parametrize("groups", [1, 2])
def test_top_blocks_by_kernels_are_those_of_the_definition(groups):
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 2, n, 8, generator=g) for n in (23, 17))
    allowed = Support.from_mask(torch.rand(groups, 1, 23, 17, generator=g) < 0.6, (4, 3))
    ours, exact = (ops.top_blocks(q, k, allowed, 0.4, impl=impl) for impl in ("triton", "reference"))
    assert torch.equal(ours.table, exact.table) and torch.equal(ours.bits, exact.bits)


def test_operators():
    q, k, allowed = pools(2, 5)
    q, k, counts = q[:, :1], k[:, :1], torch.ones(1, 1, 2, dtype=torch.int32)
    torch.library.opcheck(library.select_op, (q, k, allowed, counts, "top", 0.0, 4))
    torch.library.opcheck(library.select_op, (q, k, allowed, None, "mass", 0.5, 5))
    torch.library.opcheck(library.pool_op, (q, torch.ones(1, 1, 2, dtype=torch.bool), 4))
    torch.library.opcheck(library.transpose_op, (torch.rand(1, 1, 5, 7) < 0.5, 5))


def test_compiles_without_breaking_the_graph():
    def select(q, k, allowed):
        return ops.select_blocks(q, k, allowed, mass=0.5, impl="triton").lists

    given = pools(2, 5)
    compiled = torch.compile(select, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given), select(*given))


def test_pools_by_kernels_refuse_a_gradient():
    x = torch.randn(1, 1, 8, 4, requires_grad=True)
    means = ops.pool(x, torch.ones(1, 1, 8, dtype=torch.bool), 4, impl="triton")
    with pytest.raises(RuntimeError, match="pool_blocks"):
        means.sum().backward()


def test_unfit_calls():
    q, k, allowed = pools()
    for x, y, reason in [
        (q.double(), k, "pooled q is float64"),
        (q, k.half(), "pooled k is float16"),
        (q[:, :, :0], k, "q is empty"),
        (q, torch.empty(1, 1, 4097, 1), "rows of 4097 key blocks are longer than the 4096"),
    ]:
        assert reason in (ops.unfit(x, y) or "")
    with pytest.raises(ValueError, match="triton cannot do this selection: pooled q is float64"):
        ops.select_blocks(q.double(), k.double(), allowed, mass=0.5, impl="triton")
    with pytest.raises(ValueError, match="triton cannot pool: x is float64"):
        ops.pool(q.double(), torch.ones(1, 1, 6, dtype=torch.bool), 2, impl="triton")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of top, mass and above, got none"),
        ({"mass": 0.5, "above": 0.5}, "give one of top, mass and above, got mass, above"),
        ({"mass": 0.0}, "mass should be above 0, got 0"),
        ({"mass": 0.5, "width": 10}, "width should be from 1 to the 9 key blocks, got 10"),
        ({"mass": 0.5, "impl": "fast"}, "impl should be auto, reference or triton, got 'fast'"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ops.select_blocks(*pools(), **options)


# ------------------------------------------------------------------------------------------------------------ mutants

MUTANTS = [
    Mutant("zeros by their bits", "tl.where(score == 0.0, 0.0, score).to", "score.to", check_neighbours),
    Mutant("negative scores turned", "0xFFFFFFFF, 0x80000000)", "0x80000000, 0x80000000)", check_large),
    Mutant("31 bits", "for _ in range(32):", "for _ in range(31):", check_neighbours),
    Mutant("largest that is too large", "least = tl.where(reached, trial, least)",
           "least = tl.where(reached, least, trial)", check_top),
    Mutant("above the trial", "tl.where(key >= trial, weight", "tl.where(key > trial, weight", check_ties),
    Mutant("ties from the end", "return tl.cumsum(flag, 0) - flag",
           "return tl.sum(flag, 0) - tl.cumsum(flag, 0)", check_ties),
    Mutant("all ties", "tie & (_before(tie) < count - tl.sum(above.to(tl.int32), 0))", "tie", check_ties),
    Mutant("one tie too many", "_before(tie) < count -", "_before(tie) <= count -", check_ties),
    Mutant("what is above not counted", "count - tl.sum(above.to(tl.int32), 0)", "count", check_ties),
    Mutant("not the row's mass", "enough = share * whole", "enough = share", check_mass),
    Mutant("natural scores to powers of two", "* LOG2_E), 0.0)", "), 0.0)", check_mass),
    Mutant("ties of mass all kept",
           "(tie & (heavier + _before(tie).to(tl.float32) * each < enough))", "tie", check_mass_ties),
    Mutant("ties of mass without those above", "heavier + _before(tie)",
           "0.0 * heavier + _before(tie)", check_mass_ties),
    Mutant("best not kept", " | (best & (_before(best) == 0))", "", check_above),
    Mutant("all of the best", "best & (_before(best) == 0)", "best", check_above),
    Mutant("weight not of the mass", "weight / tl.where(whole == 0.0, 1.0, whole) >= share",
           "weight >= share", check_above),
    Mutant("not relative to the largest", "score - tl.where(top == float(\"-inf\"), 0.0, top)", "score", check_large),
    Mutant("first group alone", "(sequence % groups) * allowed_strides[0]", "0 * allowed_strides[0]", check_groups),
    Mutant("group by sequences in turn", "(sequence % groups) * allowed_strides[0]",
           "(sequence // (sequence % groups + 1) % groups) * allowed_strides[0]", check_groups),
    Mutant("first head's table", "(head % allowed_heads) * allowed_strides[1]\n    usable",
           "0\n    usable", check_groups),
    Mutant("what is not allowed", "usable = inside & (tl.load(allowed",
           "usable = inside | (tl.load(allowed", check_top),
    Mutant("counts beyond the width", "tl.minimum(count, width), share", "count, share", check_width),
    Mutant("list not filled", "tl.store(lists + column, tl.where(found == 0, 0, first), mask=(column >= found)",
           "tl.store(lists + column, tl.where(found == 0, 0, first), mask=(column > found)", check_top),
    Mutant("filled with the last", "first = tl.min(tl.where(keep, column, BLOCK), 0)",
           "first = tl.max(tl.where(keep, column, 0), 0)", check_top),
    Mutant("columns begin anew in each tile", "place = found[None, :] + tl.cumsum",
           "place = tl.cumsum", check_long_columns),
    Mutant("transposed rows of the tile", "tl.zeros_like(place) + row[:, None]",
           "tl.zeros_like(place) + row[:, None] - start", check_long_columns),
    Mutant("transposed filled with the latest", "tl.where(found == 0, tl.min(",
           "tl.where(found >= 0, tl.min(", check_long_columns),
    Mutant("transposed lists not filled", "for start in range(0, width, ROW):",
           "for start in range(ROW, width, ROW):", check_top),
    Mutant("empty places in the mean", "mask = used[:, None] & (d < D)[None, :]",
           "mask = (place < last)[:, None] & (d < D)[None, :]", check_pool),
    Mutant("mean over the block", "tl.maximum(tl.sum(counts, 0), 1)", "tl.maximum(block, 1)", check_pool),
    Mutant("empty block divided by nothing", "tl.maximum(tl.sum(counts, 0), 1)", "tl.sum(counts, 0)", check_pool),
    Mutant("filled of the first group", "(sequence % groups) * filled_strides[0]", "0 * filled_strides[0]", check_pool),
    Mutant("pool in 32 bits", "(sequence_head // heads).to(tl.int64), (sequence_head % heads).to(tl.int64)\n    x +=",
           "sequence_head // heads, sequence_head % heads\n    x +=", check_far_apart),
    Mutant("scores without scale", "acc * scale, mask", "acc, mask", check_scores),
    Mutant("scores of the first depth", "for start in range(0, D, DEPTH):",
           "for start in range(0, DEPTH, DEPTH):", check_scores),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_killed(mutant):
    assert_killed(mutant, true_kernels)
