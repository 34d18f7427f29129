"""Attention over the block pairs of a support: the cost is that of the blocks kept, forward and backward."""

import os
from importlib.util import find_spec
from typing import Literal, overload

import torch
from torch import Tensor

from stgen.ops import dispatch
from stgen.ops.block_sparse_attention.gather import block_sparse_attention_gather
from stgen.ops.block_sparse_attention.library import block_sparse_attention_triton
from stgen.ops.block_sparse_attention.reference import block_sparse_attention_reference, for_each_head
from stgen.ops.normaliser import Normaliser
from stgen.ops.support import Support, sort, unsort

Impl = Literal["auto", "reference", "gather", "triton"]
Backward = Literal["deterministic", "fast"]
IMPLS = {"reference": block_sparse_attention_reference, "gather": block_sparse_attention_gather}

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNEL_BLOCKS = (16, 32, 64, 128)
KERNEL_WIDTH = 128  # largest head dimension


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    support: Support,
    normaliser: Normaliser | str = "softmax",
    sink: Tensor | None = None,
    *,
    return_lse: Literal[False] = False,
    impl: Impl = "auto",
    backward: Backward = "deterministic",
) -> Tensor: ...


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    support: Support,
    normaliser: Normaliser | str = "softmax",
    sink: Tensor | None = None,
    *,
    return_lse: Literal[True],
    impl: Impl = "auto",
    backward: Backward = "deterministic",
) -> tuple[Tensor, Tensor]: ...


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    support: Support,
    normaliser: Normaliser | str = "softmax",
    sink: Tensor | None = None,
    *,
    return_lse: bool = False,
    impl: Impl = "auto",
    backward: Backward = "deterministic",
) -> Tensor | tuple[Tensor, Tensor]:
    """Each query attends the keys of its support; a query without keys gets zeros.

    Args:
        q: [S, heads, n, D] queries.
        k, v: [S, heads, m, D] keys and values; their heads may be fewer, each then serves as many heads of queries.
        support: which keys each query attends; sequence s takes group s % groups, its bias is added to the scores.
            Queries and keys are sorted by its orders for the time of the computation.
        normaliser: a `Normaliser` or the name of its kind.
        sink: [heads] score of a further key that has no value.
        return_lse: also return the natural logarithm of the mass, the sink included; -inf where there is no mass.
        impl: `reference` (the definition: n x m scores), `gather` (blocks alone), `triton` (kernels) or `auto`.
        backward: of `triton`: `deterministic`, or `fast`, which adds up the gradient of q in no fixed order.

    Returns:
        [S, heads, n, D], and with `return_lse` the LSE [S, heads, n]. Both are differentiable in q, k, v, sink and bias.

    Raises:
        ValueError: shapes or devices that do not match, an unknown impl, a named one that cannot do this call, a sink or
            an LSE of relu or relu2.

    >>> import torch
    >>> q, k, v = torch.randn(3, 2, 4, 100, 32)
    >>> near = Support.from_predicate(lambda i: ((i[:, None] - torch.arange(100)).abs() < 10)[None], 100, 100, (16, 16))
    >>> out, lse = block_sparse_attention(q, k, v, near, return_lse=True)
    >>> out.shape, lse.shape
    (torch.Size([2, 4, 100, 32]), torch.Size([2, 4, 100]))
    """
    normaliser, kind = Normaliser.of(normaliser), q.device.type
    if torch.is_autocast_enabled(kind) and q.dtype != torch.float64:  # as PyTorch's own attention does
        q, k, v = (x.to(torch.get_autocast_dtype(kind)) for x in (q, k, v))
    _check(q, k, v, support)
    normaliser.check_sink(sink, q.shape[1])
    if return_lse and normaliser.by_count:
        raise ValueError(f"normaliser {normaliser.kind} divides by the number of keys and has no LSE")
    if backward not in ("deterministic", "fast"):
        raise ValueError(f"backward should be deterministic or fast, got {backward!r}")
    chosen = _chosen(impl, q, k, support)
    if chosen != "triton" or _has_order_by_head(support):
        k, v = for_each_head(k, q.shape[1]), for_each_head(v, q.shape[1])
    q, k, v = sort(q, support.query_order), sort(k, support.key_order), sort(v, support.key_order)
    with torch.autocast(kind, enabled=False):
        if chosen == "triton":  # its lists do not depend on an order and are kept with the support itself
            fast = backward == "fast"
            out, lse = block_sparse_attention_triton(q, k, v, support, normaliser, sink, return_lse, fast)
        else:
            out, lse = IMPLS[chosen](q, k, v, support.of_sorted, normaliser, sink, return_lse)
    out = unsort(out, support.query_order)
    return out if lse is None else (out, unsort(lse, support.query_order))


