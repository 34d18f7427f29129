"""Where a run stands and how fast it goes."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from stgen import checkpoint, samplers, schema

SPEED_STEPS = 50  # a run limited in seconds fixes its number of steps from the speed of this many


def steps_of(cfg: schema.Config, sampler: samplers.Sampler) -> int | None:
    """Optimiser steps of the run; None until a run limited in seconds has measured its speed."""
    if cfg.train.num_train_epochs is not None:
        return sampler.steps_of(cfg.train.num_train_epochs)
    return cfg.train.max_train_steps


class Progress:
    """Where the run stands: everything but tensors that an exact resume needs."""

    def __init__(self, total: int | None):
        self.total = total
        self.step = 0
        self.seconds = 0.0  # spent on training steps, data included
        self.wandb_id: str | None = None
        self.held_out_loss: float | None = None
        self.smooth_loss = 0.0
        self._recent: list[float] = []  # seconds of the first steps
        self._window: list[tuple[float, float]] = []  # loss and gradient norm since the last line of metrics

    @classmethod
    def resumed(cls, loaded: checkpoint.Loaded, total: int | None, cfg: schema.Config) -> "Progress":
        """Where the checkpoint stood; the number of steps is its own unless the config now limits the run otherwise."""
        state = loaded.state["progress"]
        progress = cls(total)
        progress.step, progress.seconds, progress.wandb_id = loaded.step, state["seconds"], state["wandb_id"]
        progress.held_out_loss, progress.smooth_loss = state["held_out_loss"], state["smooth_loss"]
        progress._recent, progress._window = state["recent"], [tuple(pair) for pair in state["window"]]
        budget = cfg.train.max_train_seconds
        if budget is not None:
            same = budget == loaded.state["config"]["train"]["max_train_seconds"]
            progress.total = state["total"] if same else progress._steps_within(budget)
        return progress

    def state(self) -> dict[str, Any]:
        return {
            "progress": {
                "total": self.total,
                "seconds": self.seconds,
                "wandb_id": self.wandb_id,
                "held_out_loss": self.held_out_loss,
                "smooth_loss": self.smooth_loss,
                "recent": self._recent,
                "window": self._window,
            }
        }

    @property
    def done(self) -> bool:
        return self.total is not None and self.step >= self.total

    def advance(self, loss: float, norm: float, seconds: float, cfg: schema.Config) -> None:
        """Count one optimiser step that took `seconds`."""
        self.step += 1
        self.seconds += seconds
        self.smooth_loss = loss if self.step == 1 else 0.98 * self.smooth_loss + 0.02 * loss
        self._window.append((loss, norm))
        budget = cfg.train.max_train_seconds
        if budget is not None and self.total is None:
            self._recent.append(seconds)
            if self.step >= SPEED_STEPS or self.seconds >= budget:
                self.total = self._steps_within(budget)

    def _steps_within(self, budget: float) -> int | None:
        """Steps in all if the rest of `budget` seconds is spent at the median speed of the first steps."""
        if not self._recent:
            return None
        typical = sorted(self._recent)[len(self._recent) // 2]
        return self.step + max(0, int((budget - self.seconds) / typical))

    def window_metrics(self, rate: float, sampler: samplers.Sampler) -> dict[str, float]:
        """Means since the last call, and how much has been seen."""
        window, self._window = self._window, []
        loss, norm = (sum(values) / len(window) for values in zip(*window, strict=True))
        seen = sampler.seen(self.step)
        return {
            "train/loss": loss,
            "train/grad_norm": norm,
            "train/lr": rate,
            "train/samples_seen": seen,
            "train/epoch": seen / sampler.clips_per_epoch,
        }


class Load(NamedTuple):
    """What a step computes."""

    clips: int
    tokens: int
    flops: int


class Meter:
    """Seconds of a step by what they were spent on, and the rates that follow.

    loads: what a step computes, by the number of the bucket that its clips are from.
    """

    def __init__(self, loads: Sequence[Load], device: torch.device):
        self._loads, self._done = loads, Load(0, 0, 0)
        self.cuda = device.type == "cuda"
        self._split = {"data": 0.0, "step": 0.0}
        self._steps, self.seconds = 0, 0.0

    def start(self, bucket: int) -> None:
        self._mark, self.seconds = time.perf_counter(), 0.0
        self._steps += 1
        self._done = Load(*(done + more for done, more in zip(self._done, self._loads[bucket], strict=True)))

    def lap(self, name: str) -> None:
        """Book the time since the last mark under `name`."""
        if name == "step" and self.cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._split[name] += now - self._mark
        self.seconds += now - self._mark
        self._mark = now

    def metrics(self, rejected: int) -> dict[str, float]:
        """Rates since the last call."""
        data, step, steps = self._split["data"], self._split["step"], self._steps
        seconds = (data + step) / steps
        clips, tokens, flops = (done / steps for done in self._done)
        self._split, self._steps, self._done = {"data": 0.0, "step": 0.0}, 0, Load(0, 0, 0)
        memory = {"perf/peak_mem_gb": torch.cuda.max_memory_allocated() / 1e9} if self.cuda else {}
        return memory | {
            "perf/step_time_s": seconds,
            "perf/data_wait_s": data / steps,
            "perf/samples_per_s": clips / seconds,
            "perf/tokens_per_s": tokens / seconds,
            "perf/tflops": flops / seconds / 1e12,
            "data/rejects": rejected,
        }
