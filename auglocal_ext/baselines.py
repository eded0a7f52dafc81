"""The rules that AugLocal is compared with: PredSim, DGL and InfoPro, as its authors ran them.

One module per unit of the backbone unless said otherwise; the losses' weights go linearly from the first border to the
last. Design and figures: arXiv:2402.17318.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from ._checks import normalisation
from .models import init_weights
from .rule import ExtraLoss, Rule

__all__ = ["DGL", "InfoPro", "PredSim"]

_ROUNDING = 0.02  # images may come in bfloat16


class PredSim(Rule):
    """Prediction and similarity losses (Nokland and Eidnes 2019, arXiv:1901.06656), 0.01 and 0.99 of the whole: images
    of one class shall have features that resemble each other."""

    def aux_net(self, border):
        channels, *sides = border.shape
        windows, turn = [1, 1], 0

        def size():
            return channels * math.prod(-(-side // window) for side, window in zip(sides, windows, strict=True))

        while size() > 512 and windows[turn] < sides[turn]:  # height and width in turns
            windows[turn] *= 2
            turn = 1 - turn
        pool = nn.AvgPool2d(tuple(windows), ceil_mode=True)
        return _initialised(pool, nn.Flatten(1), nn.Linear(size(), border.num_classes))

    def extra_loss(self, border):
        channels = border.shape[0]
        net = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        return _Similarity(_initialised(net), border.num_classes)

    def weights(self, border):
        return 0.99, 0.01


class _Similarity(ExtraLoss):
    def __init__(self, net, num_classes):
        super().__init__(net)
        self.num_classes = num_classes

    def loss(self, prediction, labels, images):
        targets = F.one_hot(labels, self.num_classes).to(prediction.dtype)
        maps = prediction.flatten(2)
        rows = maps.std(2) if maps.shape[2] > 1 else maps.flatten(1)  # one pixel has no deviation
        return F.mse_loss(_similarity(rows), _similarity(targets))


def _similarity(rows):
    """(N, k) -> (N, N): cosines of the rows, each centred."""
    centred = rows - rows.mean(1, keepdim=True)
    normed = centred / (centred.norm(dim=1, keepdim=True) + 1e-8)
    return (normed @ normed.T).clamp(-1, 1)


class DGL(Rule):
    """Decoupled greedy learning (Belilovsky et al. 2020, arXiv:1901.08164): a small classifier of 1x1 convolutions."""

    def aux_net(self, border):
        channels, height, width = border.shape
        layers = [nn.AdaptiveAvgPool2d((math.ceil(height / 4), math.ceil(width / 4)))]
        for _ in range(3):
            layers += [nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(1)]
        for _ in range(2):
            layers += [nn.Linear(4 * channels, 4 * channels, bias=False), nn.BatchNorm1d(4 * channels), nn.ReLU()]
        return _initialised(*layers, nn.Linear(4 * channels, border.num_classes))


class InfoPro(Rule):
    """Information propagation (Wang et al. 2021, arXiv:2101.10832), with softmax: features shall keep what is needed to
    draw the image again, first more, then less.

    Args:
        mean, std: one number per channel, of the images scaled to 0..1: what they were normalised by. Default: the
            paper's of CIFAR-10.
        first, last: weights (of the image, of the cross-entropy) at the first and the last border. Default: the
            paper's, of ResNet-110 where there are more than 50 units, else of ResNet-32.
    """

    def __init__(
        self,
        mean=(125.3 / 255, 123.0 / 255, 113.9 / 255),
        std=(63.0 / 255, 62.1 / 255, 66.7 / 255),
        first=None,
        last=None,
    ):
        self.mean, self.std, self.first, self.last = tuple(mean), tuple(std), first, last

    def check(self, backbone):
        if len(self.mean) != backbone.image_channels or len(self.std) != backbone.image_channels:
            raise ValueError(
                f"rule 'infopro' needs a mean and a std for each of the {backbone.image_channels} channels of this "
                f"model's images, given {len(self.mean)} and {len(self.std)}"
            )
        normalisation(self.mean, self.std, backbone.image_channels)

    def check_images(self, images):
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        low, high = (images * std + mean).aminmax()
        if low < -_ROUNDING or high > 1 + _ROUNDING:
            raise ValueError(
                f"rule 'infopro' draws images of 0 to 1: with the normalisation undone by mean {self.mean} and std "
                f"{self.std} these go from {low:.3f} to {high:.3f}; give the numbers that they were normalised by, "
                f"rule=auglocal_ext.rules.InfoPro(mean, std)"
            )

    def aux_net(self, border):
        channels = border.shape[0]
        narrow = channels < border.backbone.units[-1].out_channels
        width, stride = (2 * channels, 2) if narrow else (channels, 1)
        return _initialised(
            nn.Conv2d(channels, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(1),
            nn.Linear(width, 128),
            nn.ReLU(),
            nn.Linear(128, border.num_classes),
        )

    def extra_loss(self, border):
        net = nn.Sequential(
            nn.Conv2d(border.shape[0], 12, 3, padding=1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, border.image_shape[0], 3, padding=1),
        )
        if border.shape[1:] != border.image_shape[1:]:
            net.insert(0, nn.Upsample(border.image_shape[1:], mode="bilinear", align_corners=True))
        return _ImageLoss(_initialised(net), self.mean, self.std)

    def weights(self, border):
        deep = len(border.backbone.units) > 50
        first = self.first or ((5.0, 0.0) if deep else (5.0, 0.05))
        last = self.last or ((0.5, 1.0) if deep else (0.2, 0.5))
        return tuple(a + (b - a) * border.place for a, b in zip(first, last, strict=True))


class _ImageLoss(ExtraLoss):
    """Binary cross-entropy of the image before its normalisation and a sigmoid of the prediction."""

    def __init__(self, net, mean, std):
        super().__init__(net)
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)

    def loss(self, prediction, labels, images):
        target = (images.to(prediction.dtype) * self.std + self.mean).clamp(0, 1)  # rounding goes beyond
        # Not ..._with_logits: where float32's sigmoid is 1, the authors' loss is 100 and has no gradient.
        return F.binary_cross_entropy(prediction.sigmoid(), target)


def _initialised(*layers):
    net = layers[0] if len(layers) == 1 else nn.Sequential(*layers)
    init_weights(net)
    return net
