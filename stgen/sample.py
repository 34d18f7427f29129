"""Sampling: a run folder and prompts in; clips, their settings and a contact sheet out."""

import csv
import json
from argparse import Namespace
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from stgen import build, text, video
from stgen.logger import Logger
from stgen.pipeline import VideoPipeline, build_scheduler


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


def sample(args: Namespace) -> list[Path]:
    """Sample what the command line asks for; returns the files of the clips."""
    pipeline = build.load_pipeline(args.run, args.weights)
    cuda = args.device != "cpu" and torch.cuda.is_available()
    if args.device == "cuda" and not cuda:
        raise SampleError("--device cuda: PyTorch finds no CUDA device; say auto or cpu")
    pipeline.to("cuda" if cuda else "cpu")
    pipeline.set_progress_bar_config(disable=True)
    requests = read_requests(args, pipeline.config.sampling)
    warn_of_unknown_words(pipeline, requests)

    out = args.output_dir or args.run / "samples"
    out.mkdir(parents=True, exist_ok=True)
    run = args.run.resolve().name
    logger = Logger(
        out, {**vars(args), "run": str(args.run)}, mode=args.wandb, project="stgen", group=run, name=f"{run}-samples",
        job_type="sample", run_id=None, resume_step=None,
    )  # fmt: skip
    files, clips = [], []
    with tqdm(total=len(requests), desc="sampling", unit="clip") as bar:
        for first, group in _batches(requests, args.batch_size):
            for i, (request, clip) in enumerate(zip(group, _run(pipeline, group), strict=True), start=first):
                files.append(_write(out, i, request, clip, args))
                clips.append(clip)
                bar.update()
    captions = [f"{request.prompt}  (seed {request.seed})" for request in requests]
    if "sheet" in args.output:
        video.contact_sheet(out / "contact_sheet.png", clips, captions)
        logger.image(0, "samples/contact_sheet", out / "contact_sheet.png")
    logger.videos(0, "samples/videos", list(zip([f for f in files if f.suffix == ".mp4"], captions, strict=False)))
    logger.finish()
    print(f"{len(files)} clips in {out}" + (f"; {files[0].name} first" if len(files) > 1 else f": {files[0].name}"))
    print(f"W&B: {logger.where}")
    return files


# ------------------------------------------------------------------------------------------------------- requests


def read_requests(args: Namespace, trained: dict[str, Any]) -> list[Request]:
    """Every clip that the arguments ask for: prompts in order, the clips of a prompt by seed."""
    names = [field.name for field in fields(Request) if field.name not in ("prompt", "seed")]
    given = {name: getattr(args, name) for name in names}
    given = {name: trained.get(name) if value is None else value for name, value in given.items()}
    rows = [{"prompt": prompt} for prompt in args.prompt or []]
    rows += read_prompt_file(args.prompt_file) if args.prompt_file else []
    requests = []
    for row in rows:
        try:
            options = {name: _convert(name, value) for name, value in row.items() if value not in (None, "")}
        except ValueError as error:
            raise SampleError(f"{args.prompt_file}: {error}") from None
        seeds = [options.pop("seed")] if "seed" in options else args.seed
        if len(seeds) == 1:
            seeds = [seeds[0] + i for i in range(args.num_videos_per_prompt)]
        base = Request(**{"prompt": "", "seed": 0, **given, **options})
        requests += [replace(base, seed=seed) for seed in seeds]
    if not requests:
        raise SampleError(f"{args.prompt_file}: no prompt in it; write one a line")
    return requests


def read_prompt_file(path: Path) -> list[dict[str, Any]]:
    """Rows of a .txt, .csv or .jsonl file, each with a prompt and perhaps other options.

    Raises SampleError naming the file and the line of a row that cannot be read.
    """
    if not path.is_file():
        raise SampleError(f"--prompt_file: {path} is not a file")
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    if path.suffix == ".csv":
        rows = [(i, row) for i, row in enumerate(csv.DictReader(lines), start=2)]
    elif path.suffix == ".jsonl":
        rows = [(i, _json(path, i, line)) for i, line in enumerate(lines, start=1) if line.strip()]
    else:
        return [{"prompt": line.strip()} for line in lines if line.strip() and not line.lstrip().startswith("#")]
    known = {field.name for field in fields(Request)}
    for i, row in rows:
        if not isinstance(row, dict) or "prompt" not in row:
            raise SampleError(f"{path}:{i}: no prompt in this row")
        if unknown := sorted(str(key) for key in row if key not in known):
            raise SampleError(f"{path}:{i}: unknown column {unknown[0]!r}; known are {', '.join(sorted(known))}")
    return [row for _, row in rows]


def _json(path: Path, line: int, content: str) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise SampleError(f"{path}:{line}: not JSON: {error}") from None


def _convert(name: str, value: Any) -> Any:
    """A column's value in the type of its option."""
    types = {"seed": int, "num_inference_steps": int, "num_frames": int, "height": int, "width": int}
    kind = types.get(name) or (float if name in ("guidance_scale", "fps") else str)
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} should be {'a whole number' if kind is int else 'a number'}, got {value!r}") from None


def warn_of_unknown_words(pipeline: VideoPipeline, requests: list[Request]) -> None:
    """Say which words a learned encoder never saw: it treats them all alike."""
    if not isinstance(pipeline.text_encoder, text.LearnedTextEncoder):
        return
    prompts = [request.prompt for request in requests] + [request.negative_prompt for request in requests]
    unknown = dict.fromkeys(word for prompt in prompts for word in pipeline.text_encoder.unknown_words(prompt))
    if unknown:
        tqdm.write(
            f"warning: no training caption held {', '.join(map(repr, unknown))}; such words say nothing to this model"
        )


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
    return replace(request, prompt="", negative_prompt="", seed=0, fps=1)


def _run(pipeline: VideoPipeline, group: list[Request]) -> list[video.Clip]:
    """Clips of requests with common settings. Each has its own generator, so that its neighbours do not matter."""
    first = group[0]
    if first.scheduler is not None:
        pipeline.scheduler = build_scheduler(first.scheduler, pipeline.objective)
    frames = pipeline(
        [request.prompt for request in group],
        [request.negative_prompt for request in group],
        num_frames=first.num_frames,
        height=first.height,
        width=first.width,
        num_inference_steps=first.num_inference_steps,
        guidance_scale=first.guidance_scale,
        generator=[torch.Generator().manual_seed(request.seed) for request in group],
        output_type="pt",
    ).frames  # [B, T, 3, H, W] in [0, 1]
    frames = (frames.float().cpu() * 255).round().to(torch.uint8)
    return [video.Clip(clip, request.fps) for clip, request in zip(frames, group, strict=True)]


def _write(out: Path, index: int, request: Request, clip: video.Clip, args: Namespace) -> Path:
    """The clip in every form asked for, and its settings; returns the first file."""
    name = f"{index:03d}-seed{request.seed}"
    forms = {"mp4": out / f"{name}.mp4", "gif": out / f"{name}.gif", "frames": out / name}
    written = [forms[form] for form in args.output if form in forms] or [forms["mp4"]]
    for path in written:
        video.write(path, clip)
    settings = {**asdict(request), "run": str(args.run), "weights": args.weights}
    (out / f"{name}.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return written[0]
