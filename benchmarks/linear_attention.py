"""Time and memory of linear attention against the number of tokens, beside PyTorch's softmax attention.

    python benchmarks/linear_attention.py                                        # a minute on two cores
    python benchmarks/linear_attention.py --device cuda --json linear_attention.json
    python benchmarks/linear_attention.py --lengths 1024 4096 16384 --threads 1

A step is forward and backward over one sequence of random features and values in float32. `global` sees every key,
`frames` is block-causal with frames of --frame tokens, `softmax` is PyTorch's scaled_dot_product_attention up to
--softmax-up-to tokens. The exponent p of n^p is fitted by least squares through the logarithms of the longest lengths,
a factor of eight; constants weigh on the shorter. Memory is what the first whole step adds to the peak: on a CPU of the
resident set of a process that does nothing else, on CUDA of what PyTorch has allocated.
"""

import argparse
import json
import math
import multiprocessing
import resource
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm
from train_step import describe_machine, seconds_of

from stgen.ops.linear_attention import linear_attention

METHODS: dict[str, Callable[[Tensor, Tensor, Tensor, int], Tensor]] = {
    "global": lambda q, k, v, frame: linear_attention(q, k, v, impl="state"),
    "frames": lambda q, k, v, frame: linear_attention(q, k, v, chunk=frame, impl="state"),
    "softmax": lambda q, k, v, frame: scaled_dot_product_attention(q, k, v),
}


def measure(method: str, n: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step (median and quartiles) and bytes that the first one adds to the peak."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    shape = (1, args.heads, n, args.head_dim)
    inputs = [torch.rand(shape, device=device, requires_grad=True) for _ in range(3)]

    def step(places: int = n) -> None:
        q, k, v = (x[:, :, :places] for x in inputs)
        torch.autograd.grad(METHODS[method](q, k, v, args.frame).sum(), inputs)

    step(min(n, args.frame))  # loads what any step needs

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = peak_bytes(device)
    step()
    memory = peak_bytes(device) - before
    seconds = [seconds_of(step, device) for _ in range(args.repeats)]
    return {"method": method, "n": n, "seconds": statistics.quantiles(seconds, n=4), "bytes": memory}


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_apart(method: str, n: int, args: argparse.Namespace) -> dict[str, Any]:
    """On a CPU in a process of its own, whose peak no earlier case has raised."""
    if args.device != "cpu":
        return measure(method, n, args)
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(measure, method, n, args).result()


def exponent(lengths: list[int], values: list[float]) -> float:
    """p of the best n^p through the lengths within a factor of eight of the longest."""
    points = [(math.log(n), math.log(y)) for n, y in zip(lengths, values, strict=True) if 8 * n >= max(lengths)]
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def print_rows(rows: list[dict[str, Any]], fits: dict[str, dict[str, float]]) -> None:
    print(f"{'method':<9}{'tokens':>8}  {'ms (quartiles)':<26}{'memory':>10}")
    for row in rows:
        low, median, high = (1e3 * s for s in row["seconds"])
        timing = f"{median:.1f} ({low:.1f}-{high:.1f})"
        print(f"{row['method']:<9}{row['n']:>8}  {timing:<26}{row['bytes'] / 1e6:>7.0f} MB")
    for method, fit in fits.items():
        print(f"{method}: time grows as n^{fit['time']:.2f}, memory as n^{fit['memory']:.2f}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[1 << i for i in range(10, 17)], metavar="N")
    parser.add_argument("--softmax-up-to", type=int, default=8192, metavar="N", help="default: 8192 tokens")
    parser.add_argument("--frame", type=int, default=256, help="tokens of a frame; default: 256")
    parser.add_argument("--heads", type=int, default=1, help="default: 1, because glibc maps anew what is above 32 MB")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7, help="steps after the first, 2 at least; default: 7")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's choice")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers, device and versions to FILE")
    args = parser.parse_args()
    if args.repeats < 2 or len(set(args.lengths)) < 2:
        parser.error("--repeats and --lengths should be two at least, or there is nothing to fit")
    return args


def main() -> None:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    machine = describe_machine(torch.device(args.device))
    print(", ".join(f"{key} {value}" for key, value in machine.items() if value is not None), flush=True)
    cases = [(m, n) for m in METHODS for n in sorted(args.lengths) if m != "softmax" or n <= args.softmax_up_to]
    rows = [measure_apart(method, n, args) for method, n in tqdm(cases, unit="case")]
    fits = {}
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        lengths = [row["n"] for row in own]
        time = exponent(lengths, [row["seconds"][1] for row in own])
        fits[method] = {"time": time, "memory": exponent(lengths, [float(max(row["bytes"], 1)) for row in own])}
    print_rows(rows, fits)
    if args.json:
        options = {key: value for key, value in vars(args).items() if key != "json"}
        results = {"machine": machine, "options": options, "exponents": fits, "results": rows}
        args.json.write_text(json.dumps(results, indent=1) + "\n")
        print(f"wrote {args.json}")


if __name__ == "__main__":
    main()
