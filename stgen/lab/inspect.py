"""Looking at attention: what a config's plan may attend and costs, and what a trained run's heads attend in fact."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from stgen import build, checkpoint, codec, config, schema, source
from stgen.lab import inspect_report as report
from stgen.lab.inspect_advice import THRESHOLDS, advice
from stgen.lab.inspect_plan import describe_plan
from stgen.lab.inspect_statistics import ClipIn, mixers_of, study
from stgen.pipeline import VideoPipeline
from stgen.step import generator
from stgen.tokens import grid_of


class InspectError(ValueError):
    """Something that cannot be inspected; one sentence that says what to do."""


def inspect_config(cfg: schema.Config, out: Path) -> list[Path]:
    """Draw and describe the plan of a config: no training, and no weights are allocated for the model."""
    captions = source.known_captions(cfg)
    component = build.build_codec(cfg)
    _, _, text_width = build.build_text(cfg, captions)
    shape = codec.as_codec(component).latent_shape(cfg.data.num_frames, cfg.data.height, cfg.data.width)
    grid = grid_of(tuple(shape[1:]), cfg.tokens.patch_size)
    with FakeTensorMode(allow_non_fake_inputs=True):
        transformer = build.build_transformer(cfg, shape, text_width)
    text_tokens = min(cfg.text.max_length, 1 + max((len(c.split()) for c in captions), default=0))
    make_folder(out)
    files = describe_plan(transformer, grid, text_tokens, out)
    print(f"pictures: {', '.join(map(str, files))}")
    return files


def inspect_run(args: Namespace) -> dict[str, Any]:
    """The same for a trained run, with statistics of its maps on clips of its data; returns what statistics.json holds."""
    diffusers.utils.logging.disable_progress_bar()
    pipeline, cfg, home = load_run(args.target, args.weights)
    if not cfg.model.pruning.is_exact:
        raise InspectError(
            f"{args.target}: maps are measured on all tokens and heads of a clip, but model.pruning leaves some out; inspect a "
            "run without it"
        )
    if not mixers_of(pipeline.transformer):
        raise InspectError(
            f"{args.target}: no mixer of its plan ({cfg.model.plan}) attends, so there are no maps to measure; inspect its "
            "config for the plan alone"
        )
    device = device_of(args.device)
    pipeline.to(device)
    pipeline.transformer.eval()
    out = args.output_dir or home / "inspect"
    make_folder(out)
    clips, files, of = clips_of(cfg, home, pipeline, args.clips, args.seed, device)
    shape = tuple(clips[0].latents.shape[2:])
    grid = grid_of(shape, cfg.tokens.patch_size)
    times = [(i + 0.5) / args.times for i in range(args.times)]
    with tqdm(total=len(clips) * len(times), desc="measuring maps", unit="pass") as bar:
        measured = study(pipeline.transformer, pipeline.objective, grid, clips, times, bar.update)
    pipeline.to("cpu")  # masks are drawn there
    drawn = describe_plan(pipeline.transformer, grid, clips[0].prompt.shape[1], out, measured.examples)
    drawn += report.draw_all(measured, out)
    suggestions = advice(measured)
    about = {"run": str(args.target), "weights": args.weights, "clips": files, "times": times, "seed": args.seed}
    result = {**about, **report.as_json(measured), "thresholds": THRESHOLDS, "suggestions": suggestions}
    (out / "statistics.json").write_text(json.dumps(report.finite(result), indent=1) + "\n", encoding="utf-8")
    print(f"\nmeasured on {len(clips)} {of} clips at {len(times)} times, in float32\n{report.in_words(measured)}")
    print(_suggestions_words(suggestions))
    print(f"\nevery head: {out / 'statistics.json'}\npictures: {', '.join(map(str, drawn))}")
    report.log(args, out, home, measured, drawn, suggestions)
    return result


def _suggestions_words(suggestions: list[str]) -> str:
    lines = [f"  - {line}" for line in suggestions] or ["  none: no number passed its threshold"]
    return "\n".join(
        [
            "\nsuggestions (they follow from these numbers; try each against a run without it)",
            *lines,
            f"  thresholds: {THRESHOLDS}",
            "  a mixer's keys hold for every layer that uses it; to change one layer, give it a mixer of its own in the plan",
        ]
    )


# ------------------------------------------------------------------------------------------------------------- loading


def load_run(target: Path, weights: str) -> tuple[VideoPipeline, schema.Config, Path]:
    """The pipeline, the config that it was trained under, and the run folder with the data."""
    try:
        pipeline = build.load_pipeline(target, weights)
    except (OSError, SafetensorError) as error:
        raise InspectError(f"{target} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    if (target / "manifest.json").is_file():
        state = checkpoint.load(target).state
        return pipeline, schema.Config.model_validate_json(json.dumps(state["config"])), target.parent
    for home in (target, target.resolve().parent):
        if (home / "config.yaml").is_file():
            return pipeline, config.load(home / "config.yaml", [], schema.Config), home
    raise InspectError(
        f"{target} is a saved pipeline without the config.yaml of its run beside it, so its data are not known; "
        "give the run folder"
    )


def device_of(name: str) -> torch.device:
    cuda = name != "cpu" and torch.cuda.is_available()
    if name == "cuda" and not cuda:
        raise InspectError("--device cuda: PyTorch finds no CUDA device; say auto or cpu")
    return torch.device("cuda" if cuda else "cpu")


def make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InspectError(f"--output_dir: {out} cannot be written to: {error.strerror}") from None


def clips_of(
    cfg: schema.Config, home: Path, pipeline: VideoPipeline, count: int, seed: int, device: torch.device
) -> tuple[list[ClipIn], list[str], str]:
    """Held-out clips of the run's data, training clips where none are held out: with noise and prompt of each."""
    folder, _ = source.open_folder(cfg, home)
    train, held_out = source.split_as_sampled(cfg, folder)
    pool, of = (held_out, "held-out") if held_out else (train, "training")
    order = torch.randperm(len(pool), generator=generator(seed, "inspect", "clips")).tolist()[:count]
    batch = source.Batch.read(folder.within(pool), [pool[i] for i in order], pipeline.codec, device)
    clips = []
    for i, latents in enumerate(batch.latents):
        noise = torch.randn(latents.shape, generator=generator(seed, "inspect", i)).to(device)
        with torch.no_grad():
            prompt, mask, *_ = pipeline.encode_prompt(batch.captions[i])
        clips.append(ClipIn(latents[None], noise[None], prompt, mask))
    return clips, batch.files, of
