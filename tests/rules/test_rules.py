"""The cut into local modules, the sample of units, the aux nets."""

import itertools
import math

import nets
import numpy as np
import pytest
import torch
from torch import nn

from auglocal_ext import models
from auglocal_ext.backbone import as_backbone
from auglocal_ext.rules import DGL, InfoPro
from auglocal_ext.rules.auglocal import AugLocal
from auglocal_ext.rules.auxiliary import aux_depth, build_aux_net, sample_units
from auglocal_ext.rules.by_name import RULES, as_rule
from auglocal_ext.rules.cutting import Span, _balanced_borders, cut, local_heads
from auglocal_ext.rules.rule import Rule


@pytest.fixture(scope="module")
def resnet32():
    return as_backbone(models.resnet32())


def cut_by(backbone, depth=4, *, rule="auglocal", form=None, modules=None):
    return cut(backbone, as_rule(rule, depth, form), modules)


def samples(backbone, depth, form=None):
    rule = AugLocal(depth, form)
    return [rule.sample(backbone, part.last) for part in cut(backbone, rule)[:-1]]


def test_cifar_form(resnet32):
    """ResNet-32, d = 4, by hand from the rule: K = 13, and the units of the first and the last aux net."""
    cuts = cut_by(resnet32, 4)
    assert cuts == [*(Span(i, i) for i in range(12)), Span(12, 15)]
    chosen = samples(resnet32, 4)
    assert chosen[0].units == (5, 10, 15) and chosen[0].strides == (1, 2, 2)
    assert chosen[11].units == (13, 15) and chosen[11].strides == (1, 1)
    assert not any(sample.batch_norm_head for sample in chosen)
    assert all(sample.batch_norm_head for sample in samples(resnet32, 2))


def test_imagenet_form(resnet32):
    assert cut_by(resnet32, 4, form="imagenet") == [Span(i, i) for i in range(16)]
    chosen = samples(resnet32, 4, "imagenet")
    assert [len(sample.units) for sample in chosen] == [3] * 13 + [2, 1]
    assert not any(sample.batch_norm_head for sample in chosen)


def test_pyramid_rounds_half_to_even():
    # m = 3 of 4 modules: 3, 3 - 0.5 = 2.5 -> 2; m = 5: 5 - 2 * 0.5 * 4 / 4 = 3 at the end.
    assert [aux_depth(i, 8, 4, pyramid=True) for i in range(3)] == [4, 3, 2]  # 4, 3.25, 2.5 -> 2
    assert [aux_depth(i, 8, 4, pyramid=False) for i in range(3)] == [4, 4, 4]
    assert aux_depth(0, 5, 3, pyramid=True) == 3


def test_bp_is_one_module(resnet32):
    assert cut_by(resnet32, rule="bp") == cut_by(resnet32, rule="bp", modules=1) == [Span(0, 15)]
    assert cut_by(resnet32, 4, modules=1) == cut_by(resnet32, rule="checkpoint") == [Span(0, 15)]
    assert RULES["checkpoint"].recompute and not any(RULES[name].recompute for name in RULES if name != "checkpoint")


