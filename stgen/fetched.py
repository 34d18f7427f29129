"""Saved pipelines from the Hugging Face hub: only files that a pipeline may hold come, and they are judged like any."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from stgen.saved import INDEX, SHIM, SHIM_CLASS, SavedError, check, index_of

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.md", "*.jinja"]  # code is never fetched
OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def is_hub_id(name: str | Path) -> bool:
    """Whether a name means a repository on the hub: OWNER/NAME, where neither that path nor a folder OWNER is here.

    A folder's name is never looked up there, so that a typo fetches nothing; `runs/...` is always a folder.
    """
    owner = Path(name).parent
    here = Path(name).exists() or owner.is_dir() or owner == Path("runs")
    return bool(HUB_ID.fullmatch(str(name))) and not here


def missing(name: str | Path) -> str | None:
    """What is not here, if a name looks like a hub id and means a path that does not exist; the beginning of an error."""
    path = Path(name)
    if path.exists() or is_hub_id(name) or not HUB_ID.fullmatch(str(name)):
        return None
    there = path.parent.is_dir()
    return f"{path.parent}/ is a folder here and holds no {path.name}" if there else f"{path} is not here"


@contextmanager
def opened(name: str | Path, options: dict[str, Any]) -> Iterator[Path]:
    """A folder that can be loaded from within the block: as `checked_folder` gives it, or a view of it without its code."""
    folder = checked_folder(name, options)
    index = index_of(folder)
    if index.get("_class_name") != SHIM_CLASS:
        yield folder
        return
    with TemporaryDirectory(prefix="stgen-") as view:
        for entry in folder.iterdir():
            if entry.name not in (INDEX, SHIM):
                (Path(view) / entry.name).symlink_to(entry.resolve())
        (Path(view) / INDEX).write_text(json.dumps({**index, "_class_name": "VideoPipeline"}))
        yield Path(view)


def checked_folder(name: str | Path, options: dict[str, Any]) -> Path:
    """The folder of a saved pipeline, local or fetched by a hub id, once `saved.check` has judged it.

    options: as `huggingface_hub.snapshot_download` takes them; others are left alone. Raises SavedError.
    """
    if reason := missing(name):
        raise SavedError(f"{reason}; name a saved pipeline, such as RUN/final, or a hub id (OWNER/NAME)")
    if not is_hub_id(name):
        return check(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    taken = {key: options[key] for key in OPTIONS if options.get(key) is not None}
    try:
        folder = Path(snapshot_download(str(name), allow_patterns=WANTED, **taken))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise SavedError(
            f"{name} is neither a folder with a {INDEX} nor a repository that can be fetched: {reason}"
        ) from None
    return check(folder, within=folder.parent.parent)  # a snapshot's files are links into its repository's store
