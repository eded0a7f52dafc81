"""Dropout: values, or with stochastic depth whole maps, dropped at random: of the choice a byte each is kept."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..dropping import VALUES, dropping_at
from ..node import Node

__all__ = ["Dropout"]


@dataclass(frozen=True)
class Dropout(Node):
    """out = source x noise: 0 with probability p, else 1 / (1 - p), for each value, each image ("row") or for all
    ("batch"). The same random numbers as torch's and torchvision's modules draw."""

    source: str
    p: float
    what: str

    @classmethod
    def match(cls, at):
        found = dropping_at(at.node, at.module())
        # With p = 1 torch draws nothing.
        if found is None or not 0 < found.p < 1 or not found.training or found.what not in (VALUES, "row", "batch"):
            return None
        if found.inplace and at.only_reader(at.node.all_input_nodes[0]) is not at.node:  # it changes what others read
            return None
        return cls(at.out, at.part, at.source(), found.p, found.what), at.node

    def plain(self, x):
        return F.dropout(x, self.p) if self.what == VALUES else x * self._noise(x)

    def _noise(self, x):
        size = [x.shape[0] if self.what == "row" else 1] + [1] * (x.dim() - 1)
        return torch.empty(size, dtype=x.dtype, device=x.device).bernoulli_(1 - self.p).div_(1 - self.p)

    def forward(self, emit):
        emit.step(self, "dropout", self._drop, [self.source], [self.out, f"{self.out}.noise"])
        emit.derive(self, "rebuild", self._again, [self.source, f"{self.out}.noise"], [self.out], like=self.source)

    def _drop(self, x):
        """(out, of values whether each is kept, else the noise)"""
        if self.what != VALUES:
            noise = self._noise(x)
        elif x.is_cuda:
            noise = torch.native_dropout(x, self.p, True)[1]
        else:
            noise = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - self.p)
        return self._dropped(x, noise, torch.empty_like(x)), noise

    def _dropped(self, x, noise, out):
        torch.mul(x, noise, out=out)
        if self.what == VALUES:  # the scale in as many bits as torch's noise has
            out.mul_(torch.ones((), dtype=x.dtype, device=x.device).div_(1 - self.p))
        return out

    def _again(self, over, x, noise):
        return self._dropped(x, noise, x if over[0] else torch.empty_like(x))

    def backward(self, emit):
        reads = [emit.take(self.out), f"{self.out}.noise"]
        emit.step(self, "dropout backward", self._backward, reads, [emit.give(self.source)])

    def _backward(self, grad, noise):
        return self._dropped(grad, noise, grad)

    @classmethod
    def samples(cls):
        return (
            nn.Sequential(nn.BatchNorm2d(4), nn.SiLU(), nn.Dropout(0.4), nn.Conv2d(4, 4, 1)),
            nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout(0.3, inplace=True), nn.ReLU(), nn.Conv2d(4, 4, 1)),
            _Function(),
        )


class _Function(nn.Module):
    """For `samples`: dropout as a function, read twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = F.dropout(self.a(x), 0.5, training=self.training)
        return x + self.b(x)
