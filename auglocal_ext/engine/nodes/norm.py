"""Norm: BatchNorm in training mode with what is elementwise behind it, a residual and an activation."""

import operator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ...ops.batch_norm_act import ACTIVATIONS
from ..node import Node, computes, has_own_weight, is_torchvisions
from ..tensors import like
from .activation import RELU, Function, function_at, is_relu
from .conv import is_plain_conv, keeps_size
from .mul import Mul

__all__ = [
    "Norm",
    "ResidualSample",
    "affine",
    "batch_statistics",
    "chain_at",
    "fused",
    "is_fixed_norm",
    "is_plain_norm",
    "plain_batch_norm",
    "rebuilt",
    "statistics",
    "update_running_statistics",
]

_ops = torch.ops.auglocal_ext


@dataclass(frozen=True)
class Norm(Node):
    """out = [function](bn(source) [+ residual]), bn in training mode; with a residual the function is a ReLU or none.

    Keeps the source and the statistics of the batch. The output is dropped after its last reader, and rebuilt where the
    backward needs it; the backward writes over the incoming gradient, with a residual also over the source.
    """

    source: str
    bn: nn.BatchNorm2d
    function: Function | None
    residual: str | None = None

    @property
    def sources(self):
        return (self.source,) if self.residual is None else (self.source, self.residual)

    @property
    def parameters(self):
        return affine(self.bn)

    @property
    def relu(self):
        return self.function == RELU

    @property
    def of_batch(self):
        """The names of what is kept of the batch beside its values."""
        return statistics(self)

    @property
    def gradients(self):
        """A function as `_gradients`."""
        return partial(_gradients, self.bn)

    @classmethod
    def match(cls, at):
        return chain_at(cls, at) if is_plain_norm(at.module(), nn.BatchNorm2d) else None

    def plain(self, x, residual=None):
        y = plain_batch_norm(self.bn, x)
        y = y if residual is None else y + residual
        return y if self.function is None else self.function(y)

    def forward(self, emit):
        of_batch = statistics(self)
        emit.step(self, "norm", partial(_norm, self.bn, *fused(self.function)), self.sources, [self.out, *of_batch])
        reads = [self.source, *of_batch, *self.sources[1:]]
        emit.derive(
            self, "rebuild", partial(rebuilt, self.bn, *fused(self.function)), reads, [self.out], like=self.source
        )

    def backward(self, emit):
        reads = [emit.take(self.out), self.source, *self.of_batch]
        parameters, gives = emit.gradient_names(self.bn.weight, self.bn.bias), [emit.give(self.source)]
        if self.residual is not None and self.relu:
            run, reads = partial(_residual_backward, self.gradients, emit.owns(self.source)), [*reads, self.out]
            gives.append(emit.give(self.residual) if self.residual not in emit.constants else f"{self.out}.masked")
        elif self.residual is not None and self.residual not in emit.constants:
            run = partial(_shared_backward, self.gradients, emit.owns(self.source))
            reads += [self.out] if self.out == emit.features else []
            gives.append(emit.give(self.residual))
        else:
            run = partial(_backward, self.gradients, *fused(self.function))
            reads += [self.out] if self.out == emit.features else []
        emit.step(self, "norm backward", run, reads, [*gives, *parameters])

    @classmethod
    def samples(cls):
        return (
            nn.BatchNorm2d(4),
            nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, momentum=None), nn.ReLU(), nn.Conv2d(4, 4, 1)),
            nn.Sequential(nn.BatchNorm2d(4, eps=0.1), nn.ReLU(inplace=True), nn.BatchNorm2d(4)),
            *(nn.Sequential(nn.BatchNorm2d(4), act) for act in (nn.SiLU(), nn.Hardswish(), nn.GELU(), nn.GELU("tanh"))),
            nn.Sequential(nn.BatchNorm2d(4), nn.ReLU6(), nn.BatchNorm2d(4), nn.LeakyReLU(0.2), nn.Conv2d(4, 4, 1)),
            ResidualSample(nn.BatchNorm2d(4), nn.ReLU()),
            nn.Sequential(ResidualSample(nn.BatchNorm2d(4), nn.Identity()), nn.Conv2d(4, 4, 1)),
        )


class ResidualSample(nn.Module):
    """A block with a shortcut around a norm of 4 channels, for `samples`."""

    def __init__(self, bn, act):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(4, 4, 3, padding=1), bn, act

    def forward(self, x):
        return self.act(self.bn(self.conv(x)) + x)


def chain_at(kind, at):
    """(node of a kind made as `Norm`, the last fx node that it takes in) of the BatchNorm at a place, with the residual
    and the function behind it that the op computes too; None: the BatchNorm is given more than its source."""
    bn = at.module()
    if at.node.kwargs:
        return None
    source, reader = at.values[at.node.args[0]], at.only_reader(at.node)
    if reader is not None and _is_add(reader):
        others = [argument for argument in reader.args if argument is not at.node]
        relu = at.only_reader(reader)
        # The other side must have been computed by then.
        if len(others) == 1 and others[0] in at.values:
            if relu is not None and is_relu(relu, at):
                return kind(at.out, at.part, source, bn, RELU, at.values[others[0]]), relu
            if keeps_shape(at.node, others[0], at):  # an Add's sides may have any shapes
                return kind(at.out, at.part, source, bn, None, at.values[others[0]]), reader
    found = None if reader is None else function_at(reader, at)
    if found is not None and _is_fused(found[0]):
        return kind(at.out, at.part, source, bn, found[0]), reader
    return kind(at.out, at.part, source, bn, None), at.node


