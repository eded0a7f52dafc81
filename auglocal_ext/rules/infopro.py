"""InfoPro, as the authors of AugLocal (arXiv:2402.17318) ran it; the losses' weights go linearly from the first border
to the last.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from ..common.checks import normalisation
from ..models import initialised
from .rule import ExtraLoss, Rule

__all__ = ["InfoPro"]


_ROUNDING = 0.02  # images may come in bfloat16


class InfoPro(Rule):
    """Information propagation (Wang et al. 2021, arXiv:2101.10832), with softmax, as the authors of AugLocal ran it:
    features shall keep what is needed to draw the image again, first more, then less.

    The extra loss is the binary cross-entropy of the image, as it was before its normalisation, and the sigmoid of what
    two 3x3 convolutions make of the features. Between the first and the last border weights go linearly.

    Args:
        mean, std: one number per channel, of the images scaled to 0..1: what they were normalised by. Default: the
            paper's of CIFAR-10.
        first, last: weights (of the image, of the cross-entropy) at the first and the last border. Default: the
            paper's, of ResNet-110 where there are more than 50 units, else of ResNet-32.

    Raises:
        ValueError: by `check` and `check_images`: mean or std is not one number per channel, or images, with the
            normalisation undone, do not lie from 0 to 1.
    """

    def __init__(
        self,
        mean=(125.3 / 255, 123.0 / 255, 113.9 / 255),
        std=(63.0 / 255, 62.1 / 255, 66.7 / 255),
        first=None,
        last=None,
    ):
        # A bare number is one channel's; `check` tells where the model has more.
        self.mean, self.std = (tuple(v) if isinstance(v, Iterable) else (v,) for v in (mean, std))
        self.first, self.last = first, last

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
        return initialised(
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
        return _ImageLoss(initialised(net), self.mean, self.std)

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
        share = prediction.sigmoid()
        odd = share.isnan()  # which on a GPU torch's loss answers with an assertion that ends the process's work there
        return F.binary_cross_entropy(share.where(~odd, 0.5), target).where(~odd.any(), torch.nan)
