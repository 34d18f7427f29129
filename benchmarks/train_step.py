"""Speed of a training step: stgen.VideoTransformer against the Latte, Wan and CogVideoX transformers of diffusers.

    python benchmarks/train_step.py                                    # all cases in fp32 and bf16, about eight minutes
    python benchmarks/train_step.py --cases quickstart --dtype bf16 --repeats 30
    python benchmarks/train_step.py --device cuda --compile --json step.json

A step is forward and backward over random latents, without an optimiser; bf16 is autocast over float32 weights. All
models of a case have the same width, depth, heads, tokens, batch and prompt length, and live in one process. They take
turns, one step each a round, and every round begins with another one, so that a slow spell of the machine hits all
alike. Two rounds of warm-up are not counted.

Columns, one row a model:
    ms          median of a step and its quartiles
    tokens/s    video tokens of the batch over the median
    over X      X's time over this model's within a round: median over the rounds, and for Latte the quartiles
    GFLOP       operations of the matrix products of a step, counted by PyTorch for both models in the same way
    GFLOP/s     these over the median; `of GEMM` is its fraction of the best plain matrix product measured here
    memory      on CUDA: bytes that a step needs above what is held before it (activations and gradients)

Models:
    latte         num_layers = depth / 2 pairs of a spatial and a temporal layer, sine-cosine positions, cross-attention
                  to the prompt in the spatial layers only, no norm of queries and keys, a residual stream in float32
    wan           joint attention over all tokens, RoPE, cross-attention in every layer, normed queries and keys, six
                  modulation vectors a layer from a shared table
    cogvideox     joint attention over prompt and tokens together, sine-cosine positions, a modulation net in every layer
    stgen         plan "spatial temporal", sine-cosine positions; cross-attention in every layer behind a norm of its
                  own, and RMS-normed queries and keys: more work than Latte's, as the GFLOP column tells
    stgen-adaln   what the quickstart trains: learned positions, prompt pooled into the modulation, no cross-attention
    stgen-joint   plan "joint", RoPE, cross-attention and normed queries and keys: the layers of Wan

Gates that start at zero are given noise, so that no product has a zero operand. The numbers to quote are those of `stgen`
over Latte and of `stgen-joint` over Wan and CogVideoX, which do about the same; the GFLOP column tells how far.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import CogVideoXTransformer3DModel, LatteTransformer3DModel, WanTransformer3DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from stgen.model import VideoTransformer

TEXT_TOKENS, TEXT_WIDTH, WARMUP = 16, 128, 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Quartiles = tuple[float, float, float]


@dataclass(frozen=True)
class Case:
    width: int
    depth: int
    heads: int
    grid: tuple[int, int, int]
    batch: int
    channels: int
    patch: int = 1  # latent rows and columns of a token

    @property
    def latents(self) -> tuple[int, ...]:
        t, h, w = self.grid
        return self.batch, self.channels, t, h * self.patch, w * self.patch

    @property
    def tokens(self) -> int:
        t, h, w = self.grid
        return self.batch * t * h * w


CASES = {
    "quickstart": Case(width=128, depth=6, heads=2, grid=(2, 4, 4), batch=32, channels=128),
    "frames16": Case(width=128, depth=6, heads=2, grid=(8, 4, 4), batch=16, channels=128),
    "latte-s": Case(width=384, depth=12, heads=6, grid=(16, 8, 8), batch=1, channels=4, patch=2),
}


# ---- models ----------------------------------------------------------------------------------------------------------


def build_latte(case: Case) -> nn.Module:
    t, h, w = case.grid
    assert h == w and case.depth % 2 == 0, "Latte takes square frames and pairs of layers"
    return LatteTransformer3DModel(
        num_attention_heads=case.heads,
        attention_head_dim=case.width // case.heads,
        in_channels=case.channels,
        out_channels=case.channels,
        num_layers=case.depth // 2,
        cross_attention_dim=case.width,
        attention_bias=True,
        sample_size=h * case.patch,
        patch_size=case.patch,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=TEXT_WIDTH,
        video_length=t,
    )


def build_wan(case: Case) -> nn.Module:
    return WanTransformer3DModel(
        patch_size=(1, case.patch, case.patch),
        num_attention_heads=case.heads,
        attention_head_dim=case.width // case.heads,
        in_channels=case.channels,
        out_channels=case.channels,
        text_dim=TEXT_WIDTH,
        ffn_dim=4 * case.width,
        num_layers=case.depth,
    )


class CogVideoX(nn.Module):
    """Takes frames before channels, as CogVideoX has them."""

    def __init__(self, case: Case):
        super().__init__()
        t, h, w = case.grid
        self.model = CogVideoXTransformer3DModel(
            num_attention_heads=case.heads,
            attention_head_dim=case.width // case.heads,
            in_channels=case.channels,
            out_channels=case.channels,
            text_embed_dim=TEXT_WIDTH,
            num_layers=case.depth,
            sample_height=h * case.patch,
            sample_width=w * case.patch,
            sample_frames=4 * (t - 1) + 1,
            patch_size=case.patch,
            max_text_seq_length=TEXT_TOKENS,
        )

    def forward(self, hidden_states: Tensor, **inputs: Any) -> Any:
        return self.model(hidden_states.movedim(1, 2), **inputs)


def build_stgen(case: Case, **options: Any) -> nn.Module:
    return VideoTransformer(
        in_channels=case.channels,
        grid=case.grid,
        patch_size=(1, case.patch, case.patch),
        width=case.width,
        depth=case.depth,
        heads=case.heads,
        text_width=TEXT_WIDTH,
        **options,
    )


MODELS: dict[str, Callable[[Case], nn.Module]] = {
    "latte": build_latte,
    "wan": build_wan,
    "cogvideox": CogVideoX,
    "stgen": lambda case: build_stgen(case, conditioning="cross", positions="sincos"),
    "stgen-adaln": lambda case: build_stgen(case, conditioning="adaln", positions="learned"),
    "stgen-joint": lambda case: build_stgen(case, plan="joint", conditioning="cross", positions="rope"),
}
PEERS = ("latte", "wan", "cogvideox")


def build(name: str, case: Case, device: torch.device) -> nn.Module:
    """The model, in training mode, no parameter all zero."""
    torch.manual_seed(0)
    model = MODELS[name](case).to(device).train()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


# ---- a step ----------------------------------------------------------------------------------------------------------


def make_inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(case.latents, generator=g),
        "timestep": torch.rand(case.batch, generator=g) * 1000,
        "encoder_hidden_states": torch.randn(case.batch, TEXT_TOKENS, TEXT_WIDTH, generator=g),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def run_step(model: nn.Module, inputs: dict[str, Tensor], dtype: str) -> None:
    """Forward and backward; gradients of the step before are dropped."""
    model.zero_grad(set_to_none=True)
    device = inputs["hidden_states"].device.type
    with torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16"):
        output = model(**inputs, return_dict=False)[0]
    output.float().square().mean().backward()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def count_flops(model: nn.Module, inputs: dict[str, Tensor], dtype: str) -> int:
    """Operations of all matrix products of a step, attention taken apart into its products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run_step(model, inputs, dtype)
    return counter.get_total_flops()


