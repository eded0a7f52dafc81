"""The kinds of nodes, one a file. A new kind is a file here and a line in KINDS."""

from .conv import Conv
from .head import Head
from .island import Island
from .loss import Loss
from .max_pool import MaxPool
from .norm import Norm
from .pooled_norm import PooledNorm
from .relu import Relu

__all__ = ["KINDS", "Conv", "Head", "Island", "Loss", "MaxPool", "Norm", "PooledNorm", "Relu"]

# What tracing looks for, in order of priority; the last one matches everything.
KINDS = (Conv, Relu, MaxPool, PooledNorm, Norm, Island)
