"""batch_norm_act_max_pool: a ResNet's stem behind its convolution, BatchNorm + ReLU + max-pool, whose full-size
activation is never stored."""

import torch
import torch.nn.functional as F
from torch.nn.modules.utils import _pair

from . import _fallbacks
from ._library import define, define_composite, not_differentiable
from .batch_norm_act import batch_norm_act_reference, check, check_count, memory_format

__all__ = ["batch_norm_act_max_pool", "batch_norm_act_max_pool_reference"]


def batch_norm_act_max_pool(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    *,
    ceil_mode: bool = False,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`max_pool2d(relu(batch_norm(x)))` in training mode, with the batch's own statistics.

    For the backward pass it keeps x and one byte per output, the position of the maximum in its window; eager torch
    keeps the ReLU's output and 8 bytes instead. The backward gathers, it does not scatter: the same bits each time.

    Args:
        x: (N, C, H, W), float32, bfloat16, float16 or float64; contiguous or channels_last (anything else is copied).
        weight, bias: (C,), float32, or float64 where x is float64.
        kernel_size: of a window, in pixels, a number or (height, width); 1 to 16 along each axis.
        stride: likewise; None: kernel_size.
        padding: likewise; at most half of kernel_size.
        ceil_mode: as in torch.nn.functional.max_pool2d, whether windows may pass the right and the lower edge.
        eps: added to the variance, at least 0.

    Returns:
        (y, mean, var): y (N, C, pooled H, pooled W) in x's dtype and layout; mean and biased variance as
        `batch_norm_act` returns them, not differentiable.

    Raises:
        ValueError: a shape, device or window that does not fit, eps below 0, or one value per channel only.
        TypeError: x, weight or bias of another dtype.
        RuntimeError: differentiated twice.

    Equivalent to `batch_norm_act_max_pool_reference`. Formulas: as `batch_norm_act`, and torch's of MaxPool2d.
    """
    op = "batch_norm_act_max_pool"
    check(op, x, {"weight": weight, "bias": bias}, {}, eps)
    check_count(op, x)
    kernel, padding = _pair(kernel_size), _pair(padding)
    stride = kernel if stride is None else _pair(stride)
    if not all(1 <= size <= 16 for size in kernel):
        raise ValueError(f"{op}: kernel_size must be 1 to 16 along each axis, given {kernel_size}")
    if min(stride) < 1:
        raise ValueError(f"{op}: stride must be at least 1, given {stride}")
    if not all(0 <= 2 * p <= k for p, k in zip(padding, kernel, strict=True)):
        raise ValueError(f"{op}: padding must be at most half of kernel_size {kernel}, given {padding}")
    if not all(x.shape[1:]):
        raise ValueError(f"{op}: x must have channels and values to take the maximum of, given shape {tuple(x.shape)}")
    out = [_windows(*axis, ceil_mode) for axis in zip(x.shape[2:], kernel, stride, padding, strict=True)]
    if min(out) < 1:
        raise ValueError(f"{op}: a window of {kernel} does not fit x of shape {tuple(x.shape)}")
    y, _, mean, var = torch.ops.auglocal_ext.batch_norm_act_max_pool(
        x, weight, bias, eps, *kernel, *stride, *padding, *out
    )
    return y, mean, var


def batch_norm_act_max_pool_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    *,
    ceil_mode: bool = False,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`batch_norm_act_max_pool` in plain torch, differentiated by autograd.

    Args:
        x, weight, bias, kernel_size, stride, padding, ceil_mode, eps: see `batch_norm_act_max_pool`.

    Returns:
        (y, mean, var): see `batch_norm_act_max_pool`.
    """
    y, mean, var = batch_norm_act_reference(x, weight, bias, eps=eps)
    return F.max_pool2d(y, kernel_size, stride, padding, ceil_mode=ceil_mode), mean, var


def _windows(size, kernel, stride, padding, ceil_mode):
    """How many windows an axis has, as torch counts them: the last one must begin inside x or its left padding."""
    count = -(-(size + 2 * padding - kernel) // stride) if ceil_mode else (size + 2 * padding - kernel) // stride
    if ceil_mode and count * stride >= size + padding:
        count -= 1
    return count + 1


def pool_window(x, pool):
    """An nn.MaxPool2d's window on x as the ops take it: kernel, stride, padding and output, each (h, w)."""
    kernel, stride, padding = _pair(pool.kernel_size), _pair(pool.stride), _pair(pool.padding)
    out = (_windows(*axis, pool.ceil_mode) for axis in zip(x.shape[2:], kernel, stride, padding, strict=True))
    return (*kernel, *stride, *padding, *out)


_WINDOW = "int kernel_h, int kernel_w, int stride_h, int stride_w, int padding_h, int padding_w"
define(
    "batch_norm_act_max_pool_apply(Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor var, float eps,"
    f" {_WINDOW}, SymInt out_h, SymInt out_w) -> (Tensor y, Tensor index)",
    _fallbacks.batch_norm_act_max_pool_apply,
)
define(
    "batch_norm_act_max_pool_backward_out(Tensor grad, Tensor x, Tensor index, Tensor weight, Tensor bias,"
    f" Tensor mean, Tensor var, float eps, {_WINDOW}, Tensor(a!) dx) -> (Tensor dweight, Tensor dbias)",
    _fallbacks.batch_norm_act_max_pool_backward_out,
)


@define_composite(
    f"batch_norm_act_max_pool(Tensor x, Tensor weight, Tensor bias, float eps, {_WINDOW}, SymInt out_h, SymInt out_w)"
    " -> (Tensor y, Tensor index, Tensor mean, Tensor var)"
)
def _forward(x, weight, bias, eps, *window):
    x = x.contiguous(memory_format=memory_format(x))
    mean, var = torch.ops.auglocal_ext.batch_norm_statistics(x)
    y, index = torch.ops.auglocal_ext.batch_norm_act_max_pool_apply(x, weight, bias, mean, var, eps, *window)
    return y, index, mean, var


@define_composite(
    "batch_norm_act_max_pool_backward(Tensor grad, Tensor x, Tensor index, Tensor weight, Tensor bias, Tensor mean,"
    f" Tensor var, float eps, {_WINDOW}) -> (Tensor dx, Tensor dweight, Tensor dbias)"
)
def _backward(grad, x, index, weight, bias, mean, var, eps, *window):
    layout = memory_format(x)
    grad, x, index = (t.contiguous(memory_format=layout) for t in (grad, x, index))
    dx = torch.empty_like(x, memory_format=layout)
    arguments = (grad, x, index, weight, bias, mean, var, eps, *window, dx)
    dweight, dbias = torch.ops.auglocal_ext.batch_norm_act_max_pool_backward_out(*arguments)
    return dx, dweight, dbias


# ---- fake tensors and autograd ----------------------------------------------------------------------------


def _pooled(x, out_h, out_w, dtype):
    shape = (x.shape[0], x.shape[1], out_h, out_w)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory_format(x))


@torch.library.register_fake("auglocal_ext::batch_norm_act_max_pool_apply")
def _(x, weight, bias, mean, var, eps, kh, kw, sh, sw, ph, pw, out_h, out_w):
    return _pooled(x, out_h, out_w, x.dtype), _pooled(x, out_h, out_w, torch.uint8)


@torch.library.register_fake("auglocal_ext::batch_norm_act_max_pool_backward_out")
def _(grad, x, index, weight, bias, mean, var, eps, kh, kw, sh, sw, ph, pw, dx):
    return torch.empty_like(weight), torch.empty_like(bias)


@torch.library.register_fake("auglocal_ext::batch_norm_act_max_pool")
def _(x, weight, bias, eps, kh, kw, sh, sw, ph, pw, out_h, out_w):
    statistics = torch.empty_like(weight), torch.empty_like(weight)
    return _pooled(x, out_h, out_w, x.dtype), _pooled(x, out_h, out_w, torch.uint8), *statistics


@torch.library.register_fake("auglocal_ext::batch_norm_act_max_pool_backward")
def _(grad, x, index, weight, bias, mean, var, eps, kh, kw, sh, sw, ph, pw):
    return torch.empty_like(x, memory_format=memory_format(x)), torch.empty_like(weight), torch.empty_like(bias)


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.eps, *window = inputs
    ctx.window = window[:6]
    _, index, mean, var = output
    ctx.mark_non_differentiable(index, mean, var)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, index, weight, bias, mean, var)


def _autograd(ctx, grad, *_):
    if grad is None:
        return (None,) * 12
    gradients = torch.ops.auglocal_ext.batch_norm_act_max_pool_backward(grad, *ctx.saved_tensors, ctx.eps, *ctx.window)
    return *gradients, *((None,) * 9)


torch.library.register_autograd("auglocal_ext::batch_norm_act_max_pool", _autograd, setup_context=_setup_context)
not_differentiable("batch_norm_act_max_pool_apply", "batch_norm_act_max_pool_backward")
