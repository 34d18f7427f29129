"""What diffusers' tools ask of a model beside saving and loading: processors, caches over denoising steps, adapters."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers.hooks import SeaCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from safetensors import safe_open
from torch import Tensor

from stgen.attention.packed import Packed
from stgen.blocks import Block

APART = {"to_q", "to_k", "to_v"}  # layers that stand only where projections are opened
ADAPTER_FILE = "pytorch_lora_weights.safetensors"


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
        """Load an adapter that `save_lora_adapter` wrote, or its state dict; safetensors alone are read."""
        source = pretrained_model_name_or_path_or_dict
        parts = (set(key.split(".")) for key in _keys(source, options.get("weight_name")))
        self._open_for(set().union(*parts))
        named: Any = prefix  # None, for names that begin with nothing, is meant though not typed
        super().load_lora_adapter(source, named, hotswap, **{**options, "use_safetensors": True})

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


def _keys(source: Any, weight_name: str | None) -> list[str]:
    """The names of an adapter's weights; none for one that is not here."""
    if isinstance(source, dict):
        return list(source)
    file = Path(source)
    file = file / (weight_name or ADAPTER_FILE) if file.is_dir() else file
    if not file.is_file():
        return []
    with safe_open(file, framework="pt") as weights:
        return list(weights.keys())
