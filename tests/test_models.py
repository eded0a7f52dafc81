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


@pytest.mark.parametrize(
    "name",
    ["resnet20", "resnet110", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d"]
    + ["resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"]
    + [f"vgg{layers}{norm}" for layers in (11, 13, 16, 19) for norm in ("", "_bn")],
)
def test_a_model_is_called_what_builds_it(torchvision, name):
    with torch.device("meta"):
        model = models.create(name, 7)
    assert models.name_of(model) == name


def test_what_no_function_builds_is_called_by_its_class(torchvision):
    class Mine(models.CifarResNet):
        pass

    vgg = torchvision.models.vgg
    with torch.device("meta"):
        resnet = torchvision.models.resnet18()
        resnet.conv1, resnet.fc = torch.nn.Conv2d(1, 64, 3), torch.nn.Linear(512, 3)
        assert models.name_of(resnet) == "resnet18"
        block = torchvision.models.resnet.BasicBlock
        others = [
            torchvision.models.ResNet(block, [1, 1, 1, 1]),
            torchvision.models.ResNet(block, [2, 2, 2, 2], norm_layer=torch.nn.BatchNorm2d, width_per_group=64),
            torchvision.models.VGG(vgg.make_layers([64, "M", 512, "M"])),
            models.CifarResNet(1),
            Mine(3),
            torch.nn.Linear(2, 2),
        ]
        others[1].layer4.append(block(512, 512))
    names = ["ResNet", "ResNet", "VGG", "CifarResNet", "Mine", "Linear"]
    assert [models.name_of(model) for model in others] == names