def unfit(q: Tensor, support: Support) -> str | None:
    """Why the kernels cannot do a call, as a clause after their name; None if they can."""
    if find_spec("triton") is None:
        return "needs the package triton, which is not installed"
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return f"takes tensors on a GPU, not on {q.device.type}; elsewhere it needs TRITON_INTERPRET=1"
    if q.dtype not in KERNEL_DTYPES:
        return f"takes float32, float16 and bfloat16, not {str(q.dtype).removeprefix('torch.')}"
    if q.shape[3] > KERNEL_WIDTH:
        return f"takes head dimensions up to {KERNEL_WIDTH}, not {q.shape[3]}"
    if any(size not in KERNEL_BLOCKS for size in support.block):
        return f"takes blocks of 16, 32, 64 and 128 places, not {support.block[0]} x {support.block[1]}"
    return None


def _chosen(impl: str, q: Tensor, k: Tensor, support: Support) -> str:
    if impl == "auto":
        shape = (q.shape[3], support.block)
        by_kernels = dispatch.by_kernels("block_sparse_attention", q, unfit(q, support), _trial, *shape)
        return "triton" if by_kernels else dispatch.block_sparse(q, k.shape[-2])
    if impl == "triton" and (reason := unfit(q, support)) is not None:
        raise ValueError(f"impl should be auto, reference or gather, got 'triton', which {reason}")
    if impl not in (*IMPLS, "triton"):
        raise ValueError(f"impl should be auto, {', '.join(IMPLS)} or triton, got {impl!r}")
    return impl


def _trial(device: torch.device, dtype: torch.dtype, width: int, block: tuple[int, int]) -> None:
    """The smallest forward and backward pass of the kernels."""
    q, k, v = torch.zeros(3, 1, 1, max(block), width, dtype=dtype, device=device).requires_grad_()
    every = Support.full(max(block), max(block), block, device)
    block_sparse_attention(q, k, v, every, impl="triton").sum().backward()


def _has_order_by_head(support: Support) -> bool:
    return support.key_order is not None and support.key_order.shape[1] > 1


def check_support(q: Tensor, k: Tensor, support: Support) -> None:
    """Raise ValueError unless the support is one of these queries [S, heads, n, D] and keys [S, heads, m, D]."""
    (sequences, heads, n), m = q.shape[:3], k.shape[2]
    if (n, m) != (support.queries, support.keys):
        raise ValueError(f"support is of {support.queries} x {support.keys} places, q and k have {n} x {m}")
    if sequences % support.groups or support.heads not in (1, heads):
        raise ValueError(
            f"support has {support.groups} groups and {support.heads} heads, which do not go with {sequences} sequences "
            f"of {heads} heads; groups should divide the sequences, heads be 1 or as many"
        )
    if support.device != q.device:
        raise ValueError(f"support is on {support.device} and q on {q.device}; build it there")


def _check(q: Tensor, k: Tensor, v: Tensor, support: Support) -> None:
    if not isinstance(support, Support):
        raise ValueError(
            f"support should be a Support, got {type(support).__name__}; Support.from_mask takes a bool mask"
        )
    fits = q.ndim == k.ndim == 4 and k.shape == v.shape and (len(k), k.shape[3]) == (len(q), q.shape[3])
    if not fits or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise ValueError(
            f"q should be [S, heads, n, D], k and v [S, heads, m, D], got {shapes}; fewer heads of k divide q's"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v should have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    check_support(q, k, support)
