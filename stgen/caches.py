"""Reuse over denoising steps: what the network computed at one noise level serves at the next ones too.

first_block   skips the layers behind the first one while that one's update hardly changes (ParaAttention)
mag           skips all layers while their summed update, known in size beforehand, hardly changes (arXiv:2506.09045)
taylorseer    computes all layers at every few steps and extrapolates between them (arXiv:2503.06923)
pab           keeps what attention put out for a few steps, cross-attention longest (arXiv:2408.12588)
support       keeps which keys are attended, for patterns chosen from the data

The first four are diffusers' hooks on the modules of this house; the last is a hook of the same kind.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks import FirstBlockCacheConfig, HookRegistry, MagCacheConfig, ModelHook, TaylorSeerCacheConfig
from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastHook
from torch import Tensor, nn

from stgen.attention.attend import Attention
from stgen.attention.patterns import is_fixed
from stgen.attention.selection import Selection

OPTIONS: dict[str, dict[str, float]] = {  # of each kind, with what they are unless given
    "first_block": {"threshold": 0.05},
    "mag": {"threshold": 0.06, "max_skip": 3, "start": 0.2},
    "taylorseer": {"every": 3, "start": 3, "order": 1},
    "pab": {"spatial": 2, "temporal": 3, "cross": 5, "from": 100, "to": 800},
    "support": {"every": 4},
}
COUNTS = ("every", "order", "spatial", "temporal", "cross", "max_skip")  # whole numbers of at least 1
HOOK = "stgen_cache"


class CacheError(ValueError):
    """A cache that cannot be had; one sentence that says what to do."""


@dataclass(frozen=True)
class Cache:
    """A kind of cache with its options; `ratios` are those of `calibrated`, for mag."""

    kind: str
    options: dict[str, float] = field(default_factory=dict)
    ratios: tuple[float, ...] | None = None

    def __post_init__(self):
        if self.kind not in OPTIONS:
            raise CacheError(f"cache {self.kind!r} is none of {', '.join(OPTIONS)}")
        known = OPTIONS[self.kind]
        for name, value in self.options.items():
            if name not in known:
                raise CacheError(f"cache {self.kind}: no option {name!r}; there are {', '.join(known)}")
            if value < 0 or (name in COUNTS and (value < 1 or value % 1)):
                what = "a whole number from 1 on" if name in COUNTS else "a number from 0 on"
                raise CacheError(f"cache {self.kind}: {name} should be {what}, got {value:g}")

    @staticmethod
    def parse(words: Sequence[str]) -> "Cache":
        """A kind, then options as name=value. Raises CacheError."""
        options = {}
        for word in words[1:]:
            name, _, value = word.partition("=")
            try:
                options[name] = float(value)
            except ValueError:
                raise CacheError(f"cache {words[0]}: {word!r} is no name=number") from None
        return Cache(words[0], options)

    def __getitem__(self, name: str) -> float:
        return self.options.get(name, OPTIONS[self.kind][name])


@dataclass
class Tally:
    """Calls of mixers and MLPs (under `support`: selections of keys) that were made, of those asked for."""

    made: int = 0
    asked: int = 0

    def __str__(self) -> str:
        return f"{self.made} of {self.asked} calls made ({self.made / max(self.asked, 1):.0%})"


@contextlib.contextmanager
def caching(pipeline: Any, cache: Cache | None, steps: int, tally: Tally) -> Iterator[None]:
    """Sample with a cache: calls of `pipeline` within, of `steps` evaluations each; what they save goes to `tally`.

    Raises CacheError where the model of the pipeline has no place for it.
    """
    if cache is None:
        yield
        return
    transformer = pipeline.transformer
    with _hooked(pipeline, cache, steps, tally):
        if cache.kind == "support":
            yield
        else:
            with _counted(transformer, tally):
                yield


@contextlib.contextmanager
def _hooked(pipeline: Any, cache: Cache, steps: int, tally: Tally) -> Iterator[None]:
    transformer = pipeline.transformer
    if cache.kind == "support":
        hooks = [(module, _KeptSupport(int(cache["every"]), tally)) for module in _choosing(transformer)]
    elif cache.kind == "pab":
        _check_layers_are_apart(transformer, cache.kind)
        span = (cache["from"], cache["to"])
        hooks = [
            (module, PyramidAttentionBroadcastHook(span, int(cache[what]), lambda: pipeline.current_timestep))  # type: ignore
            for module, what in _mixing(transformer)
        ]
    else:
        _check_layers_are_apart(transformer, cache.kind)
        transformer.enable_cache(_config(cache, steps))
        try:
            yield
        finally:
            transformer.disable_cache()
        return
    for module, hook in hooks:
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, HOOK)
    try:
        yield
    finally:
        for module, _ in hooks:
            HookRegistry.check_if_exists_or_initialize(module).remove_hook(HOOK, recurse=False)


def _config(cache: Cache, steps: int) -> Any:
    """The section of diffusers that says the same."""
    if cache.kind == "first_block":
        return FirstBlockCacheConfig(threshold=cache["threshold"])
    if cache.kind == "taylorseer":
        return TaylorSeerCacheConfig(
            cache_interval=int(cache["every"]),
            disable_cache_before_step=int(cache["start"]),
            max_order=int(cache["order"]),
            taylor_factors_dtype=torch.float32,
        )
    if cache.ratios is None:
        raise CacheError(
            "cache mag: it goes by how a model's updates grow from step to step; measure them by calibrated()"
        )
    return MagCacheConfig(
        threshold=cache["threshold"],
        max_skip_steps=int(cache["max_skip"]),
        retention_ratio=cache["start"],
        num_inference_steps=steps,
        mag_ratios=list(cache.ratios),
    )


def _check_layers_are_apart(transformer: Any, kind: str) -> None:
    """Raise CacheError for models whose layers leave more for later ones than tokens."""
    if len(transformer.blocks) < 2:
        raise CacheError(f"cache {kind}: a model of one layer has none to skip")
    if getattr(transformer, "pruner", None) is not None:
        raise CacheError(
            f"cache {kind}: this model's layers prune tokens or heads for later ones and cannot be skipped"
        )
    uses: list[Any] = [getattr(module, "use", None) for module in transformer.modules()]
    lending = [use for use in uses if use is not None and use.lends]
    if lending:
        raise CacheError(
            f"cache {kind}: layers take {sorted(lending[0].lends)[0]} from layer {lending[0].layer} of this model, so "
            "none can be skipped; cache support serves patterns chosen from the data"
        )


def _mixing(transformer: Any) -> list[tuple[nn.Module, str]]:
    """Every group of mixers and every attention to the prompt, with the option of pab that it goes by."""
    found = []
    for block in transformer.blocks:
        for branch in block.branches:
            layouts = {mixer.use.keys.layout for mixer in branch.mixers} if isinstance(branch, Attention) else {None}
            found.append((branch, "temporal" if layouts == {"temporal"} else "spatial"))
        if block.prompting is not None:
            found.append((block.prompting.cross_attn, "cross"))
    return found


def _choosing(transformer: Any) -> list[nn.Module]:
    found: list[nn.Module] = [m for m in transformer.modules() if isinstance(m, Selection) and not is_fixed(m.pattern)]
    if not found:
        raise CacheError("cache support: no pattern of this model is chosen from the data, so there is nothing to keep")
    return found


class _KeptSupport(ModelHook):
    """Keeps the support of a selection for so many calls."""

    _is_stateful = True

    def __init__(self, every: int, tally: Tally):
        super().__init__()
        self.every, self.tally, self.calls = every, tally, 0
        self.kept: Any = None

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        choose: Any = self.fn_ref.original_forward
        if self.calls % self.every == 0:
            self.kept = choose(*args, **kwargs)
            self.tally.made += 1
        self.calls += 1
        self.tally.asked += 1
        return self.kept

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.calls, self.kept = 0, None
        return module


@contextlib.contextmanager
def _counted(transformer: Any, tally: Tally) -> Iterator[None]:
    """Count what mixers and MLPs compute, and what a model without a cache would."""
    inner = [branch.to_out if isinstance(branch, Attention) else branch.net
             for block in transformer.blocks for branch in block.branches]  # fmt: skip
    inner += [block.mlp for block in transformer.blocks]
    inner += [block.prompting.cross_attn.to_out for block in transformer.blocks if block.prompting is not None]

    def made(*_: Any) -> None:
        tally.made += 1

    def asked(*_: Any) -> None:
        tally.asked += len(inner)

    handles = [module.register_forward_hook(made) for module in inner] + [transformer.register_forward_hook(asked)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def calibrated(transformer: Any) -> Iterator[list[float]]:
    """Measure for mag: by what ratio the sum of all layers' updates grows from one evaluation to the next.

    Sample within; the list holds a ratio for each evaluation afterwards, 1 for the first (arXiv:2506.09045, eq. 5).
    Raises CacheError for a model that mag does not suit.
    """
    _check_layers_are_apart(transformer, "mag")
    ratios: list[float] = []
    seen: dict[str, Tensor] = {}

    def enters(module: nn.Module, args: tuple) -> None:
        seen["in"] = args[0]

    def leaves(module: nn.Module, args: tuple, out: Any) -> None:
        size = ((out[0] if isinstance(out, tuple) else out) - seen["in"]).float().norm(dim=-1)  # [B, N]
        ratios.append(float((size / seen["size"].clamp(min=1e-8)).mean()) if "size" in seen else 1.0)
        seen["size"] = size

    blocks: Any = transformer.blocks
    handles = [blocks[0].register_forward_pre_hook(enters), blocks[-1].register_forward_hook(leaves)]
    try:
        yield ratios
    finally:
        for handle in handles:
            handle.remove()
