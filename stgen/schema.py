"""The typed tree of a config: every key, its type, its default and its meaning.

Values that need torch or a file to be judged are judged by the module that uses them; what can be judged from the
config alone is refused here, one sentence a fault, before anything heavy is imported.
"""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from stgen import limits
from stgen.attention import plan as plan_grammar
from stgen.attention import reuse
from stgen.attention.pattern import Extent3D, Fraction, Remade
from stgen.attention.patterns import leaves
from stgen.attention.patterns.causal import Causal
from stgen.attention.pruning import Pruning, check_pruning
from stgen.attention.spec import PLAIN_LAYOUTS, AttentionMixer, check_heads, check_segment
from stgen.data_spec import Bucket, HuggingFace, check_buckets, check_source
from stgen.distributed_spec import Distributed
from stgen.lora_spec import Lora
from stgen.mixers import spec as token_mixers
from stgen.mixers.spec import TCN, Recurrent, TokenMixer
from stgen.norm_spec import LayerNorm, Norm, check_sites
from stgen.section import Section

Decay = Annotated[float, Field(ge=0, lt=1)]


class Run(Section):
    output_dir: str = "runs/default"
    """The run folder itself: config, metrics, checkpoints, samples and the final pipeline are written here."""
    seed: NonNegativeInt = 0
    """Decides initial weights, data order, noise, times and caption dropout."""
    resume_from_checkpoint: str = "none"
    """`none`, `latest` (the newest whole checkpoint of the run folder) or the path of a checkpoint folder."""
    allow_changed_config: bool = False
    """Resume although keys that shape the run differ from the checkpoint's."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` takes CUDA when there is one."""

    @field_validator("output_dir", "resume_from_checkpoint")
    @classmethod
    def _names_a_path(cls, path):
        if not path.strip() or "\0" in path:
            raise ValueError(f"{path!r} names no folder")
        return path


class Shapes(Section):
    clips: PositiveInt = 2400
    """How many clips to render."""
    held_out: Annotated[int, Field(ge=0, le=12)] = 8
    """How many of the 48 colour x shape x direction combinations are never rendered; no two share a pair of values."""
    held_out_seed: NonNegativeInt = 0
    """Chooses which combinations are held out."""
    motion: Literal["within", "around"] = "within"
    """Shapes stay within the frame, or leave it and come back on the other side, so that a motion has no end."""


class Data(Section):
    train_data_dir: str | None = None
    """A folder of videos, searched recursively. Null: captioned moving shapes are rendered into the run folder."""
    source: Literal["folder", "webdataset", "huggingface"] = "folder"
    """What train_data_dir is: a folder; a folder of .tar files laid out as by WebDataset, or a pattern such as clips-*.tar;
    the folder or hub id of a dataset that the datasets library reads."""
    huggingface: HuggingFace = HuggingFace()
    """What is read of a Hugging Face dataset, under source huggingface."""
    shapes: Shapes = Shapes()
    """The built-in captioned videos, used when train_data_dir is null."""
    num_frames: PositiveInt = 8
    """Frames of a training clip."""
    height: PositiveInt = 48
    """Height of a training clip in pixels."""
    width: PositiveInt = 48
    """Width of a training clip in pixels."""
    buckets: list[Bucket] = []
    """Sizes of training clips, each {num_frames, height, width, batch_size}, instead of the one above, which then is that of
    sampled clips and one of these. A video goes where it fits best: by aspect ratio, then by size without enlarging, then
    by length; images go to num_frames 1. The clips of a step are from one bucket. A batch_size left out follows from
    tokens_per_batch, or else is train.train_batch_size."""
    tokens_per_batch: PositiveInt | None = None
    """Most tokens of an optimiser step: how many clips of a bucket that has no batch_size make a step."""
    fps: PositiveFloat | None = None
    """Frames per second of a clip; null keeps each file's own rate."""
    crop: Literal["center", "random"] = "center"
    """Where the resized frame is cut to height x width."""
    clip: Literal["start", "random"] = "random"
    """Which span of a longer video becomes the clip."""
    held_out_clips: NonNegativeInt = 64
    """Videos set aside for the held-out loss, at most a tenth of the folder."""
    max_reject_fraction: Fraction = 0.5
    """Stop when more than this share of the folder cannot be used."""
    cache: Literal["none", "memory", "disk"] = "none"
    """`none` decodes and encodes on the way; `memory`: one clip of every video, once, at the start; `disk` reads what `stgen
    data cache CONFIG` has encoded, latents and embeddings of a pretrained text encoder, which is then not loaded."""
    cache_dir: str | None = None
    """Folder of the cache on disk; null: beside train_data_dir, or beside the run folder where that is null, with -cache behind
    its name."""
    cache_clips: PositiveInt = 1
    """Clips of every video that the cache on disk keeps where clip or crop is random; epochs take turns with them."""
    dataloader_num_workers: NonNegativeInt = 2
    """Processes that decode video; 0 decodes in the training process."""
    decode_timeout: PositiveFloat = 60.0
    """Seconds that a worker may need for one batch before the run stops and names its files."""

    @field_validator("cache_dir")
    @classmethod
    def _names_a_folder(cls, path):
        if path is not None and (not path.strip() or "\0" in path):
            raise ValueError(f"{path!r} names no folder")
        return path


