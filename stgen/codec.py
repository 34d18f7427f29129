"""Codecs: frames in [-1, 1] <-> latents of about unit variance that the model learns to denoise.

Every codec offers `latent_shape`, `encode` and `decode`. PatchPCA and Pixels are models of our own; any diffusers
autoencoder joins them through `Autoencoder`.
"""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from einops import rearrange
from torch import Tensor, nn

Shape = tuple[int, int, int, int]


class Codec(Protocol):
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

    config: Any  # diffusers declares a plain dict; it also reads by attribute

    @register_to_config
    def __init__(self, patch_size: tuple[int, int, int], components: int):
        super().__init__()
        numbers = 3 * patch_size[0] * patch_size[1] * patch_size[2]
        self.mean = nn.Parameter(torch.zeros(numbers), requires_grad=False)
        self.basis = nn.Parameter(torch.zeros(components, numbers), requires_grad=False)  # orthonormal rows
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)

    @torch.no_grad()
    def fit(self, clips: Iterable[Tensor]) -> "PatchPCA":
        """Fit mean, components and scale to clips [3, T, H, W] in [-1, 1], a few at a time.

        Raises CodecError when the clips have fewer patches than there are components.
        """
        numbers, keep, count = len(self.mean), self.config.components, 0
        total = torch.zeros(numbers, dtype=torch.float64, device=self.mean.device)
        products = torch.zeros(numbers, numbers, dtype=torch.float64, device=self.mean.device)
        clips = iter(clips)
        while some := list(islice(clips, 32)):  # many at once, since the products outweigh the patches of one clip
            patches = self._patches(torch.stack(some)).flatten(0, 3)  # [M, P]
            count += len(patches)
            total += patches.double().sum(0)
            products += patches.T @ patches  # float32 within these clips, float64 over all
        if count < keep:
            raise CodecError(
                f"codec.components {keep} needs at least as many patches to fit, found {count}; "
                "add videos, raise codec.fit_clips, or lower codec.components or codec.patch_size"
            )
        mean = total / count
        values, vectors = torch.linalg.eigh(products / count - torch.outer(mean, mean))  # ascending
        self.mean.copy_(mean)
        self.basis.copy_(vectors.flip(1)[:, :keep].T)
        self.scale.copy_(values.flip(0)[:keep].mean().clamp(min=1e-12).sqrt())
        return self

    def latent_shape(self, frames: int, height: int, width: int) -> Shape:
        p, q, r = self.config.patch_size
        _check_divisible("the codec's patch of", num_frames=(frames, p), height=(height, q), width=(width, r))
        return (self.config.components, frames // p, height // q, width // r)

    @apply_forward_hook  # offloading brings a part to the GPU when it is called, in whatever way
    def encode(self, frames: Tensor) -> Tensor:
        """[B, 3, T, H, W] -> [B, components, T/p, H/q, W/r]."""
        self.latent_shape(*frames.shape[2:])
        latents = (self._patches(frames.to(self.mean.dtype)) - self.mean) @ self.basis.T / self.scale
        return latents.movedim(-1, 1)

    @apply_forward_hook
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

    config: Any  # diffusers declares a plain dict; it also reads by attribute

    @register_to_config
    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)

    @torch.no_grad()
    def fit(self, clips: Iterable[Tensor]) -> "Pixels":
        """Fit mean and scale to clips [3, T, H, W] in [-1, 1], one at a time."""
        moments = torch.stack([torch.stack([clip.double().mean(), clip.double().square().mean()]) for clip in clips])
        mean, square = moments.mean(0)
        self.mean.copy_(mean)
        self.scale.copy_((square - mean**2).clamp(min=1e-12).sqrt())
        return self

    def latent_shape(self, frames: int, height: int, width: int) -> Shape:
        _check_divisible("a pixel of", num_frames=(frames, 1), height=(height, 1), width=(width, 1))
        return (3, frames, height, width)

    @apply_forward_hook
    def encode(self, frames: Tensor) -> Tensor:
        return (frames - self.mean) / self.scale

    @apply_forward_hook
    def decode(self, latents: Tensor) -> Tensor:
        return latents * self.scale + self.mean