def keeps_shape(node, before, at):
    """Whether it can be told that an fx node's map, a BatchNorm's, has the shape of one that it is made from.

    By elementwise functions and their gates, BatchNorms, and convolutions that keep the size, and in the end the
    channels.
    """
    channels = inputs = at.module(node).running_mean.numel()
    while node is not before:
        module, made_from = at.module(node), list(node.args)
        if is_plain_conv(module) and keeps_size(module):
            inputs = module.in_channels
        elif Mul.computes(node):
            made_from = [side for side in made_from if function_at(side, at) is not None]
        elif not (_is_norm(module) or is_fixed_norm(module)) and function_at(node, at) is None:
            return False
        if len(made_from) != 1:
            return False
        (node,) = made_from
    return inputs == channels


def is_plain_norm(bn, kind):
    """Whether a module is a BatchNorm of a kind that normalises by its batch and keeps running statistics."""
    return (
        computes(bn, kind)
        and bn.training
        and bn.track_running_stats
        and bn.num_batches_tracked is not None
        and _is_affine(bn)
    )


def _is_norm(module):
    return is_plain_norm(module, nn.BatchNorm2d) or is_plain_norm(module, nn.SyncBatchNorm)


def is_fixed_norm(bn):
    """Whether a module is a BatchNorm of maps that normalises by its running statistics: in eval mode, or torchvision's
    FrozenBatchNorm2d."""
    if is_torchvisions(bn, "ops.misc.FrozenBatchNorm2d"):
        return True
    return computes(bn, nn.BatchNorm2d) and not bn.training and _is_affine(bn)


def _is_affine(bn):
    return (
        bn.affine
        and bn.running_mean is not None
        and bn.running_var is not None
        and has_own_weight(bn)
        and bn.weight.is_contiguous()
        and bn.bias is not None
        and bn.bias.is_contiguous()
    )


def plain_batch_norm(bn, x):
    # Without a momentum it is by a count, which moves statistics alone.
    momentum = (1.0 if bn.training else 0.0) if bn.momentum is None else bn.momentum
    return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training, momentum, bn.eps)


def statistics(node):
    """The names of a node's mean and variance of the batch."""
    return [f"{node.out}.mean", f"{node.out}.var"]


def affine(bn):
    return bn.weight, bn.bias


def batch_statistics(bn, x):
    """(mean, variance) of the batch, by which the running ones are updated."""
    mean, var = _ops.batch_norm_statistics(x)
    update_running_statistics(bn, mean, var, x.numel() // x.shape[1])
    return mean, var


def fused(function):
    """What the op is told of a Function, or None: its number, and a slope."""
    if function is None:
        return ACTIVATIONS.index("none"), 0.0
    return ACTIVATIONS.index(function.name), dict(function.options).get("negative_slope", 0.0)


def _is_fused(function):
    """Whether the op computes it too."""
    return function.name in ACTIVATIONS and function.options != (("approximate", "tanh"),)


def _is_add(node):
    return (
        node.op == "call_function"
        and node.target in (operator.add, operator.iadd, torch.add)
        and len(node.args) == 2
        and not node.kwargs
    )


def _norm(bn, act, slope, x, residual=None):
    residual = None if residual is None else like(residual, x)
    y, mean, var = _ops.batch_norm_act(x, *affine(bn), residual, bn.eps, act, slope)
    update_running_statistics(bn, mean, var, x.numel() // x.shape[1])
    return y, mean, var


def rebuilt(bn, act, slope, over, x, mean, var, residual=None):
    """The output by statistics that are there, written over one of the reads that `over` allows it of."""
    if residual is not None:
        residual = like(residual, x)
    out = next((read for read, may in zip((x, mean, var, residual), over, strict=False) if may), None)
    out = torch.empty_like(x) if out is None else out
    _ops.batch_norm_act_apply_out(x, *affine(bn), mean, var, residual, bn.eps, act, out, slope)
    return out


def _gradients(bn, act, slope, grad, x, of_batch, y, dx):
    """(dx, the gradient behind the mask, dweight, dbias).

    act, slope: see `fused`.
    of_batch: begins with the mean and the variance.
    y: None, or the output, whose sign is the mask of a ReLU behind a residual: grad is then masked in place.
    dx: where to write, which may be grad or x.
    """
    given = grad, x, *affine(bn), *of_batch[:2], y, bn.eps, act, dx, None if y is None else grad, slope
    return dx, grad, *_ops.batch_norm_act_backward_out(*given)


# What these read behind the statistics is the output, where it is the features or tells a mask.


def _backward(gradients, act, slope, grad, x, *of_batch):
    dx = like(grad, x)
    dx, _, *parameters = gradients(act, slope, dx, x, of_batch, None, dx)
    return dx, *parameters


def _residual_backward(gradients, over, grad, x, *of_batch):
    dx, y = x if over else torch.empty_like(x), like(of_batch[-1], x)
    return gradients(*fused(RELU), like(grad, x), x, of_batch, y, dx)


def _shared_backward(gradients, over, grad, x, *of_batch):
    """Where the residual's gradient is the output's, which goes on to it."""
    grad, dx = like(grad, x), x if over else torch.empty_like(x)
    dx, _, *parameters = gradients(*fused(None), grad, x, of_batch, None, dx)
    return dx, grad, *parameters


def update_running_statistics(bn, mean, var, count):
    """By the mean and the biased variance of `count` values, a number or a tensor ()."""
    bn.num_batches_tracked += 1
    dtype = bn.running_mean.dtype
    # momentum None: the cumulative average
    momentum = 1 / bn.num_batches_tracked.to(dtype) if bn.momentum is None else bn.momentum
    bn.running_mean.lerp_(mean.to(dtype), momentum)
    bn.running_var.lerp_((var * (count / (count - 1))).to(dtype), momentum)
