"""torchvision's blocks: what they are read as, their gradients, and what they keep of what autograd saves."""

import engine_helpers
import pytest
import torch
from torch import nn

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def densenet(models):
    return models.densenet._DenseBlock(3, 8, 2, 4, 0.0)


def fire(models):
    return nn.Sequential(models.squeezenet.Fire(8, 2, 4, 4), models.squeezenet.Fire(8, 2, 4, 4))


def mobilenet_v2(models):
    block = models.mobilenetv2.InvertedResidual
    return nn.Sequential(block(8, 8, 1, 6), block(8, 8, 1, 6))


def mobilenet_v3(models):
    config = models.mobilenetv3.InvertedResidualConfig(8, 5, 24, 8, True, "HS", 1, 1, 1.0)
    return models.mobilenetv3.InvertedResidual(config, nn.BatchNorm2d)


def efficientnet(models):
    config = models.efficientnet.MBConvConfig(6, 3, 1, 8, 8, 1, 1.0, 1.0)
    return models.efficientnet.MBConv(config, 0.2, nn.BatchNorm2d)


def regnet(models):
    return models.regnet.ResBottleneckBlock(8, 8, 1, nn.BatchNorm2d, nn.ReLU, 4, 1.0, 0.25)


def inception(models):
    return models.inception.InceptionA(8, 4)


def googlenet(models):
    return models.googlenet.Inception(8, 4, 4, 8, 2, 4, 4)


# block -> (the most that it may keep of what autograd saves, the kinds of islands that are left)
BLOCKS = {
    densenet: (0.3, set()),
    fire: (0.8, set()),
    mobilenet_v2: (0.4, set()),
    mobilenet_v3: (0.4, {"Hardsigmoid"}),
    efficientnet: (0.35, {"Sigmoid"}),
    regnet: (0.5, {"Sigmoid"}),
}
