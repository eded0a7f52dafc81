"""Programs of local modules: the values and statistics of autograd, islands, memory, and errors on the way."""

import copy
import gc
import itertools
import random
from statistics import median

import nets
import pytest
import torch
import torch.nn.functional as F
from ops_helpers import rounding
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from auglocal_ext import models
from auglocal_ext.backbone import as_backbone
from auglocal_ext.common.memory import LiveBytes
from auglocal_ext.common.meta import meta_copy
from auglocal_ext.engine.program import Program, build
from auglocal_ext.engine.schedule import LONGEST_REBUILD
from auglocal_ext.engine.trace import join, trace
from auglocal_ext.planning.module_nodes import programs
from auglocal_ext.rules.by_name import as_rule
from auglocal_ext.rules.cutting import cut, local_heads
from auglocal_ext.rules.rule import LocalHead
from auglocal_ext.training.local_module import LocalModule

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def randomise(module, seed=0):
    """BatchNorms as in the middle of a training; signs of both kinds."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            for tensor in (part.weight, part.bias, part.running_mean):
                if tensor is not None:
                    tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
    return module


def cut_up(model, dtype=torch.float64, autocast=None, size=(32, 32), modules=None, rule="auglocal", **options):
    """[(program, LocalModule)] of a model."""
    torch.manual_seed(0)
    backbone, rule = as_backbone(model), as_rule(rule, **options)
    cuts = cut(backbone, rule, modules)
    heads = local_heads(backbone, rule, cuts, (backbone.image_channels, *size))
    heads = [randomise(head.to(dtype)) for head in heads]
    randomise(model.to(dtype))
    units = [[unit.module for unit in backbone.units[part.first : part.last + 1]] for part in cuts]
    modules = [LocalModule(*both) for both in zip(units, heads, strict=True)]
    return list(zip(programs(backbone, cuts, heads, autocast=autocast, recompute=rule.recompute), modules, strict=True))


def nodes_of(module, inside=(), last=False):
    """(nodes, features) of a LocalModule."""
    nodes, out = [], "images"
    for index, unit in enumerate(module.body):
        made, out = trace(unit, {models.BasicBlock, *inside}, f"unit{index}", out)
        nodes += made
    features = None if last else out
    head, _ = trace(module.head, {models.BasicBlock, *inside}, "head", out)
    return join(nodes, head, features), features


def tensors_of(module, loss, logits, features):
    results = {"loss": loss, "logits": logits} | ({} if features is None else {"features": features})
    results |= {f"{name}.grad": p.grad for name, p in module.named_parameters()}
    return results | {name: b.clone() for name, b in module.named_buffers()}


def by_program(program, module, x, labels, images=None):
    module.zero_grad()
    given = x.clone()
    torch.manual_seed(7)
    features, logits, loss = program.run([x], labels, images)
    assert torch.equal(x, given), "the input was modified"
    assert not any(t.requires_grad for t in (logits, loss, features) if t is not None)
    return tensors_of(module, loss, logits, features)


def by_autograd(module, x, labels, last, autocast=None, images=None):
    """On a copy of the module."""
    module = copy.deepcopy(module)
    module.zero_grad()
    torch.manual_seed(7)
    with torch.autocast(x.device.type, autocast, autocast is not None):
        features, logits = module(x)
        loss = F.cross_entropy(logits, labels)
        if isinstance(module.head, LocalHead):
            (extra_weight, weight), extra = module.head.weights, module.head.extra
            loss = weight * loss + (0 if extra is None else extra_weight * extra(features, labels, images))
    loss.backward()
    return tensors_of(module, loss.detach(), logits.detach(), None if last else features.detach())


def assert_equal(ours, theirs, tolerance=1e-10):
    assert ours.keys() == theirs.keys()
    # What is zero but for rounding, as the gradient of a bias before a BatchNorm, is measured by the other gradients.
    floor = 1e-3 * max(t.norm() for name, t in theirs.items() if name.endswith("grad") and t is not None)
    for name, expected in theirs.items():
        assert (ours[name] is None) == (expected is None), name
        if expected is not None:
            assert ours[name].dtype == expected.dtype and ours[name].shape == expected.shape, name
            scale = max(expected.double().norm(), floor if name.endswith("grad") else 1e-30)
            assert (ours[name] - expected).double().norm() <= tolerance * scale, name


def batch(n, height, width, dtype=torch.float64, layout=torch.contiguous_format, channels=3):
    generator = torch.Generator().manual_seed(n + height)
    images = torch.randn(n, channels, height, width, generator=generator, dtype=torch.float64)
    return images.to(dtype).contiguous(memory_format=layout), torch.arange(n) % 10


def compare_chain(model, images, labels, islands=(), **options):
    """Every local module on the features that the one before handed on."""
    x = images
    for program, module in cut_up(model, size=images.shape[2:], **options):
        expected = by_autograd(module, x, labels, program.features is None, images=images)
        results = by_program(program, module, x, labels, images)
        assert_equal(results, expected)
        assert all(p.grad.stride() == p.stride() for p in module.parameters())
        assert set(program.gradients.values()) == set(module.parameters())
        assert {island.what for island in program.islands} <= set(islands)
        x = results.get("features")
    assert x is None


# ---- the backbones ------------------------------------------------------------------------------------------


POOLING = {"0 (AvgPool2d)", "0 (AdaptiveAvgPool2d)", "3 (AdaptiveAvgPool2d)", "10 (AdaptiveAvgPool2d)", "0 (Upsample)"}
FLAT = {f"{i} ({kind})" for i in range(20) for kind in ("Flatten", "Linear", "BatchNorm1d", "ReLU")}


@pytest.mark.covering(2)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", ["dgl", "predsim", "infopro"])
@pytest.mark.parametrize(("size", "modules"), [((4, 16, 16), None), ((3, 18, 13), 3)])
def test_other_rules_equal_autograd(rule, size, modules, layout):
    """What is no convolution, BatchNorm chain or loss in their nets runs by autograd, and nothing else does."""
    images, labels = batch(*size, layout=layout)
    images = images.sigmoid() - 0.5  # from 0 to 1 with InfoPro's normalisation undone
    compare_chain(models.resnet20(), images, labels, POOLING | FLAT, rule=rule, modules=modules)


def test_checkpoint_is_backpropagation_with_convolutions_run_again():
    images, labels = batch(4, 12, 12)
    compare_chain(models.resnet20(), images, labels, rule="checkpoint")
    ((program, _),) = cut_up(models.resnet20(), rule="checkpoint")
    convolutions = sum(isinstance(m, nn.Conv2d) for m in models.resnet20().modules())
    again = sum(step.kind == "recompute" for step in program.steps)
    assert convolutions // 2 <= again <= convolutions


@pytest.mark.covering(1)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("resnet20", (2, 9, 11), {"depth": 4}),
        ("resnet20", (4, 16, 16), {"depth": 2, "form": "imagenet"}),
        ("resnet20", (8, 4, 4), {"depth": 3, "modules": 2}),  # the last map is 1 x 1
        ("resnet20", (3, 5, 8), {"rule": "bp"}),
        ("resnet32", (2, 8, 8), {"depth": 6, "modules": 4}),
        ("resnet44", (2, 7, 7), {"depth": 2, "modules": 5}),
        ("resnet56", (2, 8, 8), {"depth": 5, "modules": 3}),
        ("resnet110", (2, 6, 6), {"rule": "bp"}),
    ],
)
def test_cifar_resnets_equal_autograd(name, size, options, layout):
    compare_chain(models.create(name, 10), *batch(*size, layout=layout), **options)


@pytest.mark.parametrize(
    ("blocks", "size", "options", "layout"),
    [
        ((2, 2, 2, 2), (8, 24, 24), {"depth": 4, "modules": 3}, torch.contiguous_format),  # the last map is 1 x 1
        ((2, 2, 2, 2), (8, 24, 24), {"depth": 2}, torch.channels_last),
        ((2, 2, 2, 2), (4, 37, 50), {"depth": 3, "modules": 2}, torch.contiguous_format),
        ((3, 4, 6, 3), (2, 60, 60), {"depth": 3, "form": "cifar", "modules": 4}, torch.channels_last),
    ],
)
def test_torchvisions_resnets_equal_autograd(torchvision, blocks, size, options, layout):
    """Narrow, with as many blocks as resnet18 and resnet34."""
    compare_chain(nets.resnet(torchvision, blocks=blocks), *batch(*size, layout=layout), **options)


def test_a_whole_resnet18_equals_autograd(torchvision):
    model = torchvision.models.resnet18(num_classes=10)
    compare_chain(model, *batch(2, 33, 33, layout=torch.channels_last), rule="bp")


@pytest.mark.parametrize(
    ("blocks", "kind", "options", "layout"),
    [
        ((1, 2, 1, 1), {}, {"depth": 2}, torch.contiguous_format),  # as resnet50
        ((1, 1, 6, 1), {}, {"rule": "bp"}, torch.channels_last),  # as resnet101
        ((1, 1, 2, 1), {"width_per_group": 128}, {"depth": 2, "modules": 2}, torch.channels_last),  # as wide_resnet50_2
        ((2, 1, 1, 1), {"groups": 32, "width_per_group": 4}, {"depth": 3, "modules": 3}, torch.contiguous_format),
    ],
)
def test_bottlenecks_equal_autograd(torchvision, blocks, kind, options, layout):
    """The blocks of the deep ResNets, fewer of them and narrow; the last as in resnext50_32x4d."""
    compare_chain(
        nets.resnet(torchvision, "Bottleneck", blocks, 16, **kind), *batch(2, 60, 60, layout=layout), **options
    )


def narrow_vgg(torchvision, batch_norm, layers=(4, 6, "M", 8, 8, "M", 8, 12, "M")):
    classifier = nn.Sequential(nn.Linear(12 * 49, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 10))
    return nets.vgg(torchvision, layers, batch_norm, classifier=classifier)


@pytest.mark.covering(2)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("size", "options"),
    [((4, 32, 32), {"depth": 3}), ((4, 9, 13), {"depth": 4, "modules": 3}), ((4, 16, 20), {"rule": "bp"})],
)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_vggs_equal_autograd(torchvision, batch_norm, size, options, layout):
    """By autograd run the linear layers, nothing else."""
    x, labels = batch(*size, layout=layout)
    tail = {"Flatten", "AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "Linear", "BatchNorm1d", "ReLU", "Dropout"}
    for program, module in cut_up(narrow_vgg(torchvision, batch_norm), **options):
        expected = by_autograd(module, x, labels, program.features is None)
        results = by_program(program, module, x, labels)
        assert_equal(results, expected)
        assert {island.what.split("(")[1][:-1] for island in program.islands} <= tail
        assert sum("ReLU" in island.what for island in program.islands) <= 2
        x = results.get("features")


def test_a_convolution_with_a_relu_keeps_one_map(torchvision):
    """And with a max-pool only the small one and a byte for each of its pixels."""
    x, labels = batch(2, 16, 16, torch.float32)
    for layers, kept in (((4, 12), 16 * 256 * 4), ((4, 12, "M"), 4 * 256 * 4 + 12 * 64 * 5)):
        ((program, _),) = cut_up(narrow_vgg(torchvision, False, layers), torch.float32, rule="bp")
        values = {program.input: x, program.labels: labels}
        with torch.no_grad():
            for step in itertools.takewhile(lambda step: step.part != "head", program.steps):
                program.execute(step, values)
        tensors = {t.untyped_storage().data_ptr(): t for t in values.values() if isinstance(t, torch.Tensor)}
        assert sum(t.nbytes for t in tensors.values()) == 2 * kept + x.nbytes + labels.nbytes


@pytest.mark.parametrize("weights", LAYOUTS)
@pytest.mark.parametrize("images", LAYOUTS)
def test_layouts_may_be_mixed(images, weights):
    model = models.CifarResNet(2).to(memory_format=weights)
    compare_chain(model, *batch(2, 8, 10, layout=images), depth=3, modules=2)


def test_images_of_any_strides():
    x, labels = batch(4, 8, 20)
    grey = x[:, :1].expand(-1, 3, -1, -1)
    stem = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 16, 3, padding=1))
    for given in (x[..., ::2], x.transpose(2, 3), grey):
        compare_chain(models.CifarResNet(1), given, labels, depth=2)
        model = models.CifarResNet(1)
        model.conv1 = copy.deepcopy(stem)  # a BatchNorm first
        compare_chain(model, given, labels, depth=2)


def test_the_classifier_without_a_bias():
    model = models.CifarResNet(1)
    model.fc = nn.Linear(64, 10, bias=False)
    compare_chain(model, *batch(4, 8, 8), depth=2)


def test_two_images_and_maps_of_one_pixel():
    """Statistics of two values: rounding errors in their difference grow."""
    x, labels = batch(2, 4, 4)
    for program, module in cut_up(models.resnet20(), depth=2, modules=2):
        expected = by_autograd(module, x, labels, program.features is None)
        results = by_program(program, module, x, labels)
        assert_equal(results, expected, 1e-6)
        x = results.get("features")


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_running_statistics_move_as_autograds(momentum):
    """Over several batches: a cumulative average depends on how many there were."""
    module = LocalModule([stem(), models.BasicBlock(4, 8, 2)], classifier(nn.BatchNorm1d(8), nn.Linear(8, 10)))
    module = randomise(module.double())
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.momentum = momentum
    nodes, features = nodes_of(module, last=True)
    program, twin = build(nodes, "images", features), copy.deepcopy(module)
    for size in (8, 9, 10):
        x, labels = batch(4, size, size)
        program.run([x], labels)
        twin(x)
    for (name, ours), theirs in zip(module.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=name)
    assert module.body[0][1].num_batches_tracked == 3


def rms(values):
    return (sum(v**2 for v in values) / len(values)) ** 0.5


def errors(given, exact):
    """Relative error of each kind of result, over tensors the root of the mean square."""
    kinds = {}
    for name, expected in exact.items():
        if expected.is_floating_point() and expected.norm() > 0:
            kind = "bias" if name.endswith("bias.grad") else name.rpartition(".")[2]
            kinds.setdefault(kind, []).append(((given[name].double() - expected).norm() / expected.norm()).item())
    return {kind: rms(values) for kind, values in kinds.items()}


@pytest.mark.covering(2)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("options", [{"depth": 4, "modules": 3}, {"depth": 2, "modules": 2}])
def test_the_error_is_at_most_twice_autograds(options, autocast, layout):
    dtype = autocast or torch.float32
    for program, module in cut_up(models.resnet20(), torch.float32, autocast, **options):
        last, found = program.features is None, []
        channels = 3 if module.body[0].__class__ is nn.Sequential else module.body[0].conv1.in_channels
        for size in (14, 15, 16):
            x, labels = batch(16, size, size, torch.float32, layout, channels)
            x = x if channels == 3 else x.to(dtype)
            exact = by_autograd(copy.deepcopy(module).double(), x.double(), labels, last)
            theirs = by_autograd(module, x, labels, last, autocast)
            ours = by_program(program, module, x, labels)
            assert ours["loss"].dtype == torch.float32 and all(p.grad.dtype == p.dtype for p in module.parameters())
            if not last:
                assert ours["features"].dtype == dtype and ours["features"].is_contiguous(memory_format=layout)
            found.append((errors(ours, exact), errors(theirs, exact)))
        for kind in found[0][0]:
            # The median of three: a ReLU's input that rounds to the other side of zero shows in all gradients.
            error, eager = (median(both[i][kind] for both in found) for i in range(2))
            assert error <= max(2 * eager, rounding(dtype)), kind


def test_float64_stays_under_bf16_as_under_autocast():
    x, labels = batch(2, 8, 8)
    ((program, module),) = cut_up(models.CifarResNet(1), autocast=torch.bfloat16, rule="bp")
    expected = by_autograd(module, x, labels, last=True, autocast=torch.bfloat16)
    assert_equal(by_program(program, module, x, labels), expected)


# ---- modules with islands, and other odd ones ----------------------------------------------------------------


def stem(*behind):
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), *behind)


def conv(**options):
    return nn.Conv2d(4, 4, 3, padding=1, **options)


def tail(*middle, channels=4):
    return nn.Sequential(*middle, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def classifier(*parts):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *parts)


class Container(nn.Sequential):
    pass


class Shift(nn.Module):
    """Writes over its input."""

    def forward(self, x):
        x -= 0.5
        return x


class Slice(nn.Module):
    """Of odd strides, like what it returns."""

    def forward(self, x):
        return x[..., ::2].transpose(2, 3)


class SumPool(nn.Module):
    """Whose gradient is an expanded tensor."""

    def forward(self, x):
        return x.sum((2, 3))


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Part(nn.Linear):
    """With parameters that get no gradient."""

    def __init__(self):
        super().__init__(4, 10)
        self.unused = nn.Linear(4, 4)


class Fixed(nn.Conv2d):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class Chains(nn.Module):
    """Functions between BatchNorms, and gradients that go two ways."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.BatchNorm2d(4) for _ in range(4))

    def forward(self, x):
        a = self.a(x)
        y = F.relu(a) + a
        y = self.b(y) + x
        z = self.c(y) + 1.0
        return torch.relu(torch.add(self.d(F.relu(z)), y, alpha=2))


