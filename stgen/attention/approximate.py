"""What attention may leave out of its numbers: small channels of queries and keys, and low bits.

Both are straight-through (Bengio et al., arXiv:1308.3432): the forward pass sees the approximation, the gradient passes
as if there were none. Bits may follow a schedule (progressive quantisation in the manner of SpAtten, arXiv:2012.09852).
"""

from torch import Tensor, nn

from stgen.attention.numbers import Numbers
from stgen.attention.spec import Approximate


class Approximation(nn.Module):
    """The `approximate` keys of a mixer at work, on tensors of folded sequences."""

    def __init__(self, keys: Approximate):
        super().__init__()
        self.numbers = Numbers(keys)

    @property
    def needs_map(self) -> bool:
        """Whether the map itself is changed, so that it must be made whole."""
        return "map" in self.numbers.now.quantise

    def forward(self, x: Tensor, name: str) -> Tensor:
        """Queries, keys, values [S, heads, n, D] or a map [S, heads, n, m], by `name` (q, k, v, map)."""
        keys = self.numbers.now
        if name in ("q", "k") and 0 < keys.qk_topk < x.shape[-1]:
            x = straight_through(x, largest(x, keys.qk_topk))
        if name not in keys.quantise:
            return x
        if keys.form == "fixed":
            return straight_through(x, fixed_point(x, keys.bits))
        return straight_through(x, integers(x, keys.bits, signed=name != "map"))


def straight_through(x: Tensor, instead: Tensor) -> Tensor:
    """`instead`, with the gradient of x."""
    return x + (instead - x).detach()


def largest(x: Tensor, count: int) -> Tensor:
    """The `count` entries of each row with the largest magnitude; the others are zero."""
    kept = x.detach().abs().topk(count, dim=-1).indices
    return x.new_zeros(x.shape).scatter(-1, kept, x.detach().gather(-1, kept))


def integers(x: Tensor, bits: int, signed: bool = True) -> Tensor:
    """x as whole multiples of a step: the largest of a sequence and head has the largest number of `bits` bits."""
    x = x.detach()
    step = x.abs().amax((-2, -1), keepdim=True) / (2 ** (bits - signed) - 1)
    step = step.masked_fill(step == 0, 1)
    return (x / step).round() * step


def fixed_point(x: Tensor, bits: int) -> Tensor:
    """x with so many bits behind the point."""
    return (x.detach() * 2**bits).round() / 2**bits
