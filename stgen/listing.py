"""What a folder holds: its videos and images, and what metadata files and sidecars say about them. Opens no video.

Captions come from metadata.jsonl or metadata.csv at any level (a column file_name, video or path and a column text,
caption or prompt; names resolve against the metadata file), else from a sidecar name.txt, else are empty. Further
columns, all optional: start and end (seconds, h:m:s, or frames as 36f), weight, split (train or held_out).
What cannot be used is recorded with its reason; nothing is skipped in silence.
"""

import csv
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from stgen import video
from stgen.members import Member

FILE_COLUMNS = ("file_name", "video", "path")
CAPTION_COLUMNS = ("text", "caption", "prompt")
METADATA = ("metadata.jsonl", "metadata.csv")
SPLITS = {"train": False, "held_out": True}
MAX_CAPTION = 2**20  # bytes of a sidecar
MAX_METADATA = 2**31  # bytes of a metadata file
OTHER_FORMAT = f"is of a format that is not read; convert it to one of {' '.join(video.SUFFIXES)}"
LEADS_OUT = "is a link that leads out of the folder; its words are not read: put the file itself there"


class DataError(RuntimeError):
    """Stops the run: one sentence that says what to do."""


class Reject(NamedTuple):
    path: str  # relative to the folder; `metadata.csv:3` for a line of metadata
    reason: str


class Moment(NamedTuple):
    """A place in a video, in seconds or in frames."""

    number: float
    unit: str  # "s" or "f"

    def frame(self, fps: float) -> int:
        """The first frame at or after it."""
        return math.ceil(self.number * fps - 1e-6) if self.unit == "s" else int(self.number)

    def __str__(self) -> str:
        return f"{self.number:g}{self.unit}"


class Row(NamedTuple):
    """What is said of a clip."""

    caption: str = ""
    start: Moment | None = None
    end: Moment | None = None  # the first that no longer belongs to it
    weight: float = 1.0
    held_out: bool | None = None  # None: nothing is said

    @property
    def span(self) -> str:
        """`@1.5s-3s`, or nothing for a whole video: what tells clips of one video apart."""
        if self.start is None and self.end is None:
            return ""
        return f"@{self.start or '0s'}-{self.end or 'end'}"


class Entry(NamedTuple):
    """A clip that may be trained on, not yet opened."""

    name: str  # unlike all others
    path: Path | Member
    row: Row


@dataclass
class Found:
    videos: list[str] = field(default_factory=list)  # relative to the root, with forward slashes
    images: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    rows: dict[str, dict[str, Row]] = field(default_factory=dict)  # of a file: by its span, at least one
    members: dict[str, Member] = field(default_factory=dict)  # files that lie in a tar
    rejects: list[Reject] = field(default_factory=list)

    def entries(self, root: Path, names: Iterable[str]) -> list[Entry]:
        """The clips of some of the files, in their order."""
        return [
            Entry(name + row.span, self.members.get(name) or root / name, row)
            for name in names
            for row in self.rows.get(name, {"": Row()}).values()
        ]


def captions(root: str | Path) -> dict[Path, str]:
    """Every clip of a video below `root`, in order, with its caption ("" where it has none); opens no video.

    Raises DataError if there is no such folder or its metadata cannot be understood.
    """
    found = find(Path(root))
    return {Path(root, entry.name): entry.row.caption for entry in found.entries(Path(root), found.videos)}


def find(root: Path) -> Found:
    """Everything below a folder. Raises DataError if there is none, or its metadata cannot be understood."""
    if not root.is_dir():
        raise DataError(f"data.train_data_dir: there is no folder {root}; give one that holds videos")
    found = Found()
    _walk(root, "", found, set())
    known = {*found.videos, *found.images}
    for name in sorted(found.metadata):
        _read_metadata(root, name, found, known)
    found.videos.sort()
    found.images.sort()
    for name in found.videos + found.images:
        if name not in found.rows:
            _read_sidecar(root, name, found)
    return found


# --------------------------------------------------------------------------------------------------------- the folder


