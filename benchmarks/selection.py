"""How long the selection of the best blocks takes: by sorting each row, by quick-select, by torch.topk, and by the kernel.

    python benchmarks/selection.py [--ratio 0.1] [--heads 16] [--json FILE]

Rows of scores of square block tables, a share `ratio` of each kept; what comes out is the table of kept blocks.
`varied` is quick-select where every row keeps another number, up to that share (it then orders what it keeps), `ties`
where scores are whole numbers, so that equal ones must be told apart. The kernel also writes the sorted lists; on a CPU
there is none to run. torch.topk says nothing about ties, so its set may differ where scores are equal.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from stgen.ops.block_scores.quick_select import keep_top_by_pivots
from stgen.ops.block_scores.reference import keep_top

LENGTHS = {"cuda": (64, 256, 625, 1181, 2048, 4096), "cpu": (16, 64, 256, 625, 1181, 2048)}


def median_milliseconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """Of one call, after three that are not counted."""
    times = []
    for i in range(repeats + 3):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if i >= 3:
            times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[repeats // 2]


def by_topk(scores: Tensor, allowed: Tensor, count: int) -> Tensor:
    best = scores.masked_fill(~allowed, -torch.inf).topk(count, dim=-1, sorted=False).indices
    return torch.zeros_like(allowed).scatter(-1, best, True) & allowed


def measure(blocks: int, heads: int, ratio: float, device: str, repeats: int) -> dict[str, float]:
    """Milliseconds of each way, over heads x blocks rows of `blocks` scores."""
    scores = torch.randn(1, heads, blocks, blocks, device=device)
    allowed = torch.ones_like(scores, dtype=torch.bool)
    count = max(1, int(ratio * blocks))
    counts = torch.full((1, heads, blocks), count, dtype=torch.int32, device=device)
    varied = torch.arange(blocks, device=device).remainder(count).add(1).expand_as(counts)
    whole = (4 * scores).round()
    for case in ((scores, allowed, counts), (scores, allowed, varied), (whole, allowed, counts)):
        assert torch.equal(keep_top_by_pivots(*case), keep_top(*case))
    ways: dict[str, Callable[[], object]] = {
        "sort": lambda: keep_top(scores, allowed, counts),
        "quick-select": lambda: keep_top_by_pivots(scores, allowed, counts),
        "varied": lambda: keep_top_by_pivots(scores, allowed, varied),
        "ties": lambda: keep_top_by_pivots(whole, allowed, counts),
        "topk": lambda: by_topk(scores, allowed, count),
    }
    if device == "cuda":
        from stgen.ops.block_scores.triton import select

        ways["kernel"] = lambda: select(scores, allowed, counts, "top", 0.0, count)
        assert torch.equal(select(scores, allowed, counts, "top", 0.0, count)[0], keep_top(scores, allowed, counts))
    return {name: median_milliseconds(run, device, repeats) for name, run in ways.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=0.1, help="share of the blocks that is kept")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the numbers there")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}; {args.heads} heads, {args.ratio:.0%} kept; milliseconds, and how often sorting takes as long")
    rows = {}
    for blocks in LENGTHS[device]:
        rows[blocks] = taken = measure(blocks, args.heads, args.ratio, device, args.repeats)
        shown = "  ".join(f"{way} {t:.3f} ({taken['sort'] / t:.1f}x)" for way, t in taken.items())
        print(f"{blocks:5d} blocks: {shown}", flush=True)
    if device == "cpu":
        print("the kernel needs a GPU and was left out")
    if args.json:
        args.json.write_text(
            json.dumps(
                {"device": name, "torch": torch.__version__, "ratio": args.ratio, "heads": args.heads, "ms": rows},
                indent=2,
            )
        )


if __name__ == "__main__":
    main()
