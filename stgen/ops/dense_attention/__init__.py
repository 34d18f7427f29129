"""Dense attention: every query attends every key, or all that a mask of keys leaves."""

from typing import Literal

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from stgen.ops import dispatch
from stgen.ops.block_sparse_attention import block_sparse_attention, check_support
from stgen.ops.block_sparse_attention.reference import bias_reference, mask_reference
from stgen.ops.dense_attention.reference import Transform, attention_map_reference, dense_attention_reference
from stgen.ops.normaliser import Normaliser
from stgen.ops.support import Support

Impl = Literal["blocks", "auto", "reference", "sdpa"]

BLOCK = 64  # places of a block where dense attention is computed by blocks


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    impl: Impl = "auto",
    normaliser: Normaliser | str = "softmax",
    sink: Tensor | None = None,
) -> Tensor:
    """Attention of each sequence over itself or over another.

    Args:
        q: [S, heads, n, D] queries.
        k, v: [S, heads, m, D] keys and values.
        key_mask: [S, m] bool, true where a key may be attended; a row without keys gives zeros.
        impl: `reference` (explicit products), `sdpa` (PyTorch's kernel, softmax without sink), `blocks` (block-sparse
            attention with every block: nothing of size n x m is built) or `auto`.
        normaliser: a `Normaliser` or the name of its kind.
        sink: [heads] score of a further key that has no value.

    Returns:
        [S, heads, n, D].

    Raises:
        ValueError: unknown impl, or one that cannot do what is asked.
    """
    normaliser = Normaliser.of(normaliser)
    normaliser.check_sink(sink, q.shape[1])
    plain = normaliser.kind == "softmax" and sink is None
    chosen = dispatch.dense(q, k.shape[-2], plain) if impl == "auto" else impl
    if chosen == "reference":
        return dense_attention_reference(q, k, v, key_mask, normaliser, sink)
    if chosen == "blocks":
        return block_sparse_attention(q, k, v, _every_block(q, k, key_mask), normaliser, sink)
    if chosen != "sdpa":
        raise ValueError(f"impl should be blocks, auto, reference or sdpa, got {impl!r}")
    if not plain:
        what = "softmax with one" if normaliser.kind == "softmax" else normaliser.kind
        raise ValueError(f"impl sdpa is softmax without a sink, not {what}; take impl: auto")
    if key_mask is None:
        return scaled_dot_product_attention(q, k, v)
    mask = key_mask[:, None, None, :]
    # Kernels differ in what they give for a row without keys; zeros are the definition.
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).masked_fill(~mask.any(-1, keepdim=True), 0)


def attention_map(
    q: Tensor,
    k: Tensor,
    key_mask: Tensor | None = None,
    support: Support | None = None,
    normaliser: Normaliser | str = "softmax",
    sink: Tensor | None = None,
    transform: Transform | None = None,
) -> Tensor:
    """The map P [S, heads, n, m] with out = P v, for short sequences whose map is used again.

    Args:
        q, k: [S, heads, n, D] and [S, heads, m, D].
        key_mask, support: which keys may be attended, [S, m] bool and a Support; both must allow a key.
        normaliser, sink: as in `dense_attention`.
        transform: of scores [S, heads, n, m] and of the mask that broadcasts to them (None for all), what f is to see
            instead; it keeps a score of every query that has a key.
    """
    normaliser = Normaliser.of(normaliser)
    normaliser.check_sink(sink, q.shape[1])
    mask = None if key_mask is None else key_mask[:, None, None, :]
    bias = None
    if support is not None:
        check_support(q, k, support)
        kept = mask_reference(support, len(q))
        mask, bias = kept if mask is None else kept & mask, bias_reference(support, len(q))
    return attention_map_reference(q, k, mask, normaliser, sink, bias, transform)


def _every_block(q: Tensor, k: Tensor, key_mask: Tensor | None) -> Support:
    """All blocks of keys that the mask does not empty."""
    n, m, block = q.shape[-2], k.shape[-2], (BLOCK, BLOCK)
    if key_mask is None:
        return Support.full(n, m, block, q.device)
    return Support.from_predicate(
        lambda rows: key_mask[:, None].expand(-1, len(rows), -1), n, m, block, len(key_mask), q.device
    )
