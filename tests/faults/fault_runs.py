"""Tiny runs over real video files, to which the tests of faults do harm."""

from pathlib import Path

from stgen import config, schema, shapes, video

TINY = [
    "data.num_frames=4", "data.height=16", "data.width=16", "data.held_out_clips=0", "data.dataloader_num_workers=0",
    "codec.patch_size=[2,8,8]", "codec.components=6", "text.width=16", "model.width=16", "model.depth=1", "model.heads=2",
    "model.plan=spatial", "train.train_batch_size=4", "optim.lr_warmup_steps=2", "validation.steps=null",
    "validation.num_inference_steps=1", "validation.prompts=[a red circle]", "log.every=1", "checkpoint.total_limit=99",
]  # fmt: skip


def write_videos(folder: Path, count: int = 6) -> Path:
    """Captioned videos of six frames of 24 x 24."""
    for i in range(count):
        combo = shapes.ALL[i * 7 % len(shapes.ALL)]
        video.write(folder / f"{i}.mp4", video.Clip(shapes.render(combo, 6, 24, 24, i), 8.0))
        (folder / f"{i}.txt").write_text(combo.prompt)
    return folder


def arguments(home: Path, folder: Path, *overrides: str) -> list[str]:
    """What `train.py` is told: an empty config and overrides, with home/run as the run folder."""
    (home / "empty.yaml").write_text("{}\n")
    given = [f"data.train_data_dir={folder}", f"run.output_dir={home / 'run'}", *overrides]
    return [str(home / "empty.yaml"), *TINY, *given]


def make(home: Path, folder: Path, *overrides: str) -> schema.Config:
    """The same as a config, without W&B unless told."""
    path, *given = arguments(home, folder, "log.wandb=disabled", *overrides)
    return config.load(Path(path), given, schema.Config)