class PatchPCA(Section):
    kind: Literal["pca"] = "pca"
    """Principal components of patches, fitted on the training videos and saved with the model."""
    patch_size: Extent3D = (4, 12, 12)
    """Frames, rows and columns of a patch; each must divide the clip."""
    components: PositiveInt = 128
    """Principal components kept of a patch: the latent channels."""
    fit_clips: PositiveInt = 512
    """Training clips the components are fitted on."""


class PixelCodec(Section):
    kind: Literal["pixels"] = "pixels"
    """The frames themselves, scaled to unit variance."""


class AutoencoderCodec(Section):
    kind: Literal["diffusers"] = "diffusers"
    """A pretrained autoencoder."""
    path: str
    """Folder (or hub id) of any diffusers autoencoder; image autoencoders work frame by frame."""
    subfolder: str | None = None
    """Folder inside path that holds the autoencoder, such as vae."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format in which the autoencoder computes."""


class LearnedText(Section):
    kind: Literal["words", "bytes"] = "words"
    """A small encoder trained with the model; it knows only the captions it was trained on."""
    width: PositiveInt = 128
    """Channels of a token's embedding."""
    max_length: Annotated[int, Field(ge=2)] = 128
    """Words or bytes kept of a prompt, the end token included."""
    conditioning: Literal["adaln", "cross", "both"] = "adaln"
    """How the prompt enters: pooled into the modulation, by cross-attention, or both."""
    caption_dropout: Fraction = 0.1
    """Share of training captions replaced by the empty prompt, for guidance."""


class PretrainedText(Section):
    kind: Literal["transformers"] = "transformers"
    """A pretrained, frozen encoder."""
    path: str
    """Folder (or hub id) of a T5, UMT5 or CLIP text encoder with its tokenizer."""
    subfolder: str | None = None
    """Folder inside path that holds the encoder; the tokenizer is sought in tokenizer/ beside it, then in the same folder."""
    max_length: PositiveInt = 128
    """Tokens kept of a prompt."""
    conditioning: Literal["adaln", "cross", "both"] = "cross"
    """How the prompt enters: pooled into the modulation, by cross-attention, or both."""
    caption_dropout: Fraction = 0.1
    """Share of training captions replaced by the empty prompt, for guidance."""


class Tokens(Section):
    patch_size: Extent3D = (1, 1, 1)
    """Latent frames, rows and columns that make one token."""
    positions: Literal["rope", "sincos", "learned", "none"] = "rope"
    """Rotary phases on queries and keys, fixed or learned embeddings added to the tokens, or none."""


class MLP(Section):
    ratio: PositiveFloat = 4.0
    """Hidden width as a multiple of the model's width."""
    placement: Literal["sequential", "parallel"] = "sequential"
    """After the mixers, or beside the last of them on the same normed input (GPT-J)."""


Mixer = Annotated[
    AttentionMixer | TCN | Recurrent, Field(discriminator="kind", json_schema_extra={"kind": "attention"})
]
"""A mixer that names no kind is attention."""


