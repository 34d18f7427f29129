"""How scores become weights: from a mixer's `normaliser` section to what attention runs.

Most normalisers are a function of the score, and the kernels know them by name. Linear attention replaces the score's
exponential by a product of features phi(q) · phi(k), none of them negative, which a module makes.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from stgen.attention import spec
from stgen.attention.numbers import Numbers
from stgen.ops.block_scores import keep_top, share_of
from stgen.ops.normaliser import Normaliser


def build(normaliser: spec.Normaliser, heads: int, head_dim: int, seed: int) -> "Normaliser | Features | Polynomial":
    """What a `normaliser` section describes: for linear and poly_logits a module, else what kernels run.

    `off_by_one` is softmax here; its 1 in the mass is a sink (`sinks.py`). `seed` decides random and initial features.
    """
    match normaliser:
        case spec.Linear():
            return _features(normaliser, heads, head_dim, seed)
        case spec.Poly(base="e"):
            return Normaliser("poly_e", normaliser.cut)
        case spec.Poly():
            return Normaliser("poly", normaliser.cut)
        case spec.PolyLogits():
            return Polynomial(normaliser, heads)
        case spec.OffByOne():
            return Normaliser("softmax")
    return Normaliser(normaliser.kind)


# ---------------------------------------------------------------------------------------------------------- polynomial


class Polynomial(nn.Module):
    """Scores [S, heads, n, m] as softmax is to see them: a cubic of the clamped ones, -inf but for the best of a row."""

    no_decay = ("coefficients",)
    coefficients: Tensor  # [heads, 4]

    def __init__(self, keys: spec.PolyLogits, heads: int):
        super().__init__()
        self.clamp, self.numbers = keys.clamp, Numbers(keys)
        coefficients = torch.tensor([keys.coefficients] * heads)
        if keys.learned:
            self.coefficients = nn.Parameter(coefficients)
        else:
            self.register_buffer("coefficients", coefficients, persistent=False)

    def forward(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        s = scores.clamp(-self.clamp, self.clamp)
        a0, a1, a2, a3 = self.coefficients.to(s.dtype)[:, :, None, None].unbind(1)  # each [heads, 1, 1]
        s = ((a3 * s + a2) * s + a1) * s + a0
        ratio = self.numbers.now.ratio
        if ratio == 1:
            return s
        allowed = torch.ones_like(s, dtype=torch.bool) if mask is None else mask.expand_as(s)
        return s.masked_fill(~keep_top(s.detach(), allowed, share_of(allowed.sum(-1), ratio)), -torch.inf)


# ------------------------------------------------------------------------------------------------------------ features


class Features(nn.Module, ABC):
    """phi(x) >= 0 of queries and keys [S, heads, n, D] after norm and RoPE: [S, heads, n, F] in float32 at least."""

    def forward(self, x: Tensor, is_query: bool) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # 16 bits are too few for exponentials and their products
            return self.phi(x.to(torch.promote_types(x.dtype, torch.float32)), is_query)

    @abstractmethod
    def phi(self, x: Tensor, is_query: bool) -> Tensor:
        """The features of x, in float32 at least."""

    def at_step(self, step: int) -> None:
        """Become what training step `step` uses; only random features change over training."""


class Fixed(Features):
    """A function of each channel."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def phi(self, x: Tensor, is_query: bool) -> Tensor:
        return self.function(x)


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1 (arXiv:2006.16236, eq. 7) without the difference that would cost small values their digits."""
    return x.masked_fill(x > 0, 0).exp() + x.relu()


class Learned(Features):
    """softplus(W x) with a W for each head, in the manner of Hedgehog's learned feature maps (arXiv:2402.04347)."""

    def __init__(self, heads: int, head_dim: int, size: int, seed: int):
        super().__init__()
        g = _generator("learned", seed)
        self.weight = nn.Parameter(torch.randn(heads, size, head_dim, generator=g) * head_dim**-0.5)

    def phi(self, x: Tensor, is_query: bool) -> Tensor:
        return softplus(x @ self.weight.to(x.dtype).transpose(-1, -2))


class Favor(Features):
    """Positive orthogonal random features of the softmax kernel exp(q · k / sqrt(D)) (Performer, arXiv:2009.14794).

    phi(x) = exp(w · y - |y|^2 / 2 - c) / sqrt(F) with y = x / D^(1/4) (lemma 1), the rows w orthogonal within blocks of
    D (section 2.4). The constant c keeps the exponential in range: the largest exponent of each query, and one of all
    keys of a sequence and head, so that both cancel in the ratio. A row of features that underflow has no mass.
    """

    projection: Tensor

    def __init__(self, heads: int, head_dim: int, size: int, redraw_steps: int, seed: int):
        super().__init__()
        self.shape, self.redraw_steps, self.seed = (heads, size, head_dim), redraw_steps, seed
        # Saved, though a function of the seed: weights are also used under another seed and on another machine.
        self.register_buffer("projection", orthogonal_rows(*self.shape, _generator("favor", seed, 0)))
        self._drawn: int | None = None  # number of the draw that `at_step` has put in place

    def at_step(self, step: int) -> None:
        if not self.redraw_steps:
            return
        draw = step // self.redraw_steps
        if draw != self._drawn:
            self.projection.copy_(orthogonal_rows(*self.shape, _generator("favor", self.seed, draw)))
            self._drawn = draw

    def phi(self, x: Tensor, is_query: bool) -> Tensor:
        y = x * x.shape[-1] ** -0.25
        exponent = y @ self.projection.to(y.dtype).transpose(-1, -2) - y.square().sum(-1, keepdim=True) / 2
        largest = exponent.detach().amax(-1 if is_query else (-2, -1), keepdim=True)  # a constant of the ratio
        return (exponent - largest).exp() * exponent.shape[-1] ** -0.5


def orthogonal_rows(heads: int, size: int, head_dim: int, generator: torch.Generator) -> Tensor:
    """Rows [heads, size, head_dim], each Gaussian in length and direction, orthogonal within every block of head_dim."""
    blocks = -(-size // head_dim)
    q, r = torch.linalg.qr(torch.randn(heads, blocks, head_dim, head_dim, generator=generator))
    q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # directions are uniform only if r's diagonal is positive
    lengths = torch.randn(heads, size, head_dim, generator=generator).norm(dim=-1, keepdim=True)
    return q.transpose(-1, -2).flatten(1, 2)[:, :size] * lengths


def _features(linear: spec.Linear, heads: int, head_dim: int, seed: int) -> Features:
    size = linear.size or head_dim
    match linear.features:
        case "elu":
            return Fixed(elu_plus_one)
        case "relu":
            return Fixed(torch.relu)
        case "favor":
            return Favor(heads, head_dim, size, linear.redraw_steps, seed)
        case "learned":
            return Learned(heads, head_dim, size, seed)


def _generator(*key: str | int) -> torch.Generator:
    """A generator that depends on its key alone."""
    return torch.Generator().manual_seed(random.Random("/".join(map(str, key))).getrandbits(63))
