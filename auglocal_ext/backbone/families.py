"""The families of networks that are read: torchvision's ResNets and VGGs, and the CIFAR ResNets."""

import math
import sys
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import models
from ..common.meta import meta_copy, replaced_methods
from ..common.torchvision import import_torchvision
from .units import Backbone, Shapes, Unit

__all__ = ["as_backbone", "families"]


def as_backbone(model):
    """Reads a model as units and classifier.

    Args:
        model: a torchvision ResNet (resnet*, wide_resnet*, resnext*), a torchvision VGG (vgg*, vgg*_bn) or one of
            `auglocal_ext.models`; a ResNet's stem and fc and a VGG's classifier may have been replaced, and layers
            of a VGG's features.

    Raises:
        ValueError: it is none of them, or a part of it is not understood; names the first such part.
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
        return _read(model)
    except ValueError as error:
        if replaced := replaced_methods(model):
            raise ValueError(
                f"cannot cut {type(model).__name__} into units: {replaced[0]} was replaced on the object, and what it "
                f"does now cannot be read: put that into a layer's class instead ({error})"
            ) from error
        raise


def _read(model):
    meta_copy(model)  # says what cannot be copied, by its path in the model
    if isinstance(model, models.CifarResNet) and _keeps_forward(model, models.CifarResNet):
        return _residual_backbone(model, stem=("conv1", "bn1"), form="cifar")
    torchvision_resnet, torchvision_vgg = _imported("resnet"), _imported("vgg")
    resnet = torchvision_resnet and torchvision_resnet.ResNet
    if resnet and isinstance(model, resnet) and _keeps_forward(model, resnet):
        return _residual_backbone(model, stem=("conv1", "bn1", "relu", "maxpool"), form="imagenet")
    vgg = torchvision_vgg and torchvision_vgg.VGG
    if vgg and isinstance(model, vgg) and _keeps_forward(model, vgg):
        return _plain_backbone(model)
    if hasattr(model, "layer1") or (vgg and isinstance(model, vgg)):
        raise ValueError(f"cannot cut {type(model).__name__} into units: its own forward() is not understood")
    first, child = next(model.named_children(), ("forward()", None))
    kind = f" ({type(child).__name__})" if child is not None else ""
    raise ValueError(
        f"cannot cut {type(model).__name__} into units: its part {first!r}{kind} is not understood; expected a "
        f"ResNet or VGG of torchvision.models, or a ResNet of auglocal_ext.models"
    )


def families():
    """The classes whose models are read."""
    torchvision = import_torchvision("a list of what can be cut").models
    return models.CifarResNet, torchvision.ResNet, torchvision.VGG


def _imported(family):
    """torchvision's module of that name if it was imported: a model made by it cannot exist otherwise."""
    return sys.modules.get(f"torchvision.models.{family}")


def _keeps_forward(model, base):
    names = ("forward", "_forward_impl", "__call__")
    return all(
        name not in vars(model) and getattr(type(model), name, None) is getattr(base, name, None) for name in names
    )


def _residual_backbone(model, stem, form):
    # ._modules, here and below: named_children() leaves out a module that stands at a second place.
    stages = [name for name in model._modules if name.startswith("layer")]
    known = {*stem, *stages, "avgpool", "fc"}
    for name, child in model._modules.items():
        if name not in known:
            raise _not_understood(model, name, child)

    stem_module = nn.Sequential(*(getattr(model, name) for name in stem))
    if "relu" not in stem:
        stem_module.append(nn.ReLU())
    first_conv = next((m for m in stem_module.modules() if isinstance(m, nn.Conv2d)), None)
    if first_conv is None:
        raise _not_understood(model, "conv1", model.conv1)
    parts = [("stem", stem_module, None, None)]
    for stage in stages:
        blocks = getattr(model, stage)
        if type(blocks) is not nn.Sequential or "forward" in vars(blocks) or not len(blocks):
            raise _not_understood(model, stage, blocks)
        for name, block in blocks._modules.items():
            width, copy = _read_block(model, f"{stage}.{name}", block)
            parts.append((f"{stage}.{name}", block, width, copy))

    classifier = nn.Sequential(getattr(model, "avgpool", nn.AdaptiveAvgPool2d(1)), nn.Flatten(1), model.fc)
    units = _units(parts, first_conv)
    return Backbone(units, classifier, first_conv.in_channels, _classes("fc", classifier, units[-1], model), form)


