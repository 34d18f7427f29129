"""A saved pipeline is data from anywhere: what its folder may hold and name, judged before any library reads it.

diffusers imports whatever module `model_index.json` names, and transformers follows `auto_map`, adapters and kernels to
the network. Here the few classes that stgen itself saves are allowed, files that stay in the folder, and nothing else.
"""

import json
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, FiniteFloat, PositiveFloat, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open

from stgen import limits, schema
from stgen.section import Section

INDEX = "model_index.json"
MAX_JSON = 64 * 2**20  # bytes; the largest tokenizers have 20 MB
COMPONENTS: dict[str, tuple[tuple[str, str], ...]] = {  # slot: (library, pattern of the class) that it may name
    "transformer": (("stgen.model", "VideoTransformer"),),
    "codec": (("stgen.codec", "PatchPCA|Pixels"), ("diffusers", r"Autoencoder\w+")),
    "text_encoder": (("stgen.text", "LearnedTextEncoder"), ("transformers", r"(?!Auto)\w+(Model|Encoder)\w*")),
    "tokenizer": (("transformers", r"(?!Auto)\w+(Tokenizer(Fast)?|Backend)"),),
    "scheduler": (("diffusers", r"\w+Scheduler"),),
}
SHIM = "pipeline.py"
SHIM_TEXT = "from stgen.pipeline import VideoPipeline  # noqa: F401\n"
SHIM_CLASS = ["pipeline", "VideoPipeline"]  # so plain diffusers, told to trust it, finds the class by way of the shim
FILES = re.compile(
    r"(config|model_index|scheduler_config|generation_config|tokenizer|tokenizer_config|special_tokens_map"
    r"|added_tokens|vocab|[\w.-]+\.safetensors\.index(\.\w+)?)\.json|[\w.-]+\.(safetensors|model|txt|md|jinja|png|mp4)|LICENSE"
)
REDIRECTS = (  # keys by which a config sends its reader to other code or to the network
    "auto_map", "custom_pipelines", "quantization_config", "attn_implementation", "_attn_implementation",
    "_attn_implementation_internal", "base_model_name_or_path", "peft_config",
)  # fmt: skip
UNCLIPPED = ("lambda_min_clipped", -float("inf"))  # what DPM++ writes for no limit


class Sampling(Section):
    """The defaults of a call that a pipeline was saved with."""

    num_frames: PositiveInt
    height: PositiveInt
    width: PositiveInt
    fps: PositiveFloat = 8.0
    num_inference_steps: PositiveInt = 20
    guidance_scale: FiniteFloat = 3.0
    max_length: PositiveInt = 128
    mixed_precision: Literal["no", "bf16"] = "no"


SETTINGS: dict[str, type[BaseModel]] = {"objective": schema.Objective, "sampling": Sampling}


class SavedError(ValueError):
    """A folder that is no saved pipeline, or names what none may name; one sentence with the file and the key."""


def check(folder: str | Path, within: Path | None = None) -> Path:
    """The folder of a saved pipeline, once everything in it is what `save_pretrained` writes.

    within: the folder that links may lead to; None takes this one.
    Raises SavedError naming the file, and the key, of what is not: a link out of the folder, a file of another kind,
    a library or class beside those of COMPONENTS, a config that sends its reader elsewhere, a number out of bounds.
    """
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        raise SavedError(
            f"{folder} is no folder with a {INDEX}; name a saved pipeline, such as RUN/final, or a hub id (OWNER/NAME)"
        )
    files = _files(folder, within or folder)
    _check_index(folder / INDEX, _read(folder / INDEX))
    for file in files:
        if ".safetensors.index." in file.name:
            _check_shards(file, _read(file))
        elif file.name.endswith("config.json"):
            _check_config(file, _read(file))
    return folder


def index_of(folder: Path) -> dict[str, Any]:
    """The content of a saved pipeline's index. Raises SavedError where it cannot be read."""
    return _read(folder / INDEX)


def check_file(file: Path, folder: Path) -> None:
    """Raise SavedError unless `file` is a regular file within `folder`, links followed."""
    try:
        inside = file.resolve(strict=True).is_relative_to(folder.resolve())
        regular = stat.S_ISREG(file.stat().st_mode)
    except (OSError, RuntimeError) as error:
        raise SavedError(f"{file}: {getattr(error, 'strerror', None) or error}") from None
    if not inside:
        raise SavedError(f"{file} is a link that leads out of {folder}; put the file itself there")
    if not regular:
        raise SavedError(f"{file} is not a regular file")


