"""conv_batch_norm_act: a convolution of act(BN(x)), where the activation is made, used and dropped.

The convolutions are torch's own; what the op adds is the order: nothing between x and the result is kept, and the
backward never holds the activation and its gradient at once.
"""

import torch
import torch.nn.functional as F
from torch.nn.modules.utils import _pair

from ._library import define_composite, not_differentiable, without_autocast
from .batch_norm_act import batch_norm_act_reference, check, check_count, memory_format

__all__ = ["conv_batch_norm_act", "conv_batch_norm_act_reference"]


def conv_batch_norm_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    eps: float = 1e-5,
    relu: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`conv2d(relu(batch_norm(x)))` in training mode, with the batch's own statistics.

    The convolutions are torch's own. For the backward pass it keeps x, not the activation. The backward makes the
    activation again, elementwise, for the weight gradient, drops it, and only then takes the data gradient, over which
    BatchNorm's is written.

    Args:
        x: (N, C, H, W), float32, bfloat16, float16 or float64; contiguous or channels_last (anything else is copied).
        weight, bias: BatchNorm's, (C,), float32, or float64 where x is float64.
        conv_weight: (K, C / groups, kernel H, kernel W); cast to x's dtype where it has another.
        conv_bias: None or (K,), cast likewise.
        stride, padding, dilation: as in torch.nn.functional.conv2d, in pixels, numbers or (height, width).
        groups: of channels, as there.
        eps: added to the variance, at least 0.
        relu: False for a convolution of the plain BatchNorm.

    Returns:
        (y, mean, var): the convolution's result, (N, K, out H, out W) in x's dtype; mean and biased variance as
        `batch_norm_act` returns them, not differentiable.

    Raises:
        ValueError: x, weight, bias or conv_weight of a shape or on a device that does not fit, eps below 0,
            or one value per channel only.
        TypeError: x, weight or bias of another dtype.
        RuntimeError: torch's, of what else the convolution does not take; or it is differentiated twice.

    Equivalent to `conv_batch_norm_act_reference`. Formulas: as `batch_norm_act`, and torch's of Conv2d.
    """
    op = "conv_batch_norm_act"
    check(op, x, {"weight": weight, "bias": bias}, {}, eps)
    check_count(op, x)
    if conv_weight.dim() != 4 or conv_weight.shape[1] * groups != x.shape[1]:
        raise ValueError(
            f"{op}: conv_weight must be (K, {x.shape[1]} / {groups} groups, kernel H, kernel W), given shape "
            f"{tuple(conv_weight.shape)}"
        )
    if conv_weight.device != x.device:
        raise ValueError(f"{op}: conv_weight must be on {x.device} like x, given {conv_weight.device}")
    conv_weight = conv_weight.to(x.dtype)
    conv_bias = None if conv_bias is None else conv_bias.to(x.dtype)
    geometry = (*_pair(stride), *_pair(padding), *_pair(dilation), groups)
    return torch.ops.auglocal_ext.conv_batch_norm_act(x, weight, bias, conv_weight, conv_bias, eps, relu, *geometry)


def conv_batch_norm_act_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    eps: float = 1e-5,
    relu: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`conv_batch_norm_act` in plain torch, differentiated by autograd.

    Args:
        x, weight, bias, stride, padding, dilation, groups, eps, relu: see `conv_batch_norm_act`.
        conv_weight, conv_bias: see there, of x's dtype.

    Returns:
        (y, mean, var): see `conv_batch_norm_act`.
    """
    y, mean, var = batch_norm_act_reference(x, weight, bias, eps=eps, act=relu)
    return F.conv2d(y, conv_weight, conv_bias, stride, padding, dilation, groups), mean, var


_GEOMETRY = "int stride_h, int stride_w, int padding_h, int padding_w, int dilation_h, int dilation_w, int groups"


def _conv2d(x, conv_weight, conv_bias, sh, sw, ph, pw, dh, dw, groups):
    return F.conv2d(x, conv_weight, conv_bias, (sh, sw), (ph, pw), (dh, dw), groups)


