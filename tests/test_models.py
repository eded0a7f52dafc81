"""The CIFAR ResNets, and models by name."""

import pytest
import torch

from auglocal_ext import models


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet20", 272_474),
        ("resnet32", 466_906),
        ("resnet44", 661_338),
        ("resnet56", 855_770),
        ("resnet110", 1_730_714),
    ],
)
def test_sizes(name, parameters):
    """He et al. give 0.27, 0.46, 0.66, 0.85 and 1.7 million; the shortcut convolutions add 2,752."""
    model = models.create(name, 10)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert [key for key in dict(model.named_children())] == ["conv1", "bn1", "layer1", "layer2", "layer3", "fc"]
    layers = sum(isinstance(m, torch.nn.Conv2d | torch.nn.Linear) for m in model.modules()) - 2
    assert layers == int(name.removeprefix("resnet"))


def test_shapes():
    assert models.resnet20(num_classes=7, in_channels=1)(torch.randn(2, 1, 32, 32)).shape == (2, 7)


def test_torchvisions_by_name(torchvision):
    assert isinstance(models.create("resnet18", 5), torchvision.models.ResNet)
    assert isinstance(models.create("vgg11_bn", 5), torchvision.models.VGG)
    with pytest.raises(ValueError, match="'resnet19': expected one of resnet20, .*, or a ResNet or VGG of torchvision"):
        models.create("resnet19", 5)