class ReadBySeveral(nn.Module):
    """A BatchNorm that convolutions, a chain and a residual read."""

    def __init__(self):
        super().__init__()
        self.bn, self.bn1, self.bn2, self.conv1, self.conv2 = *(nn.BatchNorm2d(4) for _ in range(3)), conv(), conv()

    def forward(self, x):
        y = self.bn(x)
        y = F.relu(self.bn1(self.conv1(y)) + y)
        return F.relu(self.bn2(y) + self.conv2(y))


class ImagesReadTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn1, self.bn2, self.conv = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.conv(F.relu(self.bn2(x) + self.bn1(x)))


class MapReadTwice(nn.Module):
    """A convolution's output that a chain reads and, differentiated after it, a convolution and an island."""

    def __init__(self):
        super().__init__()
        self.conv, self.conv1, self.bn1, self.bn2 = conv(), conv(), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.pool, self.sigmoid = nn.MaxPool2d(2), nn.Sigmoid()

    def forward(self, x):
        y = self.conv(x)
        gate = self.sigmoid(y) + self.conv1(y)
        y = F.relu(self.bn1(y) + x)
        return self.pool(F.relu(self.bn2(gate + y)))


class OverTheRightOne(nn.Module):
    """Two BatchNorms in a row before an add: a rebuild may write over the one, not over the residual."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn0, self.bn, self.residual = conv(), *(nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x):
        residual = self.residual(x)
        return F.relu(self.bn(self.bn0(self.conv(residual))) + residual)


class AddedToItself(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.bn(x) + x)


class PreActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn1, self.conv1, self.bn2, self.conv2 = nn.BatchNorm2d(4), conv(), nn.BatchNorm2d(4), conv()

    def forward(self, x):
        return x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


def with_frozen(*names):
    block = models.BasicBlock(4, 8, 2)
    for name in names:
        getattr(block, name).eval()
    return block


def shared_weight():
    first, second = conv(), conv(bias=False)
    second.weight = first.weight
    return nn.Sequential(nn.Conv2d(3, 4, 1), first, nn.BatchNorm2d(4), nn.ReLU(), second, nn.BatchNorm2d(4))


def called_twice(module, *behind):
    return nn.Sequential(nn.Conv2d(3, 4, 1), module, *behind, conv(), module, nn.ReLU())


def twice_in_the_classifier():
    linear = nn.Linear(4, 4)
    return classifier(linear, nn.Tanh(), linear, nn.Linear(4, 10))


def shared_by_chain_and_island():
    block = models.BasicBlock(4, 4)
    block.bn1.eval()
    block.bn1.weight = block.bn2.weight
    return block


class PoolsOfOneMap(nn.Module):
    """A ReLU's output that pools of other windows, a convolution and an add read."""

    def __init__(self):
        super().__init__()
        self.conv, self.conv1, self.pool = conv(), conv(), nn.MaxPool2d(3, 1, 1)
        self.wide, self.ceil = nn.MaxPool2d((3, 5), (2, 1), (1, 2)), nn.MaxPool2d(3, 2, ceil_mode=True)

    def forward(self, x):
        y = F.relu(self.conv(x))
        y = self.pool(y) + self.conv1(y) + y
        return self.ceil(self.wide(y))


