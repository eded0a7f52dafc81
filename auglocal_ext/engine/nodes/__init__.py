"""The kinds of nodes, one a file. A new kind is a file here and a line in KINDS."""

from .activation import Activation
from .add import Add
from .attention import Attention
from .avg_pool import AvgPool
from .chunk import Chunk
from .concat import Concat
from .conv import Conv
from .dropout import Dropout
from .fixed_norm import FixedNorm
from .global_pool import GlobalPool
from .head import Head
from .index import Index
from .island import Island
from .layer_norm import LayerNorm
from .linear import Linear
from .loss import Loss
from .max_pool import MaxPool
from .mul import Mul
from .norm import Norm
from .patch_merging import PatchMerging
from .pooled_norm import PooledNorm
from .reshape import Reshape
from .sync_norm import SyncNorm
from .window_attention import WindowAttention

__all__ = [
    "KINDS",
    "Activation",
    "Add",
    "Attention",
    "AvgPool",
    "Chunk",
    "Concat",
    "Conv",
    "Dropout",
    "FixedNorm",
    "GlobalPool",
    "Head",
    "Index",
    "Island",
    "LayerNorm",
    "Linear",
    "Loss",
    "MaxPool",
    "Mul",
    "Norm",
    "PatchMerging",
    "PooledNorm",
    "Reshape",
    "SyncNorm",
    "WindowAttention",
]

# What tracing looks for, in order of priority; the last one matches everything.
KINDS = (
    Conv, Linear, Activation, MaxPool, AvgPool, GlobalPool, SyncNorm, PooledNorm, Norm, FixedNorm, LayerNorm,
    Attention, WindowAttention, Add, Mul, Dropout, Concat, Chunk, PatchMerging, Reshape, Index, Island,
)  # fmt: skip
