"""What sample.py is asked for: requests from the command line and a prompt file, and what a saved run says of them.

Loads without torch, so that most mistakes are told at once and not after the model has been loaded.
"""

import csv
import io
import json
import math
import os
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from PIL import Image

from stgen import saved, schema
from stgen.fetched import is_hub_id, missing


class SampleError(ValueError):
    """A request that cannot be met; one sentence that says what to do."""


@dataclass(frozen=True)
class Request:
    """One clip: its prompt and every option that shapes it."""

    prompt: str
    seed: int
    negative_prompt: str
    guidance_scale: float
    num_inference_steps: int
    num_frames: int
    height: int
    width: int
    fps: float
    scheduler: str | None
    image: str | None = None
    chunk_frames: int | None = None


SAMPLERS = tuple(dict.fromkeys(name for names in schema.SAMPLERS.values() for name in names))
WHOLE = {
    "seed": 0,
    "num_inference_steps": 1,
    "num_frames": 1,
    "height": 1,
    "width": 1,
    "chunk_frames": 1,
}  # least values
NUMBERS = ("guidance_scale", "fps")
USUAL = {"num_inference_steps": 20, "guidance_scale": 3.0, "fps": 8.0}  # where a pipeline was saved without


def check_early(args: Namespace) -> None:
    """Refuse what can be told from the arguments, the prompt file and a saved pipeline's JSON alone.

    Raises SampleError, SavedError.
    """
    folder = _saved_folder(args)
    if folder is None:  # a checkpoint, or the hub: what it was trained with is known later
        usual: Any = {name: 1 for name in saved.Sampling.model_fields} | {"guidance_scale": 1.0}
        for request in read_requests(args, usual):
            _check_image(request)
    else:
        index = saved.index_of(saved.check(folder))
        trained = Trained(
            index.get("sampling") or {},
            schema.Objective(**(index.get("objective") or {})),
            _config(folder / "codec"),
            _config(folder / "transformer"),
        )
        for request in dict.fromkeys(replace(r, prompt="", seed=0) for r in read_requests(args, trained.sampling)):
            trained.check(request)
            _check_image(request)
        if args.vae_tiling and trained.codec.get("_class_name") in ("PatchPCA", "Pixels"):
            raise SampleError("--vae_tiling: this run has no autoencoder that could decode in tiles; leave it out")
    if "sheet" in args.output and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SampleError("--output: a sheet needs all clips in one process; leave it out, or sample without torchrun")
    if args.lora is not None and not args.lora.exists() and not is_hub_id(args.lora):
        what = missing(args.lora) or f"{args.lora} is neither a file nor a folder"
        raise SampleError(f"--lora: {what}; name a run with lora.rank, or its adapter")
    if args.output_dir is not None and args.output_dir.exists() and not args.output_dir.is_dir():
        raise SampleError(f"--output_dir: {args.output_dir} cannot be written to: it is a file")


def _saved_folder(args: Namespace) -> Path | None:
    """The saved pipeline that will be loaded, if the run is one or has one."""
    places = [args.run] if args.weights == "raw" else [args.run, args.run / "final"]
    return next((place for place in places if (place / saved.INDEX).is_file() and args.weights != "raw"), None)


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_bytes()) if (folder / "config.json").is_file() else {}


@dataclass(frozen=True)
class Trained:
    """What a saved pipeline's JSON says of the clips that it can make."""

    sampling: Mapping[str, Any]
    objective: schema.Objective
    codec: Mapping[str, Any]
    transformer: Mapping[str, Any]

    def check(self, request: Request) -> None:
        """Raise SampleError for a size, scheduler or image that this model cannot take."""
        path = self.objective.path
        if request.scheduler is not None and request.scheduler not in schema.SAMPLERS[path]:
            other = "diffusion" if path == "flow" else "flow"
            use = ", ".join(schema.SAMPLERS[path])
            raise SampleError(f"scheduler {request.scheduler} is for objective.path {other}; with {path} use {use}")
        check_image_time(request, self.objective.frame_times)
        sizes = {"num_frames": request.num_frames, "height": request.height, "width": request.width}
        if (patch := self.codec.get("patch_size")) and self.codec.get("_class_name") == "PatchPCA":
            for (name, extent), joined in zip(sizes.items(), patch, strict=True):
                if extent % joined:
                    raise SampleError(f"{name} {extent} is not divisible by the codec's patch of {joined}")
        asked = {name for name, extent in sizes.items() if extent != self.sampling.get(name)}
        if asked and self.transformer.get("positions") == "learned":
            raise SampleError(
                f"{request.num_frames} frames of {request.height}x{request.width}: learned positions hold for the training "
                "size alone; leave the size out, or train with tokens.positions: rope"
            )


def check_image_time(request: Request, frame_times: str) -> None:
    """Raise SampleError for an image that a model of such times cannot go on from."""
    if request.image is not None and frame_times == "clip":
        raise SampleError(
            "--image: this model knows one noise level for all frames of a clip; train with objective.frame_times=past"
        )


def _check_image(request: Request) -> None:
    """Raise SampleError for an image that is not there or is none."""
    if request.image is None:
        return
    try:
        with Image.open(request.image) as image:
            image.verify()
    except Exception as error:  # Pillow meets damage in many ways
        raise bad_image(request.image, error) from None


def bad_image(path: str, error: Exception) -> SampleError:
    reason = "no such file" if isinstance(error, FileNotFoundError) else "not an image that can be read"
    return SampleError(f"--image: {path}: {reason}")


# ----------------------------------------------------------------------------------------------------- from the words


