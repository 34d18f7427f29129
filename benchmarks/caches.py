"""What reuse over denoising steps saves and what it changes: the same clips sampled without and with each cache.

    python benchmarks/caches.py RUN [--clips 64] [--cache KIND [NAME=VALUE ...]] ... [--json FILE]

For each cache: seconds of the network a clip (median of three rounds, in turns), calls of mixers and MLPs made, how far
the frames are from those without (mean absolute difference, of 255), and for runs on the built-in shapes the share of
clips of which the oracle reads the whole prompt.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from stgen import build, shapes
from stgen.caches import Cache, CacheError, Tally, caching, calibrated
from stgen.pipeline import VideoPipeline, set_steps

CACHES = (
    ["first_block", "threshold=0.05"], ["first_block", "threshold=0.15"], ["mag"], ["taylorseer", "every=2"],
    ["taylorseer", "every=3"], ["pab"], ["support", "every=4"],
)  # fmt: skip
ROUNDS, BATCH = 3, 16


def sampled(pipeline: VideoPipeline, prompts: list[str], cache: Cache | None) -> tuple[list[Tensor], float, Tally]:
    """Clips of the prompts with seeds 0, 1, ...; seconds a clip; calls."""
    clips, tally, began = [], Tally(), time.perf_counter()
    steps = pipeline.config.sampling["num_inference_steps"]
    set_steps(pipeline.scheduler, steps, pipeline.objective.path, "cpu")
    with caching(pipeline, cache, len(pipeline.scheduler.timesteps), tally):
        for i in range(0, len(prompts), BATCH):
            part = prompts[i : i + BATCH]
            clips += pipeline.clips(part, list(range(i, i + len(part))), [""] * len(part))
    return clips, (time.perf_counter() - began) / len(prompts), tally


def right(clips: list[Tensor], prompts: list[str]) -> float | None:
    """Share of clips of which the oracle reads the prompt, if it knows the prompts."""
    known = {combo.prompt: combo for combo in shapes.ALL}
    if not all(prompt in known for prompt in prompts):
        return None
    share: Any = shapes.accuracy(clips, [known[prompt] for prompt in prompts])["all"]
    return share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder or a saved pipeline")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument(
        "--cache", nargs="+", action="append", help="as of sample.py; may be repeated (default: all kinds)"
    )
    parser.add_argument("--json", type=Path, help="write the numbers there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = build.load_pipeline(args.run)
    pipeline.set_progress_bar_config(disable=True)
    split = shapes.split_of(args.run / "data")
    known = [combo.prompt for combo in split.seen] if split else [""]
    prompts = [known[i * 7 % len(known)] for i in range(args.clips)]

    rows = [{"cache": "none", "seconds": [], "cache_object": None}]
    with calibrated(pipeline.transformer) as ratios:
        sampled(pipeline, prompts[:1], None)
    for words in args.cache or CACHES:
        cache = Cache.parse(words)
        cache = Cache(cache.kind, cache.options, tuple(ratios)) if cache.kind == "mag" else cache
        rows.append({"cache": " ".join(words), "seconds": [], "cache_object": cache})
    plain: list[Tensor] = []
    for turn in range(ROUNDS):
        for row in tqdm(rows, desc=f"round {turn + 1} of {ROUNDS}", unit="cache"):
            if "refused" in row:
                continue
            try:
                clips, seconds, tally = sampled(pipeline, prompts, row["cache_object"])
            except CacheError as error:
                row["refused"] = str(error)
                continue
            plain = plain or clips
            row["seconds"].append(seconds)
            if turn == 0:
                row["calls"] = tally.made / tally.asked if tally.asked else 1.0
                pairs = zip(clips, plain, strict=True)
                row["difference"] = sum(float((a.float() - b.float()).abs().mean()) for a, b in pairs) / len(clips)
                row["right"] = right(clips, prompts)
    print(f"\n{'cache':<28}{'s a clip':>9}{'times faster':>14}{'calls':>8}{'difference':>12}{'right':>8}")
    base = median(rows[0]["seconds"])
    for row in rows:
        row.pop("cache_object")
        if "refused" in row:
            print(f"{row['cache']:<28}{row['refused']}")
            continue
        row["seconds"] = median(row["seconds"])
        share = "" if row["right"] is None else f"{row['right']:.0%}"
        print(
            f"{row['cache']:<28}{row['seconds']:>9.3f}{base / row['seconds']:>14.2f}{row['calls']:>8.0%}"
            f"{row['difference']:>12.2f}{share:>8}"
        )
    if args.json:
        machine = {"device": f"{platform.processor() or platform.machine()}, 1 thread", "torch": torch.__version__}
        args.json.write_text(
            json.dumps({**machine, "run": args.run.resolve().name, "clips": len(prompts), "rows": rows}, indent=1)
            + "\n"
        )


if __name__ == "__main__":
    main()
