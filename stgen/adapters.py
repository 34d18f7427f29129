"""stgen's attention inside the video transformers of diffusers: patterns, normalisers, sinks and kernels.

Each self-attention over video tokens keeps its own processor, with its norms and rotary embedding as they are; ours
stands round it and answers the one call of scaled dot-product attention that it makes. Where a model packs the prompt
into the same sequence, text tokens stay global: every video token sees them, and they see everything.

    adaptation = stgen.adapt(pipe.transformer, "{pattern: [{kind: local, radius: 2}, {kind: global, frames: 1}]}")
    ...                                        # sample, or train adaptation.parameters()
    adaptation.save_pretrained("sparse-wan")   # later: stgen.adapt(pipe.transformer, "sparse-wan")
    adaptation.restore()
"""

import copy
import inspect
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from stgen import config
from stgen.attention.attend import Heads
from stgen.attention.pattern import Pattern, Remade
from stgen.attention.patterns import leaves
from stgen.attention.patterns.causal import Causal
from stgen.attention.reuse import Use
from stgen.attention.spec import AttentionMixer, HeadGroup, NoMemory
from stgen.checkpoint import CheckpointError, load_into
from stgen.ops.linear_attention import linear_attention
from stgen.ops.support import Support
from stgen.tokens import Grid

SPEC, WEIGHTS = "stgen_attention.json", "stgen_attention.safetensors"


class AdaptError(ValueError):
    """What cannot be adapted, or be run once it is; one sentence that says what to do."""


# -------------------------------------------------------------------------------------------- the models of diffusers


@dataclass(frozen=True)
class Layer:
    """A self-attention over video tokens, and the axes of the clip that its sequences span."""

    attention: Any
    axes: Literal["thw", "hw", "t"] = "thw"


@dataclass(frozen=True)
class Anatomy:
    """How a class of diffusers lays its tokens out."""

    layers: Callable[[Any], list[Layer]]
    grid: Callable[[Any, Mapping[str, Any]], Grid]  # from the model's config and the arguments of a call
    text: Literal["apart", "before", "after"] = "apart"  # where tokens of the prompt stand in the sequence


def _blocks(*lists: str, attention: str) -> Callable[[Any], list[Layer]]:
    """The attention of that name of every block of the lists, in their order."""
    return lambda model: [Layer(getattr(block, attention)) for name in lists for block in getattr(model, name)]


def _latte_layers(model: Any) -> list[Layer]:
    """Spatial and temporal blocks in turn, as they run."""
    pairs = zip(model.transformer_blocks, model.temporal_transformer_blocks, strict=True)
    return [layer for s, t in pairs for layer in (Layer(s.attn1, "hw"), Layer(t.attn1, "t"))]


