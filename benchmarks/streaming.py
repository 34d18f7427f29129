"""What a frame of a long video costs: chunk by chunk with a memory, and all at once, up to ten times the training length.

    python benchmarks/streaming.py [--steps 4] [--device auto] [--json FILE]
    python benchmarks/streaming.py --run runs/streaming [--prompt TEXT] [--steps N] [--device auto] [--json FILE]

The model is that of configs/streaming.yaml with fresh weights, on frames of 96x96 pixels, and variants of its attention
over time. Measured are the passes of the transformer that a sampler of so many steps asks for, without guidance, and the
pass that takes a chunk into the memory; on a CPU in seconds of its work, which other processes disturb little. `past` is
what the memory holds.

With --run it is the whole of `sample.py RUN --num_frames N` instead, for a trained run: loading, guidance, every pass, the
decoder and the writer of the mp4, with the run's own sampler unless --steps is given. A clip of the training length is made
at once, longer ones chunk by chunk. Both measurements are kept in the same file, under keys of their own.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from stgen import build, cli, config, schema
from stgen.model import VideoTransformer

CONFIG = Path(__file__).parent.parent / "configs" / "streaming.yaml"
RESULTS = Path(__file__).parent / "results" / "streaming.json"
STREAMED = {
    "temporal, ring": ("temporal", "{pattern: causal, memory: {kind: ring, sinks: 1, window: 4}}"),
    "temporal, infini": ("temporal", "{pattern: full, memory: {kind: infini, segment: 4}}"),
    "joint, ring": ("joint", "{pattern: causal, memory: {kind: ring, sinks: 1, window: 4}}"),
    "joint, infini with delta rule": ("joint", "{pattern: full, memory: {kind: infini, segment: 4, delta: true}}"),
}
AT_ONCE = {
    "temporal, causal, at once": ("temporal", "{pattern: causal, memory: none}"),
    "joint, causal, at once": ("joint", "{pattern: causal}"),
    "joint, at once": ("joint", "{pattern: full}"),
}
LENGTHS = (1, 2, 5, 10)  # in training clips
TEXT_TOKENS, TEXT_WIDTH = 4, 128


def model_of(mixer: str, keys: str, device: torch.device) -> VideoTransformer:
    overrides = [f"model.mixers.{mixer}={keys}", "data.height=96", "data.width=96"]
    overrides += ["model.plan=joint"] if mixer == "joint" else []
    cfg = config.load(CONFIG, overrides, schema.Config)
    torch.manual_seed(0)
    shape = build.build_codec(cfg).latent_shape(cfg.data.num_frames, cfg.data.height, cfg.data.width)
    model: Any = build.build_transformer(cfg, shape, TEXT_WIDTH)
    return model.to(device).eval()


def clock(device: torch.device) -> float:
    """Seconds: of the clock on a GPU, of this process's work on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def held_mib(device: torch.device) -> float:
    """What the process holds; on a GPU the most it held since the last call."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak / 2**20
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@torch.no_grad()
def stream(model: VideoTransformer, steps: int, lengths: list[int], device: torch.device) -> list[dict[str, float]]:
    """At each of `lengths` (latent frames) what the chunks before it cost, all of one video."""
    shape, chunk = model.config.grid[1:], model.chunk_frames
    past, text = model.new_past(1, (chunk, *shape)), torch.zeros(1, TEXT_TOKENS, TEXT_WIDTH, device=device)
    rows, times = [], []
    for after in range(chunk, lengths[-1] + 1, chunk):
        z = torch.randn(1, model.config.in_channels, chunk, *shape, device=device)
        start = clock(device)
        for step in range(steps):
            model(z, torch.tensor(1000.0 - step), text, past=past)
        past = model(z, torch.tensor(0.0), text, past=past).past
        times.append((clock(device) - start) / chunk)
        if after in lengths:
            last = min(times[-2:])  # of two chunks the one that was disturbed less
            kept = {"past_mib": past.numel() * 4 / 2**20, "held_mib": held_mib(device)}
            rows.append({"frames": after, "ms_per_frame": 1e3 * last, **kept})
    return rows


@torch.no_grad()
def at_once(model: VideoTransformer, steps: int, lengths: list[int], device: torch.device) -> list[dict[str, float]]:
    """The same of whole clips of each length."""
    rows, text = [], torch.zeros(1, TEXT_TOKENS, TEXT_WIDTH, device=device)
    for frames in lengths:
        z = torch.randn(1, model.config.in_channels, frames, *model.config.grid[1:], device=device)
        model(z, torch.tensor(1.0), text)  # what is built at first use is not counted
        start = clock(device)
        for step in range(steps):
            model(z, torch.tensor(1000.0 - step), text)
        taken = (clock(device) - start) / frames
        rows.append({"frames": frames, "ms_per_frame": 1e3 * taken, "held_mib": held_mib(device)})
    return rows


def sampled(run: Path, prompt: str, steps: int | None, device: torch.device) -> list[dict[str, Any]]:
    """What a frame of `sample.py` costs at each of LENGTHS, and the most memory held while it was made; one clip each."""
    pipeline = build.load_pipeline(run)
    trained, reason = pipeline.config.sampling["num_frames"], pipeline.stream_refusal()
    if reason is not None:
        raise SystemExit(f"{run} cannot be streamed: {reason}")
    del pipeline
    more = [] if steps is None else ["--num_inference_steps", str(steps)]
    rows = []
    for length in (1, *LENGTHS):  # what is built at first use is not counted: the first goes unused
        with tempfile.TemporaryDirectory() as out:
            forget_peak(device)
            start = clock(device)
            cli.sample([
                str(run), "--prompt", prompt, "--num_frames", str(length * trained), "--output_dir", out,
                "--device", device.type, "--wandb", "disabled", *more,
            ])  # fmt: skip
            taken = clock(device) - start
            size = sum(file.stat().st_size for file in Path(out).glob("*.mp4"))
        frames = length * trained
        rows.append({"frames": frames, "streamed": length > 1, "ms_per_frame": 1e3 * taken / frames})
        rows[-1] |= {"peak_mib": peak_mib(device), "mp4_bytes": size}
    return rows[1:]


def forget_peak(device: torch.device) -> None:
    """Begin to watch the most memory held anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib(device: torch.device) -> float:
    """The most memory held since then: on a GPU by tensors, on a CPU by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10


def keep(path: Path, told: dict[str, Any]) -> None:
    """Write what was measured, beside what the file holds of another measurement."""
    before = json.loads(path.read_text()) if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**before, **told}, indent=1) + "\n")


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    rows = ["| attention over time | " + " | ".join(f"{n}x" for n in LENGTHS) + " | past |", "|---" * 6 + "|"]
    for name, measured in found.items():
        times = " | ".join(f"{row['ms_per_frame']:.1f}" for row in measured)
        past = measured[-1].get("past_mib")
        rows.append(f"| {name} | {times} | {'' if past is None else f'{past:.2f} MiB'} |")
    return "\n".join(rows)


def measure_passes(steps: int, device: torch.device) -> dict[str, Any]:
    """The passes of the transformer with fresh weights, by variant."""
    found: dict[str, list[dict[str, Any]]] = {}
    for measure, variants in ((stream, STREAMED), (at_once, AT_ONCE)):
        for name, (mixer, keys) in variants.items():
            model = model_of(mixer, keys, device)
            lengths = [n * model.config.grid[0] for n in LENGTHS]
            measure(model, 1, lengths[:1], device)
            found[name] = measure(model, steps, lengths, device)
    print("milliseconds a latent frame, at so many training lengths\n\n" + table(found))
    return {"steps": steps, "latent_frames": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="measure the whole of sampling from this run folder instead")
    parser.add_argument("--prompt", default="a red circle moving right", help="with --run: of the clips")
    parser.add_argument("--steps", type=int, help="steps of the sampler (default: 4; with --run, the run's)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where to write")
    args = parser.parse_args()
    cuda = args.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    told: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    }
    told |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    if args.run is None:
        keep(args.json, {**told, **measure_passes(args.steps or 4, device)})
        return
    rows = sampled(args.run, args.prompt, args.steps, device)
    keep(args.json, {"sampled": {**told, "run": args.run.resolve().name, "steps": args.steps, "clips": rows}})
    print("\n| frames | made | ms a frame | most memory |\n|---|---|---|---|")
    for row in rows:
        made = "chunk by chunk" if row["streamed"] else "at once"
        print(f"| {row['frames']} | {made} | {row['ms_per_frame']:.1f} | {row['peak_mib']:.0f} MiB |")


if __name__ == "__main__":
    main()