def step_memory(model: nn.Module, inputs: dict[str, Tensor], dtype: str, device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    model.zero_grad(set_to_none=True)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run_step(model, inputs, dtype)
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


# ---- measuring -------------------------------------------------------------------------------------------------------


def gemm_rates(cases: list[Case], dtypes: list[str], device: torch.device) -> dict[str, dict[str, float]]:
    """FLOP/s of x W, best of a second or eight calls, for square matrices and for the up-projection of every case."""
    squares = (1024, 2048) if device.type == "cpu" else (4096, 8192)
    shapes = [(n, n, n) for n in squares] + [(case.tokens, case.width, 4 * case.width) for case in cases]
    rates: dict[str, dict[str, float]] = {}
    for dtype in dtypes:
        rates[dtype] = {}
        for m, k, n in shapes:
            x = torch.randn(m, k, device=device, dtype=DTYPES[dtype])
            w = torch.randn(n, k, device=device, dtype=DTYPES[dtype])
            seconds = best_seconds(lambda x=x, w=w: nn.functional.linear(x, w), device)
            rates[dtype][f"{m}x{k}x{n}"] = 2 * m * k * n / seconds
    return rates


def best_seconds(call: Callable[[], Any], device: torch.device, calls: int = 8, budget: float = 1.0) -> float:
    """Shortest of `calls` at least, of as many more as half the budget allows, after one that warms up."""
    call()
    taken: list[float] = []
    while len(taken) < calls or (sum(taken) < budget / 2 and len(taken) < 200):
        taken.append(seconds_of(call, device))
        if sum(taken) > budget:
            break
    return min(taken)


def time_rounds(
    models: dict[str, nn.Module], inputs: dict[str, Tensor], dtype: str, repeats: int, label: str
) -> dict[str, list[float]]:
    """Seconds of each model's step in each round."""
    device, names = inputs["hidden_states"].device, list(models)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in tqdm(range(WARMUP + repeats), desc=label, unit="round", leave=False, file=sys.stderr):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            taken = seconds_of(lambda name=name: run_step(models[name], inputs, dtype), device)
            if i >= WARMUP:
                seconds[name].append(taken)
    return seconds


def quartiles(values: list[float]) -> Quartiles:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def measure(name: str, case: Case, dtype: str, peak: float, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each model of a case."""
    device = torch.device(args.device)
    models = {model: build(model, case, device) for model in MODELS}
    inputs = make_inputs(case, device)
    flops = {key: count_flops(model, inputs, dtype) for key, model in models.items()}
    runners: dict[str, Any] = {key: torch.compile(model) if args.compile else model for key, model in models.items()}
    seconds = time_rounds(runners, inputs, dtype, args.repeats, f"{name} {dtype}")
    rows = []
    for key, model in models.items():
        low, median, high = quartiles(seconds[key])
        rows.append(
            {
                "case": name,
                "dtype": dtype,
                "model": key,
                "parameters": sum(p.numel() for p in model.parameters()),
                "ms": [1e3 * low, 1e3 * median, 1e3 * high],
                "tokens_per_second": case.tokens / median,
                "speedup": {
                    peer: quartiles([a / b for a, b in zip(seconds[peer], seconds[key], strict=True)]) for peer in PEERS
                },
                "flops": flops[key],
                "flops_per_second": flops[key] / median,
                "of_gemm": flops[key] / median / peak,
                "memory_bytes": step_memory(runners[key], inputs, dtype, device),
            }
        )
    return rows


# ---- printing --------------------------------------------------------------------------------------------------------


def describe_machine(device: torch.device) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"


def print_gemm(rates: dict[str, dict[str, float]]) -> None:
    for dtype, by_shape in rates.items():
        shapes = ", ".join(f"{shape} {rate / 1e9:.0f}" for shape, rate in by_shape.items())
        print(f"GEMM {dtype}: best {max(by_shape.values()) / 1e9:.0f} GFLOP/s ({shapes})")


def print_rows(name: str, case: Case, dtype: str, rows: list[dict[str, Any]]) -> None:
    grid = "x".join(map(str, case.grid))
    print(f"\n{name}, {dtype}: width {case.width}, depth {case.depth}, heads {case.heads}, {grid} x batch {case.batch}")
    print(
        f"  {'model':<12}{'params':>9}  {'ms (quartiles)':<25}{'tokens/s':>9}  {'over Latte':<18}{'Wan':<6}{'CogVideoX':<10}"
        f"{'GFLOP':>7}{'GFLOP/s':>9}{'of GEMM':>9}{'memory':>10}"
    )
    for row in rows:
        low, median, high = row["ms"]
        slow, ratio, fast = row["speedup"]["latte"]
        wan, cogvideox = row["speedup"]["wan"][1], row["speedup"]["cogvideox"][1]
        memory = "-" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 1e6:.0f} MB"
        print(
            f"  {row['model']:<12}{row['parameters'] / 1e6:>7.2f} M  {f'{median:.1f} ({low:.1f}-{high:.1f})':<25}"
            f"{row['tokens_per_second']:>9.0f}  {f'{ratio:.2f} ({slow:.2f}-{fast:.2f})':<18}{wan:<6.2f}{cogvideox:<10.2f}"
            f"{row['flops'] / 1e9:>7.1f}{row['flops_per_second'] / 1e9:>9.1f}{row['of_gemm']:>8.0%} {memory:>10}",
            flush=True,
        )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="sizes; default: all")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES), help="default: both")
    parser.add_argument("--repeats", type=int, default=10, help="counted rounds, 2 at least; default: 10")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's choice. On a busy machine take 1")
    parser.add_argument("--compile", action="store_true", help="torch.compile all models")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers, device and versions to FILE")
    args = parser.parse_args(argv)
    if args.repeats < 2:
        parser.error("--repeats should be 2 at least, or there are no quartiles")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    machine = describe_machine(torch.device(args.device))
    print(", ".join(f"{key} {value}" for key, value in machine.items() if value is not None), flush=True)
    rates = gemm_rates([CASES[name] for name in args.cases], args.dtype, torch.device(args.device))
    print_gemm(rates)
    rows: list[dict[str, Any]] = []
    for name in args.cases:
        for dtype in args.dtype:
            rows += measure(name, CASES[name], dtype, max(rates[dtype].values()), args)
            print_rows(name, CASES[name], dtype, rows[-len(MODELS) :])
    if args.json:
        results = {
            "machine": machine,
            "options": {"repeats": args.repeats, "compile": args.compile},
            "cases": {name: asdict(CASES[name]) for name in args.cases},
            "gemm_flops_per_second": rates,
            "results": rows,
        }
        args.json.write_text(json.dumps(results, indent=1) + "\n")
        print(f"\nwrote {args.json}")


if __name__ == "__main__":
    main()
