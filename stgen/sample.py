"""Sampling: a run folder and prompts in; clips, their settings and a contact sheet out."""

import json
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from stgen import build, dataset, lora, ranks, text, video
from stgen.caches import Cache, Tally, caching, calibrated
from stgen.codec import PatchPCA, Pixels
from stgen.logger import Logger
from stgen.pipeline import VideoPipeline, build_scheduler, set_steps
from stgen.requests import Request, SampleError, bad_image, check_image_time, read_requests

PATIENCE = 24 * 3600.0  # seconds that a rank waits for the others' clips


def sample(args: Namespace) -> list[Path]:
    """Sample what the command line asks for; returns the files of the clips.

    Under torchrun every rank calls it and makes its share of the batches, each of which is that of a single process.
    """
    diffusers.utils.logging.disable_progress_bar()  # of loading, which takes a moment; sampling has its own
    cuda = args.device != "cpu" and torch.cuda.is_available()
    if args.device == "cuda" and not cuda:
        raise SampleError("--device cuda: PyTorch finds no CUDA device; say auto or cpu")
    device = torch.device("cuda" if cuda else "cpu")
    with ranks.together(device, timeout=PATIENCE):
        return _sample(args, device)


def _sample(args: Namespace, device: torch.device) -> list[Path]:
    pipeline = _load(args)
    if args.lora is not None:
        pipeline.load_lora_weights(args.lora)
        lora.merge(pipeline.transformer, args.lora_scale)
    _place(pipeline, args, device)
    pipeline.set_progress_bar_config(disable=True)
    requests = read_requests(args, pipeline.config.sampling)
    check_requests(pipeline, requests)
    check_streams(pipeline, requests, args)
    warn_of_unknown_words(pipeline, requests)
    cache = _cache(pipeline, args.cache, requests[0]) if args.cache else None
    tally = Tally()

    out, logger = _open_folder(args)
    try:
        files, clips = _make(pipeline, requests, out, args, cache, tally)
        files = sorted(Path(file) for made in ranks.gather([str(file) for file in files]) for file in made)
        _show(logger, out, files, clips, requests, args)
    finally:
        if logger is not None:
            logger.finish()
    if logger is None:
        return files
    if cache is not None:
        print(f"cache {cache.kind}: {tally}")
    print(f"{len(files)} clips in {out}" + (f"; {files[0].name} first" if len(files) > 1 else f": {files[0].name}"))
    print(logger.where)
    return files


def _make(
    pipeline: VideoPipeline, requests: list[Request], out: Path, args: Namespace, cache: Cache | None, tally: Tally
) -> tuple[list[Path], list[video.Clip]]:
    """Sample and write this rank's share; its files, and where a sheet is asked for its clips."""
    files, clips = [], []
    own = _batches(requests, _batch_size(args, len(requests)))[ranks.rank() :: ranks.size()]
    with tqdm(total=sum(len(group) for _, group in own), desc="sampling", unit="clip") as bar:
        for first, group in own:
            if _streams(pipeline, group[0]):
                files += _stream(pipeline, group, first, out, args)
                bar.update(len(group))
                continue
            made = _run(pipeline, group, cache, tally)
            for i, (request, clip) in enumerate(zip(group, made, strict=True), start=first):
                files.append(_write(out, i, request, clip, args))
                clips += [clip] if "sheet" in args.output else []
                bar.update()
    return files, clips


def _show(
    logger: Logger | None,
    out: Path,
    files: list[Path],
    clips: list[video.Clip],
    requests: list[Request],
    args: Namespace,
) -> None:
    """Draw the sheet that is asked for, and log it and the clips."""
    captions = [f"{request.prompt}  (seed {request.seed})" for request in requests]
    if "sheet" in args.output:
        video.contact_sheet(out / "contact_sheet.png", clips, captions)
    if logger is not None and "sheet" in args.output:
        logger.image(0, "samples/contact_sheet", out / "contact_sheet.png")
    if logger is not None and files[0].suffix == ".mp4":
        logger.videos(0, "samples/videos", list(zip(files, captions, strict=True)))


