"""What a video lies in: a file, a folder, or a part of a tar."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stgen.members import Member
from stgen.video import containers
from stgen.video.clip import VideoError

SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".gif")
OTHER_SUFFIXES = (".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ogv")  # videos that are not read
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def is_image(path: str | Path | Member) -> bool:
    """Whether a file is an image by its name."""
    return as_path(path).suffix.lower() in IMAGE_SUFFIXES


def as_path(path: str | Path | Member) -> Any:
    """A Path, or a member of a tar, which shows as much of a Path's face as is used here."""
    return path if isinstance(path, Member) else Path(path)


@contextmanager
def content_of(path: Path | Member) -> Iterator[Any]:
    """What av and Pillow open: an absolute path, which cannot be taken for a protocol as "concat:" could, or a file."""
    if isinstance(path, Member):
        with path.open() as file:
            yield file
    else:
        yield os.path.abspath(path)


def check_whole(path: Path | Member) -> None:
    """Refuse a file that says itself that something of it is lost."""
    with path.open() if isinstance(path, Member) else open(path, "rb") as file:
        found = containers.flaw(file)
    if found:
        raise VideoError(path, found)


@contextmanager
def explained(path: Path | Member) -> Iterator[None]:
    """Turn whatever a damaged file raises into a VideoError.

    Seen so far: FFmpegError, OSError, IndexError, MemoryError, EOFError, UnicodeDecodeError and, from Pillow,
    SyntaxError, struct.error and DecompressionBombError; a list would not stay complete.
    """
    try:
        yield
    except VideoError:
        raise
    except Exception as error:
        text = getattr(error, "strerror", None) or str(error) or "no details"
        raise VideoError(path, f"{' '.join(text.split())[:200]} ({type(error).__name__})") from None
