"""The kernels in plain torch: what an op runs on a device that nothing was compiled for.

They take and return exactly what the compiled kernels do, gradients by hand included, so that memory and
autograd do not depend on how auglocal_ext was installed.
"""

import torch


def _per_channel(values):
    return values.view(1, -1, 1, 1)


def _normalised(x, weight, bias, mean, var, eps):
    return (x - _per_channel(mean)) * _per_channel(weight * (var + eps).rsqrt()) + _per_channel(bias)


def _activated(features, weight, bias, mean, var, residual, eps, relu):
    y = _normalised(features, weight, bias, mean, var, eps)
    if residual is not None:
        y += residual
    return y.relu_() if relu else y


def batch_norm_act(x, weight, bias, residual, eps, relu):
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    features = x.contiguous(memory_format=layout).to(weight.dtype)
    if x.numel():
        var, mean = torch.var_mean(features, (0, 2, 3), correction=0)
    else:
        var, mean = torch.zeros_like(weight), torch.zeros_like(weight)
    y = _activated(features, weight, bias, mean, var, residual, eps, relu)
    return y.to(x.dtype, memory_format=layout), mean, var


def batch_norm_act_apply_out(x, weight, bias, mean, var, residual, eps, relu, out):
    out.copy_(_activated(x.to(weight.dtype), weight, bias, mean, var, residual, eps, relu))


def batch_norm_act_backward_out(grad, x, weight, bias, mean, var, y, eps, relu, dx, dresidual):
    features, g = x.to(weight.dtype), grad.to(weight.dtype)
    if y is not None:
        g = torch.where(y <= 0, 0, g)
    elif relu:
        g = torch.where(_normalised(features, weight, bias, mean, var, eps) <= 0, 0, g)
    centred, invstd = features - _per_channel(mean), (var + eps).rsqrt()
    dbias, dot = g.sum((0, 2, 3)), (g * centred).sum((0, 2, 3))
    count = max(x.numel() // max(x.shape[1], 1), 1)
    result = g - _per_channel(dbias / count) - centred * _per_channel(dot * invstd.square() / count)
    dx.copy_(result * _per_channel(weight * invstd))
    if dresidual is not None:
        dresidual.copy_(g)
    return dot * invstd, dbias
