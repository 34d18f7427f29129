"""From a config to the parts of a run, and from a run folder back to a pipeline."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AllowInfNan, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError
from torch import nn

from stgen import checkpoint, codec, lora, schema, text
from stgen.fetched import is_hub_id, missing
from stgen.model import VideoTransformer, spec_of
from stgen.objective import Objective
from stgen.pipeline import VideoPipeline, build_scheduler
from stgen.saved import INDEX, SavedError
from stgen.section import Section
from stgen.tokens import Grid, grid_of


class BuildError(ValueError):
    """A config or folder from which nothing can be built; one sentence that says what to do."""


@dataclass
class Parts:
    """What is trained and what it needs around it."""

    codec: Any  # the component: PatchPCA, Pixels or a diffusers autoencoder
    text_encoder: Any
    tokenizer: Any
    transformer: VideoTransformer
    adapted: bool = False  # whether LoRA adapters of the transformer are all that is trained

    @property
    def trained(self) -> dict[str, nn.Module]:
        """Modules whose weights are learned, by the names that checkpoints use."""
        learned: dict[str, nn.Module] = {"transformer": self.transformer}
        apart = self.adapted or self.tokenizer is not None
        return learned if apart else {**learned, "text_encoder": self.text_encoder}

    def weights(self) -> dict[str, torch.Tensor]:
        """What of the trained modules a checkpoint holds, as `{module}.{path}`: all, or adapters and buffers; not copies."""
        state = nn.ModuleDict(self.trained).state_dict()
        if not self.adapted:
            return state
        fixed = {
            f"transformer.{name}" for name, weight in self.transformer.named_parameters() if not weight.requires_grad
        }
        return {name: tensor for name, tensor in state.items() if name not in fixed}

    def to(self, device: torch.device) -> "Parts":
        modules: list[nn.Module] = [self.codec, self.text_encoder, self.transformer]
        for module in modules:
            module.to(device)
        return self


def device_of(cfg: schema.Config) -> torch.device:
    """The device that run.device names. Raises BuildError for CUDA where there is none."""
    if cfg.run.device == "cuda" and not torch.cuda.is_available():
        raise BuildError("run.device: cuda is asked for but PyTorch finds no CUDA device; write auto or cpu")
    cuda = cfg.run.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu")


def build_codec(cfg: schema.Config, local: bool = False) -> Any:
    """The codec's component, not yet fitted; `local` fetches nothing, whatever the config names."""
    match cfg.codec:
        case schema.PatchPCA(patch_size=patch, components=components):
            return codec.PatchPCA(patch, components)
        case schema.PixelCodec():
            return codec.Pixels()
        case schema.AutoencoderCodec(path=path, subfolder=subfolder, dtype=dtype):
            return codec.load_autoencoder(path, subfolder, dtype, local)


def build_text(cfg: schema.Config, captions: Sequence[str], local: bool = False) -> tuple[Any, Any, int]:
    """Text encoder, tokenizer (None for a learned encoder) and width of an embedding; `local` fetches nothing."""
    if isinstance(cfg.text, schema.PretrainedText):
        return text.load_pretrained(cfg.text.path, cfg.text.subfolder, local)
    vocabulary = text.vocabulary_of(captions) if cfg.text.kind == "words" else None
    return text.LearnedTextEncoder(vocabulary, cfg.text.width, cfg.text.max_length), None, cfg.text.width


def build_transformer(cfg: schema.Config, latent_shape: tuple[int, int, int, int], text_width: int) -> VideoTransformer:
    """The model for latents of shape (channels, frames, rows, columns)."""
    channels, *extents = latent_shape
    try:
        grid = grid_of(extents, cfg.tokens.patch_size)
    except ValueError as error:
        raise BuildError(f"tokens.patch_size: {error}") from None
    try:
        transformer = VideoTransformer(**_transformer_keys(cfg, channels, grid, text_width))
    except ValueError as error:
        raise BuildError(f"model.{error}") from None
    _recompute(cfg, transformer)
    return transformer


def _recompute(cfg: schema.Config, transformer: VideoTransformer) -> None:
    """Compute activations again in the backward pass, of as many layers as train.gradient_checkpointing says."""
    if cfg.train.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
        transformer.recomputed = float(cfg.train.gradient_checkpointing)


