"""The diffusers face of a trained model: prompts in, clips out, saved and loaded as one folder."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  (diffusers looks it up where components are defined)
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from stgen import codec as codecs
from stgen import model, text  # noqa: F401  (a saved pipeline names these modules; they must be loaded to be found)
from stgen.objective import Objective

SCHEDULERS = ("euler", "heun", "unipc", "dpm++", "ddim")


@dataclass
class VideoPipelineOutput(BaseOutput):
    frames: Any
    """Clips: tensor [B, T, C, H, W], array [B, T, H, W, C], lists of images, or latents."""


def build_scheduler(name: str | None, objective: Objective) -> Any:
    """A diffusers scheduler for the objective's path; None takes euler for flow and ddim for diffusion.

    Raises ValueError for a scheduler of the other path.
    """
    if objective.path == "diffusion":
        common = dict(
            num_train_timesteps=objective.num_train_timesteps,
            beta_schedule=objective.beta_schedule,
            prediction_type=objective.prediction_type,
        )
        match name:
            case None | "ddim":
                # Trailing spacing begins at the last step, where training ends (Lin et al., arXiv:2305.08891).
                return diffusers.DDIMScheduler(**common, clip_sample=False, timestep_spacing="trailing")
            case "unipc":
                return diffusers.UniPCMultistepScheduler(**common, timestep_spacing="trailing")
            case "dpm++":
                return diffusers.DPMSolverMultistepScheduler(**common, timestep_spacing="trailing")
        raise ValueError(f"scheduler {name} is for objective.path flow; with diffusion use ddim, unipc or dpm++")
    flow = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=objective.shift)
    match name:
        case None | "euler":
            return diffusers.FlowMatchEulerDiscreteScheduler(shift=objective.shift)
        case "heun":
            return diffusers.FlowMatchHeunDiscreteScheduler(shift=objective.shift)
        case "unipc":
            return diffusers.UniPCMultistepScheduler(**flow)
        case "dpm++":
            return diffusers.DPMSolverMultistepScheduler(**flow)
    raise ValueError(f"scheduler {name} is for objective.path diffusion; with flow use euler, heun, unipc or dpm++")


def set_steps(scheduler: Any, steps: int, path: str, device: torch.device | str) -> None:
    """Fix the scheduler's times.

    Under flow the times 1, ..., 1/n are passed where the scheduler takes them, since left to itself the Euler
    scheduler shifts its smallest time twice.
    """
    if path == "flow" and "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps), device=device)
    else:
        scheduler.set_timesteps(steps, device=device)


class VideoPipeline(DiffusionPipeline):
    """Text-to-video sampling with a VideoTransformer.

    Args:
        transformer: the model.
        codec: PatchPCA, Pixels or a diffusers autoencoder.
        text_encoder, tokenizer: a LearnedTextEncoder (tokenizer None) or a transformers encoder with its tokenizer.
        scheduler: a diffusers scheduler that fits the objective (`build_scheduler`).
        objective: fields of `stgen.objective.Objective`.
        sampling: defaults of a call: num_frames, height, width, fps, num_inference_steps, guidance_scale, max_length.
    """

    model_cpu_offload_seq = "text_encoder->transformer->codec"
    _optional_components = ["tokenizer"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def __init__(
        self,
        transformer,
        codec,
        text_encoder,
        scheduler,
        tokenizer=None,
        objective: dict[str, Any] | None = None,
        sampling: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.register_modules(
            transformer=transformer, codec=codec, text_encoder=text_encoder, scheduler=scheduler, tokenizer=tokenizer
        )
        self.register_to_config(objective=dict(objective or {}), sampling=dict(sampling or {}))
        self.objective = Objective(**(objective or {}))
        self.video_processor = VideoProcessor()

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    def encode_prompt(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings [B, L, D] and mask [B, L]."""
        length = self.config.sampling.get("max_length", 128)
        return text.encode(self.text_encoder, self.tokenizer, prompts, length)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] = "",
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("latents",),
    ) -> VideoPipelineOutput | tuple[Any]:
        """Sample clips.

        Args:
            prompt: one prompt or several; or give prompt_embeds [B, L, D] with prompt_attention_mask [B, L].
            negative_prompt: what guidance leads away from; one for all or one for each prompt.
            num_frames, height, width: size of the clips; None takes the training size.
            num_inference_steps: steps of the scheduler.
            guidance_scale: classifier-free guidance (Ho & Salimans, arXiv:2207.12598); at most 1 switches it off.
            num_videos_per_prompt: clips of each prompt.
            generator: one generator, or one for each clip: then a clip does not depend on its neighbours.
            latents: the starting noise [B, C, t, h, w].
            output_type: `pil`, `np`, `pt` or `latent`.

        Returns:
            VideoPipelineOutput, or a tuple if return_dict is false.
        """
        size = {"num_frames": num_frames, "height": height, "width": width}
        defaults = self.config.sampling
        num_frames, height, width = (size[key] or defaults[key] for key in size)
        steps = num_inference_steps or defaults.get("num_inference_steps", 20)
        self._guidance_scale = defaults.get("guidance_scale", 3.0) if guidance_scale is None else guidance_scale
        device = self._execution_device

        prompt_embeds, mask = self._embeddings(prompt, prompt_embeds, prompt_attention_mask, num_videos_per_prompt)
        count = len(prompt_embeds)
        negative = [negative_prompt] * count if isinstance(negative_prompt, str) else negative_prompt
        repeats = 1 if len(negative) == count else num_videos_per_prompt
        negative_prompt_embeds, negative_mask = self._embeddings(
            negative, negative_prompt_embeds, negative_prompt_attention_mask, repeats
        )
        if len(negative_prompt_embeds) != count:
            raise ValueError(f"negative_prompt: {len(negative_prompt_embeds)} given for {count} clips")

        codec = codecs.as_codec(self.codec)
        latents = self._noise(latents, (count, *codec.latent_shape(num_frames, height, width)), generator, device)
        set_steps(self.scheduler, steps, self.objective.path, device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        with self.progress_bar(total=len(timesteps)) as bar:
            for i, timestep in enumerate(timesteps):
                inputs = (
                    self.scheduler.scale_model_input(latents, timestep) if self.objective.path != "flow" else latents
                )
                output = self._predict(
                    inputs, i, timestep, (prompt_embeds, mask), (negative_prompt_embeds, negative_mask)
                )
                latents = self.scheduler.step(output, timestep, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "prompt_embeds": prompt_embeds}
                    tensors["negative_prompt_embeds"] = negative_prompt_embeds
                    asked = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, i, timestep, asked) or {}
                    latents = changed.get("latents", latents)
                    prompt_embeds = changed.get("prompt_embeds", prompt_embeds)
                    negative_prompt_embeds = changed.get("negative_prompt_embeds", negative_prompt_embeds)
                bar.update()

        frames = latents if output_type == "latent" else self._frames(codec.decode(latents), output_type)
        self.maybe_free_model_hooks()
        return VideoPipelineOutput(frames=frames) if return_dict else (frames,)

    def _embeddings(
        self, prompt: str | list[str] | None, embeds: Tensor | None, mask: Tensor | None, repeats: int
    ) -> tuple[Tensor, Tensor]:
        """Embeddings and mask of the prompts, or those given, `repeats` times each."""
        if embeds is None:
            if prompt is None:
                raise ValueError("give prompt or prompt_embeds")
            embeds, mask = self.encode_prompt([prompt] if isinstance(prompt, str) else list(prompt))
        if mask is None:
            mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        dtype = self.transformer.dtype
        return embeds.to(dtype).repeat_interleave(repeats, 0), mask.bool().repeat_interleave(repeats, 0)

    def _noise(self, latents: Tensor | None, shape: tuple[int, ...], generator, device) -> Tensor:
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents: shape {list(latents.shape)} given, {list(shape)} needed")
        scale = 1.0 if self.objective.path == "flow" else self.scheduler.init_noise_sigma
        return latents.to(device, torch.float32) * scale

    def _predict(self, latents: Tensor, i: int, timestep: Tensor, positive, negative) -> Tensor:
        """The guided prediction, in the form the scheduler expects: [B, C, t, h, w]."""
        # Under flow the noise level is the time; some schedulers round their timesteps to integers.
        t = self.scheduler.sigmas[i] if self.objective.path == "flow" else timestep / self.objective.num_train_timesteps
        told = t * 1000 if self.objective.path == "flow" else timestep
        guided = self._guidance_scale > 1
        embeds, mask = _stack(negative, positive) if guided else positive
        inputs = torch.cat([latents, latents]) if guided else latents
        times = torch.as_tensor(told, dtype=torch.float32, device=latents.device).expand(len(inputs))
        output = self.transformer(inputs.to(self.transformer.dtype), times, embeds, mask, return_dict=False)[0].float()
        if guided:
            away, towards = output.chunk(2)
            output = away + self._guidance_scale * (towards - away)
        level = torch.as_tensor(t, dtype=torch.float32, device=latents.device).expand(len(latents))
        return self.objective.for_scheduler(output, latents, level)

    def _frames(self, decoded: Tensor, output_type: str) -> Any:
        return self.video_processor.postprocess_video(decoded, output_type=output_type)


def _stack(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two batches of prompts as one, the shorter padded with masked places."""
    length = max(first[0].shape[1], second[0].shape[1])

    def padded(embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        missing = length - embeds.shape[1]
        pad = torch.nn.functional.pad
        return pad(embeds, (0, 0, 0, missing)), pad(mask, (0, missing))

    pairs = padded(*first), padded(*second)
    return torch.cat([embeds for embeds, _ in pairs]), torch.cat([mask for _, mask in pairs])
