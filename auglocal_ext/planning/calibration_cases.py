"""The local modules whose steps `auglocal calibrate` measures: convolutions over a grid of shapes, and the rest."""

from dataclasses import dataclass, replace

import torch
from torch import nn

__all__ = ["Case", "Residual", "calibration_cases", "convolution"]

MACS, ELEMENTS = 2e8, 4e6  # of a pass of a convolution, and of the larger of its maps: milliseconds on one core
ON_A_GPU = 32  # times as many images, or its kernels are done before the host has queued the next


@dataclass(frozen=True)
class Case:
    """A local module to measure, on the meta device: its body, its head, and the shape of its input, (N, C, H, W)."""

    body: nn.Module
    head: nn.Module
    shape: tuple[int, int, int, int]


class Residual(nn.Module):
    """A block with a shortcut, as of a ResNet."""

    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


def calibration_cases(device_type="cpu"):
    """All that `measure` measures by default."""
    with torch.device("meta"):
        cases = [*_convolutions(), *_layers(), *_classifiers()]
    times = ON_A_GPU if device_type == "cuda" else 1
    return [replace(case, shape=(times * case.shape[0], *case.shape[1:])) for case in cases]


def convolution(inputs, outputs, size, kernel, stride=1, groups=1):
    """The Case of one convolution between BatchNorms; of images it gives no gradient."""
    out = -(-size // stride)
    macs = inputs // groups * outputs * kernel**2 * out**2
    elements = max(inputs * size**2, outputs * out**2)
    n = max(2, min(128, round(min(MACS / macs, ELEMENTS / elements))))
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    before = [] if inputs == 3 else [nn.BatchNorm2d(inputs)]
    return _case(nn.Sequential(*before, conv, nn.BatchNorm2d(outputs), nn.ReLU()), outputs, (n, inputs, size, size))


def _convolutions():
    widths, sizes = (16, 64, 256, 512), (4, 7, 14, 28, 56, 112)
    for channels in (16, 32, 64, 128, 256, 512):
        for size in sizes:
            if channels * size <= 128 * 112:
                yield convolution(channels, channels, size, 3)
                if size < 112:
                    yield convolution(channels, min(2 * channels, 512), size, 3, 2 - size // 14 % 2)
    for inputs in widths:
        for outputs in widths:
            for size in (7, 14, 56):
                if inputs * outputs * size <= 512 * 256 * 28:
                    yield convolution(inputs, outputs, size, 1, 2 if outputs == 4 * inputs and size != 14 else 1)
    for outputs in (16, 64):
        yield from (convolution(3, outputs, size, 3) for size in (32, 112, 224))
        yield from (convolution(3, outputs, size, 3, 2) for size in (64, 224))
        yield from (convolution(3, outputs, size, 7, 2) for size in (64, 224))
    for channels in (32, 128, 512):
        for size in (7, 28, 112):
            if channels * size <= 128 * 112:
                yield from (convolution(channels, channels, size, 3, stride, channels) for stride in (1, 2))
        yield convolution(channels, channels, 14, 3, 1, 32)


def _layers():
    """Blocks with a shortcut, activations, pools."""
    for shape in (
        (64, 16, 32, 32),
        (128, 32, 32, 32),
        (64, 64, 16, 16),
        (8, 128, 28, 28),
        (16, 256, 14, 14),
        (4, 64, 112, 112),
    ):
        yield _case(nn.Sequential(Residual(shape[1]), Residual(shape[1])), shape[1], shape)
    for n in (2, 32):
        for act in (nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.Hardswish(), nn.GELU(), nn.ELU()):  # the last one by autograd
            body = nn.Conv2d(16, 32, 1), act, nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32), act
            yield _case(nn.Sequential(*body, nn.Conv2d(32, 16, 1), nn.BatchNorm2d(16)), 16, (n, 16, 28, 28))
    for pool in (nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1)):
        for shape in ((2, 64, 28, 28), (8, 64, 28, 28), (8, 64, 112, 112), (4, 32, 224, 224), (4, 64, 224, 224)):
            c, *last = shape[1], nn.Conv2d(shape[1], 64, 1), nn.BatchNorm2d(64)
            yield _case(nn.Sequential(nn.Conv2d(c, c, 1), nn.BatchNorm2d(c), nn.ReLU(), pool, *last), 64, shape)
            yield _case(nn.Sequential(nn.Conv2d(c, c, 1), nn.ReLU(), pool, *last), 64, shape)


def _classifiers():
    """Linear layers, and the usual head."""
    for n in (4, 64):
        sizes = (3 * 49, 256), (32 * 49, 512), (8 * 49, 4096), (64 * 49, 4096), (320 * 49, 4096)
        for inputs, hidden in sizes[: 5 if n == 4 else 4]:
            layers = nn.Linear(inputs, hidden), nn.ReLU(), nn.Dropout(), nn.Linear(hidden, 1000)
            channels = inputs // 49
            body = nn.Sequential(nn.Conv2d(16, channels, 1), nn.BatchNorm2d(channels), nn.AdaptiveAvgPool2d(7))
            yield Case(body, nn.Sequential(nn.Flatten(), *layers), (n, 16, 14, 14))
        for channels in (64, 512):
            body = nn.Sequential(nn.Conv2d(16, channels, 1), nn.BatchNorm2d(channels), nn.ReLU())
            yield _case(body, channels, (n, 16, 7, 7), 1000)


def _case(body, channels, shape, classes=10):
    return Case(body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)), shape)