def _transformer_keys(cfg: schema.Config, channels: int, grid: Grid, text_width: int) -> dict[str, Any]:
    return dict(
        in_channels=channels,
        grid=(grid.t, grid.h, grid.w),
        patch_size=cfg.tokens.patch_size,
        width=cfg.model.width,
        depth=cfg.model.depth,
        heads=cfg.model.heads,
        plan=cfg.model.plan,
        mixers={name: cfg.model.mixer(name).model_dump(mode="json") for name in cfg.model.mixer_names},
        mlp_ratio=cfg.model.mlp.ratio,
        mlp_placement=cfg.model.mlp.placement,
        qk_norm=cfg.model.qk_norm,
        positions=cfg.tokens.positions,
        text_width=text_width,
        conditioning=cfg.text.conditioning,
        registers=cfg.model.registers,
        modulated=cfg.model.modulation == "adaln",
        norm=cfg.model.norm.model_dump(mode="json"),
        pruning=cfg.model.pruning.model_dump(mode="json"),
    )


def build_parts(
    cfg: schema.Config, captions: Sequence[str], local: bool = False, known: tuple[Any, Any, int] | None = None
) -> Parts:
    """All parts with fresh weights drawn from run.seed; the codec is not yet fitted; `local` fetches nothing.

    known: what stands for a text encoder that need not be loaded, its tokenizer and width (stgen.latent_cache).
    """
    torch.manual_seed(cfg.run.seed)
    if cfg.model.pretrained is not None and (cfg.lora.rank or not local):
        return _pretrained_parts(cfg, cfg.model.pretrained, local, known)
    component = build_codec(cfg, local)
    text_encoder, tokenizer, text_width = known or build_text(cfg, captions, local)
    shape = codec.as_codec(component).latent_shape(cfg.data.num_frames, cfg.data.height, cfg.data.width)
    return Parts(component, text_encoder, tokenizer, build_transformer(cfg, shape, text_width))


def _pretrained_parts(cfg: schema.Config, name: str, local: bool, known: tuple[Any, Any, int] | None = None) -> Parts:
    """The parts of a saved pipeline, with adapters where the config asks for them; `local` fetches nothing.

    Raises BuildError for a pipeline of another form than the config says.
    """
    pipeline = load_saved(name, local)
    text_encoder, tokenizer, width = known or (pipeline.text_encoder, pipeline.tokenizer, None)
    shape = codec.as_codec(pipeline.codec).latent_shape(cfg.data.num_frames, cfg.data.height, cfg.data.width)
    _check_same_form(cfg, name, pipeline, shape, width)
    transformer = pipeline.transformer
    _recompute(cfg, transformer)
    parts = Parts(pipeline.codec, text_encoder, tokenizer, transformer, adapted=bool(cfg.lora.rank))
    if parts.adapted:
        lora.attach(transformer, cfg.lora)
        text_encoder.requires_grad_(False)
    for module in parts.trained.values():
        module.train()
    return parts


def _check_same_form(
    cfg: schema.Config, name: str, pipeline: VideoPipeline, shape: tuple[int, ...], width: int | None
) -> None:
    """Raise BuildError naming the first key that the pipeline's parts were made with otherwise."""
    trained: Any = pipeline.transformer.config
    try:
        grid = grid_of(shape[1:], cfg.tokens.patch_size)
    except ValueError as error:
        raise BuildError(f"tokens.patch_size: {error}") from None
    ours = _transformer_keys(cfg, shape[0], grid, width or trained.text_width)
    theirs = {key: trained[key] for key in ours}
    if cfg.tokens.positions != "learned":  # which hold for one grid; others for any
        theirs["grid"] = ours["grid"]
    for keys in (ours, theirs):
        keys["mixers"] = {m: spec_of(m, keys["mixers"]).model_dump(mode="json") for m in keys["mixers"]}
    objective = {
        key: (getattr(cfg.objective, key), getattr(pipeline.objective, key)) for key in ("path", "prediction_type")
    }
    kind = {"PatchPCA": "pca", "Pixels": "pixels"}.get(type(pipeline.codec).__name__, "diffusers")
    pairs = {"codec": (cfg.codec.kind, kind), **objective, **{key: (ours[key], theirs[key]) for key in ours}}
    for key, pair in pairs.items():
        own, other = (json.loads(json.dumps(value)) for value in pair)
        if own != other:
            raise BuildError(
                f"model.pretrained: {name} was trained with {key} {str(other)[:80]}, the config says {str(own)[:80]}; write the "
                "keys that it was trained with (config.yaml of its run)"
            )
    if hasattr(pipeline.codec, "fit") and cfg.data.cache == "disk":
        raise BuildError("data.cache: disk holds latents of a codec of its own, not of model.pretrained; write memory")


