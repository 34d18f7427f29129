"""How a call of linear attention is cut: ranges of keys, each with a state, and segments of queries, each reading one.

    keys     | prefix | segment 0 | segment 1 | ...      range 0, 1, 2, ...
    queries           | segment 0 | segment 1 | ...

State r is the sum over ranges 0 to r. A segment reads the state that includes its own range, or the one before it; then
what it sees of its own keys, if anything, is written out as weights.
"""

from dataclasses import dataclass

WITHIN = 32  # places of a segment of chunks shorter than this, whose weights are written out


@dataclass(frozen=True)
class Cut:
    size: int  # places of a segment; the last may be ragged
    segments: int
    prefix: int  # keys of range 0
    ranges: int
    first: int  # the state that segment 0 reads
    chunk: int = 0  # a place sees the chunks of its segment up to its own; 0: nothing is written out

    @staticmethod
    def of(queries: int, keys: int, chunk: int | None, prefix: int) -> "Cut":
        """For attention over every key (no chunk), or up to the own chunk of `chunk` places."""
        if chunk is None:
            return Cut(queries, 1, keys, 1, 0)
        size = chunk * (WITHIN // chunk) if chunk < WITHIN else chunk
        segments = -(-queries // size)
        return Cut(size, segments, prefix, segments + 1, *((0, chunk) if chunk < WITHIN else (1, 0)))

    @staticmethod
    def of_memory(queries: int, segment: int) -> "Cut":
        """For segments that read what all before them left; state 0 is the incoming one."""
        segments = -(-queries // segment)
        return Cut(segment, segments, 0, segments + 1, 0)
