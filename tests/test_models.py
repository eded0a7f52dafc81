"""The CIFAR ResNets, and models by name."""

import sys
import types

import pytest
import torch

from auglocal_ext import models
from auglocal_ext.cli import main


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
    with pytest.raises(ValueError, match="'resnet19': expected one of resnet20, .*, a classifier of torchvision"):
        models.create("resnet19", 5)


@pytest.fixture
def timm(monkeypatch):
    """A library that answers as timm does, of two models."""

    class TimmsNet(models.CifarResNet):
        pretrained_cfg = {"architecture": "net_1"}

    TimmsNet.__module__ = "timm.models.net"
    library = types.ModuleType("timm")
    library.list_models = lambda: ["net_1", "net_3"]
    library.is_model = lambda name: name.split(".")[0] in library.list_models()
    library.create_model = lambda name, pretrained, num_classes: TimmsNet(int(name[4]), num_classes)
    monkeypatch.setitem(sys.modules, "timm", library)


def test_timms_by_name(timm, capsys):
    model = models.create("timm:net_3", 5)
    assert (len(model.layer1), model.fc.out_features) == (3, 5)
    assert models.name_of(models.create("timm:net_1", 5)) == "timm:net_1"
    assert models.timm_names() == ["timm:net_1", "timm:net_3"]
    with pytest.raises(ValueError, match="timm has no model 'net_2': .*, such as timm:net_3 or timm:net_1$"):
        models.create("timm:net_2", 5)
    assert main(["models", "timm:*_1"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["timm:net_1", "4", "142,392"]
    assert main(["plan", "--model", "timm:net_1", "--depth", "2", "--batch-size", "8", "--brief"]) == 0
    assert capsys.readouterr().out.startswith("timm:net_1, rule auglocal, depth 2: ")


def test_a_missing_timm_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert main(["plan", "--model", "timm:resnet50d"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("auglocal: error: the model 'timm:resnet50d' needs timm, which does not import here (")
    assert told.endswith("): install it with pip install timm\n") and told.count("\n") == 1


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
