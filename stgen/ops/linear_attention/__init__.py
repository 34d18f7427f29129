"""Linear attention: out = phi_q (sum_j phi_k_j v_j^T) / (phi_q · sum_j phi_k_j).

The sum over keys is a state of size F x D, so time and memory grow with the number of places and not with its square
(Katharopoulos et al., arXiv:2006.16236, section 3.2). Block-causal attention adds the state of what came before a chunk
to the products within it, the chunkwise form of Sun et al. (arXiv:2307.08621). A state that is read before it is
written to is the memory of Infini-attention (Munkhdalai et al., arXiv:2404.07143, section 2.1).
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from stgen.ops import dispatch
from stgen.ops.linear_attention.reference import (
    chunk_mask,
    linear_attention_reference,
    linear_attention_segments_reference,
)

Impl = Literal["auto", "reference", "state", "triton"]

WIDEST = 128  # features and head dimension that the kernels take
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
        impl: `reference` (explicit products, quadratic), `state` (running sums, linear), `triton` (the same on a GPU,
            up to 128 features and a head dimension of 128) or `auto`.

    Returns:
        [S, heads, n, D] in the type of v, computed in float32 at least; a query without mass gives zeros.

    Raises:
        ValueError: shapes that do not fit chunk and prefix, an unknown impl, or kernels that cannot do the call.
    """
    _check_shapes(phi_q, phi_k, v)
    _check(phi_q.shape[-2], phi_k.shape[-2], chunk, prefix, impl)
    chosen = _fastest(phi_q, phi_k, v) if impl == "auto" else impl
    if chosen == "triton":
        _check_fit(phi_q, phi_k, v)
        from stgen.ops.linear_attention.library import linear_attention_op

        return linear_attention_op(phi_q, phi_k, v, key_mask, chunk, prefix)[0]
    dtype = torch.promote_types(torch.promote_types(phi_q.dtype, v.dtype), torch.float32)
    compute = linear_attention_reference if chosen == "reference" else _linear_attention_state
    with torch.autocast(phi_q.device.type, enabled=False):  # which would round the state to 16 bits
        return compute(phi_q.to(dtype), phi_k.to(dtype), v.to(dtype), key_mask, chunk, prefix).to(v.dtype)


