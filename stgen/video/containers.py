"""Whether a file of video is whole, told from how its parts tile it: Matroska and WebM (RFC 8794, RFC 9559), MP4 and MOV
(ISO/IEC 14496-12), AVI (RIFF, OpenDML) and GIF (GIF89a).

Where a part is lost, demuxers look for the next and go on, and the video is shorter or jumps. Here nothing is mended.
Only headers of parts are read, no pictures, except from a GIF.
"""

import os
from collections.abc import Callable, Container, Iterator, Mapping
from typing import BinaryIO, NamedTuple

Read = Callable[[int, int], bytes]  # (place, how many bytes) -> those bytes; fewer at the end of the file


class Flaw(ValueError):
    """What shows that a file is not whole, as half a sentence."""


class Part(NamedTuple):
    """A stretch of a file: its header from `start`, its content from `body` to `end` (None: as far as it makes sense)."""

    name: bytes
    start: int
    body: int
    end: int | None


Header = Callable[[int], Part | None]  # place -> the part that begins there; None if none does
Inside = Mapping[bytes, Container[bytes]]  # parts that hold parts -> which; b"" is what is walked through


class _Any:
    def __contains__(self, name: object) -> bool:
        return True


def flaw(file: BinaryIO) -> str | None:
    """Why an open file cannot be whole; None if nothing speaks against it or its format is none of these."""

    def read(at: int, count: int) -> bytes:
        file.seek(at)
        return file.read(count)

    size, head = file.seek(0, os.SEEK_END), read(0, 12)
    try:
        if head.startswith(_EBML):
            _check_matroska(read, size)
        elif head[:4] == b"RIFF" and head[8:] == b"AVI ":
            _check_avi(read, size)
        elif head[:3] == b"GIF":
            file.seek(0)
            _check_gif(file)
        elif head[4:8] in _ISO_FIRST:
            _check_iso(read, size)
    except Flaw as found:
        return str(found)
    return None


def _parts(start: int, end: int, header: Header, inside: Inside) -> Iterator[Part]:
    """The parts from `start` to `end` in order, each before those in it.

    Raises Flaw where something else begins, or a part reaches beyond what it is in.
    """
    at, around = start, [Part(b"", start, start, end)]
    while at < end:
        while at == around[-1].end:
            around.pop()
        part = header(at)
        while part and around[-1].end is None and part.name not in inside[around[-1].name]:
            around.pop()  # what cannot be in a part of unknown length ends it
        if part is None or part.name not in inside[around[-1].name]:
            raise Flaw(f"is cut short or damaged: no part of a video begins at byte {at}")
        limit = min(outer.end for outer in around if outer.end is not None)
        if max(part.body, part.end or 0) > limit:
            raise Flaw(f"is cut short or damaged: there is no room for the part that begins at byte {at}")
        yield part
        if part.name in inside:
            around.append(part)
        at = part.body if part.name in inside or part.end is None else part.end
    if any(part.end not in (None, end) for part in around):
        raise Flaw("is cut short")


# ---------------------------------------------------------------------------------------------------------- Matroska

_EBML = b"\x1a\x45\xdf\xa3"
_TRACK, _TRACK_NUMBER, _TRACK_TYPE, _VIDEO = b"\xae", b"\xd7", b"\x83", 1
_BLOCKS = (b"\xa3", b"\xa1")  # SimpleBlock, Block
_NOT_OF_VIDEO = 0x76  # flags of a block: reserved ones, and several frames in one block, which only sound needs


def _ids(names: str) -> set[bytes]:
    return {bytes.fromhex(name) for name in names.split()} | {b"\xec", b"\xbf"}  # filling and checksums fit anywhere


_MATROSKA: Inside = {
    b"": _ids("1A45DFA3 18538067"),
    b"\x18\x53\x80\x67": _ids("114D9B74 1549A966 1654AE6B 1F43B675 1C53BB6B 1941A469 1043A770 1254C367"),  # Segment
    b"\x16\x54\xae\x6b": _ids("AE"),  # Tracks
    _TRACK: _Any(),
    b"\x1f\x43\xb6\x75": _ids("E7 5854 A7 AB A3 A0 AF"),  # Cluster
    b"\xa0": _ids("A1 A2 75A1 9B FA FB FD A4 75A2 8E C8"),  # BlockGroup
}


