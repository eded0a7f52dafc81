"""The kernels in plain torch: what an op runs on a device that nothing was compiled for.

They take and return exactly what the compiled kernels do, gradients by hand included, so that memory and
autograd do not depend on how auglocal_ext was installed.
"""

import torch


def memory_format(x):
    """The layout a kernel answers in: x's own if that is channels_last, else contiguous."""
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _per_channel(values):
    return values.view(1, -1, 1, 1)


def _normalised(x, weight, bias, mean, var, eps):
    return (x - _per_channel(mean)) * _per_channel(weight * (var + eps).rsqrt()) + _per_channel(bias)


def forward(x, weight, bias, residual, eps, relu):
    """batch_norm_act"""
    layout = memory_format(x)
    features = x.contiguous(memory_format=layout).to(weight.dtype)
    if x.numel():
        var, mean = torch.var_mean(features, (0, 2, 3), correction=0)
    else:
        var, mean = torch.zeros_like(weight), torch.zeros_like(weight)
    y = _normalised(features, weight, bias, mean, var, eps)
    if residual is not None:
        y += residual
    return (y.relu_() if relu else y).to(x.dtype, memory_format=layout), mean, var


def backward(grad, x, weight, bias, mean, var, y, eps, relu):
    """batch_norm_act_backward"""
    layout = memory_format(x)
    features, g = (t.contiguous(memory_format=layout).to(weight.dtype) for t in (x, grad))
    if y is not None:
        g = torch.where(y <= 0, 0, g)
    elif relu:
        g = torch.where(_normalised(features, weight, bias, mean, var, eps) <= 0, 0, g)
    dresidual = x.new_empty(0) if y is None else g.to(x.dtype, memory_format=layout, copy=True)
    centred, invstd = features - _per_channel(mean), (var + eps).rsqrt()
    dbias, dot = g.sum((0, 2, 3)), (g * centred).sum((0, 2, 3))
    count = max(x.numel() // max(x.shape[1], 1), 1)
    g = g - _per_channel(dbias / count) - centred * _per_channel(dot * invstd.square() / count)
    dx = (g * _per_channel(weight * invstd)).to(x.dtype, memory_format=layout)
    return dx, dresidual, dot * invstd, dbias
