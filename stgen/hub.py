"""Rows of a Hugging Face dataset as a folder of clips: streamed once, kept as files, and from then on a folder like any.

So a run reads only the rows that it asks for, and its order, splits, buckets and exact resume are those of a folder.
An interrupted fetch goes on where it stopped. Columns start, end and weight are taken over (`stgen.listing`).
"""

import fcntl
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stgen.listing import CAPTION_COLUMNS, DataError, clean, json_object

VIDEO_COLUMNS = ("video", "mp4", "image", "file_name", "path")
TAKEN_OVER = ("start", "end", "weight")
SIGNS = {  # (place, bytes): how files of a kind begin
    ".mp4": (4, b"ftyp"), ".mkv": (0, b"\x1aE\xdf\xa3"), ".avi": (8, b"AVI "), ".gif": (0, b"GIF8"),
    ".png": (0, b"\x89PNG"), ".jpg": (0, b"\xff\xd8\xff"), ".webp": (8, b"WEBP"), ".bmp": (0, b"BM"),
}  # fmt: skip
MAX_ROW = 2**31  # bytes of one video


def fetch(name: str, asked: Any, folder: Path) -> Path:
    """The first `asked.clips` rows of a dataset as files with metadata.jsonl in `folder`, which is returned.

    name: folder or hub id; asked: a `data_spec.HuggingFace`. Raises DataError where the datasets library is missing, for a
    dataset or column that cannot be read, and where `folder` holds something else, or more rows than asked for.
    """
    told = {
        "dataset": name,
        **asked.model_dump(include={"config", "split", "revision", "video_column", "caption_column"}),
    }
    if not _is_whole(folder, told, asked.clips):
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if not _is_whole(folder, told, asked.clips):  # another run may have been at it
                _fetch_rest(name, asked, folder, told)
    return folder


def _is_whole(folder: Path, told: dict[str, Any], clips: int) -> bool:
    """Whether an earlier fetch left all rows that are asked for. Raises DataError if it left other ones, or more."""
    state, kept = _state(folder, told), len(_whole_lines(folder / "metadata.jsonl"))
    if kept > clips:
        raise DataError(
            f"data.huggingface.clips: {clips}, but {folder} holds {kept} rows; write {kept}, or name another "
            "data.huggingface.folder"
        )
    return state.get("complete", 0) >= clips or kept == clips


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other run fetches into the folder."""
    with open(folder / ".lock", "a") as lock:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch_rest(name: str, asked: Any, folder: Path, told: dict[str, Any]) -> None:
    metadata = folder / "metadata.jsonl"
    whole = _whole_lines(metadata)
    (folder / "rows.json").write_text(json.dumps(told) + "\n")
    metadata.write_text("".join(line + "\n" for line in whole), "utf-8")
    rows = _rows(name, asked, len(whole))
    with (
        metadata.open("a", encoding="utf-8") as lines,
        tqdm(total=asked.clips, initial=len(whole), desc=f"fetching {name}", unit="clip") as bar,
    ):
        for number, row in enumerate(islice(rows, asked.clips - len(whole)), len(whole)):
            lines.write(json.dumps(_kept(row, number, asked, folder, name)) + "\n")
            lines.flush()
            bar.update()
    if not metadata.stat().st_size:
        raise DataError(f"data.train_data_dir: split {asked.split} of {name} has no rows; name another split")
    (folder / "rows.json").write_text(json.dumps({**told, "complete": asked.clips}) + "\n")


def _state(folder: Path, told: dict[str, Any]) -> dict[str, Any]:
    """What an earlier fetch into the folder left. Raises DataError if it was of something else."""
    file = folder / "rows.json"
    if not folder.exists() or {entry.name for entry in folder.iterdir()} <= {file.name, "metadata.jsonl", ".lock"}:
        return {}  # no row was kept
    state = json_object(file.read_text("utf-8")) if file.is_file() else {}
    if {key: state.get(key) for key in told} != told:
        raise DataError(
            f"data.huggingface.folder: {folder} holds something else than rows of {told['dataset']} ({told['split']}); "
            "name another folder, or empty it"
        )
    return state


def _whole_lines(metadata: Path) -> list[str]:
    """Lines of rows whose file was written before an interruption."""
    lines = metadata.read_text("utf-8").splitlines() if metadata.is_file() else []
    return [line for line in lines if json_object(line)]


def _rows(name: str, asked: Any, skipped: int) -> Iterable[dict[str, Any]]:
    """The dataset's rows from the given one on, videos and images as bytes."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            "data.source: huggingface needs the datasets library; run: pip install 'stgen[datasets]'"
        ) from None
    try:
        rows = datasets.load_dataset(name, asked.config, split=asked.split, revision=asked.revision, streaming=True)
        rows = rows.cast(datasets.Features({**rows.features, **_undecoded(rows.features)})) if rows.features else rows
        yield from rows.skip(skipped)
    except DataError:
        raise
    except Exception as error:  # the library meets absent, private and damaged datasets in many ways
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise DataError(f"data.train_data_dir: {name} cannot be read as a Hugging Face dataset: {reason}") from None


