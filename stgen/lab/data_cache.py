"""`stgen data cache`: the clips and prompts of a folder, encoded once and kept for training.

What is missing or stale is shared out over processes. Each decodes, encodes and writes shards of its own, so that a kill
costs the shards that were being filled, and the same command goes on from there.
"""

import multiprocessing
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from stgen import build, codec, config, dataset, latent_cache, schema, source, tensor_store, text, video
from stgen.checkpoint import StopSignals
from stgen.flops import readable
from stgen.latent_cache import Embeddings, Key, Latents
from stgen.tensor_store import CacheError

Say = Callable[[int], Any]
Stopped = Callable[[], bool]


@dataclass(frozen=True)
class Share:
    """What one process does."""

    cfg: schema.Config
    folder: dataset.VideoFolder
    todo: Sequence[Any]  # keys of clips, or prompts
    device: str
    threads: int
    workers: int  # processes that decode for it


def cache(cfg: schema.Config, jobs: int = 1, prune: bool = False) -> str | None:
    """Bring the cache of a config up to date; returns the name of the signal that stopped it. Raises CacheError."""
    cfg = cfg.model_copy(update={"data": cfg.data.model_copy(update={"cache": "none"})})
    target, device = latent_cache.folder_of(cfg), build.device_of(cfg)
    tensor_store.prepare(target)
    with StopSignals() as stop:
        folder, split = source.open_folder(cfg, cfg.output_dir)
        if isinstance(cfg.text, schema.PretrainedText):
            prompts = _missing_prompts(cfg, latent_cache.prompts_of(cfg, folder, split))
            _run(encode_prompts, _shares(cfg, folder, prompts, device, jobs), "encoding prompts", "prompt", stop)
        component = _codec(cfg, folder, device)
        recipe = latent_cache.clip_recipe(cfg, component)
        latents = Latents(cfg, folder, recipe)
        _tell_clips(latents, target)
        _check_room(latents, codec.as_codec(component), cfg, target)
        todo, began = latents.missing + latents.rejected, time.monotonic()  # a file may be whole by now
        del component  # each process loads its own
        _run(encode_clips, _shares(cfg, folder, todo, device, jobs), "encoding clips", "clip", stop)
        if stop.requested:
            tqdm.write(f"stopped by {stop.requested}; what is encoded is kept: the same command goes on from there")
            return stop.requested
        speed = f", {len(todo) / (time.monotonic() - began):.2f} clips a second" if todo else ""
        _farewell(cfg, Latents(cfg, folder, recipe), target, prune, speed)
    return None


def _codec(cfg: schema.Config, folder: dataset.VideoFolder, device: torch.device) -> Any:
    """The codec on its device; one that is fitted to the folder is fitted once, and kept with the cache."""
    component = build.build_codec(cfg).to(device)
    if not hasattr(component, "fit"):
        return component
    if not latent_cache.codec_file(cfg).exists():
        source.fit_or_load_codec(cfg, component, folder, folder.split(cfg.data.held_out_clips)[0], None)
        latent_cache.save_codec(cfg, component)
    latent_cache.load_codec(cfg, component)  # another machine's, perhaps
    return component


# ----------------------------------------------------------------------------------------------------------- in words


def _missing_prompts(cfg: schema.Config, wanted: Sequence[str]) -> list[str]:
    """Prompts that are not kept. An encoder that was never on this machine is fetched first: its files are looked at."""
    assert isinstance(cfg.text, schema.PretrainedText)
    try:
        known = Embeddings(cfg)
    except text.TextError:
        text.load_pretrained(cfg.text.path, cfg.text.subfolder)
        known = Embeddings(cfg)
    if missing := known.missing(wanted):
        tqdm.write(f"{len(missing)} of {len(wanted)} prompts {known.why()}")
    return missing