def _open_folder(args: Namespace) -> tuple[Path, Logger | None]:
    """Where the clips go, made if need be, and the logger, which the first rank has."""
    home = args.run.parent if args.run.name.startswith("checkpoint-") else args.run
    run = home.resolve().name
    out = args.output_dir or (home / "samples" if args.run.exists() else Path("samples") / run)  # of a hub id here
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not ranks.is_first():
            return out, None
        return out, Logger(
            out, vars(args), mode=args.wandb, project="stgen", group=run, name=f"{run}-samples", job_type="sample"
        )
    except OSError as error:
        raise SampleError(f"--output_dir: {out} cannot be written to: {error.strerror}") from None


def _batch_size(args: Namespace, clips: int) -> int:
    """As asked for; else 8, under several ranks fewer where some of them would be idle."""
    return args.batch_size or min(8, -(-clips // ranks.size()))


def _place(pipeline: VideoPipeline, args: Namespace, device: torch.device) -> None:
    """Put the parts on the device, or have them come there when they are needed. Raises SampleError."""
    if args.vae_tiling:
        if not hasattr(pipeline.codec, "enable_tiling"):
            raise SampleError(f"--vae_tiling: {type(pipeline.codec).__name__} does not decode in tiles; leave it out")
        pipeline.codec.enable_tiling()
    if args.offload == "none":
        pipeline.to(device)
        return
    if device.type == "cpu":
        raise SampleError(
            "--offload: keeps parts in memory that a GPU does not need at the moment; here is no GPU, leave it out"
        )
    match args.offload:
        case "model":
            pipeline.enable_model_cpu_offload(device=device)
        case "sequential":
            pipeline.enable_sequential_cpu_offload(device=device)
        case "group":
            small = ["codec"] if isinstance(pipeline.codec, PatchPCA | Pixels) else []  # not called as a layer
            pipeline.enable_group_offload(onload_device=device, offload_type="leaf_level", exclude_modules=small)


def _load(args: Namespace) -> VideoPipeline:
    try:
        return build.load_pipeline(args.run, args.weights)
    except (OSError, SafetensorError) as error:
        raise SampleError(f"{args.run} cannot be loaded: {str(error).strip().splitlines()[0]}") from None


# ------------------------------------------------------------------------------------------------------- requests


def check_requests(pipeline: VideoPipeline, requests: list[Request]) -> None:
    """Refuse sizes and schedulers that this model cannot take, before anything is sampled."""
    for request in dict.fromkeys(_settings(request) for request in requests):
        pipeline.latent_shape(request.num_frames, request.height, request.width)
        build_scheduler(request.scheduler, pipeline.objective)
    for request in requests:
        check_image_time(request, pipeline.objective.frame_times)
        if request.image is not None:
            read_image(request.image, request.height, request.width)


def check_streams(pipeline: VideoPipeline, requests: list[Request], args: Namespace) -> None:
    """Of clips longer than those of training: refuse what a stream cannot do, say why there is none where one is meant."""
    trained, model = _trained_frames(pipeline), pipeline.transformer
    reason = pipeline.stream_refusal()
    if reason is not None and any(request.chunk_frames is not None for request in requests):
        raise SampleError(f"--chunk_frames: {reason}")
    for request in dict.fromkeys(map(_settings, requests)):
        if request.chunk_frames is not None:
            _check_chunk(pipeline, request)
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


def _check_chunk(pipeline: VideoPipeline, request: Request) -> None:
    """Raise SampleError that names the chunks which the model takes, in frames of the clip."""
    _, frames, rows, columns = pipeline.latent_shape(request.num_frames, request.height, request.width)
    joined, asked = request.num_frames // frames, request.chunk_frames or 0

    def suits(chunk: int) -> bool:
        try:
            pipeline.transformer.new_past(1, (chunk // joined, rows, columns))
        except ValueError:
            return False
        return True

    if asked % joined == 0 and suits(asked):
        return
    best = pipeline.transformer.chunk_frames * joined
    most = min(_trained_frames(pipeline), request.num_frames)
    others = [c for c in range(joined, most + 1, joined) if c != best and suits(c)]
    more = f"; {', '.join(map(str, others[:8]))} would do too" if others else ""
    raise SampleError(f"--chunk_frames: {asked} frames do not suit this model; write {best}{more}")


def read_image(path: str, height: int, width: int) -> Tensor:
    """An image scaled until it covers the clip, its centre cut out: [1, 3, height, width] in [0, 1]. Raises SampleError."""
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise bad_image(path, error) from None
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
    with _scheduler(pipeline, group[0].scheduler):
        set_steps(pipeline.scheduler, group[0].num_inference_steps, pipeline.objective.path, "cpu")
        with caching(pipeline, cache, len(pipeline.scheduler.timesteps), tally):
            frames = pipeline.clips(
                [request.prompt for request in group],
                [request.seed for request in group],
                [request.negative_prompt for request in group],
                **_common(group),
            )
    return [video.Clip(clip, request.fps) for clip, request in zip(frames, group, strict=True)]


@contextmanager
def _scheduler(pipeline: VideoPipeline, name: str | None) -> Iterator[None]:
    """Within it the pipeline has the scheduler of that name; None: its own."""
    own = pipeline.scheduler
    if name is not None:
        pipeline.scheduler = build_scheduler(name, pipeline.objective)
    try:
        yield
    finally:
        pipeline.scheduler = own


def _common(group: list[Request]) -> dict[str, Any]:
    """Options of a call for requests with common settings."""
    names = ("num_frames", "height", "width", "num_inference_steps", "guidance_scale")
    images = [read_image(r.image, r.height, r.width) for r in group if r.image is not None]
    image = torch.stack(images) if images else None  # [B, 1, 3, H, W]
    return {"image": image, **{name: getattr(group[0], name) for name in names}}


def _streams(pipeline: VideoPipeline, request: Request) -> bool:
    """Whether a clip is made chunk by chunk: it is longer than those of training, and the model knows how."""
    return request.num_frames > _trained_frames(pipeline) and pipeline.stream_refusal() is None


def _trained_frames(pipeline: VideoPipeline) -> int:
    """Frames of a training clip; where a pipeline was saved without, no clip is longer."""
    return pipeline.config.sampling.get("num_frames", sys.maxsize)


def _stream(pipeline: VideoPipeline, group: list[Request], index: int, out: Path, args: Namespace) -> list[Path]:
    """Clips of requests with common settings, each written as its chunks are made; returns their files."""
    first = group[0]
    chunks = pipeline.stream(
        [request.prompt for request in group],
        [request.negative_prompt for request in group],
        generator=[torch.Generator().manual_seed(request.seed) for request in group],
        chunk_frames=first.chunk_frames,
        output_type="pt",
        **_common(group),
    )
    names = [f"{i:03d}-seed{request.seed}" for i, request in enumerate(group, start=index)]
    with ExitStack() as until_whole:
        until_whole.enter_context(_scheduler(pipeline, first.scheduler))
        writers = [video.writer(out / f"{name}.mp4", r.fps) for name, r in zip(names, group, strict=True)]
        add = [until_whole.enter_context(writer) for writer in writers]
        bar = until_whole.enter_context(tqdm(total=first.num_frames, desc="streaming", unit="frame", leave=False))
        for chunk in chunks:  # [B, T, 3, H, W] in [0, 1]
            for add_to, frames in zip(add, (chunk.float().cpu() * 255).round().to(torch.uint8), strict=True):
                add_to(frames)
            bar.update(chunk.shape[1])
    for name, request in zip(names, group, strict=True):
        _write_settings(out / f"{name}.json", request, args, chunk_frames=request.chunk_frames)
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
    settings = {key: value for key, value in asdict(request).items() if key != "chunk_frames"}
    settings |= {"run": str(args.run), "weights": args.weights, **more}
    if args.lora is not None:
        settings |= {"lora": str(args.lora), "lora_scale": args.lora_scale}
    content = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    path.write_text(content, encoding="utf-8", errors="backslashreplace")
