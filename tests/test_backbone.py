"""Models as units: the ResNet families, replaced parts, and what cannot be cut."""

import pytest
import torch
from torch import nn

from auglocal_ext import models
from auglocal_ext.backbone import as_backbone

CIFAR = {"resnet20": 10, "resnet32": 16, "resnet44": 22, "resnet56": 28, "resnet110": 55}
TORCHVISION = {
    "resnet18": 9,
    "resnet34": 17,
    "resnet50": 17,
    "resnet101": 34,
    "resnet152": 51,
    "wide_resnet50_2": 17,
    "resnext50_32x4d": 17,
    "resnext101_64x4d": 34,
}


@pytest.mark.parametrize(("name", "units"), CIFAR.items())
def test_cifar_resnets(name, units):
    model = getattr(models, name)(num_classes=7)
    backbone = as_backbone(model)
    assert len(backbone.units) == units
    assert (backbone.form, backbone.image_channels, backbone.num_classes) == ("cifar", 3, 7)
    assert [unit.reduction for unit in backbone.units[:: (units - 1) // 3]][:3] == [1, 1, 2]
    assert backbone.units[-1].reduction == 4
    check_units_compose_to_the_model(model, backbone, 16)


@pytest.mark.parametrize(("name", "units"), TORCHVISION.items())
def test_torchvision_resnets(torchvision, name, units):
    with torch.device("meta"):
        model = torchvision.models.get_model(name, num_classes=12)
    backbone = as_backbone(model)
    assert len(backbone.units) == units
    assert (backbone.form, backbone.num_classes) == ("imagenet", 12)
    assert (backbone.units[0].reduction, backbone.units[-1].reduction) == (4, 32)
    assert [backbone.units[i].width for i in (0, 1, -1)] == [64, 64, 512]
    # A copy of a block as it stands in the network has the block's own parameters, shape by shape.
    for unit, before in zip(backbone.units[1:], backbone.units, strict=False):
        copy = unit.copy(before.out_channels, unit.reduction // before.reduction)
        assert [p.shape for p in copy.parameters()] == [p.shape for p in unit.module.parameters()], unit.name
        assert not {id(p) for p in copy.parameters()} & {id(p) for p in model.parameters()}


def check_units_compose_to_the_model(model, backbone, side):
    model.eval()
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        features = x
        for unit in backbone.units:
            features = unit.module(features)
            assert features.shape[1] == unit.out_channels
            assert features.shape[2] == side // unit.reduction
        assert torch.equal(backbone.classifier(features), model(x))
    assert {id(p) for p in model.parameters()} == {
        id(p) for part in [*(unit.module for unit in backbone.units), backbone.classifier] for p in part.parameters()
    }


def test_torchvision_units_compose(torchvision):
    model = torchvision.models.resnet50(num_classes=3)
    check_units_compose_to_the_model(model, as_backbone(model), 64)


def test_reading_a_model_changes_nothing(tiny_model):
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    random = torch.get_rng_state()
    as_backbone(tiny_model)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_model.modules())


def test_replaced_stem_and_classifier_and_dilation(torchvision):
    model = torchvision.models.resnet50(num_classes=10, replace_stride_with_dilation=[False, False, True])
    model.conv1 = nn.Conv2d(1, 64, 3, padding=1)
    model.maxpool = nn.Identity()
    model.fc = nn.Sequential(nn.Dropout(0.1), nn.Linear(2048, 5))
    backbone = as_backbone(model)
    assert (backbone.image_channels, backbone.num_classes) == (1, 5)
    assert (backbone.units[0].reduction, backbone.units[-1].reduction) == (1, 4)  # layer4 dilates, no stride
    assert backbone.units[-1].copy(2048, 1).conv2.dilation == (2, 2)


def spoiled(kind):
    model = models.CifarResNet(2)
    if kind == "block":
        model.layer2[1] = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())
    elif kind == "stage":
        model.layer1 = nn.Conv2d(16, 16, 3, padding=1)
    elif kind == "empty stage":
        model.layer1 = nn.Sequential()
    elif kind == "extra part":
        model.attention = nn.Linear(3, 3)
    elif kind == "no classifier":
        model.fc = nn.Identity()
    elif kind == "no stem":
        model.conv1 = nn.Identity()
    return model


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("block", r"'layer2.1' \(Sequential\)"),
        ("stage", r"'layer1' \(Conv2d\)"),
        ("empty stage", r"'layer1' \(Sequential\)"),
        ("extra part", r"'attention' \(Linear\)"),
        ("no classifier", r"'fc' \(Identity\)"),
        ("no stem", r"'conv1' \(Identity\)"),
    ],
)
def test_what_is_not_understood_is_named(kind, part):
    with pytest.raises(ValueError, match=f"cannot cut CifarResNet into units: its part {part} is not understood"):
        as_backbone(spoiled(kind))


def test_other_models_are_refused(torchvision):
    with pytest.raises(ValueError, match=r"cannot cut VGG into units: its part 'features' \(Sequential\)"):
        as_backbone(torchvision.models.vgg11())
    with pytest.raises(ValueError, match=r"'layer1.0.bn1' \(GroupNorm\)"):
        as_backbone(torchvision.models.resnet18(norm_layer=lambda c: nn.GroupNorm(2, c)))
    with pytest.raises(ValueError, match=r"its part 'forward\(\)' is not understood"):
        as_backbone(nn.Identity())


def test_wrapped_models_and_no_models(tiny_model):
    with pytest.raises(ValueError, match="cannot cut DataParallel into units: pass the model in it, model.module"):
        as_backbone(nn.DataParallel(tiny_model))
    with pytest.raises(ValueError, match="from torch.compile into units: pass the model it was made from"):
        as_backbone(torch.compile(tiny_model))
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, .* given str"):
        as_backbone("resnet18")


def test_a_subclass_with_its_own_forward_is_refused():
    class Wrapped(models.CifarResNet):
        def forward(self, x):
            return super().forward(x) * 2

    with pytest.raises(ValueError, match=r"cannot cut Wrapped into units: its own forward\(\)"):
        as_backbone(Wrapped(1))