def _tell_clips(latents: Latents, target: Path) -> None:
    tqdm.write(f"{len(latents.wanted)} clips of {len(latents.folder)} videos are wanted in {target}")
    for why, names in latents.whys().items():
        shown = config.one_line(", ".join(names[:3]))  # a terminal may refuse bytes that are no UTF-8
        tqdm.write(f"  {len(names)} videos {why}: {shown}{', …' * (len(names) > 3)}")


def _check_room(latents: Latents, encoder: codec.Codec, cfg: schema.Config, target: Path) -> None:
    """Raise CacheError where the disk has less room than the clips will take."""
    half = isinstance(cfg.codec, schema.AutoencoderCodec) and cfg.codec.dtype != "float32"
    folder = latents.folder
    wanted = Counter(folder.sizes[folder.samples[index].size] for index, _ in latents.missing)
    numbers = {size: torch.Size(encoder.latent_shape(*size)).numel() for size in wanted}
    needed = sum(numbers[size] * (2 if half else 4) * count for size, count in wanted.items())
    free = shutil.disk_usage(target).free
    if needed > free:
        raise CacheError(
            f"data.cache_dir: {target} needs about {readable(needed, 'B')} more, {readable(free, 'B')} are free; make room, or "
            "choose another folder, smaller clips or a codec that compresses more"
        )


def _farewell(cfg: schema.Config, latents: Latents, target: Path, prune: bool, speed: str) -> None:
    others = latents.others
    known = Embeddings(cfg) if isinstance(cfg.text, schema.PretrainedText) else None
    others += known.others if known is not None else []
    size = readable(sum(file.stat().st_size for file in target.glob("*.safetensors")), "B")
    tqdm.write(f"{target} holds {len(latents.wanted)} clips of {len(latents.folder)} videos, {size} in all{speed}")
    for name, reason in latents.rejects[:5]:
        tqdm.write(config.one_line(f"  {name} cannot be read, another stands for it: {reason}"))
    if others and prune:
        for shard in others:
            tensor_store.remove(shard)
        tqdm.write(f"removed {len(others)} shards that this config does not use")
    elif others:
        unused = readable(sum(shard.bytes for shard in others), "B")
        tqdm.write(f"  {unused} of it belong to other settings or to files as they were; --prune removes them")
    tqdm.write("train from it: data.cache=disk" + (f" data.cache_dir={target}" if cfg.data.cache_dir else ""))


# ------------------------------------------------------------------------------------------------------ the processes


