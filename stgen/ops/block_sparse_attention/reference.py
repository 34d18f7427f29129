"""The definition of block-sparse attention: the dense one under the support's own mask."""

from torch import Tensor

from stgen.ops.normaliser import Normaliser
from stgen.ops.support import Support


def mask_reference(support: Support, sequences: int) -> Tensor:
    """The mask of `sequences` sequences: [S, heads or 1, n, m] bool."""
    return support.dense().repeat(sequences // support.groups, 1, 1, 1)


def bias_reference(support: Support, sequences: int) -> Tensor | None:
    """The bias of each pair of places: [S, heads or 1, n, m]; what it is where nothing is kept does not matter."""
    if support.bias is None:
        return None
    bias = support.bias.masked_fill(~support.kept, 0).repeat(sequences // support.groups, 1, 1, 1)
    bias = bias.repeat_interleave(support.block[0], 2).repeat_interleave(support.block[1], 3)
    return bias[:, :, : support.queries, : support.keys]


def for_each_head(x: Tensor, heads: int) -> Tensor:
    """Keys or values of fewer heads, repeated for as many of queries: [S, some, m, D] -> [S, heads, m, D]."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def block_sparse_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, support: Support, normaliser: Normaliser, sink: Tensor | None, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Output [S, heads, n, D] and, where asked for, LSE [S, heads, n]."""
    k, v = for_each_head(k, q.shape[1]), for_each_head(v, q.shape[1])
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [S, heads, n, m]
    if (bias := bias_reference(support, len(q))) is not None:
        scores = scores + bias
    weights, mass, level = normaliser.weights(scores, mask_reference(support, len(q)), sink)
    weights = (weights / mass.masked_fill(mass == 0, 1)).to(v.dtype)
    lse = normaliser.log_mass(mass, level).squeeze(-1) if with_lse else None
    return weights @ v, lse