INSIDE = (
    PoolsOfOneMap,
    Chains,
    ReadBySeveral,
    ImagesReadTwice,
    MapReadTwice,
    OverTheRightOne,
    AddedToItself,
    PreActivation,
)
# name -> makes (units, head)
ODD = {
    "dropout": lambda: ([stem(nn.Dropout(0.3))], classifier(nn.Dropout(0.5), nn.Linear(4, 10))),
    "dropout in place": lambda: (
        [stem(conv(), nn.Dropout(0.3, inplace=True))],
        tail(conv(), nn.BatchNorm2d(4), nn.ReLU()),
    ),
    "mlp": lambda: ([stem()], classifier(nn.Linear(4, 9), nn.BatchNorm1d(9), nn.ReLU(True), nn.Linear(9, 10))),
    "relu6 in place": lambda: (
        [stem(conv(), nn.BatchNorm2d(4), nn.Hardtanh(0.0, 6.0, True), conv(), nn.ReLU(True))],
        tail(),
    ),
    "in place in a container": lambda: (
        [stem(conv(), Container(nn.Hardtanh(0.0, 6.0, True), nn.Identity()), conv())],
        tail(),
    ),
    "identity first": lambda: ([nn.Sequential(nn.Identity(), stem())], tail()),
    "padding first": lambda: ([nn.Sequential(nn.ZeroPad2d(1), nn.AvgPool2d(2, 1), stem())], tail()),
    "in place first": lambda: ([nn.Sequential(nn.Hardtanh(0.0, 6.0, True), Shift(), stem())], tail()),
    "batch norm first": lambda: ([nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), stem())], tail()),
    "pool first": lambda: ([nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), stem())], tail()),
    "no gradient first": lambda: ([nn.Sequential(Fixed(3, 3, 1), stem())], tail()),
    "two pools": lambda: ([stem(nn.MaxPool2d(3, 2, 1)), stem()[1:3].append(nn.MaxPool2d(2))], tail(conv())),
    "norms in a row": lambda: ([stem(nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), conv())], tail()),
    "norms to pool": lambda: (
        [stem(nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), conv(), nn.BatchNorm2d(4), nn.ReLU())],
        tail(),
    ),
    "group norm": lambda: ([stem(conv(), nn.GroupNorm(2, 4), nn.ReLU(), conv())], tail()),
    "slice": lambda: ([stem(conv(), Slice(), nn.BatchNorm2d(4), nn.ReLU())], tail()),
    "slice to pool": lambda: ([stem(Slice(), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))], tail(conv())),
    "convs in a row": lambda: ([stem(conv(), conv(groups=2), conv(bias=False))], tail()),
    "features of a conv": lambda: ([nn.Conv2d(3, 4, 3)], tail(nn.BatchNorm2d(4), nn.ReLU())),
    "a conv as classifier": lambda: ([stem()], nn.Sequential(conv(), nn.Conv2d(4, 10, 1), SumPool())),
    "sum pool": lambda: ([stem(), models.BasicBlock(4, 4)], nn.Sequential(SumPool(), nn.Linear(4, 10))),
    "linear of another kind": lambda: ([stem()], classifier(Scaled(4, 10))),
    "weight norm": lambda: ([stem()], classifier(nn.utils.parametrizations.weight_norm(nn.Linear(4, 10)))),
    "spectral norm": lambda: ([stem(nn.utils.spectral_norm(conv()), nn.BatchNorm2d(4))], tail()),
    "unused parameters": lambda: ([stem()], classifier(Part())),
    "frozen bn1": lambda: ([stem(), with_frozen("bn1")], tail(channels=8)),
    "frozen bn2": lambda: ([stem(), with_frozen("bn2")], tail(channels=8)),
    "frozen": lambda: ([stem().eval(), with_frozen("bn1", "bn2", "downsample")], tail(channels=8)),
    "shared conv": lambda: ([called_twice(conv(), nn.BatchNorm2d(4))], tail()),
    "shared norm": lambda: ([called_twice(nn.BatchNorm2d(4), nn.ReLU())], tail()),
    "shared frozen norm": lambda: ([called_twice(nn.BatchNorm2d(4).eval(), nn.ReLU())], tail()),
    "shared weight": lambda: ([shared_weight()], tail()),
    "shared linear": lambda: ([stem()], twice_in_the_classifier()),
    "shared by a chain and an island": lambda: ([stem(), shared_by_chain_and_island()], tail()),
    "chains": lambda: ([nn.Conv2d(3, 4, 1), Chains()], tail()),
    "read by several": lambda: ([nn.Conv2d(3, 4, 1), *(ReadBySeveral() for _ in range(4))], tail()),
    "images read twice": lambda: ([ImagesReadTwice()], tail()),
    "map read twice": lambda: ([nn.Conv2d(3, 4, 1), MapReadTwice(), MapReadTwice()], tail()),
    "over the right one": lambda: ([nn.Conv2d(3, 4, 1), OverTheRightOne(), OverTheRightOne()], tail()),
    "added to itself": lambda: ([stem(), *(AddedToItself() for _ in range(3))], tail(conv())),
    "pre-activation": lambda: ([nn.Conv2d(3, 4, 1), PreActivation(), PreActivation()], tail(nn.BatchNorm2d(4))),
    "conv relu": lambda: (
        [nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(True), conv(bias=False), nn.ReLU())],
        tail(conv()),
    ),
    "conv relu pool": lambda: (
        [nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(True), nn.MaxPool2d(2), conv(), nn.ReLU(), nn.MaxPool2d(3, 2, 1))],
        nn.Sequential(nn.MaxPool2d(2), *tail(conv(), nn.BatchNorm2d(4), nn.ReLU())),
    ),
    "conv relu norm": lambda: (
        [nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(True), nn.BatchNorm2d(4), nn.ReLU()), models.BasicBlock(4, 4)],
        tail(nn.Conv2d(4, 4, 1), nn.ReLU()),
    ),
    "relu and dropout": lambda: ([nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout(0.3), conv())], tail()),
    "images pooled": lambda: ([nn.Sequential(nn.MaxPool2d(2), stem())], tail()),
    "pools of one map": lambda: ([nn.Conv2d(3, 4, 1), PoolsOfOneMap()], tail(conv())),
    "long chain": lambda: ([stem()] + [models.BasicBlock(4, 4) for _ in range(9)], tail(models.BasicBlock(4, 4))),
}


