"""A run as a folder of diffusers that speaks for itself: pipeline, model card, clips; on this machine or on the hub."""

import html
import json
import os
import re
import shutil
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch

from stgen import build, config, flops, lora, saved, schema
from stgen.fetched import HUB_ID, is_hub_id
from stgen.logger import redact
from stgen.norms import FoldError
from stgen.pipeline import VideoPipeline

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CLIPS = 4
PRIVATE_SECTIONS = ("run", "log", "checkpoint")  # of the config: this machine's business


class ExportError(ValueError):
    """What cannot be exported or pushed; one sentence that says what to do."""


def export(args: Namespace) -> Path:
    """Write, and push, what the command line asks for; returns the folder.

    Raises ExportError, BuildError, SavedError, LoraError: the folder is then not there.
    """
    if args.push_to_hub is not None and not HUB_ID.fullmatch(args.push_to_hub):
        raise ExportError(f"--push_to_hub: {args.push_to_hub!r} is no name of a repository; write ORG/NAME")
    if args.variant is not None and not re.fullmatch(r"[A-Za-z0-9_]{1,32}", args.variant):
        raise ExportError(f"--variant: {args.variant!r} becomes part of file names; use letters, digits and _")
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise ExportError(f"--output: {args.output} exists already and is not an empty folder; name another")
    diffusers.utils.logging.disable_progress_bar()
    pipeline = _pipeline(args)
    with _new_folder(args.output) as folder:
        pipeline.save_pretrained(folder, variant=args.variant)
        clips = _clips(args.run, folder)
        (folder / "README.md").write_text(card(args, pipeline, clips), encoding="utf-8")
        if args.self_describing:
            _describe_itself(folder)
        saved.check(folder)
    print(f"pipeline {args.output}: {_size(args.output)}, model card {args.output / 'README.md'}")
    if args.push_to_hub is not None:
        print(f"pushed to {push(args.output, args.push_to_hub, private=not args.public)}")
    return args.output


