"""PooledNorm: BatchNorm in training mode, ReLU and max-pool in one, as in the stem of a ResNet."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ...ops.batch_norm_act_max_pool import pool_window
from ..node import Node
from ..tensors import like
from .activation import is_relu
from .max_pool import plain_max_pool, pool_at
from .norm import affine, batch_statistics, is_plain_norm, plain_batch_norm, statistics

__all__ = ["PooledNorm"]

_ops = torch.ops.auglocal_ext


@dataclass(frozen=True)
class PooledNorm(Node):
    """out = max_pool(relu(bn(source))): keeps the source, and one byte for each output."""

    source: str
    bn: nn.BatchNorm2d
    pool: nn.MaxPool2d

    @property
    def parameters(self):
        return affine(self.bn)

    @classmethod
    def match(cls, at):
        bn, relu = at.module(), at.only_reader(at.node)
        if not is_plain_norm(bn, nn.BatchNorm2d) or at.node.kwargs or relu is None or not is_relu(relu, at):
            return None
        behind = at.only_reader(relu)
        pool = None if behind is None else pool_at(at, behind)
        if pool is None:
            return None
        return cls(at.out, at.part, at.values[at.node.args[0]], bn, pool), behind

    def plain(self, x):
        return plain_max_pool(self.pool, F.relu(plain_batch_norm(self.bn, x)))

    def forward(self, emit):
        made, of_batch = [self.out, f"{self.out}.index"], statistics(self)
        emit.step(self, "statistics", partial(batch_statistics, self.bn), [self.source], of_batch)
        emit.step(self, "pool", partial(_pool, self), [self.source, *of_batch], made)
        emit.derive(self, "rebuild", partial(_rebuild, self), [self.source, *of_batch], made)

    def backward(self, emit):
        reads = [emit.take(self.out), self.source, f"{self.out}.index", *statistics(self)]
        reads += [self.out] if self.out == emit.features else []
        writes = [emit.give(self.source), *emit.gradient_names(self.bn.weight, self.bn.bias)]
        emit.step(self, "pool backward", partial(_backward, self, emit.owns(self.source)), reads, writes)

    @classmethod
    def samples(cls):
        pools = nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d((2, 3), (1, 2), (1, 0))
        return tuple(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), pool) for pool in pools)


def _pool(node, x, mean, var):
    return _ops.batch_norm_act_max_pool_apply(x, *affine(node.bn), mean, var, node.bn.eps, *pool_window(x, node.pool))


def _rebuild(node, over, *reads):
    return _pool(node, *reads)


def _backward(node, over, grad, x, index, mean, var, _output=None):
    dx, window = x if over else torch.empty_like(x), pool_window(x, node.pool)[:6]
    given = (like(grad, x), x, index, *affine(node.bn), mean, var, node.bn.eps, *window, dx)
    return dx, *_ops.batch_norm_act_max_pool_backward_out(*given)
