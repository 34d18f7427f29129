"""Normalisers: how the scores of a row become weights and their mass.

out_i = sum_j f(s_ij) v_j / mass_i, where f sees scores relative to a level of the row. The level is a constant in the
backward: for softmax it cancels, and elsewhere it is part of the definition.

| kind | level | f(s) | mass |
|---|---|---|---|
| softmax | max s | exp(s - level) | sum f |
| relu, relu2 | 0 | max(0, s), its square | number of keys |
| poly | ceil(max s log2 e) | 2^(s log2 e - level), by shift and cubic | sum f |
| poly_e | max s | e^(s - level), by table and cubic | sum f |

`poly` and `poly_e` are SAS (TurboAttention, arXiv:2412.08585, section 4): the integer part of the exponent is a shift or
a table look-up, a cubic does the fraction. In base 2 with an integer level, rows taken in parts rescale exactly.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["softmax", "relu", "relu2", "poly", "poly_e"]
KINDS = ("softmax", "relu", "relu2", "poly", "poly_e")

# base^-x on [0, 1): constant, linear, quadratic and cubic coefficient.
CUBIC_2 = (0.999945, -0.691341, 0.230887, -0.039543)  # Chebyshev fit, error 5.5e-5
CUBIC_E = (0.9996, -0.9922, 0.4626, -0.1025)  # published, error 9e-4

FARTHEST = 2048.0  # powers this far below the level are zero in every dtype; keeps -inf out of the polynomials


@dataclass(frozen=True)
class Normaliser:
    """f and its mass; `cut` (poly and poly_e, natural-log units, negative) makes f zero this far below the level."""

    kind: Kind = "softmax"
    cut: float | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"normaliser should be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.cut is not None and not self.kind.startswith("poly"):
            raise ValueError(f"normaliser {self.kind} takes no cut, got {self.cut}; poly and poly_e do")
        if self.cut is not None and not self.cut < 0:
            raise ValueError(f"cut of normaliser {self.kind} should be negative, got {self.cut}")

    @staticmethod
    def of(given: "Normaliser | str") -> "Normaliser":
        """A normaliser by itself or by the name of its kind."""
        return given if isinstance(given, Normaliser) else Normaliser(given)  # type: ignore[arg-type]

    def check_sink(self, sink: Tensor | None, heads: int) -> None:
        """Raise ValueError unless there is no sink, or one score per head and a mass to put it in."""
        if sink is None:
            return
        if self.by_count:
            raise ValueError(f"normaliser {self.kind} divides by the number of keys and takes no logit sink; add keys")
        if sink.shape != (heads,):
            raise ValueError(f"sink should have shape [{heads}], one score per head, got {list(sink.shape)}")

    @property
    def by_count(self) -> bool:
        """The mass is the number of keys: no maximum, no LSE and no logit sink."""
        return self.kind in ("relu", "relu2")

    @property
    def unit(self) -> float:
        """The natural logarithm of the base in which levels are given."""
        return math.log(2) if self.kind == "poly" else 1.0

    def level(self, top: Tensor) -> Tensor:
        """The row's level from its largest score; finite for a row without keys, whose largest score is -inf."""
        top = top.detach()
        if self.by_count:
            return torch.zeros_like(top)
        top = top.masked_fill(top == -torch.inf, 0)
        return (top / self.unit).ceil() if self.kind == "poly" else top

    def weight(self, s: Tensor, level: Tensor, out: Tensor | None = None) -> Tensor:
        """f of scores; -inf gives 0. `out` may be `s` itself and takes the result of all kinds but poly's."""
        if self.kind == "softmax":
            # exp2, because PyTorch's exp on a CPU is up to 100 times slower where the result underflows.
            return torch.sub(s, level, out=out).mul_(1 / math.log(2)).exp2_()
        if self.by_count:
            positive = s.relu() if out is None else torch.clamp(s, min=0, out=out)
            return positive if self.kind == "relu" else torch.square(positive, out=out)
        return self._power_times(self._cubic, s, level)

    def slope(self, s: Tensor, level: Tensor, weight: Tensor) -> Tensor:
        """f' where f is `weight`; only the kinds of poly look at the scores."""
        if self.kind == "softmax":
            return weight
        if self.by_count:
            return (weight > 0).to(weight.dtype) if self.kind == "relu" else 2 * weight.sqrt()
        _, c1, c2, c3 = (-c / self.unit for c in self._cubic)  # the fraction falls by 1/unit where the score rises by 1
        return self._power_times((c1, 2 * c2, 3 * c3), s, level)

    def weights(self, scores: Tensor, mask: Tensor | None, sink: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The definition, by autograd: weights f [S, heads, n, m], their mass and their level [S, heads, n, 1].

        The mask (bool, true where a key may be attended) broadcasts to the scores. The sink [heads] is the score of one
        more key, in the maximum and in the mass. All are float32 at least.
        """
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        sink = None if sink is None else sink.to(scores.dtype)[:, None, None]  # [heads, 1, 1]
        top = scores.amax(-1, keepdim=True)
        level = self.level(top if sink is None else torch.maximum(top, sink))
        weights = self.weight(scores, level)
        if self.by_count:
            mass = torch.full_like(level, scores.shape[-1]) if mask is None else mask.sum(-1, keepdim=True).to(scores)
            return weights, mass, level
        mass = weights.sum(-1, keepdim=True)
        return weights, mass if sink is None else mass + self.weight(sink, level), level

    def log_mass(self, mass: Tensor, level: Tensor) -> Tensor:
        """LSE: the natural logarithm of a mass of weights relative to `level`; -inf, without gradient, for mass 0."""
        empty = mass == 0
        return (mass.masked_fill(empty, 1).log() + level * self.unit).masked_fill(empty, -torch.inf)

    @property
    def _cubic(self) -> tuple[float, float, float, float]:
        return CUBIC_2 if self.kind == "poly" else CUBIC_E

    def _power_times(self, coefficients: tuple[float, ...], s: Tensor, level: Tensor) -> Tensor:
        """base^-i p(x) of scores (i + x) units below the level, i whole and x in [0, 1); 0 below the cut."""
        below = torch.sub(level, s, alpha=1 / self.unit).clamp_(max=FARTHEST)
        far = None if self.cut is None else below > -self.cut / self.unit
        whole = below.floor()
        fraction = below.sub_(whole)
        power = whole.neg_().exp2_() if self.kind == "poly" else whole.neg_().exp_()
        result = fraction * coefficients[-1]
        for coefficient in coefficients[-2:0:-1]:
            result = result.add_(coefficient).mul_(fraction)
        result = result.add_(coefficients[0]).mul_(power)
        return result if far is None else result.masked_fill_(far, 0)
