"""DGL, as the authors of AugLocal (arXiv:2402.17318) ran it."""

import math

from torch import nn

from ..models import initialised
from .rule import Rule

__all__ = ["DGL"]


class DGL(Rule):
    """Decoupled greedy learning (Belilovsky et al. 2020, arXiv:1901.08164), as the authors of AugLocal ran it. The aux
    net averages features (N, C, H, W) to a quarter of their height and width; then come three 1x1 convolutions of C
    channels, an average to 2x2, two linear layers of 4 C features, all with normalisation and ReLU, and a linear
    classifier.
    """

    def aux_net(self, border):
        channels, height, width = border.shape
        layers = [nn.AdaptiveAvgPool2d((math.ceil(height / 4), math.ceil(width / 4)))]
        for _ in range(3):
            layers += [nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(1)]
        for _ in range(2):
            layers += [nn.Linear(4 * channels, 4 * channels, bias=False), nn.BatchNorm1d(4 * channels), nn.ReLU()]
        return initialised(*layers, nn.Linear(4 * channels, border.num_classes))
