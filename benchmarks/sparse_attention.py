"""Block-sparse attention against dense SDPA, forward and forward + backward, side by side in one process.

4 heads x 64; blocks are tiles of 4x4x4 tokens of a video, each attends its nearest tiles. The two take turns; numbers
are medians, ratios those of medians. Peak memory is what one forward and backward allocates beyond its inputs.

    OMP_NUM_THREADS=1 python benchmarks/sparse_attention.py --json benchmarks/results/sparse_attention.json

Two findings on the same CPU (Xeon with AMX, one thread, torch 2.15, CPU milliseconds, machine not idle):

Chunks: forward + backward at 4096 tokens by bytes of a chunk's scores, before chunks shared their memory. Small chunks pay
for calls (each product in bf16 costs about 25 us beside its work), large ones leave the level-2 cache and touch more
fresh pages. Now they share memory, and take a sixteenth of all scores between 1.5 and 5 MiB: on an idle
machine 5 MiB is a tenth faster than 1.5 at 16384 tokens, and slower at 4096 for its fresh pages.

| scores | 256 KiB | 512 KiB | 1 MiB | 2 MiB | 4 MiB | 8 MiB |
|---|---|---|---|---|---|---|
| fp32, 80 % sparse | 186 | 172 | 165 | 156 | 160 | 210 |
| fp32, 95 % sparse | 51 | 50 | 46 | 44 | 52 | 76 |
| bf16, 80 % sparse | 148 | 125 | 102 | 93 | 107 | - |
| bf16, 95 % sparse | 39 | 34 | 32 | 29 | 32 | - |

flex_attention, compiled (dynamic=False), forward alone, for it has no backward on a CPU; gather in brackets. It compiles
for 27 to 50 s when the number of blocks or the dtype is new to the process. In fp32 it is slower; in bf16 it saves 15 ms
a call at 4096 tokens and 250 ms at 16384, so that 20 sampling steps of a 12-layer model come out even at best at the
latter and lose at the former: it is not an implementation here.

| tokens | fp32, 80 % | fp32, 95 % | bf16, 80 % | bf16, 95 % |
|---|---|---|---|---|
| 4096 | 84 (63) | 22 (17) | 18 (33) | 6 (10) |
| 16384 | 1395 (947) | 380 (235) | 361 (608) | 89 (163) |
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from stgen.ops.block_sparse_attention import block_sparse_attention
from stgen.ops.support import Support

HEADS, WIDTH, BLOCK = 4, 64, 64
TILES = {1024: (1, 4, 4), 4096: (4, 4, 4), 16384: (4, 8, 8)}  # frames, rows and columns, in tiles of 4x4x4 tokens
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = [(n, dtype, sparsity) for n in (1024, 4096) for dtype in DTYPES for sparsity in (0.8, 0.95)]
CASES.append((16384, "bf16", 0.95))


def nearest_tiles(tokens: int, sparsity: float) -> Support:
    """Each tile attends the given share of all tiles, the nearest first; ties go to the lower number."""
    axes = torch.meshgrid(*(torch.arange(x) for x in TILES[tokens]), indexing="ij")
    where = torch.stack([x.flatten() for x in axes], -1).double()  # [tiles, 3]
    keep = max(1, round((1 - sparsity) * len(where)))
    nearest = torch.cdist(where, where).sort(dim=-1, stable=True).indices[:, :keep]
    kept = torch.zeros(len(where), len(where), dtype=torch.bool).scatter_(1, nearest, True)
    return Support.from_blocks(kept[None, None], tokens, tokens, (BLOCK, BLOCK))


def peak_bytes(call: Callable[[], Any]) -> int:
    """Most memory that is allocated at once during a call, beyond what was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        call()
    assert prof.profiler is not None and prof.profiler.kineto_results is not None
    now = most = 0
    for event in sorted(prof.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
            most = max(most, now)
    return most


def measure(tokens: int, dtype: str, sparsity: float, repeats: int) -> dict[str, Any]:
    support, g = nearest_tiles(tokens, sparsity), torch.Generator().manual_seed(0)
    q, k, v, d_out = (torch.randn(1, HEADS, tokens, WIDTH, generator=g).to(DTYPES[dtype]) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    attentions: dict[str, Callable[[], Tensor]] = {
        "gather": lambda: block_sparse_attention(q, k, v, support, impl="gather"),
        "sdpa": lambda: scaled_dot_product_attention(q, k, v),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in attentions}
    for i in range(repeats + 1):
        for name, attend in attentions.items():
            with torch.no_grad():
                start = time.perf_counter()
                attend()
                forward = time.perf_counter() - start
            start = time.perf_counter()
            torch.autograd.grad(attend(), inputs, d_out)
            if i:  # the first round warms up
                seconds[name].append((forward, time.perf_counter() - start))
    row: dict[str, Any] = {"tokens": tokens, "dtype": dtype, "sparsity": 1 - support.density()[1], "repeats": repeats}
    for name, attend in attentions.items():
        forward, both = zip(*seconds[name], strict=True)
        peak = peak_bytes(lambda attend=attend: torch.autograd.grad(attend(), inputs, d_out))
        row[name] = {
            "forward_ms": 1e3 * statistics.median(forward),
            "forward_backward_ms": 1e3 * statistics.median(both),
            "peak_bytes": peak,
        }
    for what in ("forward", "forward_backward"):
        row[f"speedup_{what}"] = row["sdpa"][f"{what}_ms"] / row["gather"][f"{what}_ms"]
    return row


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    names = [x.split(":", 1)[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")]
    return {
        "cpu": f"{names[0] if names else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10, help="counted rounds; default: 10")
    parser.add_argument("--quick", action="store_true", help="three rounds, no 16384 tokens")
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's choice. On a busy machine take 1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers, CPU and versions to FILE")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    about, rows = machine(), []
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"{'tokens':>7}{'dtype':>6}{'sparse':>8}   forward ms: SDPA, gather   + backward ms: SDPA, gather   peak MB")
    for tokens, dtype, sparsity in CASES[:-1] if args.quick else CASES:
        row = measure(tokens, dtype, sparsity, 3 if args.quick else args.repeats)
        rows.append(row)
        a, b = row["sdpa"], row["gather"]
        print(
            f"{tokens:>7}{dtype:>6}{row['sparsity']:>8.1%}"
            f"{a['forward_ms']:>10.1f}{b['forward_ms']:>8.1f}{row['speedup_forward']:>7.2f}x"
            f"{a['forward_backward_ms']:>12.1f}{b['forward_backward_ms']:>8.1f}{row['speedup_forward_backward']:>7.2f}x"
            f"{a['peak_bytes'] / 1e6:>9.1f}{b['peak_bytes'] / 1e6:>7.1f}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps({"machine": about, "results": rows}, indent=1) + "\n")
        print(f"wrote {args.json}")


if __name__ == "__main__":
    main()
