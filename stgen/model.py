"""VideoTransformer: noisy latents, a time and a prompt in, the network's prediction out."""

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from stgen.attention import plan as plan_grammar
from stgen.attention import reuse
from stgen.attention.cascade import Pruner, put_back
from stgen.attention.memory import Past, first_place
from stgen.attention.pruning import Pruning, check_pruning
from stgen.attention.spec import PLAIN_LAYOUTS, AttentionMixer, Infini, NoMemory, Ring
from stgen.attention.streaming import refusal
from stgen.blocks import Block, modulate
from stgen.mixers.spec import KINDS, TCN, Recurrent, TokenMixer
from stgen.norm_spec import check_sites, norm_of
from stgen.norms import build, check_folds, fold
from stgen.ops.cost import Work, linear_flops
from stgen.peer import Peer
from stgen.tokens import Grid, grid_of, patchify, rope_tables, sincos_positions, unpatchify


@dataclass
class VideoTransformerOutput(BaseOutput):
    sample: Tensor
    """The network's prediction, of the latents' shape [B, C, T, H, W]."""
    past: Any = None
    """Where a past was given: the past of the frames after these (`stgen.attention.memory.Past`)."""


class VideoTransformer(Peer, ModelMixin, ConfigMixin):
    """A diffusion transformer over video latents whose attention is arranged by a plan.

    Args:
        in_channels: channels C of the latents.
        grid: token grid (frames, rows, columns) of training; learned positions hold for this grid alone.
        patch_size: latent frames, rows and columns of a token.
        width, depth, heads: channels of a token, layers, attention heads.
        plan: the arrangement of mixers over depth (`stgen.attention.plan`).
        mixers: for each name of the plan the keys of `stgen.attention.spec.AttentionMixer` or, by `kind`, of a mixer of
            `stgen.mixers.spec`; unions and intersections of patterns as {kind: any, any: [...]} and {kind: all, all: [...]}.
        registers: global tokens that every sequence of every layer sees; they are learned, and dropped at the head.
        modulated: by adaLN; else time, and the pooled prompt, are a token like a register in front of the others.
        norm: keys of a section of `stgen.norm_spec`, of the norm before cross-attention and, without modulation, of all
            norms; None is a layer norm.
        mlp_ratio, mlp_placement: hidden width of the MLP and where it stands.
        qk_norm: RMS-normalise queries and keys.
        positions: `rope`, `sincos`, `learned` or `none`.
        text_width: channels of the prompt's embeddings.
        conditioning: `adaln` (prompt pooled into the modulation), `cross` or `both`.
        pruning: keys of `stgen.attention.pruning.Pruning`: what later layers leave out.

    Raises ValueError for a plan that cannot be read and for latents that the patches do not divide.
    """

    config: Any  # diffusers declares a plain dict; it also reads by attribute
    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _repeated_blocks = ["Block"]
    _skip_layerwise_casting_patterns = ["embed", "norm", "modulation"]
    no_decay = ("position_table", "register_table")

    @register_to_config
    def __init__(
        self,
        in_channels: int,
        grid: tuple[int, int, int],
        patch_size: tuple[int, int, int] = (1, 1, 1),
        width: int = 128,
        depth: int = 6,
        heads: int = 2,
        plan: str = "spatial temporal",
        mixers: dict[str, dict[str, Any]] | None = None,
        mlp_ratio: float = 4.0,
        mlp_placement: str = "sequential",
        qk_norm: bool = True,
        positions: str = "rope",
        text_width: int = 128,
        conditioning: str = "adaln",
        registers: int = 0,
        modulated: bool = True,
        norm: dict[str, Any] | None = None,
        pruning: dict[str, Any] | None = None,
    ):
        super().__init__()
        norm_keys = norm_of(norm)
        check_sites(norm_keys, modulated, conditioning)
        self.front = registers + (not modulated)  # tokens before those of the clip
        self.patch_size = tuple(patch_size)
        self.gradient_checkpointing = False
        self.recomputed = 1.0  # the share of layers that gradient checkpointing computes again
        patch_numbers = in_channels * patch_size[0] * patch_size[1] * patch_size[2]

        self.patch_embed = nn.Linear(patch_numbers, width)
        self.time_features = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(256, width)
        self.text_embed = nn.Sequential(nn.Linear(text_width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 6 * width) if modulated else None
        layers = plan_grammar.parse(plan, depth)
        keys = {name: spec_of(name, mixers or {}) for name in plan_grammar.names(layers)}
        uses = reuse.place(layers, keys, heads)
        self.blocks = nn.ModuleList(
            Block(
                width,
                heads,
                terms,
                Grid(*grid),
                mlp_ratio=mlp_ratio,
                parallel_mlp=mlp_placement == "parallel",
                cross=conditioning in ("cross", "both"),
                qk_norm=qk_norm,
                registers=self.front,
                modulated=modulated,
                norm=norm_keys,
            )
            for terms in uses
        )
        leaving_out = Pruning.model_validate(pruning or {})
        check_pruning(leaving_out, uses, heads, self.front)
        self.pruner = None if leaving_out.is_exact else Pruner(leaving_out, depth, heads, Grid(*grid).tokens)
        self.final_modulation = nn.Linear(width, 2 * width) if modulated else None
        self.final_norm: Any = None if modulated else build(norm_keys, width)
        self.final_proj = nn.Linear(width, patch_numbers)
        if positions == "learned":
            self.position_table = nn.Parameter(sincos_positions(Grid(*grid), width).to(torch.get_default_dtype()))
        if registers:
            self.register_table = nn.Parameter(0.02 * torch.randn(registers, width))
        # Only the modulations start at zero: with gates at 0 each layer is the identity, and the next step moves all.
        for projection in filter(None, (self.modulation, self.final_modulation)):
            nn.init.zeros_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
        past: Past | None = None,
    ) -> VideoTransformerOutput | tuple[Any, ...]:
        """Predict from noisy latents.

        Args:
            hidden_states: latents [B, C, T, H, W].
            timestep: a single number, [B], or [B, T] with one for every latent frame (those of a token alike); 0 (data) to
                1000 (noise).
            encoder_hidden_states: the prompt's embeddings [B, L, text_width].
            encoder_attention_mask: [B, L], true for real tokens; None takes all.
            past: what is remembered of the frames that came before (`new_past`), in sampling, without gradients. The
                past after these frames is returned too: to make a chunk, hand in the same past in every pass over it, and
                for the next chunk what comes back when it is clean, at time 0.
        """
        grid = grid_of(tuple(hidden_states.shape[2:]), self.patch_size)
        if past is not None:
            self._check_past(past, len(hidden_states), grid)
        x = self.patch_embed(patchify(hidden_states, self.patch_size))  # [B, N, C]
        x = x + self._positions(grid, x, past) if self.config.positions in ("sincos", "learned") else x
        rope = self._rope(grid, x.device, past) if self.config.positions == "rope" else None
        mask = None if encoder_attention_mask is None else encoder_attention_mask.bool()
        text = self.text_embed(encoder_hidden_states)  # [B, L, C]
        condition = self._condition(self._times(timestep, grid, text), text, mask, x.dtype)  # [B or B * frames, C]
        x = self._with_front(x, condition)  # [B, front + N, C]
        modulating = nn.functional.silu(condition)
        shared = None if self.modulation is None else self.modulation(modulating).unflatten(-1, (6, -1))

        recompute: Any = self._gradient_checkpointing_func  # set by enable_gradient_checkpointing
        memories = {} if past is None else past.memories
        carry: reuse.Carry = {number: reuse.Kept(memory=memory) for number, memory in memories.items()}
        for i, block in enumerate(self.blocks):
            given = (grid, rope, shared)
            if self.pruner is not None:
                x, carry, *given = self.pruner(i, x, carry, *given)
            if torch.is_grad_enabled() and self.gradient_checkpointing and self.recomputes(i):
                out = recompute(block, x, *given, text, mask, carry)
            else:
                out = block(x, *given, text, mask, carry)
            x, carry = out if isinstance(out, tuple) else (out, carry)
        x = put_back(x, carry)[:, self.front :]

        if self.final_modulation is None:
            x = self.final_norm(x)
        else:
            shift, scale = self.final_modulation(modulating).unsqueeze(1).chunk(2, dim=-1)  # [B or B * frames, 1, C]
            x = modulate(x, shift, scale)
        x = self.final_proj(x)
        sample = unpatchify(x, grid, self.patch_size)  # [B, C, T, H, W]
        if past is None:
            return VideoTransformerOutput(sample=sample) if return_dict else (sample,)
        after = replace(past, frames=past.frames + grid.t, memories={n: carry[n].memory for n in memories})
        return VideoTransformerOutput(sample=sample, past=after) if return_dict else (sample, after)

    def recomputes(self, layer: int) -> bool:
        """Whether gradient checkpointing computes this layer again: those of its share lie evenly over depth."""
        return int((layer + 1) * self.recomputed) > int(layer * self.recomputed)

    def _times(self, timestep: Tensor | float, grid: Grid, text: Tensor) -> Tensor:
        """The time of each clip [B], or of each of its token frames [B, frames]."""
        timestep = torch.as_tensor(timestep, device=text.device)
        if timestep.ndim < 2:
            return timestep.expand(text.shape[0])
        if self.front:
            raise ValueError(
                "timestep: registers and the token of time have no frame, so a time for every frame needs registers: 0 and "
                "modulation: adaln"
            )
        patch = self.patch_size[0]
        if timestep.shape != (text.shape[0], grid.t * patch):
            raise ValueError(
                f"timestep: {list(timestep.shape)} given for {text.shape[0]} clips of {grid.t * patch} latent frames"
            )
        return timestep[:, ::patch]

    def _condition(self, times: Tensor, text: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Time, and under adaLN the prompt, as one vector a clip [B, C], or a frame [B * frames, C]."""
        condition = self.time_embed(self.time_features(times.flatten()).to(dtype))
        if self.config.conditioning == "cross":
            return condition
        # Each word is embedded on its own and the results are added, so that words compose: a combination never seen
        # is a sum of parts that were. Dividing by the root of their number keeps long prompts in scale.
        mask = text.new_ones(text.shape[:2]) if mask is None else mask.to(text.dtype)
        weights = mask.unsqueeze(-1)  # [B, L, 1]
        pooled = (text * weights).sum(1) * weights.sum(1).clamp(min=1).rsqrt()  # [B, C]
        return condition + (pooled if times.ndim == 1 else pooled.repeat_interleave(times.shape[1], 0))

    def _with_front(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, N, C] behind the registers and, without modulation, the token of time and text: [B, front + N, C]."""
        front = [condition.to(x.dtype).unsqueeze(1)] if self.modulation is None else []
        front += [self.register_table.to(x.dtype).expand(len(x), -1, -1)] if self.config.registers else []
        return torch.cat([*front, x], dim=1) if front else x

    def _positions(self, grid: Grid, x: Tensor, past: Past | None) -> Tensor:
        if past is not None:
            whole, first = Grid(past.frames + grid.t, grid.h, grid.w), past.frames * grid.h * grid.w
            if self.config.positions == "sincos":
                return sincos_positions(whole, x.shape[-1], x.device)[first:].to(x.dtype)
            return self.position_table[first : whole.tokens]
        if self.config.positions == "sincos":
            return sincos_positions(grid, x.shape[-1], x.device).to(x.dtype)
        if grid != Grid(*self.config.grid):
            raise ValueError(
                f"learned positions hold for the grid {Grid(*self.config.grid)} of training, not for {grid}; "
                "sample at the training size, or train with tokens.positions=rope"
            )
        return self.position_table

    def _rope(self, grid: Grid, device: torch.device, past: Past | None) -> tuple[Tensor, Tensor]:
        first = 0 if past is None else first_place(past.frames, grid.t, self.config.grid[0])
        tables = rope_tables(Grid(first + grid.t, grid.h, grid.w), self.config.width // self.config.heads, device)
        cos, sin = (table[first * grid.h * grid.w :] for table in tables)
        unturned = (self.front, cos.shape[1])  # registers stand nowhere
        return torch.cat([cos.new_ones(unturned), cos]), torch.cat([sin.new_zeros(unturned), sin])

    # ---------------------------------------------------------------------------------------------------- streaming

    def refusal(self) -> str | None:
        """Why videos cannot be made chunk by chunk, in one sentence that says what to write; None where they can."""
        if self.front:
            return (
                "registers and the token of time stand in every frame at once, so nothing can be streamed; write "
                "model.registers: 0 and model.modulation: adaln"
            )
        if self.pruner is not None:
            return "model.pruning leaves out tokens of a whole clip; leave it out"
        for use in self._uses:
            if not use.has_map:
                past_only = not use.keys.sees_future and use.keys.layout in ("joint", "temporal")
                needs = f"{use.keys.kind} looks at frames to come; write layout: temporal and "
                needs += "causal: true" if use.keys.kind == "tcn" else "bidirectional: false"
                reason = None if past_only or not use.keys.mixes_time else needs
            else:
                reason = None if use.takes == "output" else refusal(use.keys, use.heads)
            if reason is not None:
                return f"model.mixers.{use.name}: {reason}"
        return None

    @property
    def remembers(self) -> bool:
        """Whether a mixer has a memory over time."""
        return any(use.has_map and not isinstance(use.keys.memory, NoMemory) for use in self._uses)

    @property
    def chunk_frames(self) -> int:
        """Latent frames of a chunk where nobody says: whole segments, at most half of a training clip where that goes."""
        memories = [use.keys.memory for use in self._uses if use.has_map]
        unit = math.lcm(*(memory.segment for memory in memories if isinstance(memory, Infini)))
        sinks = max((memory.sinks for memory in memories if isinstance(memory, Ring)), default=0)
        trained = self.config.grid[0]
        most = min(max(1, trained // 2), trained - sinks)
        return self.patch_size[0] * max(unit, most // unit * unit)

    def new_past(
        self,
        batch: int,
        chunk: tuple[int, int, int],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Past:
        """What is remembered of `batch` videos that have not begun, with room for chunks of latents of at most so many frames,
        and of so many rows and columns. Its size does not grow with the videos.

        `dtype` is that of keys and values in rings, `device` where all is kept; None: as the weights. Raises ValueError for
        a model that cannot be streamed, and for a chunk that does not suit it.
        """
        if reason := self.refusal():
            raise ValueError(reason)
        grid, trained = grid_of(chunk, self.patch_size), self.config.grid[0]
        if grid.t > trained:
            raise ValueError(
                f"a chunk of {grid.t} frames of tokens is longer than a training clip of {trained}; take a shorter one"
            )
        like, memories = torch.empty(0, dtype=dtype or self.dtype, device=device or self.device), {}
        for block in self.blocks:
            assert isinstance(block, Block)
            for branch in block.branches:
                memories |= branch.new_memories(batch, grid, like)
        return Past(0, grid, batch, memories)

    def _check_past(self, past: Past, batch: int, grid: Grid) -> None:
        if torch.is_grad_enabled():
            raise ValueError("past is for sampling: call the model under torch.no_grad()")
        if self.is_cache_enabled:
            raise ValueError("past: a cache of diffusers would skip layers that must remember; disable_cache() first")
        past.check(batch, grid)
        trained = Grid(*self.config.grid)
        if self.config.positions in ("sincos", "learned") and past.frames + grid.t > trained.t:
            raise ValueError(
                f"{self.config.positions} positions end with the {trained.t} frames of tokens of a training clip; train with "
                "tokens.positions: rope to go on"
            )
        if self.config.positions == "learned" and (grid.h, grid.w) != (trained.h, trained.w):
            raise ValueError(f"learned positions hold for frames of {trained.h}x{trained.w} tokens, not for {grid}")

    @property
    def _uses(self) -> list[reuse.Use]:
        """Every use of a mixer in the plan, in its order."""
        layers = plan_grammar.parse(self.config.plan, self.config.depth)
        keys = {name: spec_of(name, self.config.mixers or {}) for name in plan_grammar.names(layers)}
        placed = reuse.place(layers, keys, self.config.heads)
        return [use for layer in placed for term in layer for branch in term for use in branch]

    # ------------------------------------------------------------------------------------------------------ training

    def folded(self) -> "VideoTransformer":
        """A copy whose norms are folded into the linear layers behind them (`stgen.norms.fold`): in evaluation the same
        outputs within rounding. It is saved and loaded like any other.

        Raises FoldError for layer norms, for prepbn whose gamma is not 0 yet, and for norms that no linear layer reads.
        """
        check_folds(norm_of(self.config.norm))
        model = copy.deepcopy(self)
        for block in model.blocks:
            assert isinstance(block, Block)
            block.fold()
        if model.final_norm is not None:
            model.final_norm = fold(model.final_norm, [model.final_proj])
        model.register_to_config(norm={"kind": "folded"})
        return model

    def at_step(self, step: int) -> None:
        """Tell the parts that change over training how many optimiser steps were made."""
        for module in self.modules():
            told: Any = getattr(module, "at_step", None)
            if told is not None and module is not self:
                told(step)

    def observe(self, loss: float) -> None:
        """Tell the parts that follow the training loss that of the optimiser step that was made."""
        for module in self.modules():
            told: Any = getattr(module, "observe", None)
            if told is not None and module is not self:
                told(loss)

    def measured(self) -> dict[str, float]:
        """What parts of the model tell of their last forward pass, by `attention/{layer}/{name}`.

        Where several mixers of a layer tell of one name, by `attention/{layer}/{mixer}/{name}`; where several runs of a
        mixer's heads do, by `attention/{layer}/{mixer}/heads.{first}-{last}/{name}`. Of what is left alike, the largest.
        What pruning leaves the last layer is told by `pruning/tokens` and `pruning/heads`.
        """
        found: dict[str, float] = {}
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            found |= {f"attention/{i}/{name}": value for name, value in _told(block).items()}
        kept = {} if self.pruner is None else self.pruner.measured
        return found | {f"pruning/{name}": share for name, share in kept.items()}

    def work(self, grid: Grid, text_tokens: int) -> Work:
        """Operations of a forward pass over one clip."""
        width, patch = self.config.width, self.patch_embed.in_features
        vectors = linear_flops(1, 256, width)
        vectors += linear_flops(1, width, 8 * width) if self.modulation is not None else 0
        text = linear_flops(text_tokens, self.config.text_width, width) + linear_flops(text_tokens, width, width)
        ends = 2 * linear_flops(grid.tokens, patch, width)
        rest = vectors + text + ends
        return sum((self.layer_work(i, grid, text_tokens) for i in range(len(self.blocks))), Work(rest, rest))

    def layer_work(self, layer: int, grid: Grid, text_tokens: int) -> Work:
        """Operations of one layer."""
        block: Any = self.blocks[layer]
        if self.pruner is None:
            return block.work(grid, text_tokens)
        return self.pruner.work(layer, block, grid, text_tokens)


def _told(block: Block) -> dict[str, float]:
    """What the parts of a layer tell, by name, and by mixer and heads where more than one of those tells of it."""
    owners: dict[nn.Module, str] = {}
    for mixer in (mixer for branch in block.branches for mixer in getattr(branch, "mixers", ())):
        owners |= dict.fromkeys(mixer.modules(), f"{mixer.use.name}/")
        for run in mixer.runs if len(mixer.runs) > 1 else ():
            shared = [] if run.approximation is None else run.approximation.modules()  # all heads of a mixer have one
            first, last = run.group.first, run.group.first + run.group.count - 1
            owners |= dict.fromkeys(set(run.modules()).difference(shared), f"{mixer.use.name}/heads.{first}-{last}/")
    found: dict[str, dict[str, float]] = {}
    for module in block.modules():
        told: Any = getattr(module, "measured", {})
        for name, value in told.items():
            by_owner, owner = found.setdefault(name, {}), owners.get(module, "")
            by_owner[owner] = max(by_owner.get(owner, -math.inf), float(value))
    return {
        f"{owner if len(by_owner) > 1 else ''}{name}": value
        for name, by_owner in found.items()
        for owner, value in by_owner.items()
    }


def spec_of(name: str, mixers: dict[str, dict[str, Any]]) -> AttentionMixer | TokenMixer:
    """The mixer that a plan's name stands for: as written, else the layout or the kind of that name."""
    keys = mixers.get(name, {})
    kind = keys.get("kind", name if name not in mixers else "attention")
    if kind in KINDS:
        return (TCN if kind == "tcn" else Recurrent).model_validate({"kind": kind, **keys})
    layout = {"layout": name} if name in PLAIN_LAYOUTS else {}
    return AttentionMixer.model_validate({**layout, **keys})
