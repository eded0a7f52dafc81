"""The fused ops, each usable on its own, with its reference in plain torch beside it.

y, mean, var = auglocal_ext.ops.batch_norm_act(x, bn.weight, bn.bias, residual, eps=bn.eps)
"""

from .batch_norm_act import (
    batch_norm_act,
    batch_norm_act_apply,
    batch_norm_act_backward,
    batch_norm_act_reference,
    batch_norm_statistics,
)
from .batch_norm_act_max_pool import batch_norm_act_max_pool, batch_norm_act_max_pool_reference
from .conv_batch_norm_act import conv_batch_norm_act, conv_batch_norm_act_reference
from .pooled_cross_entropy import PooledCrossEntropy, pooled_cross_entropy, pooled_cross_entropy_reference

__all__ = [
    "PooledCrossEntropy",
    "batch_norm_act",
    "batch_norm_act_apply",
    "batch_norm_act_backward",
    "batch_norm_act_max_pool",
    "batch_norm_act_max_pool_reference",
    "batch_norm_act_reference",
    "batch_norm_statistics",
    "conv_batch_norm_act",
    "conv_batch_norm_act_reference",
    "pooled_cross_entropy",
    "pooled_cross_entropy_reference",
]