def read_requests(args: Namespace, trained: Mapping[str, Any]) -> list[Request]:
    """Every clip that the arguments ask for: prompts in order, the clips of a prompt by seed.

    Raises SampleError naming the option, or the file and line, of what cannot be used.
    """
    for name in ("num_videos_per_prompt", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise SampleError(f"--{name}: {getattr(args, name)} should be at least 1")
    if len(args.seed) > 1 and args.num_videos_per_prompt not in (1, len(args.seed)):
        raise SampleError(
            f"--seed: {len(args.seed)} seeds for {args.num_videos_per_prompt} clips of a prompt; give one"
        )
    names = [field.name for field in fields(Request) if field.name not in ("prompt", "seed", "image")]
    given = {name: _convert(f"--{name}: ", name, getattr(args, name)) for name in names}
    given = {name: {**USUAL, **trained}.get(name) if value is None else value for name, value in given.items()}
    given_seeds = [_convert("--seed: ", "seed", seed) for seed in args.seed]
    given["image"] = args.image and str(args.image)

    rows = [("--prompt: ", {"prompt": prompt}) for prompt in args.prompt or []]
    rows += read_prompt_file(args.prompt_file) if args.prompt_file else []
    requests = []
    for where, row in rows:
        options = {name: _convert(where, name, value) for name, value in row.items() if value not in (None, "")}
        seeds = [options.pop("seed")] if "seed" in options else given_seeds
        if len(seeds) == 1:
            seeds = [seeds[0] + i for i in range(args.num_videos_per_prompt)]
        base = Request(**{"prompt": "", "seed": 0, **given, **options})
        if absent := [name for name in ("num_frames", "height", "width") if getattr(base, name) is None]:
            raise SampleError(f"{where}{absent[0]}: this pipeline was saved without a usual one; give it")
        requests += [replace(base, seed=seed) for seed in seeds]
    if not requests:
        raise SampleError(f"{args.prompt_file}: no prompt in it; write one a line")
    return requests


def read_prompt_file(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Rows of a .txt, .csv or .jsonl file: the place of each (`file:line: `), its prompt and perhaps other options.

    Raises SampleError naming the file and the line of a row that cannot be read.
    """
    if not path.is_file():
        raise SampleError(f"--prompt_file: {path} is not a file")
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SampleError(f"{path}: not UTF-8 text (byte {error.start})") from None
    lines = content.replace("\r\n", "\n").split("\n")  # a JSON string may hold what str.splitlines() takes for an end
    if path.suffix == ".csv":
        rows = _csv_rows(path, content)
    elif path.suffix == ".jsonl":
        rows = [(i, _json(path, i, line)) for i, line in enumerate(lines, start=1) if line.strip()]
    else:
        rows = [(i, {"prompt": line.strip()}) for i, line in enumerate(lines, start=1)]
        rows = [(i, row) for i, row in rows if row["prompt"] and not row["prompt"].startswith("#")]
    known = {field.name for field in fields(Request)}
    for i, row in rows:
        if not isinstance(row, dict) or row.get("prompt") is None:
            raise SampleError(f"{path}:{i}: no prompt in this row")
        if None in row:
            raise SampleError(f"{path}:{i}: more values than columns; quote a prompt that holds a comma")
        if unknown := sorted(key for key in row if key not in known):
            raise SampleError(f"{path}:{i}: unknown column {unknown[0]!r}; known are {', '.join(sorted(known))}")
        if row.get("image"):
            row["image"] = _beside(path, i, row["image"])
    return [(f"{path}:{i}: ", row) for i, row in rows]


def _beside(file: Path, line: int, name: Any) -> str:
    """The image that a row of a prompt file names. Raises SampleError for one outside the file's folder."""
    image = file.parent / str(name)
    if not image.resolve().is_relative_to(file.parent.resolve()):
        raise SampleError(
            f"{file}:{line}: image {name!r} lies outside the folder of {file.name}; put it beside the file"
        )
    return str(image)


def _csv_rows(path: Path, content: str) -> list[tuple[int, dict[str, str]]]:
    """Rows with the line on which each ends."""
    reader = csv.DictReader(io.StringIO(content, newline=""))
    try:
        return [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise SampleError(f"{path}:{reader.line_num + 1}: not CSV: {error}") from None


def _json(path: Path, line: int, content: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SampleError(f"{path}:{line}: not JSON: {error}") from None


def _convert(where: str, name: str, value: Any) -> Any:
    """An option's value in its type; None stays None. Raises SampleError that begins with `where`."""
    if value is None:
        return None
    if name in WHOLE:
        number = _number(value)
        if number % 1 != 0 or not WHOLE[name] <= number < 2**63:
            raise SampleError(f"{where}{name} should be a whole number from {WHOLE[name]} on, got {value!r}")
        return int(number)
    if name in NUMBERS:
        number = _number(value)
        if not math.isfinite(number) or (name == "fps" and number <= 0):
            raise SampleError(f"{where}{name} should be a {'positive ' if name == 'fps' else ''}number, got {value!r}")
        return float(number)
    if not isinstance(value, str):
        raise SampleError(f"{where}{name} should be text, got {value!r}")
    if name == "scheduler" and value not in SAMPLERS:
        raise SampleError(f"{where}scheduler {value!r} is none of {', '.join(SAMPLERS)}")
    return value


def _number(value: Any) -> int | float:
    """The number that a value stands for, NaN for none."""
    for kind in (int, float):
        try:
            return value if type(value) is kind else kind(str(value))
        except ValueError:
            pass
    return math.nan