class Model(Section):
    width: PositiveInt = 128
    """Channels of a token."""
    depth: Annotated[int, Field(ge=1, le=1024)] = 6
    """Number of layers."""
    heads: PositiveInt = 2
    """Attention heads; must divide width."""
    plan: str = "spatial temporal"
    """How mixers are arranged over depth: `a b` layers, `a*3` repetition, `a>b` in turn, `a+b` added, `a|b` heads split."""
    mixers: dict[str, Mixer] = {}
    """Mixers by the names that the plan uses; joint, spatial, temporal, height and width exist without being written, and
    an entry of such a name has that layout unless it says another; tcn, rnn, lstm and gru exist too."""
    mlp: MLP = MLP()
    """The feed-forward network of a layer."""
    qk_norm: bool = True
    """RMS-normalise queries and keys per head."""
    registers: NonNegativeInt = 0
    """Learned global tokens in every sequence of every layer: all see them and they see all; dropped at the head."""
    modulation: Literal["adaln", "none"] = "adaln"
    """How time, and the prompt under text.conditioning adaln or both, enter: as shift, scale and gate of every layer, or
    as one more token like a register; layers then have norms with weights, and gates, of their own."""
    norm: Annotated[Norm, Field(discriminator="kind")] = LayerNorm()
    """The norm before cross-attention and, under modulation none, all norms; modulated ones are layer norms."""
    pruning: Pruning = Pruning()
    """Tokens and heads that later layers leave out, those that mattered the least before."""
    pretrained: str | None = None
    """A run folder, saved pipeline or hub id to start from: its weights, codec and text encoder. The other keys must be those
    that it was trained with; null: fresh weights."""

    @field_validator("mixers")
    @classmethod
    def _layout_by_name(cls, mixers):
        """An entry called temporal, say, that names no layout has that one."""
        return {
            name: mixer.model_copy(update={"layout": name})
            if name in PLAIN_LAYOUTS and "layout" not in mixer.model_fields_set
            else mixer
            for name, mixer in mixers.items()
        }

    @field_validator("mixers")
    @classmethod
    def _kind_by_name(cls, mixers):
        for name, mixer in mixers.items():
            if not re.fullmatch(r"[A-Za-z_][\w-]*", name):
                raise ValueError(f"{name!r} cannot be written in a plan; use letters, digits, _ and -, a letter first")
            if name in token_mixers.KINDS and mixer.kind != name:
                raise ValueError(f"{name} is of kind {mixer.kind}; write kind: {name}, or give it another name")
        return mixers

    @model_validator(mode="after")
    def _plan_fits(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        if self.width * self.mlp.ratio < 1:
            raise ValueError(f"mlp.ratio: {self.mlp.ratio} of width {self.width} leaves no hidden channel")
        layers = self.layers
        known = sorted({*PLAIN_LAYOUTS, *token_mixers.KINDS, *self.mixers})
        for name in self.mixer_names:
            if name not in known:
                raise ValueError(
                    f"plan: no mixer is called {name!r}; known are {', '.join(known)} (add it to model.mixers)"
                )
        for split in plan_grammar.splits(layers):
            if self.heads % split:
                raise ValueError(f"plan: heads {self.heads} cannot be split evenly over {split} mixers joined by |")
        self._check_mixers(layers)
        return self

    def _check_mixers(self, layers):
        mixers = {name: self.mixer(name) for name in self.mixer_names}
        uses = reuse.place(layers, mixers, self.heads)
        flat = [use for layer in uses for term in layer for branch in term for use in branch]
        front = self.registers + (self.modulation == "none")  # tokens before those of the clip
        check_pruning(self.pruning, uses, self.heads, front)
        if front and not any(use.has_map for use in flat):
            raise ValueError(f"{self._front[0]}: no mixer of the plan attends to them; write {self._front[1]}")
        for use in flat:
            if not use.has_map:
                self._check_token_mixer(use)
                continue
            try:
                groups = use.keys.head_groups(use.heads)
                for group in groups:
                    check_heads(use.keys, group.pattern, group.normaliser, group.sink)
            except ValueError as error:
                raise ValueError(f"mixers.{use.name}.{error}") from None
            if front:
                self._check_front(use.name, [leaf for group in groups for leaf in leaves(group.pattern)])

    def _check_front(self, name, parts):
        tokens, remedy = self._front
        for part in parts:
            if isinstance(part, Causal):
                raise ValueError(
                    f"{tokens}: they see every frame and are seen by every frame, so causal in mixers.{name} would leak "
                    f"the future; write {remedy}"
                )
            if isinstance(part, Remade):
                raise ValueError(
                    f"{tokens}: {part.kind} in mixers.{name} makes keys of a clip's own tokens; write {remedy}"
                )

    @property
    def _front(self) -> tuple[str, str]:
        """The tokens before those of the clip, by the key that puts them there, and what to write to have none."""
        if self.modulation == "adaln":
            return "registers", "registers: 0"
        return "modulation: none makes tokens of time and text", "modulation: adaln"

    def _check_token_mixer(self, use):
        if use.heads < self.heads:
            raise ValueError(f"plan: {use.name} ({use.keys.kind}) has no heads to share by | ; join it by > or +")
        if getattr(use.keys, "bidirectional", False) and self.width % 2:
            raise ValueError(f"mixers.{use.name}: bidirectional halves the channels, but width is {self.width}")

    @property
    def layers(self) -> tuple[plan_grammar.Layer, ...]:
        """The plan, layer by layer."""
        return plan_grammar.parse(self.plan, self.depth)

    @property
    def mixer_names(self) -> list[str]:
        """Names of the mixers that the plan uses."""
        return plan_grammar.names(self.layers)

    def mixer(self, name: str) -> AttentionMixer | TokenMixer:
        """The mixer a plan's name stands for: as written in `mixers`, else the layout or the kind of that name."""
        written = self.mixers.get(name) or token_mixers.named(name)
        return written or AttentionMixer.model_validate({"layout": name})


class Objective(Section):
    path: Literal["flow", "diffusion"] = "flow"
    """Straight path from data to noise (rectified flow), or a variance-preserving diffusion schedule."""
    prediction_type: Literal["v_prediction", "epsilon", "sample"] = "v_prediction"
    """What the network puts out; under flow, v is the velocity noise - data."""
    frame_times: Literal["clip", "frame", "past"] = "clip"
    """Noise within a clip: alike in all frames; each frame its own; or leading frames clean, as many as chance says, and the
    others alike, which a clip that goes on from given frames asks for (sample.py --image, and streaming)."""
    timestep_density: Literal["uniform", "logit_normal", "mode"] = "logit_normal"
    """Density from which training times are drawn."""
    logit_mean: float = 0.0
    """Mean of the logit-normal density."""
    logit_std: PositiveFloat = 1.0
    """Standard deviation of the logit-normal density."""
    mode_scale: float = 1.29
    """Scale of the mode density."""
    shift: PositiveFloat = 1.0
    """Moves times towards noise in training and sampling: t -> s t / (1 + (s - 1) t)."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "squaredcos_cap_v2"
    """Noise schedule of the diffusion path."""
    num_train_timesteps: PositiveInt = 1000
    """Steps of the diffusion path."""
    snr_gamma: PositiveFloat | None = None
    """Min-SNR loss weight (diffusion path); null weighs all times alike."""

    @model_validator(mode="after")
    def _pairs(self):
        if self.path == "flow" and self.snr_gamma is not None:
            raise ValueError("snr_gamma weighs the diffusion path; with path flow choose a timestep_density instead")
        if self.path == "flow" and self.prediction_type == "epsilon":
            raise ValueError(
                "prediction_type epsilon has no velocity at t = 0; with path flow write v_prediction or sample"
            )
        if self.path == "diffusion" and self.frame_times != "clip":
            raise ValueError("frame_times: frames of their own noise need path flow, in which clean frames have time 0")
        if self.path == "diffusion" and self.shift != 1.0:
            raise ValueError("shift moves flow times; with path diffusion choose a beta_schedule instead")
        return self


class Optim(Section):
    learning_rate: PositiveFloat = 3e-4
    """Peak learning rate."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the learning rate after warm-up."""
    lr_warmup_steps: NonNegativeInt = 100
    """Steps of linear warm-up, at most those of the run."""
    lr_min_ratio: Fraction = 0.0
    """Where linear and cosine end, as a fraction of learning_rate."""
    adam_beta1: Decay = 0.9
    """Decay of the gradient's average."""
    adam_beta2: Decay = 0.95
    """Decay of the squared gradient's average."""
    adam_epsilon: PositiveFloat = 1e-8
    """Added to the root of the squared gradient's average."""
    adam_weight_decay: NonNegativeFloat = 0.01
    """Decay of matrices; norms, biases, embeddings and tables have none."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm after accumulation."""


class EMA(Section):
    decay: Decay = 0.999
    """Decay of the averaged weights; it ramps up as (1 + step) / (10 + step)."""


class Train(Section):
    train_batch_size: PositiveInt = 16
    """Clips of one optimiser step."""
    gradient_accumulation_steps: PositiveInt = 1
    """Equal parts in which the batch is computed; the result is that of the whole batch."""
    max_train_steps: PositiveInt | None = None
    """Stop after this many optimiser steps."""
    max_train_seconds: PositiveFloat | None = None
    """Training seconds, turned into a number of steps from the speed of the first 50."""
    num_train_epochs: PositiveFloat | None = None
    """Stop after this many passes over the folder."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16: products and activations in bfloat16; weights, moments and EMA stay in float32."""
    gradient_checkpointing: bool | Annotated[float, Field(gt=0, lt=1)] = False
    """Recompute layers in the backward pass to save memory: all, or a share of them, such as 0.5 for every other one."""
    compile: bool = False
    """torch.compile the layers, those of one kind once; worth it on long runs."""

    @model_validator(mode="after")
    def _one_limit(self):
        limits = [
            k for k in ("max_train_steps", "max_train_seconds", "num_train_epochs") if getattr(self, k) is not None
        ]
        if len(limits) != 1:
            found = "none is given" if not limits else " and ".join(limits) + " are given; write null to the others"
            raise ValueError(f"give exactly one of max_train_steps, max_train_seconds, num_train_epochs ({found})")
        if self.train_batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"train_batch_size {self.train_batch_size} is not divisible by "
                f"gradient_accumulation_steps {self.gradient_accumulation_steps}"
            )
        return self


