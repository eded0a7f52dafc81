"""Mul: a product, as of a map with the gate of a squeeze-excitation or with a scale for each channel."""

import operator
from dataclasses import dataclass

import torch
from torch import nn

from .binary import Binary

__all__ = ["Mul"]

_CHUNKS = 8  # that a product whose sum is wanted is made in: so much less of it is there at once


@dataclass(frozen=True)
class Mul(Binary):
    """out = a x b. The output is not kept; what needs its operands in the backward makes them again where it can."""

    functions = torch.mul, operator.mul
    name = "mul"
    reads_operands = True

    def gradients(self, wanted, grad, like, a, b):
        """Those of smaller operands first, as sums without their products; the last one is written over grad."""
        made, order = [None, None], sorted((i for i in (0, 1) if wanted[i]), key=lambda i: like[i][0] == grad.shape)
        for i in order:
            (shape, dtype), other = like[i], (b, a)[i]
            if shape != grad.shape:
                made[i] = _sum_of_product(grad, other, shape).to(dtype)
            else:
                made[i] = (grad.mul_(other) if i == order[-1] else grad * other).to(dtype)
        return made

    @classmethod
    def samples(cls):
        gates = _Gate(True), _Gate(False), _Gate(False, 1)
        return *(nn.Sequential(gate, nn.Conv2d(4, 4, 1)) for gate in gates), _Scale(), _Square()


class _Gate(nn.Module):
    """For `samples`: a map with a value for each channel of each image, or one for each pixel."""

    def __init__(self, first, channels=4):
        super().__init__()
        self.norm, self.act, self.first = nn.BatchNorm2d(4), nn.SiLU(), first
        self.squeeze = nn.Conv2d(4, channels, (7, 6) if channels > 1 else 1)

    def forward(self, x):
        x = self.act(self.norm(x))
        gate = self.squeeze(x)
        return gate * x if self.first else torch.mul(x, gate)


class _Scale(nn.Module):
    """For `samples`: a map with a parameter for each channel, and with a constant."""

    def __init__(self):
        super().__init__()
        self.norm, self.scale = nn.BatchNorm2d(4), nn.Parameter(torch.linspace(-1, 1, 4).view(4, 1, 1))
        self.register_buffer("mask", torch.arange(6) % 2)

    def forward(self, x):
        return self.scale * self.norm(x) * self.mask


class _Square(nn.Module):
    """For `samples`: maps of one shape."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = self.a(x) * self.b(x)
        return y * y


def _sum_of_product(grad, other, shape):
    """(grad x other) summed to a shape, a part of the batch at a time."""
    if not shape or len(shape) < grad.dim() or shape[0] == 1:  # over the batch too, in enough bits
        dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
        total = grad.new_zeros(shape, dtype=dtype)
        for g, x in _parts(grad, other):
            total += (g * x).to(dtype).sum_to_size(shape)
        return total.to(grad.dtype)
    total = grad.new_empty(shape)
    for part, (g, x) in zip(total.chunk(_CHUNKS), _parts(grad, other), strict=True):
        part.copy_((g * x).sum_to_size(part.shape))
    return total


def _parts(grad, other):
    return zip(grad.chunk(_CHUNKS), other.expand(grad.shape).chunk(_CHUNKS), strict=True)
