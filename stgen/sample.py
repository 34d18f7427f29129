"""Sampling: a run folder and prompts in; clips, their settings and a contact sheet out."""

import csv
import io
import json
import math
import shutil
from argparse import Namespace
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from stgen import build, dataset, text, video
from stgen.caches import Cache, Tally, caching, calibrated
from stgen.logger import Logger
from stgen.pipeline import SCHEDULERS, VideoPipeline, build_scheduler, set_steps


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


WHOLE = {"seed": 0, "num_inference_steps": 1, "num_frames": 1, "height": 1, "width": 1}  # options and their least value
NUMBERS = ("guidance_scale", "fps")


def sample(args: Namespace) -> list[Path]:
    """Sample what the command line asks for; returns the files of the clips."""
    diffusers.utils.logging.disable_progress_bar()  # of loading, which takes a moment; sampling has its own
    pipeline = _load(args)
    cuda = args.device != "cpu" and torch.cuda.is_available()
    if args.device == "cuda" and not cuda:
        raise SampleError("--device cuda: PyTorch finds no CUDA device; say auto or cpu")
    pipeline.to("cuda" if cuda else "cpu")
    pipeline.set_progress_bar_config(disable=True)
    requests = read_requests(args, pipeline.config.sampling)
    check_requests(pipeline, requests)
    check_streams(pipeline, requests, args)
    warn_of_unknown_words(pipeline, requests)
    cache = _cache(pipeline, args.cache, requests[0]) if args.cache else None
    tally = Tally()

    home = args.run.parent if args.run.name.startswith("checkpoint-") else args.run
    out = args.output_dir or home / "samples"
    run = home.resolve().name
    try:
        out.mkdir(parents=True, exist_ok=True)
        logger = Logger(
            out, vars(args), mode=args.wandb, project="stgen", group=run, name=f"{run}-samples", job_type="sample"
        )
    except OSError as error:
        raise SampleError(f"--output_dir: {out} cannot be written to: {error.strerror}") from None
    files, clips = [], []
    try:
        with tqdm(total=len(requests), desc="sampling", unit="clip") as bar:
            for first, group in _batches(requests, args.batch_size):
                if _streams(pipeline, group[0]):
                    files += _stream(pipeline, group, first, out, args)
                    bar.update(len(group))
                    continue
                for i, (request, clip) in enumerate(
                    zip(group, _run(pipeline, group, cache, tally), strict=True), start=first
                ):
                    files.append(_write(out, i, request, clip, args))
                    clips += [clip] if "sheet" in args.output else []
                    bar.update()
        captions = [f"{request.prompt}  (seed {request.seed})" for request in requests]
        if "sheet" in args.output:
            video.contact_sheet(out / "contact_sheet.png", clips, captions)
            logger.image(0, "samples/contact_sheet", out / "contact_sheet.png")
        if files[0].suffix == ".mp4":
            logger.videos(0, "samples/videos", list(zip(files, captions, strict=True)))
    finally:
        logger.finish()
    if cache is not None:
        print(f"cache {cache.kind}: {tally}")
    print(f"{len(files)} clips in {out}" + (f"; {files[0].name} first" if len(files) > 1 else f": {files[0].name}"))
    print(logger.where)
    return files


def _load(args: Namespace) -> VideoPipeline:
    try:
        return build.load_pipeline(args.run, args.weights)
    except (OSError, SafetensorError) as error:
        raise SampleError(f"{args.run} cannot be loaded: {str(error).strip().splitlines()[0]}") from None


# ------------------------------------------------------------------------------------------------------- requests


def read_requests(args: Namespace, trained: dict[str, Any]) -> list[Request]:
    """Every clip that the arguments ask for: prompts in order, the clips of a prompt by seed.

    Raises SampleError naming the option, or the file and line, of what cannot be used.
    """
    for name in ("num_videos_per_prompt", "batch_size"):
        if getattr(args, name) < 1:
            raise SampleError(f"--{name}: {getattr(args, name)} should be at least 1")
    if len(args.seed) > 1 and args.num_videos_per_prompt not in (1, len(args.seed)):
        raise SampleError(
            f"--seed: {len(args.seed)} seeds for {args.num_videos_per_prompt} clips of a prompt; give one"
        )
    names = [field.name for field in fields(Request) if field.name not in ("prompt", "seed", "image")]
    given = {name: _convert(f"--{name}: ", name, getattr(args, name)) for name in names}
    given = {name: trained.get(name) if value is None else value for name, value in given.items()}
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
    if name == "scheduler" and value not in SCHEDULERS:
        raise SampleError(f"{where}scheduler {value!r} is none of {', '.join(SCHEDULERS)}")
    return value


