"""Floating-point operations, counted where they happen: a multiply-add is two, one forward pass."""


def linear_flops(tokens: int, inputs: int, outputs: int) -> int:
    """x W for `tokens` rows."""
    return 2 * tokens * inputs * outputs


def attention_flops(queries: int, keys: int, width: int) -> int:
    """q k^T and P v of `queries` rows against `keys` each, all heads together `width` channels."""
    return 4 * queries * keys * width
