"""Small randomly initialised models of the five classes of diffusers that stgen.adapt serves, and calls of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

from stgen.tokens import Grid


@dataclass(frozen=True)
class Foreign:
    """A class of diffusers: how to make a small model, how to call it, and where its video tokens stand."""

    name: str
    make: Callable[[], Any]
    call: Callable[..., dict[str, Any]]  # from a generator and a dtype to the keyword arguments of a call
    grid: Grid
    text: int = 0  # tokens of the prompt in the sequence
    text_first: bool = False

    def model(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        model = self.make()
        for name, parameter in model.named_parameters():  # gates and heads may start at zero
            if parameter.ndim >= 2 or "table" in name:
                torch.nn.init.normal_(parameter, std=0.15)
        return model.to(dtype).eval()

    def inputs(self, dtype: torch.dtype = torch.float32, seed: int = 1) -> dict[str, Any]:
        return {**self.call(torch.Generator().manual_seed(seed), dtype), "return_dict": False}


def _rand(*shape: int):
    return lambda g, dtype: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def _wan() -> Any:
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip


def _wan_call(g, dtype):
    return {
        "hidden_states": _rand(2, 4, 3, 6, 10)(g, dtype),
        "timestep": torch.tensor([300, 700]),
        "encoder_hidden_states": _rand(2, 5, 8)(g, dtype),
    }


def _ltx() -> Any:
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24,
        num_layers=2, caption_channels=8,
    )  # fmt: skip


def _ltx_call(g, dtype):
    return {
        "hidden_states": _rand(2, 3 * 3 * 5, 4)(g, dtype),
        "encoder_hidden_states": _rand(2, 5, 8)(g, dtype),
        "timestep": torch.tensor([300, 700]),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        "num_frames": 3, "height": 3, "width": 5,
    }  # fmt: skip


def _cogvideox() -> Any:
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=8, num_layers=2, sample_width=10, sample_height=6, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=5, use_rotary_positional_embeddings=True,
    )  # fmt: skip


def _cogvideox_call(g, dtype):
    angles = _rand(3 * 3 * 5, 16)(g, torch.float32)
    return {
        "hidden_states": _rand(2, 3, 4, 6, 10)(g, dtype),
        "encoder_hidden_states": _rand(2, 5, 8)(g, dtype),
        "timestep": torch.tensor([300, 700]),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def _hunyuan() -> Any:
    return diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, mlp_ratio=2.0, patch_size=2, guidance_embeds=False, text_embed_dim=8,
        pooled_projection_dim=6, rope_axes_dim=(4, 4, 4),
    )  # fmt: skip


def _hunyuan_call(g, dtype):
    return {
        "hidden_states": _rand(3, 4, 3, 6, 10)(g, dtype),
        "timestep": torch.tensor([300, 700, 100]),
        "encoder_hidden_states": _rand(3, 5, 8)(g, dtype),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        "pooled_projections": _rand(3, 6)(g, dtype),
    }


def _latte() -> Any:
    return diffusers.LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=2, patch_size=2,
        cross_attention_dim=24, sample_size=8, caption_channels=8, norm_type="ada_norm_single", video_length=5,
        activation_fn="gelu-approximate", attention_bias=True, norm_elementwise_affine=False,
    )  # fmt: skip


def _latte_call(g, dtype):
    return {
        "hidden_states": _rand(2, 4, 5, 8, 8)(g, dtype),
        "timestep": torch.tensor([300, 700]),
        "encoder_hidden_states": _rand(2, 5, 8)(g, dtype),
    }


FOREIGN = [
    Foreign("wan", _wan, _wan_call, Grid(3, 3, 5)),
    Foreign("ltx", _ltx, _ltx_call, Grid(3, 3, 5)),
    Foreign("cogvideox", _cogvideox, _cogvideox_call, Grid(3, 3, 5), text=5, text_first=True),
    Foreign("hunyuan", _hunyuan, _hunyuan_call, Grid(3, 3, 5), text=5),
    Foreign("latte", _latte, _latte_call, Grid(5, 4, 4)),
]
