"""Which implementation `auto` takes. A named one is never exchanged for another."""

import logging
from functools import cache

from torch import Tensor

log = logging.getLogger("stgen")

SHORT_ON_CPU = 128  # keys; up to here explicit products win on a CPU


def dense(q: Tensor, keys: int, plain: bool) -> str:
    """For queries [S, heads, n, D] that attend all of `keys`; `plain` is softmax without a sink."""
    if q.device.type == "cpu" and keys <= SHORT_ON_CPU:
        impl = "reference"
    else:
        impl = "sdpa" if plain else "blocks"
    _tell("dense_attention", impl, str(q.device.type))
    return impl


def block_sparse(q: Tensor, keys: int) -> str:
    """For queries [S, heads, n, D] that attend some of `keys`."""
    impl = "reference" if max(q.shape[-2], keys) <= SHORT_ON_CPU else "gather"
    _tell("block_sparse_attention", impl, str(q.device.type))
    return impl


@cache
def _tell(op: str, impl: str, device: str) -> None:
    """Once for each choice."""
    log.info("%s on %s: %s", op, device, impl)