def _check_matroska(read: Read, size: int) -> None:
    numbers: list[int] = []  # of the tracks
    types: list[int] = []
    for part in _parts(0, size, lambda at: _matroska_part(read, at), _MATROSKA):
        if part.name in (_TRACK_NUMBER, _TRACK_TYPE):
            of_all = numbers if part.name == _TRACK_NUMBER else types
            of_all.append(int.from_bytes(read(part.body, (part.end or part.body) - part.body)))
        elif part.name in _BLOCKS:
            _check_block(read(part.body, 12), dict(zip(numbers, types, strict=False)), part.start)


def _check_block(head: bytes, tracks: Mapping[int, int], at: int) -> None:
    track, length = _variable(head) or (0, 8)
    if track not in tracks:
        raise Flaw(f"is damaged: the block at byte {at} is of no track")
    if tracks[track] == _VIDEO and (len(head) < length + 3 or head[length + 2] & _NOT_OF_VIDEO):
        raise Flaw(f"is damaged: the block at byte {at} is none of video")


def _matroska_part(read: Read, at: int) -> Part | None:
    head = read(at, 12)
    name = _variable(head)
    length = _variable(head[name[1] :]) if name and name[1] <= 4 else None
    if not name or not length:
        return None
    body = at + name[1] + length[1]
    unknown = length[0] == 2 ** (7 * length[1]) - 1
    return Part(head[: name[1]], at, body, None if unknown else body + length[0])


def _variable(data: bytes) -> tuple[int, int] | None:
    """(value, bytes it takes) of a number whose leading zero bits tell its length (RFC 8794, section 4)."""
    length = 9 - data[0].bit_length() if data else 9
    if length > min(8, len(data)):
        return None
    return int.from_bytes(data[:length]) & (2 ** (7 * length) - 1), length


# ------------------------------------------------------------------------------------------------------- MP4 and MOV

