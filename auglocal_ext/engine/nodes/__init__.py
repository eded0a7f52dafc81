"""The kinds of nodes, one a file. A new kind is a file here and a line in KINDS."""

from .activation import Activation
from .add import Add
from .avg_pool import AvgPool
from .chunk import Chunk
from .concat import Concat
from .conv import Conv
from .dropout import Dropout
from .global_pool import GlobalPool
from .head import Head
from .island import Island
from .loss import Loss
from .max_pool import MaxPool
from .mul import Mul
from .norm import Norm
from .pooled_norm import PooledNorm

__all__ = [
    "KINDS",
    "Activation",
    "Add",
    "AvgPool",
    "Chunk",
    "Concat",
    "Conv",
    "Dropout",
    "GlobalPool",
    "Head",
    "Island",
    "Loss",
    "MaxPool",
    "Mul",
    "Norm",
    "PooledNorm",
]

# What tracing looks for, in order of priority; the last one matches everything.
KINDS = (Conv, Activation, MaxPool, AvgPool, GlobalPool, PooledNorm, Norm, Add, Mul, Dropout, Concat, Chunk, Island)
