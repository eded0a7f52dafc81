"""The fused ops, each usable on its own, with its reference in plain torch beside it::

    y, mean, var = auglocal_ext.ops.batch_norm_act(x, bn.weight, bn.bias, residual, eps=bn.eps)

They run on any device: by compiled kernels on the CPU and on CUDA where these were built, on CUDA for the loss by
Triton's, else in plain torch, which a warning says once. Feature maps are (N, C, H, W), float32, bfloat16, float16 or
float64; statistics and what is of channels are float32, for float64 maps float64.
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
