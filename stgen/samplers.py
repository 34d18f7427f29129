"""Which clips make up the batch of a step: pure functions of seed and step, so that a run resumes at any step."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np
import torch

from stgen.listing import DataError

Key = tuple[int, int]  # (index, epoch): a sample, and how often it was read before


def data_generator(*key: int | str) -> torch.Generator:
    """A generator that depends on `key` alone: not on the process, the worker or the order of calls."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def split(count: int, held_out: int, seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(training, held-out) indices of `count` samples, ascending; at most a tenth is held out."""
    order = torch.randperm(count, generator=data_generator(seed, "split")).tolist()
    held = min(held_out, count // 10)
    return tuple(sorted(order[held:])), tuple(sorted(order[:held]))


class Order:
    """Items in shuffled passes laid end to end, item i as often as weights[i] says: once a pass, twice, in every third.

    By the end of pass p item i has come floor(weights[i] * p + phase) times, where only broken weights have a phase,
    drawn from `key`. So shares are exact over time, and any position can be asked for without those before it.
    """

    def __init__(self, weights: Sequence[float], *key: int | str):
        self.weights, self.key = np.asarray(weights, dtype=np.float64), key
        drawn = torch.rand(len(self.weights), generator=data_generator(*key, "phases"), dtype=torch.float64).numpy()
        self._phases = np.where(self.weights % 1 == 0, 0.0, drawn)
        self._pass = (0, 0, np.empty(0, np.int64), np.empty(0, np.int64))  # number, first position, items, times

    def at(self, position: int) -> Key:
        """(item, how often it came before) at a position counted from 0."""
        _, first, items, times = self._pass_of(position)
        return int(items[position - first]), int(times[position - first])

    def before(self, position: int) -> np.ndarray:
        """How often each item comes before a position: int64 [items]."""
        number, first, items, _ = self._pass_of(position)
        return self._came(number) + np.bincount(items[: position - first], minlength=len(self.weights))

    def _came(self, number: int) -> np.ndarray:
        """How often each item has come before the pass of that number."""
        return np.floor(self.weights * number + self._phases).astype(np.int64)

    def _pass_of(self, position: int) -> tuple[int, int, np.ndarray, np.ndarray]:
        _, first, items, _ = self._pass
        if not first <= position < first + len(items):
            number = int(position / self.weights.sum())
            while self._came(number + 1).sum() <= position:
                number += 1
            while self._came(number).sum() > position:
                number -= 1
            self._pass = self._shuffled(number)
        return self._pass

    def _shuffled(self, number: int) -> tuple[int, int, np.ndarray, np.ndarray]:
        before = self._came(number)
        often = self._came(number + 1) - before
        items = np.repeat(np.arange(len(often)), often)
        items = items[torch.randperm(len(items), generator=data_generator(*self.key, "epoch", number)).numpy()]
        places = np.argsort(items, kind="stable")  # all of the first item, in the order in which they come; …
        times = np.empty_like(items)
        times[places] = np.arange(len(items)) + np.repeat(before - (np.cumsum(often) - often), often)
        return number, int(before.sum()), items, times


class StepSampler:
    """Which clips make up the batch of a step: a pure function, so a run resumes at any step.

    Epochs are seeded permutations laid end to end; batches run on across their borders and drop nothing. `weights`, one
    a clip, say how often each comes; without them all come once an epoch. `key` tells several samplers apart.
    Iterating gives the batches of start_step, start_step + 1, … for ever, as a DataLoader's batch_sampler.
    """

    def __init__(
        self,
        indices: Sequence[int],
        batch_size: int,
        seed: int,
        start_step: int = 0,
        weights: Sequence[float] | None = None,
        key: tuple[int | str, ...] = (),
    ):
        if not indices:
            raise DataError("there is no video to train on; add videos or lower data.held_out_clips")
        self.indices, self.batch_size, self.seed, self.start_step = tuple(indices), batch_size, seed, start_step
        self.order = Order([1.0] * len(self.indices) if weights is None else weights, seed, *key)

    @property
    def clips_per_epoch(self) -> float:
        return float(self.order.weights.sum())

    def steps_of(self, epochs: float) -> int:
        """Steps that read so many epochs, at least one."""
        return max(1, math.ceil(epochs * self.clips_per_epoch / self.batch_size))

    def samples(self, step: int) -> list[Key]:
        """The (index, epoch) pairs of a step, counted from 0; epoch is how often the clip was read before."""
        first = self.seen(step)
        places = (self.order.at(position) for position in range(first, first + self.batch_size))
        return [(self.indices[place], epoch) for place, epoch in places]

    def seen(self, step: int) -> int:
        """Clips in the batches before a step."""
        return step * self.batch_size

    @property
    def shares(self) -> list[float]:
        """The share of steps that each bucket has."""
        return [1.0]

    def bucket(self, step: int) -> int:
        """Which bucket the batch of a step is from: there is one."""
        return 0

    def __iter__(self) -> Iterator[list[Key]]:
        return map(self.samples, count(self.start_step))


class BucketSampler:
    """A StepSampler for each bucket, and which of them makes the batch of a step.

    A bucket comes in proportion to its clips (their weights) over its batch size: in whole passes over all, every clip
    is read as often as its weight says. Batches of a bucket run on across its epochs, so that none is incomplete.
    """

    def __init__(self, members: Sequence[StepSampler], seed: int, start_step: int = 0):
        self.members, self.start_step = tuple(members), start_step
        self.indices = tuple(sorted(index for member in members for index in member.indices))
        self.order = Order([member.clips_per_epoch / member.batch_size for member in members], seed, "buckets")

    @property
    def clips_per_epoch(self) -> float:
        return sum(member.clips_per_epoch for member in self.members)

    def steps_of(self, epochs: float) -> int:
        """Steps that read so many epochs, at least one."""
        return max(1, math.ceil(epochs * float(self.order.weights.sum()) - 1e-9))

    def samples(self, step: int) -> list[Key]:
        """The (index, epoch) pairs of a step, counted from 0."""
        bucket, visit = self.order.at(step)
        return self.members[bucket].samples(visit)

    def seen(self, step: int) -> int:
        """Clips in the batches before a step."""
        visits = self.order.before(step)
        return sum(member.seen(int(visit)) for member, visit in zip(self.members, visits, strict=True))

    @property
    def shares(self) -> list[float]:
        """The share of steps that each bucket has."""
        return (self.order.weights / self.order.weights.sum()).tolist()

    def bucket(self, step: int) -> int:
        """Which bucket the batch of a step is from."""
        return self.order.at(step)[0]

    def __iter__(self) -> Iterator[list[Key]]:
        return map(self.samples, count(self.start_step))


Sampler = StepSampler | BucketSampler