def _conv_backward(grad, x, conv_weight, mask, sh, sw, ph, pw, dh, dw, groups):
    sizes = [conv_weight.shape[0]] if mask[2] else None
    geometry = ((sh, sw), (ph, pw), (dh, dw), False, (0, 0), groups)
    return torch.ops.aten.convolution_backward(grad, x, conv_weight, sizes, *geometry, mask)


@define_composite(
    "conv_batch_norm_act(Tensor x, Tensor weight, Tensor bias, Tensor conv_weight, Tensor? conv_bias, float eps,"
    f" bool relu, {_GEOMETRY}) -> (Tensor y, Tensor mean, Tensor var)"
)
def _forward(x, weight, bias, conv_weight, conv_bias, eps, relu, *geometry):
    activation, mean, var = torch.ops.auglocal_ext.batch_norm_act(x, weight, bias, None, eps, relu)
    return _conv2d(activation, conv_weight, conv_bias, *geometry), mean, var


@define_composite(
    "conv_batch_norm_act_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor conv_weight, bool has_bias,"
    f" Tensor mean, Tensor var, float eps, bool relu, {_GEOMETRY})"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dconv_weight, Tensor dconv_bias)"
)
def _backward(grad, x, weight, bias, conv_weight, has_bias, mean, var, eps, relu, *geometry):
    activation = torch.ops.auglocal_ext.batch_norm_act_apply(x, weight, bias, mean, var, None, eps, relu)
    _, dconv_weight, dconv_bias = _conv_backward(grad, activation, conv_weight, (False, True, has_bias), *geometry)
    del activation  # before the data gradient is made, which needs the activation's shape only
    dx, _, _ = _conv_backward(grad, x, conv_weight, (True, False, False), *geometry)
    layout = memory_format(x)
    x, dx = x.contiguous(memory_format=layout), dx.contiguous(memory_format=layout)
    arguments = (dx, x, weight, bias, mean, var, None, eps, relu, dx, None)
    dweight, dbias = torch.ops.auglocal_ext.batch_norm_act_backward_out(*arguments)
    return dx, dweight, dbias, dconv_weight, dconv_bias if has_bias else grad.new_empty(0)


# ---- fake tensors and autograd ----------------------------------------------------------------------------


@torch.library.register_fake("auglocal_ext::conv_batch_norm_act")
@without_autocast
def _(x, weight, bias, conv_weight, conv_bias, eps, relu, *geometry):
    activation = torch.empty_like(x, memory_format=memory_format(x))
    y = _conv2d(activation, conv_weight, conv_bias, *geometry)
    return y, torch.empty_like(weight), torch.empty_like(weight)


@torch.library.register_fake("auglocal_ext::conv_batch_norm_act_backward")
@without_autocast
def _(grad, x, weight, bias, conv_weight, has_bias, mean, var, eps, relu, *geometry):
    dx = torch.empty_like(x, memory_format=memory_format(x))
    _, dconv_weight, _ = _conv_backward(grad, dx, conv_weight, (False, True, False), *geometry)
    dconv_bias = grad.new_empty(conv_weight.shape[0] if has_bias else 0)
    return dx, torch.empty_like(weight), torch.empty_like(bias), dconv_weight, dconv_bias


def _setup_context(ctx, inputs, output):
    x, weight, bias, conv_weight, conv_bias, ctx.eps, ctx.relu, *ctx.geometry = inputs
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.set_materialize_grads(False)
    ctx.has_bias = conv_bias is not None
    ctx.save_for_backward(x, weight, bias, conv_weight, mean, var)


def _autograd(ctx, grad, *_):
    if grad is None:
        return (None,) * 14
    x, weight, bias, conv_weight, mean, var = ctx.saved_tensors
    *gradients, dconv_bias = torch.ops.auglocal_ext.conv_batch_norm_act_backward(
        grad, x, weight, bias, conv_weight, ctx.has_bias, mean, var, ctx.eps, ctx.relu, *ctx.geometry
    )
    return *gradients, dconv_bias if ctx.has_bias else None, *((None,) * 9)


torch.library.register_autograd("auglocal_ext::conv_batch_norm_act", _autograd, setup_context=_setup_context)
not_differentiable("conv_batch_norm_act_backward")
