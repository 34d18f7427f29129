"""An exponential moving average of the weights of several modules."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from stgen import shards
from stgen.checkpoint import check_tensors
from stgen.optim import named_parameters


class EMA:
    """Float32 averages of the trainable parameters of `modules`; buffers and frozen parameters are not averaged.

    Of weights in shards (`stgen.shards`) the averages lie in the same shards.
    """

    def __init__(self, modules: Mapping[str, nn.Module], decay: float):
        self.decay = decay
        self._parameters = named_parameters(modules)
        self._shadow = {
            name: parameter.detach().to(torch.float32, copy=True) for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the weights; `step` counts the optimiser steps made before, and ramps the decay up."""
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = [parameter.float() for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self._shadow.values()), weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the modules hold the averages; afterwards, whatever happened, exactly the weights from before."""
        raw = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        try:
            self._write(self._shadow)
            yield
        finally:
            self._write(raw)

    def state_tensors(self) -> dict[str, Tensor]:
        """The averages as `{module}.{path}`; not copies."""
        return dict(self._shadow)

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state_tensors` gave. Raises CheckpointError naming every missing, extra or misshapen key."""
        check_tensors(self._shadow, tensors, "ema")
        for name, average in self._shadow.items():
            average.copy_(shards.like(tensors[name], average))

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        # In place: the optimiser and a compiled model keep referring to the same storage.
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])
