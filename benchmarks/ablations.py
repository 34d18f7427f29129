"""Train every cell of the studies in configs/ablations for a few steps and write down what came out.

    python benchmarks/ablations.py configs/ablations/{plan,pattern,normaliser,sink,reuse,support}.yaml

`stgen ablate` compares cells with several seeds under equal budgets; this is the first look, one seed and few steps.
Cells run as processes of one thread each. Finished ones are not run again, so it may be stopped at any time. Results go
to benchmarks/results/ablations.json: held-out loss, and FLOPs of a step as executed and as dense attention in the same
layout would cost. --table prints them as Markdown and runs nothing.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from stgen.lab import study

RESULTS = Path(__file__).parent / "results" / "ablations.json"


def run(cell: study.Cell, path: Path, folder: Path, steps: int) -> dict:
    """Train a cell unless its folder holds the summary of as many steps; returns what it reached."""
    summary = folder / "summary.json"
    if not summary.is_file():
        base = path.parent / study.read(path).base
        change = [f"{key}={json.dumps(value)}" for key, value in cell.changes.items()]
        fixed = [f"run.output_dir={folder}", f"train.max_train_steps={steps}", "log.wandb=disabled"]
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f"{folder.name}.log").open("w") as log:
            command = [sys.executable, "-m", "stgen", "train", str(base), *change, *fixed]
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=env, check=True)
    found = json.loads(summary.read_text())
    return {
        "key": cell.key,
        "value": cell.value if len(cell.changes) < 2 else dict(cell.changes),
        "held_out_loss": found["loss"]["held_out"],
        "accuracy": found.get("accuracy"),
        "parameters": found["parameters"],
        "gflop_per_step": found["flops_per_step"] / 1e9,
        "dense_gflop_per_step": found["dense_flops_per_step"] / 1e9,
        "steps": found["steps"],
    }


def table(studies: list[Path]) -> str:
    """A row for each variant: its value, held-out loss beside the base's, FLOPs of a step beside the base's."""
    cells = json.loads(RESULTS.read_text())["cells"]
    rows = ["| variant | value | held-out loss | against base | GFLOP a step |", "|---|---|---|---|---|"]
    for path in studies:
        stem = Path(study.read(path).base).stem
        base = cells[stem]
        rows.append(f"| {stem} | | {base['held_out_loss']:.4f} | | {base['gflop_per_step']:.1f} |")
        for name, cell in cells.items():
            if name.startswith(f"{path.stem}/"):
                value = json.dumps(cell["value"]).replace('"', "").replace("|", "\\|")
                change = cell["held_out_loss"] / base["held_out_loss"] - 1
                rows.append(
                    f"| {name.split('/')[1]} | `{value}` | {cell['held_out_loss']:.4f} | {change:+.1%} | "
                    f"{cell['gflop_per_step']:.1f} |"
                )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--table", action="store_true", help="print the results as Markdown")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablations"), help="where the run folders go")
    args = parser.parse_args()
    if args.table:
        return print(table(args.studies))
    jobs = {}
    for path in args.studies:
        for cell in study.load(path, []):
            jobs[f"{path.stem}/{cell.name}" if cell.key else Path(study.read(path).base).stem] = (cell, path)
    results = json.loads(RESULTS.read_text())["cells"] if RESULTS.is_file() else {}
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(jobs), desc="cells", unit="cell") as bar:

        def finish(name: str) -> None:
            cell, path = jobs[name]
            try:
                results[name] = run(cell, path, args.runs / name.replace(" ", "-"), args.steps)
                bar.write(f"{name:<36} loss {results[name]['held_out_loss']:.4f}")
            except subprocess.CalledProcessError:
                bar.write(f"{name} failed; see {args.runs / name.replace(' ', '-')}.log")
            bar.update()

        list(pool.map(finish, jobs))
    machine = {"device": f"{platform.processor() or platform.machine()}, 1 thread a cell", "torch": torch.__version__}
    RESULTS.write_text(json.dumps({**machine, "cells": dict(sorted(results.items()))}, indent=1) + "\n")


if __name__ == "__main__":
    main()
