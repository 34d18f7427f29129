"""LoRA by peft (Hu et al., arXiv:2106.09685): adapters that are trained, saved and loaded apart from the weights.

What a saved adapter is, and may be, stands in stgen/lora_file.py.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LoraBaseMixin
from torch import nn

from stgen.lora_file import ADAPTER_FILE, APART, LoraError, check_fit, config_of, read
from stgen.lora_spec import Lora

PREFIX = "transformer."


def require_peft() -> None:
    """Raise LoraError where peft is missing."""
    if find_spec("peft") is None:
        raise LoraError("LoRA needs the peft library; run: pip install 'stgen[lora]'")


# ------------------------------------------------------------------------------------------------------------ training


def attach(transformer: Any, keys: Lora) -> None:
    """Freeze a transformer and add matrices of `keys.rank` to the layers that `keys.target_modules` names.

    Raises LoraError for a name that no linear layer ends with.
    """
    require_peft()
    from peft import LoraConfig

    ends = {name.rpartition(".")[2] for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    known = {name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    known |= {f".{name}" for name in APART} if "to_qkv" in ends else set()
    for target in keys.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in known):
            raise LoraError(
                f"lora.target_modules: no linear layer's name ends with {target}; there are "
                f"{', '.join(sorted(ends | (APART if 'to_qkv' in ends else set())))}"
            )
    transformer.requires_grad_(False)
    alpha: Any = keys.alpha or keys.rank  # peft divides by the rank, whatever number it is
    config = LoraConfig(r=keys.rank, lora_alpha=alpha, target_modules=list(keys.target_modules))
    transformer.add_adapter(config)


def merge(transformer: Any, scale: float = 1.0) -> None:
    """Add the adapters, times `scale`, into the weights, for good: what is left is a model without them."""
    transformer.fuse_lora(lora_scale=scale)
    transformer.unload_lora()
    transformer.fuse_qkv_projections()


@contextmanager
def merged(pipeline: Any) -> Iterator[None]:
    """Within it the pipeline's transformer is a copy into whose weights the adapters, if any, are merged."""
    own = pipeline.transformer
    if getattr(own, "peft_config", None):
        copied = copy.deepcopy(own)
        merge(copied)
        pipeline.register_modules(transformer=copied)
    try:
        yield
    finally:
        pipeline.register_modules(transformer=own)


def save(pipeline: Any, folder: Path) -> None:
    """Write the adapter of a pipeline's transformer as `pytorch_lora_weights.safetensors`."""
    from peft import get_peft_model_state_dict

    name, config = next(iter(pipeline.transformer.peft_config.items()))
    told = {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": sorted(config.target_modules)}
    weights: Any = get_peft_model_state_dict(pipeline.transformer, adapter_name=name)
    pipeline.save_lora_weights(folder, weights, transformer_lora_adapter_metadata=told)


# ------------------------------------------------------------------------------------------------------------- loading


class LoraLoader(LoraBaseMixin):
    """diffusers' methods of a pipeline with adapters: load_lora_weights, fuse_lora, set_adapters and their like."""

    transformer: Any
    _lora_loadable_modules = ["transformer"]
    transformer_name = "transformer"

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        adapter_name: str | None = None,
        hotswap: bool = False,
        **options: Any,
    ) -> None:
        """Load an adapter from a file, a folder or a hub id that holds one, or its state dict.

        options: weight_name, subfolder, revision, token, cache_dir, local_files_only, force_download.
        Raises LoraError for a file that holds none, and for one that does not fit this model.
        """
        require_peft()
        weights, told = self.lora_state_dict(
            pretrained_model_name_or_path_or_dict, return_lora_metadata=True, **options
        )
        where = "the adapter" if isinstance(pretrained_model_name_or_path_or_dict, dict) else str(
            pretrained_model_name_or_path_or_dict
        )  # fmt: skip
        config = config_of(weights, told, PREFIX, where)
        check_fit(weights, self.transformer, PREFIX, where)
        self.transformer.load_lora_adapter(
            weights,
            prefix=self.transformer_name,
            adapter_name=adapter_name,
            metadata={PREFIX + key: value for key, value in config.items()},
            hotswap=hotswap,
            _pipeline=self,
        )

    @classmethod
    def lora_state_dict(
        cls,
        pretrained_model_name_or_path_or_dict: Any,
        weight_name: str | None = None,
        subfolder: str | None = None,
        return_lora_metadata: bool = False,
        **options: Any,
    ) -> Any:
        """The weights of a saved adapter by name, and with `return_lora_metadata` also what its header tells.

        options are those of `huggingface_hub.hf_hub_download`. Raises LoraError.
        """
        source = pretrained_model_name_or_path_or_dict
        if isinstance(source, dict):
            return (dict(source), {}) if return_lora_metadata else dict(source)
        weights, told = read(source, weight_name, subfolder, options)
        return (weights, told) if return_lora_metadata else weights

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | Path,
        transformer_lora_layers: Any = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        transformer_lora_adapter_metadata: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Write the layers of an adapter (`peft.get_peft_model_state_dict`) as safetensors, whatever form is asked for."""
        if not transformer_lora_layers:
            raise LoraError("save_lora_weights: give transformer_lora_layers")
        cls._save_lora_weights(
            save_directory=save_directory,
            lora_layers={cls.transformer_name: transformer_lora_layers},
            lora_metadata={cls.transformer_name: transformer_lora_adapter_metadata},
            is_main_process=is_main_process,
            weight_name=weight_name or ADAPTER_FILE,
            safe_serialization=True,
        )

    def fuse_lora(self, components: list[str] | None = None, **options: Any) -> None:
        """Add the adapters into the weights until `unfuse_lora`; options are those of diffusers, as lora_scale."""
        super().fuse_lora(components=components or ["transformer"], **options)

    def unfuse_lora(self, components: list[str] | None = None, **options: Any) -> None:
        """Take them out again."""
        super().unfuse_lora(components=components or ["transformer"], **options)
