"""Latents and embeddings on disk: what is kept, what makes an entry stale, and training from it.

A clip's entry is good for one file (its size and time, else its SHA-256), one size of clip and one recipe: the codec's
class, config, weights and number format, and data.fps, crop and clip. A prompt's entry is good for one text encoder, one
text.max_length and one train.mixed_precision. What a config lacks is encoded by `stgen data cache`, and named by training.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from stgen import checkpoint, dataset, schema, shapes, tars, tensor_store, text, video
from stgen.members import Member
from stgen.tensor_store import CacheError, Reader

CLIPS, TEXT = "clips", "text"
Key = tuple[int, int]  # (index of a video, which of its clips)


def folder_of(cfg: schema.Config) -> Path:
    """Where the cache of a config lies: data.cache_dir, else beside the videos, else beside the run folder."""
    data = cfg.data
    if data.cache_dir is not None:
        return Path(data.cache_dir)
    videos = data.huggingface.folder if data.source == "huggingface" else data.train_data_dir
    if videos is None:
        return cfg.output_dir.with_name(f"{cfg.output_dir.name}-cache")
    folder = Path(videos)
    if data.source == "webdataset" and not folder.exists():  # a pattern
        folder = tars.root_of(str(videos))
    folder = folder.resolve()
    return folder.with_name(f"{folder.name}-cache")


def clips_per_video(cfg: schema.Config) -> int:
    """How many clips of a video are kept; one where every epoch cuts the same."""
    return cfg.data.cache_clips if "random" in (cfg.data.clip, cfg.data.crop) else 1


# ------------------------------------------------------------------------------------------------------ fingerprints


def stamp(path: Path | Member) -> tuple[int, int]:
    """Bytes and time of change, in ns, of a video; of a folder of frames the sum and the latest."""
    found = [file.stat() for file in _files(path)]
    return sum(one.st_size for one in found), max((one.st_mtime_ns for one in found), default=0)


def digest(path: Path | Member) -> str:
    """SHA-256 of a video's bytes; of a folder of frames, of their names and bytes. A file of many clips is read once."""
    return _digest(path, *stamp(path))


@lru_cache(maxsize=4096)
def _digest(path: Path | Member, size: int, changed: int) -> str:
    total = hashlib.sha256()
    for file in _files(path):
        total.update(os.fsencode(file.name) if path.is_dir() else b"")
        with file.open() if isinstance(file, Member) else open(file, "rb") as stream:
            while block := stream.read(2**20):
                total.update(block)
    return total.hexdigest()


def _files(path: Path | Member) -> Sequence[Path | Member]:
    return video.frame_files(path) if isinstance(path, Path) and path.is_dir() else [path]