def odd(name, last=False, dtype=torch.float64, device="cpu", **options):
    torch.manual_seed(1)
    units, head = ODD[name]()
    module = randomise(LocalModule(units, head).to(dtype))
    module = module if device == "cpu" else meta_copy(module)
    nodes, features = nodes_of(module, INSIDE, last)
    return build(nodes, "images", features, **options), module


@pytest.mark.covering(2)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", ODD)
def test_odd_modules_equal_autograd(name, last, layout):
    program, module = odd(name, last)
    x, labels = batch(4, 9, 10, layout=layout)
    expected = by_autograd(module, x.clone(), labels, last)
    random_numbers = torch.get_rng_state()
    assert_equal(by_program(program, module, x, labels), expected)
    assert torch.equal(torch.get_rng_state(), random_numbers)
    used = {p for p in module.parameters() if p.grad is not None}
    assert all(p.grad.stride() == p.stride() and not p.grad.requires_grad for p in used)
    pointers = {p.grad.untyped_storage().data_ptr() for p in used}
    assert len(pointers) == len(used), "two gradients share memory"


@pytest.mark.parametrize("name", ODD)
def test_odd_modules_in_bf16(name):
    """Dtypes are those of autocast, but for logits in float32, and values near float64's."""
    program, module = odd(name, dtype=torch.float32, autocast=torch.bfloat16)
    x, labels = batch(32, 8, 8, torch.float32)
    theirs = by_autograd(module, x.clone(), labels, False, torch.bfloat16)
    ours = by_program(program, module, x, labels)
    if "linear and loss" in [step.kind for step in program.steps]:
        theirs["logits"] = theirs["logits"].float()
    for key, expected in theirs.items():
        assert getattr(ours[key], "dtype", None) == getattr(expected, "dtype", None), key
    assert abs(ours["loss"] - theirs["loss"]) < 0.05 * theirs["loss"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_on_meta_tensors_all_is_as_in_a_run(dtype):
    """Shapes, dtypes and strides of whatever a step makes, which memory is predicted by."""
    for name in ODD:
        if name == "spectral norm":
            continue  # its power iteration needs numbers
        parameters = torch.float32 if dtype == torch.bfloat16 else dtype
        x, labels = batch(4, 9, 10, parameters)
        made = []
        for device in ("cpu", "meta"):
            program, module = odd(name, dtype=parameters, autocast=torch.bfloat16, device=device)
            if dtype != torch.bfloat16:
                program, module = odd(name, dtype=parameters, device=device)
            values, shapes = {"images": x.to(device), "labels": labels.to(device)}, []
            with torch.no_grad():
                for step in program.steps:
                    frees, bare = step.frees, copy.copy(step)
                    bare.frees = ()
                    program.execute(bare, values)
                    tensors = [values[n] for n in step.writes if isinstance(values[n], torch.Tensor)]
                    shapes.append((step.kind, *((t.shape, t.dtype, t.stride()) for t in tensors)))
                    for value in frees:
                        del values[value]
            made.append(shapes)
        assert made[0] == made[1], name


class AsFloat32(nn.Module):
    def forward(self, x):
        return x.float()


@pytest.mark.parametrize("last", [False, True])
def test_float32_in_the_midst_of_bf16(torchvision, last):
    """As behind an operation that autocast runs in float32: before convolutions and chains, and as a residual."""
    kind = torchvision.models.resnet.BasicBlock
    for parts in (
        [stem(AsFloat32(), conv(), AsFloat32(), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))],
        [stem(), kind(4, 4, downsample=AsFloat32())],
        [kind(3, 3), nn.Conv2d(3, 4, 1)],
    ):
        torch.manual_seed(2)
        module = LocalModule(parts, tail())
        nodes, features = nodes_of(module, [kind], last)
        program = build(nodes, "images", features, autocast=torch.bfloat16)
        x, labels = batch(32, 8, 8, torch.float32)
        exact = by_autograd(module, x, labels, last)
        ours = by_program(program, module, x, labels)
        assert ours["loss"].dtype == torch.float32
        assert all(error < 0.1 for kind, error in errors(ours, exact).items() if kind not in ("bias", "grad"))
        assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in module.parameters())


