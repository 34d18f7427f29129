"""Files inside tar archives, read where they lie. Standard library only."""

import io
import stat
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any


@dataclass(frozen=True)
class Member:
    """A file inside a tar, with as much of a Path's face as reading a video or an image needs."""

    tar: Path
    name: str
    offset: int  # of its first byte in the tar
    size: int

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    def is_dir(self) -> bool:
        return False

    def stat(self) -> Any:
        """Size, kind and time of change, as of a file of its own."""
        changed = self.tar.stat().st_mtime_ns
        return SimpleNamespace(st_mode=stat.S_IFREG, st_size=self.size, st_mtime_ns=changed)

    def open(self, mode: str = "rb") -> io.BufferedReader:
        return io.BufferedReader(Window(self.tar, self.offset, self.size))

    def read_bytes(self) -> bytes:
        with self.open() as file:
            return file.read()


class Window(io.RawIOBase):
    """`size` bytes of a file from `offset` on, as a file of its own."""

    def __init__(self, path: Path, offset: int, size: int):
        self._file, self._offset, self._size = open(path, "rb", buffering=0), offset, size  # noqa: SIM115
        self._file.seek(offset)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell() - self._offset

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self._size}[whence]
        return self._file.seek(self._offset + max(0, base + offset)) - self._offset

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._size - self.tell())]
        return self._file.readinto(view) or 0

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
