"""Models as units: the ResNet families, VGGs, replaced parts, and what cannot be cut."""

import nets
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


@pytest.mark.parametrize(("name", "units"), {"vgg11": 8, "vgg13": 10, "vgg16": 13, "vgg19": 16}.items())
@pytest.mark.parametrize("batch_norm", [False, True])
def test_vggs(torchvision, name, units, batch_norm):
    with torch.device("meta"):
        model = torchvision.models.get_model(name + "_bn" * batch_norm, num_classes=12)
    backbone = as_backbone(model)
    assert len(backbone.units) == units
    assert (backbone.form, backbone.image_channels, backbone.num_classes) == ("imagenet", 3, 12)
    assert (backbone.units[0].kept, backbone.units[-1].kept) == (64, 512 / 16**2)
    # A copy is conv-BN-ReLU, behind a pool where it halves.
    for unit in backbone.units:
        pool, conv, bn, relu = unit.copy(7, 2)
        assert [type(layer) for layer in (pool, bn, relu)] == [nn.MaxPool2d, nn.BatchNorm2d, nn.ReLU]
        assert conv.weight.shape == (unit.out_channels, 7, 3, 3) and conv.padding == (1, 1)
        assert [type(layer) for layer in unit.copy(7, 1)] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]


@pytest.mark.parametrize(
    ("name", "places"),
    [("vgg13", [0, 2, 5, 7, 10, 12, 15, 17, 20, 22]), ("vgg13_bn", [0, 3, 7, 10, 14, 17, 21, 24, 28, 31])],
)
def test_vgg13s_units(torchvision, name, places):
    """The pool behind a convolution belongs to its unit."""
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    units = as_backbone(model).units
    assert [unit.name for unit in units] == [f"features.{place}" for place in places]
    assert [unit.out_channels for unit in units] == [64, 64, 128, 128, 256, 256, 512, 512, 512, 512]
    assert [unit.reduction for unit in units] == [1, 2, 2, 4, 4, 8, 8, 16, 16, 32]
    assert [layer for unit in units for layer in unit.module] == list(model.features)


def narrow_vgg(torchvision, batch_norm):
    classifier = nn.Sequential(nn.Dropout(0.1), nn.Linear(64, 5))
    layers = [8, "M", 16, 16, "M"]
    return nets.vgg(torchvision, layers, batch_norm, avgpool=nn.AdaptiveAvgPool2d(2), classifier=classifier)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_vgg_units_compose(torchvision, batch_norm):
    model = narrow_vgg(torchvision, batch_norm)
    check_units_compose_to_the_model(model, as_backbone(model), 32)


def test_replaced_parts_of_a_vgg(torchvision):
    model = narrow_vgg(torchvision, True)
    model.features[0] = nn.Conv2d(1, 8, 5, 2, 2)
    model.features[1] = nn.BatchNorm2d(8, eps=1e-3, momentum=0.2)
    model.features[2] = nn.LeakyReLU()
    model.features[3] = nn.Identity()
    model.classifier = nn.Linear(64, 3)
    backbone = as_backbone(model)
    assert (backbone.image_channels, backbone.num_classes) == (1, 3)
    assert [unit.reduction for unit in backbone.units] == [2, 2, 4]
    assert (backbone.units[0].copy(4, 1)[1].eps, backbone.units[0].copy(4, 1)[1].momentum) == (1e-3, 0.2)


@pytest.mark.parametrize(
    ("name", "part", "message"),
    [
        (
            "features",
            nn.Sequential(nn.Dropout(0.0)),
            "it takes no square images of .*; classifier.1 cannot take an input",
        ),
        ("classifier", nn.Identity(), "it has no classifier: its last layer with weights is features.5"),
        ("classifier", nn.Linear(63, 5), "classifier cannot take an input of shape \\(3, 64\\)"),
        ("classifier", nn.Sequential(nn.Linear(64, 6), nn.Unflatten(1, (2, 3))), r"must put out \(N, classes\), given"),
    ],
)
def test_what_cannot_be_cut_in_a_vgg_is_named(torchvision, name, part, message):
    model = narrow_vgg(torchvision, False)
    setattr(model, name, part)
    with pytest.raises(ValueError, match=f"cannot cut VGG into units: .*{message}"):
        as_backbone(model)