def _short(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def clip_recipe(cfg: schema.Config, component: Any) -> dict[str, Any]:
    """Everything but the video and the size of the clip that decides its latents."""
    weights = hashlib.sha256()
    for name, tensor in sorted(component.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    settings = {name: value for name, value in dict(component.config).items() if not name.startswith("_")}
    return {
        "codec": type(component).__name__,
        "codec.weights": weights.hexdigest()[:16],
        "codec.config": _short(settings),
        "codec.dtype": str(next(iter(component.state_dict().values())).dtype).removeprefix("torch."),
        "data.fps": cfg.data.fps,
        "data.crop": cfg.data.crop,
        "data.clip": cfg.data.clip,
    }


def text_recipe(cfg: schema.Config, local: bool = False) -> dict[str, Any]:
    """Everything but the prompt that decides its embedding; the encoder is told by its files, so it need not be loaded."""
    assert isinstance(cfg.text, schema.PretrainedText)
    files = text.files(cfg.text.path, cfg.text.subfolder, local)
    return {
        "text encoder": _short([(file.name, _sampled(file)) for file in files]),
        "text.max_length": cfg.text.max_length,
        "train.mixed_precision": cfg.train.mixed_precision,  # the encoder computes within it
    }


def _sampled(path: Path, block: int = 2**16, blocks: int = 256) -> str:
    """SHA-256 of a file; of one beyond 16 MB, of its size and 256 blocks spread over it, which no two trainings share."""
    size = path.stat().st_size
    total = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for i in range(blocks):
            if size > block * blocks:
                file.seek((size - block) * i // (blocks - 1))
            total.update(file.read(block))
    return total.hexdigest()


# ------------------------------------------------------------------------------------------------------------- clips


@dataclass(frozen=True)
class Place:
    """Where an entry's tensor lies."""

    path: Path
    number: int
    entry: dict[str, Any]


def entry_of(folder: dataset.VideoFolder, key: Key) -> dict[str, Any]:
    """What is written beside a clip's tensor; `rejected` says why where the file cannot even be told by its bytes."""
    path = folder.samples[key[0]].path
    size, changed = _stamp_or_gone(path)
    entry = {**_clip(folder, key), "size": size, "changed": changed}
    try:
        return {**entry, "sha256": digest(path)}
    except OSError as error:
        return {**entry, "rejected": f"cannot be read: {error.strerror or error}"}


def _stamp_or_gone(path: Path | Member) -> tuple[int, int]:
    """As `stamp`; (-1, 0) for a file that is not there any more."""
    try:
        return stamp(path)
    except OSError:
        return -1, 0


def _clip(folder: dataset.VideoFolder, key: Key) -> dict[str, Any]:
    """What an entry shares with a clip that is wanted, whatever has become of the file."""
    sample = folder.samples[key[0]]
    span, extent = [sample.first, sample.last], list(folder.sizes[sample.size])
    return {"video": sample.name, "span": span, "extent": extent, "clip": key[1]}


class Latents:
    """The clips of a folder that a cache holds, for one config and recipe. Raises CacheError where there is no cache."""

    def __init__(self, cfg: schema.Config, folder: dataset.VideoFolder, recipe: Mapping[str, Any]):
        self.cfg, self.folder, self.recipe = cfg, folder, recipe
        self.count = clips_per_video(cfg)
        self._read = Reader()
        self._known = list(tensor_store.shards(folder_of(cfg), CLIPS))
        self._places: dict[Key, Place] = {}
        self._match()

    def __getitem__(self, key: Key) -> tuple[Tensor, str, str]:
        """(latents [C, t, h, w], caption, file) of a video in an epoch; epochs take turns with the clips there are.

        Another video takes the place of one that could not be read, as it does without a cache.
        """
        index, epoch = key
        for candidate in self.folder.candidates(index, epoch):
            place = self._places[candidate, epoch % self.count]
            if place.entry.get("rejected") is None:
                latents = self._read(place.path, place.number)
                return latents, self.folder.samples[candidate].caption, self.folder.name(candidate)
        raise CacheError(f"{self.folder.name(index)} and the videos that might stand for it cannot be read")

    def within(self, ids: Sequence[int]) -> "Latents":
        """The same, replacing videos that cannot be read by those of `ids` only."""
        other = object.__new__(Latents)
        other.__dict__ = {**self.__dict__, "folder": self.folder.within(ids)}
        return other

    @property
    def wanted(self) -> list[Key]:
        """Every clip that the config wants kept."""
        return [(index, number) for index in range(len(self.folder)) for number in range(self.count)]

    @property
    def missing(self) -> list[Key]:
        """Those of them that are not there, or stale."""
        return [key for key in self.wanted if key not in self._places]

    @property
    def rejected(self) -> list[Key]:
        """Those that could not be read when they should have been encoded; a later try may find them whole."""
        return [key for key, place in self._places.items() if place.entry.get("rejected") is not None]

    @property
    def rejects(self) -> list[tuple[str, str]]:
        """Videos that could not be read when they should have been encoded, with reasons."""
        found = {self.folder.name(key[0]): place.entry.get("rejected") for key, place in self._places.items()}
        return [(name, reason) for name, reason in found.items() if reason is not None]

    @property
    def others(self) -> list[tensor_store.Shard]:
        """Shards no entry of which this config uses."""
        used = {place.path for place in self._places.values()}
        return [shard for shard in self._known if shard.path not in used]

    def whys(self) -> dict[str, list[str]]:
        """Reasons why clips are missing, each with the videos it holds for."""
        found: dict[str, list[str]] = defaultdict(list)
        before: dict[str, list[tuple[dict, dict]]] = defaultdict(list)
        for shard in self._known:
            for entry in shard.entries:
                before[str(entry.get("video"))].append((shard.recipe, entry))
        for index in dict.fromkeys(index for index, _ in self.missing):
            name = self.folder.name(index)
            found[self._why(index, before[name])].append(name)
        return found

    def _match(self) -> None:
        """Find the entry of every clip that is wanted, newest first, whose file is as it was."""
        ours: dict[str, list[Place]] = defaultdict(list)
        for shard in self._known:
            if shard.recipe == self.recipe:
                for number, entry in enumerate(shard.entries):
                    ours[_identity(entry)].append(Place(shard.path, number, entry))
        with ThreadPoolExecutor(8) as pool:
            indices = range(len(self.folder))
            checked = pool.map(lambda index: self._of_video(index, ours), indices)
            for found in tqdm(checked, "checking the cache", len(indices), unit="video", delay=2, leave=False):
                self._places.update(found)

    def _of_video(self, index: int, ours: Mapping[str, list[Place]]) -> dict[Key, Place]:
        found, file = {}, _File(self.folder.samples[index].path)
        for number in range(self.count):
            for place in reversed(ours.get(_identity(_clip(self.folder, (index, number))), [])):
                if file.is_that_of(place.entry):
                    found[index, number] = place
                    break
        return found

    def _why(self, index: int, before: list[tuple[dict, dict]]) -> str:
        ours = [entry for recipe, entry in before if recipe == self.recipe]
        extent = list(self.folder.sizes[self.folder.samples[index].size])
        alike = [entry for entry in ours if entry.get("extent") == extent]
        if alike:
            kept = len({entry.get("clip") for entry in alike})
            return (
                "changed on disk since" if kept >= self.count else f"kept with fewer clips ({kept}, not {self.count})"
            )
        if ours:
            return f"kept at another size ({_size(ours[-1].get('extent'))}, not {_size(extent)})"
        if before:
            return differences(before[-1][0], self.recipe)
        return "not cached yet"


class _File:
    """A file on disk, hashed at most once, and only where its time of change does not settle what it is."""

    def __init__(self, path: Path | Member):
        self.path = path
        self.size, self.changed = _stamp_or_gone(path)

    def is_that_of(self, entry: Mapping[str, Any]) -> bool:
        if entry.get("size") != self.size or entry.get("changed") == self.changed:
            return entry.get("size") == self.size
        try:
            return entry.get("sha256") == _digest(self.path, self.size, self.changed)
        except OSError:
            return False


def _identity(entry: Mapping[str, Any]) -> str:
    return json.dumps([entry.get(name) for name in ("video", "span", "extent", "clip")])


def _size(extent: Any) -> str:
    return "x".join(map(str, extent or []))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """`made with codec.dtype float32, not bfloat16` for what two recipes differ in."""
    changed = [f"{name} {old.get(name)}, not {new[name]}" for name in new if old.get(name) != new[name]]
    return "made with " + "; ".join(changed[:2])


def open_latents(cfg: schema.Config, folder: dataset.VideoFolder, component: Any) -> Latents:
    """The cache that data.cache: disk trains from. Raises CacheError, with the command to run, unless it holds every clip."""
    with _told(cfg):
        found = Latents(cfg, folder, clip_recipe(cfg, component))
    if missing := found.missing:
        lacking = f"{len(missing)} of {len(found.wanted)} clips"
        raise CacheError(_refusal(cfg, lacking, found.whys()))
    return found


def _refusal(cfg: schema.Config, lacking: str, whys: Mapping[str, list[str]]) -> str:
    reasons = [f"{len(names)} {why} ({', '.join(names[:2])}{', …' * (len(names) > 2)})" for why, names in whys.items()]
    return f"data.cache: disk: {folder_of(cfg)} lacks {lacking}: {'; '.join(reasons)}; {remedy(cfg)}"


def remedy(cfg: schema.Config) -> str:
    """What to run; the run folder's config.yaml is the config with all overrides."""
    return f"run: stgen data cache {cfg.output_dir / 'config.yaml'}"


class _told:
    """Within it an error about the cache also says what to run."""

    def __init__(self, cfg: schema.Config):
        self.cfg = cfg

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, _) -> None:
        if isinstance(error, CacheError):
            raise CacheError(f"{error}; {remedy(self.cfg)}") from None


# ------------------------------------------------------------------------------------------------------ fitted codec


def codec_file(cfg: schema.Config) -> Path:
    """Where the cache keeps a codec fitted to the folder: one for each way to fit it, whatever the seed."""
    keys = {"num_frames", "height", "width", "fps", "crop", "clip"}
    way = [cfg.codec.model_dump(mode="json"), cfg.data.model_dump(mode="json", include=keys)]
    return folder_of(cfg) / f"codec-{_short(way)}.safetensors"


def save_codec(cfg: schema.Config, component: Any) -> None:
    """Keep a fitted codec, so that training encodes and decodes with the very one that the cache was made with.

    Of several machines that fit at once the first decides: load it then.
    """
    tensor_store.publish(codec_file(cfg), component.state_dict())


def load_codec(cfg: schema.Config, component: Any) -> None:
    """Load the codec that the cache was made with into one that is to be fitted. Raises CacheError if there is none."""
    path = codec_file(cfg)
    try:
        checkpoint.load_into(component, load_file(path), "codec")
    except (OSError, SafetensorError, checkpoint.CheckpointError) as error:
        reason = "is not there" if isinstance(error, FileNotFoundError) else f"cannot be used ({error})"
        raise CacheError(
            f"data.cache: disk: the codec fitted to this folder, {path}, {reason}; {remedy(cfg)}"
        ) from None


# ----------------------------------------------------------------------------------------------------------- prompts


def prompts_of(cfg: schema.Config, folder: dataset.VideoFolder, split: shapes.Split | None) -> list[str]:
    """Every prompt of a training: captions, those of validation, and the empty one for dropout; each once."""
    captions = [sample.caption for sample in folder.samples]
    asked = [*(cfg.validation.prompts or []), cfg.validation.negative_prompt, ""]
    combos = [combo.prompt for combo in (*split.seen, *split.held_out)] if split is not None else []
    return list(dict.fromkeys([*captions, *asked, *combos]))


class Embeddings:
    """The prompts that a cache holds, for one config. Raises CacheError where there is no cache."""

    def __init__(self, cfg: schema.Config):
        self.recipe = text_recipe(cfg)
        self._read = Reader()
        self._known = list(tensor_store.shards(folder_of(cfg), TEXT))
        self._places: dict[str, tuple[Path, int]] = {}
        for shard in self._known:
            if shard.recipe == self.recipe:
                self._places.update({str(e.get("prompt")): (shard.path, i) for i, e in enumerate(shard.entries)})

    def __getitem__(self, prompt: str) -> Tensor:
        """[L, width]. Raises CacheError for a prompt that is not kept."""
        if prompt not in self._places:
            raise CacheError(f"data.cache: disk: the prompt {prompt[:80]!r} is not kept; run stgen data cache again")
        return self._read(*self._places[prompt])

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """Those of `prompts` that are not kept."""
        return [prompt for prompt in prompts if prompt not in self._places]

    def why(self) -> str:
        """Why prompts are missing."""
        if self._places or not self._known:
            return "not cached yet"
        return differences(self._known[-1].recipe, self.recipe)

    @property
    def others(self) -> list[tensor_store.Shard]:
        """Shards of other encoders or settings."""
        return [shard for shard in self._known if shard.recipe != self.recipe]


def open_text(
    cfg: schema.Config, folder: dataset.VideoFolder, split: shapes.Split | None
) -> tuple[text.KnownPrompts, Any, int] | None:
    """What stands for the text encoder where training reads embeddings, its tokenizer and width; else None.

    Raises CacheError, with the command to run, unless the cache holds every prompt of the training.
    """
    if cfg.data.cache != "disk" or not isinstance(cfg.text, schema.PretrainedText):
        return None
    with _told(cfg):
        found = Embeddings(cfg)
    wanted = prompts_of(cfg, folder, split)
    if missing := found.missing(wanted):
        shown = [repr(prompt[:40]) for prompt in missing]
        raise CacheError(_refusal(cfg, f"{len(missing)} of {len(wanted)} prompts", {found.why(): shown}))
    tokenizer = text.load_tokenizer(cfg.text.path, cfg.text.subfolder)
    return text.KnownPrompts(found.__getitem__), tokenizer, found[wanted[0]].shape[1]
