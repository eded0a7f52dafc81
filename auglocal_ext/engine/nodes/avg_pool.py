"""AvgPool: an average-pool, which keeps nothing: its gradient is spread over the windows."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ...ops.batch_norm_act import memory_format
from ..node import Node
from .max_pool import derive_pool

__all__ = ["AvgPool"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class AvgPool(Node):
    """out = avg_pool(source)

    The output stays until its last reader: it is smaller than what it is made of, which can go. Where it is not, it is
    dropped and made again.
    """

    source: str
    pool: nn.AvgPool2d

    keeps_its_source = False

    @classmethod
    def match(cls, at):
        pool = at.as_module(nn.AvgPool2d, F.avg_pool2d)
        return None if pool is None else (cls(at.out, at.part, at.source(), pool), at.node)

    def plain(self, x):
        return F.avg_pool2d(x, *_settings(self.pool))

    def forward(self, emit):
        emit.step(self, "average pool", partial(_avg_pool, self.pool), [self.source], [self.out, f"{self.out}.like"])
        derive_pool(self, emit)

    def backward(self, emit):
        reads, run = [emit.take(self.out), f"{self.out}.like"], partial(_backward, self.pool)
        emit.step(self, "average pool backward", run, reads, [emit.give(self.source)])

    @classmethod
    def samples(cls):
        pools = nn.AvgPool2d(2), nn.AvgPool2d(3, 2, 1, ceil_mode=True), nn.AvgPool2d((2, 3), count_include_pad=False)
        pools = *pools, _Function()
        return tuple(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), pool, nn.Conv2d(4, 4, 1)) for pool in pools)


class _Function(nn.Module):
    """As a function, for `samples`; of the two one is not smaller than its source."""

    def forward(self, x):
        return F.avg_pool2d(F.avg_pool2d(x, kernel_size=3, stride=1, padding=1), 2)


def _settings(pool):
    settings = pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode, pool.count_include_pad
    return *settings, pool.divisor_override


def _avg_pool(pool, x):
    """(avg_pool(x), the shape and layout of x)"""
    return F.avg_pool2d(x, *_settings(pool)), (x.shape, memory_format(x))


def _backward(pool, grad, like):
    (shape, layout), settings = like, _settings(pool)
    dx = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)
    # Of the pool's input it takes the shape alone, so that dx can stand for it.
    return _aten.avg_pool2d_backward.grad_input(grad.contiguous(memory_format=layout), dx, *settings, grad_input=dx)
