"""The kernels in plain torch: what an op runs on a device that nothing was compiled for.

They take and return exactly what the compiled kernels do, gradients by hand included, so that memory and
autograd do not depend on how auglocal_ext was installed.
"""

import torch
import torch.nn.functional as F


def _per_channel(values):
    return values.view(1, -1, 1, 1)


def _normalised(x, weight, bias, mean, var, eps):
    return (x - _per_channel(mean)) * _per_channel(weight * (var + eps).rsqrt()) + _per_channel(bias)


def activated(z, act, negative_slope):
    """An activation by its number, see ACTIVATIONS in batch_norm_act.py; differentiable."""
    functions = (
        lambda z: z, F.relu, F.silu, F.hardswish, F.relu6, lambda z: F.leaky_relu(z, negative_slope), F.gelu,
    )  # fmt: skip
    return functions[act](z)


def _activation_backward(grad, z, act, negative_slope):
    aten = torch.ops.aten
    functions = (
        lambda grad, z: grad,
        lambda grad, z: torch.where(z <= 0, 0, grad),
        aten.silu_backward,
        aten.hardswish_backward,
        lambda grad, z: aten.hardtanh_backward(grad, z, 0, 6),
        lambda grad, z: aten.leaky_relu_backward(grad, z, negative_slope, False),
        aten.gelu_backward,
    )
    return functions[act](grad, z)


def _activated(features, weight, bias, mean, var, residual, eps, act, negative_slope=0.01):
    y = _normalised(features, weight, bias, mean, var, eps)
    if residual is not None:
        y += residual
    return y.relu_() if act == 1 else activated(y, act, negative_slope)


def batch_norm_statistics(x):
    features = x if x.dtype == torch.float64 else x.float()
    if not x.numel():
        return features.new_zeros(x.shape[1]), features.new_zeros(x.shape[1])
    var, mean = torch.var_mean(features, (0, 2, 3), correction=0)
    return mean, var


def batch_norm_act(x, weight, bias, residual, eps, act, negative_slope=0.01):
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    features = x.contiguous(memory_format=layout).to(weight.dtype)
    mean, var = batch_norm_statistics(features)
    y = _activated(features, weight, bias, mean, var, residual, eps, act, negative_slope)
    return y.to(x.dtype, memory_format=layout), mean, var


def batch_norm_act_apply_out(x, weight, bias, mean, var, residual, eps, act, out, negative_slope=0.01):
    out.copy_(_activated(x.to(weight.dtype), weight, bias, mean, var, residual, eps, act, negative_slope))


def _behind_activation(grad, features, weight, bias, mean, var, y, eps, act, negative_slope):
    g = grad.to(weight.dtype)
    if y is not None:
        return torch.where(y <= 0, 0, g)
    if not act:
        return g
    return _activation_backward(g, _normalised(features, weight, bias, mean, var, eps), act, negative_slope)


def _sums(g, features, mean):
    return g.sum((0, 2, 3)), (g * (features - _per_channel(mean))).sum((0, 2, 3))


def _input_grad(g, features, weight, mean, var, eps, total, dot, count):
    invstd = (var + eps).rsqrt()
    centred = features - _per_channel(mean)
    result = g - _per_channel(total / count) - centred * _per_channel(dot * invstd.square() / count)
    return result * _per_channel(weight * invstd)


