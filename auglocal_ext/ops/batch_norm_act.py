"""batch_norm_act: BatchNorm with batch statistics [+ residual] [+ ReLU] as one op that keeps only its input."""

import torch
import torch.nn.functional as F

from . import _fallbacks
from ._library import define

__all__ = ["batch_norm_act", "batch_norm_act_reference"]


def batch_norm_act(x, weight, bias, residual=None, *, eps=1e-5, relu=True):
    """`relu(batch_norm(x) + residual)` in training mode, with the batch's own statistics.

    For the backward pass it keeps `x`, and with both a residual and a ReLU the output `y` (whose sign is
    the ReLU's mask, and which the next convolution keeps anyway); eager torch keeps one tensor more.
    Running statistics are the caller's: update them from the returned mean and variance.

    Args:
        x: (N, C, H, W), float32, bfloat16 or float64; contiguous or channels_last (anything else is copied).
        weight, bias: (C,), float32, or float64 where x is float64.
        residual: None, or a tensor of x's shape and dtype, added before the ReLU.
        eps: added to the variance, at least 0.
        relu: False for a plain BatchNorm.

    Returns:
        (y, mean, var): y like x and in its layout; mean and biased variance over (N, H, W), each (C,), in
        weight's dtype, not differentiable. Two calls on the same input give the same bits.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit; one value per channel only.

    Equivalent to `batch_norm_act_reference`. Formula: Ioffe & Szegedy 2015 (arXiv:1502.03167), algorithm 1.
    Not differentiable twice.
    """
    _check(x, weight, bias, residual, eps)
    return torch.ops.auglocal_ext.batch_norm_act(x, weight, bias, residual, eps, relu)


def batch_norm_act_reference(x, weight, bias, residual=None, *, eps=1e-5, relu=True):
    """`batch_norm_act` in plain torch, differentiated by autograd; returns (y, mean, var)."""
    y = F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
    if residual is not None:
        y = y + residual
    var, mean = torch.var_mean(x.detach().to(weight.dtype), (0, 2, 3), correction=0)
    return F.relu(y) if relu else y, mean, var


def _check(x, weight, bias, residual, eps):
    if x.dim() != 4:
        raise ValueError(f"batch_norm_act: x must be (N, C, H, W), given shape {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise TypeError(f"batch_norm_act: x must be float32, bfloat16 or float64, given {x.dtype}")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, given in (("weight", weight), ("bias", bias)):
        if given.shape != (x.shape[1],):
            raise ValueError(f"batch_norm_act: {name} must be ({x.shape[1]},), given shape {tuple(given.shape)}")
        if given.dtype != dtype:
            raise TypeError(f"batch_norm_act: {name} must be {dtype} for {x.dtype} x, given {given.dtype}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"batch_norm_act: residual must be like x, {tuple(x.shape)} {x.dtype}, "
            f"given {tuple(residual.shape)} {residual.dtype}"
        )
    for name, given in (("weight", weight), ("bias", bias), ("residual", residual)):
        if given is not None and given.device != x.device:
            raise ValueError(f"batch_norm_act: {name} must be on {x.device} like x, given {given.device}")
    if eps < 0:
        raise ValueError(f"batch_norm_act: eps must be at least 0, given {eps}")
    if x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise ValueError(
            f"batch_norm_act: batch statistics need more than one value per channel, given shape {tuple(x.shape)}"
        )


define(
    "batch_norm_act(Tensor x, Tensor weight, Tensor bias, Tensor? residual, float eps, bool relu)"
    " -> (Tensor y, Tensor mean, Tensor var)",
    _fallbacks.forward,
)
# y: None, or the forward's output where it had a residual and a ReLU: the mask is then its sign, and
# dresidual, empty otherwise, is the masked gradient. Without a residual the mask is recomputed from x.
define(
    "batch_norm_act_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor var, Tensor? y,"
    " float eps, bool relu) -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    _fallbacks.backward,
)


@torch.library.register_fake("auglocal_ext::batch_norm_act")
def _fake_forward(x, weight, bias, residual, eps, relu):
    return (
        torch.empty_like(x, memory_format=_fallbacks.memory_format(x)),
        torch.empty_like(weight),
        torch.empty_like(weight),
    )


@torch.library.register_fake("auglocal_ext::batch_norm_act_backward")
def _fake_backward(grad, x, weight, bias, mean, var, y, eps, relu):
    dx = torch.empty_like(x, memory_format=_fallbacks.memory_format(x))
    dresidual = x.new_empty(0) if y is None else torch.empty_like(dx)
    return dx, dresidual, torch.empty_like(weight), torch.empty_like(bias)


def _setup_context(ctx, inputs, output):
    x, weight, bias, residual, ctx.eps, ctx.relu = inputs
    y, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.set_materialize_grads(False)
    ctx.has_residual = residual is not None
    ctx.save_for_backward(x, weight, bias, mean, var, y if ctx.has_residual and ctx.relu else None)


def _autograd(ctx, grad, _mean_grad, _var_grad):
    if grad is None:
        return (None,) * 6
    x, weight, bias, mean, var, y = ctx.saved_tensors
    dx, dresidual, dweight, dbias = torch.ops.auglocal_ext.batch_norm_act_backward(
        grad, x, weight, bias, mean, var, y, ctx.eps, ctx.relu
    )
    if not ctx.has_residual:
        dresidual = None
    elif y is None:
        dresidual = grad
    return dx, dweight, dbias, dresidual, None, None


torch.library.register_autograd("auglocal_ext::batch_norm_act", _autograd, setup_context=_setup_context)
