"""Sinks: mass that goes to no token.

A logit is one more key of that score with a zero value (gpt-oss; at 0 and not learned it is softmax-off-by-one);
tokens are learned keys and values that every query of the head sees (StreamingLLM's sink token, arXiv:2309.17453).
"""

import torch
from torch import Tensor, nn

from stgen.attention.spec import LogitSink, Normaliser, OffByOne, TokenSink
from stgen.attention.spec import Sink as SinkKeys

START = 0.02  # standard deviation of a sink's rows: at first it weighs about as much as an average key


class Sink(nn.Module):
    """The sink of some heads: a `logit` [heads] or None, and rows `k` and `v` [heads, count, D] or None.

    Learned ones are read by a call, `sink("k")`: what offloads weights brings those of a module back when it is called, and
    away afterwards (hence a view, which stays).
    """

    no_decay = ("learned_logit", "k", "v")

    def __init__(self, spec: SinkKeys, normaliser: Normaliser, heads: int, head_dim: int, weighs: bool = True):
        """`weighs`: false where the weights come from an earlier layer, whose map holds the sink's share already."""
        super().__init__()
        self.learned_logit, self.k, self.v = None, None, None
        self.fixed_logit: float | None = 0.0 if weighs and isinstance(normaliser, OffByOne) else None
        self.heads = heads
        match spec:
            case LogitSink(value=value, learned=True) if weighs:
                self.learned_logit = nn.Parameter(torch.full((heads,), value))
            case LogitSink(value=value) if weighs:
                self.fixed_logit = value
            case TokenSink(count=count):
                if weighs:
                    self.k = nn.Parameter(START * torch.randn(heads, count, head_dim))
                self.v = nn.Parameter(START * torch.randn(heads, count, head_dim))

    def forward(self, name: str) -> Tensor | None:
        """What is learned under `name`: `learned_logit`, `k` or `v`."""
        learned = getattr(self, name)
        return None if learned is None else learned.view_as(learned)

    @property
    def count(self) -> int:
        """Rows of keys and values."""
        return 0 if self.v is None else self.v.shape[1]

    def logit(self, like: Tensor) -> Tensor | None:
        """The score that takes mass, [heads]: a fixed one of the type and on the device of `like`, a learned one as it is."""
        if self.fixed_logit is not None:
            return torch.full((self.heads,), self.fixed_logit, dtype=like.dtype, device=like.device)
        return self("learned_logit")

    def before(self, x: Tensor, rows: Tensor | None, places: int) -> Tensor:
        """Keys or values x [S, heads, m, D] with the sink's rows before them, filled up with zeros to `places`."""
        if rows is None:
            return x
        head = nn.functional.pad(rows, (0, 0, 0, places - rows.shape[1])).to(x.dtype)
        return torch.cat([head.expand(x.shape[0], -1, -1, -1), x], dim=2)