def batch_norm_act_backward_out(grad, x, weight, bias, mean, var, y, eps, act, dx, dresidual, negative_slope=0.01):
    features = x.to(weight.dtype)
    g = _behind_activation(grad, features, weight, bias, mean, var, y, eps, act, negative_slope)
    dbias, dot = _sums(g, features, mean)
    count = max(x.numel() // max(x.shape[1], 1), 1)
    dx.copy_(_input_grad(g, features, weight, mean, var, eps, dbias, dot, count))
    if dresidual is not None:
        dresidual.copy_(g)
    return dot * (var + eps).rsqrt(), dbias


def batch_norm_act_backward_sums(grad, x, weight, bias, mean, var, y, eps, act, masked, negative_slope=0.01):
    features = x.to(weight.dtype)
    g = _behind_activation(grad, features, weight, bias, mean, var, y, eps, act, negative_slope)
    dbias, dot = _sums(g, features, mean)
    if masked is not None:
        masked.copy_(g)
    return torch.stack([dbias, dot]).double(), dot * (var + eps).rsqrt(), dbias


def batch_norm_act_backward_apply_out(grad, x, weight, bias, mean, var, means, eps, act, dx, negative_slope=0.01):
    features = x.to(weight.dtype)
    g = _behind_activation(grad, features, weight, bias, mean, var, None, eps, act, negative_slope)
    dx.copy_(_input_grad(g, features, weight, mean, var, eps, *means.to(weight.dtype), 1))


def batch_norm_act_max_pool_apply(
    x, weight, bias, mean, var, eps, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, out_h, out_w
):
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    features = x.contiguous(memory_format=layout).to(weight.dtype)
    normalised = _normalised(features, weight, bias, mean, var, eps)
    # Windows may pass the right edge (ceil_mode); -inf there is never a maximum.
    height, width = (out_h - 1) * stride_h + kernel_h, (out_w - 1) * stride_w + kernel_w
    right, bottom = width - x.shape[3] - padding_w, height - x.shape[2] - padding_h
    padded = F.pad(normalised, (padding_w, max(right, 0), padding_h, max(bottom, 0)), value=-torch.inf)
    y, position = F.max_pool2d(padded, (kernel_h, kernel_w), (stride_h, stride_w), return_indices=True)
    row, column = position // padded.shape[3], position % padded.shape[3]
    row -= torch.arange(out_h, device=x.device).view(1, 1, -1, 1) * stride_h
    column -= torch.arange(out_w, device=x.device) * stride_w
    index = (row * kernel_w + column).to(torch.uint8)
    return y.relu_().to(x.dtype, memory_format=layout), index.contiguous(memory_format=layout)


def batch_norm_act_max_pool_backward_out(
    grad, x, index, weight, bias, mean, var, eps, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dx
):
    (n, c, height, width), (out_h, out_w) = x.shape, grad.shape[2:]
    taps = index.long()
    row = torch.arange(out_h, device=x.device).view(1, 1, -1, 1) * stride_h - padding_h + taps // kernel_w
    column = torch.arange(out_w, device=x.device) * stride_w - padding_w + taps % kernel_w
    # A tap outside the map, which no forward gives, is nobody's.
    inside = (taps < kernel_h * kernel_w) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    into = torch.zeros(n, c, height * width, dtype=weight.dtype, device=x.device)
    taken = (row * width + column).where(inside, 0), grad.to(weight.dtype).where(inside, 0)
    into.scatter_add_(2, *(t.flatten(2) for t in taken))
    arguments = (into.view(n, c, height, width), x, weight, bias, mean, var, None, eps, True, dx, None)
    return batch_norm_act_backward_out(*arguments)


def batch_norm_act_mean_apply(x, weight, bias, mean, var, residual, eps, relu):
    return _activated(x.to(weight.dtype), weight, bias, mean, var, residual, eps, relu).mean((2, 3))


def batch_norm_act_mean_backward_out(grad, x, weight, bias, mean, var, residual, eps, relu, dx, dresidual):
    g = (grad / (x.shape[2] * x.shape[3]))[:, :, None, None].expand(x.shape)
    if relu:
        y = _activated(x.to(weight.dtype), weight, bias, mean, var, residual, eps, False)
        g = torch.where(y <= 0, 0, g)
    if dresidual is not None:
        dresidual.copy_(g)
    return batch_norm_act_backward_out(g, x, weight, bias, mean, var, None, eps, False, dx, None)


def targets(labels, classes, label_smoothing, ignore_index, class_weight, dtype):
    """(target (N, K), divisors (2,)) of dtype: the smoothed labels times the classes' weights, zero in rows that do not
    count; and by what the summed loss and its gradients are divided: NaN for the loss where nothing counts, or where a
    label is out of range, and infinity for the gradients where nothing counts."""
    if labels.is_floating_point():
        target = labels * (1 - label_smoothing)
        counts = kept = torch.ones_like(labels[:, 0], dtype=torch.bool)
        wrong = ~kept.all()
    else:
        kept = (labels != ignore_index) & (labels >= 0) & (labels < classes)
        wrong = (~kept & (labels != ignore_index)).any()
        label = labels.where(kept, 0)
        target = torch.zeros(len(labels), classes, dtype=dtype, device=labels.device)
        target.scatter_(1, label.unsqueeze(1), 1 - label_smoothing)
        counts = kept if class_weight is None else class_weight[label].where(kept, 0)
    target += label_smoothing / classes
    if class_weight is not None:
        target *= class_weight
    total = counts.sum().to(dtype)
    of_loss = total.where((total != 0) & ~wrong, torch.nan)
    return target.where(kept.unsqueeze(1), 0), torch.stack([of_loss, total.where(total != 0, torch.inf)])


def linear_cross_entropy(pooled, weight, bias, labels, label_smoothing, ignore_index, class_weight=None):
    """Any labels: a row whose label is out of range makes the loss NaN and is otherwise ignored."""
    logits = F.linear(pooled, weight, bias)
    log_p = logits.log_softmax(1)
    target, divisors = targets(labels, len(weight), label_smoothing, ignore_index, class_weight, logits.dtype)
    # A class that is masked has a log-probability of -inf, and no share in most targets.
    losses = -(target * log_p).where(target != 0, 0).sum(1)
    loss = (losses.sum(dtype=torch.float64) / divisors[0]).to(losses.dtype)
    dlogits = (log_p.exp_() * target.sum(1, keepdim=True) - target) / divisors[1]
    return loss, logits, dlogits @ weight, dlogits.t() @ pooled, dlogits.sum(0)
