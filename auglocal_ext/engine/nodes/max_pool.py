"""MaxPool: a max-pool that keeps one byte for each output, the place of the maximum in its window."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.utils import _pair

from ...ops.batch_norm_act import memory_format
from ..node import Node

__all__ = ["MaxPool", "derive_pool", "plain_max_pool", "pool_at"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class MaxPool(Node):
    """out = max_pool(source)"""

    source: str
    pool: nn.MaxPool2d

    @classmethod
    def match(cls, at):
        pool = pool_at(at)
        return None if pool is None else (cls(at.out, at.part, at.source(), pool), at.node)

    def plain(self, x):
        return plain_max_pool(self.pool, x)

    def forward(self, emit):
        made = [self.out, f"{self.out}.place", f"{self.out}.like"]
        emit.step(self, "max pool", partial(_max_pool, self.pool), [self.source], made)
        derive_pool(self, emit)

    def backward(self, emit):
        reads = [emit.take(self.out), f"{self.out}.place", f"{self.out}.like"]
        emit.step(self, "max pool backward", partial(_backward, self.pool), reads, [emit.give(self.source)])

    @classmethod
    def samples(cls):
        pools = nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d((2, 3), (1, 2), (1, 0))
        return (
            *(nn.Sequential(nn.Conv2d(4, 4, 1), pool) for pool in pools),
            nn.Sequential(pools[0], nn.Conv2d(4, 4, 1)),
            nn.Sequential(nn.BatchNorm2d(4), _Function(), nn.Conv2d(4, 4, 1)),
        )


class _Function(nn.Module):
    """As a function, for `samples`; of the two one is not smaller than its source."""

    def forward(self, x):
        return F.max_pool2d(F.max_pool2d(x, 3, stride=1, padding=1), kernel_size=2)


def pool_at(at, node=None):
    """The max-pool of an fx node, a module, where it is one whose places fit in a byte; else None."""
    pool = at.as_module(nn.MaxPool2d, F.max_pool2d, node)
    plain = pool is not None and pool.dilation in (1, (1, 1)) and not pool.return_indices
    return pool if plain and max(_pair(pool.kernel_size)) <= 16 else None


def derive_pool(node, emit):
    """Lets a pool's output be dropped where it is as large as its source, and that is no convolution's, to be kept for
    this alone."""
    if _pair(node.pool.stride) == (1, 1) and not emit.owns(node.source):
        emit.derive(node, "rebuild", partial(_again, node), [node.source], [node.out])


def _again(node, _over, x):
    return node.plain(x)


def plain_max_pool(pool, x):
    return F.max_pool2d(x, pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)


def _max_pool(pool, x):
    """(max_pool(x), the place of each maximum in its window, the shape and layout of x)"""
    geometry = pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode
    y, index = _aten.max_pool2d_with_indices(x, *geometry)
    kernel_w, width = _pair(pool.kernel_size)[1], x.shape[3]
    row = index.div(width, rounding_mode="floor")
    place = index.add_(row, alpha=kernel_w - width).sub_(_window_starts(pool, y, kernel_w))
    return y, place.to(torch.uint8), (x.shape, memory_format(x))


def _backward(pool, grad, place, like):
    (shape, layout), kernel_w = like, _pair(pool.kernel_size)[1]
    index = place.long().add_(place // kernel_w, alpha=shape[3] - kernel_w)
    index.add_(_window_starts(pool, place, shape[3]))
    dx = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)
    geometry = pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode
    # Of the pool's input it takes the shape alone, so that dx can stand for it.
    given = grad.contiguous(memory_format=layout), dx, *geometry, index
    return _aten.max_pool2d_with_indices_backward.grad_input(*given, grad_input=dx)


def _window_starts(pool, y, width):
    """Where each window of a pool begins, counted along rows of `width`; goes with a map of the pool's outputs."""
    (stride_h, stride_w), (padding_h, padding_w) = _pair(pool.stride), _pair(pool.padding)
    rows, columns = (torch.arange(size, device=y.device) for size in y.shape[2:])
    return (rows[:, None] * stride_h - padding_h) * width + columns * stride_w - padding_w