def test_a_replaced_stem_and_classifier(torchvision):
    model = torchvision.models.resnet18(num_classes=10)
    norm, relu6 = nn.BatchNorm2d(8), nn.Hardtanh(0.0, 6.0, inplace=True)
    model.conv1 = nn.Sequential(nn.Conv2d(3, 8, 3, 2), norm, relu6, nn.Conv2d(8, 64, 3, padding=1, bias=False))
    model.fc = nn.Sequential(nn.Dropout(0.5), nn.Linear(512, 16), nn.ReLU(inplace=True), nn.Linear(16, 10))
    model.layer1[0].relu = nn.ELU(0.1, inplace=True)
    model.layer2[1].bn2.eval()
    model.layer3[0].downsample[1].eval()
    x, labels = batch(2, 40, 40)
    islands = []
    for program, module in cut_up(model, depth=2, modules=4):
        expected = by_autograd(module, x, labels, program.features is None)
        results = by_program(program, module, x, labels)
        assert_equal(results, expected)
        islands += [island.what for island in program.islands]
        x = results.get("features")
    assert "2 (Hardtanh)" in islands and not any("Dropout" in island for island in islands)
    assert sum("ELU" in island for island in islands) == 2


# ---- the schedule -------------------------------------------------------------------------------------------


def some_programs():
    for name in ODD:
        for last in (False, True):
            yield odd(name, last)
    yield from cut_up(models.CifarResNet(2), depth=3)
    yield from cut_up(models.resnet32(), rule="bp")


