"""What the network learns: the path from data to noise, the target, the density of times, the weight of the loss.

Flow (rectified flow; Liu et al., arXiv:2209.03003, eq. 1):      z_t = (1 - t) x + t e,   v = e - x,        t in (0, 1)
Diffusion (variance preserving; Ho et al., arXiv:2006.11239):    z_k = a_k x + s_k e,     v = a_k e - s_k x

x data, e standard normal noise; v of diffusion as in Salimans & Ho, arXiv:2202.00512, section 4.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor

SMALLEST_TIME = 0.05  # below it, dividing by t would let single samples rule the loss of data prediction


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t -> s t / (1 + (s - 1) t): more weight on noise for s > 1 (Esser et al., arXiv:2403.03206, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def _column(values: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...], or [B, T] -> [B, 1, T, 1, ...], to multiply a batch shaped as `like`."""
    if values.ndim == 1:
        return values.to(like).view(-1, *(1,) * (like.ndim - 1))
    return values.to(like).view(values.shape[0], 1, values.shape[1], *(1,) * (like.ndim - 3))


def flow_noise(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """z_t = (1 - t) x + t e."""
    t = _column(t, x)
    return (1 - t) * x + t * noise


def flow_velocity_from_sample(sample: Tensor, z: Tensor, t: Tensor, smallest: float = 1e-4) -> Tensor:
    """v = (z - x) / t, which follows from z = x + t v."""
    return (z - sample) / _column(t, z).clamp(min=smallest)


def min_snr_weight(snr: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Min-SNR-gamma weight of the loss on what the network predicts (Hang et al., arXiv:2303.09556, section 3.4)."""
    clipped = snr.clamp(max=gamma)
    return {"sample": clipped, "epsilon": clipped / snr, "v_prediction": clipped / (snr + 1)}[prediction_type]


@dataclass(frozen=True)
class Objective:
    """One choice of path, prediction, time density and weight; the fields are those of the config's section."""

    path: str = "flow"
    prediction_type: str = "v_prediction"
    frame_times: str = "clip"
    timestep_density: str = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    shift: float = 1.0
    beta_schedule: str = "squaredcos_cap_v2"
    num_train_timesteps: int = 1000
    snr_gamma: float | None = None
    _alphas: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        beta_schedule: Any = self.beta_schedule
        schedule = DDPMScheduler(num_train_timesteps=self.num_train_timesteps, beta_schedule=beta_schedule)
        object.__setattr__(self, "_alphas", schedule.alphas_cumprod)

    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` times in (0, 1) from the density, shifted under flow (Esser et al., arXiv:2403.03206, section 3.1)."""
        u = compute_density_for_timestep_sampling(
            self.timestep_density, count, self.logit_mean, self.logit_std, self.mode_scale, generator=generator
        ).clamp(1e-5, 1 - 1e-5)
        return shift_time(u, self.shift)

    def draw_clip_times(self, frames: int, generator: torch.Generator) -> Tensor:
        """The times of one clip: [1], or [frames] where `frame_times` says that frames differ.

        frame: each has its own (Diffusion Forcing; Chen et al., arXiv:2407.01392); past: a random number of leading
        frames, none to all but one, are clean (time 0) and the others share one, as when a clip goes on from given frames.
        """
        if self.frame_times == "frame":
            return self.draw_times(frames, generator)
        time = self.draw_times(1, generator)
        if self.frame_times == "clip":
            return time
        past = int(torch.randint(frames, (), generator=generator))
        return torch.cat([time.new_zeros(past), time.expand(frames - past)])

    def stream_refusal(self) -> str | None:
        """Why a network trained so cannot go on from clean frames, in one sentence; None where it can."""
        if self.frame_times != "clip":
            return None
        return (
            "this model knows one noise level for all frames of a clip, but a stream goes on from clean ones; train with "
            "objective.frame_times: past"
        )

    def model_time(self, t: Tensor) -> Tensor:
        """The number the network is told: 1000 t under flow, the step's index under diffusion."""
        return t * 1000 if self.path == "flow" else self._step(t).to(t.dtype)

    def add_noise(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z of data x [B, C, T, ...], noise and times [B], or under flow [B, T]."""
        if self.path == "flow":
            return flow_noise(x, noise, t)
        a, s = self._coefficients(t, x)
        return a * x + s * noise

    def loss(self, output: Tensor, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Mean squared error of each clip: [B]; of clips with a time for every frame [B, T], over the frames that hold noise.

        Under flow the error is that of the velocity whatever the network predicts; for data prediction this weighs
        the error of x by 1 / t^2, held constant below SMALLEST_TIME.
        """
        if self.path == "flow":
            if self.prediction_type == "sample":
                error = (output.float() - x) / _column(t, x).clamp(min=SMALLEST_TIME)
            else:
                error = output.float() - (noise - x)
            if t.ndim == 1:
                return error.square().flatten(1).mean(1)
            noisy = (t > 0).to(error)  # [B, T]
            return (error.square().transpose(1, 2).flatten(2).mean(2) * noisy).sum(1) / noisy.sum(1).clamp(min=1)
        a, s = self._coefficients(t, x)
        target = {"epsilon": noise, "sample": x, "v_prediction": a * noise - s * x}[self.prediction_type]
        error = (output.float() - target).square().flatten(1).mean(1)
        if self.snr_gamma is None:
            return error
        return error * min_snr_weight(((a / s) ** 2).flatten(), self.snr_gamma, self.prediction_type)

    def for_scheduler(self, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """The network's output as the scheduler expects it: velocity under flow, unchanged under diffusion."""
        if self.path == "flow" and self.prediction_type == "sample":
            return flow_velocity_from_sample(output.float(), z, t)
        return output.float()

    def _step(self, t: Tensor) -> Tensor:
        return (t * self.num_train_timesteps).long().clamp(max=self.num_train_timesteps - 1)

    def _coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """a and s of z = a x + s e, each [B, 1, ...]."""
        alphas = self._alphas.to(t.device)[self._step(t)]
        return _column(alphas.sqrt(), like), _column((1 - alphas).sqrt(), like)
