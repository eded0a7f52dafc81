"""Relu: a ReLU in the place of what a convolution or a max-pool made."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..node import Node, computes
from ..tensors import like
from .conv import is_plain_conv

__all__ = ["Relu", "is_relu"]


@dataclass(frozen=True)
class Relu(Node):
    """out = relu(source), written over the source: what a Conv or a MaxPool made and nothing else reads."""

    source: str

    @property
    def sources(self):
        return (self.source,)

    @classmethod
    def match(cls, at):
        if not is_relu(at.node, at) or len(at.node.all_input_nodes) != 1:
            return None
        (before,) = at.node.all_input_nodes
        if not is_plain_conv(at.module(before)) or before.kwargs or at.only_reader(before) is not at.node:
            return None
        return cls(at.out, at.part, at.values[before]), at.node

    def plain(self, x):
        return F.relu(x)

    def forward(self, emit):
        emit.step(self, "relu", torch.Tensor.relu_, [self.source], [self.out])

    def backward(self, emit):
        emit.step(self, "relu backward", _backward, [emit.take(self.out), self.out], [emit.give(self.source)])

    @classmethod
    def samples(cls):
        return (
            nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1)),
            nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        )


def is_relu(node, at):
    """Whether an fx node is a ReLU, module or function."""
    if node.op == "call_module":
        return computes(at.module(node), nn.ReLU)
    return node.op == "call_function" and node.target in (F.relu, torch.relu)


def _backward(grad, y):
    grad = like(grad, y)
    return torch.ops.aten.threshold_backward.grad_input(grad, y, 0, grad_input=grad)
