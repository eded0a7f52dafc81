"""Head: from the last feature map to loss and logits, without storing its activation or its gradient."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ..criterion import CrossEntropy
from ..node import Node, trained
from ..tensors import like
from .activation import RELU
from .global_pool import GlobalPool
from .island import Island
from .linear import Linear
from .norm import Norm, affine, batch_statistics, is_plain_norm, statistics
from .reshape import Reshape

__all__ = ["Head", "take_in_head"]

_aten, _ops = torch.ops.aten, torch.ops.auglocal_ext


@dataclass(frozen=True)
class Head(Node):
    """Global average pool, [BatchNorm1d,] linear, cross-entropy of `norm`, whose output is never stored; out: the
    logits. The gradient of the last map is an (N, C) matrix; the linear layer's are computed with the loss."""

    norm: Norm
    head_bn: nn.BatchNorm1d | None
    linear: nn.Linear
    weight: float  # of the loss
    criterion: CrossEntropy

    keeps_its_source = False
    is_a_loss = True

    @property
    def sources(self):
        return self.norm.sources

    @property
    def parameters(self):
        of_bn = () if self.head_bn is None else affine(self.head_bn)
        return *self.norm.parameters, *of_bn, self.linear.weight, self.linear.bias

    def plain(self, *values):
        pooled = F.adaptive_avg_pool2d(self.norm.plain(*values), 1).flatten(1)
        if self.head_bn is not None:
            bn = self.head_bn
            pooled = F.batch_norm(pooled, None, None, bn.weight, bn.bias, True, 0.0, bn.eps)
        return F.linear(pooled, self.linear.weight, self.linear.bias)

    def forward(self, emit):
        norm, of_batch, pooled = self.norm, statistics(self.norm), f"{self.out}.pooled"
        emit.step(self, "statistics", partial(batch_statistics, norm.bn), [norm.source], of_batch)
        reads = [norm.source, *of_batch, *norm.sources[1:]]
        emit.step(self, "pooled norm", partial(_pooled_norm, norm.bn, norm.relu), reads, [pooled])
        if self.head_bn is not None:
            made = [f"{pooled}.norm", f"{pooled}.mean", f"{pooled}.invstd"]
            emit.step(self, "head norm", partial(_head_norm, self.head_bn), [pooled], made)
            pooled = made[0]
        gradients = emit.gradient_names(self.linear.weight, self.linear.bias)
        writes = [self.out, emit.loss_name("cross-entropy"), f"{self.out}.gradient", *gradients]
        run = partial(_linear_cross_entropy, self.linear, self.weight, self.criterion)
        emit.step(self, "linear and loss", run, [pooled, "labels", *emit.scale], writes, self._macs)

    def backward(self, emit):
        norm, gradient = self.norm, f"{self.out}.gradient"
        goes_on = norm.trains or not emit.constants.issuperset(norm.sources)
        if self.head_bn is not None and (goes_on or trained(*affine(self.head_bn))):
            pooled = f"{self.out}.pooled"
            parameters = emit.gradient_names(self.head_bn.weight, self.head_bn.bias)
            reads, made = [gradient, pooled, f"{pooled}.mean", f"{pooled}.invstd"], f"{pooled}.gradient"
            emit.step(
                self, "head norm backward", partial(_head_norm_backward, self.head_bn), reads, [made, *parameters]
            )
            gradient = made
        if not goes_on:
            return
        gives = [emit.give(norm.source)]
        if norm.residual is not None and norm.residual not in emit.constants:
            gives.append(emit.give(norm.residual))
        run = partial(_pooled_norm_backward, norm.bn, norm.relu, len(gives) == 2, emit.owns(norm.source))
        reads = [gradient, norm.source, *statistics(norm), *norm.sources[1:]]
        parameters = emit.gradient_names(norm.bn.weight, norm.bn.bias)
        emit.step(self, "pooled norm backward", run, reads, [*gives, *parameters])

    def _macs(self, reads, writes):
        """Of the linear layer and both its gradients, which are computed together."""
        return 3 * writes[0].numel() * self.linear.in_features


