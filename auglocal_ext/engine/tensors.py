"""What several kinds of nodes do with tensors: memory formats, dtypes, gradients as autograd would leave them."""

import torch
from torch._prims_common import suggest_memory_format

from ..ops.batch_norm_act import memory_format

__all__ = ["as_gradient", "dense", "layout_of", "like", "lower", "raised"]


def dense(x):
    """x without gaps and overlaps, which in-place kernels need; nearly always it is x itself."""
    return x.contiguous(memory_format=memory_format(x))


def layout_of(images):
    """channels_last or contiguous: the layout of the maps that a network makes of images. By the places of their values
    images of one channel are both; torch's convolutions go by the strides."""
    if images.is_contiguous(memory_format=torch.channels_last):
        return suggest_memory_format(images)
    return torch.contiguous_format


def like(given, x):
    """A gradient or a residual in x's layout and dtype, which in-place kernels need; nearly always it has them."""
    return given.to(x.dtype).contiguous(memory_format=memory_format(x))


def lower(x, autocast):
    """x as autocast hands it to a convolution; float64 stays."""
    return x if autocast is None or x.dtype == torch.float64 else x.to(autocast)


def raised(x, autocast, device_type):
    """x as autocast hands it to a norm or a softmax, which it computes in float32 on CUDA; device_type: of the real
    step, where x is on the meta device."""
    device_type = device_type if x.is_meta else x.device.type
    return x.float() if autocast is not None and device_type == "cuda" and x.dtype != torch.float64 else x


def as_gradient(grad, parameter):
    """A gradient in its parameter's dtype and strides, as autograd leaves it: optimizers go over both side by side."""
    if grad.dtype == parameter.dtype and _order(grad) == _order(parameter):
        return grad.as_strided(parameter.shape, parameter.stride())
    return torch.empty_like(parameter).copy_(grad)


def _order(x):
    """How the elements of x lie in memory: its strides along what is longer than one."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]
