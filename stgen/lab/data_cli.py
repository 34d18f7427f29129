"""The options of `stgen data check|cache|shapes`. Imports nothing heavy before they are read."""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from stgen import schema

CACHE = """\
Decode and encode what a config trains on, once, and keep it: the latents of every video by the config's codec, and the
embeddings of every caption (and of the empty one, for dropout, and validation's prompts) by a pretrained text encoder.
Training with data.cache: disk then reads them; it loads no text encoder, and losses are bit for bit those of training
without a cache from the same clips on the same device. Written to data.cache_dir as safetensors shards with JSON indices.

Kill it at any time: the same command goes on, having lost at most a minute. Run it again whenever something has changed:
files, captions, sizes or codec that are no longer the same are named and encoded anew, the rest is kept. Training refuses
a cache that is stale or unfinished, in a line that says what to run.

With data.clip or data.crop random, training without a cache cuts another clip in each epoch; the cache holds
data.cache_clips of every video (1 unless the config says more), drawn by run.seed: those of the first epochs, which later
epochs, and runs of other seeds, take turns with.
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command line; ends the program for one that cannot be meant."""
    argv = list(sys.argv[1:] if argv is None else argv)
    commands = {"check": _check, "cache": _cache, "shapes": _shapes}
    front = argparse.ArgumentParser(
        prog="stgen data",
        description="What a run trains on. check: count and judge videos and captions, and show some. cache: encode clips and "
        "captions once, for data.cache: disk. shapes: render the built-in captioned videos. `stgen data check --help` and "
        "the like tell the rest.",
    )
    front.add_argument("command", choices=tuple(commands), help="what to do")
    command = front.parse_args(argv[:1]).command
    return commands[command]().parse_intermixed_args(argv[1:], argparse.Namespace(command=command))


def takes_config(args: argparse.Namespace) -> bool:
    """Whether the command was given a config file, not a folder."""
    if args.command == "shapes":
        return False
    return args.command == "cache" or not args.config.is_dir()


def _check() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stgen data check",
        description="Look at a folder of videos, or at what a config would train on: how many, how long, how large and how fast "
        "they are, what the captions are like, how many clips of each size they give, which files cannot be used and why. "
        "Prints a page and writes check.json (every number) and contact_sheet.png (clips with their captions).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("config", type=Path, metavar="CONFIG|FOLDER", help="a YAML file, or a folder of videos")
    add("overrides", nargs="*", metavar="key=value", help="CONFIG: values that replace those of the file")
    add("--output_dir", type=Path, help="where to write (default: FOLDER-check beside a folder; of a config, its "
        "run.output_dir with -data behind)")  # fmt: skip
    add("--clips", type=_count, default=12, help="clips on the contact sheet, spread over the folder")
    return parser


def _cache() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stgen data cache",
        description=CACHE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("config", type=Path, metavar="CONFIG", help="a YAML file, such as configs/quickstart.yaml")
    add("overrides", nargs="*", metavar="key=value", help="values that replace those of the file")
    add("--jobs", type=_count, default=1, help="processes that encode, each with a codec of its own; on several CUDA devices "
        "they take turns (default: 1)")  # fmt: skip
    add("--prune", action="store_true", help="then remove what this config does not use: entries of other settings, and of "
        "files as they were before")  # fmt: skip
    return parser


def _shapes() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stgen data shapes",
        description="Render captioned clips of coloured shapes that move in named directions: a folder of mp4 files with "
        "metadata.csv, to train on with data.train_data_dir=FOLDER.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, built_in = parser.add_argument, schema.Shapes()
    add("folder", type=Path, metavar="FOLDER", help="where to write")
    add("--clips", type=_count, default=built_in.clips, help="how many")
    add("--num_frames", type=_count, default=16, help="frames of a clip (8 a second)")
    add("--height", type=_count, default=48, help="height in pixels")
    add("--width", type=_count, default=48, help="width in pixels")
    add("--held_out", type=int, default=built_in.held_out, choices=range(13), metavar="0..12", help="combinations of colour, "
        "shape and direction that are never rendered")  # fmt: skip
    add("--held_out_seed", type=int, default=built_in.held_out_seed, help="chooses them")
    add("--seed", type=int, default=0, help="chooses size, place, speed and ground of each clip")
    return parser


def run(args: argparse.Namespace, cfg: schema.Config | None) -> int:
    """Do what was asked; returns the exit status."""
    if args.command == "shapes":
        return _render(args)
    if args.command == "check":
        from stgen.lab import data_check

        data_check.check(cfg, args.config, args.output_dir, args.clips)
        return 0
    from stgen.lab import data_cache

    assert cfg is not None
    stopped = data_cache.cache(cfg, args.jobs, args.prune)
    return 128 + signal.Signals[stopped] if stopped else 0


def _render(args: argparse.Namespace) -> int:
    from stgen import shapes

    recipe = {name: getattr(args, name) for name in ("clips", "num_frames", "height", "width", "seed")}
    split = shapes.write_folder(args.folder, held_out=args.held_out, held_out_seed=args.held_out_seed, **recipe)
    print(f"{args.folder}: {args.clips} clips of {len(split.seen)} combinations, {len(split.held_out)} held out")
    print(f"look at it: stgen data check {args.folder}\ntrain on it: data.train_data_dir={args.folder}")
    return 0


def _count(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} should be at least 1")
    return number
