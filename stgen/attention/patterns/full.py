"""Full attention: every query attends every key of its sequence."""

from typing import Literal

from stgen.attention.pattern import Fixed


class Full(Fixed):
    kind: Literal["full"] = "full"
    """Every key of the sequence."""

    def allows(self, q, k, frame):
        return (q.t == q.t) & (k.t == k.t)
