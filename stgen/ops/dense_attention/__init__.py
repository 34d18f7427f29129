"""Dense softmax attention: out = softmax(q k^T / sqrt(d)) v.

PyTorch's fused kernel is the best there is on long sequences; on a CPU its backward costs more than three plain
products when sequences are short (measured: 1.45x per training step at 4-64 tokens), so those take the reference.
"""

from typing import Literal

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from stgen.ops.dense_attention.reference import dense_attention_reference

SHORT_ON_CPU = 128  # keys; up to here explicit products win on a CPU

Impl = Literal["auto", "reference", "sdpa"]


def dense_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, impl: Impl = "auto") -> Tensor:
    """Attention of each sequence over itself or over another.

    Args:
        q: [S, heads, n, D] queries.
        k, v: [S, heads, m, D] keys and values.
        key_mask: [S, m] bool, true where a key may be attended; a row without keys gives zeros.
        impl: `reference` (explicit products), `sdpa` (PyTorch's kernel) or `auto`.

    Returns:
        [S, heads, n, D].
    """
    if impl == "auto":
        impl = "reference" if q.device.type == "cpu" and k.shape[-2] <= SHORT_ON_CPU else "sdpa"
    if impl == "reference":
        return dense_attention_reference(q, k, v, key_mask)
    if impl != "sdpa":
        raise ValueError(f"impl should be auto, reference or sdpa, got {impl!r}")
    if key_mask is None:
        return scaled_dot_product_attention(q, k, v)
    mask = key_mask[:, None, None, :]
    # Kernels differ in what they give for a row without keys; zeros are the definition.
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).masked_fill(~mask.any(-1, keepdim=True), 0)