def push(folder: Path, name: str, private: bool = True) -> str:
    """Upload a folder to a model repository of the hub, made if need be; returns its address. Raises ExportError."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        if private and not api.model_info(name).private:
            raise ExportError(
                f"--push_to_hub: {name} is there and public; add --public, or name another; {folder} is whole"
            )
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="stgen export")
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ExportError(
            f"--push_to_hub: {name}: {reason}; {folder} is whole, and `hf auth login` gives a key"
        ) from None
    return str(address)


def _pipeline(args: Namespace) -> VideoPipeline:
    """The pipeline with the weights that are asked for."""
    pipeline = build.load_pipeline(args.run, args.weights)
    if args.lora is not None:
        pipeline.load_lora_weights(args.lora)
        lora.merge(pipeline.transformer)
    if args.fold:
        try:
            pipeline.register_modules(transformer=pipeline.transformer.folded())
        except FoldError as error:
            raise ExportError(f"--fold: {error}") from None
    for part in (pipeline.transformer, pipeline.text_encoder):
        torch.nn.Module.to(part, DTYPES[args.dtype])  # diffusers' own warns of layers that this model has not
    return pipeline


@contextmanager
def _new_folder(final: Path) -> Iterator[Path]:
    """A folder that is `final`, which is absent or empty, once all is written, and nothing when anything fails."""
    draft = final.with_name(f".{final.name}-{os.getpid()}")
    try:
        draft.mkdir(parents=True)
        yield draft
        if final.exists():
            final.rmdir()
        draft.rename(final)
    except OSError as error:
        raise ExportError(f"--output: {final} cannot be written: {(error.strerror or str(error)).lower()}") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _describe_itself(folder: Path) -> None:
    """Let plain diffusers find the class: by a file of one line, which it runs only when it is told to trust it."""
    (folder / saved.SHIM).write_text(saved.SHIM_TEXT)
    index = {**saved.index_of(folder), "_class_name": saved.SHIM_CLASS}
    (folder / saved.INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _clips(run: Path, folder: Path) -> list[str]:
    """Copies the contact sheet and the first clips of a finished run; their names in the folder."""
    wanted = [run / "contact_sheet.png", *sorted((run / "samples" / "final").glob("*.mp4"))[:CLIPS]]
    found = [file for file in wanted if file.is_file()]
    for file in found:
        (folder / "samples").mkdir(exist_ok=True)
        shutil.copyfile(file, folder / "samples" / file.name)
    return [f"samples/{file.name}" for file in found]


def _size(folder: Path) -> str:
    return flops.readable(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()), "B")


# ------------------------------------------------------------------------------------------------------ the model card


def card(args: Namespace, pipeline: VideoPipeline, clips: list[str]) -> str:
    """The model card, in Markdown with the header that the hub reads."""
    name = args.push_to_hub or args.output.name
    parts = [
        "---\nlibrary_name: diffusers\npipeline_tag: text-to-video\ntags:\n- stgen\n- diffusers\n- text-to-video\n---",
        f"# {_plain(name)}",
        _what(pipeline),
        "## Use\n\n" + _use(args, name, pipeline),
        "## Samples\n\n" + _shown(clips) if clips else "",
        "## Data\n\n" + _data(_config_of(args.run)),
        "## Metrics\n\n" + _table(_summary_of(args.run)) if _summary_of(args.run) else "",
        "## Config\n\n" + _config_words(_config_of(args.run), pipeline),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _what(pipeline: VideoPipeline) -> str:
    model, usual, objective = pipeline.transformer.config, pipeline.config.sampling, pipeline.config.objective
    count = flops.readable(sum(p.numel() for p in pipeline.transformer.parameters()))
    encoder = type(pipeline.text_encoder).__name__
    if vocabulary := getattr(pipeline.text_encoder.config, "vocabulary", None):
        encoder += f", which knows the {len(vocabulary)} words of its training captions alone"
    return (
        f"A text-to-video diffusion transformer trained with stgen: {count} parameters, width {model.width}, {model.depth} "
        f"layers, {model.heads} heads, attention plan `{model.plan}`. It makes clips of {usual.get('num_frames')} frames of "
        f"{usual.get('height')}x{usual.get('width')} at {usual.get('fps', 8.0):g} frames a second, in latents of "
        f"{type(pipeline.codec).__name__}, from prompts read by {encoder}. It was trained to predict "
        f"{objective.get('prediction_type', 'v_prediction')} on the {objective.get('path', 'flow')} path."
    )


def _use(args: Namespace, name: str, pipeline: VideoPipeline) -> str:
    source = json.dumps(name if args.push_to_hub else str(args.output.name))
    options = f', variant="{args.variant}"' if args.variant else ""
    low, codec = DTYPES[args.dtype], pipeline.codec.dtype  # one type for all would cast the codec too
    types = f'{{"transformer": {low}, "text_encoder": {low}, "default": {codec}}}'
    options += f", torch_dtype={types}" if args.dtype != "fp32" else ""
    lines = ["import torch", "from diffusers.utils import export_to_video"]
    if args.self_describing:
        call = f"DiffusionPipeline.from_pretrained({source}{options}, trust_remote_code=True)  # runs pipeline.py, one line"
        lines += ["from diffusers import DiffusionPipeline", "", f"pipe = {call}"]
    else:
        lines += ["from stgen import VideoPipeline", "", f"pipe = VideoPipeline.from_pretrained({source}{options})"]
    lines += [
        'video = pipe("a prompt", generator=torch.Generator().manual_seed(0)).frames[0]',
        f'export_to_video(video, "clip.mp4", fps={pipeline.config.sampling.get("fps", 8.0):g})',
    ]
    return "Install stgen, then\n\n```python\n" + "\n".join(lines) + "\n```"


def _shown(clips: list[str]) -> str:
    sheets = [f"![samples]({name})" for name in clips if name.endswith(".png")]
    return "\n\n".join([*sheets, ", ".join(f"[{Path(n).name}]({n})" for n in clips if n.endswith(".mp4"))]).strip()


def _data(cfg: schema.Config | None) -> str:
    if cfg is None:
        return "Not recorded: the card was made from a saved pipeline without its run."
    data = cfg.data
    source = (
        "stgen's built-in captioned shapes"
        if data.train_data_dir is None
        else f"`{_plain(Path(data.train_data_dir).name)}`"
    )
    return (
        f"Trained on {source}, clips of {data.num_frames} frames of {data.height}x{data.width}; {data.held_out_clips} videos "
        "were held out for the loss."
    )


def _summary_of(run: Path) -> dict[str, Any]:
    file = next((f for f in (run / "summary.json", run.parent / "summary.json") if f.is_file()), None)
    try:
        content = json.loads(file.read_bytes()) if file else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _table(summary: Mapping[str, Any]) -> str:
    rows = ["| | |", "|---|---|"]
    rows += [f"| {_plain(key)} | {_plain(value)} |" for key, value in _flat(summary).items()]
    return "\n".join(rows)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Numbers by dotted keys."""
    found: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{key}"] = f"{value:.4g}" if isinstance(value, float) else str(value)
    return found


def _config_of(run: Path) -> schema.Config | None:
    """The config of the run that a folder is or belongs to."""
    file = next((f for f in (run / "config.yaml", run.parent / "config.yaml") if f.is_file()), None)
    try:
        return None if file is None else config.load(file, [], schema.Config)
    except config.ConfigError:
        return None


def _config_words(cfg: schema.Config | None, pipeline: VideoPipeline) -> str:
    """The config without what is this machine's business: its folders, logs and secrets."""
    if cfg is None:
        keys = {key: value for key, value in dict(pipeline.transformer.config).items() if not key.startswith("_")}
        return _fenced("json", json.dumps(keys, indent=2, default=str))
    told = redact(cfg.model_dump(mode="json", exclude_defaults=True, exclude=set(PRIVATE_SECTIONS)))
    return _fenced("json", json.dumps(_without_folders(told), indent=2, ensure_ascii=False))


def _without_folders(value: Any) -> Any:
    """Paths shortened to their last name."""
    if isinstance(value, Mapping):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and _is_path(value) else value


def _is_path(value: str) -> bool:
    """Whether words are a path on this machine; a single name, a hub id and a sentence with a slash are none."""
    outward = os.path.isabs(value) or value.startswith("~") or not {".", ".."}.isdisjoint(value.split("/"))
    return outward or ("/" in value and not re.search(r"\s", value) and not is_hub_id(value))


def _fenced(kind: str, text: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{kind}\n{text}\n{fence}"


def _plain(value: Any) -> str:
    """Words from anywhere as one plain line of Markdown."""
    return html.escape(re.sub(r"[\s|`*_\[\]<>]+", " ", str(value)).strip()[:200], quote=False)