def _shares(cfg: schema.Config, folder: dataset.VideoFolder, todo: Sequence[Any], device: torch.device, jobs: int):
    """The work dealt out in turn, over the CUDA devices if there are several."""
    jobs = max(1, min(jobs, len(todo)))
    workers = cfg.data.dataloader_num_workers // jobs or min(1, cfg.data.dataloader_num_workers)
    for i in range(jobs if todo else 0):
        place = f"cuda:{i % torch.cuda.device_count()}" if device.type == "cuda" else "cpu"
        threads = max(1, torch.get_num_threads() // jobs)
        yield Share(cfg, folder, todo[i::jobs], place, threads, workers)


def _run(work: Callable[[Share, Say, Stopped], None], shares: Iterable[Share], name: str, unit: str, stop: StopSignals):
    """Do the shares, one here, several in processes of their own. Raises CacheError if one fails."""
    shares = list(shares)
    with tqdm(total=sum(len(share.todo) for share in shares), desc=name, unit=unit, disable=not shares) as bar:
        if len(shares) == 1:
            work(shares[0], bar.update, lambda: stop.requested is not None)
        elif shares:
            _run_processes(work, shares, bar, stop)


def _run_processes(work: Callable, shares: Sequence[Share], bar: tqdm, stop: StopSignals) -> None:
    context = multiprocessing.get_context("spawn")
    queue, ending = context.Queue(), context.Event()
    processes = [context.Process(target=_process, args=(work, share, queue, ending)) for share in shares]
    for process in processes:
        process.start()
    errors = []
    while any(process.is_alive() for process in processes) or not queue.empty():
        if stop.requested or errors:
            ending.set()
        try:
            done = queue.get(timeout=0.2)
        except Empty:
            continue
        if isinstance(done, str):
            errors.append(done)
        else:
            bar.update(done)
    if errors:
        raise CacheError(errors[0])
    if dead := [process.exitcode for process in processes if process.exitcode]:
        raise CacheError(
            f"{len(dead)} of {len(shares)} processes died (exit code {dead[0]}; -9 is mostly a lack of memory); what they wrote "
            "is kept: start again, with fewer --jobs if memory ran out"
        )


def _process(work: Callable, share: Share, queue: Any, ending: Any) -> None:
    """One process: its errors become one line, and it ends when it is told to or its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; what to do is the parent's decision
    torch.set_num_threads(share.threads)
    parent = os.getppid()
    try:
        work(share, queue.put, lambda: ending.is_set() or os.getppid() != parent)
    except Exception as error:
        queue.put(config.one_line(str(error) or type(error).__name__))


def encode_prompts(share: Share, say: Say, stopped: Stopped) -> None:
    """Encode prompts and keep them, under the precision of training."""
    cfg = share.cfg
    assert isinstance(cfg.text, schema.PretrainedText)
    encoder, tokenizer, _ = text.load_pretrained(cfg.text.path, cfg.text.subfolder)
    device = torch.device(share.device)
    encoder.to(device)
    recipe = latent_cache.text_recipe(cfg)
    with tensor_store.Writer(latent_cache.folder_of(cfg), latent_cache.TEXT, recipe) as writer:
        for prompt in share.todo:
            if stopped():
                return
            with torch.autocast(device.type, torch.bfloat16, enabled=cfg.train.mixed_precision == "bf16"):
                embeds, mask = text.encode(encoder, tokenizer, [prompt], cfg.text.max_length)
            writer.add(embeds[0][mask[0]], {"prompt": prompt})
            say(1)


def encode_clips(share: Share, say: Say, stopped: Stopped) -> None:
    """Decode, encode and keep clips; one that cannot be read is kept as such, with its reason."""
    device = torch.device(share.device)
    component = _codec(share.cfg, share.folder, device)
    encoder, recipe = codec.as_codec(component), latent_cache.clip_recipe(share.cfg, component)
    with tensor_store.Writer(latent_cache.folder_of(share.cfg), latent_cache.CLIPS, recipe) as writer, torch.no_grad():
        for frames, entry in _decoded(share):
            if stopped():
                return
            latents = torch.empty(0) if frames is None else encoder.encode(codec.to_unit(frames[None].to(device)))[0]
            writer.add(latents, entry)
            say(1)


class _Clips(Dataset):
    """(frames, entry) of each key; frames are None where the video cannot be read."""

    def __init__(self, folder: dataset.VideoFolder, keys: Sequence[Key]):
        self.folder, self.keys = folder, keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, place: int) -> tuple[torch.Tensor | None, dict[str, Any]]:
        index, number = self.keys[place]
        with self.folder.noted(index):
            entry = latent_cache.entry_of(self.folder, (index, number))
            if "rejected" in entry:
                return None, entry
            try:
                return self.folder.frames(index, number), entry
            except video.VideoError as error:
                return None, {**entry, "rejected": error.reason}


def _decoded(share: Share) -> Iterable[tuple[torch.Tensor | None, dict[str, Any]]]:
    folder, options = dataset.watched(share.folder, share.workers, share.cfg.data.decode_timeout)
    options |= {"batch_size": None, "collate_fn": _as_it_is}
    clips, todo = _Clips(folder, share.todo), share.todo
    return dataset.NamedLoader(clips, folder, lambda place: todo[place : place + 1], **options)


def _as_it_is(item: Any) -> Any:
    return item