def _cut(shape: Sequence[int], patch: Sequence[int]) -> Grid:
    t, h, w = (-(-extent // size) for extent, size in zip(shape, patch, strict=True))
    return Grid(t, h, w)


def _patch(cfg: Any) -> tuple[int, int, int]:
    return (getattr(cfg, "patch_size_t", None) or 1, cfg.patch_size, cfg.patch_size)


def _cogvideox_grid(cfg: Any, call: Mapping[str, Any]) -> Grid:
    frames, _, *extents = call["hidden_states"].shape[1:]  # [B, T, C, H, W]
    return _cut((frames, *extents), _patch(cfg))


def _ltx_grid(cfg: Any, call: Mapping[str, Any]) -> Grid:
    sizes = [call.get(name) for name in ("num_frames", "height", "width")]
    if None in sizes:
        raise AdaptError("LTXVideoTransformer3DModel: pass num_frames, height and width; they say where tokens stand")
    t, h, w = (int(size) for size in sizes if size is not None)
    return Grid(t, h, w)


MODELS: dict[str, Anatomy] = {
    "WanTransformer3DModel": Anatomy(
        _blocks("blocks", attention="attn1"), lambda cfg, call: _cut(call["hidden_states"].shape[2:], cfg.patch_size)
    ),
    "LTXVideoTransformer3DModel": Anatomy(_blocks("transformer_blocks", attention="attn1"), _ltx_grid),
    "CogVideoXTransformer3DModel": Anatomy(_blocks("transformer_blocks", attention="attn1"), _cogvideox_grid, "before"),
    "HunyuanVideoTransformer3DModel": Anatomy(
        _blocks("transformer_blocks", "single_transformer_blocks", attention="attn"),
        lambda cfg, call: _cut(call["hidden_states"].shape[2:], _patch(cfg)),
        "after",
    ),
    "LatteTransformer3DModel": Anatomy(
        _latte_layers, lambda cfg, call: _cut(call["hidden_states"].shape[2:], _patch(cfg))
    ),
}


def _anatomy(transformer: Any) -> Anatomy:
    for kind in type(transformer).__mro__:  # the first is another class where FSDP has wrapped the model
        if kind.__name__ in MODELS and kind.__module__.startswith("diffusers."):
            return MODELS[kind.__name__]
    raise AdaptError(
        f"{type(transformer).__name__}: stgen has no attention for this class; it has for {', '.join(MODELS)}"
    )


# ----------------------------------------------------------------------------------------------------------- the door


def adapt(
    transformer: nn.Module, spec: str | Path | Mapping[Any, Any], grid: tuple[int, int, int] | None = None
) -> "Adaptation":
    """Put stgen's attention into a video transformer of diffusers, in place.

    Args:
        transformer: a Wan, LTX, CogVideoX, HunyuanVideo or Latte transformer. In Latte sequences are frames in even
            layers and pixels over time in odd ones; in the others every layer sees the clip.
        spec: an entry of `model.mixers`, as a dict or as YAML; a mapping from layers to such entries, `{"0-9": {...},
            "10-": {...}}`, which leaves the others as they are; or a folder of `Adaptation.save_pretrained`.
        grid: frames, rows and columns of the token grid, for patterns with learned weights of that size.

    Raises:
        AdaptError: a class, a layer or a choice of rooms that cannot be served.
    """
    if isinstance(spec, str | Path) and os.path.isdir(spec):
        return _loaded(transformer, Path(spec))
    layers = _anatomy(transformer).layers(transformer)
    if any(isinstance(layer.attention.processor, Adapted) for layer in layers):
        raise AdaptError("this transformer is adapted already; call restore() of its adaptation first")
    return Adaptation(transformer, _by_layer(_read(spec), len(layers)), None if grid is None else Grid(*grid))


class Adaptation(nn.Module):
    """What `adapt` has put into a transformer; its parameters are the learned parts, such as sinks."""

    def __init__(self, transformer: nn.Module, mixers: Mapping[int, AttentionMixer], grid: Grid | None = None):
        super().__init__()
        anatomy = _anatomy(transformer)
        layers = anatomy.layers(transformer)
        self.keys = dict(mixers)
        self.grid = grid
        place = Place(anatomy)
        first = next(transformer.parameters())
        self.heads = nn.ModuleDict()
        for i, mixer in self.keys.items():
            try:
                heads = _heads(mixer, layers, i, grid, with_text=anatomy.text != "apart")
            except ValueError as error:
                raise AdaptError(f"layer {i}: {error}") from None
            exact = torch.float64 if first.dtype == torch.float64 else torch.float32  # in low precision too
            self.heads[str(i)] = heads.to(first.device, exact)
        self._own = [(layers[i].attention, layers[i].attention.processor) for i in self.keys]
        for i, (attention, own) in zip(self.keys, self._own, strict=True):
            attention.set_processor(Adapted(own, self.heads[str(i)], layers[i].axes, place))
            place.layers.append((i, attention, attention.processor))
        self._hook = transformer.register_forward_pre_hook(place.see, with_kwargs=True)
        self._transformer: list[Any] = [transformer]  # in a list, since it is no part of this module

    def restore(self) -> None:
        """Give every layer its own processor back; the learned parts remain in this object."""
        for attention, own in self._own:
            attention.set_processor(own)
        self._own = []
        self._hook.remove()
        recompute = getattr(self._transformer[0], "_gradient_checkpointing_func", None)
        if isinstance(recompute, Recompute):
            self._transformer[0]._gradient_checkpointing_func = recompute.own

    def at_step(self, step: int) -> None:
        """Tell numbers that change over training how many optimiser steps were made."""
        for module in self.heads.modules():
            if (told := getattr(module, "at_step", None)) is not None:
                told(step)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what `adapt` makes the same attention from: the spec and the learned parts."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        layers = {str(i): mixer.model_dump(mode="json") for i, mixer in self.keys.items()}
        grid = None if self.grid is None else [self.grid.t, self.grid.h, self.grid.w]
        (folder / SPEC).write_text(json.dumps({"grid": grid, "layers": layers}, indent=2) + "\n")
        save_file({name: x.contiguous().cpu() for name, x in self.heads.state_dict().items()}, folder / WEIGHTS)


def _loaded(transformer: nn.Module, folder: Path) -> Adaptation:
    """The adaptation that `save_pretrained` wrote. Raises AdaptError naming the file and what is wrong with it."""
    try:
        content = json.loads((folder / SPEC).read_bytes())
        tensors = load_file(folder / WEIGHTS)
        layers: Any = content["layers"]
        grid: Any = content["grid"]
        if not isinstance(layers, dict):
            raise TypeError("layers is no mapping")
        if grid is not None and not (
            isinstance(grid, list) and len(grid) == 3 and all(type(n) is int and n > 0 for n in grid)
        ):
            raise TypeError("grid is neither null nor three whole numbers from 1 on")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)[:100]
        raise AdaptError(f"{folder}: holds no adaptation ({SPEC}, {WEIGHTS}): {reason}") from None
    adaptation = adapt(transformer, layers, None if grid is None else tuple(grid))  # type: ignore[arg-type]
    try:
        load_into(adaptation.heads, tensors, "attention")
    except CheckpointError as error:
        adaptation.restore()
        raise AdaptError(f"{folder / WEIGHTS}: {error}") from None
    return adaptation


# ------------------------------------------------------------------------------------------------------------ the spec


def _read(spec: str | Path | Mapping[Any, Any]) -> Any:
    """The spec as plain values."""
    if isinstance(spec, Mapping):
        return spec
    try:
        return config.plain(str(spec), "spec") or {}
    except config.ConfigError as error:
        raise _told(error) from None


def _told(error: config.ConfigError) -> AdaptError:
    return AdaptError("; ".join(line.removeprefix("config error: ") for line in error.errors))


def _by_layer(spec: Any, depth: int) -> dict[int, AttentionMixer]:
    """The mixer of every layer that is to change. Raises AdaptError."""
    ranges = isinstance(spec, Mapping) and bool(spec) and all(re.match(r"\s*\d", str(key)) for key in spec)
    found: dict[int, AttentionMixer] = {}
    for key, keys in (spec if ranges else {"0-": spec}).items():
        mixer = _mixer(keys, f"spec.{key}" if ranges else "spec")
        for i in _range(str(key), depth):
            if i in found:
                raise AdaptError(f"spec: {key!r} names layer {i}, which another entry has named")
            found[i] = mixer
    return dict(sorted(found.items()))


def _range(key: str, depth: int) -> range:
    """ "0-9", "10-" and "5" as layers."""
    match = re.fullmatch(r"\s*(\d{1,4})\s*(-)?\s*(\d{1,4})?\s*", key)
    first, last = -1, -1
    if match and (match[2] or not match[3]):
        first = int(match[1])
        last = int(match[3]) if match[3] else depth - 1 if match[2] else first
    if not 0 <= first <= last < depth:
        raise AdaptError(
            f'spec: {key!r} is no range of the {depth} layers; write "0-9", "10-" or "5", counted from 0 to {depth - 1}'
        )
    return range(first, last + 1)


def _mixer(keys: Any, where: str) -> AttentionMixer:
    if isinstance(keys, AttentionMixer):
        return keys
    keys = {"layout": keys} if isinstance(keys, str) else keys  # as a plan names a layout
    try:
        return config.parse(json.dumps(keys, default=str), AttentionMixer, where)
    except config.ConfigError as error:
        raise _told(error) from None


def _heads(
    mixer: AttentionMixer, layers: list[Layer], number: int, grid: Grid | None, with_text: bool
) -> nn.ModuleList:
    """The heads of a layer, in runs that do the same. Raises ValueError for what has no meaning there."""
    layer = layers[number]
    if mixer.reuse.what != "none":
        raise AdaptError("reuse: layers of this model hand nothing on to later ones; leave reuse out")
    if not isinstance(mixer.memory, NoMemory):
        raise AdaptError("memory: this model makes whole clips, and nothing is carried; leave memory out")
    needs = {"spatial": "hw", "temporal": "t", "height": "h", "width": "w"}.get(mixer.layout, "")
    if not set(needs) <= set(layer.axes):
        has = "the tokens of a frame" if layer.axes == "hw" else "one place over time"
        raise AdaptError(f"layout: a sequence of this layer is {has}, so {mixer.layout} says nothing; write joint")
    groups = mixer.head_groups(layer.attention.heads)
    for group in groups:
        _check_pattern(group.pattern, grid, with_text)
    turn = sum(other.axes == layer.axes for other in layers[:number])
    use = Use(number, number, f"layer {number}", mixer, layer.attention.heads, turn)
    head_dim = layer.attention.inner_dim // layer.attention.heads
    kind = HeadsWithText if with_text else Heads
    nominal = _within(grid or Grid(256, 256, 256), layer.axes)  # without a grid no learned part has a size of it
    return nn.ModuleList(kind(use, group, head_dim, nominal, registers=0) for group in groups)


def _check_pattern(pattern: Pattern, grid: Grid | None, with_text: bool) -> None:
    if isinstance(pattern, Remade) and with_text:
        raise AdaptError(
            f"pattern: {pattern.kind} attends keys of its own, among which a prompt in the sequence has no place; write "
            "another"
        )
    if pattern.kind in ("linformer", "convolution") and grid is None:
        raise AdaptError(
            f"pattern: {pattern.kind} learns weights of a fixed size; pass grid=(frames, rows, columns) in tokens"
        )


def _within(grid: Grid, axes: str) -> Grid:
    """The part of a grid that a sequence spans."""
    t, h, w = (n if axis in axes else 1 for axis, n in zip("thw", (grid.t, grid.h, grid.w), strict=True))
    return Grid(t, h, w)


# ------------------------------------------------------------------------------------------------------- in the layers


class Place:
    """Where the tokens of the running call stand, for all layers: read before the model runs."""

    def __init__(self, anatomy: Anatomy):
        self.anatomy = anatomy
        self.grid: Grid | None = None
        self.layers: list[tuple[int, Any, Any]] = []
        self._masked: tuple[Any, Any] = (None, None)  # the last mask, and what it says

    def see(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for number, attention, adapted in self.layers:
            if attention.processor is not adapted:
                raise AdaptError(
                    f"layer {number}: another processor has taken the place of stgen's; call restore() and adapt again"
                )
        call = inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs).arguments
        self.grid = self.anatomy.grid(model.config, call)
        recompute = getattr(model, "_gradient_checkpointing_func", None)  # set anew by enable_gradient_checkpointing
        if recompute is not None and not isinstance(recompute, Recompute):
            model._gradient_checkpointing_func = Recompute(recompute, self)

    def clip(self, tokens: int, axes: str) -> Grid:
        """The grid of a sequence of so many tokens, those of the prompt among them."""
        if self.grid is None:
            raise AdaptError(
                "the attention of an adapted model runs within the model alone, which reads the clip's size"
            )
        grid = _within(self.grid, axes)
        if tokens < grid.tokens or (tokens > grid.tokens and self.anatomy.text == "apart"):
            raise AdaptError(f"{tokens} tokens in a sequence where a clip of {self.grid} has {grid.tokens}")
        return grid

    def spans(self, tokens: int, video: int) -> tuple[slice, slice]:
        """Where the video and the prompt stand among `tokens`."""
        if self.anatomy.text == "before":
            return slice(tokens - video, None), slice(0, tokens - video)
        return slice(0, video), slice(video, None)

    def shown(self, mask: Tensor | None, text: slice) -> list[tuple[Any, Any]]:
        """Clips that may see the same places of their prompts: (which clips, which places) each."""
        if mask is None:
            return [(slice(None), slice(None))]
        if self._masked[0] is not mask:  # it is the same in all layers, and reading it waits for the device
            self._masked = (mask, _alike(mask[:, 0, 0, text]))
        return self._masked[1]


class Recompute:
    """Gradient checkpointing by which a block runs again on the grid of its own forward pass, not on that of the last one."""

    def __init__(self, own: Callable[..., Any], place: Place):
        self.own, self.place = own, place

    def __call__(self, block: Any, *args: Any, **kwargs: Any) -> Any:
        grid = self.place.grid

        def placed(*args: Any, **kwargs: Any) -> Any:
            self.place.grid = grid
            return block(*args, **kwargs)

        return self.own(placed, *args, **kwargs)


def _alike(seen: Tensor) -> list[tuple[Any, Any]]:
    """Rows of a mask [B, L] that are equal: (their numbers, the places they show) each."""
    if bool(seen.all()):
        return [(slice(None), slice(None))]
    rows, which = seen.unique(dim=0, return_inverse=True)
    return [((which == i).nonzero()[:, 0], row.nonzero()[:, 0]) for i, row in enumerate(rows)]


class Instead(TorchFunctionMode):
    """Within it `attend` answers calls of scaled dot-product attention, and they are counted."""

    def __init__(self, attend: Callable[..., Tensor]):
        super().__init__()
        self.attend, self.calls = attend, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self.attend(*args, **(kwargs or {}))


class Adapted(nn.Module):
    """A processor of diffusers with stgen's heads in place of its attention; all else is its own."""

    _parallel_config: Any = None  # diffusers writes here when it splits sequences over ranks

    def __init__(self, own: Any, heads: Any, axes: str, place: Place):
        super().__init__()
        self.own = copy.copy(own)
        if hasattr(own, "_attention_backend"):
            self.own._attention_backend = AttentionBackendName.NATIVE
        self.heads, self.axes, self.place = heads, axes, place

    def __call__(  # diffusers reads the names of arguments off this method
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ) -> Any:
        if self._parallel_config is not None:
            raise AdaptError("context parallelism splits the sequences that patterns look at; disable it, or restore()")
        rotary = () if image_rotary_emb is None else (image_rotary_emb,)
        instead = Instead(self.attend)
        with instead:
            out = self.own(attn, hidden_states, encoder_hidden_states, attention_mask, *rotary)
        if instead.calls != 1:
            raise AdaptError(
                f"{type(self.own).__name__} called scaled_dot_product_attention {instead.calls} times, not once, so stgen's "
                "attention has no place in it; set the model's default processors and adapt again"
            )
        return out

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """What scaled_dot_product_attention is called with, [B, heads, n, D] each -> [B, heads, n, D]."""
        if dropout_p or is_causal or key.shape[1] != query.shape[1]:
            raise AdaptError(
                "attention with dropout, a causal mask or fewer heads of keys than of queries is not served"
            )
        if scale is not None:
            query = query * (scale * math.sqrt(query.shape[-1]))
        grid = self.place.clip(query.shape[2], self.axes)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # [B, n, heads, D]
        if self.place.anatomy.text == "apart":
            if attn_mask is not None:
                raise AdaptError("a mask on video tokens is not served; leave attention_mask out")
            return self._each(lambda heads, own: heads(q[:, :, own], k[:, :, own], v[:, :, own], grid)[0]).transpose(
                1, 2
            )
        return self._packed(q, k, v, attn_mask, grid).transpose(1, 2)

    def _packed(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, grid: Grid) -> Tensor:
        """The same where the prompt stands in the sequence: [B, n, heads, D]."""
        if mask is not None and (mask.dtype != torch.bool or mask.shape[1:3] != (1, 1)):
            raise AdaptError(f"a mask {list(mask.shape)} of {mask.dtype}, where one of keys alone, in bools, is served")
        video, text = self.place.spans(q.shape[1], grid.tokens)
        out = torch.empty_like(q)
        for clips, places in self.place.shown(mask, text):
            x = [y[clips] for y in (q, k, v)]

            def attend(heads: Any, own: slice, x: list[Tensor] = x, places: Any = places) -> Tensor:
                tokens, words = [y[:, video, own] for y in x], [y[:, text, own] for y in x]
                seen, told = heads.beside(tokens, [y[:, places] for y in words], grid)
                if not isinstance(places, slice):  # what nobody sees puts out nothing
                    told = torch.zeros_like(words[0]).index_copy(1, places, told)
                return torch.cat([seen, told] if video.start == 0 else [told, seen], dim=1)

            done = self._each(attend)
            if isinstance(clips, slice):
                return done
            out = out.index_copy(0, clips, done)
        return out

    def _each(self, attend: Callable[[Any, slice], Tensor]) -> Tensor:
        """The outputs of all runs of heads side by side."""
        runs = [(heads, slice(heads.group.first, heads.group.first + heads.group.count)) for heads in self._runs]
        outputs = [attend(heads, own) for heads, own in runs]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    @property
    def _runs(self) -> list[Any]:
        return list(self.heads)


class HeadsWithText(Heads):
    """Heads in whose sequences the tokens of a prompt are global: seen by all, and seeing all."""

    def __init__(self, use: Use, group: HeadGroup, head_dim: int, grid: Grid, registers: int):
        super().__init__(use, group, head_dim, grid, registers)
        self.selection.sinks = 0  # their places come before those of the prompt, which come before the sequence

    def beside(self, video: list[Tensor], text: list[Tensor], grid: Grid) -> tuple[Tensor, Tensor]:
        """Queries, keys and values of the video [B, N, heads, D] and of the prompt [B, L, heads, D] -> what both put out."""
        words = [self._exactly(x.transpose(1, 2), name) for x, name in zip(text, "qkv", strict=True)]
        own = [self._entering(x, name, grid) for x, name in zip(video, "qkv", strict=True)]  # [S, heads, n, D]
        out = self._unfold(self._seeing(own, words[1:], grid), grid)
        every = [self._exactly(x.transpose(1, 2), name) for x, name in zip(video[1:], "kv", strict=True)]
        k, v = (torch.cat([a, b], dim=2) for a, b in zip(words[1:], every, strict=True))
        if self.features is not None:
            return out, self._sum(words[0], k, v).transpose(1, 2)
        return out, self._weigh(words[0], k, v, None, None).transpose(1, 2)

    def _seeing(self, own: list[Tensor], words: list[Tensor], grid: Grid) -> Tensor:
        """q, k, v [S, heads, n, D] of folded sequences with the prompt's k, v [B, heads, places, D] -> [S, heads, n, D]."""
        q, k, v = own
        support, count = self._support(q, k, grid), words[0].shape[2]
        filled = count if support is None else -(-count // support.block[1]) * support.block[1]
        front = [pad(x, (0, 0, 0, filled - count)).repeat_interleave(len(q) // len(x), 0) for x in words]
        k, v = torch.cat([front[0], k], dim=2), torch.cat([front[1], v], dim=2)
        if support is not None:
            return self._weigh(q, k, v, self._extended(support, count), None)
        mask = self._key_mask(grid, q)
        mask = None if mask is None else pad(mask, (count, 0), value=True)
        if self.features is None:
            return self._weigh(q, k, v, None, mask)
        causal = any(isinstance(leaf, Causal) for leaf in leaves(self.group.pattern))
        return self._sum(q, k, v, mask, math.prod(self.layout.extents(grid)[1:]) if causal else None, count)

    def _sum(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, chunk: int | None = None, words: int = 0
    ) -> Tensor:
        """Linear attention of [S, heads, n, D] to [S, heads, m, D], of which the first `words` are seen by all."""
        phi: Any = self.features
        k, v = self._with_sink(k, self.sink("k"), None), self._with_sink(v, self.sink("v"), None)
        prefix = self.sink.count + words
        return linear_attention(phi(q, True), phi(k, False), v, key_mask=mask, chunk=chunk, prefix=prefix)

    def _extended(self, support: Support, words: int) -> Support:
        """The support with the prompt's places, and those of the sink, before the keys; kept for the next step."""
        known = support.memo.get(HeadsWithText)
        if known is None or known[0] != words:
            grown = support.extended(0, words)
            known = support.memo[HeadsWithText] = (
                words,
                grown.extended(0, self.sink.count) if self.sink.count else grown,
            )
        return known[1]

    def _exactly(self, x: Tensor, name: str) -> Tensor:
        """As exact as the mixer takes it."""
        return x if self.approximation is None else self.approximation(x, name)
