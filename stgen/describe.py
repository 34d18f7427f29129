"""What will run, in words: printed at the start of a run and by --dry-run."""

from collections.abc import Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stgen import buckets, build, codec, flops, schema
from stgen.attention.pattern import Remade
from stgen.attention.selection import causal_outside
from stgen.build import Parts
from stgen.flops import readable
from stgen.mixers.sequences import SequenceMixer
from stgen.objective import Objective
from stgen.ops.cost import Work
from stgen.tokens import Grid, grid_of

PRECISION = {"no": "in float32", "bf16": "products in bfloat16"}


def describe(cfg: schema.Config, parts: Parts, grid: Grid, work: Work, device: torch.device, data: str = "") -> str:
    """A few lines: model, tokens, FLOPs, batch, device, data."""
    train, model = cfg.train, cfg.model
    limit = (
        f"{train.max_train_steps} steps"
        if train.max_train_steps
        else f"{train.max_train_seconds:g} s"
        if train.max_train_seconds
        else f"{train.num_train_epochs:g} epochs"
    )
    batch = "one bucket on average" if cfg.data.buckets else f"{train.train_batch_size} clips"
    if train.gradient_accumulation_steps > 1:
        batch += f" in {train.gradient_accumulation_steps} parts"
    clip = f"{cfg.data.num_frames} frames of {cfg.data.height}x{cfg.data.width}"
    sparse = "" if work.executed == work.dense else f" ({readable(work.dense, 'FLOP')} if every layer attended densely)"
    rows = {
        "model": f"{readable(flops.trainable(parts.trained))} parameters, width {model.width}, {model.depth} layers, "
        f'{model.heads} heads, plan "{model.plan}"{norm_words(model)}{lora_words(cfg)}',
        "tokens": f"{grid.tokens} a clip ({grid}), from {clip}",
        "work": f"{readable(work.executed, 'FLOP')} a step of {batch}{sparse}, {PRECISION[train.mixed_precision]}, for {limit}",
        "device": f"{device.type} ({torch.get_num_threads()} threads)"
        if device.type == "cpu"
        else torch.cuda.get_device_name(),
        "data": data,
        "run folder": str(cfg.output_dir),
    }
    return "\n".join(f"{name:<12}{value}" for name, value in rows.items() if value)


def lora_words(cfg: schema.Config) -> str:
    """What a run starts from, and whether it trains adapters alone: `, LoRA of rank 8 on runs/x`."""
    start = cfg.model.pretrained
    return "" if start is None else f", {f'LoRA of rank {cfg.lora.rank} on' if cfg.lora.rank else 'from'} {start}"


def norm_words(model: schema.Model) -> str:
    """How time enters and the norm, where they are not the usual ones: `, time as a token, norm prepbn (gamma …)`"""
    words = ["time as a token"] if model.modulation == "none" else []
    words += [f"norm {section_words(model.norm)}"] if model.norm.kind != "layer" else []
    return "".join(f", {word}" for word in words)


def dry_run(cfg: schema.Config, captions: Sequence[str]) -> str:
    """The same without training, with memory and the plan layer by layer. No weights are allocated for the model."""
    device = build.device_of(cfg)
    component = build.build_codec(cfg)
    text_encoder, tokenizer, text_width = build.build_text(cfg, captions)
    shape = codec.as_codec(component).latent_shape(cfg.data.num_frames, cfg.data.height, cfg.data.width)
    grid = grid_of(tuple(shape[1:]), cfg.tokens.patch_size)
    length = min(cfg.text.max_length, 1 + max((len(c.split()) for c in captions), default=0))
    part = cfg.train.train_batch_size // cfg.train.gradient_accumulation_steps
    bf16 = cfg.train.mixed_precision == "bf16"
    with FakeTensorMode(allow_non_fake_inputs=True):
        transformer = build.build_transformer(cfg, shape, text_width)
        activations = flops.activation_bytes(transformer, shape, (length, text_width), part, bf16)
    parts = Parts(component, text_encoder, tokenizer, transformer)
    work = flops.step_work(transformer, grid, length, cfg.train.train_batch_size, cfg.train.gradient_checkpointing)
    state = 20 * flops.trainable(parts.trained)
    memory = (
        f"memory      about {readable(state, 'B')} of weights, gradients, moments and averages, "
        f"{readable(activations, 'B')} of activations"
    )
    layers = [_layer(i, transformer, layer, grid, length) for i, layer in enumerate(cfg.model.layers)]
    unused = sorted(cfg.model.mixers.keys() - set(cfg.model.mixer_names))
    note = [f"not in the plan: mixer {', '.join(unused)}"] if unused else []
    planned = buckets.plan(cfg, codec.as_codec(component)) if cfg.data.buckets else []
    note += [f"bucket      {b}: {b.grid.tokens} tokens a clip, {b.batch_size} a step" for b in planned]
    return "\n".join(
        [describe(cfg, parts, grid, work, device), memory, *_streaming(cfg, transformer), "plan", *layers, *note]
    )