@pytest.mark.parametrize("modules", range(2, 17))
def test_modules_cover_the_network(resnet32, modules):
    rule = AugLocal(4)
    cuts = cut(resnet32, rule, modules)
    assert len(cuts) == modules
    assert [unit for part in cuts for unit in range(part.first, part.last + 1)] == list(range(16))
    for part in cuts[:-1]:
        chosen = rule.sample(resnet32, part.last).units
        assert len(chosen) == min(aux_depth(part.last, 16, 3, pyramid=True), 15 - part.last)
        assert chosen[-1] == 15 and list(chosen) == sorted(set(chosen)) and chosen[0] > part.last


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
        (
            {"rule": "hebb"},
            "rule must be one of auglocal, dgl, .*, checkpoint, or an auglocal_ext.Rule .* given 'hebb'",
        ),
        ({"rule": int}, "rule must be one of .*, given <class 'int'>"),
        ({"rule": "dgl", "form": "cifar"}, "form is a choice of rule 'auglocal': leave it out with 'dgl'"),
        ({"rule": InfoPro((0, 0), (1, 1))}, "needs a mean and a std for each of the 3 channels .* given 2 and 2"),
        ({"rule": InfoPro(0.5, 0.5)}, "needs a mean and a std for each of the 3 channels .* given 1 and 1"),
        ({"rule": InfoPro((0, 0, 0), (1, 0, 1))}, r"std must be finite and above 0.*, given \[1.0, 0.0, 1.0\]"),
        ({"rule": InfoPro((0, math.nan, 0), (1, 1, 1))}, "mean must be finite"),
        ({"form": "mnist"}, "form must be one of cifar, imagenet or None, given 'mnist'"),
        ({"rule": "bp", "modules": 3}, "rule='bp' has one module"),
    ],
)
def test_bad_arguments(resnet32, arguments, message):
    with pytest.raises(ValueError, match=message):
        cut_by(resnet32, **arguments)


@pytest.mark.parametrize("borders", [(15,), (-1, 3), (5, 3), (3, 3)])
def test_bad_borders(resnet32, borders):
    with pytest.raises(ValueError, match="borders must be units from 0 to 14 in rising order"):
        cut(resnet32, DGL(), borders=borders)


def test_whole_numbers_of_any_kind(resnet32):
    assert cut_by(resnet32, np.int64(4), modules=np.int32(3)) == cut_by(resnet32, 4, modules=3)


def test_the_deepest_allowed(resnet32):
    assert len(cut_by(resnet32, 15)) == 2
    assert len(samples(resnet32, 16, "imagenet")[0].units) == 15


def test_aux_nets_end_at_the_networks_resolution(resnet32):
    rule, features = AugLocal(4), torch.randn(2, 3, 32, 32)
    cuts = cut(resnet32, rule)
    for part, head in zip(cuts[:-1], local_heads(resnet32, rule, cuts, (3, 32, 32)), strict=False):
        features = resnet32.units[part.last].module(features)
        blocks, x = len(rule.sample(resnet32, part.last).units), features
        for block in head.net[:blocks]:
            x = block(x)
        assert x.shape == (2, 64, 8, 8)
        assert head.net[blocks:](x).shape == (2, 10)


def test_aux_net_is_its_own(resnet32):
    net = local_heads(resnet32, AugLocal(2), [Span(0, 3), Span(4, 15)], (3, 32, 32))[0].net
    assert [type(layer) for layer in net[1:]] == [nn.AdaptiveAvgPool2d, nn.Flatten, nn.BatchNorm1d, nn.Linear]
    own = {p.data_ptr() for unit in resnet32.units for p in unit.module.parameters()}
    assert not own & {p.data_ptr() for p in net.parameters()}


def test_weights_go_linearly_from_the_first_border_to_the_last(resnet32):
    def weights(backbone, rule):
        heads = local_heads(backbone, rule, cut(backbone, rule), (3, 32, 32))
        assert heads[-1].weights == (0, 1) and heads[-1].extra is None
        return np.array([head.weights for head in heads[:-1]])

    np.testing.assert_allclose(weights(resnet32, RULES["predsim"]()), [[0.99, 0.01]] * 15)
    np.testing.assert_allclose(weights(resnet32, RULES["dgl"]()), [[0, 1]] * 15)
    np.testing.assert_allclose(weights(resnet32, InfoPro()), np.linspace((5, 0.05), (0.2, 0.5), 15))
    deep = as_backbone(models.resnet110())
    np.testing.assert_allclose(weights(deep, InfoPro()), np.linspace((5, 0), (0.5, 1), 54))
    np.testing.assert_allclose(weights(deep, InfoPro(first=(1, 2), last=(3, 4)))[[0, -1]], [[1, 2], [3, 4]])