def _number(value: Any) -> int | float:
    """The number that a value stands for, NaN for none."""
    for kind in (int, float):
        try:
            return value if type(value) is kind else kind(str(value))
        except ValueError:
            pass
    return math.nan


def check_requests(pipeline: VideoPipeline, requests: list[Request]) -> None:
    """Refuse sizes and schedulers that this model cannot take, before anything is sampled."""
    for request in dict.fromkeys(_settings(request) for request in requests):
        pipeline.latent_shape(request.num_frames, request.height, request.width)
        build_scheduler(request.scheduler, pipeline.objective)
    if any(request.image for request in requests) and pipeline.objective.frame_times == "clip":
        raise SampleError(
            "--image: this model knows one noise level for all frames of a clip; train with objective.frame_times=past"
        )
    for request in requests:
        if request.image is not None:
            read_image(request.image, request.height, request.width)


def check_streams(pipeline: VideoPipeline, requests: list[Request], args: Namespace) -> None:
    """Of clips longer than those of training: refuse what a stream cannot do, say why there is none where one is meant."""
    trained, model = pipeline.config.sampling["num_frames"], pipeline.transformer
    reason = pipeline.stream_refusal()
    if args.chunk_frames is not None and reason is not None:
        raise SampleError(f"--chunk_frames: {reason}")
    if all(request.num_frames <= trained for request in requests):
        return
    if reason is not None:
        tqdm.write(f"note: clips longer than {trained} frames are made at once: {reason}") if model.remembers else None
    elif args.output != ["mp4"]:
        raise SampleError(
            f"--output: clips longer than the {trained} frames of training are made and written chunk by chunk, as mp4 only"
        )
    elif args.cache:
        raise SampleError(
            f"--cache: clips longer than the {trained} frames of training are made chunk by chunk, for which every layer has "
            "to be computed; leave it out"
        )


def read_image(path: str, height: int, width: int) -> Tensor:
    """An image scaled until it covers the clip, its centre cut out: [1, 3, height, width] in [0, 1]. Raises SampleError."""
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else "not an image that can be read"
        raise SampleError(f"--image: {path}: {reason}") from None
    return dataset.fit(torch.from_numpy(pixels).permute(2, 0, 1)[None], height, width).float() / 255


def warn_of_unknown_words(pipeline: VideoPipeline, requests: list[Request]) -> None:
    """Say which words a learned encoder never saw: it treats them all alike."""
    if not isinstance(pipeline.text_encoder, text.LearnedTextEncoder):
        return
    prompts = [request.prompt for request in requests] + [request.negative_prompt for request in requests]
    unknown = dict.fromkeys(word for prompt in prompts for word in pipeline.text_encoder.unknown_words(prompt))
    if unknown:
        tqdm.write(f"warning: no training caption held {', '.join(map(repr, unknown))}; they are left out")


# ------------------------------------------------------------------------------------------------------- sampling


def _batches(requests: list[Request], size: int) -> list[tuple[int, list[Request]]]:
    """Neighbouring requests that differ in prompt and seed alone, at most `size` together, with the first's index."""
    groups: list[tuple[int, list[Request]]] = []
    for i, request in enumerate(requests):
        last = groups[-1][1] if groups else []
        alike = last and _settings(last[0]) == _settings(request)
        if alike and len(last) < size:
            last.append(request)
        else:
            groups.append((i, [request]))
    return groups


def _settings(request: Request) -> Request:
    """What the requests of a batch have in common, that they begin with images included."""
    return replace(request, prompt="", negative_prompt="", seed=0, fps=1, image=request.image and "")


def _cache(pipeline: VideoPipeline, words: list[str], first: Request) -> Cache:
    """The cache that --cache asks for; mag is measured on the first clip, which is sampled twice."""
    cache = Cache.parse(words)
    if cache.kind != "mag":
        return cache
    tqdm.write("cache mag: sampling the first clip once without it, to measure how updates grow")
    with calibrated(pipeline.transformer) as ratios:
        _run(pipeline, [first], None, Tally())
    return replace(cache, ratios=tuple(ratios))


