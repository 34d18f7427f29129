"""A number that changes over training: courses from a start value to an end value, and the learning rate."""

import math


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
