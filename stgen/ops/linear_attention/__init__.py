"""Linear attention: out = phi_q (sum_j phi_k_j v_j^T) / (phi_q · sum_j phi_k_j).

The sum over keys is a state of size F x D, so time and memory grow with the number of places and not with its square
(Katharopoulos et al., arXiv:2006.16236, section 3.2). Block-causal attention adds the state of what came before a chunk
to the products within it, the chunkwise form of Sun et al. (arXiv:2307.08621).
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from stgen.ops.linear_attention.reference import chunk_mask, linear_attention_reference

Impl = Literal["auto", "reference", "state"]


def linear_attention(
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    chunk: int | None = None,
    prefix: int = 0,
    impl: Impl = "auto",
) -> Tensor:
    """Attention whose weights are products of features.

    Args:
        phi_q: [S, heads, n, F] features of the queries, none negative.
        phi_k: [S, heads, m, F] features of the keys, none negative.
        v: [S, heads, m, D] values.
        key_mask: [S, m] bool, true where a key may be attended.
        chunk: None: every query sees every key. Otherwise block-causal, with m = prefix + n: place i sees the prefix
            and the chunks of `chunk` places up to and including its own.
        prefix: keys that stand before the n of the sequence and are seen by all, such as the rows of a sink.
        impl: `reference` (explicit products, quadratic), `state` (running sums, linear) or `auto`.

    Returns:
        [S, heads, n, D] in the type of v, computed in float32 at least; a query without mass gives zeros.

    Raises:
        ValueError: shapes that do not fit chunk and prefix, or an unknown impl.
    """
    _check(phi_q.shape[-2], phi_k.shape[-2], chunk, prefix, impl)
    if impl == "auto":  # up to F keys the weights are smaller than the state
        impl = "reference" if phi_k.shape[-2] <= phi_k.shape[-1] else "state"
    dtype = torch.promote_types(torch.promote_types(phi_q.dtype, v.dtype), torch.float32)
    compute = linear_attention_reference if impl == "reference" else _linear_attention_state
    with torch.autocast(phi_q.device.type, enabled=False):  # which would round the state to 16 bits
        return compute(phi_q.to(dtype), phi_k.to(dtype), v.to(dtype), key_mask, chunk, prefix).to(v.dtype)


def _check(n: int, m: int, chunk: int | None, prefix: int, impl: str) -> None:
    if impl not in ("auto", "reference", "state"):
        raise ValueError(f"impl should be auto, reference or state, got {impl!r}")
    if not 0 <= prefix <= m:
        raise ValueError(f"prefix should be between 0 and the number of keys {m}, got {prefix}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk should be at least 1 place, got {chunk}")
    if chunk is not None and m != prefix + n:
        raise ValueError(f"chunk needs as many keys as prefix and queries, {prefix} + {n}, got {m}")


def _linear_attention_state(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, key_mask: Tensor | None, chunk: int | None, prefix: int
) -> Tensor:
    if key_mask is not None:
        phi_k = phi_k.masked_fill(~key_mask[:, None, :, None], 0)
    v = pad(v, (0, 1), value=1)  # [S, heads, m, D + 1]: what the ones gather is the mass
    if chunk is None:
        sums = phi_q @ (phi_k.transpose(-1, -2) @ v)
    else:
        start = phi_k[:, :, :prefix].transpose(-1, -2) @ v[:, :, :prefix]  # [S, heads, F, D + 1]
        sums = _block_causal(phi_q, phi_k[:, :, prefix:], v[:, :, prefix:], chunk, start)
    out, mass = sums[..., :-1], sums[..., -1:]
    empty = mass == 0
    return (out / mass.masked_fill(empty, 1)).masked_fill(empty, 0)


def _block_causal(phi_q: Tensor, phi_k: Tensor, v: Tensor, chunk: int, start: Tensor) -> Tensor:
    """Sums [S, heads, n, D] over the chunks up to each place's own, beginning with the state `start` [S, heads, F, D].

    Chunks shorter than F share a segment of about F places: a state for each would take more room than the weights
    within the segment, which are then written out.
    """
    n, size = phi_q.shape[-2], chunk * max(1, phi_k.shape[-1] // chunk)
    q, k, v = (pad(x, (0, 0, 0, -n % size)).unflatten(2, (-1, size)) for x in (phi_q, phi_k, v))
    added = k.transpose(-1, -2) @ v  # [S, heads, segments, F, D]
    states = torch.cat([start.unsqueeze(2), added], dim=2).cumsum(2)  # before the first segment and after each
    if size == chunk:
        sums = q @ states[:, :, 1:]
    else:
        within = (q @ k.transpose(-1, -2)).masked_fill(~chunk_mask(size, chunk, 0, q.device), 0)
        sums = q @ states[:, :, :-1] + within @ v
    return sums.flatten(2, 3)[:, :, :n]
