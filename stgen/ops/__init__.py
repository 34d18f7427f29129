"""Operations on plain tensors, each with its definition in PyTorch. Needs torch alone."""

from stgen.ops.block_sparse_attention import block_sparse_attention
from stgen.ops.dense_attention import attention_map, dense_attention
from stgen.ops.linear_attention import linear_attention
from stgen.ops.normaliser import Normaliser
from stgen.ops.rms_norm import rms_norm
from stgen.ops.support import Support

__all__ = [
    "Normaliser",
    "Support",
    "attention_map",
    "block_sparse_attention",
    "dense_attention",
    "linear_attention",
    "rms_norm",
]
