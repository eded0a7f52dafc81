"""Conv: a convolution, kept for the backward by its output alone."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ..node import Node, computes, has_own_weight
from ..tensors import as_gradient, lower

__all__ = ["Conv", "is_plain_conv", "keeps_size"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class Conv(Node):
    """out = conv(source)

    The weight gradient comes first, the data gradient second, so that a source that was rebuilt for the one is gone
    before the other is born.
    """

    source: str
    conv: nn.Conv2d

    output_is_ours = True
    data_gradient_waits = True

    @property
    def parameters(self):
        return self.conv.weight, self.conv.bias

    @classmethod
    def match(cls, at):
        conv = at.module()
        if is_plain_conv(conv) and not at.node.kwargs:
            return cls(at.out, at.part, at.values[at.node.args[0]], conv), at.node
        return None

    def plain(self, x):
        c = self.conv
        return F.conv2d(x, c.weight, c.bias, c.stride, c.padding, c.dilation, c.groups)

    def forward(self, emit):
        macs = self._macs_of_writes
        emit.step(self, "conv", partial(_conv, self.conv, emit.autocast), [self.source], [self.out], macs)
        if self.part in emit.recomputed:
            again = partial(_conv_again, self.conv, emit.autocast)
            emit.derive(self, "recompute", again, [self.source], [self.out], macs, by_convolution=True)

    def backward(self, emit):
        if self.trains:
            run, reads = partial(_weight_gradient, self.conv, emit.autocast), [emit.gradient_of(self.out), self.source]
            writes = emit.gradient_names(self.conv.weight, self.conv.bias)
            emit.step(self, "weight gradient", run, reads, writes, self._macs_of_reads)
        if self.source in emit.constants:
            emit.take(self.out)
        else:
            emit.postpone(self.source, partial(self._data_gradient, emit))

    def _data_gradient(self, emit):
        reads = [emit.take(self.out), emit.layout_of(self.source)]
        run, writes = partial(_data_gradient, self.conv), [emit.give(self.source)]
        emit.step(self, "data gradient", run, reads, writes, self._macs_of_reads)

    def _macs_of_writes(self, reads, writes):
        return self._macs(writes[0])

    def _macs_of_reads(self, reads, writes):
        return self._macs(reads[0])

    def _macs(self, output):
        """Of one pass: the output's elements, or its gradient's, times the weights that make one."""
        return output.numel() * self.conv.weight[0].numel()

    @classmethod
    def samples(cls):
        return (
            nn.Conv2d(4, 6, 3, 2, 1),
            nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 8, (3, 1), padding=(1, 0), groups=2)),
            nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4),
            nn.Sequential(nn.Conv2d(4, 8, (1, 7), padding="same", groups=4), nn.Conv2d(8, 4, 3, padding="valid")),
        )


def is_plain_conv(module):
    return (
        computes(module, nn.Conv2d)
        and module.padding_mode == "zeros"
        and _padding(module) is not None
        and has_own_weight(module)
    )


def keeps_size(conv):
    """Whether a plain convolution's output has the height and width of its input."""
    sides = zip(_padding(conv), conv.dilation, conv.kernel_size, strict=True)
    return tuple(conv.stride) == (1, 1) and all(
        2 * padding == dilation * (size - 1) for padding, dilation, size in sides
    )


def _padding(conv):
    """The rows and columns on each side, or None: they differ, and torch pads a copy of the map."""
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding != "same":
        return conv.padding
    both = [dilation * (size - 1) for dilation, size in zip(conv.dilation, conv.kernel_size, strict=True)]
    return None if any(total % 2 for total in both) else tuple(total // 2 for total in both)


def _geometry(conv):
    return conv.stride, _padding(conv), conv.dilation, False, (0, 0), conv.groups


def _conv(conv, autocast, x):
    x = lower(x, autocast)
    bias = None if conv.bias is None else conv.bias.to(x.dtype)
    return _aten.convolution(x, conv.weight.to(x.dtype), bias, *_geometry(conv))


def _conv_again(conv, autocast, _over, x):
    return _conv(conv, autocast, x)


def _weight_gradient(conv, autocast, grad, x):
    x = lower(x, autocast)
    grad = grad.to(x.dtype)
    sizes, mask = (None, (False, True, False)) if conv.bias is None else (conv.bias.shape, (False, True, True))
    weight = conv.weight.to(x.dtype)
    _, dweight, dbias = _aten.convolution_backward(grad, x, weight, sizes, *_geometry(conv), mask)
    dweight = as_gradient(dweight, conv.weight)
    return dweight if dbias is None else (dweight, as_gradient(dbias, conv.bias))


def _data_gradient(conv, grad, like):
    weight, dtype = conv.weight.to(grad.dtype), like.dtype
    like = like if dtype == grad.dtype else torch.empty_like(like, dtype=grad.dtype)
    mask = (True, False, False)
    return _aten.convolution_backward(grad, like, weight, None, *_geometry(conv), mask)[0].to(dtype)
