"""short_attention's kernels in the interpreter, against float64, and as operators of PyTorch."""

import inspect
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from stgen.ops.boxes import Boxes, Extent
from stgen.ops.normaliser import Normaliser
from stgen.ops.short_attention import apply_map, short_attention, unfit
from stgen.ops.short_attention import triton as true_kernels
from stgen.ops.short_attention.library import (
    apply_map_backward_op,
    apply_map_op,
    numbers,
    short_attention_backward_op,
    short_attention_op,
)
from stgen.ops.short_attention.reference import apply_map_reference, short_attention_reference
from stgen.testing.errors import assert_as_exact, poisoned
from stgen.testing.guard import far_apart, guard
from stgen.testing.mutants import Mutant, assert_killed


@dataclass(frozen=True)
class Case:
    grid: Extent = (16, 1, 3)
    size: Extent = (16, 1, 1)
    shift: Extent = (0, 0, 0)
    batch: int = 1
    heads: int = 4
    head_dim: int = 16
    normaliser: Normaliser | str = "softmax"
    sink: bool = False
    sinks: int = 0
    mask: str = ""  # static, keys or full; full has rows and a sequence without keys
    map: bool = False
    lse: bool = False
    layout: str = "packed"  # of q, k and v; also apart, or heads first
    size_of_q: float = 1.0
    dtype: torch.dtype = torch.float16

    @property
    def boxes(self) -> Boxes:
        return Boxes(self.grid, self.size, self.shift)


@dataclass(frozen=True)
class Inputs:
    leaves: dict[str, Tensor]  # q, k, v and what there is of sink, sink_k, sink_v
    mask: Tensor | None
    grads: dict[str, Tensor]  # of out and what is asked for of map and lse


def inputs_of(case: Case) -> Inputs:
    torch.manual_seed(0)
    boxes, heads, d = case.boxes, case.heads, case.head_dim
    tokens, rows = boxes.grid[0] * boxes.grid[1] * boxes.grid[2], (case.batch * boxes.count, heads, boxes.places)
    qkv = torch.randn(case.batch, tokens, 3, heads, d).to(case.dtype)
    q, k, v = qkv.unbind(2)
    if case.layout == "apart":
        q, k, v = q.contiguous(), torch.nn.functional.pad(k, (0, 3))[..., :-3], v
    if case.layout == "heads first":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    leaves = {"q": case.size_of_q * q if case.size_of_q != 1 else q, "k": k, "v": v}
    if case.sink:
        leaves["sink"] = torch.randn(heads)
    if case.sinks:
        leaves |= {name: torch.randn(heads, case.sinks, d) for name in ("sink_k", "sink_v")}
    grads = {"out": torch.randn(case.batch, heads, tokens, d).transpose(1, 2).to(case.dtype)}
    if case.map:
        grads["map"] = torch.randn(*rows, case.sinks + boxes.places).to(case.dtype)
    if case.lse:
        grads["lse"] = torch.randn(rows)
    return Inputs(leaves, _mask(case.mask, rows), grads)


