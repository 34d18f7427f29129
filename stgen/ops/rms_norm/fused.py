"""RMS norm as one node of the graph.

With n = x r, r = 1 / sqrt(mean(x^2) + eps) and incoming gradient g:
    dx = r (g gain - n mean(g gain n)),    dgain = sum of g n over all rows.
"""

import torch
from torch import Tensor
from torch.linalg import vector_norm


class FusedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        # The norm is accumulated in float32 at least, whatever x is.
        wide = torch.promote_types(x.dtype, torch.float32)
        r = vector_norm(x, dim=-1, keepdim=True, dtype=wide).square_().div_(x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)
        n = x * r
        ctx.save_for_backward(n, r, gain)
        return n * gain

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (g,) = grads
        n, r, gain = ctx.saved_tensors
        gn = g * n
        mean = (gn @ gain).unsqueeze(-1).div_(-n.shape[-1])  # [..., 1], negative
        return torch.addcmul(g * gain, n, mean).mul_(r), gn.flatten(0, -2).sum(0), None
