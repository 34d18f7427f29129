"""Every layout x pattern x normaliser x sink x reuse that has a meaning, against the dense definition in float64.

Values and all gradients, on odd grids, with rows without keys, batches of one, one frame and one pixel. By default
every pair of choices occurs at least once, every triple in the slow test.
"""

import itertools
import random

import dense
import pytest
import torch

from stgen.attention import plan, reuse
from stgen.attention.attend import Mixer
from stgen.attention.spec import AttentionMixer
from stgen.tokens import Grid

LAYOUTS = {
    "joint": {"layout": "joint"},
    "joint tiles": {"layout": "joint", "order": "tile"},
    "spatial": {"layout": "spatial", "order": "tile"},
    "temporal": {"layout": "temporal"},
    "height": {"layout": "height"},
    "width": {"layout": "width"},
    "window": {"layout": "window", "size": (2, 2, 3)},
    "shifted window": {"layout": "window", "size": (2, 3, 2), "shift": (1, 1, 1)},
    "window tiles": {"layout": "window", "size": (3, 2, 2), "order": "tile"},
}
PATTERNS = [
    *dense.PATTERNS, ("any", "local", "global", "random"), ("any", "causal", "local"),
    ("all", "causal", "strided"), ("all", "full"), ("any", "local", "topk"), ("all", "local", "topk, tokens"),
]  # fmt: skip
NORMALISERS = {
    "softmax": {"kind": "softmax"},
    "off_by_one": {"kind": "off_by_one"},
    "relu": {"kind": "relu"},
    "relu2": {"kind": "relu2"},
    "poly": {"kind": "poly"},
    "poly e": {"kind": "poly", "base": "e", "cut": -6.0},
    "linear": {"kind": "linear"},
    "linear relu": {"kind": "linear", "features": "relu"},
    "linear favor": {"kind": "linear", "features": "favor", "size": 6},
    "linear learned": {"kind": "linear", "features": "learned", "size": 3},
    "poly_logits": {"kind": "poly_logits", "coefficients": (0.1, 0.9, -0.2, 0.05), "clamp": 1.37},
    "poly_logits, some": {"kind": "poly_logits", "coefficients": (0, 1, 0.3, 0), "ratio": 0.6, "learned": True},
}
APPROXIMATE = {
    "exact": {},
    "channels": {"qk_topk": 3},
    "channels, integers": {"qk_topk": 2, "quantise": ["q", "v"], "bits": 3},
    "fixed": {"quantise": ["k", "q"], "form": "fixed", "bits": 2},
    "map": {"quantise": ["map"], "bits": 4},
    "map, fixed": {"quantise": ["v", "map"], "form": "fixed", "bits": 3},
}
SINKS = {"none": {"kind": "none"}, "logit": {"kind": "logit", "value": 0.3}, "tokens": {"kind": "tokens", "count": 1}}
REUSES = ["none", "map", "kv", "support", "output"]
GRIDS = [Grid(3, 2, 3), Grid(2, 3, 3), Grid(1, 3, 3), Grid(4, 1, 1), Grid(1, 1, 1)]
REGISTERS = [0, 2]
AXES = (list(LAYOUTS), PATTERNS, list(NORMALISERS), list(SINKS), REUSES, GRIDS, REGISTERS, list(APPROXIMATE))
HEADS, DIM = 2, 4


def keys_of(case) -> dict:
    layout, pattern, normaliser, sink, what, _, _, approximate = case
    # Under `causal` blocks that are pooled must lie within a frame.
    return {
        **LAYOUTS[layout],
        "block": (2, 2, 2) if "causal" not in dense.names(pattern) else (1, 2, 2),
        "pattern": dense.config_of(pattern),
        "normaliser": NORMALISERS[normaliser],
        "sink": SINKS[sink],
        "reuse": {"what": what},
        "approximate": APPROXIMATE[approximate],
    }


def has_meaning(case) -> bool:
    """Whether the config takes it; what the config refuses is tested with its sentences in test_spec.py."""
    _, pattern, normaliser, _, _, _, registers, approximate = case
    names, quantised = dense.names(pattern), APPROXIMATE[approximate].get("quantise", [])
    if "map" in quantised and any("sinkhorn" in name for name in names):
        return False  # its oracle makes the map of a block at a time, and the step of integers is that of a sequence
    if "q" in quantised and any("cluster" in name for name in names):
        return False  # few levels put queries as near to one cluster as to another, which rounding then decides
    if "q" in quantised and normaliser.startswith("relu") and any("sinkhorn" in name for name in names):
        return False  # few levels mixed by a sort put scores on the kink of relu, whose sides rounding then chooses
    if registers and ("causal" in dense.names(pattern) or dense.family(pattern) is dense.Remade):
        return False
    try:
        uses_of(case)
    except ValueError:
        return False
    return True