def _walk(root: Path, folder: str, found: Found, seen: set[tuple[int, int]]) -> None:
    """Collect the videos and metadata files below root/folder; each real folder once, so that links cannot loop."""
    try:
        status = (root / folder).stat()
        entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
    except OSError as error:
        found.rejects.append(Reject(folder, f"folder cannot be read: {error.strerror}"))
        return
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    for entry in entries:
        name = f"{folder}/{entry.name}" if folder else entry.name
        if entry.name.startswith("."):
            continue
        if _is_folder(entry):
            if _holds_frames(root / name):
                found.videos.append(name)
            else:
                known = _count(found)
                _walk(root, name, found, seen)
                if name.lower().endswith(video.SUFFIXES) and known == _count(found):
                    found.rejects.append(
                        Reject(name, "is a folder, but holds no video and is not one of numbered images")
                    )
        elif entry.name in METADATA and entry.is_file():
            found.metadata.append(name)
        elif entry.name.lower().endswith(video.SUFFIXES):
            found.videos.append(name)
        elif entry.name.lower().endswith(video.IMAGE_SUFFIXES):
            found.images.append(name)
        elif entry.name.lower().endswith(video.OTHER_SUFFIXES):
            found.rejects.append(Reject(name, OTHER_FORMAT))


def _count(found: Found) -> int:
    return len(found.videos) + len(found.images) + len(found.rejects)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that points to itself
        return False


def _holds_frames(folder: Path) -> bool:
    try:
        return bool(video.frame_files(folder))
    except OSError:
        return False  # walking into it records why


def _read_sidecar(root: Path, name: str, found: Found) -> None:
    path = root / name
    sidecar = path.with_name(path.name + ".txt") if path.is_dir() else path.with_suffix(".txt")
    if not sidecar.is_file():  # a FIFO called x.txt would never end
        return
    place = sidecar.relative_to(root).as_posix()
    if _leads_out(root, sidecar, path):
        found.rejects.append(Reject(place, LEADS_OUT))
        return
    if sidecar.stat().st_size > MAX_CAPTION:
        found.rejects.append(Reject(place, f"holds more than {MAX_CAPTION} bytes, too many for a caption"))
        return
    try:
        found.rows[name] = {"": Row(clean(sidecar.read_text("utf-8-sig")))}
    except (OSError, UnicodeDecodeError) as error:
        found.rejects.append(Reject(place, f"cannot be read as UTF-8 text: {error}"))


def _leads_out(root: Path, file: Path, of: Path) -> bool:
    """Whether a text is a link to somewhere that is neither in the folder nor beside the video, or text, `of` whose it is.

    Captions are learned, logged and passed on: in a folder from elsewhere a link must not make one of a private file.
    """
    if not file.is_symlink():
        return False
    real = file.resolve()
    beside = {file.parent.resolve(), of.resolve().parent if of != file else file.parent.resolve()}
    return not real.is_relative_to(root.resolve()) and real.parent not in beside


# ------------------------------------------------------------------------------------------------------ metadata files


def _read_metadata(root: Path, name: str, found: Found, known: set[str]) -> None:
    """Add the rows of one metadata file; one that cannot be used is rejected with its line. `known`: all videos and images."""
    folder = os.path.dirname(name)
    if _leads_out(root, root / name, root / name):
        found.rejects.append(Reject(name, LEADS_OUT))
        return
    if (root / name).stat().st_size > MAX_METADATA:
        raise DataError(f"{root / name} holds more than {MAX_METADATA} bytes; cut it into one file a folder")
    try:
        for line, row in _rows(root / name, name):
            reason = _use_row(row, f"{name}:{line}", root, folder, found, known)
            if reason:
                found.rejects.append(Reject(f"{name}:{line}", reason))
    except csv.Error as error:
        raise DataError(f"{root / name} cannot be read ({error}); mend it, or write metadata.jsonl instead") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{root / name} cannot be read ({error}); save it again as UTF-8") from None


def _rows(path: Path, name: str) -> Iterator[tuple[int, dict]]:
    """(line, row) of a metadata file; a row is {} if its line is not a JSON object."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            reader = csv.DictReader(file)
            for columns in (FILE_COLUMNS, CAPTION_COLUMNS):
                if not _column(reader.fieldnames or (), columns, f"{name}:1"):
                    raise DataError(f"{name}:1: no column is called {' or '.join(columns)}; rename one")
            yield from ((reader.line_num, row) for row in reader)
            return
        for line, text in enumerate(file, 1):
            if text.strip():
                yield line, json_object(text)


def json_object(text: str | bytes) -> dict:
    """The object that a line of JSON holds; {} if it holds none."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def _column(names: Iterable[str], choices: tuple[str, ...], where: str) -> str | None:
    present = [choice for choice in choices if choice in names]
    if len(present) > 1:
        raise DataError(f"{where}: columns {' and '.join(present)} mean the same; keep one of them")
    return present[0] if present else None


