"""Sections of a config about data that comes in several sizes or from elsewhere, and what they must agree with.

Loads without torch.
"""

from collections import Counter
from typing import Any

from pydantic import PositiveInt

from stgen.section import Section


class Bucket(Section):
    num_frames: PositiveInt
    """Frames of a clip; 1 is for images. Where the codec cannot take so many, the next fewer are read, which is said."""
    height: PositiveInt
    """Height of a clip in pixels."""
    width: PositiveInt
    """Width of a clip in pixels."""
    batch_size: PositiveInt | None = None
    """Clips of an optimiser step; null: as many as data.tokens_per_batch allows, or else train.train_batch_size."""

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"


class HuggingFace(Section):
    clips: PositiveInt = 1000
    """Rows that are streamed, from the first on; no others are fetched."""
    folder: str | None = None
    """Where their files are kept, for other runs too; null: data/ in the run folder."""
    split: str = "train"
    """Split of the dataset."""
    config: str | None = None
    """Configuration of the dataset, where it has several."""
    revision: str | None = None
    """Commit, tag or branch on the hub; a commit stays what it is."""
    video_column: str | None = None
    """Column of videos or images; null takes the first called video, mp4, image, file_name or path."""
    caption_column: str | None = None
    """Column of captions; null takes text, caption or prompt."""


def check_buckets(cfg: Any) -> None:
    """Raise ValueError, one sentence, where a Config's buckets do not go with its other keys."""
    data = cfg.data
    if not data.buckets:
        if data.tokens_per_batch is not None:
            raise ValueError("data.tokens_per_batch: a budget is for data.buckets, of which there are none; write null")
        return
    if cfg.tokens.positions == "learned":
        raise ValueError(
            "data.buckets: learned positions hold for one size alone; write tokens.positions: rope, or sincos"
        )
    (size, often), *_ = Counter(str(bucket) for bucket in data.buckets).most_common(1)
    if often > 1:
        raise ValueError(f"data.buckets: {size} is there {often} times; keep one of them")
    parts = cfg.train.gradient_accumulation_steps
    for i, bucket in enumerate(data.buckets):
        if (bucket.batch_size or 0) % parts:
            raise ValueError(
                f"data.buckets.{i}.batch_size: {bucket.batch_size} clips cannot be cut into "
                f"{parts} equal parts (train.gradient_accumulation_steps)"
            )


def check_source(data: Any) -> None:
    """Raise ValueError where data.source names nothing to read from."""
    if data.source != "folder" and data.train_data_dir is None:
        wanted = {"webdataset": "a folder of .tar files or a pattern", "huggingface": "a dataset's folder or hub id"}
        raise ValueError(f"data.train_data_dir: null, but data.source {data.source} needs {wanted[data.source]} there")