def _plain_backbone(model):
    """Of a VGG: a unit begins with each convolution. The pool behind it belongs to it: its BatchNorm and ReLU then run
    with the pool, and what is handed on to the next module is small."""
    for name, child in model._modules.items():
        if name not in ("features", "avgpool", "classifier"):
            raise _not_understood(model, name, child)
    if type(model.features) is not nn.Sequential or "forward" in vars(model.features):
        raise _not_understood(model, "features", model.features)
    layers = []  # of each unit
    for name, layer in model.features._modules.items():
        if isinstance(layer, nn.Conv2d):
            layers.append({})
        elif not layers or any(isinstance(part, nn.Conv2d) for part in layer.modules()):
            raise _not_understood(model, f"features.{name}", layer)
        layers[-1][name] = layer
    if not layers:
        raise _not_understood(model, "features", model.features)
    parts = []
    for unit in layers:
        name, conv = next(iter(unit.items()))
        parts.append(
            (f"features.{name}", nn.Sequential(*unit.values()), conv.out_channels, _plain_copy(*unit.values()))
        )
    units = _units(parts, parts[0][1][0], plain=True)
    classifier = nn.Sequential(model.avgpool, nn.Flatten(1), model.classifier)
    classes = _classes("classifier", classifier, units[-1], model)
    return Backbone(units, classifier, parts[0][1][0].in_channels, classes, "imagenet")


def _classes(name, classifier, last_unit, model):
    """How many classes a classifier tells apart: what it puts out, not what its layers are called.

    A pool of a fixed size, or none, makes it depend on the size of the images, which is not known here: maps are tried
    until one fits, square ones and then those of one row.
    """
    if not list(getattr(model, name).parameters()):
        raise _not_understood(model, name, getattr(model, name))
    dtype = next(classifier.parameters()).dtype
    shapes, error = Shapes(name, classifier), None
    for height, width in [*((side, side) for side in range(1, 33)), *((1, length) for length in range(2, 1025))]:
        try:
            logits = shapes(torch.empty(2, last_unit.out_channels, height, width, dtype=dtype, device="meta"))
        except ValueError as refused:
            error = error or refused
            continue
        if logits.dim() != 2 or len(logits) != 2:
            raise ValueError(
                f"cannot cut {type(model).__name__} into units: its {name} must put out (N, classes), given "
                f"{('N', *logits.shape[1:])} for N images"
            )
        return logits.shape[1]
    raise ValueError(f"cannot cut {type(model).__name__} into units: {error}")


def _units(parts, first_conv, plain=False):
    """The units of (name, module, width or None for its output's, copy), with the shapes that tracing tells."""
    units, side = [], _SIDE
    x = torch.empty(2, first_conv.in_channels, side, side, device="meta", dtype=first_conv.weight.dtype)
    for name, module, width, copy in parts:
        x, kept = _trace(name, module, x)
        reduction = side // x.shape[2]
        numbers = width or x.shape[1], x.shape[1], reduction, kept / side**2
        units.append(Unit(name, module, *numbers, copy, plain, _least_width(module, width)))
    return tuple(units)


def _least_width(module, width):
    """The least base width that leaves a channel in each group of a block's convolutions."""
    grouped = [m.out_channels // m.groups for m in module.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    return math.ceil(width / min(grouped)) if grouped and width else 1


_SIDE = 256  # a power of two, so that every stride divides it: strides are read off traced shapes


def _trace(name, module, x):
    """The module's output on meta tensors, and the elements its convolutions put out, per image."""
    elements = 0

    def counted(forward, *given):
        nonlocal elements
        output = forward(*given)
        elements += output[0].numel()
        return output

    traced = Shapes(name, module)
    for part in traced.module.modules():
        if isinstance(part, nn.Conv2d):
            vars(part)["_compiled_call_impl"] = partial(counted, part.forward)
    return traced(x), elements


def _not_understood(model, name, part):
    return ValueError(
        f"cannot cut {type(model).__name__} into units: its part {name!r} ({type(part).__name__}) is not understood"
    )


def _read_block(model, name, block):
    """(base width, copy function) of a residual block."""
    torchvision_resnet = _imported("resnet")
    if type(block) is models.BasicBlock:
        own = block.conv1.out_channels
        return own, lambda in_channels, stride, width=own: models.BasicBlock(in_channels, width, stride)
    if torchvision_resnet and type(block) in (torchvision_resnet.BasicBlock, torchvision_resnet.Bottleneck):
        if not isinstance(block.bn1, _BatchNorm):
            raise _not_understood(model, f"{name}.bn1", block.bn1)
        return _read_torchvision_block(block)
    raise _not_understood(model, name, block)


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
