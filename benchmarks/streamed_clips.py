"""Whether streamed videos of the built-in shapes stay what was asked for, as they grow far beyond the clips of training.

    python train.py configs/streaming.yaml
    python benchmarks/streamed_clips.py runs/streaming [--clips 64] [--lengths 10] [--json FILE] [--sheet FILE]

Seen prompts are streamed to so many training lengths. Each length by itself is shown to the oracle: in which share of the
clips does it read colour, shape, direction and all three, and how well does the shape fit its template (intersection over union)?
The shapes of this config leave the frame and come back on the other side, so their motion has no end.
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from stgen import build, shapes, video
from stgen.pipeline import VideoPipeline

RESULTS = Path(__file__).parent / "results"
BATCH = 16


def streamed(pipeline: VideoPipeline, prompts: list[str], frames: int) -> Tensor:
    """Clips of the prompts with seeds 0, 1, ..., uint8 [N, T, 3, H, W]."""
    clips = []
    for first in tqdm(range(0, len(prompts), BATCH), desc="streaming", unit="batch"):
        part = prompts[first : first + BATCH]
        noise = [torch.Generator().manual_seed(first + i) for i in range(len(part))]
        chunks = pipeline.stream(part, num_frames=frames, generator=noise, output_type="pt")
        clips.append(torch.cat(list(chunks), dim=1))
    return (255 * torch.cat(clips)).round().to(torch.uint8)


def read(clips: Tensor, combos: list[shapes.Combination], around: bool) -> dict[str, Any]:
    """What the oracle reads off clips of one training length."""
    found: dict[str, Any] = shapes.accuracy(list(clips), combos, around)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder on the built-in shapes, trained to be streamed")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--lengths", type=int, default=10, help="of the videos, in training clips")
    parser.add_argument("--json", type=Path, default=RESULTS / "streamed_clips.json")
    parser.add_argument(
        "--sheet", type=Path, default=RESULTS / "streamed_clips.png", help="picture of some of the videos"
    )
    args = parser.parse_args()
    pipeline = build.load_pipeline(args.run)
    pipeline.set_progress_bar_config(disable=True)
    split = shapes.split_of(args.run / "data")
    if split is None:
        raise SystemExit(f"{args.run} was not trained on the built-in shapes, which alone the oracle can read")
    combos = [split.seen[i * 7 % len(split.seen)] for i in range(args.clips)]
    trained = pipeline.config.sampling["num_frames"]
    clips = streamed(pipeline, [combo.prompt for combo in combos], args.lengths * trained)
    rows = []
    print(f"{'frames':>12}{'colour':>9}{'shape':>9}{'direction':>11}{'all':>9}{'overlap':>9}")
    for i, part in enumerate(clips.split(trained, dim=1)):
        rows.append({"frames": [i * trained, (i + 1) * trained], **read(part, combos, split.around)})
        row = rows[-1]
        print(
            f"{i * trained:>6}-{(i + 1) * trained - 1:<5}{row['colour']:>9.0%}{row['shape']:>9.0%}"
            f"{row['direction']:>11.0%}{row['all']:>9.0%}{row['overlap']:>9.2f}"
        )
    shown = [video.Clip(clip, shapes.FPS) for clip in clips[:8]]
    video.contact_sheet(args.sheet, shown, [combo.prompt for combo in combos[:8]], columns=16)
    told = {"device": platform.processor() or platform.machine(), "torch": torch.__version__, "clips": args.clips}
    args.json.write_text(json.dumps({**told, "run": args.run.resolve().name, "lengths": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
