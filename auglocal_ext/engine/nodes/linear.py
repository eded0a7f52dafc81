"""Linear: a linear layer of what is last in its source, kept for the backward by its output alone."""

from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import nn

from ..node import Node, computes, has_own_weight
from ..tensors import as_gradient, lower

__all__ = ["Linear", "is_plain_linear", "linear", "linear_data_gradient", "linear_weight_gradient"]


@dataclass(frozen=True)
class Linear(Node):
    """out = linear(source), (..., C) -> (..., K)

    The weight gradient comes first, the data gradient second, so that a source that was rebuilt for the one is gone
    before the other is born.
    """

    source: str
    linear: nn.Linear

    output_is_ours = True
    data_gradient_waits = True

    @property
    def parameters(self):
        return self.linear.weight, self.linear.bias

    @classmethod
    def match(cls, at):
        found = at.calls(nn.Linear)
        return (cls(at.out, at.part, at.source(), found), at.node) if is_plain_linear(found) else None

    def plain(self, x):
        return F.linear(x, self.linear.weight, self.linear.bias)

    def forward(self, emit):
        macs = self._macs_of_writes
        run = partial(_forward, self.linear, emit.autocast)
        emit.step(self, "linear", run, [self.source], [self.out, f"{self.out}.dtype"], macs)
        if self.part in emit.recomputed:
            again = partial(_again, self.linear, emit.autocast)
            emit.derive(self, "recompute", again, [self.source], [self.out], macs, by_convolution=True)

    def backward(self, emit):
        if self.trains:
            run, reads = (
                partial(_weight_gradient, self.linear, emit.autocast),
                [emit.gradient_of(self.out), self.source],
            )
            writes = emit.gradient_names(self.linear.weight, self.linear.bias)
            emit.step(self, "weight gradient", run, reads, writes, self._macs_of_reads)
        if self.source in emit.constants:
            emit.take(self.out)
        else:
            emit.postpone(self.source, partial(self._data_gradient, emit))

    def _data_gradient(self, emit):
        reads, writes = [emit.take(self.out), f"{self.out}.dtype"], [emit.give(self.source)]
        emit.step(self, "data gradient", partial(_data_gradient, self.linear), reads, writes, self._macs_of_reads)

    def _macs_of_writes(self, reads, writes):
        return writes[0].numel() * self.linear.in_features

    def _macs_of_reads(self, reads, writes):
        return reads[0].numel() * self.linear.in_features

    @classmethod
    def samples(cls):
        return (
            nn.Sequential(nn.Flatten(2), nn.Linear(42, 6), nn.Linear(6, 5, bias=False)),
            nn.Sequential(nn.BatchNorm2d(4), nn.Linear(6, 6), nn.BatchNorm2d(4), nn.ReLU()),
            nn.Sequential(_Last(), nn.Linear(4, 8), _Last()),
            nn.Sequential(nn.Flatten(1), nn.Linear(168, 6), nn.Unflatten(1, (2, 3, 1))),
        )


class _Last(nn.Module):
    """(N, C, H, W) -> (N, H, W, C), for `samples`."""

    def forward(self, x):
        return x.permute(0, 2, 3, 1)


def is_plain_linear(module):
    return computes(module, nn.Linear) and has_own_weight(module)


def linear(x, weight, bias):
    """F.linear of x (..., C), as one product of matrices whatever the strides of x."""
    bias = None if bias is None else bias.to(x.dtype)
    return F.linear(x.reshape(-1, x.shape[-1]), weight.to(x.dtype), bias).view(*x.shape[:-1], weight.shape[0])


def linear_weight_gradient(grad, x, weight, bias):
    """The gradients of weight (K, C) and bias (K,), of the latter where there is one; x: (..., C), grad: (..., K)."""
    grad = grad.to(x.dtype).reshape(-1, grad.shape[-1])
    dweight = as_gradient(grad.t().mm(x.reshape(-1, x.shape[-1])), weight)
    return dweight if bias is None else (dweight, as_gradient(grad.sum(0), bias))


def linear_data_gradient(grad, weight):
    """The gradient (..., C) of what a weight (K, C) was multiplied by; grad: (..., K)."""
    dx = grad.reshape(-1, grad.shape[-1]).mm(weight.to(grad.dtype))
    return dx.view(*grad.shape[:-1], weight.shape[1])


def _forward(module, autocast, x):
    """(linear(x), the dtype of x)"""
    return linear(lower(x, autocast), module.weight, module.bias), x.dtype


def _again(module, autocast, _over, x):
    return _forward(module, autocast, x)[0]


def _weight_gradient(module, autocast, grad, x):
    return linear_weight_gradient(grad, lower(x, autocast), module.weight, module.bias)


def _data_gradient(module, grad, dtype):
    return linear_data_gradient(grad, module.weight).to(dtype)
