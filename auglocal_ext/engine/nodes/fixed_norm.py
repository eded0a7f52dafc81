"""FixedNorm: BatchNorm by statistics that do not change, with what is elementwise behind it."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from ...common.torchvision import import_torchvision
from ..node import Node, is_torchvisions
from ..tensors import dense, like
from .activation import Function
from .norm import ResidualSample, affine, chain_at, fused, is_fixed_norm, plain_batch_norm

__all__ = ["FixedNorm"]

_aten, _ops = torch.ops.aten, torch.ops.auglocal_ext


@dataclass(frozen=True)
class FixedNorm(Node):
    """out = [function](bn(source) [+ residual]), bn in eval mode, or torchvision's FrozenBatchNorm2d; with a residual
    the function is a ReLU or none.

    Keeps the source, where the backward needs that or the output, which is dropped after its last reader and rebuilt.
    The backward writes over the incoming gradient; with a residual it writes the source's over the source, where nobody
    else reads that.
    """

    source: str
    bn: nn.Module
    function: Function | None
    residual: str | None = None

    @property
    def sources(self):
        return (self.source,) if self.residual is None else (self.source, self.residual)

    @property
    def parameters(self):
        return affine(self.bn)

    @classmethod
    def takes_whole(cls, module):
        return is_torchvisions(module, "ops.misc.FrozenBatchNorm2d")

    @classmethod
    def match(cls, at):
        return chain_at(cls, at) if is_fixed_norm(at.module()) else None

    def plain(self, x, residual=None):
        # torch's, as `plain_batch_norm`; of torchvision's class its own forward.
        y = type(self.bn).forward(self.bn, x) if self.takes_whole(self.bn) else plain_batch_norm(self.bn, x)
        y = y if residual is None else y + residual
        return y if self.function is None else self.function(y)

    def forward(self, emit):
        emit.step(self, "norm", partial(_again, self, ()), self.sources, [self.out])
        emit.derive(self, "rebuild", partial(_again, self), self.sources, [self.out], like=self.source)

    def backward(self, emit):
        function, waits, reads = self.function, self.source not in emit.constants, [emit.take(self.out)]
        by_output = function is not None and function.by_output
        if by_output:
            reads.append(self.out)
        if self.trains or (function is not None and not by_output):
            reads.append(self.source)
        writes = [emit.give(self.source)] if waits else []
        goes_on, over = self.residual is not None and self.residual not in emit.constants, False
        if goes_on:
            writes.append(emit.give(self.residual))
            over = waits and len(reads) > 1 and emit.owns(self.source)
        if over and self.source not in reads:
            reads.append(self.source)
        if self.out == emit.features and self.out not in reads:
            reads.append(self.out)  # made again here, to be handed on
        writes += emit.gradient_names(*self.parameters) if self.trains else []
        run = partial(_backward, self, by_output, self.source in reads, waits, goes_on, over)
        emit.step(self, "norm backward", run, reads, writes)

    @classmethod
    def samples(cls):
        acts = nn.ReLU(True), nn.SiLU(), nn.LeakyReLU(0.2), nn.Hardswish()
        samples = [
            _fixed(nn.BatchNorm2d(4)),
            *(nn.Sequential(_fixed(nn.BatchNorm2d(4)), act, nn.Conv2d(4, 4, 1)) for act in acts),
            nn.Sequential(nn.Conv2d(4, 4, 1), _fixed(nn.BatchNorm2d(4)), nn.GELU("tanh"), nn.MaxPool2d(2)),
            ResidualSample(_fixed(nn.BatchNorm2d(4)), nn.ReLU()),
            nn.Sequential(ResidualSample(_fixed(nn.BatchNorm2d(4)), nn.Identity()), nn.Conv2d(4, 4, 1)),
        ]
        try:
            frozen = import_torchvision("a norm that is never trained").ops.FrozenBatchNorm2d
        except ImportError:
            return tuple(samples)
        return *samples, nn.Sequential(_fixed(frozen(4)), nn.ReLU()), ResidualSample(_fixed(frozen(4)), nn.ReLU())


def _fixed(bn):
    """A BatchNorm in eval mode with other statistics than it begins with, for `samples`."""
    with torch.no_grad():
        bn.running_mean.copy_(torch.linspace(-0.3, 0.3, 4))
        bn.running_var.copy_(torch.linspace(0.5, 2.0, 4))
        bn.weight.copy_(torch.linspace(-1.0, 2.0, 4))
    return bn.eval()


def _again(node, over, x, residual=None):
    """The output, written over what may be."""
    residual = None if residual is None else like(residual, x)
    out = next((read for read, may in zip((x, residual), over, strict=False) if may), None)
    return _apply(node.bn, fused(node.function), x, residual, torch.empty_like(x) if out is None else out)


def _apply(bn, act, x, residual, out):
    given = bn.running_mean, bn.running_var, residual, bn.eps
    _ops.batch_norm_act_apply_out(x, *affine(bn), *given, act[0], out, act[1])
    return out


def _scaled(bn, grad, out):
    """The gradient of bn's source, from that of its output."""
    nothing = torch.zeros_like(bn.running_mean)
    given = bn.weight, nothing, nothing, bn.running_var, None, bn.eps
    _ops.batch_norm_act_apply_out(grad, *given, fused(None)[0], out, fused(None)[1])
    return out


def _backward(node, by_output, has_source, waits, goes_on, over, grad, *values):
    """The gradients that are wanted: the source's, the residual's, weight's and bias's."""
    bn, function, made = node.bn, node.function, []
    x = values[int(by_output)] if has_source else None
    if function is None:
        grad = dense(grad) if x is None else like(grad, x)
    else:
        value = values[0] if by_output else _apply(bn, fused(None), x, None, torch.empty_like(x))
        grad = function.backward(like(grad, value), value)
        del value
    parameters = []
    if node.trains:
        given = bn.weight, bn.running_mean, bn.running_var, None, None, False, bn.eps, (False, True, True)
        parameters = _aten.native_batch_norm_backward(grad, x, *given)[1:]
    if waits:
        made.append(_scaled(bn, grad, x if over else torch.empty_like(grad) if goes_on else grad))
    if goes_on:
        made.append(grad)
    made += parameters
    return made[0] if len(made) == 1 else made
