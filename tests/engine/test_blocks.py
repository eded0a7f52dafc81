"""torchvision's blocks: what they are read as, their gradients, and what they keep of what autograd saves."""

import importlib

import engine_helpers
import pytest
import torch
from torch import nn

from auglocal_ext.engine.nodes import Island
from auglocal_ext.engine.trace import trace

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
    return nn.Sequential(*(models.efficientnet.MBConv(config, 0.2, nn.BatchNorm2d) for _ in range(2)))


def efficientnet_v2(models):
    config = models.efficientnet.FusedMBConvConfig(4, 3, 1, 8, 8, 1)
    return nn.Sequential(*(models.efficientnet.FusedMBConv(config, 0.2, nn.BatchNorm2d) for _ in range(2)))


def mnasnet(models):
    block = models.mnasnet._InvertedResidual
    return nn.Sequential(block(8, 8, 3, 1, 6), block(8, 8, 5, 1, 3))


def regnet(models):
    return models.regnet.ResBottleneckBlock(8, 8, 1, nn.BatchNorm2d, nn.ReLU, 4, 1.0, 0.25)


def shufflenet(models):
    block = models.shufflenetv2.InvertedResidual
    return nn.Sequential(block(8, 16, 2), block(16, 16, 1), block(16, 16, 1))


def googlenet(models):
    return importlib.import_module("torchvision.models.googlenet").Inception(8, 2, 4, 2, 4, 2, 2)


def inception(models):
    return nn.Sequential(models.inception.InceptionA(8, 4), models.inception.InceptionC(228, 4))


# block -> (the most that it may keep of what autograd saves, what is left to autograd)
BLOCKS = {
    densenet: (0.35, set()),
    fire: (0.8, set()),
    mobilenet_v2: (0.37, set()),
    mobilenet_v3: (0.36, {"Hardsigmoid"}),
    efficientnet: (0.32, {"Sigmoid"}),
    efficientnet_v2: (0.41, set()),
    mnasnet: (0.54, set()),
    regnet: (0.52, {"Sigmoid"}),
    shufflenet: (0.52, set()),
    googlenet: (0.55, set()),
    inception: (0.44, set()),
}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_a_block_trains_as_by_autograd_and_keeps_little(torchvision, block):
    torch.manual_seed(0)
    for layout in LAYOUTS:
        engine_helpers.assert_trains_as_autograd(block(torchvision.models), 8, memory_format=layout)
    share, islands = BLOCKS[block]
    module = block(torchvision.models)
    nodes, _ = trace(module, engine_helpers.looked_into(module), "block")
    found = {node.what for node in nodes if isinstance(node, Island)}
    assert {what.rpartition("(")[2].rstrip(")") for what in found} == islands
    assert engine_helpers.kept_share(block(torchvision.models), 8) <= share


class Added(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers, nn.BatchNorm2d(8))

    def forward(self, x):
        return x + self.layers(x)


def last(*layers):
    return type(trace(Added(*layers), {Added}, "part")[0][-1]).__name__


def test_an_add_is_joined_where_both_sides_have_one_shape():
    assert (
        last(nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 8, 5, padding="same")) == "Norm"
    )
    assert last() == last(nn.ReLU6()) == "Norm"
    for layers in (
        [nn.Conv2d(8, 8, 3)],
        [nn.Conv2d(8, 8, 1, stride=2)],
        [nn.Conv2d(1, 8, 1)],
        [nn.AdaptiveAvgPool2d(1)],
        [nn.Conv2d(8, 8, (7, 1), padding=(3, 1))],
    ):
        assert last(*layers) == "Add"


@pytest.mark.parametrize("small", [False, True])
def test_an_add_of_a_map_and_its_mean(small):
    """Whichever of them the BatchNorm is of."""

    class Context(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.pool = nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1)

        def forward(self, x):
            return self.norm(self.pool(x)) + x if small else self.norm(x) + self.pool(x)

    engine_helpers.assert_trains_as_autograd(Context(), 8)
