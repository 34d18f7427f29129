"""Column mass: the weight that each key receives from all queries, by which tokens are ranked.

    mass_j = sum over heads and queries i of P_ij,    under softmax P_ij = exp(s_ij - LSE_i)

An extra pass over the scores after attention: some rows of a head at a time, or some heads whose maps are small. A row is
whole within its part, so its LSE is found there, and nothing of size n x m is kept.
"""

import torch
from torch import Tensor

from stgen.ops.dense_attention import attention_map
from stgen.ops.normaliser import Normaliser

# Scores held at once. On a CPU they fit its cache, and many rows of one head take 0.4 of the time of a few of all heads
# (measured, 2048 x 2048 x 8); on a GPU, where this was not measured, they are 256 MB.
PART = {"cpu": 1 << 19, "cuda": 1 << 26}


@torch.no_grad()
def column_mass(
    q: Tensor, k: Tensor, normaliser: Normaliser | str = "softmax", sink: Tensor | None = None, part: int | None = None
) -> Tensor:
    """What each key receives: [S, m], float32 at least, without a gradient.

    Args:
        q, k: [S, heads, n, D] and [S, heads, m, D]; every query attends every key.
        normaliser, sink: as in `attention_map`; what a sink takes is no key's.
        part: scores held at once; changes nothing but time and memory. None takes what suits the device.
    """
    sequences, heads, n, m = *q.shape[:3], k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    part = part or PART.get(q.device.type, PART["cpu"])
    together, rows = max(1, part // (n * m)), max(1, part // m)
    q, k = q.flatten(0, 1), k.flatten(0, 1)  # [S * heads, n, D]
    sink = None if sink is None else sink.repeat(sequences)
    mass = torch.zeros(sequences * heads, m, dtype=wide, device=q.device)
    for first in range(0, sequences * heads, together):
        own = slice(first, first + together)
        for some in q[own].split(rows, dim=1):
            logit = None if sink is None else sink[own]
            weights = attention_map(some[None], k[None, own], None, None, normaliser, logit, lambda s, _: s.to(wide))
            mass[own] += weights[0].sum(1)
    return mass.unflatten(0, (sequences, heads)).sum(1)
