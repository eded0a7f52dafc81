"""What several kinds of nodes do with tensors: memory formats, dtypes, gradients as autograd would leave them."""

import torch
from torch._prims_common import suggest_memory_format

from ..ops.batch_norm_act import memory_format

__all__ = ["as_gradient", "dense", "layout", "like", "lower"]


def dense(x):
    """x without gaps and overlaps, which in-place kernels need; nearly always it is x itself."""
    return x.contiguous(memory_format=memory_format(x))


def layout(x):
    """The memory format that a convolution takes a map in: where it has one channel or pixel, and fits both formats,
    that is told by its strides."""
    last = x.is_contiguous(memory_format=torch.channels_last) and suggest_memory_format(x) == torch.channels_last
    return torch.channels_last if last else torch.contiguous_format


def like(given, x):
    """A gradient or a residual in x's layout and dtype, which in-place kernels need; nearly always it has them."""
    return given.to(x.dtype).contiguous(memory_format=memory_format(x))


def lower(x, autocast):
    """x as autocast hands it to a convolution; float64 stays."""
    return x if autocast is None or x.dtype == torch.float64 else x.to(autocast)


def as_gradient(grad, parameter):
    """A gradient in its parameter's dtype and strides, as autograd leaves it: optimizers go over both side by side."""
    if grad.dtype == parameter.dtype and _order(grad) == _order(parameter):
        return grad.as_strided(parameter.shape, parameter.stride())
    return torch.empty_like(parameter).copy_(grad)


def _order(x):
    """How the elements of x lie in memory: its strides along what is longer than one."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]
