"""A saved LoRA adapter: diffusers' file `pytorch_lora_weights.safetensors`, read and judged before peft is told of it.

It may come from anywhere: of peft's config in its header, which can name modules to import, only the scale is taken;
layers and ranks are read off its weights.
"""

import json
import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from stgen.fetched import OPTIONS, is_hub_id, missing

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
APART = {"to_q", "to_k", "to_v"}  # layers that stand only where projections are opened
HEADER = "lora_adapter_metadata"  # where diffusers writes peft's config


class LoraError(ValueError):
    """An adapter that cannot be had or does not fit; one sentence that says what to do."""


def read(
    source: str | Path, name: str | None, subfolder: str | None, options: dict[str, Any]
) -> tuple[dict[str, Tensor], Any]:
    """The weights of a saved adapter by name, and what its header tells.

    source: a file, or a folder or hub id with a file `name`; options: as `huggingface_hub.hf_hub_download` takes them,
    others are left alone. Raises LoraError.
    """
    if name is not None and not name.endswith(".safetensors"):
        raise LoraError(f"weight_name: {name} is no safetensors file; no others are read")
    file = _file(str(source), name or ADAPTER_FILE, subfolder, options)
    try:
        with safe_open(file, framework="pt") as opened:
            weights = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            return weights, json.loads((opened.metadata() or {}).get(HEADER, "{}"))
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise LoraError(f"{file}: not an adapter that can be read: {str(error)[:100]}") from None


def _file(source: str, name: str, subfolder: str | None, options: dict[str, Any]) -> Path:
    """The file of an adapter, on this machine or from the hub. Raises LoraError."""
    path = Path(source) / (subfolder or "")
    if path.is_file():
        return path
    if not is_hub_id(source):
        if (path / name).is_file():
            return path / name
        what = missing(source) or f"{source}: holds no {name}"
        raise LoraError(f"{what}; name the file, or the folder of a run with lora.rank")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    taken = {key: value for key, value in options.items() if key in OPTIONS}
    try:
        return Path(hf_hub_download(source, name, subfolder=subfolder, **taken))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise LoraError(f"{source}: neither a file or folder here nor a repository with {name}: {reason}") from None


def config_of(weights: dict[str, Tensor], told: Any, prefix: str, where: str) -> dict[str, Any]:
    """peft's config of an adapter: ranks and layers as its weights have them, the scale as its header says.

    prefix: what all names of weights begin with. Raises LoraError that begins with `where`.
    """
    told = {key.removeprefix(prefix): value for key, value in told.items()} if isinstance(told, dict) else {}
    ranks = {}
    for key, tensor in weights.items():
        module, found, _ = key.removeprefix(prefix).partition(".lora_A")
        if not key.startswith(prefix) or ".lora_" not in key:
            raise LoraError(f"{where}: {key[:80]} is no weight of a LoRA adapter for this model")
        if found and tensor.ndim == 2:
            ranks[module] = len(tensor)
    if not ranks:
        raise LoraError(f"{where}: holds no weights of a LoRA adapter")
    rank = max(ranks.values())
    alpha = told.get("lora_alpha", rank)
    if told.get("alpha_pattern") or told.get("use_dora") or told.get("use_rslora"):
        raise LoraError(f"{where}: scales layer by layer, or otherwise than by alpha / rank, are not served")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise LoraError(f"{where}: lora_alpha should be a number, got {str(alpha)[:40]}")
    pattern = {module: own for module, own in ranks.items() if own != rank}
    return {"r": rank, "lora_alpha": alpha, "target_modules": sorted(ranks), "rank_pattern": pattern}


def check_fit(weights: dict[str, Tensor], transformer: Any, prefix: str, where: str) -> None:
    """Raise LoraError for a weight that is for a layer which this model has not, or has in another size."""
    layers, ranks = dict(transformer.named_modules()), {}
    for key, tensor in weights.items():
        module, _, side = key.removeprefix(prefix).partition(".lora_")
        if tensor.ndim != 2:
            raise LoraError(f"{where}: {key[:80]} should be a matrix, got the shape {list(tensor.shape)}")
        rank, channels = tensor.shape if side.startswith("A") else tensor.shape[::-1]
        if ranks.setdefault(module, rank) != rank:
            raise LoraError(f"{where}: the matrices of {module[:80]} are of the ranks {ranks[module]} and {rank}")
        parent, _, name = module.rpartition(".")
        if name in APART and module not in layers and {f"{parent}.to_qkv", f"{parent}.to_kv"} & layers.keys():
            continue  # packed until the adapter comes
        layer = layers.get(module)
        layer = getattr(layer, "base_layer", layer)
        if not isinstance(layer, nn.Linear):
            raise LoraError(f"{where}: was trained for another model: this one has no layer {module[:80]}")
        needed = layer.in_features if side.startswith("A") else layer.out_features
        if channels != needed:
            raise LoraError(
                f"{where}: was trained for another model: {module[:80]} is for {channels} channels, here it has {needed}"
            )
