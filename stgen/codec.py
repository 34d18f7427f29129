"""Codecs: frames in [-1, 1] <-> latents of about unit variance that the model learns to denoise.

Every codec offers `latent_shape`, `encode` and `decode`. PatchPCA and Pixels are models of our own; any diffusers
autoencoder joins them through `Autoencoder`.
"""

from pathlib import Path
from typing import Any, Protocol

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from torch import Tensor, nn

Shape = tuple[int, int, int, int]


class Codec(Protocol):
    fixed: bool  # encoding draws no random numbers, so latents may be kept

    def latent_shape(self, frames: int, height: int, width: int) -> Shape: ...
    def encode(self, frames: Tensor) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...


class CodecError(ValueError):
    """A clip or a path that the codec cannot take; one sentence that says what to do."""


def to_unit(frames: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return frames.float() / 127.5 - 1


def to_bytes(frames: Tensor) -> Tensor:
    """float [-1, 1] -> uint8 [0, 255], clipped."""
    return ((frames.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class PatchPCA(ModelMixin, ConfigMixin):
    """Linear codec: principal components of p x q x r patches, all divided by one number.

    One common scale keeps the components' variances apart, as whitening them cost 11 points of accuracy (measured).
    """

    fixed = True

    @register_to_config
    def __init__(self, patch_size: tuple[int, int, int], components: int):
        super().__init__()
        numbers = 3 * patch_size[0] * patch_size[1] * patch_size[2]
        self.mean = nn.Parameter(torch.zeros(numbers), requires_grad=False)
        self.basis = nn.Parameter(torch.zeros(components, numbers), requires_grad=False)  # orthonormal rows
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)

    @torch.no_grad()
    def fit(self, frames: Tensor) -> "PatchPCA":
        """Fit mean, components and scale to frames [B, 3, T, H, W] in [-1, 1]."""
        patches = self._patches(frames).flatten(0, 3).double()  # [M, P]
        if len(patches) < self.config.components:
            raise CodecError(
                f"codec.components={self.config.components} needs at least as many patches to fit, found {len(patches)}; "
                "add videos, or lower codec.components or codec.patch_size"
            )
        mean = patches.mean(0)
        covariance = (patches - mean).T @ (patches - mean) / len(patches)
        values, vectors = torch.linalg.eigh(covariance)  # ascending
        keep = self.config.components
        self.mean.copy_(mean)
        self.basis.copy_(vectors.flip(1)[:, :keep].T)
        self.scale.copy_(values.flip(0)[:keep].mean().clamp(min=1e-12).sqrt())
        return self

    def latent_shape(self, frames: int, height: int, width: int) -> Shape:
        extents = []
        for name, extent, patch in zip(
            ("num_frames", "height", "width"), (frames, height, width), self.config.patch_size, strict=True
        ):
            if extent % patch:
                raise CodecError(f"{name} {extent} is not divisible by the codec's patch of {patch}")
            extents.append(extent // patch)
        return (self.config.components, *extents)

    def encode(self, frames: Tensor) -> Tensor:
        """[B, 3, T, H, W] -> [B, components, T/p, H/q, W/r]."""
        self.latent_shape(*frames.shape[2:])
        latents = (self._patches(frames) - self.mean) @ self.basis.T / self.scale
        return latents.movedim(-1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """[B, components, t, h, w] -> [B, 3, t p, h q, w r], not clipped."""
        p, q, r = self.config.patch_size
        patches = latents.movedim(1, -1).to(self.basis.dtype) * self.scale @ self.basis + self.mean
        return rearrange(patches, "b t h w (c p q r) -> b c (t p) (h q) (w r)", p=p, q=q, r=r)

    def _patches(self, frames: Tensor) -> Tensor:
        p, q, r = self.config.patch_size
        return rearrange(frames, "b c (t p) (h q) (w r) -> b t h w (c p q r)", p=p, q=q, r=r)


class Pixels(ModelMixin, ConfigMixin):
    """The identity, shifted and scaled to unit variance."""

    fixed = True

    @register_to_config
    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)

    @torch.no_grad()
    def fit(self, frames: Tensor) -> "Pixels":
        self.mean.copy_(frames.mean())
        self.scale.copy_(frames.std().clamp(min=1e-6))
        return self

    def latent_shape(self, frames: int, height: int, width: int) -> Shape:
        return (3, frames, height, width)

    def encode(self, frames: Tensor) -> Tensor:
        return (frames - self.mean) / self.scale

    def decode(self, latents: Tensor) -> Tensor:
        return latents * self.scale + self.mean


class Autoencoder:
    """Any diffusers autoencoder; one without 3-D convolutions is taken for an image model and run frame by frame.

    Latents are the posterior's mean, so encoding is fixed, and are normalised as the autoencoder's config says.
    """

    fixed = True

    def __init__(self, vae: Any):
        self.vae = vae.requires_grad_(False).eval()
        self.video = any(isinstance(module, nn.Conv3d) for module in vae.modules())
        self._shapes: dict[int, tuple[int, int, int]] = {}  # frames -> (channels, latent frames, pixels per latent row)

    def latent_shape(self, frames: int, height: int, width: int) -> Shape:
        channels, latent_frames, cell = self._probe(frames)
        for name, extent in (("height", height), ("width", width)):
            if extent % cell:
                raise CodecError(f"{name} {extent} is not divisible by the autoencoder's cell of {cell} pixels")
        return (channels, latent_frames, height // cell, width // cell)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        frames = frames.to(self.vae.dtype)
        if not self.video:
            images = rearrange(frames, "b c t h w -> (b t) c h w")
            return rearrange(self._normalise(self._mean(images)), "(b t) c h w -> b c t h w", t=frames.shape[2]).float()
        return self._normalise(self._mean(frames)).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        latents = self._denormalise(latents.to(self.vae.dtype))
        if not self.video:
            images = self.vae.decode(rearrange(latents, "b c t h w -> (b t) c h w")).sample
            return rearrange(images, "(b t) c h w -> b c t h w", t=latents.shape[2]).float()
        return self.vae.decode(latents).sample.float()

    def _mean(self, frames: Tensor) -> Tensor:
        out = self.vae.encode(frames)
        return out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latent

    def _statistics(self, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """What to subtract from latents and what to divide them by."""
        config = self.vae.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is not None and std is not None:
            shape = (1, -1, *(1,) * (latents.ndim - 2))
            return (latents.new_tensor(mean).view(shape), latents.new_tensor(std).view(shape))
        scaling = getattr(config, "scaling_factor", None) or 1.0
        return getattr(config, "shift_factor", None) or 0.0, 1.0 / scaling

    def _normalise(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def _denormalise(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return latents * std + mean

    def _probe(self, frames: int) -> tuple[int, int, int]:
        """Send a small black clip through, since every family has its own rule for the number of frames."""
        if frames not in self._shapes:
            side = 64
            clip = torch.zeros(1, 3, frames, side, side, device=self.vae.device)
            latents = self.encode(clip)
            back = self.decode(latents).shape[2]
            if back != frames:
                raise CodecError(
                    f"{type(self.vae).__name__} gives {back} frames back for num_frames={frames}; use a number that it "
                    f"keeps, such as {back}"
                )
            self._shapes[frames] = (latents.shape[1], latents.shape[2], side // latents.shape[3])
        return self._shapes[frames]


def as_codec(component: Any) -> Codec:
    """A pipeline's component as a codec: our own as they are, a diffusers autoencoder wrapped."""
    return component if hasattr(component, "latent_shape") else Autoencoder(component)


def load_autoencoder(path: str, subfolder: str | None = None, dtype: str = "float32") -> Any:
    """A diffusers autoencoder from a local folder or a hub id; safetensors only.

    Raises CodecError when the folder holds none.
    """
    where = f"{path}/{subfolder}" if subfolder else path
    try:
        config = ConfigMixin.load_config(path, subfolder=subfolder)
    except (OSError, ValueError) as error:
        raise CodecError(
            f"codec.path: no autoencoder at {where} (expected config.json and safetensors): {_first_line(error)}"
        ) from None
    name = config.get("_class_name", "") if isinstance(config, dict) else ""
    if not name.startswith("Autoencoder") or not hasattr(diffusers, name):
        raise CodecError(f"codec.path: {where} holds {name or 'no class name'}, not a diffusers autoencoder")
    if Path(path).exists() is False and "/" not in path:
        raise CodecError(f"codec.path: {path} is neither a folder nor a hub id")
    try:
        return getattr(diffusers, name).from_pretrained(
            path, subfolder=subfolder, torch_dtype=getattr(torch, dtype), use_safetensors=True
        )
    except OSError as error:
        raise CodecError(f"codec.path: {where} cannot be loaded: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