def take_in_head(nodes, features, weight, criterion):
    """The nodes of a module with a Head in place of those it consists of, where that is how they end and the loss is a
    cross-entropy; else None.

    features: the name of the value that is handed on to the next module, or None: a Head may not be its only reader.
    """
    if not isinstance(criterion, CrossEntropy):
        return None
    names = {node.out: node for node in nodes}
    readers = [features, *(source for node in nodes for source in node.sources)]
    # pool, [flatten,] [BatchNorm1d,] linear
    tail = [nodes[-1]]
    while isinstance(tail[0], Island | Linear | Reshape | GlobalPool) and len(tail[0].sources) == 1:
        (source,) = tail[0].sources
        before = names.get(source) if readers.count(source) == 1 else None
        if before is None:
            break
        tail.insert(0, before)
        if isinstance(before, Norm):
            break
    match tail:
        # A Norm itself: the pooled norm's kernels know this device's statistics alone.
        case [Norm() as norm, GlobalPool() as pool, *between, Linear(linear=linear)] if (
            type(norm) is Norm
            and (norm.function == RELU or (norm.function is None and norm.residual is None))
            and (middle := _behind_flatten(between, pool.keepdim)) is not None
            and (not middle or (len(middle) == 1 and is_plain_norm(_called(middle[0]), nn.BatchNorm1d)))
            and linear.weight.is_contiguous()
        ):
            head = Head(nodes[-1].out, nodes[-1].part, norm, _called(*middle), linear, weight, criterion)
            return [node for node in nodes if node not in tail] + [head]
    return None


def _behind_flatten(nodes, expected):
    """The nodes without what makes rows of pooled maps, where they begin with that and it is expected; None: they do
    not."""
    if not expected:
        return nodes
    pooled = torch.empty(2, 3, 1, 1, device="meta")
    begins = nodes and isinstance(nodes[0], Reshape) and nodes[0].plain(pooled).shape == (2, 3)
    return nodes[1:] if begins else None


def _called(node=None):
    """What an island calls; of another node, or none, None."""
    return getattr(node, "call", None)


def _pooled_norm(bn, relu, x, mean, var, residual=None):
    residual = None if residual is None else like(residual, x)
    return _ops.batch_norm_act_mean_apply(x, *affine(bn), mean, var, residual, bn.eps, relu)


def _pooled_norm_backward(bn, relu, residual_grad, over, grad, x, mean, var, residual=None):
    dx = x if over else torch.empty_like(x)
    residual = None if residual is None else like(residual, x)
    dresidual = torch.empty_like(dx) if residual_grad else None
    given = (grad, x, *affine(bn), mean, var, residual, bn.eps, relu, dx, dresidual)
    parameters = _ops.batch_norm_act_mean_backward_out(*given)
    return (dx, *parameters) if dresidual is None else (dx, dresidual, *parameters)


def _head_norm(bn, x):
    bn.num_batches_tracked += 1
    momentum = 1 / float(bn.num_batches_tracked) if bn.momentum is None else bn.momentum
    running = bn.running_mean, bn.running_var
    return _aten.native_batch_norm(x, *affine(bn), *running, True, momentum, bn.eps)


def _head_norm_backward(bn, grad, x, mean, invstd):
    running = bn.running_mean, bn.running_var
    mask = (True, True, True)
    return _aten.native_batch_norm_backward(grad, x, bn.weight, *running, mean, invstd, True, bn.eps, mask)


def _linear_cross_entropy(linear, weight, criterion, pooled, labels, scale=None):
    options = criterion.label_smoothing, criterion.ignore_index, criterion.weight
    loss, logits, *gradients = _ops.linear_cross_entropy(pooled, linear.weight, linear.bias, labels, *options)
    if weight != 1:
        for value in (loss, *gradients):
            value.mul_(weight)
    if scale is not None:
        for value in gradients:
            value.mul_(scale)
    return logits, loss, *(gradients if linear.bias is not None else gradients[:-1])
