"""Scores of blocks of queries against blocks of keys, and supports made of the best: exact, ties to the lower index.

Nothing here carries a gradient, except `pool` and `block_scores` in PyTorch.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from stgen.ops import dispatch
from stgen.ops.block_scores import quick_select, reference
from stgen.ops.block_scores.reference import block_scores_reference, lists_reference, pool_reference
from stgen.ops.block_scores.reference import keep_above as keep_above
from stgen.ops.block_scores.reference import keep_mass as keep_mass
from stgen.ops.block_scores.reference import masked_softmax as masked_softmax
from stgen.ops.support import BUILD_PAIRS, SOME, Support

Impl = Literal["auto", "reference", "triton"]

LONGEST = 4096  # blocks of a row that a kernel keeps in registers
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Selection(NamedTuple):
    """The blocks of keys that each block of queries keeps."""

    kept: Tensor  # [S, heads, query blocks, key blocks] bool
    counts: Tensor  # [S, heads, query blocks] int32
    lists: Tensor  # [S, heads, query blocks, width] int32: ascending; places beyond the count hold the first, or 0

    def transposed(self, width: int | None = None, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
        """Of each block of keys the number of query blocks that keep it and their list, `width` places wide.

        [S, heads, key blocks] and [S, heads, key blocks, width] int32, as in `counts` and `lists`; width is the number
        of query blocks unless given, and should hold the longest list.
        """
        width = self.kept.shape[2] if width is None else width
        _check_impl(impl)
        if impl == "triton" and (reason := dispatch.off_gpu(self.kept)):
            raise ValueError(f"impl triton cannot transpose: {reason}; take auto")
        if impl == "triton" or (impl == "auto" and dispatch.by_kernels("block_scores", self.kept, None, _trial)):
            from stgen.ops.block_scores.library import transpose_op

            return transpose_op(self.kept, width)
        turned = self.kept.transpose(-1, -2)
        return turned.sum(-1, dtype=torch.int32), lists_reference(turned, width)


def pool(x: Tensor, filled: Tensor, block: int, impl: Impl = "reference") -> Tensor:
    """Means over blocks of the places that hold tokens: [S, heads, blocks, D], float32 or wider.

    Args:
        x: [S, heads, n, D].
        filled: [groups, heads or 1, n] bool, as `Support.attended` gives it.
        block: places of a block; the last may be ragged.
        impl: `reference`, `triton`, which carries no gradient, or `auto`.
    """
    _check_impl(impl)
    reason = (
        None if x.dtype in DTYPES else f"x is {str(x.dtype).removeprefix('torch.')}, not float32, float16 or bfloat16"
    )
    if impl == "triton" and (reason := reason or dispatch.off_gpu(x)):
        raise ValueError(f"impl triton cannot pool: {reason}; take auto")
    by_kernels = impl == "auto" and not _is_learned(x) and dispatch.by_kernels("block_scores", x, reason, _trial)
    if impl == "triton" or by_kernels:
        from stgen.ops.block_scores.library import pool_op

        return pool_op(x, filled, block)
    return pool_reference(x, spread(filled, x), block)


def _is_learned(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def block_scores(q: Tensor, k: Tensor, allowed: Support) -> Tensor:
    """Scores of pooled queries and keys: [S, heads, query blocks, key blocks], float32 or wider.

    Means are over the queries that may attend some key, and over the keys that some query may attend.
    """
    filled_q, filled_k = spread(allowed.per_query() > 0, q), spread(allowed.attended(), k)
    return block_scores_reference(q, k, filled_q, filled_k, allowed.block)


def keep_top(scores: Tensor, allowed: Tensor, counts: Tensor) -> Tensor:
    """The `counts` [..., rows] largest allowed scores of each row; of equal ones that of the lower index comes first.

    scores [..., rows, m], allowed likewise, bool -> bool. A row never keeps more than it is allowed. By quick-select
    where that is faster than the definition, which sorts (2 to 4 times from 64 scores on; `benchmarks/selection.py`).
    """
    if quick_select.fits(scores):
        return quick_select.keep_top_by_pivots(scores, allowed, counts)
    return reference.keep_top(scores, allowed, counts)


def spread(x: Tensor, like: Tensor) -> Tensor:
    """x [groups, heads or 1, ...] written out for each sequence and head of `like` [S, heads, ...]."""
    return x.repeat(like.shape[0] // x.shape[0], like.shape[1] // x.shape[1], *(1 for _ in x.shape[2:]))


def share_of(number: Tensor, ratio: float) -> Tensor:
    """max(1, floor(ratio * number)), and 0 of 0: how many of `number` keys are kept."""
    # 0.29 * 100 is 28.999999999999996: what a float lacks to the next whole number is not the user's meaning.
    return (number.double() * ratio + 1e-9).floor().long().clamp(min=1).minimum(number)


def of_blocks(kept: Tensor, allowed: Support) -> Support:
    """What `allowed` leaves of the block pairs in `kept` [S, heads, query blocks, key blocks] bool."""
    return Support.from_blocks(kept, allowed.queries, allowed.keys, allowed.block) & allowed


def over_blocks(filled: Tensor, queries: int, block: int) -> Support | None:
    """Every query over one key for each block that holds a token; None where all blocks do.

    filled [groups, heads or 1, m] bool.
    """
    present = pad(filled[:, :1], (0, -filled.shape[-1] % block)).unflatten(-1, (-1, block)).any(-1)
    if present.all():
        return None
    return Support.from_mask(present.unsqueeze(2).expand(-1, -1, queries, -1), (block, block))


@torch.no_grad()
def select_blocks(
    q: Tensor,
    k: Tensor,
    allowed: Tensor,
    *,
    top: Tensor | None = None,
    mass: float | None = None,
    above: float | None = None,
    width: int | None = None,
    impl: Impl = "auto",
) -> Selection:
    """Of each block of queries the best allowed blocks of keys, by the scores of their pools; exact, without a gradient.

    Args:
        q, k: [S, heads, query blocks, D] and [S, heads, key blocks, D] float32, as from `pool`.
        allowed: [groups, heads or 1, query blocks, key blocks] bool; sequence s takes group s % groups.
        top: how many to keep, [..., query blocks] whole numbers (`keep_top`); or else one of
        mass: the fewest whose softmax sums to this (`keep_mass`), above 0; or
        above: those whose softmax is this or more, and the best (`keep_above`).
        width: places of a list: all key blocks unless given. `top` never keeps more than these.
        impl: `reference` (plain PyTorch: `keep_top`), `triton` (rows of up to 4096 blocks) or `auto`.

    Raises:
        ValueError: not one rule, an unknown impl, a width without room, or kernels that cannot do the call.
    """
    rule, share = _rule(top, mass, above)
    _check_impl(impl)
    width = k.shape[2] if width is None else width
    if not 1 <= width <= k.shape[2]:
        raise ValueError(f"width should be from 1 to the {k.shape[2]} key blocks, got {width}")
    counts = None if top is None else top.to(torch.int32).clamp(max=width).expand(*q.shape[:3])
    reason = unfit(q, k)
    if impl == "triton" and (reason := reason or dispatch.off_gpu(q)):
        raise ValueError(f"impl triton cannot do this selection: {reason}; take auto")
    if impl == "triton" or (impl == "auto" and dispatch.by_kernels("block_scores", q, reason, _trial)):
        from stgen.ops.block_scores.library import select_op

        return Selection(*select_op(q, k, allowed, counts, rule, share, width))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    allowed = spread(allowed, scores)
    if counts is not None:
        kept = keep_top(scores, allowed, counts)
    else:
        kept = (keep_mass if rule == "mass" else keep_above)(scores, allowed, share)
    return Selection(kept, kept.sum(-1, dtype=torch.int32), lists_reference(kept, width))


def _trial(device: torch.device, dtype: torch.dtype) -> None:
    """The smallest selection by the kernels."""
    q = torch.zeros(1, 1, 1, 16, device=device)
    every = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    select_blocks(q, q, every, top=every.sum(-1), impl="triton").transposed(impl="triton")


def unfit(q: Tensor, k: Tensor) -> str | None:
    """Why the kernels cannot select among pooled q and k, as a clause; None if they can."""
    for name, x in (("q", q), ("k", k)):
        if x.dtype != torch.float32:
            return f"pooled {name} is {str(x.dtype).removeprefix('torch.')}, not float32"
        if x.numel() == 0:
            return f"{name} is empty"
    if k.shape[2] > LONGEST:
        return f"rows of {k.shape[2]} key blocks are longer than the {LONGEST} that registers hold"
    return None


def _rule(top: Tensor | None, mass: float | None, above: float | None) -> tuple[str, float]:
    given = {name: x for name, x in (("top", top), ("mass", mass), ("above", above)) if x is not None}
    if len(given) != 1:
        raise ValueError(f"give one of top, mass and above, got {', '.join(given) or 'none'}")
    if mass is not None and mass <= 0:
        raise ValueError(f"mass should be above 0, got {mass}")
    return next(iter(given)), float(mass or above or 0)


def _check_impl(impl: str) -> None:
    if impl not in ("auto", "reference", "triton"):
        raise ValueError(f"impl should be auto, reference or triton, got {impl!r}")


@torch.no_grad()
def top_blocks(q: Tensor, k: Tensor, allowed: Support, ratio: float, impl: Impl = "auto") -> Support:
    """The best share `ratio` of the allowed key blocks of each query block, by pooled scores; at least one.

    impl: `reference`, `triton` (float32, float16 and bfloat16, up to 4096 key blocks) or `auto`, which takes it on a
    GPU where it fits.
    """
    counts = share_of(allowed.kept.sum(-1), ratio)
    filled = allowed.per_query() > 0, allowed.attended()
    pooled_q, pooled_k = (pool(x, f, b, impl) for x, f, b in zip((q, k), filled, allowed.block, strict=True))
    counts = spread(counts, pooled_q[..., 0])
    return of_blocks(select_blocks(pooled_q, pooled_k, allowed.kept, top=counts, impl=impl).kept, allowed)


@torch.no_grad()
def top_keys(q: Tensor, k: Tensor, allowed: Support, ratio: float) -> Support:
    """The best share `ratio` of the allowed keys of each query, by its own scores; at least one.

    Looks at every pair, some blocks of queries at a time, which bounds its memory.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(wide) * q.shape[-1] ** -0.5, k.to(wide).transpose(-1, -2)
    rows, blocks = allowed.block[0], allowed.table.shape[2]
    step = max(1, BUILD_PAIRS // (q.shape[0] * q.shape[1] * allowed.keys * rows))
    parts = []
    for first in range(0, blocks, step):
        mask = spread(_rows(allowed, first, first + step).dense(), q)  # [S, heads, rows, m]
        scores = q[:, :, first * rows : (first + step) * rows] @ k
        parts.append(Support.from_mask(keep_top(scores, mask, share_of(mask.sum(-1), ratio)), allowed.block))
    return Support.join(parts, dim=2)


def _rows(support: Support, first: int, last: int) -> Support:
    """The part of the query blocks from `first` up to `last`."""
    table = support.table[:, :, first:last]
    bits = support.bits[support.slots[:, :, first:last][table == SOME]]
    queries = min(last * support.block[0], support.queries) - first * support.block[0]
    return Support(queries, support.keys, support.block, table, bits)
