"""A calibration of no machine: samples with times that a formula tells."""

from dataclasses import replace
from functools import partial
from itertools import product

import torch
from torch import nn

from auglocal_ext.engine.emit import Phase, Step
from auglocal_ext.planning.calibration import described, optimizer_sample

PASSES = "conv", "weight gradient", "data gradient"


def convolution(kind, n, inputs, outputs, size, kernel=3):
    """(step, reads, made, macs) of a pass of a convolution, without data."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, device="meta")
    x, y = (torch.empty(n, channels, size, size, device="meta") for channels in (inputs, outputs))
    reads, made = {"conv": ((x,), y), "weight gradient": ((y, x), conv.weight), "data gradient": ((y, x), x)}[kind]
    return _step(kind, partial(print, conv)), reads, made, y.numel() * conv.weight[0].numel()


def elementwise(kind, n, size):
    """The same of a step that reads a map and makes one."""
    x = torch.empty(n, 16, size, size, device="meta")
    return _step(kind, print), (x,), torch.empty_like(x), 0


def samples():
    """Of convolutions, 10 us and 50 multiply-accumulates a ns, but for what channels change; of other steps, 5 us and
    8 bytes a ns; of optimizers."""
    found = []
    for kind, inputs, outputs, size in product(PASSES, (16, 64), (16, 64), (4, 16)):
        sample = described(*convolution(kind, 4, inputs, outputs, size))
        speed = {16: 1.0, 64: 1.3}[inputs] * {16: 0.9, 64: 1.1}[outputs] * 50
        found.append(replace(sample, nanoseconds=round(10_000 + sample.costs[1] / speed)))
    for kind, size in product(("norm", "norm backward"), (4, 8, 32)):
        sample = described(*elementwise(kind, 4, size))
        found.append(replace(sample, nanoseconds=round(5_000 + sample.costs[1] / 8)))
    for count, elements in ((50, 100), (2, 100_000)):
        parameters = [nn.Parameter(torch.empty(elements, device="meta")) for _ in range(count)]
        sample = optimizer_sample("SGD", parameters, 4 * count * elements)
        found.append(replace(sample, nanoseconds=round(1_000 * count + sample.costs[1] / 10)))
    return found


def _step(kind, run):
    return Step(kind, Phase.FORWARD, False, "unit", run, ("x",), ("y",))
