"""The cut into local modules, the sample of units, the aux nets."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from auglocal_ext import models
from auglocal_ext.auxiliary import aux_depth, build_aux_net, sample_units
from auglocal_ext.backbone import as_backbone
from auglocal_ext.rules import _balanced_borders, build_head, cut


@pytest.fixture(scope="module")
def resnet32():
    return as_backbone(models.resnet32())


def test_cifar_form(resnet32):
    """ResNet-32, d = 4, by hand from the rule: K = 13, and the units of the first and the last aux net."""
    cuts = cut(resnet32, 4)
    assert [(part.first, part.last) for part in cuts] == [*((i, i) for i in range(12)), (12, 15)]
    assert cuts[0].sample.units == (5, 10, 15) and cuts[0].sample.strides == (1, 2, 2)
    assert cuts[11].sample.units == (13, 15) and cuts[11].sample.strides == (1, 1)
    assert cuts[-1].sample is None
    assert not any(part.sample.batch_norm_head for part in cuts[:-1])
    assert all(part.sample.batch_norm_head for part in cut(resnet32, 2)[:-1])


def test_imagenet_form(resnet32):
    cuts = cut(resnet32, 4, form="imagenet")
    assert [(part.first, part.last) for part in cuts] == [(i, i) for i in range(16)]
    assert [len(part.sample.units) for part in cuts[:-1]] == [3] * 13 + [2, 1]
    assert not any(part.sample.batch_norm_head for part in cuts[:-1])


def test_pyramid_rounds_half_to_even():
    # m = 3 of 4 modules: 3, 3 - 0.5 = 2.5 -> 2; m = 5: 5 - 2 * 0.5 * 4 / 4 = 3 at the end.
    assert [aux_depth(i, 8, 4, pyramid=True) for i in range(3)] == [4, 3, 2]  # 4, 3.25, 2.5 -> 2
    assert [aux_depth(i, 8, 4, pyramid=False) for i in range(3)] == [4, 4, 4]
    assert aux_depth(0, 5, 3, pyramid=True) == 3


def test_bp_is_one_module(resnet32):
    (whole,) = cut(resnet32, rule="bp")
    assert (whole.first, whole.last, whole.sample) == (0, 15, None)
    assert cut(resnet32, rule="bp", modules=1) == [whole] == cut(resnet32, 4, modules=1)


@pytest.mark.parametrize("modules", range(2, 17))
def test_modules_cover_the_network(resnet32, modules):
    cuts = cut(resnet32, 4, modules=modules)
    assert len(cuts) == modules
    assert [unit for part in cuts for unit in range(part.first, part.last + 1)] == list(range(16))
    assert cuts[-1].sample is None
    for part in cuts[:-1]:
        assert part.sample.units[-1] == 15
        blocks = min(aux_depth(part.last, 16, 3, pyramid=True), 15 - part.last)
        assert len(part.sample.units) == blocks
        assert list(part.sample.units) == sorted(set(part.sample.units)) and part.sample.units[0] > part.last


def test_borders_make_the_largest_part_smallest():
    """Against every cut there is."""
    sizes = [5, 1, 1, 8, 2, 2, 3, 1]
    for parts in range(1, 9):
        borders = (-1, *_balanced_borders(sizes, parts), 7)
        largest = max(sum(sizes[a + 1 : b + 1]) for a, b in itertools.pairwise(borders))
        best = min(
            max(sum(sizes[a:b]) for a, b in itertools.pairwise((0, *middle, 8)))
            for middle in itertools.combinations(range(1, 8), parts - 1)
        )
        assert largest == best and len(borders) == parts + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 1}, "depth must be a whole number of at least 2 .*, given 1"),
        ({"depth": 2.5}, "depth must be a whole number"),
        ({"depth": 16}, "depth must be at most 15 for this network of 16 units, given 16"),
        ({"depth": 17, "form": "imagenet"}, "depth must be at most 16"),
        ({"modules": 0}, "modules must be a whole number from 1 to 16, the units of this network, given 0"),
        ({"modules": 17}, "modules must be a whole number from 1 to 16"),
        ({"modules": 2.0}, "modules must be a whole number"),
        ({"rule": "hebb"}, "rule must be one of auglocal, bp, given 'hebb'"),
        ({"form": "mnist"}, "form must be one of cifar, imagenet or None, given 'mnist'"),
        ({"rule": "bp", "modules": 3}, "rule='bp' has one module"),
    ],
)
def test_bad_arguments(resnet32, arguments, message):
    with pytest.raises(ValueError, match=message):
        cut(resnet32, **arguments)


def test_whole_numbers_of_any_kind(resnet32):
    assert cut(resnet32, np.int64(4), modules=np.int32(3)) == cut(resnet32, 4, modules=3)


def test_the_deepest_allowed(resnet32):
    assert len(cut(resnet32, 15)) == 2
    assert len(cut(resnet32, 16, form="imagenet")[0].sample.units) == 15


def test_aux_nets_end_at_the_networks_resolution(resnet32):
    x = torch.randn(2, 3, 32, 32)
    for part in cut(resnet32, 4)[:-1]:
        features = x
        for unit in resnet32.units[: part.last + 1]:
            features = unit.module(features)
        net = build_head(resnet32, part)
        for block in net[: len(part.sample.units)]:
            features = block(features)
        assert features.shape == (2, 64, 8, 8)
        assert net[len(part.sample.units) :](features).shape == (2, 10)


def test_aux_net_is_its_own(resnet32):
    part = cut(resnet32, 2)[3]
    net = build_head(resnet32, part)
    assert [type(layer) for layer in net[1:]] == [nn.AdaptiveAvgPool2d, nn.Flatten, nn.BatchNorm1d, nn.Linear]
    own = {p.data_ptr() for unit in resnet32.units for p in unit.module.parameters()}
    assert not own & {p.data_ptr() for p in net.parameters()}


def test_initialisation():
    torch.manual_seed(0)
    backbone = as_backbone(models.resnet32())
    net = build_aux_net(backbone, 0, sample_units(backbone.units, 0, 3, False))
    conv = net[2].conv2
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.02)
    assert torch.equal(net[2].bn2.weight, torch.ones(64)) and not net[2].bn2.bias.any()


def test_samples_of_vgg13(torchvision):
    """d = 5, by hand from the rule: a pool where the channels change."""
    with torch.device("meta"):
        backbone = as_backbone(torchvision.models.vgg13())
    cuts = cut(backbone, 5)
    assert len(cuts) == 10 and cuts[-1].sample is None
    assert [(part.sample.units, part.sample.strides) for part in cuts[:-1]] == [
        ((2, 4, 7, 9), (2, 2, 2, 1)),
        ((3, 5, 7, 9), (2, 2, 2, 1)),
        ((4, 6, 7, 9), (2, 2, 1, 1)),
        ((4, 6, 8, 9), (2, 2, 1, 1)),
        ((5, 6, 8, 9), (1, 2, 1, 1)),
        ((6, 7, 8, 9), (2, 1, 1, 1)),
        ((7, 8, 9), (1, 1, 1)),
        ((8, 9), (1, 1)),
        ((9,), (1,)),
    ]
    assert not any(part.sample.batch_norm_head for part in cut(backbone, 2, form="cifar")[:-1])


def test_aux_nets_of_vggs(torchvision):
    vgg = torchvision.models.vgg
    # Channels change where the network does not halve: pools stop at its last resolution.
    model = vgg.VGG(vgg.make_layers([4, 8, 16, "M", 32, 32]), num_classes=10)
    backbone = as_backbone(model)
    samples = [part.sample for part in cut(backbone, 5)[:-1]]
    assert [sample.strides for sample in samples] == [(2, 1, 1, 1), (2, 1, 1), (1, 1), (1,)]
    net, features = build_aux_net(backbone, 0, samples[0]), torch.randn(2, 4, 2, 2)
    kinds = [type(layer) for layer in net[4:]]
    middle = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert kinds == [nn.Flatten, nn.AdaptiveAvgPool1d, *middle, *middle, nn.Linear]
    assert [layer.weight.shape for layer in net if isinstance(layer, nn.Linear)] == [(512, 512), (512, 512), (10, 512)]
    assert net[:4](features).shape == (2, 32, 1, 1) and net(features).shape == (2, 10)
    conv = net[3][0]
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 32)), rel=0.05) and conv.bias is None


def test_aux_nets_of_bottlenecks_have_the_sampled_blocks_shape(torchvision):
    with torch.device("meta"):
        backbone = as_backbone(torchvision.models.resnext50_32x4d())
        part = cut(backbone, 3)[2]
        net = build_head(backbone, part)
    for unit, block in zip(part.sample.units, net, strict=False):
        original = backbone.units[unit].module
        assert type(block) is type(original)
        assert block.conv2.groups == original.conv2.groups == 32
        assert block.conv2.weight.shape == original.conv2.weight.shape
    assert net(torch.empty(2, 256, 56, 56, device="meta")).shape == (2, 1000)
