"""Chunk: one of the parts that a map is cut into: a copy, so that the map can go, dropped and made again."""

import operator
from dataclasses import dataclass

import torch
import torch.fx
from torch import nn

from ...ops.batch_norm_act import memory_format
from ..node import Node

__all__ = ["Chunk", "is_cut"]


@dataclass(frozen=True)
class Chunk(Node):
    """out = source.chunk(chunks, dim)[index]; its gradient is a part of the source's."""

    source: str
    chunks: int
    dim: int
    index: int

    @classmethod
    def match(cls, at):
        node = at.node
        cut = node.args[0] if node.target is operator.getitem else None
        if not isinstance(cut, torch.fx.Node) or not is_cut(cut):
            return None
        return cls(at.out, at.part, at.values[cut], *_cut(cut), node.args[1]), node

    def plain(self, x):
        return x.chunk(self.chunks, self.dim)[self.index]

    def forward(self, emit):
        emit.step(self, "chunk", self._run, [self.source], [self.out, f"{self.out}.like"])
        emit.derive(self, "rebuild", self._again, [self.source], [self.out])

    def _run(self, x):
        """(out, the shape and layout of x)"""
        return self._copy(x), (x.shape, memory_format(x))

    def _again(self, over, x):
        return self._copy(x)

    def _copy(self, x):
        return self.plain(x).clone(memory_format=memory_format(x))

    def backward(self, emit):
        reads = [emit.take(self.out), f"{self.out}.like"]
        emit.contribute(self, "chunk backward", self._first, self._add, reads, self.source)

    def _first(self, grad, like):
        shape, layout = like
        dx = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout).zero_()
        self.plain(dx).copy_(grad)
        return dx

    def _add(self, total, grad, _like):
        self.plain(total).add_(grad)
        return total

    @classmethod
    def samples(cls):
        return nn.Sequential(nn.SiLU(), _Halves(), nn.Conv2d(4, 4, 1)), nn.Sequential(_One(), nn.Conv2d(2, 4, 1))


def is_cut(node):
    """Whether an fx node cuts a map into chunks, of which its readers take one each."""
    return _cut(node) is not None and all(
        user.target is operator.getitem and user.args[0] is node and isinstance(user.args[1], int)
        for user in node.users
    )


def _cut(node):
    """(chunks, dim) of an fx node that cuts a map, or None."""
    known = {"call_method": "chunk", "call_function": torch.chunk}.get(node.op)
    given = {"dim": 0} | dict(zip(("chunks", "dim"), node.args[1:], strict=False)) | node.kwargs
    if node.target != known or given.keys() != {"chunks", "dim"} or len(node.all_input_nodes) != 1:
        return None
    return given["chunks"], given["dim"]


class _Halves(nn.Module):
    """For `samples`: a block of which one half goes around, as in a ShuffleNet."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(inplace=True))

    def forward(self, x):
        a, b = x.chunk(2, dim=1)
        return torch.cat((a, self.branch(b)), dim=1)


class _One(nn.Module):
    """For `samples`: a map one part of which has a reader, beside one of the whole."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = self.norm(x)
        return torch.chunk(x, 3, 1)[0] + self.conv(x)
