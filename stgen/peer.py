"""What diffusers' tools ask of a model beside saving and loading: processors, caches over denoising steps, adapters."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers.hooks import SeaCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor

from stgen.attention.packed import Packed
from stgen.blocks import Block
from stgen.lora_file import APART, check_fit, config_of, read


class Peer(AttentionMixin, CacheMixin, PeftAdapterMixin):
    """diffusers' mixins, told how this model is made: to be named before ModelMixin, whose saving it guards."""

    blocks: Any
    modules: Any

    def enable_cache(self, config: Any) -> None:
        """Reuse over denoising steps by one of diffusers' sections, told what it cannot find by itself.

        TaylorSeer goes by names of modules: it extrapolates the last layer and passes over the others. SeaCache
        (arXiv:2602.18993) looks at the spectrum of the latents.
        """
        TransformerBlockRegistry.register(Block, TransformerBlockMetadata(return_hidden_states_index=0))  # type: ignore
        if isinstance(config, TaylorSeerCacheConfig) and not (config.cache_identifiers or config.use_lite_mode):
            last = len(self.blocks) - 1
            skipped = [rf"blocks\.{i}" for i in range(last)]
            config = replace(config, cache_identifiers=[rf"blocks\.{last}"], skip_predict_identifiers=skipped)
        if isinstance(config, SeaCacheConfig) and config.raw_vision_callback is None:
            config = replace(config, raw_vision_callback=_latents)
        super().enable_cache(config)

    def add_adapter(self, adapter_config: Any, adapter_name: str = "default") -> None:
        """Add an adapter of peft; one for `to_q`, `to_k` or `to_v` opens the packed projections."""
        targets = adapter_config.target_modules
        self._open_for({name.rsplit(".", 1)[-1] for name in targets} if isinstance(targets, list | set | tuple) else ())
        super().add_adapter(adapter_config, adapter_name)

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        prefix: str | None = "transformer",
        hotswap: bool = False,
        **options: Any,
    ) -> None:
        """Load an adapter that `save_lora_adapter` wrote, from a file, a folder or a hub id, or its state dict.

        Raises LoraError for a file that holds none, and for one that does not fit this model (stgen/lora_file.py).
        """
        weights = pretrained_model_name_or_path_or_dict
        if not isinstance(weights, dict):
            where, start = str(weights), f"{prefix}." if prefix else ""
            name, subfolder = (options.pop(key, None) for key in ("weight_name", "subfolder"))
            weights, told = read(where, name, subfolder, options)
            config = config_of(weights, told, start, where)
            check_fit(weights, self, start, where)
            options["metadata"] = {start + key: value for key, value in config.items()}
        self._open_for({part for key in weights for part in key.split(".")})
        named: Any = prefix  # None, for names that begin with nothing, is meant though not typed
        super().load_lora_adapter(weights, named, hotswap, **options)

    def save_lora_adapter(self, save_directory: Any, adapter_name: str = "default", **options: Any) -> None:
        """Save an adapter as safetensors, whatever form is asked for."""
        super().save_lora_adapter(save_directory, adapter_name, **{**options, "safe_serialization": True})

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        **options: Any,
    ) -> None:
        """Save config and weights as safetensors, whatever form is asked for; options are those of diffusers.

        Raises ValueError while projections are open: models are loaded packed.
        """
        if any(isinstance(module, Packed) and not module.fused_projections for module in self.modules()):
            raise ValueError(
                "the projections of this model are open; save_lora_adapter() saves an adapter, and fuse_qkv_projections(), "
                "after unload_lora() where there is one, makes a model that can be saved"
            )
        super().save_pretrained(  # type: ignore[misc]
            save_directory, safe_serialization=True, variant=variant, max_shard_size=max_shard_size, **options
        )

    def _open_for(self, names: Any) -> None:
        if APART & set(names):
            self.unfuse_qkv_projections()


def _latents(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The latents [C, T, H, W] of each clip that a forward pass is given."""
    return list(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
