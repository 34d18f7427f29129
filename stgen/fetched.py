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
    if Path(name).exists() or not HUB_ID.fullmatch(str(name)):
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