def _use_row(row: dict, where: str, root: Path, folder: str, found: Found, known: set[str]) -> str | None:
    """Put what the row says into `found`; the reason if it cannot be used."""
    file_column, caption_column = _column(row, FILE_COLUMNS, where), _column(row, CAPTION_COLUMNS, where)
    if not file_column or not caption_column:
        return f"is not a row with one of {', '.join(FILE_COLUMNS)} and one of {', '.join(CAPTION_COLUMNS)}"
    name, caption = row[file_column], row[caption_column]
    if not isinstance(name, str) or not name:
        return f"{file_column} is not a file name"
    if not isinstance(caption, str | None):
        return f"{caption_column} is not text"
    # Only a name that the walk found is ever opened, so a row cannot point anywhere else.
    target = _target(root, folder, name, found, known)
    if reason := _refusal(name, target, known):
        return reason
    said = said_of(row, clean(caption or ""), where)
    earlier = found.rows.setdefault(target, {})
    if earlier and (not said.span or "" in earlier or said.span in earlier):
        return f"{name} has a caption already; keep one row a video, or give each row a start and end of its own"
    earlier[said.span] = said
    return None


def _target(root: Path, folder: str, name: str, found: Found, known: set[str]) -> str:
    """The file that a row means, relative to the root: as written, else with the separators of Windows or with accents
    as another system writes them. One of a folder of numbered images makes that folder one of images, no video."""
    spellings = [name, name.replace("\\", "/")]
    spellings += [unicodedata.normalize(form, spellings[1]) for form in ("NFC", "NFD")]
    joined = [os.path.join(folder, spelling) for spelling in dict.fromkeys(spellings)]
    targets = [os.path.normpath(path).replace(os.sep, "/") for path in joined]
    for target in targets:
        if os.path.dirname(target) in known and (root / target).is_file():
            _open_up(root, os.path.dirname(target), found, known)
    return next((target for target in targets if target in known), targets[0])


def _open_up(root: Path, folder: str, found: Found, known: set[str]) -> None:
    """Take a folder of numbered images for images, no video."""
    images = [f"{folder}/{file.name}" for file in video.frame_files(root / folder)]
    found.videos.remove(folder)
    found.images += images
    known.remove(folder)
    known.update(images)


def said_of(row: dict, caption: str, where: str) -> Row:
    """The optional columns of a row. Raises DataError for a value that cannot be meant, which would train all the same."""
    start, end = (_moment(row.get(column), f"{where}: {column}") for column in ("start", "end"))
    if start and end and start.unit == end.unit and end.number <= start.number:
        raise DataError(f"{where}: end {end} is not after start {start}; mend the row")
    held_out = row.get("split")
    if held_out not in (*SPLITS, "", None):
        raise DataError(f"{where}: split {held_out!r} is none of {', '.join(SPLITS)}; write one, or leave it empty")
    return Row(caption, start, end, _weight(row.get("weight"), f"{where}: weight"), SPLITS.get(held_out or ""))


def _weight(value: Any, where: str) -> float:
    if value in ("", None):
        return 1.0
    weight = _number(value)
    if weight is None or not 0 <= weight <= 1e6:
        raise DataError(
            f"{where} {value!r} is not a number from 0 to 1e6; 2 reads a clip twice an epoch, 0 leaves it out"
        )
    return weight


def _moment(value: Any, where: str) -> Moment | None:
    """1.5 or "1.5" in seconds, "0:01:02.5" in hours, minutes and seconds, "36f" in frames."""
    if value in ("", None):
        return None
    text = str(value).strip()
    if match := re.fullmatch(r"(\d+)f", text):
        return Moment(int(match[1]), "f")
    if match := re.fullmatch(r"(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)", text):
        return Moment(3600 * int(match[1] or 0) + 60 * int(match[2]) + float(match[3]), "s")
    seconds = _number(value)
    if seconds is None or not 0 <= seconds <= 1e9:
        raise DataError(f"{where} {value!r} is no time; write seconds (1.5), h:m:s (0:01:02.5) or frames (36f)")
    return Moment(seconds, "s")


def _number(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def _refusal(name: str, target: str, known: set[str]) -> str | None:
    if os.path.isabs(name) or re.match(r"[A-Za-z]:[\\/]", name):
        return f"{name} is an absolute path; only paths inside the folder are read"
    if "://" in name:
        return f"{name} is a URL; only files inside the folder are read"
    if target == ".." or target.startswith("../"):
        return f"{name} leaves the folder"
    if target not in known:
        return f"{name}: there is no such video in the folder"
    return None


def clean(caption: str) -> str:
    """Without outer blanks, and without halves of characters, which no tokenizer or file takes."""
    return caption.strip().encode("utf-8", "replace").decode("utf-8")
