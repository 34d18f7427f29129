"""Clips in tar files as WebDataset lays them out (github.com/webdataset/webdataset): files of one key belong together.

`000123.mp4` with `000123.txt` (its caption) or `000123.json` (a caption column, and start, end, weight, split) is a
clip. Each tar is gone through once, for where its members lie; nothing is unpacked, and clips are read in any order.
"""

import glob
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tqdm import tqdm

from stgen import video
from stgen.listing import (
    CAPTION_COLUMNS,
    MAX_CAPTION,
    OTHER_FORMAT,
    DataError,
    Found,
    Reject,
    Row,
    clean,
    json_object,
    said_of,
)
from stgen.members import Member

WORDS = (".txt", ".json")


def find(where: str) -> tuple[Path, Found]:
    """The folder of the tars that `where` names, and what they hold.

    `where` is a folder, searched recursively, a .tar or a pattern such as clips-*.tar or clips-{000..099}.tar. Raises
    DataError if it names none.
    """
    tars = _tars(where)
    root, found = _root(where, tars), Found()
    for tar in tqdm(tars, "indexing tars", delay=1, leave=False, unit="tar"):
        _index(tar, tar.relative_to(root).as_posix(), found)
    found.videos.sort()
    found.images.sort()
    return root, found


def root_of(where: str) -> Path:
    """The folder of the tars that `where` names, as `find` gives it. Raises DataError if it names none."""
    return _root(where, _tars(where))


def _root(where: str, tars: list[Path]) -> Path:
    return Path(where) if Path(where).is_dir() else Path(os.path.commonpath([tar.parent for tar in tars]))


def _tars(where: str) -> list[Path]:
    if Path(where).is_dir():
        tars = [path for path in Path(where).rglob("*.tar") if path.is_file()]
    else:
        tars = [tar for pattern in _patterns(where) for tar in _matches(pattern)]
    if not tars:
        raise DataError(
            f"data.train_data_dir: {where} names no .tar; give a folder, a .tar or a pattern like clips-*.tar"
        )
    return sorted(set(tars))


def _patterns(where: str) -> list[str]:
    """clips-008.tar, clips-009.tar, clips-010.tar for clips-{008..010}.tar. Raises DataError if one of them is not there."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", where)
    if found is None or os.path.exists(where):
        return [where]
    first, last = found.groups()
    numbers = [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)]
    patterns = [p for i in numbers for p in _patterns(where[: found.start()] + i + where[found.end() :])]
    if missing := [pattern for pattern in patterns if not _matches(pattern)]:
        raise DataError(
            f"data.train_data_dir: {where} names {len(patterns)} tars of which {len(missing)} are not there, "
            f"first {missing[0]}; mend the range"
        )
    return patterns


def _matches(pattern: str) -> list[Path]:
    """The tars that one pattern names; a path that is there is no pattern, whatever characters it has."""
    folder, name = os.path.split(pattern)
    if os.path.isfile(pattern):
        names = [pattern]
    elif os.path.isdir(folder):
        names = [os.path.join(folder, match) for match in glob.glob(name, root_dir=folder)]
    else:
        names = glob.glob(pattern)
    return [Path(name) for name in names if name.endswith(".tar") and os.path.isfile(name)]


def _index(tar: Path, name: str, found: Found) -> None:
    """Add the clips of one tar."""
    members, damage = _members(tar)
    if damage:
        found.rejects.append(Reject(name, f"{damage}; {len(members)} files before it are used"))
    said, clips = {}, 0
    with open(tar, "rb") as file:
        for member in members.values():
            if member.suffix.lower() in WORDS:
                _add_words(file, member, f"{name}/{member.name}", said, found)
    for member in members.values():
        kind = _kind(member, found)
        if member.suffix.lower() in video.OTHER_SUFFIXES:
            found.rejects.append(Reject(f"{name}/{member.name}", OTHER_FORMAT))
        if kind is not None:
            path, clips = f"{name}/{member.name}", clips + 1
            kind.append(path)
            found.members[path] = member
            words = said.get(_key(member.name), {})
            row = _row(words, path)
            found.rows[path] = {row.span: row}
    if not clips:
        found.rejects.append(
            Reject(name, f"holds no video or image ({' '.join(video.SUFFIXES + video.IMAGE_SUFFIXES)})")
        )


def _members(tar: Path) -> tuple[dict[str, Member], str]:
    """The files of a tar by name, the last of a name as tar has it; and what is wrong with the tar, or nothing."""
    members: dict[str, Member] = {}
    size = tar.stat().st_size
    try:
        for info in _files(tar):
            if info.offset_data + info.size > size:
                return members, f"is cut short in {info.name}"
            members[info.name] = Member(tar, info.name, info.offset_data, info.size)
    except (tarfile.TarError, OSError, ValueError) as error:
        return members, f"cannot be read on as a plain tar (compressed ones must be unpacked): {error}"
    return members, ""


def _files(tar: Path) -> Iterator[tarfile.TarInfo]:
    with tarfile.open(tar, "r:") as archive:
        for info in archive:
            hidden = os.path.basename(info.name).startswith(".")
            if info.isfile() and not info.issparse() and not hidden:
                yield info


def _kind(member: Member, found: Found) -> list[str] | None:
    suffix = member.suffix.lower()
    return found.videos if suffix in video.SUFFIXES else found.images if suffix in video.IMAGE_SUFFIXES else None


def _key(name: str) -> str:
    """What files of one clip share: the path up to the first dot of the file's name."""
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}"


def _add_words(file: IO[bytes], member: Member, place: str, said: dict[str, dict], found: Found) -> None:
    """Put what a .txt or .json says of its key into `said`."""
    if member.size > MAX_CAPTION:
        found.rejects.append(Reject(place, f"holds more than {MAX_CAPTION} bytes, too many for a caption"))
        return
    file.seek(member.offset)
    content = file.read(member.size)
    words = said.setdefault(_key(member.name), {})
    try:
        if member.suffix.lower() == ".txt":
            words["a sidecar"] = clean(content.decode("utf-8-sig"))
        else:
            words.update(json_object(content.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        found.rejects.append(Reject(place, f"cannot be read as UTF-8 text: {error}"))


def _row(words: dict, path: str) -> Row:
    """A sidecar's caption, else the first caption column of the JSON."""
    columns = (words[column] for column in ("a sidecar", *CAPTION_COLUMNS) if isinstance(words.get(column), str))
    return said_of(words, clean(next(columns, "")), path)