def test_the_pool_of_predsim_leaves_at_most_512_numbers(resnet32):
    heads = local_heads(resnet32, RULES["predsim"](), [Span(0, 0), Span(1, 6), Span(7, 11), Span(12, 15)], (3, 32, 32))
    assert [head.net[0].kernel_size for head in heads[:-1]] == [(8, 4), (4, 4), (4, 2)]
    assert [head.net[2].in_features for head in heads[:-1]] == [512, 512, 512]
    odd = local_heads(resnet32, RULES["predsim"](), [Span(0, 6), Span(7, 15)], (3, 37, 30))[0].net
    assert odd(torch.randn(2, 32, 19, 15)).shape == (2, 10) and odd[2].in_features <= 512


class Mine(Rule):
    pass


class Deep(AugLocal):
    pass


def test_a_rule_is_a_name_a_class_or_an_object():
    rule = InfoPro()
    assert as_rule(rule) is rule and type(as_rule("infopro")) is type(as_rule(InfoPro)) is InfoPro
    assert (as_rule("auglocal", 5, "cifar").depth, as_rule(AugLocal, 3).depth, as_rule("bp", 5).depth) == (5, 3, None)
    assert as_rule(Deep, 6).depth == 6 and as_rule(Deep, 6).name == "deep"
    assert as_rule(Mine).name == "mine" and list(RULES) == [rule().name for rule in RULES.values()]
    with pytest.raises(NotImplementedError, match=r"Mine must define aux_net\(border\)"):
        local_heads(as_backbone(models.resnet20()), Mine(), [Span(0, 0), Span(1, 9)], (3, 32, 32))


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
    assert cut_by(backbone, 5) == [Span(i, i) for i in range(10)]
    assert [(sample.units, sample.strides) for sample in samples(backbone, 5)] == [
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
    assert not any(sample.batch_norm_head for sample in samples(backbone, 2, "cifar"))


def test_aux_nets_of_vggs(torchvision):
    # Channels change where the network does not halve: pools stop at its last resolution.
    model = nets.vgg(torchvision, [4, 8, 16, "M", 32, 32], classifier=nn.Linear(32 * 7 * 7, 10))
    backbone = as_backbone(model)
    chosen = samples(backbone, 5)
    assert [sample.strides for sample in chosen] == [(2, 1, 1, 1), (2, 1, 1), (1, 1), (1,)]
    net, features = build_aux_net(backbone, 0, chosen[0]), torch.randn(2, 4, 2, 2)
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
        rule = AugLocal(3)
        net = local_heads(backbone, rule, cut(backbone, rule), (3, 224, 224))[2].net
    for unit, block in zip(rule.sample(backbone, 2).units, net, strict=False):
        original = backbone.units[unit].module
        assert type(block) is type(original)
        assert block.conv2.groups == original.conv2.groups == 32
        assert block.conv2.weight.shape == original.conv2.weight.shape
    assert net(torch.empty(2, 256, 56, 56, device="meta")).shape == (2, 1000)


@pytest.mark.parametrize("value", [True, np.True_, 3.0, np.float64(3), "3", torch.tensor(3.0)])
@pytest.mark.parametrize(
    ("rule", "argument", "message"),
    [
        ("auglocal", "depth", "depth must be a whole number of at least 2"),
        ("dgl", "modules", "modules must be a whole number from 1 to 16"),
        ("bp", "modules", "rule='bp' has one module: leave modules out, or set it to 1, given"),
        ("dgl", "borders", "borders must be units from 0 to 14 in rising order"),
    ],
)
def test_what_is_no_whole_number_is_refused(resnet32, rule, argument, message, value):
    given = {argument: [value] if argument == "borders" else value}
    depth = given.pop("depth", 4)
    with pytest.raises(ValueError, match=message):
        cut(resnet32, as_rule(rule, depth), **given)


def test_borders_of_any_integer_kind(resnet32):
    expected = cut(resnet32, DGL(), borders=(3, 7))
    for borders in ([np.int64(3), np.uint8(7)], np.array([3, 7]), torch.tensor([3, 7])):
        assert cut(resnet32, DGL(), borders=borders) == expected
    assert cut(resnet32, as_rule("bp"), np.int64(1)) == [Span(0, 15)]