def vocabulary_of(parts: Parts, captions: Sequence[str]) -> list[str]:
    """The words that the text encoder knows; those of the captions for one that has no vocabulary."""
    known = parts.text_encoder.config.vocabulary if isinstance(parts.text_encoder, text.LearnedTextEncoder) else None
    return list(captions if known is None else known)


def build_pipeline(cfg: schema.Config, parts: Parts, fps: float) -> VideoPipeline:
    """The sampling face of the parts; `fps` is that of the training clips."""
    objective = Objective(**cfg.objective.model_dump())
    return VideoPipeline(
        parts.transformer,
        parts.codec,
        parts.text_encoder,
        build_scheduler(cfg.validation.scheduler, objective),
        parts.tokenizer,
        objective=cfg.objective.model_dump(),
        sampling={
            "num_frames": cfg.data.num_frames,
            "height": cfg.data.height,
            "width": cfg.data.width,
            "fps": fps,
            "num_inference_steps": cfg.validation.num_inference_steps,
            "guidance_scale": cfg.validation.guidance_scale,
            "max_length": cfg.text.max_length,
            "mixed_precision": cfg.train.mixed_precision,
        },
    )


@contextmanager
def complete(cfg: schema.Config, pipeline: VideoPipeline) -> Iterator[None]:
    """Within it the pipeline holds its text encoder, as a saved one must, even if training reads embeddings from disk."""
    stand_in = pipeline.text_encoder
    if isinstance(stand_in, text.KnownPrompts):
        pipeline.register_modules(text_encoder=build_text(cfg, [])[0])
    try:
        yield
    finally:
        pipeline.register_modules(text_encoder=stand_in)


# --------------------------------------------------------------------------------------- states in checkpoints


def codec_tensors(component: Any) -> dict[str, torch.Tensor]:
    """Tensors of a codec fitted here; an autoencoder stays where it was loaded from."""
    return component.state_dict() if hasattr(component, "fit") else {}


class _Progress(Section):
    total: PositiveInt | None
    seconds: NonNegativeFloat
    wandb_id: str | None
    held_out_loss: Annotated[float, AllowInfNan(True)] | None
    smooth_loss: float
    recent: list[NonNegativeFloat]
    window: list[tuple[float, float]]


class _State(Section):
    """What `state.json` of a checkpoint holds. Whoever wrote it, nothing is read that is not of this form."""

    config: schema.Config
    vocabulary: list[str]
    fps: PositiveFloat
    progress: _Progress | None = None  # this and the next are for a resume
    files: str | None = None
    not_finite: dict[str, Any] | None = None  # of a dump: what a run stopped for


GROUPS = ("model", "ema", "optimizer", "random", "codec")


