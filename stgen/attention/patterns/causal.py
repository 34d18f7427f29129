"""Causal attention over time: frames up to one's own."""

from typing import Literal

from stgen.attention.pattern import Fixed


class Causal(Fixed):
    kind: Literal["causal"] = "causal"
    """Frames up to one's own; in a list it binds all other patterns, so that nothing leaks from the future."""

    def allows(self, q, k, frame):
        return k.t <= q.t
