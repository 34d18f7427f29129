"""`stgen data check`: what a folder of videos holds, in numbers, in words and in pictures.

Numbers go to check.json, words to the terminal (stgen.lab.data_page), stills of clips with their captions to
contact_sheet.png. Nothing is written into the folder itself.
"""

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from stgen import dataset, latent_cache, schema, source, text, video
from stgen.lab import data_page
from stgen.sizes import Size, scale

FRAMES_SHOWN = 6  # of a clip on the contact sheet
SECONDS = (1, 2, 4, 8, 16, 32, 64)  # borders between the rows of durations
WORDS = (1, 6, 16, 41, 101)  # and of captions' lengths
ANY_SIZE = Size(1, 16, 16)  # which no video is too short for


def check(cfg: schema.Config | None, path: Path, out: Path | None, clips: int) -> dict[str, Any]:
    """Judge what a config trains on, or a folder (cfg None): prints a page, writes check.json and contact_sheet.png."""
    folder = _folder(cfg, path)
    if out is None and cfg is not None:
        out = cfg.output_dir.with_name(cfg.output_dir.name + "-data")
    out = out or path.resolve().with_name(f"{path.resolve().name}-check")
    numbers = measure(folder, cfg)
    out.mkdir(parents=True, exist_ok=True)
    unread = _contact_sheet(out / "contact_sheet.png", folder, cfg, clips)
    numbers["rejects"] += [{"path": name, "reason": reason} for name, reason in unread]
    (out / "check.json").write_text(json.dumps(numbers, indent=2) + "\n")
    print(data_page.page(numbers, out))
    return numbers


def _folder(cfg: schema.Config | None, path: Path) -> dataset.VideoFolder:
    """The videos and their captions, however many cannot be used."""
    if cfg is None:
        frames, height, width = ANY_SIZE
        return dataset.VideoFolder(path, num_frames=frames, height=height, width=width, max_reject_fraction=1.0)
    cfg = cfg.model_copy(update={"data": cfg.data.model_copy(update={"max_reject_fraction": 1.0})})
    return source.open_folder(cfg, cfg.output_dir)[0]


# ----------------------------------------------------------------------------------------------------------- numbers


def measure(folder: dataset.VideoFolder, cfg: schema.Config | None) -> dict[str, Any]:
    """Every number of check.json; clips and truncated captions where a config says what they are."""
    infos = [sample.info for sample in folder.samples]
    seconds = [(sample.last - sample.first) / sample.info.fps for sample in folder.samples]
    numbers = {
        "folder": str(folder.root),
        "videos": len(infos),
        "seconds": sum(seconds),
        "bytes": sum(latent_cache.stamp(path)[0] for path in dict.fromkeys(sample.path for sample in folder.samples)),
        "durations": _spread(seconds) | {"histogram": histogram(seconds, SECONDS)},
        "frames": _spread([sample.last - sample.first for sample in folder.samples]),
        "sizes": _counted(f"{info.width}x{info.height}" for info in infos),
        "fps": _counted(f"{info.fps:.4g}" for info in infos),
        "captions": captions([sample.caption for sample in folder.samples], cfg),
        "rejects": [{"path": path, "reason": reason} for path, reason in folder.rejects],
    }
    return numbers if cfg is None else {**numbers, "clips": _clips(folder, cfg)}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"least": min(values), "median": median(values), "most": max(values)}


def _counted(words: Iterable[str]) -> dict[str, int]:
    """How often each occurs, the most frequent first."""
    return dict(Counter(words).most_common())


def histogram(values: Sequence[float], borders: Sequence[int]) -> list[tuple[float, float | None, int]]:
    """(from, to, how many) between 0, the borders and no end."""
    edges = itertools.pairwise([0, *borders, math.inf])
    counted = [(low, high, sum(low <= value < high for value in values)) for low, high in edges]
    return [(low, None if high == math.inf else high, count) for low, high, count in counted]