def test_what_is_freed_is_freed_once_and_not_read_again():
    for program, _ in some_programs():
        live = {program.input, program.labels}
        for step in program.steps:
            assert live.issuperset(step.reads), step
            assert len(set(step.writes)) == len(step.writes)
            live |= set(step.writes)
            assert len(set(step.frees)) == len(step.frees) and live.issuperset(step.frees), step
            live -= set(step.frees)
        outputs = {program.features, program.logits, program.loss, *program.gradients} - {None}
        assert live - outputs == {program.input, program.labels} & live and live >= outputs
        assert program.input not in live, "the input is held to the end"
        pinned = {name for step in program.steps if step.kind == "island" for name in step.reads}
        for step in program.steps:
            assert step.kind != "rebuild" or not pinned.issuperset(step.writes), (
                "an island's graph holds what is rebuilt"
            )
            if step.kind in ("data gradient", "add"):
                assert not step.writes[0].startswith(f"{program.input}.grad "), "the input gets a gradient"
        assert program.labels not in live
        assert len(set(program.gradients.values())) == len(program.gradients)


def test_between_forward_and_backward_only_convolutions_and_statistics_live():
    program, _ = cut_up(models.CifarResNet(3), depth=4, modules=2)[0]
    live, turn = {program.input}, [step.kind for step in program.steps].index("linear and loss") + 1
    for step in program.steps[:turn]:
        live = (live | set(step.writes)) - set(step.frees)
    maps = {name for step in program.steps for name in step.writes if step.kind == "conv"} | {program.input}
    small = {name for name in live if name.endswith((".mean", ".var", ".gradient"))}
    assert maps <= live and live - maps - small == {program.loss, program.logits, *list(program.gradients)[:2]}