def _streaming(cfg: schema.Config, transformer) -> list[str]:
    """Whether videos longer than the clips can be sampled, for models that are meant to; nothing for others."""
    if cfg.objective.frame_times != "past" and not transformer.remembers:
        return []
    reason = Objective(**cfg.objective.model_dump()).stream_refusal() or transformer.refusal()
    return [f"{'streaming':<12}{f'no: {reason}' if reason else 'yes: sample.py --num_frames takes any length'}"]


def _layer(i: int, transformer, layer, grid: Grid, text_tokens: int) -> str:
    """One layer: its mixers, their sequences, its FLOPs on one clip."""
    words = [words for branch in transformer.blocks[i].branches for words in _branch_words(branch, grid)]
    words += [] if transformer.pruner is None else pruning_words(transformer.pruner, i, grid)
    cost = readable(transformer.layer_work(i, grid, text_tokens).executed, "FLOP")
    return f"  {i:>3}  {layer!s:<28} {cost:>12} a clip   {'; '.join(words)}"


def pruning_words(pruner, layer: int, grid: Grid) -> list[str]:
    """What pruning leaves a layer, at the first values of schedules: `96 of 128 tokens`, `3 of 4 heads`."""
    stage = pruner.stages(grid.tokens)[layer]
    words = [f"{stage.tokens} of {grid.tokens} tokens"] if stage.tokens < grid.tokens else []
    return words + ([f"{stage.heads} of {pruner.heads} heads"] if stage.heads < pruner.heads else [])


def _branch_words(branch, grid: Grid) -> list[str]:
    return [branch.words(grid)] if isinstance(branch, SequenceMixer) else [mixer_words(m, grid) for m in branch.mixers]


def mixer_words(mixer, grid: Grid) -> str:
    """A mixer in words: its sequences, and for each run of heads what is not plain dense softmax."""
    use = mixer.use
    if use.takes == "output":
        return f"{use.name}: output of layer {use.source_layer}"
    count, length = mixer.runs[0].layout.sequence(grid)
    taken = f", {use.takes} of layer {use.source_layer}" if use.source is not None else ""
    runs = "".join(_run_words(run, grid) for run in mixer.runs)
    shows = use.keys.memory.kind == "infini"  # a ring shows in the pattern
    memory = f", memory {section_words(use.keys.memory)}" if shows else ""
    return f"{use.name}: {count} sequence{'s' * (count > 1)} of {length}{taken}{memory}{runs}"


def _run_words(run, grid: Grid) -> str:
    group, words = run.group, []
    if isinstance(group.pattern, Remade):
        words.append(pattern_words(group.pattern))
    elif group.pattern.kind != "full":
        pairs, blocks = run.density(grid)
        words.append(f"{pattern_words(group.pattern)}: {pairs:.0%} of pairs, {blocks:.0%} of blocks")
    words += [section_words(group.normaliser)] if group.normaliser.kind != "softmax" else []
    words += [f"sink {section_words(group.sink)}"] if group.sink.kind != "none" else []
    words += [] if run.approximation is None else [approximate_words(run.use.keys.approximate)]
    last = group.first + group.count - 1
    which = f" head{'s' * (group.count > 1)} {group.first}{f'-{last}' * (group.count > 1)}"
    return f",{which * (group.count < run.use.heads)} {', '.join(words)}" if words else ""


def approximate_words(keys) -> str:
    """`16 channels of q and k, q and k in 4 bits`"""
    words = [f"{keys.qk_topk} channels of q and k"] if keys.qk_topk != 0 else []
    point = " behind the point" if keys.form == "fixed" else ""
    return ", ".join(words + [f"{' and '.join(keys.quantise)} in {keys.bits} bits{point}"] * bool(keys.quantise))


def pattern_words(pattern) -> str:
    """`local (radius 2) + global (frames 1)` for a union, `causal & local (radius 2)` for an intersection."""
    return _joined_words(causal_outside(pattern))


def _joined_words(pattern) -> str:
    if pattern.kind not in ("any", "all"):
        return section_words(pattern)
    parts = [_joined_words(part) for part in getattr(pattern, pattern.kind)]
    return parts[0] if len(parts) == 1 else "(" + (" + " if pattern.kind == "any" else " & ").join(parts) + ")"


def section_words(section) -> str:
    """A section's kind with its settings; those that are words are left out where they are the default."""
    said = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        quiet = isinstance(value, str | bool | None) or name == "seed"
        if name != "kind" and value not in (None, []) and not (quiet and value == field.default):
            said.append(f"{name} {list(value) if isinstance(value, tuple) else value}")
    return section.kind + (f" ({', '.join(said)})" if said else "")
