"""GlobalPool: the mean of each channel's map, which keeps nothing: its gradient is one value for all of a map."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.utils import _pair

from ...ops.batch_norm_act import memory_format
from ..node import Node

__all__ = ["GlobalPool"]

_MAPS = {(2, 3), (3, 2), (-2, -1), (-1, -2)}


@dataclass(frozen=True)
class GlobalPool(Node):
    """out = the mean over height and width, (N, C, 1, 1), or (N, C).

    adaptive: whether it is torch's adaptive pool, or its mean.
    """

    source: str
    adaptive: bool
    keepdim: bool

    keeps_its_source = False

    @classmethod
    def match(cls, at):
        node, pool = at.node, at.calls(nn.AdaptiveAvgPool2d)
        if len(node.all_input_nodes) != 1:
            return None
        if pool is not None:
            size = pool.output_size
        elif node.target is F.adaptive_avg_pool2d and len(node.args) == 2 and not node.kwargs:
            size = node.args[1]
        else:
            keepdim = _mean_keepdim(node)
            return None if keepdim is None else (cls(at.out, at.part, at.source(), False, keepdim), node)
        return (cls(at.out, at.part, at.source(), True, True), node) if _pair(size) == (1, 1) else None

    def plain(self, x):
        return F.adaptive_avg_pool2d(x, 1) if self.adaptive else x.mean((2, 3), self.keepdim)

    def forward(self, emit):
        emit.step(self, "global pool", self._run, [self.source], [self.out, f"{self.out}.like"])

    def _run(self, x):
        """(the means, the shape and layout of x)"""
        return self.plain(x), (x.shape, memory_format(x))

    def backward(self, emit):
        reads = [emit.take(self.out), f"{self.out}.like"]
        emit.contribute(self, "global pool backward", _spread, _add, reads, self.source)

    @classmethod
    def samples(cls):
        return nn.Sequential(nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1)), _Both(), _Mean()


def _mean_keepdim(node):
    """Whether the mean of maps that an fx node computes keeps their dimensions; None: it computes no such mean."""
    known = {"call_method": "mean", "call_function": torch.mean}.get(node.op)
    given = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | node.kwargs
    dims = given.pop("dim", None)
    if node.target != known or not isinstance(dims, list | tuple) or tuple(dims) not in _MAPS:
        return None
    keepdim = given.pop("keepdim", False)
    return keepdim if isinstance(keepdim, bool) and not given and len(node.args) <= 3 else None


def _of_each(grad, shape):
    """The gradient of every value of a map, with one value for each map."""
    return (grad / (shape[2] * shape[3])).view(*shape[:2], 1, 1)


def _spread(grad, like):
    shape, layout = like
    dx = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)
    return dx.copy_(_of_each(grad, shape))


def _add(total, grad, like):
    return total.add_(_of_each(grad, like[0]))


class _Both(nn.Module):
    """For `samples`: a squeeze-excitation, whose map has another reader."""

    def __init__(self):
        super().__init__()
        self.norm, self.act, self.conv, self.gate = nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 4, 1), nn.Sigmoid()

    def forward(self, x):
        x = self.act(self.norm(x))
        return self.gate(self.conv(F.adaptive_avg_pool2d(x, (1, 1)))) * x


class _Mean(nn.Module):
    """For `samples`: means as methods and functions, the first reader of a map being one."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = self.conv(x)
        z = torch.mean(y, dim=(-1, -2), keepdim=True)
        return (self.conv(y) + z).mean([2, 3]).view(-1, 4, 1, 1) + z
