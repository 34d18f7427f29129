"""Norms that are linear once a model is trained: batch norm, and PRepBN, which leads to it from layer norm.

The statistics of a layer norm depend on the token, so it is computed wherever it stands. Those of a batch norm are
moving averages after training: it scales and shifts each channel, and the linear layer behind it can do that as well.
PRepBN is of SLAB (Guo et al., arXiv:2405.11582, "Progressive Re-parameterized BatchNorm").
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import layer_norm

from stgen.attention.numbers import Numbers
from stgen.norm_spec import Folded, LayerNorm, Norm, PRepBN

LAYER_EPS = 1e-6
BATCH_EPS = 1e-5


class FoldError(ValueError):
    """A norm that cannot be folded; one sentence that says what to do."""


def build(keys: Norm | Folded, width: int) -> nn.Module:
    """The norm that the keys say, for x [..., width]."""
    match keys:
        case LayerNorm():
            return nn.LayerNorm(width, eps=LAYER_EPS)
        case PRepBN():
            return ProgressiveNorm(width, keys)
        case Folded():
            return nn.Identity()
    return BatchNorm(width, keys.momentum)


class BatchNorm(nn.Module):
    """Batch norm over all axes but the last (Ioffe & Szegedy, arXiv:1502.03167, algorithms 1 and 2).

    In training with the statistics of the batch, that of all processes, which then enter the moving averages; in
    evaluation with these. The variance in the averages is the unbiased one.
    """

    mean: Tensor  # [C] moving averages
    variance: Tensor
    batches: Tensor  # [] how many they hold

    def __init__(self, width: int, momentum: float):
        super().__init__()
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> the same shape and type; computed in float32 at least."""
        scale, shift = self.scale_and_shift(x)
        return torch.addcmul(shift, _exact(x), scale).to(x.dtype)

    def scale_and_shift(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What each channel is multiplied with and what is added, [C] each: by the averages, in training by a batch x."""
        mean, variance = _exact(self.mean), _exact(self.variance)
        if self.training and x is not None:
            mean, variance, count = statistics(_exact(x))
            if not recomputing():
                self._remember(mean, variance, count)
        scale = self.weight * (variance + BATCH_EPS).rsqrt()
        return scale, self.bias - mean * scale

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        variance = variance * count / (count - 1).clamp(min=1)
        self.batches.add_(1)
        share = (1 / self.batches.double()).clamp(min=self.momentum)
        self.mean.lerp_(mean.to(self.mean), share.to(self.mean))
        self.variance.lerp_(variance.to(self.variance), share.to(self.variance))


class ProgressiveNorm(nn.Module):
    """PRepBN: gamma LN(x) + (1 - gamma) RepBN(x), RepBN(x) = BN(x) + eta x, with one learned eta (from 1) for all channels."""

    def __init__(self, width: int, keys: PRepBN):
        super().__init__()
        self.numbers = Numbers(keys)
        self.layer = nn.LayerNorm(width, eps=LAYER_EPS)
        self.batch = BatchNorm(width, keys.momentum)
        self.eta = nn.Parameter(torch.ones(()))

    @property
    def gamma(self) -> float:
        """The share of the layer norm now."""
        return self.numbers.now.gamma

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> the same shape and type. In training both are computed, so that averages follow and weights have a
        gradient, be it 0."""
        gamma, exact = self.gamma, _exact(x)
        out = exact.new_zeros(())
        if gamma < 1 or self.training:
            scale, shift = self.scale_and_shift(x)
            out = torch.addcmul(shift, exact, scale)
        if gamma > 0 or self.training:
            weight, bias = (parameter.to(exact.dtype) for parameter in (self.layer.weight, self.layer.bias))
            out = torch.lerp(out, layer_norm(exact, weight.shape, weight, bias, LAYER_EPS), gamma)
        return out.to(x.dtype)

    def scale_and_shift(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Those of RepBN; see BatchNorm."""
        scale, shift = self.batch.scale_and_shift(x)
        return scale + self.eta, shift


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def recomputing() -> bool:
    """Whether this runs within a backward pass: what gradient checkpointing computes again was counted before."""
    return torch._C._current_graph_task_id() != -1


# ---------------------------------------------------------------------------------------------------------- statistics


def statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance [C] of x [..., C] over all other axes and processes, and of how many rows [] they are.

    Every process must call it, with at least one row; gradients pass between processes as if they were one.
    """
    rows = x.flatten(0, -2)
    count = torch.full((1,), len(rows), dtype=x.dtype, device=x.device)
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        variance, mean = torch.var_mean(rows, 0, correction=0)
        return mean, variance, count[0]
    total = _sum_of_processes(torch.cat([rows.sum(0), count]))
    mean, count = total[:-1] / total[-1], total[-1].detach()
    return mean, _sum_of_processes((rows - mean).square().sum(0)) / count, count


def _sum_of_processes(x: Tensor) -> Tensor:
    summed: Any = _SumOfProcesses.apply(x)
    return summed


class _SumOfProcesses(torch.autograd.Function):
    """The sum of a tensor of every process, given to every process; what they make of it comes back summed too."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone()
        distributed.all_reduce(gradient)
        return gradient


# ------------------------------------------------------------------------------------------------------------- folding


class Reader(NamedTuple):
    """A linear map of a norm's output, such as an nn.Linear with a bias."""

    weight: Tensor  # [out, C]
    bias: Tensor  # [out]


def check_folds(keys: Norm | Folded) -> None:
    """Raise FoldError for a norm of which no model can be rid."""
    if isinstance(keys, LayerNorm):
        raise FoldError(
            "norm: a layer norm depends on each token and cannot be folded; train with model.norm: batch or prepbn"
        )


@torch.no_grad()
def fold(norm: nn.Module, readers: Sequence[Reader | nn.Linear]) -> nn.Module:
    """Fold a norm into all linear maps that read it, whose numbers are changed; returns what stands in its place.

    W (s x + b) + c = (W diag s) x + (W b + c) with the moving averages. Raises FoldError for a norm that is not linear.
    """
    if isinstance(norm, nn.Identity):
        return norm
    if isinstance(norm, ProgressiveNorm) and norm.gamma > 0:
        raise FoldError(
            f"norm: gamma is {norm.gamma:g}, and only at 0 is prepbn linear; train on until model.norm.gamma has ended at 0"
        )
    assert isinstance(norm, BatchNorm | ProgressiveNorm)
    scale, shift = norm.scale_and_shift()
    for reader in readers:
        reader.bias.add_((_exact(reader.weight) @ shift).to(reader.bias))
        reader.weight.copy_(_exact(reader.weight) * scale)
    return nn.Identity()