def _files(folder: Path, within: Path) -> list[Path]:
    """The files of the folder, all of which have been judged by their names and places."""
    files = []
    for entry in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in entry.relative_to(folder).parts) or _is_folder(entry):
            continue
        check_file(entry, within)
        if not FILES.fullmatch(entry.name) and not _is_shim(entry, folder):
            raise SavedError(
                f"{entry}: a saved pipeline holds safetensors, JSON and vocabularies only; remove this file"
            )
        files.append(entry)
    return files


def _is_shim(entry: Path, folder: Path) -> bool:
    """Whether a file is the one line of code that `stgen export --self-describing` writes; nothing here runs it."""
    return entry == folder / SHIM and entry.stat().st_size < 1000 and entry.read_text(errors="replace") == SHIM_TEXT


def _is_folder(entry: Path) -> bool:
    return entry.is_dir() and not entry.is_symlink()


def _read(file: Path) -> dict[str, Any]:
    """A JSON object. Raises SavedError for anything else, a nesting without end included."""
    if file.stat().st_size > MAX_JSON:
        raise SavedError(f"{file}: larger than {MAX_JSON} bytes")
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise SavedError(f"{file}: not JSON that can be read: {str(error)[:100]}") from None
    if not isinstance(content, dict):
        raise SavedError(f"{file}: holds no JSON object")
    return content


def _check_index(file: Path, index: dict[str, Any]) -> None:
    if index.get("_class_name") not in ("VideoPipeline", SHIM_CLASS):
        raise SavedError(f"{file}: _class_name is {_shown(index.get('_class_name'))}, not VideoPipeline")
    for key, value in index.items():
        if key in COMPONENTS:
            if not _is_allowed(key, value):
                raise SavedError(f"{file}: {key} names {_shown(value)}, which no pipeline of stgen holds")
        elif key in SETTINGS:
            if value:  # saved without any: then each call says what it wants
                _check_settings(file, key, value)
        elif not key.startswith("_"):
            raise SavedError(f"{file}: unknown key {key[:80]!r}")
    if absent := [key for key in COMPONENTS if key not in index and key != "tokenizer"]:
        raise SavedError(f"{file}: {absent[0]} is missing")
    _check_config(file, index)


def _is_allowed(slot: str, value: Any) -> bool:
    match value:
        case [None, None]:  # left out, to be given when the pipeline is loaded
            return True
        case [str(library), str(name)] if name.isascii():
            return any(library == own and re.fullmatch(pattern, name) for own, pattern in COMPONENTS[slot])
    return False


def _check_settings(file: Path, key: str, value: Any) -> None:
    try:
        SETTINGS[key].model_validate(value, strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(map(str, (key, *fault["loc"])))[:80]
        raise SavedError(f"{file}: {where}: {fault['msg']}, got {_shown(fault['input'])}") from None


def _check_config(file: Path, content: dict[str, Any]) -> None:
    for key, value in _entries(content):
        if key in REDIRECTS and value is not None:
            raise SavedError(
                f"{file}: {key} sends its reader to other code or files, which is never followed; remove it"
            )
    bounded = {key: value for key, value in content.items() if (key, value) != UNCLIPPED}
    if file.name != "tokenizer_config.json" and (fault := limits.slip(bounded)):  # there 1e30 means no limit
        raise SavedError(f"{file}: {fault}")


def _entries(content: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, those of mappings within included."""
    left = [content]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            yield from part.items()
            left += part.values()
        elif isinstance(part, list):
            left += part


def _check_shards(file: Path, content: dict[str, Any]) -> None:
    """The index of weights in several files: each must be a plain name, for libraries join it to the folder unseen."""
    shards = content.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise SavedError(f"{file}: weight_map is no mapping of weights to files")
    for name in dict.fromkeys(shards.values()):
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise SavedError(f"{file}: weight_map names {name[:80]!r}, not a safetensors file beside it")


def check_weights(folder: Path, expected: Mapping[str, Any], tied: Mapping[str, str]) -> None:
    """Raise SavedError unless the safetensors of a component's folder hold the keys and shapes that its module expects.

    expected: the module's state dict. tied: for a key that shares its tensor with others, the group's name; one of a
    group is enough. diffusers loads a file that lacks a key, and leaves that weight empty.
    """
    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="np") as weights:
                found |= {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118
        except (OSError, ValueError, SafetensorError) as error:
            raise SavedError(f"{file}: {error}") from None
    groups = {tied.get(key, key) for key in found}
    faults = [f"{key} is missing" for key in expected if tied.get(key, key) not in groups]
    faults += [f"{key[:80]} is unexpected" for key in found if key not in expected]
    faults += [
        f"{key} has shape {list(shape)}, not {list(expected[key].shape)}"
        for key, shape in found.items()
        if key in expected and tuple(expected[key].shape) != shape
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise SavedError(f"{folder}: {'; '.join(faults[:5])}{more}")


def _shown(value: Any) -> str:
    return repr(value)[:100]