class Checkpoint(Section):
    steps: PositiveInt = 1000
    """Save every so many steps, and at the end."""
    total_limit: PositiveInt = 2
    """Newest checkpoints kept."""


class Validation(Section):
    steps: PositiveInt | None = 1000
    """Sample the prompts and measure the held-out loss every so many steps, at step 0 and at the end; null: at the end only."""
    prompts: Annotated[list[str], Field(min_length=1)] | None = None
    """Prompts to sample; null takes up to four captions of the training folder."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    seed: NonNegativeInt = 0
    """Seed of the first prompt's noise; the next prompts count on from it."""
    num_inference_steps: PositiveInt = 20
    """Steps of the scheduler; the default of sample.py too."""
    guidance_scale: NonNegativeFloat = 3.0
    """Classifier-free guidance; at most 1 switches it off. The default of sample.py too."""
    scheduler: Literal["euler", "heun", "unipc", "dpm++", "ddim"] | None = None
    """Sampler; null takes euler for flow and ddim for diffusion."""
    judged_noises: NonNegativeInt = 0
    """Built-in shapes: noises per held-out prompt that the oracle judges at the end; as many clips of seen prompts."""


class Log(Section):
    every: PositiveInt = 10
    """Steps between two lines of metrics.jsonl."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online with an API key, else offline."""
    project: str = "stgen"
    """W&B project."""
    group: str | None = None
    """W&B group."""
    name: str | None = None
    """W&B run name; null takes the run folder's name."""