def _run(pipeline: VideoPipeline, group: list[Request], cache: Cache | None, tally: Tally) -> list[video.Clip]:
    """Clips of requests with common settings. Each has its own generator, so that its neighbours do not matter."""
    first, own = group[0], pipeline.scheduler
    if first.scheduler is not None:
        pipeline.scheduler = build_scheduler(first.scheduler, pipeline.objective)
    set_steps(pipeline.scheduler, first.num_inference_steps, pipeline.objective.path, "cpu")
    with caching(pipeline, cache, len(pipeline.scheduler.timesteps), tally):
        frames = pipeline.clips(
            [request.prompt for request in group],
            [request.seed for request in group],
            [request.negative_prompt for request in group],
            **_common(group),
        )
    pipeline.scheduler = own
    return [video.Clip(clip, request.fps) for clip, request in zip(frames, group, strict=True)]


def _common(group: list[Request]) -> dict[str, Any]:
    """Options of a call for requests with common settings."""
    names = ("num_frames", "height", "width", "num_inference_steps", "guidance_scale")
    images = [read_image(r.image, r.height, r.width) for r in group if r.image is not None]
    image = torch.stack(images) if images else None  # [B, 1, 3, H, W]
    return {"image": image, **{name: getattr(group[0], name) for name in names}}


def _streams(pipeline: VideoPipeline, request: Request) -> bool:
    """Whether a clip is made chunk by chunk: it is longer than those of training, and the model knows how."""
    return request.num_frames > pipeline.config.sampling["num_frames"] and pipeline.stream_refusal() is None


def _stream(pipeline: VideoPipeline, group: list[Request], index: int, out: Path, args: Namespace) -> list[Path]:
    """Clips of requests with common settings, each written as its chunks are made; returns their files."""
    first, own = group[0], pipeline.scheduler
    if first.scheduler is not None:
        pipeline.scheduler = build_scheduler(first.scheduler, pipeline.objective)
    chunks = pipeline.stream(
        [request.prompt for request in group],
        [request.negative_prompt for request in group],
        generator=[torch.Generator().manual_seed(request.seed) for request in group],
        chunk_frames=args.chunk_frames,
        output_type="pt",
        **_common(group),
    )
    names = [f"{i:03d}-seed{request.seed}" for i, request in enumerate(group, start=index)]
    with ExitStack() as until_whole:
        writers = [video.writer(out / f"{name}.mp4", r.fps) for name, r in zip(names, group, strict=True)]
        add = [until_whole.enter_context(writer) for writer in writers]
        bar = until_whole.enter_context(tqdm(total=first.num_frames, desc="streaming", unit="frame", leave=False))
        for chunk in chunks:  # [B, T, 3, H, W] in [0, 1]
            for add_to, frames in zip(add, (chunk.float().cpu() * 255).round().to(torch.uint8), strict=True):
                add_to(frames)
            bar.update(chunk.shape[1])
    pipeline.scheduler = own
    for name, request in zip(names, group, strict=True):
        _write_settings(out / f"{name}.json", request, args, chunk_frames=args.chunk_frames)
    return [out / f"{name}.mp4" for name in names]


def _write(out: Path, index: int, request: Request, clip: video.Clip, args: Namespace) -> Path:
    """The clip in every form asked for, and its settings; returns the mp4 where there is one."""
    name = f"{index:03d}-seed{request.seed}"
    forms = {"mp4": out / f"{name}.mp4", "gif": out / f"{name}.gif", "frames": out / name}
    written = [forms[form] for form in forms if form in args.output] or [forms["mp4"]]
    for path in written:
        if path.is_dir():
            shutil.rmtree(path)  # frames of an earlier call
        video.write(path, clip)
    _write_settings(out / f"{name}.json", request, args)
    return written[0]


def _write_settings(path: Path, request: Request, args: Namespace, **more: Any) -> None:
    settings = {**asdict(request), "run": str(args.run), "weights": args.weights, **more}
    content = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    path.write_text(content, encoding="utf-8", errors="backslashreplace")