@pytest.mark.parametrize(
    ("features", "units"),
    [
        (nn.Conv2d(3, 16, 3), ["stem"]),
        (nn.Sequential(nn.ReLU(), nn.Conv2d(3, 16, 3)), ["features"]),
        (nn.Sequential(nn.Conv2d(3, 4, 3), models.BasicBlock(4, 16)), ["features.0", "features.1"]),
    ],
)
def test_other_features_of_a_vgg(torchvision, features, units):
    model = narrow_vgg(torchvision, False)
    model.features = features
    assert [unit.name for unit in as_backbone(model).units] == units
    check_units_compose_to_the_model(model, as_backbone(model), 32)


def check_units_compose_to_the_model(model, backbone, side):
    model.eval()
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        features = x
        for unit in backbone.units:
            features = unit.module(features)
            assert features.shape[1] == unit.out_channels
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


def changed(kind):
    model = models.CifarResNet(2)
    if kind == "block":
        model.layer2[1] = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())
    elif kind == "stage":
        model.layer1 = nn.Conv2d(16, 16, 3, padding=1)
    elif kind == "empty stage":
        model.layer1 = nn.Sequential()
    elif kind == "head":
        model.fc = nn.Sequential(nn.Linear(64, 8), nn.Unflatten(1, (2, 4)), nn.Flatten(1), nn.Linear(8, 10))
    elif kind == "norm":
        model.layer1[0].bn1 = nn.GroupNorm(4, 16)
    return model


@pytest.mark.parametrize(
    ("kind", "units"),
    [
        ("block", "stem layer1.0 layer1.1 layer2.0 layer2.1 layer3.0 layer3.1"),
        ("stage", "stem layer1 layer2.0 layer2.1 layer3.0 layer3.1"),
        ("empty stage", "stem layer2.0 layer2.1 layer3.0 layer3.1"),
        ("head", "stem layer1.0 layer1.1 layer2.0 layer2.1 layer3.0 layer3.1"),
        ("norm", "stem layer1.0 layer1.1 layer2.0 layer2.1 layer3.0 layer3.1"),
    ],
)
def test_replaced_parts_of_a_resnet(kind, units):
    model = changed(kind)
    backbone = as_backbone(model)
    assert " ".join(unit.name for unit in backbone.units) == units
    check_units_compose_to_the_model(model, backbone, 16)


def test_what_cannot_be_cut_says_why():
    no_classifier, narrow_stem = models.CifarResNet(2), models.CifarResNet(2)
    no_classifier.fc, narrow_stem.conv1 = nn.Identity(), nn.Conv2d(3, 8, 3, 1, 1)
    with pytest.raises(ValueError, match=r"it has no classifier: its last layer with weights is layer3\.1\.conv2"):
        as_backbone(no_classifier)
    with pytest.raises(ValueError, match=r"bn1 cannot take an input of shape \(3, 8, 256, 256\)"):
        as_backbone(narrow_stem)
    with pytest.raises(ValueError, match="cannot cut Identity into units: "):
        as_backbone(nn.Identity())


def test_wrapped_models_and_no_models(tiny_model):
    with pytest.raises(ValueError, match="cannot cut DataParallel into units: pass the model in it, model.module"):
        as_backbone(nn.DataParallel(tiny_model))
    with pytest.raises(ValueError, match="from torch.compile into units: pass the model it was made from"):
        as_backbone(torch.compile(tiny_model))
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, .* given str"):
        as_backbone("resnet18")


class Doubled:
    def forward(self, x):
        return super().forward(x) * 2


def test_a_subclass_with_its_own_forward_is_followed(torchvision):
    kinds = models.CifarResNet, torchvision.models.VGG
    given = (1,), (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 512, 3)), 5)
    for kind, arguments in zip(kinds, given, strict=True):
        model = type("Wrapped", (Doubled, kind), {})(*arguments)
        check_units_compose_to_the_model(model, as_backbone(model), 16)
