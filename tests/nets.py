"""torchvision's networks, narrow: of their classes, and quick to make and to run."""

import torch
from torch import nn


def vgg(torchvision, layers, batch_norm=False, *, classifier, avgpool=None):
    """A VGG of these layers ("M": a max-pool), average pool and classifier.

    Of the class's own classifier nothing is made: to draw its 120 million weights would take a second.
    """
    module = torchvision.models.vgg
    features = module.make_layers(layers, batch_norm)
    with torch.device("meta"):
        model = module.VGG(features, init_weights=False)
    for layer in features:  # as the class does
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    model.avgpool, model.classifier = avgpool or nn.AdaptiveAvgPool2d(7), classifier
    return model


def resnet(torchvision, block="BasicBlock", blocks=(1, 1, 1, 1), width=8, num_classes=10, **options):
    """A ResNet of so many blocks a stage, the stem and the first stage of this width in place of 64."""
    module = torchvision.models.resnet
    block = getattr(module, block)
    with torch.device("meta"):
        model = module.ResNet(block, list(blocks), num_classes=num_classes, **options)
    model.conv1, model.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
    model.inplanes = width
    for stage, count in enumerate(blocks):
        layer = model._make_layer(block, width << stage, count, min(stage, 1) + 1)
        setattr(model, f"layer{stage + 1}", layer)
    model.fc = nn.Linear((width << 3) * block.expansion, num_classes)
    return model


def narrow(torchvision, name, num_classes=10):
    """A ResNet with the blocks of the one of that name, as many and of their kind, an eighth or a quarter as wide."""
    with torch.device("meta"):
        whole = getattr(torchvision.models, name)()
    blocks = [len(getattr(whole, f"layer{stage}")) for stage in (1, 2, 3, 4)]
    block = type(whole.layer1[0])
    width = 8 if block.expansion == 1 else 16
    options = {"groups": whole.groups, "width_per_group": whole.base_width}
    return resnet(torchvision, block.__name__, blocks, width, num_classes, **options)
