"""Floating-point operations, counted where they happen: a multiply-add is two, one forward pass."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Operations as executed, and as they would be if every query of a sequence attended every key."""

    executed: int = 0
    dense: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.executed + other.executed, self.dense + other.dense)

    def __mul__(self, times: float) -> "Work":
        return Work(int(self.executed * times), int(self.dense * times))


def linear_flops(tokens: int, inputs: int, outputs: int) -> int:
    """x W for `tokens` rows."""
    return 2 * tokens * inputs * outputs


def attention_flops(queries: int, keys: int, width: int) -> int:
    """q k^T and P v of `queries` rows against `keys` each, all heads together `width` channels."""
    return 4 * queries * keys * width


def linear_attention_flops(queries: int, keys: int, features: int, head_dim: int, heads: int) -> int:
    """phi(k)^T v with its normaliser, and what the queries read of them, all heads together."""
    return 2 * (queries + keys) * features * (head_dim + 1) * heads
