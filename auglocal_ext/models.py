"""The paper's CIFAR ResNets (He et al. 2015, section 4.2), and models by name.

Three stages of 16, 32 and 64 channels; a shape change has a 1x1 convolution and a BatchNorm on its
shortcut, as in the AugLocal authors' code. state_dict keys: conv1 bn1 layer1..3 fc.
"""

import math
from difflib import get_close_matches

import torch
import torch.nn.functional as F
from torch import nn

__all__ = [
    "BasicBlock",
    "CifarResNet",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
    "create",
    "init_weights",
    "initialised",
    "name_of",
    "names",
    "timm_names",
]


class BasicBlock(nn.Module):
    """conv-BN-ReLU-conv-BN, plus the shortcut, then ReLU: (N, in_channels, H, W) -> (N, channels, H / stride, W /
    stride), rounded up.

    Args:
        in_channels, channels: of what it is given and of what it puts out.
        stride: of the first convolution; where it is not 1, or channels change, the shortcut is a 1x1 convolution and a
            BatchNorm.
    """

    def __init__(self, in_channels, channels, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(y + shortcut)


class CifarResNet(nn.Module):
    """ResNet of 6n + 2 layers for small images: (N, in_channels, H, W) -> logits (N, num_classes).

    Args:
        blocks_per_stage: n, of `BasicBlock`, in each of the three stages.
        num_classes: how many logits.
        in_channels: of the images.
    """

    def __init__(self, blocks_per_stage: int, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks_per_stage, stride=1)
        self.layer2 = self._stage(16, 32, blocks_per_stage, stride=2)
        self.layer3 = self._stage(32, 64, blocks_per_stage, stride=2)
        self.fc = nn.Linear(64, num_classes)
        init_weights(self)

    @staticmethod
    def _stage(in_channels, channels, blocks, stride):
        first = BasicBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(blocks - 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def init_weights(module):
    """The initialisation of the paper's code, in place: weights of convolutions are drawn from a normal distribution
    of mean 0 and deviation sqrt(2 / (kernel H x kernel W x out channels)) (He et al. 2015, arXiv:1502.01852, section
    2.2, of the backward pass), weights of BatchNorms are 1, their biases 0; nothing else changes.

    Args:
        module: an nn.Module, all of whose Conv2d and BatchNorm2d are initialised.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            k = part.kernel_size[0] * part.kernel_size[1]
            nn.init.normal_(part.weight, 0.0, math.sqrt(2 / (k * part.out_channels)))
        elif isinstance(part, nn.BatchNorm2d) and part.affine:
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)


def initialised(*layers):
    """A net of these layers, an nn.Sequential or a single one itself, initialised by `init_weights`."""
    net = layers[0] if len(layers) == 1 else nn.Sequential(*layers)
    init_weights(net)
    return net


def resnet20(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """A new ResNet-20 for small images, untrained; num_classes and in_channels: see `CifarResNet`."""
    return CifarResNet(3, num_classes, in_channels)


def resnet32(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """A new ResNet-32 for small images, untrained; num_classes and in_channels: see `CifarResNet`."""
    return CifarResNet(5, num_classes, in_channels)


def resnet44(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """A new ResNet-44 for small images, untrained; num_classes and in_channels: see `CifarResNet`."""
    return CifarResNet(7, num_classes, in_channels)


def resnet56(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """A new ResNet-56 for small images, untrained; num_classes and in_channels: see `CifarResNet`."""
    return CifarResNet(9, num_classes, in_channels)


def resnet110(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """A new ResNet-110 for small images, untrained; num_classes and in_channels: see `CifarResNet`."""
    return CifarResNet(18, num_classes, in_channels)


_CIFAR = {model.__name__: model for model in (resnet20, resnet32, resnet44, resnet56, resnet110)}


TIMM = "timm:"  # begins the name of a model of timm's


def names() -> list[str]:
    """The names of what `create` makes, timm's left out: the CIFAR ResNets, then torchvision's classifiers. ImportError
    without torchvision."""
    from .common.torchvision import import_torchvision

    models = import_torchvision("a list of all models").models
    return [*_CIFAR, *models.list_models(module=models)]


def timm_names() -> list[str]:
    """The names of timm's models, as `create` takes them. ImportError without timm."""
    from .common.timm import import_timm

    return [TIMM + name for name in import_timm("a list of timm's models").list_models()]


def create(name: str, num_classes: int) -> nn.Module:
    """A new model by name, untrained: one of the CIFAR ResNets here, torchvision's classifier of that name, or as
    "timm:resnet50d" one of timm's.

    Args:
        name: one of `names` or `timm_names`.
        num_classes: how many logits it puts out.

    Returns:
        nn.Module, on the CPU (or the device that torch makes tensors on), in training mode.

    Raises:
        ValueError: there is none, or it is no image classifier.
        ImportError: it is of a library that is not installed.
    """
    if name in _CIFAR:
        return _CIFAR[name](num_classes)
    if name.startswith(TIMM):
        return _create_timms(name, num_classes)
    from .common.torchvision import import_torchvision

    models = import_torchvision(f"the model {name!r}").models
    expected = (
        f"expected one of {', '.join(_CIFAR)}, a classifier of torchvision.models such as resnet18 or vgg13_bn, or "
        f"timm:NAME for one of timm's"
    )
    # Asked before it is made: what is no classifier takes other arguments, and may fetch weights.
    if name.lower() not in models.list_models(module=models):
        if name.lower() in models.list_models():
            raise ValueError(f"the model {name!r} of torchvision is no image classifier: {expected}")
        raise ValueError(f"no model is named {name!r}: {expected}")
    return models.get_model(name, weights=None, num_classes=num_classes)


def _create_timms(name, num_classes):
    from .common.timm import import_timm

    timm, own = import_timm(f"the model {name!r}"), name.removeprefix(TIMM)
    if not timm.is_model(own):
        near = get_close_matches(own, timm.list_models(), n=3)
        raise ValueError(
            f"timm has no model {own!r}: expected a name that timm.list_models() has"
            f"{f', such as {TIMM}' + f' or {TIMM}'.join(near) if near else ''}"
        )
    return timm.create_model(own, pretrained=False, num_classes=num_classes)


# Block, blocks per stage, groups, base width, as torchvision builds them.
_RESNETS = {
    ("BasicBlock", (2, 2, 2, 2), 1, 64): "resnet18",
    ("BasicBlock", (3, 4, 6, 3), 1, 64): "resnet34",
    ("Bottleneck", (3, 4, 6, 3), 1, 64): "resnet50",
    ("Bottleneck", (3, 4, 23, 3), 1, 64): "resnet101",
    ("Bottleneck", (3, 8, 36, 3), 1, 64): "resnet152",
    ("Bottleneck", (3, 4, 6, 3), 32, 4): "resnext50_32x4d",
    ("Bottleneck", (3, 4, 23, 3), 32, 8): "resnext101_32x8d",
    ("Bottleneck", (3, 4, 23, 3), 64, 4): "resnext101_64x4d",
    ("Bottleneck", (3, 4, 6, 3), 1, 128): "wide_resnet50_2",
    ("Bottleneck", (3, 4, 23, 3), 1, 128): "wide_resnet101_2",
}
# Convolutions of each width from 64 to 512, the last one's two stages together.
_VGGS = {(1, 1, 2, 4): "vgg11", (2, 2, 2, 4): "vgg13", (2, 2, 3, 6): "vgg16", (2, 2, 4, 8): "vgg19"}


def name_of(model: nn.Module) -> str:
    """What a model is called.

    Args:
        model: any module.

    Returns:
        "resnet32", or "wide_resnet50_2" where torchvision's function of that name builds such a one, with other classes
        or another stem too; "timm:resnet50d" where timm has made it; else the name of its class.
    """
    kind, name = type(model), None
    if kind is CifarResNet:
        name = _cifar_name(model)
    elif (kind.__module__, kind.__name__) == ("torchvision.models.resnet", "ResNet"):
        name = _resnet_name(model)
    elif (kind.__module__, kind.__name__) == ("torchvision.models.vgg", "VGG"):
        name = _vgg_name(model)
    elif kind.__module__.startswith("timm.models."):
        made_as = getattr(model, "pretrained_cfg", None) or {}
        name = made_as.get("architecture") and TIMM + made_as["architecture"]
    return name or kind.__name__


def _cifar_name(model):
    blocks = {len(stage) for stage in (model.layer1, model.layer2, model.layer3)}
    name = f"resnet{6 * max(blocks) + 2}"
    return name if len(blocks) == 1 and name in _CIFAR else None


def _resnet_name(model):
    stages = [list(stage.children()) for stage in (model.layer1, model.layer2, model.layer3, model.layer4)]
    blocks = {type(block).__name__ for stage in stages for block in stage}
    return _RESNETS.get((*blocks, tuple(map(len, stages)), model.groups, model.base_width))


def _vgg_name(model):
    layers = list(model.features.children())
    widths = [layer.out_channels for layer in layers if isinstance(layer, nn.Conv2d)]
    norms = sum(isinstance(layer, nn.BatchNorm2d) for layer in layers)
    name = _VGGS.get(tuple(widths.count(width) for width in (64, 128, 256, 512)))
    known = name and widths == sorted(widths) and set(widths) == {64, 128, 256, 512} and norms in (0, len(widths))
    return name + "_bn" * (norms > 0) if known else None
