"""A number that changes over training: courses from a start value to an end value, and the learning rate.

In a config a number that may change is written as itself or as a schedule: `ratio: {kind: cosine, start: 1.0, end: 0.25,
steps: 1000}`. Loads without torch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args

from pydantic import (
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveInt,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from stgen.section import Section


def constant(start: float, end: float, progress: float) -> float:
    """`start`, whatever the progress."""
    return start


def linear(start: float, end: float, progress: float) -> float:
    """A straight line from `start` at progress 0 to `end` at progress 1; progress outside [0, 1] is clipped."""
    fraction = min(max(progress, 0.0), 1.0)
    return start * (1 - fraction) + end * fraction


def cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine wave from `start` at progress 0 to `end` at progress 1: flat at both ends."""
    return linear(start, end, (1 - math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2)


COURSES = {"constant": constant, "linear": linear, "cosine": cosine}


def lr_at(step: int, total_steps: int, *, scheduler: str, warmup_steps: int, min_ratio: float) -> float:
    """The factor on the peak learning rate in optimiser step `step`, counted from 0.

    Warm-up rises linearly and is above 0 from the first step on; one longer than the run is cut to the run. Then the
    course falls to `min_ratio`, which it would reach at step `total_steps`. Raises KeyError for an unknown scheduler.
    """
    course = COURSES[scheduler]
    warmup = min(warmup_steps, total_steps)
    if step < warmup:
        return (step + 1) / warmup
    return course(1.0, min_ratio, (step - warmup) / max(total_steps - warmup, 1))


# ------------------------------------------------------------------------------------------- numbers of a config's parts


class Ramp(Section):
    kind: str
    start: float
    """The value at first."""
    end: float
    """The value in the end, which holds from then on and in sampling."""
    steps: PositiveInt
    """Optimiser steps that the change takes."""
    warmup_steps: NonNegativeInt = 0
    """Steps at the first value before the change."""
    every: PositiveInt = 1
    """The value changes only every so many steps (the literature's quantization_interval); the end is reached on time."""

    @property
    def values(self) -> list[float]:
        return [self.start, self.end]

    def __str__(self) -> str:
        moves = f", changing every {self.every}" if self.every > 1 else ""
        return f"{self.start:g} to {self.end:g}, {self.kind} over {self.steps} steps{moves}"

    def at(self, step: int) -> float:
        done = step - self.warmup_steps
        if done < self.steps:
            done -= done % self.every
        return COURSES[self.kind](self.start, self.end, done / self.steps)


class Linear(Ramp):
    kind: Literal["linear"] = "linear"
    """From one value to another along a line."""


class Cosine(Ramp):
    kind: Literal["cosine"] = "cosine"
    """From one value to another along half a cosine wave, flat at both ends."""


class Stairs(Section):
    kind: Literal["stairs"] = "stairs"
    """One value after the other, each from its step on."""
    values: Annotated[list[float], Field(min_length=1)]
    """The values; the first holds from the start, the last holds from its step on and in sampling."""
    at_steps: list[PositiveInt] = []
    """Optimiser step at which each value but the first begins."""

    @model_validator(mode="after")
    def _one_step_each(self):
        if len(self.at_steps) != len(self.values) - 1 or sorted(set(self.at_steps)) != self.at_steps:
            raise ValueError(
                f"at_steps should be {len(self.values) - 1} rising steps, one for each value but the first, got {self.at_steps}"
            )
        return self

    def __str__(self) -> str:
        return " then ".join(f"{value:g}" for value in self.values)

    def at(self, step: int) -> float:
        return self.values[sum(step >= begin for begin in self.at_steps)]


class Plateau(Section):
    kind: Literal["plateau"] = "plateau"
    """From one value to another in equal parts, a part each time the training loss has stopped to fall."""
    start: float
    """The value at first."""
    end: float
    """The value after all parts; sampling uses the value that training has reached."""
    parts: PositiveInt = 4
    """In how many moves."""
    patience: PositiveInt = 200
    """Optimiser steps without a new lowest loss (averaged, and lower by 1 %) after which the next move is made."""

    @property
    def values(self) -> list[float]:
        return [self.start, self.end]

    def __str__(self) -> str:
        return f"{self.start:g} to {self.end:g} by plateaus of the loss"

    def after(self, moves: int) -> float:
        return linear(self.start, self.end, moves / self.parts)


SCHEDULES = (Linear, Cosine, Stairs, Plateau)


def or_schedule(number: Any) -> Any:
    """The type of a key that takes a number, of the type given, or a schedule of such numbers."""
    kinds = (Annotated[schedule, Tag(schedule.model_fields["kind"].default)] for schedule in SCHEDULES)
    return Annotated[Union[(Annotated[number, Tag("number")], *kinds)], Discriminator(_which)]


def _which(value: Any) -> str | None:
    if isinstance(value, dict):
        return value.get("kind")
    return value.kind if isinstance(value, SCHEDULES) else "number"


FALLS = "falls"  # metadata of a key whose schedules may not rise

MEMORY = 0.98  # of the average of the loss that a plateau is judged by
GAIN = 0.99  # a lowest loss counts where it is below the last one times this


@dataclass
class PlateauState:
    """How a plateau schedule stands; all of it is saved with a run."""

    moves: int = 0
    average: float = math.nan
    lowest: float = math.inf
    waited: int = 0

    def observe(self, loss: float, schedule: Plateau) -> None:
        """Take in the loss of an optimiser step."""
        self.average = loss if math.isnan(self.average) else MEMORY * self.average + (1 - MEMORY) * loss
        self.waited += 1
        if self.average < GAIN * self.lowest:
            self.lowest, self.waited = self.average, 0
        elif self.waited >= schedule.patience and self.moves < schedule.parts:
            self.moves, self.lowest, self.waited = self.moves + 1, math.inf, 0


def scheduled(section: Section, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every schedule within a section, with the steps that lead to it."""
    for name in type(section).model_fields:
        yield from _scheduled(getattr(section, name), (*path, name))


def _scheduled(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    if isinstance(value, SCHEDULES):
        yield path, value
    elif isinstance(value, Section):
        yield from scheduled(value, path)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _scheduled(item, (*path, i))


def check_schedules(section: Section) -> None:
    """Raise ValueError for a schedule that takes a value which its key would refuse, or that rises where it must fall."""
    for name, field in type(section).model_fields.items():
        schedule = getattr(section, name)
        if not isinstance(schedule, SCHEDULES):
            continue
        number = TypeAdapter(_number_type(type(section), name))
        for value in schedule.values:
            try:
                number.validate_python(value if takes_fractions(type(section), name) else round(value))
            except ValidationError as error:
                reason = error.errors()[0]["msg"].lower()
                raise ValueError(f"{name}: {value:g} of its schedule: {reason}") from None
        if FALLS in field.metadata and sorted(schedule.values, reverse=True) != schedule.values:
            shown = " to ".join(f"{value:g}" for value in schedule.values)
            raise ValueError(f"{name}: a schedule from {shown} rises, but this number may only fall over training")


def takes_fractions(section: type[Section], name: str) -> bool:
    """Whether a key takes fractions, or whole numbers alone."""
    return float in _plain_types(_number_type(section, name))


def _number_type(section: type[Section], name: str) -> Any:
    """The type of a key beside a schedule."""
    return get_args(section.model_fields[name].annotation)[0]


def _plain_types(annotation: Any) -> set[Any]:
    inner = [t for t in get_args(annotation) if not isinstance(t, FieldInfo)]
    return {annotation} | {plain for t in inner for plain in _plain_types(t)}


def settled(value: Any, numbers: dict[tuple[str | int, ...], float], path: tuple[str | int, ...] = ()) -> Any:
    """A section with its schedules replaced by numbers, whole ones where the key takes no others."""
    if path in numbers:
        return numbers[path]
    if isinstance(value, list):
        return [settled(item, numbers, (*path, i)) for i, item in enumerate(value)]
    if not isinstance(value, Section):
        return value
    fields = type(value).model_fields
    changed = {name: settled(getattr(value, name), numbers, (*path, name)) for name in fields}
    for name in fields:
        if (*path, name) in numbers and not takes_fractions(type(value), name):
            changed[name] = round(changed[name])
    return value.model_copy(update=changed)
