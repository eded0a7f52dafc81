"""batch_norm_act: BatchNorm with batch statistics [+ residual] [+ activation] as one op that keeps only its input.

With its parts: `batch_norm_act_apply`, the elementwise part alone, to rebuild an activation from what was kept;
and `batch_norm_act_backward`, which can write over the incoming gradient or over the kept input.
"""

import torch
import torch.nn.functional as F

from . import _fallbacks
from ._library import define, define_composite, not_differentiable

__all__ = [
    "batch_norm_act",
    "batch_norm_act_apply",
    "batch_norm_act_backward",
    "batch_norm_act_reference",
    "batch_norm_statistics",
]


# The number that stands for each in the ops' argument `act`, as csrc/activation.h has them.
ACTIVATIONS = ("none", "relu", "silu", "hardswish", "relu6", "leaky_relu", "gelu")


def batch_norm_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
    act: bool | str = True,
    negative_slope: float = 0.01,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`act(batch_norm(x) + residual)` in training mode, with the batch's own statistics.

    For the backward pass it keeps `x`, and with both a residual and a ReLU the output `y` (whose sign is
    the ReLU's mask, and which the next convolution keeps anyway); eager torch keeps one tensor more.
    Running statistics are the caller's: update them from the returned mean and variance.

    Args:
        x: (N, C, H, W), float32, bfloat16, float16 or float64; contiguous or channels_last (anything else is copied).
        weight, bias: (C,), float32, or float64 where x is float64.
        residual: None, or a tensor of x's shape and dtype, added before the activation; copied where its layout is not
            x's. With one, only a ReLU and no activation at all can be differentiated.
        eps: added to the variance, at least 0.
        act: True for a ReLU, False for a plain BatchNorm, or one of ACTIVATIONS: "none", "relu", "silu", "hardswish",
            "relu6", "leaky_relu", "gelu" (with erf).
        negative_slope: of "leaky_relu", at least 0.

    Returns:
        (y, mean, var): y like x and in its layout; mean and biased variance over (N, H, W), each (C,), in
        weight's dtype, not differentiable. Two calls on the same input give the same bits.

    Raises:
        ValueError: a shape or device that does not fit, a residual of another dtype, an unknown act, eps or
            negative_slope below 0, one value per channel only, or an act that cannot be differentiated and has to be.
        TypeError: x, weight or bias of another dtype.
        RuntimeError: differentiated twice.

    Equivalent to `batch_norm_act_reference`. Formula: Ioffe & Szegedy 2015 (arXiv:1502.03167), algorithm 1.
    """
    check("batch_norm_act", x, {"weight": weight, "bias": bias}, {"residual": residual}, eps)
    check_count("batch_norm_act", x)
    act = _code("batch_norm_act", act, negative_slope)
    return torch.ops.auglocal_ext.batch_norm_act(x, weight, bias, residual, eps, act, negative_slope)


def batch_norm_act_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
    act: bool | str = True,
    negative_slope: float = 0.01,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`batch_norm_act` in plain torch, differentiated by autograd, as often as you like.

    Args:
        x, weight, bias, residual, eps, act, negative_slope: see `batch_norm_act`; here a residual goes with every act.

    Returns:
        (y, mean, var): see `batch_norm_act`.
    """
    y = F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
    if residual is not None:
        y = y + residual
    var, mean = torch.var_mean(x.detach().to(weight.dtype), (0, 2, 3), correction=0)
    return _fallbacks.activated(y, _code("batch_norm_act_reference", act, negative_slope), negative_slope), mean, var


def batch_norm_statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The statistics alone that a BatchNorm in training mode normalises by.

    Args:
        x: (N, C, H, W), float32, bfloat16, float16 or float64; contiguous or channels_last (anything else is copied).

    Returns:
        (mean, var): mean and biased variance over (N, H, W), each (C,), float64 for float64 x and else float32; the
        same bits as `batch_norm_act` returns. Not differentiable.

    Raises:
        ValueError, TypeError: x is not (N, C, H, W), or of another dtype.

    Formula: Ioffe & Szegedy 2015 (arXiv:1502.03167), algorithm 1, the first two lines.
    """
    check("batch_norm_statistics", x, {}, {}, 0)
    return torch.ops.auglocal_ext.batch_norm_statistics(x)


def batch_norm_act_apply(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
    act: bool | str = True,
    negative_slope: float = 0.01,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`batch_norm_act`'s output again, to the bit, from its input and the statistics it returned.

    Args:
        x, weight, bias, residual, eps, act, negative_slope: as `batch_norm_act` was given them.
        mean, var: as it returned them.
        out: None, or where to write: a tensor like x and in its layout, x itself and residual included. x and residual
            must then be contiguous or channels_last, both alike.

    Returns:
        y, like x; `out` where it was given. Not differentiable.

    Raises:
        ValueError, TypeError: as `batch_norm_act`; out, mean or var that does not fit.
        RuntimeError: with out, by the compiled kernels: x, residual or out lies otherwise. Or it is differentiated.
    """
    channels = {"weight": weight, "bias": bias, "mean": mean, "var": var}
    check("batch_norm_act_apply", x, channels, {"residual": residual, "out": out}, eps)
    arguments = (x, weight, bias, mean, var, residual, eps, _code("batch_norm_act_apply", act, negative_slope))
    if out is None:
        return torch.ops.auglocal_ext.batch_norm_act_apply(*arguments, negative_slope)
    torch.ops.auglocal_ext.batch_norm_act_apply_out(*arguments, out, negative_slope)
    return out


def batch_norm_act_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    y: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
    act: bool | str = True,
    negative_slope: float = 0.01,
    dx: torch.Tensor | None = None,
    dresidual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """The gradients of `batch_norm_act`. Two calls on the same input give the same bits.

    Args:
        grad: of y, (N, C, H, W) like x; where nothing is given to write into, of any strides.
        x, weight, bias, eps, act, negative_slope: as `batch_norm_act` was given them.
        mean, var: as it returned them.
        y: its output, where it had a residual and a ReLU: the mask is y's sign. Without a residual what the
            activation was of is recomputed from x, to the bit.
        dx: None, or where to write x's gradient: a tensor like x and in its layout, x itself and grad included. grad,
            x and y must then be in that layout too.
        dresidual: likewise for the residual's gradient, where y is given; not the tensor given as dx.

    Returns:
        (dx, dresidual, dweight, dbias): dx and dresidual like x, dweight and dbias (C,) like weight. dresidual is None
        without y: with a residual and no activation it is grad itself. Not differentiable.

    Raises:
        ValueError, TypeError: as `batch_norm_act`; y with another act than a ReLU; dresidual without y or dx, or y and
            dx without dresidual.
        RuntimeError: with dx, by the compiled kernels: one of the maps lies otherwise. Or it is differentiated.

    Formula: Ioffe & Szegedy 2015 (arXiv:1502.03167), section 3, the chain rule below algorithm 1.
    """
    channels = {"weight": weight, "bias": bias, "mean": mean, "var": var}
    like_x = {"grad": grad, "y": y, "dx": dx, "dresidual": dresidual}
    check("batch_norm_act_backward", x, channels, like_x, eps)
    act = _code("batch_norm_act_backward", act, negative_slope)
    if y is not None and ACTIVATIONS[act] != "relu":
        raise ValueError(f"batch_norm_act_backward: y is for the mask of a ReLU, given act {ACTIVATIONS[act]!r}")
    arguments = (grad, x, weight, bias, mean, var, y, eps, act)
    if dx is None and dresidual is None:
        dx, dresidual, dweight, dbias = torch.ops.auglocal_ext.batch_norm_act_backward(*arguments, negative_slope)
        return dx, None if y is None else dresidual, dweight, dbias
    if dx is None or (dresidual is None) != (y is None):
        raise ValueError("batch_norm_act_backward: give dx, and dresidual exactly where y is given, or neither")
    if dresidual is not None and dresidual.numel() and dresidual.data_ptr() == dx.data_ptr():
        raise ValueError("batch_norm_act_backward: dx and dresidual must be two tensors, given the same memory")
    dweight, dbias = torch.ops.auglocal_ext.batch_norm_act_backward_out(*arguments, dx, dresidual, negative_slope)
    return dx, dresidual, dweight, dbias


def _code(op, act, negative_slope):
    """The number of an activation given as a bool or by name; ValueError where there is none."""
    if not isinstance(act, bool) and act not in ACTIVATIONS:
        raise ValueError(f"{op}: act must be True, False or one of {', '.join(ACTIVATIONS)}, given {act!r}")
    if not negative_slope >= 0:
        raise ValueError(f"{op}: negative_slope must be at least 0, given {negative_slope}")
    return int(act) if isinstance(act, bool) else ACTIVATIONS.index(act)


def check(op, x, channels, like_x, eps):
    """One sentence for what does not fit. channels: (C,) tensors by name; like_x: None or tensors like x."""
    if x.dim() != 4:
        raise ValueError(f"{op}: x must be (N, C, H, W), given shape {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"{op}: x must be float32, bfloat16, float16 or float64, given {x.dtype}")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, given in channels.items():
        if not isinstance(given, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a tensor of shape ({x.shape[1]},), given {type(given).__name__}")
        if given.shape != (x.shape[1],):
            raise ValueError(f"{op}: {name} must be ({x.shape[1]},), given shape {tuple(given.shape)}")
        if given.dtype != dtype:
            raise TypeError(f"{op}: {name} must be {dtype} for {x.dtype} x, given {given.dtype}")
    for name, given in like_x.items():
        if given is not None and (given.shape != x.shape or given.dtype != x.dtype):
            raise ValueError(
                f"{op}: {name} must be like x, {tuple(x.shape)} {x.dtype}, given {tuple(given.shape)} {given.dtype}"
            )
    for name, given in (channels | like_x).items():
        if given is not None and given.device != x.device:
            raise ValueError(f"{op}: {name} must be on {x.device} like x, given {given.device}")
    if not eps >= 0:
        raise ValueError(f"{op}: eps must be at least 0, given {eps}")


def check_count(op, x):
    """Refuses what has no batch statistics, as torch's BatchNorm in training mode does."""
    if x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise ValueError(f"{op}: batch statistics need more than one value per channel, given shape {tuple(x.shape)}")


# ---- definitions ------------------------------------------------------------------------------------------


def memory_format(x):
    """The layout an op answers in: x's own if that is channels_last, else contiguous."""
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


define("batch_norm_statistics(Tensor x) -> (Tensor mean, Tensor var)", _fallbacks.batch_norm_statistics)
define(
    "batch_norm_act(Tensor x, Tensor weight, Tensor bias, Tensor? residual, float eps, int act,"
    " float negative_slope=0.01) -> (Tensor y, Tensor mean, Tensor var)",
    _fallbacks.batch_norm_act,
)
define(
    "batch_norm_act_apply_out(Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor var, Tensor? residual,"
    " float eps, int act, Tensor(a!) out, float negative_slope=0.01) -> ()",
    _fallbacks.batch_norm_act_apply_out,
)
define(
    "batch_norm_act_backward_out(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor var, Tensor? y,"
    " float eps, int act, Tensor(a!) dx, Tensor(b!)? dresidual, float negative_slope=0.01)"
    " -> (Tensor dweight, Tensor dbias)",
    _fallbacks.batch_norm_act_backward_out,
)
# The same in two, for a batch that lies on several devices. sums, (2, C): of the masked gradient g, and of
# g * (x - mean). means: what the sums of all devices come to, divided by the number of values. Both are float64.
# masked: where g goes, given with y; the second op is then given it as its gradient, and no activation.
define(
    "batch_norm_act_backward_sums(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor var,"
    " Tensor? y, float eps, int act, Tensor(a!)? masked, float negative_slope=0.01)"
    " -> (Tensor sums, Tensor dweight, Tensor dbias)",
    _fallbacks.batch_norm_act_backward_sums,
)
define(
    "batch_norm_act_backward_apply_out(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor var,"
    " Tensor means, float eps, int act, Tensor(a!) dx, float negative_slope=0.01) -> ()",
    _fallbacks.batch_norm_act_backward_apply_out,
)


@define_composite(
    "batch_norm_act_apply(Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor var, Tensor? residual,"
    " float eps, int act, float negative_slope=0.01) -> Tensor y"
)
def _apply(x, weight, bias, mean, var, residual, eps, act, negative_slope=0.01):
    x = x.contiguous(memory_format=memory_format(x))
    if residual is not None:
        residual = residual.contiguous(memory_format=memory_format(x))
    out = torch.empty_like(x, memory_format=memory_format(x))
    arguments = (x, weight, bias, mean, var, residual, eps, act, out, negative_slope)
    torch.ops.auglocal_ext.batch_norm_act_apply_out(*arguments)
    return out


# dresidual, empty without y, is the masked gradient.
@define_composite(
    "batch_norm_act_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor var, Tensor? y,"
    " float eps, int act, float negative_slope=0.01)"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)"
)
def _backward(grad, x, weight, bias, mean, var, y, eps, act, negative_slope=0.01):
    layout = memory_format(x)
    grad, x = grad.contiguous(memory_format=layout), x.contiguous(memory_format=layout)
    dx, dresidual = torch.empty_like(x, memory_format=layout), None
    if y is not None:
        y, dresidual = y.contiguous(memory_format=layout), torch.empty_like(x, memory_format=layout)
    arguments = (grad, x, weight, bias, mean, var, y, eps, act, dx, dresidual, negative_slope)
    dweight, dbias = torch.ops.auglocal_ext.batch_norm_act_backward_out(*arguments)
    return dx, x.new_empty(0) if dresidual is None else dresidual, dweight, dbias


# ---- fake tensors and autograd ----------------------------------------------------------------------------


def _like(x):
    return torch.empty_like(x, memory_format=memory_format(x))


@torch.library.register_fake("auglocal_ext::batch_norm_statistics")
def _(x):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape[1], dtype=dtype), x.new_empty(x.shape[1], dtype=dtype)


@torch.library.register_fake("auglocal_ext::batch_norm_act")
def _(x, weight, bias, residual, eps, act, negative_slope=0.01):
    return _like(x), torch.empty_like(weight), torch.empty_like(weight)


@torch.library.register_fake("auglocal_ext::batch_norm_act_apply")
def _(x, weight, bias, mean, var, residual, eps, act, negative_slope=0.01):
    return _like(x)


@torch.library.register_fake("auglocal_ext::batch_norm_act_apply_out")
def _(x, weight, bias, mean, var, residual, eps, act, out, negative_slope=0.01):
    return None


@torch.library.register_fake("auglocal_ext::batch_norm_act_backward")
def _(grad, x, weight, bias, mean, var, y, eps, act, negative_slope=0.01):
    return _like(x), x.new_empty(0) if y is None else _like(x), torch.empty_like(weight), torch.empty_like(bias)


@torch.library.register_fake("auglocal_ext::batch_norm_act_backward_out")
def _(grad, x, weight, bias, mean, var, y, eps, act, dx, dresidual, negative_slope=0.01):
    return torch.empty_like(weight), torch.empty_like(bias)


@torch.library.register_fake("auglocal_ext::batch_norm_act_backward_sums")
def _(grad, x, weight, bias, mean, var, y, eps, act, masked, negative_slope=0.01):
    sums = x.new_empty(2, x.shape[1], dtype=torch.float64)
    return sums, torch.empty_like(weight), torch.empty_like(bias)


@torch.library.register_fake("auglocal_ext::batch_norm_act_backward_apply_out")
def _(grad, x, weight, bias, mean, var, means, eps, act, dx, negative_slope=0.01):
    return None


def _setup_context(ctx, inputs, output):
    x, weight, bias, residual, ctx.eps, ctx.act, ctx.negative_slope = inputs
    y, mean, var = output
    relu = ACTIVATIONS[ctx.act] == "relu"
    if residual is not None and ctx.act and not relu:
        raise ValueError(
            f"batch_norm_act: with a residual only a ReLU can be differentiated, given {ACTIVATIONS[ctx.act]!r}"
        )
    ctx.mark_non_differentiable(mean, var)
    ctx.set_materialize_grads(False)
    ctx.has_residual = residual is not None
    ctx.save_for_backward(x, weight, bias, mean, var, y if ctx.has_residual and relu else None)


def _autograd(ctx, grad, _mean_grad, _var_grad):
    if grad is None:
        return (None,) * 7
    x, weight, bias, mean, var, y = ctx.saved_tensors
    dx, dresidual, dweight, dbias = torch.ops.auglocal_ext.batch_norm_act_backward(
        grad, x, weight, bias, mean, var, y, ctx.eps, ctx.act, ctx.negative_slope
    )
    if not ctx.has_residual:
        dresidual = None
    elif y is None:
        dresidual = grad
    return dx, dweight, dbias, dresidual, None, None, None


torch.library.register_autograd("auglocal_ext::batch_norm_act", _autograd, setup_context=_setup_context)
not_differentiable("batch_norm_statistics", "batch_norm_act_apply", "batch_norm_act_backward")