def linear_attention_segments(
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    segment: int,
    state: tuple[Tensor, Tensor] | None = None,
    *,
    delta: bool = False,
    impl: Literal["auto", "reference", "triton"] = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Segments that read what a memory holds of all before them, and are then written to it.

    Args:
        phi_q, phi_k: [S, heads, n, F] features of queries and keys, none negative.
        v: [S, heads, n, D] values.
        segment: places of a segment; the last may be shorter.
        state: the memory M [S, heads, F, D] and z [S, heads, F] that is handed in, float32; None for an empty one.
        delta: write only what the memory does not yield for a key already (the delta rule).
        impl: `reference` (a loop over segments), `triton` or `auto`.

    Returns:
        [S, heads, n, D] in the type of v, zeros where a query meets no mass; and the memory after the last segment,
        float32. Both carry gradients to every input, the memory that is handed in included.

    Raises:
        ValueError: shapes that do not fit each other, an unknown impl, or kernels that cannot do the call.
    """
    wide = torch.promote_types(torch.promote_types(phi_q.dtype, v.dtype), torch.float32)
    sizes = (*phi_k.shape[:2], phi_k.shape[-1], v.shape[-1])  # S, heads, F, D
    state = state or (v.new_zeros(sizes, dtype=wide), v.new_zeros(sizes[:3], dtype=wide))
    _check_segments(phi_q, phi_k, v, segment, state, impl)
    if impl == "auto":
        impl = "triton" if _by_kernels(phi_q, phi_k, v) else "reference"
    if impl == "triton":
        _check_fit(phi_q, phi_k, v)
        from stgen.ops.linear_attention.library import linear_attention_segments_op

        out, m, z, *_ = linear_attention_segments_op(phi_q, phi_k, v, *state, segment, delta)
        return out, (m, z)
    with torch.autocast(phi_q.device.type, enabled=False):
        out, state = linear_attention_segments_reference(
            phi_q.to(wide), phi_k.to(wide), v.to(wide), segment, (state[0].to(wide), state[1].to(wide)), delta
        )
    return out.to(v.dtype), state


def unfit(phi_q: Tensor, phi_k: Tensor, v: Tensor) -> str | None:
    """Why the kernels cannot do a call, as a clause; None if they can."""
    for name, x in (("phi_q", phi_q), ("phi_k", phi_k), ("v", v)):
        if x.dtype not in DTYPES:
            return f"{name} is {str(x.dtype).removeprefix('torch.')}, not float32, float16 or bfloat16"
        if x.shape[-1] > WIDEST:
            return f"the last axis of {name} is {x.shape[-1]}, more than {WIDEST}"
        if x.numel() == 0:
            return f"{name} is empty"
    if phi_q.dtype != phi_k.dtype:
        return "phi_q and phi_k differ in type"
    return None


def _check_fit(phi_q: Tensor, phi_k: Tensor, v: Tensor) -> None:
    if reason := unfit(phi_q, phi_k, v) or dispatch.off_gpu(v):
        raise ValueError(f"impl triton cannot do this linear attention: {reason}; take auto")


def _by_kernels(phi_q: Tensor, phi_k: Tensor, v: Tensor) -> bool:
    shape = (phi_q.dtype, phi_k.shape[-1], v.shape[-1])
    return dispatch.by_kernels("linear_attention", v, unfit(phi_q, phi_k, v), _trial, *shape)


def _trial(device: torch.device, dtype: torch.dtype, of_features: torch.dtype, features: int, width: int) -> None:
    """The smallest forward and backward pass of the kernels."""
    phi = torch.ones(1, 1, 2, features, dtype=of_features, device=device).requires_grad_()
    v = torch.zeros(1, 1, 2, width, dtype=dtype, device=device).requires_grad_()
    linear_attention(phi, phi, v, impl="triton").sum().backward()


def _fastest(phi_q: Tensor, phi_k: Tensor, v: Tensor) -> str:
    if _by_kernels(phi_q, phi_k, v):
        return "triton"
    return "reference" if phi_k.shape[-2] <= phi_k.shape[-1] else "state"  # of weights and state the smaller


def _check_segments(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, segment: int, state: tuple[Tensor, Tensor], impl: str
) -> None:
    if impl not in ("auto", "reference", "triton"):
        raise ValueError(f"impl should be auto, reference or triton, got {impl!r}")
    if segment < 1:
        raise ValueError(f"segment should be at least 1 place, got {segment}")
    if phi_q.shape != phi_k.shape or phi_k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"phi_q {list(phi_q.shape)}, phi_k {list(phi_k.shape)} and v {list(v.shape)} should have the same "
            "sequences, heads and places, and phi_q and phi_k the same features"
        )
    for x, shape in zip(state, ((*phi_k.shape[:2], phi_k.shape[-1], v.shape[-1]), phi_k[..., 0, :].shape), strict=True):
        if x.shape != shape:
            raise ValueError(f"state should be of shape {list(shape)} here, got {list(x.shape)}")


def _check_shapes(phi_q: Tensor, phi_k: Tensor, v: Tensor) -> None:
    if phi_q.shape[-1] != phi_k.shape[-1] or phi_k.shape[-2] != v.shape[-2]:
        raise ValueError(
            f"phi_q {list(phi_q.shape)} and phi_k {list(phi_k.shape)} should have the same features, phi_k and "
            f"v {list(v.shape)} the same places"
        )


def _check(n: int, m: int, chunk: int | None, prefix: int, impl: str) -> None:
    if impl not in ("auto", "reference", "state", "triton"):
        raise ValueError(f"impl should be auto, reference or state, got {impl!r}; on a GPU also triton")
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
