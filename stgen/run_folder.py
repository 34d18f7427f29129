"""The folder of a run: held by one process, never written over, and gone on with by what has made it alone."""

import fcntl
import hashlib
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from stgen import checkpoint, config, dataset, ranks, schema
from stgen.logger import DISK

# Keys that may differ on resume without changing what the run computes up to its limit.
FREE_KEYS = (
    "run.output_dir", "run.resume_from_checkpoint", "run.allow_changed_config", "run.device",
    "log.", "checkpoint.", "validation.", "distributed.", "data.dataloader_num_workers", "data.decode_timeout",
    "data.cache_dir", "data.huggingface.folder",
)  # fmt: skip
LIMIT_KEYS = ("train.max_train_steps", "train.max_train_seconds", "train.num_train_epochs")


class TrainingError(Exception):
    """Something that ends the run; a sentence that says where to look and what to do."""


# ----------------------------------------------------------------------------------------------------- the folder


@contextmanager
def held(run_dir: Path, keep: bool) -> Iterator[None]:
    """Make the run folder and hold it for this run; an earlier run that is not resumed is moved aside, whole.

    The first rank does it for all. Raises TrainingError when another run trains into it.
    """
    if not ranks.is_first():
        yield
        return
    try:
        if run_dir.exists() and not run_dir.is_dir():
            raise TrainingError(f"run.output_dir: {run_dir} is a file; name a folder")
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = _lock(run_dir)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise TrainingError(
            f"run.output_dir: {run_dir} cannot be made or written to: {reason}; choose another"
        ) from None
    if not keep and ((run_dir / "metrics.jsonl").exists() or any(run_dir.glob("checkpoint-*"))):
        home = run_dir.resolve()
        aside = next(p for i in itertools.count(1) if not (p := home.with_name(f"{home.name}-old{i}")).exists())
        home.rename(aside)
        home.mkdir()
        tqdm.write(f"{run_dir} held an earlier run; it now lies in {aside} (resume it with run.output_dir={aside})")
        lock.close()
        lock = _lock(home)
    try:
        yield
    except OSError as error:
        if error.errno not in DISK:
            raise
        raise TrainingError(_told(run_dir, error)) from error
    finally:
        lock.close()


def _told(run_dir: Path, error: OSError) -> str:
    """A disk's refusal as a sentence."""
    return (
        f"{error.filename or run_dir}: {(error.strerror or str(error)).lower()}; checkpoints already written to {run_dir} are "
        "whole: make room, or choose another run.output_dir, and go on with run.resume_from_checkpoint=latest"
    )


def _lock(run_dir: Path) -> IO[str]:
    """Hold the folder until the file is closed or the process ends."""
    lock = (run_dir / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise TrainingError(
            f"run.output_dir: another process is training into {run_dir}; choose another folder"
        ) from None
    return lock


def goes_on(cfg: schema.Config) -> bool:
    """Whether the run continues in its own folder; a run that starts from another one's checkpoint is a new run."""
    which = cfg.run.resume_from_checkpoint
    return which == "latest" or (which != "none" and cfg.output_dir.resolve() in (Path(which) / "_").resolve().parents)


def fingerprint(folder: dataset.VideoFolder) -> str:
    """A hash of the usable videos, in order, and what metadata says of them: it decides the split and the order of training."""
    return hashlib.sha256(os.fsencode("\n".join(folder.identity(i) for i in range(len(folder))))).hexdigest()


# -------------------------------------------------------------------------------------------- what it was made by


def check_same_folder(cfg: schema.Config, folder: dataset.VideoFolder, loaded: checkpoint.Loaded | None) -> None:
    """Raise TrainingError when the usable videos are not those that the checkpoint was trained on."""
    if loaded is None or cfg.run.allow_changed_config or loaded.state["files"] == fingerprint(folder):
        return
    raise TrainingError(
        f"{folder.root} no longer holds the videos that {loaded.path} was trained on, so order and held-out clips would "
        "change (restore them, or say run.allow_changed_config=true)"
    )


def check_same_config(cfg: schema.Config, saved: schema.Config, path: Path) -> None:
    """Raise TrainingError listing every key that shapes the run and differs from that of the checkpoint at `path`.

    Keys that are younger than the checkpoint have their defaults there.
    """
    both = (x.model_dump(mode="json") for x in (saved, cfg))
    changed = [line for line in config.differences(*both) if not line.startswith(FREE_KEYS)]
    limits = [line for line in changed if line.startswith(LIMIT_KEYS)]
    others = [line for line in changed if line not in limits]
    if limits:
        ranks.say("the run's limit changes, and with it the course of the learning rate: " + "; ".join(limits))
    if others and not cfg.run.allow_changed_config:
        raise TrainingError(
            f"{path} was written under another config: {'; '.join(others)} "
            "(restore these keys, or say run.allow_changed_config=true)"
        )


def identity(cfg: schema.Config) -> dict[str, Any]:
    """What must be alike on all ranks."""
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        code.update(file.read_bytes())
    packages = {package: version_of(package) for package in ("torch", "diffusers", "transformers")}
    return {"config": cfg.model_dump(mode="json"), "the code of stgen": code.hexdigest()[:12], "packages": packages}


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
