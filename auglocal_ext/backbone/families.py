"""Models as units; and for the families that AugLocal's authors trained, torchvision's ResNets and VGGs and the CIFAR
ResNets, the blocks as they copied them."""

import math
import sys
from dataclasses import replace

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import models
from ..common.meta import meta_copy, replaced_methods
from .cutter import cut_by_graph

__all__ = ["as_backbone"]


def as_backbone(model, units=None):
    """Reads a model as units and classifier.

    Args:
        model: a network from images (N, C, H, W) to logits (N, classes) whose forward is a graph of layers and
            functions: any of torchvision's classification models, `auglocal_ext.models`, or another.
        units: names of modules by their paths, such as ["conv1", "layer1", "layer2"], or of units as they are without
            it: a unit begins where each of these begins, and reaches to the next one's; the first begins with the
            images, the last ends before the classifier. Default: as the model's own blocks and layers are.

    Returns:
        Backbone, whose units have the model's own submodules.

    Raises:
        TypeError: model is no nn.Module.
        ValueError: its forward cannot be followed, or has nothing to cut at, or no unit can begin so; says why.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, such as torchvision.models.resnet18(), given {type(model).__name__}"
        )
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ValueError(f"cannot cut {type(model).__name__} into units: pass the model in it, model.module")
    if hasattr(model, "_orig_mod"):
        raise ValueError("cannot cut a model from torch.compile into units: pass the model it was made from")
    try:
        return _read(model, units)
    except ValueError as error:
        if replaced := replaced_methods(model):
            raise ValueError(
                f"cannot cut {type(model).__name__} into units: {replaced[0]} was replaced on the object, and what it "
                f"does now cannot be read: put that into a layer's class instead ({error})"
            ) from error
        raise


def _read(model, units):
    meta_copy(model)  # says what cannot be copied, by its path in the model
    backbone = cut_by_graph(model, units)
    plain, blocks = isinstance(model, _known("VGG", "vgg")), dict(model.named_modules())
    form = "imagenet" if plain or isinstance(model, _known("ResNet", "resnet")) else None
    form = "cifar" if isinstance(model, models.CifarResNet) else form
    return replace(
        backbone, units=tuple(_with_copies(unit, blocks.get(unit.name), plain) for unit in backbone.units), form=form
    )


def _with_copies(unit, block, plain):
    """A unit with the authors' copies, where they have any for such a one. block: the module of its name, or None."""
    if _is_residual(block) and set(unit.module.parameters()) == set(block.parameters()):
        width, copy = _read_block(block)
        return replace(unit, module=block, width=width, copy=copy, least_width=_least_width(block, width))
    layers = [*unit.module] if type(unit.module) is nn.Sequential else [unit.module]
    if plain and type(layers[0]) is nn.Conv2d and not any(isinstance(m, nn.Conv2d) for m in layers[1:]):
        return replace(unit, copy=_plain_copy(*layers), plain=True)
    return unit


def _known(kind, family):
    """torchvision's class of that name, in a tuple, if it was imported: a model made by it cannot exist otherwise."""
    module = sys.modules.get(f"torchvision.models.{family}")
    return () if module is None else (getattr(module, kind),)


def _least_width(module, width):
    """The least base width that leaves a channel in each group of a block's convolutions."""
    grouped = [m.out_channels // m.groups for m in module.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    return math.ceil(width / min(grouped)) if grouped and width else 1


def _is_residual(block):
    known = (models.BasicBlock, *_known("BasicBlock", "resnet"), *_known("Bottleneck", "resnet"))
    return type(block) in known and isinstance(block.bn1, _BatchNorm)


def _read_block(block):
    """(base width, copy function) of a residual block."""
    if type(block) is models.BasicBlock:
        own = block.conv1.out_channels
        return own, lambda in_channels, stride, width=own: models.BasicBlock(in_channels, width, stride)
    return _read_torchvision_block(block)


def _read_torchvision_block(block):
    kind, norm = type(block), _like(block.bn1)
    bottleneck = hasattr(block, "conv3")
    last = block.conv3 if bottleneck else block.conv2
    own, groups = last.out_channels // kind.expansion, block.conv2.groups
    options = {}
    if bottleneck:  # the inverse of torchvision's width = int(planes * (base_width / 64)) * groups
        options = {
            "groups": groups,
            "base_width": math.ceil(block.conv2.out_channels // groups * 64 / own),
            "dilation": block.conv2.dilation[0],
        }

    def copy(in_channels, stride, width=own):
        downsample, out_channels = None, width * kind.expansion
        if stride != 1 or in_channels != out_channels:
            shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            downsample = nn.Sequential(shortcut, norm(out_channels))
        return kind(in_channels, width, stride, downsample, norm_layer=norm, **options)

    return own, copy


def _plain_copy(conv, *behind):
    """The copy function of conv-[BN-]ReLU-[pool]: conv-BN-ReLU, in any case with a BatchNorm, which makes a bias
    useless; a stride of 2 is a max-pool before it."""
    norm = next((_like(layer) for layer in behind if isinstance(layer, _BatchNorm)), nn.BatchNorm2d)
    shape = {"kernel_size": conv.kernel_size, "padding": conv.padding, "dilation": conv.dilation, "bias": False}

    def copy(in_channels, stride, width=conv.out_channels):
        layers = [nn.Conv2d(in_channels, width, **shape), norm(width), nn.ReLU()]
        return nn.Sequential(*([nn.MaxPool2d(2)] if stride == 2 else []), *layers)

    return copy


def _like(bn):
    """channels -> a new BatchNorm of the same kind."""

    def make(channels):
        try:
            return type(bn)(channels, eps=bn.eps, momentum=bn.momentum)
        except TypeError as error:
            raise ValueError(
                f"auxiliary nets have BatchNorms like the model's, and {type(bn).__name__}(channels, eps=, momentum=) "
                f"makes none ({error}): let its constructor take these, or train with a rule that copies no block, "
                f"such as rule='dgl' or 'bp'"
            ) from error

    return make
