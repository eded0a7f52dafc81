"""Concat: pieces side by side, which are kept once: what they make together is dropped, and made again."""

import itertools
from dataclasses import dataclass

import torch
import torch.fx
from torch import nn

from ..node import Node

__all__ = ["Concat"]


@dataclass(frozen=True)
class Concat(Node):
    """out = cat(sources, dim). The gradients of the pieces are views of its own, each free to be written over."""

    sources: tuple[str, ...] = ()
    dim: int = 1

    @classmethod
    def match(cls, at):
        node = at.node
        given = dict(zip(("tensors", "dim"), node.args, strict=False)) | node.kwargs
        tensors, dim = given.pop("tensors", None), given.pop("dim", 0)
        if node.op != "call_function" or node.target not in (torch.cat, torch.concat) or given:
            return None
        if not isinstance(tensors, list | tuple) or not isinstance(dim, int):
            return None
        if not all(isinstance(x, torch.fx.Node) and x in at.values for x in tensors):
            return None
        return cls(at.out, at.part, tuple(at.values[x] for x in tensors), dim), node

    def plain(self, *values):
        return torch.cat(values, self.dim)

    def forward(self, emit):
        emit.step(self, "concat", self._run, self.sources, [self.out, f"{self.out}.pieces"])
        emit.derive(self, "rebuild", self._again, self.sources, [self.out])

    def _run(self, *values):
        """(out, the size and dtype of each piece)"""
        return self.plain(*values), tuple((x.shape[self.dim], x.dtype) for x in values)

    def _again(self, over, *values):
        return self.plain(*values)

    def backward(self, emit):
        wanted = tuple(name not in emit.constants for name in self.sources)
        gives = [emit.give(name) for name in itertools.compress(self.sources, wanted)]
        reads = [emit.take(self.out), f"{self.out}.pieces"]
        emit.step(self, "concat backward", _Split(self.dim, wanted), reads, gives)

    @classmethod
    def samples(cls):
        return _Dense(), nn.Sequential(_Branches(), nn.Conv2d(7, 4, 1)), _Same()


@dataclass(frozen=True)
class _Split:
    dim: int
    wanted: tuple[bool, ...]

    def __call__(self, grad, pieces):
        made = grad.split([size for size, _ in pieces], self.dim)
        made = [x.to(dtype) for x, (_, dtype), w in zip(made, pieces, self.wanted, strict=True) if w]
        return made[0] if len(made) == 1 else made


class _Dense(nn.Module):
    """For `samples`: layers that each read all before them, as in a DenseNet."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(inplace=True), nn.Conv2d(c, 2, 3, padding=1)) for c in (4, 6, 8)
        )

    def forward(self, x):
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, dim=1)


class _Branches(nn.Module):
    """For `samples`: convolutions of one map, and the map itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.relu = nn.Conv2d(4, 1, 1), nn.Conv2d(4, 2, 3, padding=1), nn.ReLU()

    def forward(self, x):
        return torch.cat((self.relu(self.a(x)), x, self.b(x)), -3)


class _Same(nn.Module):
    """For `samples`: a map beside itself, and rows one below another."""

    def forward(self, x):
        return torch.concat([torch.cat([x, x], dim=1), torch.cat([x.tanh(), x], 1)], 2)
