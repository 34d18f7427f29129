"""The diffusers face of a trained model: prompts in, clips out, saved and loaded as one folder."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
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
from stgen import fetched, model, saved, text  # noqa: F401  (a saved pipeline names these modules; they must be loaded to be found)
from stgen.lora import LoraLoader
from stgen.objective import Objective
from stgen.tokens import Grid, grid_of

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class PipelineError(ValueError):
    """A request that cannot be met; one sentence that says what to do."""


@dataclass
class VideoPipelineOutput(BaseOutput):
    frames: Any
    """Clips: tensor [B, T, C, H, W], array [B, T, H, W, C], lists of images, or latents."""


def build_scheduler(name: str | None, objective: Objective) -> Any:
    """A diffusers scheduler for the objective's path; None takes euler for flow and ddim for diffusion.

    Raises PipelineError for a scheduler of the other path.
    """
    if objective.path == "diffusion":
        common: dict[str, Any] = dict(
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
        raise PipelineError(f"scheduler {name} is for objective.path flow; with diffusion use ddim, unipc or dpm++")
    flow: dict[str, Any] = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=objective.shift)
    match name:
        case None | "euler":
            return diffusers.FlowMatchEulerDiscreteScheduler(shift=objective.shift)
        case "heun":
            return diffusers.FlowMatchHeunDiscreteScheduler(shift=objective.shift)
        case "unipc":
            return diffusers.UniPCMultistepScheduler(**flow)
        case "dpm++":
            return diffusers.DPMSolverMultistepScheduler(**flow)
    raise PipelineError(f"scheduler {name} is for objective.path diffusion; with flow use euler, heun, unipc or dpm++")


def set_steps(scheduler: Any, steps: int, path: str, device: torch.device | str) -> None:
    """Fix the scheduler's times.

    Under flow the times are 1, ..., 1/n before they are shifted. They are passed where the scheduler takes them, since
    left to themselves Euler and Heun shift their smallest time twice.
    """
    if path == "flow" and hasattr(scheduler, "sigma_min"):
        scheduler.sigma_min = 1.0 / steps  # Heun takes no times; Euler is passed them below
    if path == "flow" and "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps), device=device)
    else:
        scheduler.set_timesteps(steps, device=device)


class VideoPipeline(DiffusionPipeline, LoraLoader):
    """Text-to-video sampling with a VideoTransformer.

    Args:
        transformer: the model.
        codec: PatchPCA, Pixels or a diffusers autoencoder.
        text_encoder, tokenizer: a LearnedTextEncoder (tokenizer None) or a transformers encoder with its tokenizer.
        scheduler: a diffusers scheduler that fits the objective (`build_scheduler`).
        objective: fields of `stgen.objective.Objective`.
        sampling: defaults of a call: num_frames, height, width, fps, num_inference_steps, guidance_scale, max_length,
            and the mixed_precision of training, in which the transformer computes here too.
    """

    config: Any  # diffusers declares a plain dict; it also reads by attribute
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
        self.video_processor = VideoProcessor(vae_scale_factor=1)  # the codec judges sizes
        self._codec_face: tuple[Any, codecs.Codec] | None = None
        self._interrupt = False

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write the pipeline as one folder of JSON and safetensors, whatever form is asked for; options are diffusers'."""
        super().save_pretrained(save_directory, **{**options, "safe_serialization": True})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> "VideoPipeline":
        """A pipeline from a folder that `save_pretrained` wrote, or from a hub id; options are those of diffusers.

        Raises SavedError where it holds or names anything else: it may come from anywhere (stgen/saved.py).
        """
        with fetched.opened(pretrained_model_name_or_path, options) as folder:
            loaded: Any = super().from_pretrained(
                folder, **{**options, "use_safetensors": True, "trust_remote_code": False}
            )
            for name, component in loaded.components.items():
                if isinstance(component, torch.nn.Module) and name not in options:
                    saved.check_weights(folder / name, component.state_dict(), _tied(component))
        return loaded

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **options: Any) -> "VideoPipeline":
        """A pipeline of the components and settings of another; options take their place."""
        taken = {name: part for name, part in pipeline.components.items() if name in saved.COMPONENTS}
        return super().from_pipe(pipeline, **{**taken, **options})  # type: ignore[return-value]

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def interrupt(self) -> bool:
        """Whether the steps that are left of this call are passed over; a callback asks for it by `_interrupt = True`."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def current_timestep(self) -> float:
        """The noise level that the model is told now, 0 to 1000."""
        return self._current_timestep

    def encode_prompt(
        self, prompt: str | list[str], negative_prompt: str | list[str] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Embeddings [B, L, D] and mask [B, L] of the prompts, then those of what guidance leads them away from.

        Needs no component but the text encoder and its tokenizer; a call takes the four by the names they have here.
        """
        prompt_embeds, prompt_attention_mask = self._encode(prompt)
        away = _for_each(negative_prompt, len(prompt_embeds))
        negative_prompt_embeds, negative_prompt_attention_mask = self._encode(away)
        return prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Shape of a clip's latents. Raises PipelineError or CodecError for a size that cannot be sampled."""
        shape = self._wrapped_codec().latent_shape(num_frames, height, width)
        trained = self.transformer.config
        try:
            grid = grid_of(shape[1:], trained.patch_size)
        except ValueError as error:
            raise PipelineError(f"{num_frames} frames of {height}x{width}: {error}") from None
        if trained.positions == "learned" and grid != Grid(*trained.grid):
            raise PipelineError(
                f"{num_frames} frames of {height}x{width}: learned positions hold for the training size alone; "
                "leave the size out, or train with tokens.positions: rope"
            )
        return shape

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        image: Any = None,
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
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> VideoPipelineOutput | tuple[Any]:
        """Sample clips.

        Args:
            prompt: one prompt or several; or give prompt_embeds [B, L, D] with prompt_attention_mask [B, L].
            negative_prompt: what guidance leads away from; one for all or one for each prompt. None is the empty prompt.
            image: what the clips begin with: an image or one for each clip, or frames as a tensor [1 or B, K, 3, H, W] in
                [0, 1]. They are kept as they are in as many frames as the codec and the patches join, at least; for models
                trained with frame_times `past` or `frame`.
            num_frames, height, width: size of the clips; None takes the training size.
            num_inference_steps: steps of the scheduler.
            guidance_scale: classifier-free guidance (Ho & Salimans, arXiv:2207.12598); at most 1 switches it off.
            num_videos_per_prompt: clips of each prompt.
            generator: one generator, or one for each clip: then a clip does not depend on its neighbours.
            latents: the starting noise [B, C, t, h, w].
            output_type: `pil`, `np`, `pt` or `latent`.
            callback_on_step_end: called as (pipeline, step, timestep, tensors) after each step; what it returns takes
                the place of the tensors, of which callback_on_step_end_tensor_inputs names those it is given.

        Returns:
            VideoPipelineOutput, or a tuple if return_dict is false.

        Raises:
            PipelineError, CodecError: what is asked for cannot be sampled.
        """
        num_frames, height, width = self._size(num_frames, height, width)
        steps = self._usual("num_inference_steps", num_inference_steps)
        self._guidance_scale = self._usual("guidance_scale", guidance_scale)
        self._interrupt = False
        device = self._execution_device
        self._check_call(steps, num_videos_per_prompt, output_type, callback_on_step_end_tensor_inputs)
        shape = self.latent_shape(num_frames, height, width)

        positive = self._embeddings(prompt, prompt_embeds, prompt_attention_mask)
        negative = self._negative(negative_prompt, positive, negative_prompt_embeds, negative_prompt_attention_mask)
        prompt_embeds, mask, negative_prompt_embeds, negative_mask = (
            x.repeat_interleave(num_videos_per_prompt, 0) for x in (*positive, *negative)
        )

        given = None if image is None else self._beginning(image, shape, num_frames, height, width, device)
        z: Any = _held(self._noise(latents, (len(prompt_embeds), *shape), generator, device), given)
        set_steps(self.scheduler, steps, self.objective.path, device)
        positive, negative = (prompt_embeds, mask), (negative_prompt_embeds, negative_mask)
        z = self._denoise(z, positive, negative, given, callback_on_step_end, callback_on_step_end_tensor_inputs)
        frames: Any = z if output_type == "latent" else self._frames(z, output_type)
        self.maybe_free_model_hooks()
        return VideoPipelineOutput(frames=frames) if return_dict else (frames,)

    def _denoise(
        self,
        z: Tensor,
        positive: tuple[Tensor, Tensor],
        negative: tuple[Tensor, Tensor],
        given: Tensor | None,
        callback: Callable[..., dict[str, Tensor]] | None,
        names: Sequence[str],
    ) -> Tensor:
        """z [B, C, t, h, w] after all steps; `callback` is given the tensors of those names after each, and may change them."""
        self._num_timesteps = len(self.scheduler.timesteps)
        with self._bar(self._num_timesteps) as bar:
            for i, timestep in enumerate(self.scheduler.timesteps):
                if self.interrupt:
                    continue
                z = self._step(z, i, timestep, positive, negative, given)
                if callback is not None:
                    now = {"latents": z, "prompt_embeds": positive[0], "negative_prompt_embeds": negative[0]}
                    now |= callback(self, i, timestep, {name: now[name] for name in names}) or {}
                    z = _held(now["latents"], given)
                    positive = now["prompt_embeds"], positive[1]
                    negative = now["negative_prompt_embeds"], negative[1]
                bar.update()
        return z

    # ---------------------------------------------------------------------------------------------------- streaming

    def stream_refusal(self) -> str | None:
        """Why clips cannot be made chunk by chunk, in one sentence that says what to write; None where they can."""
        return self.objective.stream_refusal() or self.transformer.refusal()

    def stream(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        image: Any = None,
        num_frames: int | None = None,
        chunk_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> Iterator[Any]:
        """Clips of any length, made chunk by chunk: time and memory of a chunk do not grow with what came before.

        Each chunk is denoised with the frames before it in the model's memory; a pass over the finished chunk, at time 0,
        then takes it into that memory. For models whose mixers over time have a `memory` (or are causal themselves).

        Args:
            num_frames: frames of the whole clips.
            chunk_frames: frames of a chunk, the last perhaps shorter; None takes what suits the model.
            Others as those of a call.

        Yields:
            The frames of a chunk in the form of output_type, all clips together; of `latent` tensors [B, C, t, h, w].

        Raises:
            PipelineError, CodecError: what is asked for cannot be streamed; before anything is computed.
        """
        num_frames, height, width = self._size(num_frames, height, width)
        steps = self._usual("num_inference_steps", num_inference_steps)
        scale = self._guidance_scale = self._usual("guidance_scale", guidance_scale)
        self._check_call(steps, 1, output_type, ())
        if reason := self.stream_refusal():
            raise PipelineError(reason)
        if output_type != "latent" and getattr(self._wrapped_codec(), "video", False):
            raise PipelineError(
                f"{type(self.codec).__name__} decodes the frames of a clip together, not chunk by chunk; stream with "
                "output_type latent and decode what comes, or train on an autoencoder of images"
            )
        shape = self.latent_shape(num_frames, height, width)
        joined = num_frames // shape[1]  # frames of a latent frame
        chunk = chunk_frames and chunk_frames // joined
        if chunk_frames is not None and (chunk_frames % joined or chunk_frames < 1):
            raise PipelineError(
                f"chunk_frames {chunk_frames} should be a multiple of {joined}, the frames the codec joins"
            )
        positive = self._embeddings(prompt, None, None)
        negative = self._negative(negative_prompt, positive, None, None)
        sizes = _cut(shape[1], chunk or self.transformer.chunk_frames)
        memories = len(positive[0]) * (2 if scale > 1 else 1)  # under guidance one for each prompt
        low = torch.bfloat16 if self.config.sampling.get("mixed_precision") == "bf16" else None
        try:
            past = self.transformer.new_past(memories, (sizes[0], *shape[2:]), low, self._execution_device)
        except ValueError as error:
            raise PipelineError(f"chunk_frames: {error}") from None
        shapes = [(len(positive[0]), shape[0], size, *shape[2:]) for size in sizes]
        given = None
        if image is not None:
            given = self._beginning(image, shapes[0][1:], sizes[0] * joined, height, width, self._execution_device)
        return self._chunks(shapes, past, positive, negative, given, steps, scale, generator, output_type)

    @torch.no_grad()
    def _chunks(
        self,
        shapes: list[tuple[int, ...]],
        past: Any,
        positive: tuple[Tensor, Tensor],
        negative: tuple[Tensor, Tensor],
        given: Tensor | None,
        steps: int,
        scale: float,
        generator: torch.Generator | list[torch.Generator] | None,
        output_type: str,
    ) -> Iterator[Any]:
        """Chunks of latents of those shapes, one after the other, decoded; `given` begins the first."""
        device = self._execution_device
        for shape in shapes:
            self._guidance_scale = scale  # there may have been a call since the last chunk
            z = _held(self._noise(None, shape, generator, device), given)
            set_steps(self.scheduler, steps, self.objective.path, device)
            self._num_timesteps = len(self.scheduler.timesteps)
            with self._bar(self._num_timesteps) as bar:
                for i, timestep in enumerate(self.scheduler.timesteps):
                    z = self._step(z, i, timestep, positive, negative, given, past)
                    bar.update()
            past = self._network(z, z.new_zeros(()), positive, negative, past)[1]
            given = None
            yield z if output_type == "latent" else self._frames(z, output_type)
        self.maybe_free_model_hooks()

    # ------------------------------------------------------------------------------------------------ parts of a call

    def _usual(self, name: str, value: Any) -> Any:
        """A value, in place of None that of training or a usual one."""
        usual = {"num_inference_steps": 20, "guidance_scale": 3.0, **self.config.sampling}
        if value is None and name not in usual:
            raise PipelineError(f"{name}: this pipeline was made without a usual one; give it")
        return usual[name] if value is None else value

    def _size(self, num_frames: int | None, height: int | None, width: int | None) -> tuple[int, int, int]:
        return self._usual("num_frames", num_frames), self._usual("height", height), self._usual("width", width)

    def _negative(
        self,
        prompt: str | list[str] | None,
        positive: tuple[Tensor, Tensor],
        embeds: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Embeddings and mask of what guidance leads the prompts away from."""
        count = len(positive[0])
        if embeds is None and self.text_encoder is None:
            if self._guidance_scale > 1:
                raise PipelineError(
                    "negative_prompt_embeds: guidance needs them, and there is no text encoder to make them; give those of "
                    "encode_prompt, or guidance_scale 1"
                )
            return positive  # never looked at
        negative = self._embeddings(_for_each(prompt, count), embeds, mask)
        if len(negative[0]) != count:
            raise PipelineError(f"negative_prompt: {len(negative[0])} given for {count} prompts")
        return negative

    def _check_call(self, steps: int, videos: int, output_type: str, tensor_inputs: Sequence[str]) -> None:
        for name, value in (("num_inference_steps", steps), ("num_videos_per_prompt", videos)):
            if value < 1:
                raise PipelineError(f"{name} {value} should be at least 1")
        if output_type not in OUTPUT_TYPES:
            raise PipelineError(f"output_type {output_type!r} is none of {', '.join(OUTPUT_TYPES)}")
        if unknown := set(tensor_inputs) - set(self._callback_tensor_inputs):
            known = ", ".join(self._callback_tensor_inputs)
            raise PipelineError(f"callback_on_step_end_tensor_inputs: {min(unknown)!r} is none of {known}")

    def _wrapped_codec(self) -> codecs.Codec:
        """The codec, wrapped once, since a diffusers autoencoder is probed for what it takes."""
        if self._codec_face is None or self._codec_face[0] is not self.codec:
            self._codec_face = (self.codec, codecs.as_codec(self.codec))
        return self._codec_face[1]

    def _embeddings(
        self, prompt: str | list[str] | None, embeds: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings and mask of the prompts, or those given, on the device and in the type of the transformer."""
        if embeds is None:
            if prompt is None or prompt == []:
                raise PipelineError("give prompt or prompt_embeds")
            if self.text_encoder is None:
                raise PipelineError("prompt: there is no text encoder; give prompt_embeds")
            embeds, mask = self._encode(prompt)
        if mask is None:
            mask = torch.ones(embeds.shape[:2], dtype=torch.bool)
        device = self._execution_device
        return embeds.to(device, self.transformer.dtype), mask.to(device, torch.bool)

    def _encode(self, prompt: str | list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings [B, L, D] and mask [B, L] of one prompt or several."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if self.tokenizer is None and not hasattr(self.text_encoder, "tokenize"):
            raise PipelineError(f"tokenizer: {type(self.text_encoder).__name__} needs one, and there is none; give it")
        length = self.config.sampling.get("max_length", 128)
        return text.encode(self.text_encoder, self.tokenizer, prompts, length, self._execution_device)

    def clips(self, prompts: list[str], seeds: list[int], negative_prompts: list[str], **options: Any) -> list[Tensor]:
        """One clip, uint8 [T, 3, H, W] on the CPU, for each prompt and seed; options are those of a call.

        Each clip has a generator of its own, so that its neighbours in the batch do not matter.
        """
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        result: Any = self(prompts, negative_prompts, generator=generators, output_type="pt", **options)
        return list((result.frames.float().cpu() * 255).round().to(torch.uint8))

    def _bar(self, total: int) -> Any:
        return self.progress_bar(total=total)  # type: ignore[call-arg]  (a decorator hides its signature)

    def _noise(self, latents: Tensor | None, shape: tuple[int, ...], generator, device) -> Tensor:
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise PipelineError(f"generator: {len(generator)} given for {shape[0]} clips")
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise PipelineError(f"latents: shape {list(latents.shape)} given, {list(shape)} needed")
        scale = 1.0 if self.objective.path == "flow" else self.scheduler.init_noise_sigma
        return latents.to(device, torch.float32) * scale

    def _beginning(
        self, image: Any, shape: tuple[int, ...], num_frames: int, height: int, width: int, device
    ) -> Tensor:
        """Latents [1 or B, C, k, h, w] that clips of latents `shape` begin with: the image, still for k latent frames."""
        if self.objective.frame_times == "clip":
            raise PipelineError(
                "image: this model knows one noise level for all frames of a clip; train with objective.frame_times: past"
            )
        if isinstance(image, Tensor) and image.ndim == 5:
            frames = image.movedim(2, 1) * 2 - 1  # [B, 3, K, H, W]
        else:
            frames = self.video_processor.preprocess(image, height, width).unsqueeze(2)
        if frames.shape[1] != 3 or frames.shape[3:] != (height, width):
            raise PipelineError(f"image: frames of {list(frames.shape[3:])} given for clips of {[height, width]}")
        together = self.transformer.config.patch_size[0]
        known = max(together, self._whole_latent_frames(frames.shape[2], height, width) // together * together)
        if known >= shape[1]:
            raise PipelineError(
                f"image: {frames.shape[2]} frames leave none of {num_frames} to make, since the codec and the patches join "
                f"{num_frames * together // shape[1]} frames each; give fewer, or raise num_frames"
            )
        missing = num_frames - frames.shape[2]
        frames = torch.cat([frames, frames[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
        return self._wrapped_codec().encode(frames.to(device, torch.float32))[:, :, :known].float()

    def _whole_latent_frames(self, frames: int, height: int, width: int) -> int:
        """Latent frames that `frames` frames fill."""
        for count in range(frames, 0, -1):
            try:
                return self._wrapped_codec().latent_shape(count, height, width)[1]
            except codecs.CodecError:
                continue
        return 0

    def _step(self, z: Tensor, i: int, timestep: Tensor, positive, negative, given: Tensor | None, past=None) -> Tensor:
        """z [B, C, t, h, w] after step i of the scheduler; it begins with the `given` latents, if any."""
        inputs = self.scheduler.scale_model_input(z, timestep) if self.objective.path != "flow" else z
        output = self._predict(inputs, i, timestep, positive, negative, 0 if given is None else given.shape[2], past)
        return _held(self.scheduler.step(output, timestep, z, return_dict=False)[0], given)

    def _predict(self, latents: Tensor, i: int, timestep: Tensor, positive, negative, clean: int, past) -> Tensor:
        """The guided prediction, in the form the scheduler expects: [B, C, t, h, w]; the first `clean` frames hold no noise."""
        # Under flow the noise level is the time; some schedulers round their timesteps to integers.
        t = self.scheduler.sigmas[i] if self.objective.path == "flow" else timestep / self.objective.num_train_timesteps
        told = t * 1000 if self.objective.path == "flow" else timestep
        self._current_timestep = float(told)
        self._place = {"step_index": i, "sigma": float(t), "num_inference_steps": self._num_timesteps}  # for caches
        told = torch.as_tensor(told, dtype=torch.float32, device=latents.device)
        if clean:
            told = told.repeat(latents.shape[2])  # [T]
            told[:clean] = 0
        output = self._network(latents, told, positive, negative, past)[0].float()
        if self._guidance_scale > 1:
            away, towards = output.chunk(2)
            output = away + self._guidance_scale * (towards - away)
        level = torch.as_tensor(t, dtype=torch.float32, device=latents.device).expand(len(latents))
        return self.objective.for_scheduler(output, latents, level)

    def _network(self, latents: Tensor, told: Tensor, positive, negative, past) -> tuple[Any, ...]:
        """What the transformer gives back at a time, or one for each frame; under guidance for both prompts, [2 B, ...]."""
        guided = self._guidance_scale > 1
        embeds, mask = _stack(negative, positive) if guided else positive
        inputs = torch.cat([latents, latents]) if guided else latents
        times = told.expand(len(inputs), *told.shape)  # [B] or [B, T]
        bf16 = self.config.sampling.get("mixed_precision") == "bf16"
        caches = getattr(self.transformer, "is_cache_enabled", False)
        cached = self.transformer.cache_context("denoise", **self._place) if caches else nullcontext()
        remembered = {} if past is None else {"past": past}
        with cached, torch.autocast(inputs.device.type, torch.bfloat16, enabled=bf16):
            inputs = inputs.to(self.transformer.dtype)
            return self.transformer(inputs, times, embeds, mask, return_dict=False, **remembered)

    def _frames(self, latents: Tensor, output_type: str) -> Any:
        decoded = self._wrapped_codec().decode(latents)  # [B, 3, T, H, W] in [-1, 1], not clipped
        return self.video_processor.postprocess_video(decoded.float(), output_type=output_type)


def _tied(module: torch.nn.Module) -> dict[str, str]:
    """For each parameter the first name of the tensor that it shares with others."""
    first: dict[int, str] = {}
    return {key: first.setdefault(id(p), key) for key, p in module.named_parameters(remove_duplicate=False)}


def _for_each(negative_prompt: str | list[str] | None, count: int) -> list[str]:
    """What guidance leads each of `count` prompts away from: as given, one for all, or the empty prompt."""
    if negative_prompt is None or isinstance(negative_prompt, str):
        return [negative_prompt or ""] * count
    return negative_prompt


def _cut(total: int, size: int) -> list[int]:
    """`total` frames in chunks of `size`, the last with what remains."""
    return [min(size, total - first) for first in range(0, total, size)]


def _held(z: Tensor, given: Tensor | None) -> Tensor:
    """z [B, C, T, h, w] with the given latents [1 or B, C, k, h, w] as its first frames."""
    if given is None:
        return z
    return torch.cat([given.to(z).expand(len(z), -1, -1, -1, -1), z[:, :, given.shape[2] :]], dim=2)


def _stack(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two batches of prompts as one, the shorter padded with masked places."""
    length = max(first[0].shape[1], second[0].shape[1])

    def padded(embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        missing = length - embeds.shape[1]
        pad = torch.nn.functional.pad
        return pad(embeds, (0, 0, 0, missing)), pad(mask, (0, missing))

    pairs = padded(*first), padded(*second)
    return torch.cat([embeds for embeds, _ in pairs]), torch.cat([mask for _, mask in pairs])