def read_state(loaded: checkpoint.Loaded, resume: bool = False) -> schema.Config:
    """The config that a checkpoint was trained under; with `resume` all is there that goes on with a run.

    Raises CheckpointError naming the key, or file, that is not as it should be, as in a checkpoint of another version.
    """
    for group in GROUPS if resume else ("model", "ema"):
        if group not in loaded.tensors:
            raise checkpoint.CheckpointError(f"{loaded.path / group}.safetensors: missing")
    try:
        state = _State.model_validate_json(json.dumps(loaded.state), strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise _not_ours(loaded, ".".join(map(str, fault["loc"]))[:120], fault["msg"]) from None
    for key in ("progress", "files") if resume else ():
        if getattr(state, key) is None:
            raise _not_ours(loaded, key, "missing")
    return state.config


def _check_extent(cfg: schema.Config, loaded: checkpoint.Loaded) -> None:
    """Raise CheckpointError for a config that asks for far more than the files hold, before anything is allocated for it."""
    width = cfg.text.width if isinstance(cfg.text, schema.LearnedText) else 0
    words = len(loaded.state["vocabulary"]) if cfg.text.kind == "words" else 0
    least = {
        "model": 0  # of adapters; the weights beside them are judged where they are loaded
        if cfg.lora.rank
        else cfg.model.depth * cfg.model.width**2 // 8 + words * width,  # of a layer that reuses and leaves out much
        "codec": cfg.codec.components * math.prod(cfg.codec.patch_size)
        if isinstance(cfg.codec, schema.PatchPCA)
        else 0,
    }
    for group, asked in least.items():
        held = sum(tensor.numel() for tensor in loaded.tensors.get(group, {}).values())
        if held < asked:
            raise checkpoint.CheckpointError(
                f"{loaded.path / group}.safetensors: holds {held} numbers; the config in {checkpoint.STATE} asks for {asked} "
                "and more"
            )


def _not_ours(loaded: checkpoint.Loaded, key: str, fault: str) -> checkpoint.CheckpointError:
    return checkpoint.CheckpointError(
        f"{loaded.path / checkpoint.STATE}: {key}: {fault}; was it saved by this version of stgen?"
    )


def load_weights(parts: Parts, tensors: dict[str, torch.Tensor]) -> None:
    """Load weights named `{module}.{path}` as checkpoints hold them.

    Raises CheckpointError listing every key that is missing, unexpected or misshapen.
    """
    holder = nn.ModuleDict(parts.trained)
    if not parts.adapted:
        checkpoint.load_into(holder, tensors, "model")
        return
    checkpoint.check_tensors(parts.weights(), tensors, "model")
    holder.load_state_dict(tensors, strict=False)


def load_pipeline(folder: Path, weights: str = "ema") -> VideoPipeline:
    """A pipeline from a run folder, one of its checkpoints or a saved pipeline; `weights` is ema or raw.

    A finished run's `final/` holds the averaged weights; raw weights come from its newest checkpoint.
    Raises BuildError when the folder holds none of these.
    """
    if reason := missing(folder):
        raise BuildError(f"{reason}; name a run folder, a checkpoint, a saved pipeline or a hub id")
    if is_hub_id(folder):
        if weights == "raw":
            raise BuildError(
                f"{folder} is fetched from the hub and holds one set of weights; raw ones are in a run's checkpoints"
            )
        return _saved_pipeline(folder)
    if (folder / INDEX).is_file():
        if weights == "raw":
            raise BuildError(
                f"{folder} is a saved pipeline and holds one set of weights; raw ones are in a run's checkpoints"
            )
        return _saved_pipeline(folder)
    if weights == "ema" and (folder / "final" / INDEX).is_file():
        return _saved_pipeline(folder / "final")
    which = str(folder) if (folder / "manifest.json").is_file() else "latest"
    loaded = checkpoint.resolve(folder, which)
    if loaded is None and (folder / "config.yaml").is_file():
        raise BuildError(f"{folder} has no checkpoint yet; train on, or lower checkpoint.steps")
    if loaded is None:
        raise BuildError(
            f"{folder} is neither a run folder, nor a checkpoint (manifest.json), nor a saved pipeline ({INDEX}), nor a hub id"
        )
    # A checkpoint carries the config it was trained under; the run folder's may have changed since. It may come from
    # anywhere, so the hub ids in it are looked up on this machine alone.
    cfg = read_state(loaded)
    _check_extent(cfg, loaded)
    parts = build_parts(cfg, loaded.state["vocabulary"], local=True)
    if loaded.tensors.get("codec"):
        checkpoint.load_into(parts.codec, loaded.tensors["codec"], "codec")
    load_weights(parts, {**loaded.tensors["model"], **(loaded.tensors["ema"] if weights == "ema" else {})})
    if parts.adapted:
        lora.merge(parts.transformer)
    for module in parts.trained.values():
        module.eval()  # as a saved pipeline is when it is loaded: norms use their averages
    return build_pipeline(cfg, parts, loaded.state["fps"])


def load_saved(name: str, local: bool = False) -> VideoPipeline:
    """The saved pipeline of a folder, of a finished run or of a hub id; `local` fetches nothing. Raises BuildError."""
    folder = Path(name)
    if folder.exists() and not (folder / INDEX).is_file():
        folder = folder / "final"
        if not (folder / INDEX).is_file():
            raise BuildError(
                f"model.pretrained: {name} holds no saved pipeline; name a finished run, or a folder with a {INDEX}"
            )
    return _saved_pipeline(folder, local_files_only=local)


def _saved_pipeline(folder: Path, **options: Any) -> VideoPipeline:
    try:
        return VideoPipeline.from_pretrained(folder, **options)
    except SavedError:
        raise
    except Exception as error:  # diffusers and transformers meet damage in many ways, and in many words
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise BuildError(f"{folder} cannot be loaded; was it saved by this version of stgen? {reason}") from None
