"""The op linear_cross_entropy: (loss (), logits (N, K), and the loss's gradients dpooled, dweight, dbias).

labels: (N,), int64, or (N, K) of pooled's dtype; class_weight: (K,). Kernels in Triton for CUDA; plain torch elsewhere.
On the CPU these are three small matrix products and a softmax over (N, K): a compiled kernel would gain nothing. No
gradient passes through the logits.
"""

import os
from importlib.util import find_spec

import torch

from . import _fallbacks, _library
from ._library import LIBRARY, _say_once_what_is_slower, define_composite, not_differentiable, without_autocast


def _check_loss(pooled, weight, bias, labels, class_weight=None):
    """What the kernels rely on where they compute addresses."""
    op = "linear_cross_entropy"
    if pooled.dim() != 2 or weight.dim() != 2 or pooled.shape[1] != weight.shape[1] or not len(weight):
        raise ValueError(
            f"{op}: pooled and weight must be (N, C) and (K, C) with K at least 1, given shapes"
            f" {tuple(pooled.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias must be ({len(weight)},), given shape {tuple(bias.shape)}")
    expected = (pooled.shape[:1], torch.int64), ((len(pooled), len(weight)), pooled.dtype)
    shape, dtype = expected[labels.is_floating_point()]
    if labels.shape != shape or labels.dtype != dtype:
        raise ValueError(
            f"{op}: labels must be {tuple(shape)} of {str(dtype).removeprefix('torch.')}, given {tuple(labels.shape)} "
            f"of {labels.dtype}"
        )
    if class_weight is not None and (class_weight.shape, class_weight.dtype) != (weight.shape[:1], pooled.dtype):
        raise ValueError(
            f"{op}: class_weight must be ({len(weight)},) of {pooled.dtype}, given {tuple(class_weight.shape)} of "
            f"{class_weight.dtype}"
        )
    for given in (weight, bias, labels, class_weight):
        if given is not None and given.device != pooled.device:
            raise ValueError(f"{op}: all tensors must be on {pooled.device} like pooled, given one on {given.device}")


@define_composite(
    "linear_cross_entropy(Tensor pooled, Tensor weight, Tensor? bias, Tensor labels, float label_smoothing,"
    " int ignore_index, Tensor? class_weight=None)"
    " -> (Tensor loss, Tensor logits, Tensor dpooled, Tensor dweight, Tensor dbias)"
)
def _plain(pooled, weight, bias, labels, label_smoothing, ignore_index, class_weight=None):
    _check_loss(pooled, weight, bias, labels, class_weight)
    if pooled.device.type == "cpu" and not labels.is_floating_point():
        wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= len(weight)))]
        if len(wrong):
            raise ValueError(
                f"pooled_cross_entropy: labels must be 0 to {len(weight) - 1} or ignore_index {ignore_index},"
                f" given {wrong[0].item()}"
            )
    if pooled.device.type != "cpu":
        _say_once_what_is_slower(pooled.device.type)
    return _fallbacks.linear_cross_entropy(pooled, weight, bias, labels, label_smoothing, ignore_index, class_weight)


def _triton(pooled, weight, bias, labels, label_smoothing, ignore_index, class_weight=None):
    arguments = (pooled, weight, bias, labels, label_smoothing, ignore_index, class_weight)
    _check_loss(pooled, weight, bias, labels, class_weight)
    fits = pooled.dtype == torch.float32 and pooled.numel() and weight.numel() < 2**31  # as indices; float64: gradcheck
    if not fits or not _library.triton_works():
        return _fallbacks.linear_cross_entropy(*arguments)
    from ._triton_head import linear_cross_entropy

    return linear_cross_entropy(*arguments)


if find_spec("triton") and os.environ.get("AUGLOCAL_NATIVE") != "0":
    LIBRARY.impl("linear_cross_entropy", without_autocast(_triton), "CUDA")


# The loss is not used: it ties the gradients to what they are gradients of, so that differentiating them is an error.
@define_composite(
    "linear_cross_entropy_backward(Tensor grad, Tensor loss, Tensor dpooled, Tensor dweight, Tensor dbias)"
    " -> (Tensor dpooled, Tensor dweight, Tensor dbias)"
)
def _scaled(grad, loss, dpooled, dweight, dbias):
    return grad * dpooled, grad * dweight, grad * dbias


@torch.library.register_fake("auglocal_ext::linear_cross_entropy")
def _(pooled, weight, bias, labels, label_smoothing, ignore_index, class_weight=None):
    shapes = (), (pooled.shape[0], weight.shape[0]), pooled.shape, weight.shape, weight.shape[:1]
    return tuple(pooled.new_empty(shape) for shape in shapes)


@torch.library.register_fake("auglocal_ext::linear_cross_entropy_backward")
def _(grad, loss, dpooled, dweight, dbias):
    return torch.empty_like(dpooled), torch.empty_like(dweight), torch.empty_like(dbias)


def _setup_cross_entropy(ctx, inputs, output):
    loss, logits, *gradients = output
    ctx.has_bias = inputs[2] is not None
    ctx.mark_non_differentiable(logits, *gradients)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(loss, *gradients)


def _cross_entropy_autograd(ctx, grad, *_):
    if grad is None:
        return (None,) * 7
    dpooled, dweight, dbias = torch.ops.auglocal_ext.linear_cross_entropy_backward(grad, *ctx.saved_tensors)
    return dpooled, dweight, dbias if ctx.has_bias else None, None, None, None, None


torch.library.register_autograd(
    "auglocal_ext::linear_cross_entropy", _cross_entropy_autograd, setup_context=_setup_cross_entropy
)
not_differentiable("linear_cross_entropy_backward")
