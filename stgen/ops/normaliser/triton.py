"""f, f' and the level of the normalisers, for kernels. Same definitions as in `stgen.ops.normaliser`.

Kernels hold scores in units of the kind: powers of two for softmax and poly (natural scores times log2 e), natural ones
otherwise; `unit` gives the factor. A hidden key has score -inf.
"""

import math

import triton
import triton.language as tl

from stgen.ops.normaliser import CUBIC_2, CUBIC_E, FARTHEST, KINDS, Normaliser

SOFTMAX, RELU, RELU2, POLY, POLY_E = (tl.constexpr(i) for i in range(len(KINDS)))
LOG2_E, LN_2 = tl.constexpr(1 / math.log(2)), tl.constexpr(math.log(2))

_FARTHEST = tl.constexpr(FARTHEST)
_A0, _A1, _A2, _A3 = (tl.constexpr(c) for c in CUBIC_2)
_E0, _E1, _E2, _E3 = (tl.constexpr(c) for c in CUBIC_E)


def kernel_kind(normaliser: Normaliser) -> dict[str, int | float]:
    """What kernels take as constants: KIND, and CUT in units of the kind, 0 for none."""
    unit = math.log(2) if normaliser.kind == "poly" else 1.0
    return {"KIND": KINDS.index(normaliser.kind), "CUT": 0.0 if normaliser.cut is None else -normaliser.cut / unit}


@triton.jit
def unit(KIND: tl.constexpr):
    """Units of the kind in a natural score of 1."""
    if KIND == SOFTMAX or KIND == POLY:
        return LOG2_E
    else:
        return 1.0


@triton.jit
def level_of(top, KIND: tl.constexpr):
    """The level of rows from their largest score; finite where that is -inf."""
    if KIND == RELU or KIND == RELU2:
        return top * 0.0
    top = tl.where(top == float("-inf"), 0.0, top)
    if KIND == POLY:
        return tl.ceil(top)
    return top


@triton.jit
def _power_times(below, c0, c1, c2, c3, KIND: tl.constexpr, CUT: tl.constexpr):
    """base^-i p(x) of scores i + x units below the level, i whole and x in [0, 1); 0 below the cut."""
    below = tl.minimum(below, _FARTHEST)
    whole = tl.floor(below)
    fraction = below - whole
    if KIND == POLY:
        power = tl.exp2(-whole)
    else:
        power = tl.exp2(-whole * LOG2_E)
    result = (((fraction * c3 + c2) * fraction + c1) * fraction + c0) * power
    if CUT > 0:
        result = tl.where(below > CUT, 0.0, result)
    return result


@triton.jit
def weight_of(s, level, KIND: tl.constexpr, CUT: tl.constexpr):
    """f of scores; -inf gives 0."""
    if KIND == SOFTMAX:
        return tl.exp2(s - level)
    if KIND == RELU:
        return tl.maximum(s, 0.0)
    if KIND == RELU2:
        positive = tl.maximum(s, 0.0)
        return positive * positive
    if KIND == POLY:
        return _power_times(level - s, _A0, _A1, _A2, _A3, KIND, CUT)
    return _power_times(level - s, _E0, _E1, _E2, _E3, KIND, CUT)


@triton.jit
def slope_of(s, level, weight, KIND: tl.constexpr, CUT: tl.constexpr):
    """f' by the natural score, where f is `weight`; the level is a constant."""
    if KIND == SOFTMAX:
        return weight
    if KIND == RELU:
        return tl.where(weight > 0, 1.0, 0.0)
    if KIND == RELU2:
        return 2.0 * tl.maximum(s, 0.0)
    if KIND == POLY:
        return _power_times(level - s, -_A1 * LOG2_E, -2.0 * _A2 * LOG2_E, -3.0 * _A3 * LOG2_E, 0.0, KIND, CUT)
    return _power_times(level - s, -_E1, -2.0 * _E2, -3.0 * _E3, 0.0, KIND, CUT)