SAMPLERS = {"flow": ("euler", "heun", "unipc", "dpm++"), "diffusion": ("ddim", "unipc", "dpm++")}


class Config(Section):
    run: Run = Run()
    data: Data = Data()
    codec: Annotated[PatchPCA | PixelCodec | AutoencoderCodec, Field(discriminator="kind")] = PatchPCA()
    text: Annotated[LearnedText | PretrainedText, Field(discriminator="kind")] = LearnedText()
    tokens: Tokens = Tokens()
    model: Model = Model()
    objective: Objective = Objective()
    optim: Optim = Optim()
    ema: EMA = EMA()
    train: Train
    distributed: Distributed = Distributed()
    lora: Lora = Lora()
    checkpoint: Checkpoint = Checkpoint()
    validation: Validation = Validation()
    log: Log = Log()

    @model_validator(mode="after")
    def _numbers_are_meant(self):
        if fault := limits.slip(self.model_dump()):
            raise ValueError(fault)
        return self

    @model_validator(mode="after")
    def _sections_agree(self):
        data, codec, model = self.data, self.codec, self.model
        if self.tokens.positions == "rope" and model.width // model.heads % 2:
            raise ValueError(
                f"tokens.positions: rope turns pairs of channels, but model.width {model.width} over model.heads "
                f"{model.heads} gives heads of {model.width // model.heads}; make that even or write learned"
            )
        if self.validation.judged_noises and not data.shapes.held_out and data.train_data_dir is None:
            raise ValueError(
                "validation.judged_noises: the oracle compares with held-out prompts; data.shapes.held_out is 0"
            )
        self._check_sampler()
        self._check_lora()
        check_source(data)
        check_buckets(self)
        if self.objective.frame_times != "clip" and model.modulation == "none":
            raise ValueError(
                "objective.frame_times: under model.modulation none a clip has one token of time, not one a frame; write "
                "model.modulation: adaln"
            )
        try:
            check_sites(model.norm, model.modulation == "adaln", self.text.conditioning)
        except ValueError as error:
            raise ValueError(f"model.{error}") from None
        if self.objective.frame_times != "clip" and model.registers:
            raise ValueError(
                "objective.frame_times: registers have no frame to take a time from; write model.registers: 0"
            )
        if codec.kind == "pca":
            extents = (data.num_frames, data.height, data.width)
            for name, extent, patch in zip(("num_frames", "height", "width"), extents, codec.patch_size, strict=True):
                if extent % patch:
                    raise ValueError(f"data.{name} {extent} is not divisible by {patch} of codec.patch_size")
            if codec.components > 3 * codec.patch_size[0] * codec.patch_size[1] * codec.patch_size[2]:
                raise ValueError("codec.components exceeds the numbers in a patch")
        if codec.kind != "diffusers":
            self._check_segments(data.num_frames // (codec.patch_size[0] if codec.kind == "pca" else 1))
        return self

    def _check_lora(self):
        if self.lora.rank and self.model.pretrained is None:
            raise ValueError(
                f"lora.rank {self.lora.rank} trains beside weights that exist; write model.pretrained: a run folder or saved "
                "pipeline, or lora.rank: 0"
            )
        if self.lora.rank and self.distributed.kind == "fsdp":
            raise ValueError(
                "lora.rank: so few weights are trained that shards save nothing; write distributed.kind: ddp"
            )

    def _check_segments(self, latent_frames: int):
        for name in self.model.mixer_names:
            mixer, joined = self.model.mixer(name), self.tokens.patch_size[0]
            if not isinstance(mixer, AttentionMixer) or latent_frames % joined:
                continue
            try:
                check_segment(mixer.memory, latent_frames // joined)
            except ValueError as error:
                raise ValueError(f"model.mixers.{name}.{error}") from None

    def _check_sampler(self):
        path, scheduler, steps = self.objective.path, self.validation.scheduler, self.validation.num_inference_steps
        fitting = SAMPLERS[path]
        if scheduler is not None and scheduler not in fitting:
            raise ValueError(
                f"validation.scheduler: {scheduler} does not fit objective.path {path}; use {', '.join(fitting)}"
            )
        if path == "diffusion" and steps > self.objective.num_train_timesteps:
            raise ValueError(
                f"validation.num_inference_steps: {steps} exceeds objective.num_train_timesteps "
                f"{self.objective.num_train_timesteps}"
            )

    @property
    def output_dir(self) -> Path:
        """The run folder as a path."""
        return Path(self.run.output_dir)
