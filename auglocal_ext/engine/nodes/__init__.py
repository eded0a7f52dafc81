"""The kinds of nodes, one a file. A new kind is a file here and a line in KINDS."""

from .activation import Activation
from .attention import Attention
from .avg_pool import AvgPool
from .conv import Conv
from .head import Head
from .island import Island
from .layer_norm import LayerNorm
from .linear import Linear
from .loss import Loss
from .max_pool import MaxPool
from .norm import Norm
from .pooled_norm import PooledNorm
from .reshape import Reshape

__all__ = [
    "KINDS",
    "Activation",
    "Attention",
    "AvgPool",
    "Conv",
    "Head",
    "Island",
    "LayerNorm",
    "Linear",
    "Loss",
    "MaxPool",
    "Norm",
    "PooledNorm",
    "Reshape",
]

# What tracing looks for, in order of priority; the last one matches everything.
KINDS = (Conv, Linear, Activation, MaxPool, AvgPool, PooledNorm, Norm, LayerNorm, Attention, Reshape, Island)