class Autoencoder:
    """Any diffusers autoencoder; one without 3-D convolutions is taken for an image model and run frame by frame.

    Latents are the posterior's mean, so encoding is fixed, and are normalised as the autoencoder's config says. Clips are
    encoded one by one: their latents do not depend, in the last bits, on what else is in the batch, and memory is that of
    one clip.
    """

    def __init__(self, vae: Any):
        self.vae = vae.requires_grad_(False).eval()
        self.video = any(isinstance(module, nn.Conv3d) for module in vae.modules())
        self._shapes: dict[int, tuple[int, int, int]] = {}  # frames -> (channels, latent frames, pixels per latent row)

    def latent_shape(self, frames: int, height: int, width: int) -> Shape:
        channels, latent_frames, cell = self._probe(frames)
        _check_divisible("the autoencoder's cell of", height=(height, cell), width=(width, cell))
        return (channels, latent_frames, height // cell, width // cell)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        return torch.cat([self._encode_one(clip) for clip in frames.to(self.vae.dtype).split(1)])

    def _encode_one(self, clip: Tensor) -> Tensor:
        """[1, 3, T, H, W] -> [1, C, t, h, w]."""
        if not self.video:
            images = rearrange(clip, "1 c t h w -> t c h w")
            return rearrange(self._normalise(self._mean(images)), "t c h w -> 1 c t h w").float()
        return self._normalise(self._mean(clip)).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        latents = self._denormalise(latents.to(self.vae.dtype))
        if not self.video:
            images = self.vae.decode(rearrange(latents, "b c t h w -> (b t) c h w")).sample
            return rearrange(images, "(b t) c h w -> b c t h w", t=latents.shape[2]).float()
        told = {"temb": latents.new_zeros(len(latents))} if self._setting("timestep_conditioning") else {}
        return self.vae.decode(latents, **told).sample.float()

    def _mean(self, frames: Tensor) -> Tensor:
        out = self.vae.encode(frames)[0]
        return out if isinstance(out, Tensor) else out.mode()

    def _setting(self, name: str) -> Any:
        """A value of the autoencoder's config, or of its buffers, where the LTX family keeps its statistics."""
        value = getattr(self.vae.config, name, None)
        return dict(self.vae.named_buffers()).get(name) if value is None else value

    def _statistics(self, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """What to subtract from latents and what to divide them by."""
        mean, std = self._setting("latents_mean"), self._setting("latents_std")
        scaling = self._setting("scaling_factor") or 1.0
        if mean is None or std is None:
            return self._setting("shift_factor") or 0.0, 1.0 / scaling
        mean, std = (torch.as_tensor(x).to(latents).view(1, -1, *(1,) * (latents.ndim - 2)) for x in (mean, std))
        return mean, std / scaling

    def _normalise(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def _denormalise(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return latents * std + mean

    def _probe(self, frames: int) -> tuple[int, int, int]:
        """Send a small black clip through, since every family has its own rule for the number of frames."""
        if frames not in self._shapes:
            found = self._try(frames)
            if isinstance(found, str):
                near = (n for d in range(1, 17) for n in (frames - d, frames + d) if n > 0)
                kept = next((f"; the nearest number it takes is {n}" for n in near if self.takes(n)), "")
                raise CodecError(f"{type(self.vae).__name__} cannot take num_frames {frames}: {found}{kept}")
            self._shapes[frames] = found
        return self._shapes[frames]

    def _try(self, frames: int, side: int = 64) -> tuple[int, int, int] | str:
        """Channels, latent frames and pixels per latent row of a black clip, or why it does not pass."""
        try:
            latents = self.encode(torch.zeros(1, 3, frames, side, side, device=_execution_device(self.vae)))
            back = self.decode(latents).shape[2]
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            return _first_line(error)
        if back != frames:
            return f"it gives {back} frames back"
        return latents.shape[1], latents.shape[2], side // latents.shape[3]

    def takes(self, frames: int) -> bool:
        """Whether clips of so many frames come back as long as they went in."""
        found = self._shapes.get(frames) or self._try(frames)
        if not isinstance(found, str):
            self._shapes[frames] = found
        return not isinstance(found, str)


def _execution_device(module: Any) -> torch.device:
    """Where a module computes: by its hooks where it is offloaded, since its weights then lie elsewhere."""
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((torch.device(device) for device in devices if device is not None), module.device)


def as_codec(component: Any) -> Codec:
    """A pipeline's component as a codec: our own as they are, a diffusers autoencoder wrapped."""
    return component if hasattr(component, "latent_shape") else Autoencoder(component)


def load_autoencoder(path: str, subfolder: str | None = None, dtype: str = "float32", local: bool = False) -> Any:
    """A diffusers autoencoder from a local folder or a hub id; safetensors only; `local` fetches nothing.

    Raises CodecError when the folder holds none.
    """
    where = f"{path}/{subfolder}" if subfolder else path
    if not Path(path).exists() and "/" not in path:
        raise CodecError(f"codec.path: {path} is neither a folder nor a hub id")
    try:
        config = PatchPCA.load_config(path, subfolder=subfolder, local_files_only=local)  # of any class
    except (OSError, ValueError, RecursionError) as error:
        raise CodecError(
            f"codec.path: no autoencoder at {where} (expected config.json and safetensors): {_first_line(error)}"
        ) from None
    name = str(config.get("_class_name", "")) if isinstance(config, dict) else ""
    if not name.startswith("Autoencoder") or not hasattr(diffusers, name):
        raise CodecError(f"codec.path: {where} holds {name or 'no class name'}, not a diffusers autoencoder")
    try:
        vae, report = getattr(diffusers, name).from_pretrained(
            path,
            subfolder=subfolder,
            torch_dtype=getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
            local_files_only=local,
        )
    except Exception as error:  # whatever a damaged or hostile folder provokes
        raise CodecError(f"codec.path: {where} cannot be loaded: {_first_line(error)}") from None
    if absent := report["missing_keys"]:
        raise CodecError(f"codec.path: {where} lacks {len(absent)} weights of {name}, {absent[0]} among them")
    return vae


def _check_divisible(what: str, **extents: tuple[int, int]) -> None:
    for name, (extent, size) in extents.items():
        if extent < 1:
            raise CodecError(f"{name} {extent} should be at least 1")
        if extent % size:
            raise CodecError(f"{name} {extent} is not divisible by {what} {size}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