def _mask(kind: str, rows: tuple[int, int, int]) -> Tensor | None:
    sequences, heads, n = rows
    if kind == "":
        return None
    if kind == "static":
        return torch.rand(1, 1, n, n) > 0.4
    if kind == "keys":
        return torch.rand(sequences, 1, 1, n) > 0.4
    mask = torch.rand(sequences, heads, n, n) > 0.4
    mask[0, :, n // 2], mask[-1] = False, False
    return mask


def by_definition(case: Case, inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """All outputs and gradients by the reference, computed in `dtype`; parameters of a sink stay what they are."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = {
        name: x.detach().to(wide if name.startswith("sink") else dtype).requires_grad_()
        for name, x in inputs.leaves.items()
    }
    if dtype == torch.float64 and case.sinks:  # kernels round these to the type of the keys
        leaves |= {n: leaves[n].detach().to(case.dtype).to(dtype).requires_grad_() for n in ("sink_k", "sink_v")}
    names = ("q", "k", "v", "sink", "sink_k", "sink_v")
    q, k, v, *sinks = (leaves.get(name) for name in names)
    found = short_attention_reference(
        q, k, v, case.boxes, Normaliser.of(case.normaliser), *sinks, inputs.mask
    )._asdict()
    found = {name: found[name] for name in inputs.grads}
    loss = torch.zeros((), dtype=wide)
    for name, grad in inputs.grads.items():
        finite = found[name].isfinite()
        loss = loss + (found[name][finite] * grad[finite].to(found[name].dtype)).sum()
    back = torch.autograd.grad(loss, list(leaves.values()))
    return {k: v.detach() for k, v in found.items()} | {f"d{name}": x for name, x in zip(leaves, back, strict=True)}


def by_kernels(kernels: ModuleType, case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """The same by the launchers, in memory that holds NaN at first."""
    leaves, grads = inputs.leaves, inputs.grads
    rest = (leaves["q"], leaves["k"], leaves["v"], case.boxes, Normaliser.of(case.normaliser))
    rest += (*(leaves.get(name) for name in ("sink", "sink_k", "sink_v")), inputs.mask)
    with poisoned():
        out, weights, lse = kernels.forward(*rest, case.map, case.lse)
        d_qkv, *d_sinks = kernels.backward(grads["out"], grads.get("map"), grads.get("lse"), *rest)
    found = {"out": out, "map": weights, "lse": lse}
    found |= dict(zip(("dq", "dk", "dv"), d_qkv.unbind(2), strict=True))
    found |= dict(zip(("dsink", "dsink_k", "dsink_v"), d_sinks, strict=True))
    return {name: x for name, x in found.items() if x is not None}


def compare(kernels: ModuleType, case: Case, inputs: Inputs | None = None) -> None:
    inputs = inputs or inputs_of(case)
    exact, baseline = by_definition(case, inputs, torch.float64), by_definition(case, inputs, case.dtype)
    with guard():
        found = by_kernels(kernels, case, inputs)
    assert found.keys() == exact.keys()
    for name, x in found.items():
        assert_as_exact(x, exact[name], baseline[name], name=f"{name} of {case}")


# ------------------------------------------------------------------------------------------------------ quick checks

CUT = Case((2, 4, 2), (2, 2, 2), (1, 1, 0), heads=2)  # windows that the border cuts
ALL = {"sink": True, "sinks": 2, "map": True, "lse": True}
POLY, POLY_E = Normaliser("poly", -6.0), Normaliser("poly_e", -6.0)


def check_temporal(kernels: ModuleType) -> None:
    compare(kernels, Case(batch=2, lse=True))


def check_float32(kernels: ModuleType) -> None:
    compare(kernels, Case(sink=True, dtype=torch.float32))


def check_windows(kernels: ModuleType) -> None:
    """Boxes cut on both sides of the grid, and all that can be given and asked for."""
    compare(kernels, replace(CUT, **ALL))


def check_masks(kernels: ModuleType) -> None:
    for mask in ("static", "keys", "full"):
        compare(kernels, Case((5, 2, 2), (5, 1, 1), heads=2, mask=mask, lse=True))


def check_sink_rows(kernels: ModuleType) -> None:
    compare(kernels, Case((6, 2, 2), (6, 1, 1), heads=2, sinks=3, mask="full", map=True))


def check_last_group(kernels: ModuleType) -> None:
    """A last program with fewer sequences than the others."""
    compare(kernels, Case((4, 1, 5), (4, 1, 1), heads=2, sink=True))


def check_relu(kernels: ModuleType) -> None:
    for kind in ("relu", "relu2"):
        compare(kernels, Case((6, 1, 2), (6, 1, 1), heads=2, normaliser=kind, sinks=1, mask="full", map=True))


def check_poly(kernels: ModuleType) -> None:
    for normaliser in (POLY, POLY_E):
        compare(kernels, Case((5, 1, 2), (5, 1, 1), heads=1, normaliser=normaliser, **ALL, size_of_q=3.0))


def check_large_scores(kernels: ModuleType) -> None:
    """Scores around 80 and a sink's of 200, of which the exponentials overflow."""
    inputs = inputs_of(case := Case((8, 1, 2), (8, 1, 1), size_of_q=40.0, sink=True, lse=True, dtype=torch.float32))
    inputs.leaves["sink"][1] = 200.0
    compare(kernels, case, inputs)


def check_plain_matrices(kernels: ModuleType) -> None:
    """One item to a program."""
    compare(kernels, Case((1, 7, 9), (1, 7, 9), heads=2, head_dim=32, sink=True, mask="static", map=True))


def check_two_parts(kernels: ModuleType) -> None:
    """Heads of two tiles, the second of which is half hidden."""
    compare(kernels, Case((5, 1, 3), (5, 1, 1), heads=2, head_dim=40, sinks=1))


def check_layouts(kernels: ModuleType) -> None:
    for layout in ("apart", "heads first"):
        compare(kernels, Case((3, 2, 2), (1, 2, 2), heads=3, head_dim=20, layout=layout, batch=2))


def check_far_apart(kernels: ModuleType) -> None:
    """Offsets of videos, tokens and heads beyond int32, from odd strides within it."""
    inputs = inputs_of(case := Case((3, 1, 1), (3, 1, 1), batch=3, heads=3))
    for axes in ((0, 1, 2, 3), (1, 0, 2, 3), (2, 0, 1, 3)):
        back = [axes.index(axis) for axis in range(4)]
        leaves = {name: far_apart(x.permute(axes), 2**30 + 1).permute(back) for name, x in inputs.leaves.items()}
        compare(kernels, case, replace(inputs, leaves=leaves))


def check_apply_map(kernels: ModuleType) -> None:
    """A given map on values, forward and backward, with and without the rows of a sink."""
    for case in (Case((1, 5, 1), (1, 5, 1), heads=1), replace(CUT, sinks=2)):
        compare_map(kernels, case)


def compare_map(kernels: ModuleType, case: Case) -> None:
    torch.manual_seed(0)
    inputs, boxes = inputs_of(replace(case, map=True)), case.boxes
    weights, grad = inputs.grads["map"].softmax(-1), inputs.grads["out"]
    leaves = {"map": weights, "v": inputs.leaves["v"]} | {
        name: x for name, x in inputs.leaves.items() if name == "sink_v"
    }
    results = []
    for dtype in (torch.float64, case.dtype):
        given = [x.to(case.dtype).to(dtype).requires_grad_() for x in leaves.values()]
        out = apply_map_reference(given[0], given[1], boxes, *given[2:])
        results.append([out.detach(), *torch.autograd.grad(out, given, grad.to(dtype))])
    with poisoned(), guard():
        found = [kernels.apply_forward(weights, leaves["v"], boxes, leaves.get("sink_v"))]
        found += kernels.apply_backward(grad, weights, leaves["v"], boxes, leaves.get("sink_v"))
    names = ("out", "dmap", "dv", "dsink_v")
    for name, x, exact, baseline in zip(names, found, *results, strict=False):
        assert_as_exact(x, exact, baseline, name=f"{name} of {case}")


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS)
def test_quick(check):
    check(true_kernels)


# ------------------------------------------------------------------------------------------------------------ shapes

SHAPES = {
    "one token": Case((1, 1, 1), (1, 1, 1), heads=1),
    "one place": Case((1, 2, 3), (1, 1, 1), batch=2, heads=2, sink=True),
    "a tile less one": Case((15, 1, 2), (15, 1, 1), heads=2, lse=True),
    "a tile": Case((16, 2, 1), (16, 1, 1), heads=2, sinks=1),
    "a tile and one": Case((17, 1, 2), (17, 1, 1), heads=2, mask="static"),
    "32 places": Case((32, 1, 2), (32, 1, 1), heads=2, mask="keys"),
    "33 places": Case((1, 11, 3), (1, 11, 3), heads=2, sink=True),
    "64 places": Case((1, 8, 16), (1, 8, 8), heads=1, head_dim=32),
    "65 places": Case((1, 13, 5), (1, 13, 5), heads=1, mask="static", lse=True),
    "128 places": Case((2, 8, 16), (1, 8, 16), heads=1, head_dim=32, sinks=16, sink=True),
    "along rows": Case((2, 2, 20), (1, 1, 20), heads=2, head_dim=32),
    "along columns": Case((2, 20, 2), (1, 20, 1), heads=3, head_dim=32),
    "windows": Case((3, 5, 4), (2, 2, 2), (0, 1, 1), heads=2, mask="full", sinks=1),
    "head dimension 36": Case((7, 2, 2), (7, 1, 1), heads=3, head_dim=36, layout="apart"),
    "head dimension 60": Case((9, 1, 3), (9, 1, 1), batch=2, heads=2, head_dim=60),
    "head dimension 72": Case((9, 1, 3), (9, 1, 1), heads=4, head_dim=72, sinks=2, layout="heads first"),
    "head dimension 80": Case((20, 1, 2), (20, 1, 1), heads=2, head_dim=80, normaliser=POLY),
    "head dimension 96": Case((4, 2, 2), (4, 1, 1), heads=2, head_dim=96, normaliser="relu2"),
    "head dimension 128": Case((18, 1, 2), (18, 1, 1), heads=2, head_dim=128, sink=True),
    "poly_e, six heads": Case((8, 1, 3), (8, 1, 1), heads=6, normaliser=POLY_E, mask="keys"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_shapes(case, dtype):
    compare(true_kernels, replace(case, dtype=dtype))


@pytest.mark.parametrize("name", ["a tile and one", "64 places", "head dimension 72"])
def test_bfloat16(name):
    compare(true_kernels, replace(SHAPES[name], dtype=torch.bfloat16))


def test_products_before_hopper(monkeypatch):
    """Transposed maps are multiplied the plain way where they come out right."""
    monkeypatch.setattr(true_kernels, "_turned", lambda tiles: False)
    compare(true_kernels, replace(SHAPES["33 places"], sinks=1))


def test_order_of_programs_is_free():
    inputs = inputs_of(case := replace(CUT, sink=True, sinks=1))
    usual = by_kernels(true_kernels, case, inputs)
    with guard(shuffle=3):
        shuffled = by_kernels(true_kernels, case, inputs)
    assert all(torch.equal(usual[name], shuffled[name]) for name in usual)


def test_expanded_gradient():
    """Of a sum: every element of it is one number in memory."""
    inputs = inputs_of(case := Case((5, 1, 2), (5, 1, 1)))
    grad = torch.ones(case.head_dim, dtype=case.dtype).expand_as(inputs.grads["out"])
    compare(true_kernels, case, replace(inputs, grads={"out": grad}))


@pytest.mark.parametrize("width", [2, 16, 17, 24, 40, 48, 60, 64, 72, 80, 96, 100, 128])
def test_width_parts(width):
    parts = true_kernels.width_parts(width)
    assert width <= sum(parts) <= max(16, 2 * width)
    assert all(part >= 16 and part & (part - 1) == 0 for part in parts)


def test_width_parts_of_latte():
    assert true_kernels.width_parts(72) == true_kernels.width_parts(80) == (64, 16)
    assert true_kernels.width_parts(64) == (64,)


# --------------------------------------------------------------------------------------------------------- operators


def arguments(case: Case) -> dict:
    """Of the public function, leaves that ask for gradients among them."""
    inputs = inputs_of(case)
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.leaves.items()}
    return leaves | {"boxes": case.boxes, "normaliser": case.normaliser, "mask": inputs.mask}


SMALL = Case((2, 1, 3), (2, 1, 2), (0, 0, 1), heads=1, head_dim=8, dtype=torch.float32)


@pytest.mark.parametrize("case", [SMALL, replace(SMALL, mask="static", **ALL)], ids=["plain", "all"])
def test_operators(case):
    given = arguments(case)
    tensors = [given.get(name) for name in ("q", "k", "v", "sink", "sink_k", "sink_v", "mask")]
    rest = (numbers(case.boxes), "softmax", None)
    torch.library.opcheck(short_attention_op, (*tensors, *rest, case.map, case.lse))
    with torch.no_grad():
        out, weights, lse = short_attention_op(*tensors, *rest, case.map, case.lse)
        asked = (out, weights if case.map else None, lse if case.lse else None)
        torch.library.opcheck(short_attention_backward_op, (*asked, *tensors, *rest))


@pytest.mark.parametrize("sinks", [0, 1])
def test_map_operators(sinks):
    torch.manual_seed(0)
    v, boxes = torch.randn(1, 4, 2, 8, requires_grad=True), Boxes((4, 1, 1), (2, 1, 1))
    weights, sink_v = torch.rand(2, 2, 2, sinks + 2, requires_grad=True), torch.randn(2, 1, 8, requires_grad=True)
    given = (weights, v, sink_v if sinks else None, numbers(boxes))
    torch.library.opcheck(apply_map_op, given)
    with torch.no_grad():
        torch.library.opcheck(apply_map_backward_op, (torch.randn_like(v), *given))


@pytest.mark.parametrize("case", [Case((3, 2, 1), (3, 1, 1), heads=2), replace(CUT, mask="keys", **ALL)])
def test_gradients_through_autograd(case):
    """The map is used on other values, and enters the loss by that alone."""
    results = []
    for impl in ("reference", "triton"):
        given = arguments(replace(case, dtype=torch.float32))
        asked = {"return_map": True, "return_lse": True}
        out, weights, lse = short_attention(**given, **asked, impl=impl)
        again = apply_map(weights, given["q"] * 2, case.boxes, given.get("sink_v"), impl=impl)
        loss = out.square().sum() + again.sin().sum() + lse[lse.isfinite()].square().sum()
        loss.backward()
        leaves = {name: x.grad for name, x in given.items() if isinstance(x, Tensor) and x.requires_grad}
        results.append({"loss": loss} | leaves)
    for name, x in results[0].items():
        torch.testing.assert_close(results[1][name], x, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_lse_alone_gives_gradients():
    grads = []
    for impl in ("reference", "triton"):
        given = arguments(Case((3, 1, 1), (3, 1, 1), dtype=torch.float32))
        short_attention(**given, return_lse=True, impl=impl)[1].sum().backward()
        grads.append(given["k"].grad)
    torch.testing.assert_close(*grads)


def test_compiled_whole():
    given = arguments(replace(SMALL, **ALL))
    names = [name for name, x in given.items() if isinstance(x, Tensor)]

    def loss(*leaves: Tensor) -> Tensor:
        given.update(zip(names, leaves, strict=True))
        out, weights, lse = short_attention(**given, return_map=True, return_lse=True, impl="triton")
        again = apply_map(weights, out, SMALL.boxes, given["sink_v"], impl="triton")
        return again.square().sum() + lse.exp().sum()

    leaves = [given[name] for name in names]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for x, y in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(x, y)


def test_second_derivatives_are_refused():
    given = arguments(SMALL)
    out = short_attention(**given, impl="triton")
    (grad,) = torch.autograd.grad(out.square().sum(), given["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="short_attention_backward"):
        grad.sum().backward()


# ----------------------------------------------------------------------------------------------------- the definition


@pytest.mark.parametrize("kind", ["temporal", "spatial"])
def test_definition_is_sdpa_of_sequences(kind):
    torch.manual_seed(0)
    grid, heads = (5, 2, 3), 2
    boxes = Boxes(grid, (5, 1, 1) if kind == "temporal" else (1, 2, 3))
    x = torch.randn(2, 30, 3, heads, 8, dtype=torch.float64, requires_grad=True)
    fold = (
        (lambda y: y.unflatten(1, (5, 6)).permute(0, 2, 3, 1, 4))
        if kind == "temporal"
        else (lambda y: y.unflatten(1, (5, 6)).permute(0, 1, 3, 2, 4))
    )  # [2, sequences, heads, places, 8]
    mask = torch.rand(1, 1, boxes.places, boxes.places) > 0.3
    mask[..., 0] = True
    grads, grad = [], torch.randn(2, 30, heads, 8, dtype=torch.float64)
    expected = scaled_dot_product_attention(*(fold(y) for y in x.unbind(2)), attn_mask=mask)
    grads.append(torch.autograd.grad((expected * fold(grad)).sum(), x)[0])
    out = short_attention(*x.unbind(2), boxes, mask=mask)
    grads.append(torch.autograd.grad((out * grad).sum(), x)[0])
    torch.testing.assert_close(fold(out), expected)
    torch.testing.assert_close(*grads)


def test_empty_places_have_empty_rows():
    given = arguments(replace(CUT, sink=True, sinks=1))
    present = CUT.boxes.present()[:, None]  # [S, 1, n]
    assert not present.all()
    for impl in ("reference", "triton"):
        _, weights, lse = short_attention(**given, return_map=True, return_lse=True, impl=impl)
        assert not weights.masked_select(~present[..., None]).any()
        assert (lse.masked_select(~present.expand_as(lse)) == -torch.inf).all()
        assert not weights[..., 1:].masked_select(~present[..., None, :]).any()


def test_unfit_calls():
    boxes = Boxes((2, 1, 2), (2, 1, 1))
    x = torch.zeros(1, 4, 2, 8)
    assert unfit(x, boxes) is None
    for q, where, rows, reason in [
        (x.double(), boxes, None, "not float64"),
        (torch.zeros(1, 129, 1, 8).half(), Boxes((129, 1, 1), (129, 1, 1)), None, "129 places"),
        (torch.zeros(1, 4, 1, 8), boxes, torch.zeros(1, 143, 8), "143 sink rows"),
        (torch.zeros(1, 33, 1, 8), Boxes((33, 1, 1), (33, 1, 1)), None, "in float32 they hold up to 32"),
        (torch.zeros(1, 4, 1, 129), boxes, None, "129 wide"),
    ]:
        assert reason in unfit(q, where, rows)
        with pytest.raises(ValueError, match=f"short_attention cannot do this: .*{reason}"):
            short_attention(q, q, q, where, sink_k=rows, sink_v=rows, impl="triton")
        short_attention(q, q, q, where, sink_k=rows, sink_v=rows)  # auto


def test_wrong_calls():
    boxes, x, rows = Boxes((2, 1, 2), (2, 1, 1)), torch.zeros(1, 4, 2, 8), torch.zeros(2, 1, 8)
    for call, options, message in [
        ((x[:, :3], x, x, boxes), {}, r"q should have shape \[B, 4, heads, D\]"),
        ((x, x.half(), x, boxes), {}, "q, k and v should be alike"),
        ((x, x, x, boxes), {"sink": torch.zeros(3)}, r"sink should have shape \[2\]"),
        ((x, x, x, boxes, "relu"), {"sink": torch.zeros(2)}, "takes no logit sink"),
        ((x, x, x, boxes, "relu"), {"return_lse": True}, "has no LSE"),
        ((x, x, x, boxes), {"sink_k": rows}, "give both or neither"),
        ((x, x, x, boxes), {"sink_k": rows[:1], "sink_v": rows}, r"sink_k should have shape \[2, sinks, 8\]"),
        ((x, x, x, boxes), {"sink_k": rows[:, :0], "sink_v": rows[:, :0]}, "sink_k should have shape"),
        ((x, x, x, boxes), {"sink_k": torch.zeros(2, 2, 8), "sink_v": rows}, "sink_k and sink_v should be alike"),
        ((x, x, x, boxes), {"mask": torch.zeros(2, 2)}, r"mask should be bool and broadcast to \[2, 2, 2, 2\]"),
        ((x, x, x, boxes), {"mask": torch.ones(1, 3, 2, 2).bool()}, "mask should be bool and broadcast"),
        ((x, x, x, boxes), {"impl": "cuda"}, "impl should be auto, reference or triton, got 'cuda'"),
    ]:
        with pytest.raises(ValueError, match=message):
            short_attention(*call, **options)
    with pytest.raises(ValueError, match=r"weights should have shape \[2, 2, 2, 3\]"):
        apply_map(torch.zeros(2, 2, 2, 2), x, boxes, rows)


# ----------------------------------------------------------------------------------------------------------- mutants

MUTANTS = [
    Mutant(
        "scale of the square root's square root",
        "q.shape[3] ** -0.5,\n        VEC=vec, **call",
        "q.shape[3] ** -0.25,\n        VEC=vec, **call",
        check_temporal,
    ),
    Mutant(
        "scale a percent off in the backward",
        "q.shape[3] ** -0.5,\n        VEC=vec, TURNED",
        "1.01 * q.shape[3] ** -0.5,\n        VEC=vec, TURNED",
        check_float32,
    ),
    Mutant("no unit", "(scale * unit(KIND))", "scale", check_temporal),
    Mutant(
        "hidden keys have score 0",
        'tl.where(visible, _over_width(q, k) * (scale * unit(KIND)), float("-inf"))',
        "tl.where(visible, _over_width(q, k) * (scale * unit(KIND)), 0.0)",
        check_masks,
    ),
    Mutant("tail of places not hidden", "& (place < SIZE[0] * SIZE[1] * SIZE[2])", "& (place >= 0)", check_masks),
    Mutant(
        "last group not masked",
        "HEADS).to(tl.int64), sequence < sequences",
        "HEADS).to(tl.int64), sequence >= 0",
        check_last_group,
    ),
    Mutant("cut boxes not masked at the end", "& (t < grid[0])", "", check_windows),
    Mutant("cut boxes not masked at the start", "& (h >= 0)", "", check_windows),
    Mutant("shift the wrong way", "* SIZE[1] - SHIFT[1]", "* SIZE[1] + SHIFT[1]", check_windows),
    Mutant("rows of boxes for columns", "box // counts[2] % counts[1]", "box // counts[2] % counts[2]", check_windows),
    Mutant("places within a box transposed", "place // SIZE[2] % SIZE[1]", "place % SIZE[1]", check_plain_matrices),
    Mutant(
        "first video alone",
        "return (sequence // boxes).to(tl.int64)",
        "return (sequence * 0).to(tl.int64)",
        check_temporal,
    ),
    Mutant(
        "heads of an item swapped",
        "group * HEADS + item % HEADS",
        "group * HEADS + item // HEADS",
        check_temporal,
    ),
    Mutant("stride of heads for tokens", "token * strides[1]", "token * strides[2]", check_temporal),
    Mutant("strides not in units", "+ token * strides[1]) * VEC", "+ token * strides[1])", check_temporal),
    Mutant("offsets of 32 bits", "w).to(tl.int64), there", "w), there", check_far_apart),
    Mutant("heads of 32 bits", "item % HEADS).to(tl.int64)", "item % HEADS)", check_far_apart),
    Mutant("videos of 32 bits", "(sequence // boxes).to(tl.int64)", "sequence // boxes", check_far_apart),
    Mutant("second part of heads not hidden", "(j < D), other=0.0)", "(j < D + 64), other=0.0)", check_two_parts),
    Mutant(
        "second part not in the scores",
        "result += tl.dot(x[1], tl.trans(y[1])",
        "result += 0 * tl.dot(x[1], tl.trans(y[1])",
        check_two_parts,
    ),
    Mutant(
        "level of the first key",
        "top = tl.max(s, -1)",
        "top = tl.sum(tl.where(tl.arange(0, s.shape[-1]) == 0, s, 0.0), -1)",
        check_large_scores,
    ),
    Mutant(
        "level without the sink", "level_of(tl.maximum(top, sink), KIND)", "level_of(top, KIND)", check_large_scores
    ),
    Mutant("level without the sink's rows", "top = tl.maximum(top, tl.max(f, -1))", "top = top", check_poly),
    Mutant("mass without the sink", " + weight_of(sink, level, KIND, CUT)\n", "\n", check_float32),
    Mutant(
        "mass without the sink's rows", "mass += tl.sum(weight_of(f", "mass += 0 * tl.sum(weight_of(f", check_sink_rows
    ),
    Mutant("count without the sink's rows", "0.0), -1) + SINKS", "0.0), -1)", check_relu),
    Mutant(
        "count of places, not of keys",
        'tl.where(s > float("-inf"), 1.0, 0.0)',
        "tl.where(s == s, 1.0, 0.0)",
        check_relu,
    ),
    Mutant("rows without keys", "kept = there & (mass > 0)\n    return", "kept = there\n    return", check_masks),
    Mutant(
        "rows without a token", "kept = there & (mass > 0)\n    return", "kept = (mass > 0)\n    return", check_windows
    ),
    Mutant("mask transposed", "row.to(tl.int64) * strides[2]", "row.to(tl.int64) * strides[3]", check_masks),
    Mutant(
        "mask of the first sequence",
        "start = _each(sequence.to(tl.int64) * strides[0] + head",
        "start = _each(head",
        check_masks,
    ),
    Mutant(
        "map begins at the keys",
        "SINKS, (PLACES, PLACES), N, N, GROUP)\n        tl.store(map_ptr + at, p",
        "0, (PLACES, PLACES), N, N, GROUP)\n        tl.store(map_ptr + at, p",
        check_sink_rows,
    ),
    Mutant("LSE in powers of two", "level * (1.0 / unit(KIND))", "level", check_temporal),
    Mutant("LSE without the mass", "lse = tl.log(tl.where(kept, mass, 1.0)) +", "lse =", check_temporal),
    Mutant("LSE of rows without keys", 'tl.where(kept, lse, float("-inf"))', "lse", check_masks),
    Mutant("no delta", "delta = tl.sum(p * dp, -1)", "delta = 0 * tl.sum(p * dp, -1)", check_temporal),
    Mutant("delta without the sink's rows", "delta += tl.sum(wf * share * dpf, -1)", "", check_sink_rows),
    Mutant("delta for counts", "delta = tl.zeros_like(delta)", "delta = delta", check_relu),
    Mutant("LSE's gradient dropped", "delta -= tl.load(d_lse_ptr", "delta -= 0 * tl.load(d_lse_ptr", check_temporal),
    Mutant("map's gradient dropped", "dp += tl.load(d_map_ptr", "dp += 0 * tl.load(d_map_ptr", check_relu),
    Mutant(
        "gradient of the map's sink columns dropped",
        "dpf += tl.load(d_map_ptr",
        "dpf += 0 * tl.load(d_map_ptr",
        check_sink_rows,
    ),
    Mutant("weight for slope", "ds = slope_of(s, _column(level), w, KIND, CUT) *", "ds = w *", check_relu),
    Mutant(
        "slope of the sink's logit",
        "slope = slope_of(sink, level, weight_of(sink, level, KIND, CUT), KIND, CUT)",
        "slope = weight_of(sink, level, KIND, CUT)",
        check_poly,
    ),
    Mutant("slope of the sink's rows", "df = slope_of(f, _column(level), wf, KIND, CUT) *", "df = wf *", check_poly),
    Mutant(
        "sink's gradient the other way", "-slope * _share(mass, there)", "slope * _share(mass, there)", check_float32
    ),
    Mutant("sink's gradient of the first row", "d_sink.sum((0, 2))", "d_sink[:, :, 0].sum(0)", check_float32),
    Mutant("sink rows' gradient of the first sequence", "else parts.sum(0)", "else parts[0]", check_sink_rows),
    Mutant("dq without the sink's rows", "dq = _plus(dq, _over_places(df, sink_k))", "", check_sink_rows),
    Mutant("dq without scale", "_times(dq, scale)", "dq", check_temporal),
    Mutant(
        "dk without scale",
        "_times(_over_queries(ds, q, TURNED), scale)",
        "_over_queries(ds, q, TURNED)",
        check_temporal,
    ),
    Mutant("dk not transposed", "_over_queries(ds, q, TURNED)", "_over_places(ds, q)", check_temporal),
    Mutant(
        "dv of weights without mass",
        "_store(dv_ptr, d_rows, there, _over_queries(p,",
        "_store(dv_ptr, d_rows, there, _over_queries(w,",
        check_temporal,
    ),
    Mutant(
        "turned product of the map as it is",
        'return tl.trans(tl.dot(tl.trans(x), p, input_precision="ieee"))',
        'return tl.trans(tl.dot(tl.trans(x), tl.trans(p), input_precision="ieee"))',
        check_plain_matrices,
    ),
    Mutant(
        "weights rounded before the sink's rows",
        "pf = weight_of(f, _column(level), KIND, CUT) * share\n        out",
        "pf = weight_of(f, _column(level), KIND, CUT)\n        out",
        check_sink_rows,
    ),
    Mutant(
        "a given map transposed",
        "out = _over_places(tl.load(map_ptr + at, mask=within, other=0.0), v)",
        "out = _over_queries(tl.load(map_ptr + at, mask=within, other=0.0), v, False)",
        check_apply_map,
    ),
    Mutant(
        "gradient of a given map of v",
        "tl.store(d_map_ptr + at, _over_width(g, v).to",
        "tl.store(d_map_ptr + at, _over_width(v, v).to",
        check_apply_map,
    ),
    Mutant(
        "TF32",
        'result = tl.dot(x[0], tl.trans(y[0]), input_precision="ieee")',
        "result = tl.dot(x[0], tl.trans(y[0]))",
        check_float32,
    ),
]


def test_mutants_are_seeded():
    source = inspect.getsource(true_kernels)
    counts = {mutant.name: source.count(mutant.old) for mutant in MUTANTS}
    assert len(MUTANTS) >= 20
    assert {name: count for name, count in counts.items() if count != 1} == {}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_killed(mutant):
    assert_killed(mutant, true_kernels)
