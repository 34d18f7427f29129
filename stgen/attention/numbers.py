"""Scheduled numbers of a mixer's keys while a model trains: their values now, saved with its weights."""

from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from stgen.schedules import Plateau, PlateauState, scheduled, settled
from stgen.section import Section


class Numbers(nn.Module):
    """The values that the schedules of a section have now.

    They follow the optimiser's step, or the training loss (`plateau`). What they have reached is a buffer: a saved model
    computes with it, and a resumed run goes on from it.
    """

    # [schedules, 5]: value and state of a plateau, float64 held as int64, which no change of a model's dtype touches.
    reached: Tensor

    def __init__(self, section: Section):
        super().__init__()
        self.section, self.schedules = section, dict(scheduled(section))
        self._values = [schedule.values[0] for schedule in self.schedules.values()]
        self._plateaus = [PlateauState() for _ in self.schedules]
        if self.schedules:
            self.register_buffer("reached", self._as_buffer())
        self._stamp: Any = None  # of the buffer when it was last read or written
        self._now: Any = settled(section, dict(zip(self.schedules, self._values, strict=True)))

    @property
    def now(self) -> Any:
        """The section with numbers in place of schedules."""
        self._read()
        return self._now

    def at_step(self, step: int) -> None:
        """Become what optimiser step `step` uses."""
        self._read()
        pairs = zip(self.schedules.values(), self._plateaus, strict=True)
        self._become([s.after(state.moves) if isinstance(s, Plateau) else s.at(step) for s, state in pairs])

    def observe(self, loss: float) -> None:
        """Take in the training loss of the step that was made."""
        self._read()
        for schedule, state in zip(self.schedules.values(), self._plateaus, strict=True):
            if isinstance(schedule, Plateau):
                state.observe(loss, schedule)
        self._write()

    @property
    def measured(self) -> dict[str, float]:
        """The values by their keys, such as `ratio`, or `any.0.ratio` within a list, as they are computed with."""
        now = self.now
        return {".".join(map(str, path)): _at(now, path) for path in self.schedules}

    def _become(self, values: list[float]) -> None:
        if values != self._values:
            self._values = values
            self._now = settled(self.section, dict(zip(self.schedules, values, strict=True)))
            self._write()

    def _as_buffer(self) -> Tensor:
        rows = [(value, *astuple(state)) for value, state in zip(self._values, self._plateaus, strict=True)]
        return torch.tensor(rows, dtype=torch.float64).view(torch.int64)

    def _write(self) -> None:
        if self._has_buffer:
            self.reached.copy_(self._as_buffer())
            self._stamp = self._stamp_now()

    def _read(self) -> None:
        """Take up what was loaded."""
        if not self._has_buffer:
            return
        if self._stamp is not None and self._stamp == self._stamp_now():
            return
        rows = self.reached.cpu().view(torch.float64).tolist()
        self._plateaus = [PlateauState(int(row[1]), row[2], row[3], int(row[4])) for row in rows]
        self._values = [row[0] for row in rows]
        self._now = settled(self.section, dict(zip(self.schedules, self._values, strict=True)))
        self._stamp = self._stamp_now()

    @property
    def _has_buffer(self) -> bool:
        """A model that is only sketched has none to read or write."""
        return bool(self.schedules) and not self.reached.is_meta and not isinstance(self.reached, FakeTensor)

    def _stamp_now(self) -> tuple[int, int]:
        return self.reached.data_ptr(), -1 if self.reached.is_inference() else self.reached._version


def _at(section: Any, path: tuple[str | int, ...]) -> Any:
    """What stands in a section at a path of names, and of numbers within lists."""
    for part in path:
        section = section[part] if isinstance(part, int) else getattr(section, part)
    return section
