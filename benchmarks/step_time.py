"""CPU time of a training step for every cell of the studies in configs/ablations, beside its base's.

    python benchmarks/step_time.py configs/ablations/{plan,pattern,normaliser,sink,reuse,support}.yaml

Forward and backward of the transformer on random latents, one thread, the config's batch and precision; medians of 7.
Cells and their base take turns, so that a slow spell of the machine meets both. Writes benchmarks/results/step_time.json;
cells of studies that are not named stay as they were.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from stgen import build, codec, schema
from stgen.lab import study

RESULTS = Path(__file__).parent / "results" / "step_time.json"
TEXT_TOKENS, TEXT_WIDTH = 8, 128


class Step:
    """A model and its inputs; a call is one forward and backward."""

    def __init__(self, cfg: schema.Config):
        torch.manual_seed(0)
        component = codec.as_codec(build.build_codec(cfg))
        shape = component.latent_shape(cfg.data.num_frames, cfg.data.height, cfg.data.width)
        self.model: Any = build.build_transformer(cfg, shape, TEXT_WIDTH)
        batch = cfg.train.train_batch_size
        self.inputs = torch.randn(batch, *shape), 1000 * torch.rand(batch), torch.randn(batch, TEXT_TOKENS, TEXT_WIDTH)
        self.bf16 = cfg.train.mixed_precision == "bf16"

    def __call__(self) -> float:
        """Seconds of CPU time."""
        start = time.thread_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            output = self.model(*self.inputs, return_dict=False)[0]
        output.float().square().mean().backward()
        self.model.zero_grad()
        return time.thread_time() - start


def compare(cell: Step, base: Step, repeats: int = 7) -> tuple[float, float]:
    """Medians of a cell's and its base's seconds, taken in turns."""
    for step in (cell, base):
        step()
    pairs = [(cell(), base()) for _ in range(repeats)]
    ours, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
    return ours, theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cells = json.loads(RESULTS.read_text())["cells"] if RESULTS.is_file() else {}
    for path in args.studies:
        base, *variants = study.load(path, [])
        base_step = Step(base.cfg)
        for cell in tqdm(variants, desc=path.stem, unit="cell"):
            ours, theirs = compare(Step(cell.cfg), base_step)
            cells[f"{path.stem}/{cell.name}"] = {"ms": ours * 1e3, "base_ms": theirs * 1e3, "ratio": ours / theirs}
            tqdm.write(
                f"{path.stem}/{cell.name:<30} {ours * 1e3:7.0f} ms  {ours / theirs:5.2f} of {study.read(path).base}"
            )
    machine = {"device": f"{platform.processor() or platform.machine()}, 1 thread", "torch": torch.__version__}
    RESULTS.write_text(json.dumps({**machine, "cells": dict(sorted(cells.items()))}, indent=1) + "\n")


if __name__ == "__main__":
    main()
