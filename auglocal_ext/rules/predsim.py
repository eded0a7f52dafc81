"""PredSim, as the authors of AugLocal (arXiv:2402.17318) ran it."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..models import initialised
from .rule import ExtraLoss, Rule

__all__ = ["PredSim"]


class PredSim(Rule):
    """Prediction and similarity losses (Nokland and Eidnes 2019, arXiv:1901.06656), 0.01 and 0.99 of the whole, as the
    authors of AugLocal ran them. Images of one class shall have features that resemble each other.

    The prediction's aux net averages the features to at most 512 numbers where it can, and classifies these linearly.
    The similarity loss is the mean of (S(features) - S(labels))^2 over the pairs of images: S has the cosines of
    centred rows; the rows of features are the deviations, over pixels, of what a 3x3 convolution makes of them.
    """

    def aux_net(self, border):
        channels, *sides = border.shape
        windows, turn = [1, 1], 0

        def size():
            return channels * math.prod(-(-side // window) for side, window in zip(sides, windows, strict=True))

        while size() > 512 and windows[turn] < sides[turn]:  # height and width in turns
            windows[turn] *= 2
            turn = 1 - turn
        pool = nn.AvgPool2d(tuple(windows), ceil_mode=True)
        return initialised(pool, nn.Flatten(1), nn.Linear(size(), border.num_classes))

    def extra_loss(self, border):
        channels = border.shape[0]
        net = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        return _Similarity(initialised(net), border.num_classes)

    def weights(self, border):
        return 0.99, 0.01


class _Similarity(ExtraLoss):
    def __init__(self, net, num_classes):
        super().__init__(net)
        self.num_classes = num_classes

    def loss(self, prediction, labels, images):
        soft = labels.is_floating_point()
        shares = labels if soft else labels[:, None] == torch.arange(self.num_classes, device=labels.device)
        targets = shares.to(prediction.dtype)
        maps = prediction.flatten(2)
        rows = maps.std(2) if maps.shape[2] > 1 else maps.flatten(1)  # one pixel has no deviation
        rows = rows * shares.any(1, keepdim=True)  # an image of no class is to be ignored
        return F.mse_loss(_similarity(rows), _similarity(targets))


def _similarity(rows):
    """(N, k) -> (N, N): cosines of the rows, each centred."""
    centred = rows - rows.mean(1, keepdim=True)
    normed = centred / (centred.norm(dim=1, keepdim=True) + 1e-8)
    return (normed @ normed.T).clamp(-1, 1)
