"""Add: a sum, as of a block and its shortcut, which keeps nothing."""

import operator
from dataclasses import dataclass

import torch
from torch import nn

from .binary import Binary, as_operand

__all__ = ["Add"]


@dataclass(frozen=True)
class Add(Binary):
    """out = a + b. The gradient goes on to the first that needs it; the other gets a copy: both may write there."""

    functions = torch.add, operator.add
    name = "add"

    def gradients(self, wanted, grad, like, a, b):
        made = [as_operand(grad, one) if w else None for one, w in zip(like, wanted, strict=True)]
        if made[0] is made[1]:
            made[1] = grad.clone()
        return made

    @classmethod
    def samples(cls):
        return _Shortcut(), nn.Sequential(_Pixel(), nn.Conv2d(4, 4, 1)), _Position()


class _Shortcut(nn.Module):
    """For `samples`: sums of sums, of which the backward needs more than one."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.SiLU()

    def forward(self, x):
        x = x + self.act(self.a(x))
        x = torch.add(x, self.act(self.b(x)))
        return self.a(x + x)


class _Pixel(nn.Module):
    """For `samples`: a map with one value for a channel."""

    def __init__(self):
        super().__init__()
        self.conv, self.shift = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, (7, 6))

    def forward(self, x):
        return self.shift(x).add(self.conv(x))


class _Position(nn.Module):
    """For `samples`: a parameter for every place."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.linspace(0, 1, 42).view(7, 6))

    def forward(self, x):
        return x + self.position