_ISO_FIRST = (b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide", b"pnot")
_ISO: Inside = {
    **dict.fromkeys((b"moov", b"trak", b"mdia", b"minf", b"stbl", b"mvex"), _Any()),
    b"moof": (b"mfhd", b"traf", b"pssh", b"meta", b"uuid", b"free", b"skip"),
    b"traf": (b"tfhd", b"tfdt", b"trun", b"sdtp", b"sbgp", b"sgpd", b"subs", b"saiz", b"saio", b"senc", b"meta", b"uuid",
              b"free", b"skip"),
}  # fmt: skip
_TABLES = {b"stts": 8, b"ctts": 8, b"stsc": 12, b"stco": 4, b"co64": 8, b"stss": 4}  # bytes of a row


def _check_iso(read: Read, size: int) -> None:
    """What follows the parts does harm to a fragmented file only: the tables of others say where each sample lies."""

    def header(at: int) -> Part | None:
        return _iso_part(read, at, size)

    top, torn = [], None
    try:
        for part in _parts(0, size, header, {b"": _Any()}):
            top.append(part)
    except Flaw as found:
        torn = found
    names = {part.name for part in top}
    for part in top:
        if part.name in (b"moov", b"moof"):
            inner = _parts(part.body, part.end, header, {**_ISO, b"": _ISO[part.name]})
            names |= _check_index(read, list(inner))
    if torn and (b"moov" not in names or names & {b"mvex", b"moof"}):
        raise torn
    if b"moov" not in names:
        raise Flaw("is not finished: its writer stopped before the index (moov)")


def _check_index(read: Read, parts: list[Part]) -> set[bytes]:
    """Each table is as long as its rows, and knows of as many samples as the others of its track; all names."""
    times: int | None = None
    for part in parts:
        length = (part.end or 0) - part.body
        if part.name in _TABLES:
            rows = _number(read, part.body + 4)
            if length < 8 + rows * _TABLES[part.name]:
                raise Flaw(f"is damaged: its table at byte {part.start} is too short for its {rows} rows")
            if part.name == b"stts":
                table = read(part.body + 8, 8 * rows)
                times = sum(int.from_bytes(table[i : i + 4]) for i in range(0, 8 * rows, 8))
        elif part.name == b"stsz":
            samples, each = _number(read, part.body + 8), _number(read, part.body + 4)
            if length < 12 + (0 if each else 4 * samples) or times not in (None, samples):
                raise Flaw(f"is damaged: it tells the sizes of {samples} frames and the times of {times}")
        elif part.name == b"stbl":
            times = None  # of another track
        elif part.name == b"trun" and length != _length_of_run(read, part.body):
            raise Flaw(f"is damaged: its table at byte {part.start} is not as long as it says")
    return {part.name for part in parts}


def _length_of_run(read: Read, at: int) -> int:
    """Bytes that the content of a track fragment run takes (ISO/IEC 14496-12, 8.8.8)."""
    flags, samples = _number(read, at) & 0xFFFFFF, _number(read, at + 4)
    return 8 + 4 * (flags & 5).bit_count() + 4 * (flags & 0xF00).bit_count() * samples


def _number(read: Read, at: int) -> int:
    return int.from_bytes(read(at, 4))


def _iso_part(read: Read, at: int, size: int) -> Part | None:
    head = read(at, 16)
    name, length, body = head[4:8], int.from_bytes(head[:4]), at + 8
    if length == 1:  # the length stands behind the name
        length, body = int.from_bytes(head[8:16]), at + 16
    if not _is_name(name) or 0 < length < body - at:
        return None
    return Part(name, at, body, at + length if length else size)


def _is_name(name: bytes) -> bool:
    return len(name) == 4 and all(32 <= letter < 127 or letter == 0xA9 for letter in name)


# --------------------------------------------------------------------------------------------------------------- AVI

_FRAMES = (b"dc", b"db")  # behind two digits for the stream
_AVI: Inside = {b"": (b"RIFF",), b"RIFF": _Any(), b"LIST": _Any()}


def _check_avi(read: Read, size: int) -> None:
    """The index (idx1; of the first gigabyte only) must name the frames that there are, in order."""
    frames, index = [], b""
    for part in _parts(0, size, lambda at: _avi_part(read, at, size), _AVI):
        length = (part.end or 0) - part.body
        if part.name[2:] in _FRAMES:
            frames.append((part.name, length))
        elif part.name == b"idx1":
            index = read(part.body, length)
    rows = [
        (index[i : i + 4], _even(int.from_bytes(index[i + 12 : i + 16], "little"))) for i in range(0, len(index), 16)
    ]
    rows = [row for row in rows if row[0][2:] in _FRAMES]
    if rows != frames[: len(rows)] or (index and not rows):
        raise Flaw("is damaged: its index does not name its frames")


def _avi_part(read: Read, at: int, size: int) -> Part | None:
    head = read(at, 8)
    name, end = head[:4], at + 8 + int.from_bytes(head[4:], "little")
    if not _is_name(name) or len(head) < 8:
        return None
    return Part(name, at, at + (12 if name in _AVI else 8), _even(end) if end < size else end)


def _even(place: int) -> int:
    return place + place % 2  # parts are filled up to an even place


# --------------------------------------------------------------------------------------------------------------- GIF


_EXTENSIONS = {b"\xf9": b"\x04", b"\xff": b"\x0b", b"\x01": b"\x0c"}  # label: length of the first block


def _check_gif(file: BinaryIO) -> None:
    screen = file.read(13)
    _skip_colours(file, screen[10:11])
    while (kind := file.read(1)) != b";":
        if kind == b",":
            _skip_colours(file, file.read(9)[8:])
            file.read(1)  # size of the first codes
        elif kind == b"!":
            label, length = file.read(1), file.read(1)
            if _EXTENSIONS.get(label, length) != length:
                raise Flaw(f"is damaged: what is told at byte {file.tell() - 3} is not as long as it must be")
            file.seek(-len(length), os.SEEK_CUR)
        elif kind:
            raise Flaw(f"is damaged: no part of a GIF begins at byte {file.tell() - 1}")
        while length := file.read(1):
            if length == b"\0":
                break
            file.seek(length[0], os.SEEK_CUR)
        else:
            raise Flaw("is cut short: the mark that ends a GIF is missing")


def _skip_colours(file: BinaryIO, flags: bytes) -> None:
    """A table of 2, 4, … 256 colours follows if the highest bit of the flags says so."""
    if flags and flags[0] & 0x80:
        file.seek(3 * 2 ** (1 + (flags[0] & 7)), os.SEEK_CUR)