def captions(found: Sequence[str], cfg: schema.Config | None) -> dict[str, Any]:
    """Lengths in words, empty and repeated captions, and how many the text encoder would cut."""
    words = [len(text.words_of(caption)) for caption in found]
    often = Counter(caption for caption in found if caption)
    numbers: dict[str, Any] = {
        "empty": sum(not caption for caption in found),
        "distinct": len(often),
        "repeated": sum(count for count in often.values() if count > 1),
        "most_frequent": often.most_common(3),
        "words": _spread(words) | {"histogram": histogram(words, WORDS)},
        "vocabulary": len(text.vocabulary_of(often)),
    }
    if cfg is None:
        return numbers
    length, limit = tokens_of(cfg)
    bar = tqdm(often.items(), "counting tokens", unit="caption", delay=2, leave=False)
    lengths = [(length(caption), count) for caption, count in bar]
    cut = sum(count for tokens, count in lengths if tokens > limit)
    return numbers | {"max_length": limit, "most_tokens": max((n for n, _ in lengths), default=0), "truncated": cut}


def tokens_of(cfg: schema.Config) -> tuple[Callable[[str], int], int]:
    """How many tokens a caption has to the config's text encoder, its end included, and how many are kept."""
    if isinstance(cfg.text, schema.PretrainedText):
        tokenizer = text.load_tokenizer(cfg.text.path, cfg.text.subfolder)
        limit = min(cfg.text.max_length, tokenizer.model_max_length)
        return lambda caption: len(tokenizer(caption, verbose=False).input_ids), limit
    if cfg.text.kind == "words":
        return lambda caption: len(text.words_of(caption)) + 1, cfg.text.max_length
    return lambda caption: len(caption.encode()) + 1, cfg.text.max_length


def _clips(folder: dataset.VideoFolder, cfg: schema.Config) -> list[dict[str, Any]]:
    """Of each size of clip: the videos that go there, the clips that fit into them end to end, and what becomes of frames."""
    rows = []
    for size, group in zip(folder.sizes, folder.by_size(range(len(folder))), strict=True):
        samples = [folder.samples[i] for i in group]
        spans = [folder.span(sample.info, size) for sample in samples]
        scales = [scale(sample.info, size) for sample in samples]
        kept = [_share_kept(size, s.info) for s in samples]
        rows.append(
            {
                "size": str(size),
                "videos": len(samples),
                "clips": sum((s.last - s.first) // span for s, span in zip(samples, spans, strict=True)),
                "enlarged": sum(each > 1 for each in scales),
                "largest_scale": max(scales, default=None),
                "frame_kept": sum(kept) / len(kept) if kept else None,
            }
        )
    return rows


def _share_kept(size: Size, info: video.Info) -> float:
    """Share of a frame's area that is left when it is scaled to cover the size and cut to it."""
    shape = info.width / info.height * size.height / size.width
    return min(shape, 1 / shape)


# ---------------------------------------------------------------------------------------------------------- pictures


def _contact_sheet(
    path: Path, folder: dataset.VideoFolder, cfg: schema.Config | None, count: int
) -> list[tuple[str, str]]:
    """Stills of clips spread over the folder, as a config cuts them or whole; returns (video, reason) of the unreadable."""
    count = min(count, len(folder))
    chosen = [i * len(folder) // count for i in range(count)]
    clips, titles, unread = [], [], []
    for index in tqdm(chosen, "drawing the contact sheet", unit="clip", leave=False):
        sample = folder.samples[index]
        try:
            clips.append(_stills(folder, index, cfg))
        except video.VideoError as error:
            unread.append((sample.name, error.reason))
            continue
        info = sample.info
        facts = f"{info.width}x{info.height}, {(sample.last - sample.first) / info.fps:.3g} s"
        titles.append(f"{sample.name} ({facts}): {sample.caption or 'no caption'}")
    if clips:
        video.contact_sheet(path, clips, titles, FRAMES_SHOWN)
    return unread


def _stills(folder: dataset.VideoFolder, index: int, cfg: schema.Config | None) -> video.Clip:
    """A clip as training sees it first; without a config, frames from all over the video."""
    sample = folder.samples[index]
    if cfg is not None:
        return video.Clip(folder.frames(index, 0).transpose(0, 1), 1.0)
    count = min(FRAMES_SHOWN, sample.last - sample.first)
    step = (sample.last - sample.first) / count
    frames = [video.read(sample.path, sample.first + int(i * step), 1).frames for i in range(count)]
    return video.Clip(torch.cat(frames), 1.0)