def test_no_rebuild_walks_further_than_it_may():
    """Passes of one rebuild, though the chain of block outputs is many times longer."""
    for program, _ in (odd("long chain"), *cut_up(models.resnet110(), rule="bp")):
        run = longest = 0
        for step in program.steps:
            run = run + 1 if step.kind == "rebuild" else 0
            longest = max(longest, run)
        assert 1 <= longest <= LONGEST_REBUILD + 1


@pytest.mark.parametrize("name", ["long chain", "over the right one", "two pools", "read by several"])
def test_any_gap_may_be_kept_over(name):
    x, labels = batch(4, 9, 10)
    program, module = odd(name)
    expected = by_autograd(module, x, labels, last=False)
    gaps = [gap.key for gap in program.gaps]
    assert len(set(gaps)) == len(gaps) > 0
    for gap in program.gaps:
        rebuilt = [name for step in program.steps[gap.end :] for name in step.writes]
        assert gap.start < gap.end and gap.name in rebuilt
    chosen = random.Random(0)
    for keep in (gaps, *(chosen.sample(gaps, max(1, len(gaps) // 2)) for _ in range(4))):
        program, module = odd(name, kept_gaps=set(keep))
        assert keep and not set(keep) & {gap.key for gap in program.gaps}
        assert_equal(by_program(program, module, x, labels), expected)
    while program.gaps:  # what came for free with another's rebuild may have a gap of its own now
        keep = {*keep, *(gap.key for gap in program.gaps)}
        program, module = odd(name, kept_gaps=keep)
    assert not any(step.kind == "rebuild" for step in program.steps)
    assert_equal(by_program(program, module, x, labels), expected)


def storages(value):
    if isinstance(value, torch.Tensor):
        return {value.untyped_storage().data_ptr()}
    return set().union(*map(storages, value)) if isinstance(value, tuple | list) else set()


def poisoning(step, values):
    """`Program.execute`, with all that is freed filled with NaN where nothing that lives shares its memory."""
    made = step.run(*[values[name][:3] if name.endswith(".graph") else values[name] for name in step.reads])
    values.update(zip(step.writes, [made] if len(step.writes) == 1 else made, strict=True))
    if step.kind == "island":  # its graph may hold its output
        values[step.writes[1]] = (*values[step.writes[1]], made[0])
    freed = [values.pop(name) for name in step.frees]
    shared = storages(list(values.values()))
    for value in freed:
        for tensor in [value] if isinstance(value, torch.Tensor) else []:
            if not storages(tensor) & shared and tensor.is_floating_point():
                tensor.untyped_storage().copy_(torch.full_like(tensor.flatten(), torch.nan).untyped_storage())


def test_nothing_reads_what_was_freed(monkeypatch):
    monkeypatch.setattr(Program, "execute", staticmethod(poisoning))
    for layout in LAYOUTS:
        x, labels = batch(4, 9, 10, layout=layout)
        for program, module in some_programs():
            if program.input != "images":
                continue
            expected = by_autograd(module, x.clone(), labels, program.features is None)
            torch.manual_seed(7)
            features, logits, loss = program.run([x.clone(memory_format=torch.preserve_format)], labels)
            assert_equal(tensors_of(module, loss, logits, features), expected)


# ---- memory and errors --------------------------------------------------------------------------------------

SOME = ["dropout", "long chain", "frozen", "shared weight", "two pools", "unused parameters"]


@pytest.mark.parametrize("name", SOME)
def test_only_outputs_and_gradients_outlive_a_run(name):
    program, module = odd(name)
    x, labels = batch(4, 9, 10)
    with LiveBytes():  # the first run of an operator under a mode can leave tensors in a cycle of torch's own
        program.run([x], labels)
    module.zero_grad()
    gc.collect()
    gc.disable()  # what dies, dies at once
    try:
        with LiveBytes([*module.parameters(), *module.buffers(), x, labels]) as live:
            rest = live.now
            results = program.run([x], labels)
            gradients = sum(p.grad.nbytes for p in module.parameters() if p.grad is not None)
            assert live.now == rest + gradients + sum(result.nbytes for result in results)
            del results
            module.zero_grad()
            assert live.now == rest
    finally:
        gc.enable()


def test_the_input_goes_as_soon_as_nothing_needs_it():
    """It is read last by the first weight gradient, and handed over by the list."""
    program, module = odd("long chain")
    images, labels = batch(2, 8, 8)
    inputs = [images.clone()]
    with LiveBytes([*module.parameters(), *module.buffers(), *inputs, images, labels]) as live:
        rest = live.now
        program.run(inputs, labels)
        module.zero_grad()
        assert inputs == [] and live.now == rest - images.nbytes


@pytest.mark.covering(2)
@pytest.mark.parametrize("name", ["dropout", "read by several", "two pools"])
@pytest.mark.parametrize("where", [0.0, 0.25, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("after", [False, True])
def test_an_error_in_any_step_leaves_nothing(name, where, after):
    program, module = odd(name)
    x, labels = batch(4, 9, 10)
    broken = copy.copy(program)
    k = round(where * (len(program.steps) - 1))
    run = program.steps[k].run

    def failing(*reads):
        if after:
            run(*reads)
        raise torch.OutOfMemoryError("here")

    failing_step = copy.copy(program.steps[k])
    failing_step.run = failing
    broken.steps = [*program.steps[:k], failing_step, *program.steps[k + 1 :]]
    gc.collect()
    gc.disable()
    try:
        with LiveBytes([*module.parameters(), *module.buffers(), x, labels]) as live:
            rest = live.now
            try:
                broken.run([x], labels)
            except torch.OutOfMemoryError as error:
                held = live.now  # while the traceback lives, what the failed step itself read and made
                assert held - rest <= 16 * 4 * 9 * 10 * 8 * 4, error
            assert live.now == rest
    finally:
        gc.enable()
    assert all(p.grad is None for p in module.parameters())
    expected = by_autograd(module, x, labels, last=False)
    assert_equal(by_program(program, module, x, labels), expected)


def test_a_run_knows_nothing_of_the_callers_modes():
    program, module = odd("mlp", last=True, dtype=torch.float32)
    x, labels = batch(4, 9, 10, torch.float32)
    once = by_program(program, copy.deepcopy(module), x, labels)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        again = by_program(program, module, x, labels)
    assert again["loss"].dtype == torch.float32 and torch.equal(once["logits"], again["logits"])


def test_two_runs_give_the_same_bits():
    for name in SOME:
        program, module = odd(name, dtype=torch.float32)
        x, labels = batch(4, 9, 10, torch.float32)
        first, second = (by_program(program, module, x, labels) for _ in range(2))
        for key in first:
            if key.endswith("grad") and first[key] is not None:
                assert torch.equal(first[key], second[key]), (name, key)