def uses_of(case):
    """Two layers of one mixer, of which the second takes from the first."""
    return reuse.place(plan.parse("a", 2), {"a": AttentionMixer.model_validate(keys_of(case))}, HEADS)


def covering(strength: int) -> list:
    """Cases among which every `strength` choices that can stand together do so at least once; greedy, deterministic."""
    draw = random.Random(0)
    groups = list(itertools.combinations(range(len(AXES)), strength))
    missing = {(g, c) for g in groups for c in itertools.product(*(range(len(AXES[a])) for a in g))}
    cases = []
    while missing:
        group, choice = min(missing, key=lambda item: (item[0], item[1]))
        best, gain = None, 0
        for _ in range(12):
            numbers = [draw.randrange(len(axis)) for axis in AXES]
            for axis, number in zip(group, choice, strict=True):
                numbers[axis] = number
            if not has_meaning(tuple(axis[n] for axis, n in zip(AXES, numbers, strict=True))):
                continue
            found = sum((g, tuple(numbers[a] for a in g)) in missing for g in groups)
            if found > gain:
                best, gain = numbers, found
        if best is None:  # perhaps these choices exclude one another; the plainest of the others decides
            plain = {1: 0, 2: 0, 3: 0, 4: 0, 6: 0, 7: 0}
            numbers = [plain.get(a, 0) for a in range(len(AXES))]
            for axis, number in zip(group, choice, strict=True):
                numbers[axis] = number
            fits = has_meaning(tuple(axis[n] for axis, n in zip(AXES, numbers, strict=True)))
            best = numbers if fits else None
        if best is None:
            missing.discard((group, choice))
            continue
        missing -= {(g, tuple(best[a] for a in g)) for g in groups}
        cases.append(tuple(axis[n] for axis, n in zip(AXES, best, strict=True)))
    return cases


def name_of(case) -> str:
    return "; ".join(" ".join(x) if isinstance(x, tuple) else str(x) for x in case)


@pytest.mark.parametrize("case", covering(2), ids=name_of)
def test_pairs(case):
    check(case)


@pytest.mark.slow
def test_triples():
    for case in covering(3):
        try:
            check(case)
        except AssertionError as error:
            raise AssertionError(f"{name_of(case)}: {error}") from None


def check(case):
    *_, what, grid, registers, _ = case
    keys = keys_of(case)
    uses = [layer[0][0][0] for layer in uses_of(case)]
    torch.manual_seed(len(name_of(case)))
    mixers = [Mixer(use, DIM, grid, registers).double() for use in uses]
    for parameter in (p for mixer in mixers for p in mixer.parameters()):
        torch.nn.init.normal_(parameter, std=0.5)
    batch = 1 if grid.t == 1 else 2
    inputs = [torch.randn(batch, registers + grid.tokens, HEADS, DIM, dtype=torch.float64) for _ in range(6)]

    def ours(first, second):
        out, kept = mixers[0](*first, grid, {})
        return out, mixers[1](*second, grid, {0: kept})[0]

    def definition(first, second):
        heads = [mixer.runs[0] if len(mixer.runs) else None for mixer in mixers]
        one = dense.layer(keys, case[1], grid, heads[0], *first)
        taken = None if what == "none" else one
        return one.out, dense.layer(keys, case[1], grid, heads[1], *second, taken, uses[1].shift).out

    results = [with_gradients(f, inputs, mixers) for f in (ours, definition)]
    for name, a, b in zip(results[0], results[0].values(), results[1].values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
        assert a.isfinite().all()


def with_gradients(function, inputs, mixers) -> dict[str, torch.Tensor]:
    """Both outputs, and the gradients of a weighted sum of them, by name."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    outputs = function(inputs[:3], inputs[3:])
    weights = [torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out) for out in outputs]
    named = {f"{i}.{name}": p for i, mixer in enumerate(mixers) for name, p in mixer.named_parameters()}
    named |= {name: x for name, x in zip(("q1", "k1", "v1", "q2", "k2", "v2"), inputs, strict=True)}
    total = sum((out * w).sum() for out, w in zip(outputs, weights, strict=True))
    if not total.requires_grad:
        return {"out1": outputs[0], "out2": outputs[1]}
    # The scorer of `learned` gets its gradient straight through, which no mask can give: tested with its pattern.
    named = {name: p for name, p in named.items() if "selection" not in name}
    gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(named.values(), gradients, strict=True)]
    return {"out1": outputs[0].detach(), "out2": outputs[1].detach(), **dict(zip(named, filled, strict=True))}
