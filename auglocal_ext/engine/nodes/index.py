"""Index: a part of its source, as the token x[:, 0] that a classifier reads; a copy, so that the rest can go."""

import operator
from dataclasses import dataclass

from torch import nn

from ...ops.batch_norm_act import memory_format
from ..node import Node

__all__ = ["Index"]


@dataclass(frozen=True)
class Index(Node):
    """out = source[index]

    index: of integers, slices and Ellipsis. With an integer the output is one of many, and kept until its last reader;
    else it is dropped like what is elementwise, and made again.
    """

    source: str
    index: tuple

    keeps_its_source = False

    @classmethod
    def match(cls, at):
        node = at.node
        found = node.op == "call_function" and node.target is operator.getitem and len(node.all_input_nodes) == 1
        if not found or node.args[0] not in at.values or not _is_part(node.args[1]):
            return None
        return cls(at.out, at.part, at.source(), tuple(node.args[1])), node

    def plain(self, x):
        return x[self.index]

    def forward(self, emit):
        emit.step(self, "index", self._run, [self.source], [self.out, f"{self.out}.like"])
        if not any(isinstance(at, int) for at in self.index):
            emit.derive(self, "rebuild", self._again, [self.source], [self.out])

    def _run(self, x):
        """(a copy of the part, the shape and layout of x)"""
        return self.plain(x).clone(), (x.shape, memory_format(x))

    def _again(self, over, x):
        return self.plain(x).clone()

    def backward(self, emit):
        reads = [emit.take(self.out), f"{self.out}.like"]
        emit.contribute(self, "index backward", self._first, self._add, reads, self.source)

    def _first(self, grad, like):
        shape, layout = like
        dx = grad.new_zeros(shape).contiguous(memory_format=layout)
        return self._add(dx, grad, like)

    def _add(self, total, grad, like):
        total[self.index].add_(grad)
        return total

    @classmethod
    def samples(cls):
        return (
            nn.Sequential(nn.Conv2d(4, 4, 1), nn.Flatten(2), nn.LayerNorm(42), nn.Linear(42, 6), _Token()),
            nn.Sequential(nn.BatchNorm2d(4), _Corners(), nn.Conv2d(4, 4, 1)),
        )


class _Token(nn.Module):
    """For `samples`: one token of those that had another added."""

    def forward(self, x):
        return (x + x[:, 1:2])[:, -1]


class _Corners(nn.Module):
    """For `samples`: parts of a map that share values."""

    def forward(self, x):
        return x[..., :6:2, 1:] * x[:, :, 1::2, :-1]


def _is_part(index):
    """Whether it is a tuple of integers, slices between integers, and Ellipsis."""
    if not isinstance(index, tuple | list):
        return False
    bounds = [bound for at in index if isinstance(at, slice) for bound in (at.start, at.stop, at.step)]
    others = [at for at in index if not isinstance(at, slice) and at is not Ellipsis]
    return all(isinstance(bound, int | None) for bound in bounds) and all(type(at) is int for at in others)
