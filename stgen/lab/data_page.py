"""What `stgen data check` found, as a page of text: numbers, bars, and what is worth a second look."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stgen.flops import readable
from stgen.lab.tables import percent, table

ROWS = 8  # of a list that may be long
BAR = 32  # characters of the longest bar
EIGHTHS = "▏▎▍▌▋▊▉█"


def page(numbers: dict[str, Any], out: Path) -> str:
    """Everything worth saying about a folder, in sections."""
    sections = [
        [headline(numbers)],
        _bars("length", _ranges(numbers["durations"]["histogram"], "s"), _of(numbers["durations"], "s")),
        _bars("frame size", _most(numbers["sizes"])),
        _bars("frames a second", _most(numbers["fps"])),
        _bars(
            "caption",
            _ranges(numbers["captions"]["words"]["histogram"], "words"),
            _of(numbers["captions"]["words"], "words"),
        ),
        list(_captions(numbers)),
        list(_clips(numbers.get("clips", []))),
        list(_rejects(numbers["rejects"])),
        list(_looks(numbers)),
        [f"contact sheet  {out / 'contact_sheet.png'}", f"all numbers    {out / 'check.json'}"],
    ]
    return "\n" + "\n\n".join("\n".join(section) for section in sections if section)


def headline(numbers: dict[str, Any]) -> str:
    """`/data/clips: 1200 videos, 1.3 h, 2.1 GB; 3 entries cannot be used`"""
    bad = len(numbers["rejects"])
    told = f"{bad} {'entry' if bad == 1 else 'entries'} cannot be used" if bad else "all can be used"
    extent = f"{_time(numbers['seconds'])}, {readable(numbers['bytes'], 'B')}"
    return f"{numbers['folder']}: {numbers['videos']} videos, {extent}; {told}"


def _time(seconds: float) -> str:
    for factor, unit in ((3600, "h"), (60, "min")):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def _of(spread: dict[str, float], unit: str) -> str:
    return f"from {spread['least']:.3g} to {spread['most']:.3g} {unit}, median {spread['median']:.3g}"


def _ranges(histogram: Sequence[Sequence[Any]], unit: str) -> list[tuple[str, int]]:
    """Rows of a histogram in words, without the empty ones at its ends."""
    full = [i for i, (*_, count) in enumerate(histogram) if count]
    rows = histogram[full[0] : full[-1] + 1] if full else []
    whole = unit == "words"
    return [(_range(low, high, whole), count) for low, high, count in rows]


def _range(low: float, high: float | None, whole: bool) -> str:
    if high is None:
        return f"{low:g} and more" + ("" if whole else " s")
    if whole:
        return "none" if high == 1 else f"{low:g} to {high - 1:g}"
    return f"{low:g} to {high:g} s" if low else f"under {high:g} s"


def _most(counts: dict[str, int]) -> list[tuple[str, int]]:
    """The most frequent rows, and the others together."""
    rows = list(counts.items())
    if len(rows) <= ROWS:
        return rows
    return [*rows[: ROWS - 1], (f"{len(rows) - ROWS + 1} others", sum(count for _, count in rows[ROWS - 1 :]))]


def _bars(title: str, rows: Sequence[tuple[str, int]], note: str = "") -> list[str]:
    """A title, and for each row its share as a bar."""
    total, most = sum(count for _, count in rows), max((count for _, count in rows), default=0)
    width, digits = max((len(label) for label, _ in rows), default=0), len(str(most))
    lines = [
        f"  {label:<{width}}  {count:>{digits}}  {_bar(count / most)} {percent(count / total)}"
        for label, count in rows
        if most
    ]
    return [f"{title}: {note}" if note else title, *lines]


def _bar(share: float) -> str:
    eighths = max(1, round(share * BAR * 8)) if share else 0
    return EIGHTHS[-1] * (eighths // 8) + (EIGHTHS[eighths % 8 - 1] if eighths % 8 else "")


def _captions(numbers: dict[str, Any]) -> Iterator[str]:
    found, videos = numbers["captions"], numbers["videos"]
    yield f"captions: {found['distinct']} different ones with {found['vocabulary']} different words"
    yield f"  {found['empty']} videos ({percent(found['empty'] / videos)}) have none"
    yield f"  {found['repeated']} videos ({percent(found['repeated'] / videos)}) share theirs with another"
    for caption, count in found["most_frequent"]:
        if count > 1:
            yield f"    {count} x {_short(caption)!r}"
    if "truncated" in found:
        yield (
            f"  {found['truncated']} ({percent(found['truncated'] / videos)}) are longer than the {found['max_length']} tokens "
            f"of text.max_length; the longest has {found['most_tokens']}"
        )


def _clips(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    if not rows:
        return
    yield "clips of this config (frames x height x width), and how many fit end to end into the videos"
    most = max(row["clips"] for row in rows)
    lines = [["size", "videos", "clips", "enlarged", "of a frame is kept", ""]]
    for row in rows:
        kept = "–" if row["frame_kept"] is None else percent(row["frame_kept"])
        bar = _bar(row["clips"] / most if most else 0)
        lines.append([row["size"], str(row["videos"]), str(row["clips"]), str(row["enlarged"]), kept, bar])
    yield table(lines)


def _rejects(rejects: Sequence[dict[str, str]]) -> Iterator[str]:
    """Reasons, those that hold for most entries first, each in the words of one and with the names of a few."""
    if not rejects:
        return
    yield "cannot be used"
    alike: dict[str, list[dict[str, str]]] = defaultdict(list)
    for reject in rejects:
        alike[re.sub(r"[\d.]+", "#", reject["reason"])].append(reject)
    groups = sorted(alike.values(), key=len, reverse=True)
    for group in groups[:ROWS]:
        names = ", ".join(_short(reject["path"], 40) for reject in group[:3])
        yield f"  {len(group):>{len(str(len(groups[0])))}}  {_short(group[0]['reason'], 100)}: {names}{', …' * (len(group) > 3)}"
    if len(groups) > ROWS:
        yield f"  … and for {len(groups) - ROWS} more reasons; check.json has all"


def _looks(numbers: dict[str, Any]) -> Iterator[str]:
    found = list(advice(numbers))
    if found:
        yield "worth a look"
        yield from (f"  {line}" for line in found)


def advice(numbers: dict[str, Any]) -> Iterator[str]:
    """What may not be meant, with what to do."""
    captions, videos = numbers["captions"], numbers["videos"]
    if captions["empty"]:
        yield f"{captions['empty']} videos have no caption: they train the empty prompt; write NAME.txt beside them"
    if captions["distinct"] and captions["repeated"] > 0.2 * videos and captions["distinct"] < 0.5 * videos:
        yield f"{captions['distinct']} captions for {videos} videos: prompts can ask for little else"
    if captions.get("truncated"):
        yield f"{captions['truncated']} captions lose their end; raise text.max_length, to {captions['most_tokens']} for all"
    if len(numbers["fps"]) > 1:
        rates = ", ".join(list(numbers["fps"])[:4])
        yield f"videos run at different rates ({rates} frames a second); data.fps brings them to one"
    for row in numbers.get("clips", []):
        if not row["videos"]:
            yield f"no video goes to clips of {row['size']}"
        elif row["enlarged"]:
            yield f"{row['enlarged']} videos are enlarged for clips of {row['size']}, up to {row['largest_scale']:.2g} times"
        if row["frame_kept"] is not None and row["frame_kept"] < 0.7:
            yield f"clips of {row['size']} keep {percent(row['frame_kept'])} of a frame; data.buckets takes other shapes in"


def _short(words: str, length: int = 60) -> str:
    """On one line that a terminal can show."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(words.split()))
    return line if len(line) <= length else line[: length - 1] + "…"