def _undecoded(features: Any) -> dict[str, Any]:
    """Columns of videos and images, to come as bytes: stgen reads them itself."""
    import datasets

    kinds = (datasets.Video, datasets.Image)
    return {name: type(kind)(decode=False) for name, kind in features.items() if isinstance(kind, kinds)}


def _kept(row: dict[str, Any], number: int, asked: Any, folder: Path, name: str) -> dict[str, Any]:
    """Write the row's video as a file; its line of metadata."""
    column = _column(row, asked.video_column, VIDEO_COLUMNS, "video_column", name)
    content = _bytes_of(row[column], f"row {number} of {name}: {column}", name)
    file = f"{number:07d}{_suffix(content)}"
    (folder / file).write_bytes(content)
    taken = {key: row[key] for key in TAKEN_OVER if row.get(key) is not None}
    caption = row.get(_column(row, asked.caption_column, CAPTION_COLUMNS, "caption_column", name))
    return {"file_name": file, "text": clean(caption) if isinstance(caption, str) else "", **taken}


def _column(row: dict[str, Any], asked: str | None, usual: tuple[str, ...], key: str, name: str) -> str:
    """The column asked for, or the first usual one. Raises DataError where the dataset has none."""
    if asked is not None and asked not in row:
        raise DataError(f"data.huggingface.{key}: {name} has no column {asked}, only {', '.join(row)}")
    found = asked or next((column for column in usual if column in row), None)
    if found is None:
        raise DataError(
            f"data.huggingface.{key}: none of {', '.join(usual)} is a column of {name}; name one of {', '.join(row)}"
        )
    return found


def _bytes_of(value: Any, where: str, name: str) -> bytes:
    """The bytes of a video, as they are or behind a path inside the dataset."""
    if isinstance(value, dict) and value.get("bytes") is None and isinstance(value.get("path"), str):
        value = _read_inside(value["path"], where, name)
    elif isinstance(value, dict):
        value = value.get("bytes")
    elif isinstance(value, str):
        value = _read_inside(value, where, name)
    if not isinstance(value, bytes | None):
        raise DataError(f"{where} holds no video; name the column of videos in data.huggingface.video_column")
    return value or b""  # an empty file is refused when it is probed, and so listed with the rejects


def _read_inside(path: str, where: str, name: str) -> bytes:
    """A file of the dataset itself: a row must not make a clip of any other file."""
    if path.startswith("hf://datasets/"):
        import fsspec

        with fsspec.open(path, "rb") as file:
            return file.read(MAX_ROW)  # type: ignore[union-attr]
    root = Path(name).resolve()
    file = (root / path).resolve()
    if not root.is_dir() or not file.is_relative_to(root) or not file.is_file():
        raise DataError(f"{where} points to {path}, which is no file of the dataset; only those are read")
    return file.read_bytes()


def _suffix(content: bytes) -> str:
    """What the bytes are, by how they begin; what is of no kind known here is refused when it is probed."""
    kinds = (kind for kind, (at, sign) in SIGNS.items() if content[at : at + len(sign)] == sign)
    return next(kinds, ".mp4")
