"""VideoTransformer: noisy latents, a time and a prompt in, the network's prediction out."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from stgen.attention import plan as plan_grammar
from stgen.attention import reuse
from stgen.attention.spec import PLAIN_LAYOUTS, AttentionMixer
from stgen.blocks import Block, modulate
from stgen.mixers.spec import KINDS, TCN, Recurrent, TokenMixer
from stgen.ops.cost import Work, linear_flops
from stgen.tokens import Grid, grid_of, patchify, rope_tables, sincos_positions, unpatchify


@dataclass
class VideoTransformerOutput(BaseOutput):
    sample: Tensor
    """The network's prediction, of the latents' shape [B, C, T, H, W]."""


class VideoTransformer(ModelMixin, ConfigMixin):
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
        mlp_ratio, mlp_placement: hidden width of the MLP and where it stands.
        qk_norm: RMS-normalise queries and keys.
        positions: `rope`, `sincos`, `learned` or `none`.
        text_width: channels of the prompt's embeddings.
        conditioning: `adaln` (prompt pooled into the modulation), `cross` or `both`.

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
    ):
        super().__init__()
        self.patch_size = tuple(patch_size)
        self.gradient_checkpointing = False
        patch_numbers = in_channels * patch_size[0] * patch_size[1] * patch_size[2]

        self.patch_embed = nn.Linear(patch_numbers, width)
        self.time_features = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(256, width)
        self.text_embed = nn.Sequential(nn.Linear(text_width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 6 * width)
        layers = plan_grammar.parse(plan, depth)
        keys = {name: spec_of(name, mixers or {}) for name in plan_grammar.names(layers)}
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
                registers=registers,
            )
            for terms in reuse.place(layers, keys, heads)
        )
        self.final_modulation = nn.Linear(width, 2 * width)
        self.final_proj = nn.Linear(width, patch_numbers)
        if positions == "learned":
            self.position_table = nn.Parameter(sincos_positions(Grid(*grid), width))
        if registers:
            self.register_table = nn.Parameter(0.02 * torch.randn(registers, width))
        # Only the modulations start at zero: with gates at 0 each layer is the identity, and the next step moves all.
        for projection in (self.modulation, self.final_modulation):
            nn.init.zeros_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> VideoTransformerOutput | tuple[Tensor]:
        """Predict from noisy latents.

        Args:
            hidden_states: latents [B, C, T, H, W].
            timestep: a single number, [B], or [B, T] with one for every latent frame (those of a token alike); 0 (data) to
                1000 (noise).
            encoder_hidden_states: the prompt's embeddings [B, L, text_width].
            encoder_attention_mask: [B, L], true for real tokens; None takes all.
        """
        grid = grid_of(tuple(hidden_states.shape[2:]), self.patch_size)
        x = self.patch_embed(patchify(hidden_states, self.patch_size))  # [B, N, C]
        x = x + self._positions(grid, x) if self.config.positions in ("sincos", "learned") else x
        rope = self._rope(grid, x.device) if self.config.positions == "rope" else None
        if self.config.registers:
            x = torch.cat([self.register_table.to(x.dtype).expand(len(x), -1, -1), x], dim=1)  # [B, registers + N, C]

        mask = None if encoder_attention_mask is None else encoder_attention_mask.bool()
        text = self.text_embed(encoder_hidden_states)  # [B, L, C]
        condition = nn.functional.silu(self._condition(self._times(timestep, grid, text), text, mask, x.dtype))
        shared = self.modulation(condition).unflatten(-1, (6, -1))  # [B or B * frames, 6, C]

        recompute: Any = self._gradient_checkpointing_func  # set by enable_gradient_checkpointing
        carry: reuse.Carry = {}
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x, carry = recompute(block, x, grid, rope, shared, text, mask, carry)
            else:
                x, carry = block(x, grid, rope, shared, text, mask, carry)
        x = x[:, self.config.registers :]

        shift, scale = self.final_modulation(condition).unsqueeze(1).chunk(2, dim=-1)  # [B or B * frames, 1, C]
        x = self.final_proj(modulate(x, shift, scale))
        sample = unpatchify(x, grid, self.patch_size)  # [B, C, T, H, W]
        return VideoTransformerOutput(sample=sample) if return_dict else (sample,)

    def _times(self, timestep: Tensor | float, grid: Grid, text: Tensor) -> Tensor:
        """The time of each clip [B], or of each of its token frames [B, frames]."""
        timestep = torch.as_tensor(timestep, device=text.device)
        if timestep.ndim < 2:
            return timestep.expand(text.shape[0])
        if self.config.registers:
            raise ValueError("timestep: registers have no frame, so a time for every frame needs registers: 0")
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

    def _positions(self, grid: Grid, x: Tensor) -> Tensor:
        if self.config.positions == "sincos":
            return sincos_positions(grid, x.shape[-1], x.device).to(x.dtype)
        if grid != Grid(*self.config.grid):
            raise ValueError(
                f"learned positions hold for the grid {Grid(*self.config.grid)} of training, not for {grid}; "
                "sample at the training size, or train with tokens.positions=rope"
            )
        return self.position_table

    def _rope(self, grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
        cos, sin = rope_tables(grid, self.config.width // self.config.heads, device)
        unturned = (self.config.registers, cos.shape[1])  # registers stand nowhere
        return torch.cat([cos.new_ones(unturned), cos]), torch.cat([sin.new_zeros(unturned), sin])

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
        """What parts of the model tell of their last forward pass, by `attention/{layer}/{name}`; the largest of a layer."""
        found: dict[str, float] = {}
        for i, block in enumerate(self.blocks):
            for module in block.modules():
                told: Any = getattr(module, "measured", {})
                for name, value in told.items() if module is not self else ():
                    key = f"attention/{i}/{name}"
                    found[key] = max(found.get(key, -float("inf")), float(value))
        return found

    def work(self, grid: Grid, text_tokens: int) -> Work:
        """Operations of a forward pass over one clip."""
        width, patch = self.config.width, self.patch_embed.in_features
        vectors = linear_flops(1, width, 6 * width) + linear_flops(1, width, 2 * width) + linear_flops(1, 256, width)
        text = linear_flops(text_tokens, self.config.text_width, width) + linear_flops(text_tokens, width, width)
        ends = 2 * linear_flops(grid.tokens, patch, width)
        rest = vectors + text + ends
        return sum((b.work(grid, text_tokens) for b in self.blocks if isinstance(b, Block)), Work(rest, rest))


def spec_of(name: str, mixers: dict[str, dict[str, Any]]) -> AttentionMixer | TokenMixer:
    """The mixer that a plan's name stands for: as written, else the layout or the kind of that name."""
    keys = mixers.get(name, {})
    kind = keys.get("kind", name if name not in mixers else "attention")
    if kind in KINDS:
        return (TCN if kind == "tcn" else Recurrent).model_validate({"kind": kind, **keys})
    layout = {"layout": name} if name in PLAIN_LAYOUTS else {}
    return AttentionMixer.model_validate({**layout, **keys})
