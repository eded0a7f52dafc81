"""pooled_cross_entropy: the head of a network, from its last feature map to loss and logits, as two ops.

`batch_norm_act_mean` takes BatchNorm [+ residual] [+ ReLU] and the global average pool in one; `linear_cross_entropy`
the linear layer and the loss, with their gradients. So neither the last activation nor its gradient is ever stored:
the one is averaged as it is computed, the other is an (N, C) matrix behind the ReLU's mask.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import _fallbacks, _linear_cross_entropy  # noqa: F401  which defines its op
from ._library import define, define_composite, not_differentiable
from .batch_norm_act import batch_norm_act_reference, check, check_count, memory_format

__all__ = ["PooledCrossEntropy", "pooled_cross_entropy", "pooled_cross_entropy_reference"]


class PooledCrossEntropy(NamedTuple):
    """What `pooled_cross_entropy` returns, all in linear_weight's dtype. Only the loss is differentiable.

    loss, (), is the mean over the rows that are not ignored; logits are (N, K). mean and var, (C,), are mean and biased
    variance of x over (N, H, W), None without bn; head_mean and head_var, (C,), those of the pooled features over N,
    None without head_bn.
    """

    loss: torch.Tensor  #: ()
    logits: torch.Tensor  #: (N, K)
    mean: torch.Tensor | None  #: (C,)
    var: torch.Tensor | None  #: (C,)
    head_mean: torch.Tensor | None  #: (C,)
    head_var: torch.Tensor | None  #: (C,)


def pooled_cross_entropy(
    x: torch.Tensor,
    linear_weight: torch.Tensor,
    linear_bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    bn: tuple[torch.Tensor, torch.Tensor] | None = None,
    residual: torch.Tensor | None = None,
    relu: bool = True,
    eps: float = 1e-5,
    head_bn: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    class_weight: torch.Tensor | None = None,
) -> PooledCrossEntropy:
    """Loss and logits of [relu(batch_norm(x) + residual) ->] average pool -> [batch_norm ->] linear -> cross-entropy.

    In training mode: both BatchNorms use the batch's own statistics; running statistics are the caller's, to update
    from what is returned. For the backward pass it keeps x, with both a residual and a ReLU the residual (a block's
    input or its downsampling convolution's output, alive anyway), and (N, C) and (K, C) matrices: the gradients of the
    linear layer, computed in the forward pass. Eager torch keeps the last activation, and stores its gradient. (With
    bn=None the gradient of x is an expanded (N, C) matrix; only for bfloat16 torch makes it a map of its own.)

    Args:
        x: (N, C, H, W), float32, bfloat16, float16 or float64; contiguous or channels_last (anything else is copied).
        linear_weight: (K, C), float32, or float64 where x is float64. Products are not rounded to TF32 in the kernels.
        linear_bias: None or (K,), in linear_weight's dtype.
        labels: (N,), int64, 0 to K - 1 or ignore_index; or soft ones, (N, K), a share per class, in linear_weight's
            dtype. They get no gradient.
        bn: None where x is an activation already, or (weight, bias), each (C,), in linear_weight's dtype.
        residual: None, or with bn a tensor of x's shape and dtype, added before the ReLU.
        relu: with bn, False for no ReLU.
        eps: of bn, added to the variance, at least 0.
        head_bn: None, or (weight, bias, eps) of the BatchNorm1d between the pool and the linear layer.
        label_smoothing: from 0 to 1, as in torch.nn.functional.cross_entropy.
        ignore_index: rows with this label add nothing to the loss, its mean, or any gradient of it. Of soft labels no
            row is ignored.
        class_weight: None, or (K,), in linear_weight's dtype: what each class counts, as torch's `weight`. It gets no
            gradient.

    Returns:
        PooledCrossEntropy(loss, logits, mean, var, head_mean, head_var): the loss is the mean over the rows that are
        not ignored, each counted as its label's class does: NaN with gradients of zero where all are, as in torch. (Of
        soft labels it is the mean over all rows.) Only it is differentiable, and only once. Two calls on the same input
        give the same bits.

    Raises:
        ValueError: a shape, device or option that does not fit; one value per channel for bn, one image for head_bn; on
            the CPU also a label out of range. On CUDA, where reading labels would stall the host and torch's own
            assertion would kill the context, such a label makes the loss NaN; its row is ignored otherwise.
        TypeError: another dtype of x, labels, or what goes with linear_weight.
        RuntimeError: differentiated twice.

    Equivalent to `pooled_cross_entropy_reference`. Formulas: Lin et al. 2013 (arXiv:1312.4400), section 3.2 (the
    pool); Szegedy et al. 2015 (arXiv:1512.00567), section 7 (label smoothing: the target is
    (1 - label_smoothing) one_hot + label_smoothing / K, so dlogits = (softmax(logits) - target) / rows not ignored;
    with the target times class_weight it is (sum(target) softmax(logits) - target) / the labels' weights, summed up).
    """
    op = "pooled_cross_entropy"
    channels = {} if bn is None else {"the weight of bn": bn[0], "the bias of bn": bn[1]}
    if head_bn is not None:
        channels |= {"the weight of head_bn": head_bn[0], "the bias of head_bn": head_bn[1]}
    check(op, x, channels, {"residual": residual}, eps)
    _check_head(op, x, linear_weight, linear_bias, labels, label_smoothing, class_weight)
    n, _, height, width = x.shape
    if height * width == 0:
        raise ValueError(f"{op}: x must have values to average over, given shape {tuple(x.shape)}")
    if bn is None and residual is not None:
        raise ValueError(f"{op}: residual must be None where bn is None, given a tensor")
    if bn is not None:
        check_count(op, x)
    if head_bn is not None and n == 1:
        raise ValueError(f"{op}: head_bn needs more than one sample, given shape {tuple(x.shape)}")
    if head_bn is not None and x.shape[1] == 0:
        raise ValueError(f"{op}: head_bn needs channels, given shape {tuple(x.shape)}")
    if head_bn is not None and not head_bn[2] >= 0:
        raise ValueError(f"{op}: the eps of head_bn must be at least 0, given {head_bn[2]}")

    mean = var = head_mean = head_var = None
    if bn is None:
        pooled = x.sum((2, 3), dtype=linear_weight.dtype) / (height * width)
    else:
        pooled, mean, var = torch.ops.auglocal_ext.batch_norm_act_mean(x, *bn, residual, eps, relu)
    if head_bn is not None:
        pooled, head_mean, head_var = _head_batch_norm(pooled, *head_bn)
    loss, logits, *_ = torch.ops.auglocal_ext.linear_cross_entropy(
        pooled, linear_weight, linear_bias, labels, label_smoothing, ignore_index, class_weight
    )
    return PooledCrossEntropy(loss, logits, mean, var, head_mean, head_var)


def pooled_cross_entropy_reference(
    x: torch.Tensor,
    linear_weight: torch.Tensor,
    linear_bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    bn: tuple[torch.Tensor, torch.Tensor] | None = None,
    residual: torch.Tensor | None = None,
    relu: bool = True,
    eps: float = 1e-5,
    head_bn: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    class_weight: torch.Tensor | None = None,
) -> PooledCrossEntropy:
    """`pooled_cross_entropy` in plain torch, differentiated by autograd.

    Args:
        x, linear_weight, linear_bias, labels: see `pooled_cross_entropy`.
        bn, residual, relu, eps, head_bn, label_smoothing, ignore_index, class_weight: see there.

    Returns:
        PooledCrossEntropy, whose logits are differentiable too.
    """
    mean = var = head_mean = head_var = None
    if bn is not None:
        x, mean, var = batch_norm_act_reference(x, *bn, residual, eps=eps, act=relu)
    pooled = x.mean((2, 3)).to(linear_weight.dtype)
    if head_bn is not None:
        pooled, head_mean, head_var = _head_batch_norm(pooled, *head_bn)
    logits = F.linear(pooled, linear_weight, linear_bias)
    ignored = -100 if labels.is_floating_point() else ignore_index  # torch takes no other of soft labels
    loss = F.cross_entropy(logits, labels, class_weight, ignore_index=ignored, label_smoothing=label_smoothing)
    return PooledCrossEntropy(loss, logits, mean, var, head_mean, head_var)


def _head_batch_norm(pooled, weight, bias, eps):
    """The BatchNorm1d of an (N, C) matrix, in plain torch: it is too small for a kernel of its own."""
    if len(pooled):
        var, mean = torch.var_mean(pooled.detach(), 0, correction=0)
    else:
        mean = var = torch.zeros_like(weight)
    return F.batch_norm(pooled, None, None, weight, bias, training=True, eps=eps), mean, var


def _check_head(op, x, linear_weight, linear_bias, labels, label_smoothing, class_weight):
    """One sentence for what does not fit between x, the linear layer and the labels."""
    n, c = x.shape[:2]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if linear_weight.dim() != 2 or linear_weight.shape[1] != c or not len(linear_weight):
        raise ValueError(f"{op}: linear_weight must be (K, {c}), given shape {tuple(linear_weight.shape)}")
    k = len(linear_weight)
    soft = labels.is_floating_point()
    shapes = {"linear_weight": (linear_weight, (k, c)), "linear_bias": (linear_bias, (k,))}
    shapes |= {"labels": (labels, (n, k) if soft else (n,)), "class_weight": (class_weight, (k,))}
    for name, (given, shape) in shapes.items():
        if given is None:
            continue
        if given.shape != shape:
            raise ValueError(f"{op}: {name} must be {shape}, given shape {tuple(given.shape)}")
        expected = torch.int64 if name == "labels" and not soft else dtype
        if given.dtype != expected:
            raise TypeError(f"{op}: {name} must be {expected} for {x.dtype} x, given {given.dtype}")
        if given.device != x.device:
            raise ValueError(f"{op}: {name} must be on {x.device} like x, given {given.device}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must be from 0 to 1, given {label_smoothing}")


# ---- batch_norm_act_mean: (pooled (N, C) in weight's dtype, mean (C,), var (C,)) -----------------------------
# The residual is kept, and taken by the backward, for the ReLU's mask alone: without a ReLU it is None there.

define(
    "batch_norm_act_mean_apply(Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor var, Tensor? residual,"
    " float eps, bool relu) -> Tensor pooled",
    _fallbacks.batch_norm_act_mean_apply,
)
define(
    "batch_norm_act_mean_backward_out(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor var,"
    " Tensor? residual, float eps, bool relu, Tensor(a!) dx, Tensor(b!)? dresidual) -> (Tensor dweight, Tensor dbias)",
    _fallbacks.batch_norm_act_mean_backward_out,
)


@define_composite(
    "batch_norm_act_mean(Tensor x, Tensor weight, Tensor bias, Tensor? residual, float eps, bool relu)"
    " -> (Tensor pooled, Tensor mean, Tensor var)"
)
def _mean(x, weight, bias, residual, eps, relu):
    layout = memory_format(x)
    x = x.contiguous(memory_format=layout)
    if residual is not None:
        residual = residual.contiguous(memory_format=layout)
    mean, var = torch.ops.auglocal_ext.batch_norm_statistics(x)
    arguments = (x, weight, bias, mean, var, residual, eps, relu)
    return torch.ops.auglocal_ext.batch_norm_act_mean_apply(*arguments), mean, var


# dresidual is empty where residual_grad does not ask for it.
@define_composite(
    "batch_norm_act_mean_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor var,"
    " Tensor? residual, float eps, bool relu, bool residual_grad)"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)"
)
def _mean_backward(grad, x, weight, bias, mean, var, residual, eps, relu, residual_grad):
    layout = memory_format(x)
    grad, x = grad.contiguous(), x.contiguous(memory_format=layout)
    if residual is not None:
        residual = residual.contiguous(memory_format=layout)
    dx = torch.empty_like(x, memory_format=layout)
    dresidual = torch.empty_like(dx) if residual_grad else None
    arguments = (grad, x, weight, bias, mean, var, residual, eps, relu, dx, dresidual)
    dweight, dbias = torch.ops.auglocal_ext.batch_norm_act_mean_backward_out(*arguments)
    return dx, x.new_empty(0) if dresidual is None else dresidual, dweight, dbias


@torch.library.register_fake("auglocal_ext::batch_norm_act_mean_apply")
def _(x, weight, bias, mean, var, residual, eps, relu):
    return weight.new_empty(x.shape[:2])


@torch.library.register_fake("auglocal_ext::batch_norm_act_mean_backward_out")
def _(grad, x, weight, bias, mean, var, residual, eps, relu, dx, dresidual):
    return torch.empty_like(weight), torch.empty_like(bias)


@torch.library.register_fake("auglocal_ext::batch_norm_act_mean")
def _(x, weight, bias, residual, eps, relu):
    return weight.new_empty(x.shape[:2]), torch.empty_like(weight), torch.empty_like(weight)


@torch.library.register_fake("auglocal_ext::batch_norm_act_mean_backward")
def _(grad, x, weight, bias, mean, var, residual, eps, relu, residual_grad):
    dx = torch.empty_like(x, memory_format=memory_format(x))
    dresidual = torch.empty_like(dx) if residual_grad else x.new_empty(0)
    return dx, dresidual, torch.empty_like(weight), torch.empty_like(bias)


def _setup_mean(ctx, inputs, output):
    x, weight, bias, residual, ctx.eps, ctx.relu = inputs
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, mean, var, residual if ctx.relu else None)


def _mean_autograd(ctx, grad, *_):
    if grad is None:
        return (None,) * 6
    x, residual = ctx.saved_tensors[0], ctx.saved_tensors[5]
    wanted = ctx.needs_input_grad[3]
    dx, dresidual, dweight, dbias = torch.ops.auglocal_ext.batch_norm_act_mean_backward(
        grad, *ctx.saved_tensors, ctx.eps, ctx.relu, wanted and residual is not None
    )
    if not wanted:
        dresidual = None
    elif residual is None:
        dresidual = (grad / (x.shape[2] * x.shape[3])).to(x.dtype)[:, :, None, None].expand(x.shape)
    return dx, dweight, dbias, dresidual, None, None


torch.library.register_autograd("auglocal_ext::batch_norm_act_mean", _mean_autograd, setup_context=_setup_mean)
not_differentiable("batch_norm_act_mean_apply", "batch_norm_act_mean_backward")
