"""The network that is trained is the one that was given: its logits, loss and running statistics are the model's own,
whatever was done to it, or it is refused by name."""

import copy
import types

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from auglocal_ext import LocalTrainer, models, plan
from auglocal_ext.backbone import as_backbone
from auglocal_ext.backbone.equivalence import assert_same_function
from auglocal_ext.common.meta import meta_copy
from auglocal_ext.planning.planner import Planner
from auglocal_ext.rules.bp import BP
from auglocal_ext.rules.cutting import cut


def vgg(torchvision, batch_norm, layers=(4, "M", 6, 6, "M", 8, "M"), channels=8):
    hidden = [nn.Linear(channels, 16), nn.ReLU(True), nn.Dropout(0), nn.Linear(16, 16), nn.ReLU(True), nn.Dropout(0)]
    classifier = nn.Sequential(*hidden, nn.Linear(16, 10))
    return nets.vgg(torchvision, layers, batch_norm, avgpool=nn.AdaptiveAvgPool2d(1), classifier=classifier)


def vgg11_bn(torchvision):
    """With all of its features, of a narrow classifier."""
    return vgg(torchvision, True, torchvision.models.vgg.cfgs["A"], 512)


def resnet(torchvision, block="BasicBlock", **options):
    """A torchvision ResNet, narrow; each stage has another shape."""
    model = nets.resnet(torchvision, block, **options)
    block, model.inplanes = getattr(torchvision.models.resnet, block), 8
    for stage, (planes, blocks, stride) in enumerate([(8, 3, 1), (8, 1, 2), (12, 1, 2), (12, 1, 1)], 1):
        setattr(model, f"layer{stage}", model._make_layer(block, planes, blocks, stride))
    model.fc = nn.Linear(12 * block.expansion, 10)
    return model


FAMILIES = {
    "cifar": lambda tv: models.CifarResNet(2),
    "resnet": resnet,
    "bottleneck": lambda tv: resnet(tv, "Bottleneck"),
    "resnext": lambda tv: resnet(tv, "Bottleneck", groups=2),
    "wide": lambda tv: resnet(tv, "Bottleneck", width_per_group=128),
    "vgg": lambda tv: vgg(tv, False),
    "vgg_bn": lambda tv: vgg(tv, True),
}
SOME = ["cifar", "resnet", "vgg_bn"]  # one of each reader: for what is done to a module, whatever its block is
OPTIONS = [{"rule": "bp"}, {"rule": "checkpoint"}, {"rule": "auglocal", "depth": 2, "modules": 3}, {"rule": "dgl"}]


@pytest.fixture(params=FAMILIES)
def model(request, torchvision):
    torch.manual_seed(0)
    return FAMILIES[request.param](torchvision).double()


some = pytest.mark.parametrize("model", SOME, indirect=True)


def assert_trains_what_was_given(model, **options):
    """One step against `model(x)` of a copy: logits, loss, running statistics."""
    images, labels = torch.randn(4, 3, 24, 24, dtype=torch.float64), torch.arange(4)
    own = copy.deepcopy(model).train()
    expected = own(images)
    trainer = LocalTrainer(model, image_size=24, **options)
    result = trainer.step(images, labels)
    torch.testing.assert_close(result.logits, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(result.loss, F.cross_entropy(expected, labels), rtol=1e-9, atol=1e-10)
    for (name, ours), theirs in zip(model.named_buffers(), own.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10, msg=name)


def part(model, *names):
    """The first of the names that the model has."""
    return next(model.get_submodule(name) for name in names if name in dict(model.named_modules()))


def replace(model, old, new):
    for module in model.modules():
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options["rule"])
def test_every_family_as_it_is(model, options):
    assert_trains_what_was_given(model, **options)


# ---- one object at several places --------------------------------------------------------------------------


def all_of(model, kind):
    return [module for module in model.modules() if type(module) is kind]


@pytest.mark.parametrize("kind", [nn.ReLU, nn.MaxPool2d])
def test_one_module_without_weights_at_every_place(model, kind):
    first, *others = all_of(model, kind) or [None]
    for other in others:
        replace(model, other, first)
    assert_trains_what_was_given(copy.deepcopy(model), rule="bp")
    assert_trains_what_was_given(model, rule="auglocal", depth=2, modules=3)


@pytest.mark.parametrize("what", ["norm", "convolution", "block", "linear"])
def test_one_module_with_weights_at_two_places(model, what):
    """Backpropagation sums its gradients; two local modules that would each step it are refused."""
    if what == "block":
        if not hasattr(model, "layer1"):
            pytest.skip("this family has no blocks")
        model.layer1[-1] = model.layer1[-2]
    else:
        kind = {"norm": nn.BatchNorm2d, "convolution": nn.Conv2d, "linear": nn.Linear}[what]
        like = {}
        for module in all_of(model, kind):
            shape = str(module)
            if shape in like:
                replace(model, module, like[shape])
                break
            like[shape] = module
        else:
            pytest.skip(f"this family has no two {what}s of one shape")
    reference = copy.deepcopy(model).train()
    images, labels = torch.randn(4, 3, 24, 24, dtype=torch.float64), torch.arange(4)
    torch.manual_seed(1)
    expected = reference(images)
    loss = F.cross_entropy(expected, labels)
    loss.backward()
    trainer = LocalTrainer(model, rule="bp", optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = trainer.step(images, labels)
    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-10)
    torch.testing.assert_close(result.logits, expected.detach(), rtol=1e-9, atol=1e-10)
    for (name, after), own in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(before[name] - after.detach(), own.grad, rtol=1e-6, atol=1e-9, msg=name)
    for (name, ours), theirs in zip(model.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10, msg=name)


def test_a_weight_in_two_local_modules_is_refused(tiny_model, torchvision):
    wide = models.CifarResNet(2)
    wide.layer1[1].conv1.weight = wide.layer1[0].conv1.weight
    for make in (LocalTrainer, lambda model, **options: plan(model, (4, 3, 16, 16), **options)):
        with pytest.raises(ValueError, match="parameter layer1.0.conv1.weight is in local modules 1 and 2, .*'bp'"):
            make(wide, depth=2)
    LocalTrainer(wide, depth=2, borders=[2, 4])  # both in one
    model = vgg11_bn(torchvision)
    model.features[12] = model.features[9]  # a BatchNorm of 256 channels
    with pytest.raises(ValueError, match="parameter features.9.weight is in local modules 2 and 3"):
        LocalTrainer(model, depth=2)


def test_one_relu_at_every_place_of_a_whole_vgg(torchvision):
    torch.manual_seed(0)
    model = vgg11_bn(torchvision).double()
    one = nn.ReLU()
    for old in all_of(model, nn.ReLU):
        replace(model, old, one)
    images, labels = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.arange(4)
    expected = F.cross_entropy(copy.deepcopy(model).train()(images), labels)
    assert LocalTrainer(model, rule="bp").step(images, labels).loss.item() == pytest.approx(expected.item(), rel=1e-10)


# ---- a forward that is not the class's -----------------------------------------------------------------------


def doubled(module):
    """Its own forward, and the result doubled; bound to the object, so that a copy has its own."""
    original = type(module).forward
    module.forward = types.MethodType(lambda self, x: 2 * original(self, x), module)


@some
@pytest.mark.parametrize(
    "places",
    [
        ("conv1", "features.0"),
        ("bn1", "features.1"),
        ("layer2.0.conv2", "features.3"),
        ("layer1.0.bn2", "features.4"),
        ("layer1.0.relu", "features.2", "layer2.0"),
        ("layer1.0", "features.2"),
        ("layer3.0.downsample", "features.5"),
        ("layer3.0.downsample.0", "classifier.0"),
        ("fc", "classifier.6"),
        ("avgpool", "fc"),
        ("maxpool", "features.3", "conv1"),
    ],
    ids=lambda places: places[0],
)
def test_a_forward_put_on_an_object_is_followed(model, places):
    doubled(part(model, *places))
    assert_trains_what_was_given(model, rule="auglocal", depth=2, modules=3)


@some
def test_a_replaced_conv_forward_is_followed(model):
    conv = part(model, "layer1.0.conv1", "features.0")
    conv._conv_forward = types.MethodType(lambda self, x, w, b: nn.Conv2d._conv_forward(self, x, w / 2, b), conv)
    assert_trains_what_was_given(model, rule="bp")


class Louder:
    """Calls itself twice as loud, by its __call__."""

    def __call__(self, *given):
        return 2 * super().__call__(*given)


@some
@pytest.mark.parametrize("kind", [nn.ReLU, nn.Conv2d, nn.BatchNorm2d, nn.Linear, nn.MaxPool2d, nn.AdaptiveAvgPool2d])
def test_a_subclass_with_a_call_of_its_own_is_followed(model, kind):
    modules = all_of(model, kind)
    if not modules:
        pytest.skip(f"this family has no {kind.__name__}")
    modules[-1].__class__ = type(f"Louder{kind.__name__}", (Louder, kind), {})
    assert_trains_what_was_given(model, rule="bp")


@some
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.Linear])
def test_a_patched_class_is_followed(model, kind, monkeypatch):
    if kind is nn.ReLU and type(model) is models.CifarResNet:
        pytest.skip("this family's ReLUs are functions")
    original = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 2 * original(self, x))
    assert_trains_what_was_given(model, rule="bp")


def test_a_patched_block_class_is_followed(torchvision, monkeypatch):
    block = torchvision.models.resnet.BasicBlock
    original = block.forward
    monkeypatch.setattr(block, "forward", lambda self, x: 2 * original(self, x))
    assert_trains_what_was_given(resnet(torchvision).double(), rule="bp")
    monkeypatch.setattr(block, "forward", lambda self, x: self.relu(self.bn1(self.conv1(x))) * x.mean())
    assert_trains_what_was_given(resnet(torchvision).double(), rule="bp")


@some
def test_closures_over_the_original_are_refused_by_name(model):
    """Nobody can tell what such a function holds on to, so that it cannot be planned."""
    for place in ("fc", "layer1.0", "layer1.0.conv1", "features.4", "classifier.0"):
        if place not in dict(model.named_modules()):
            continue
        broken = copy.deepcopy(model)
        module = broken.get_submodule(place)
        forward = module.forward
        module.forward = lambda x, forward=forward: forward(x) * 4
        before = {name: p.clone() for name, p in broken.named_parameters()}
        images, labels = torch.randn(4, 3, 24, 24, dtype=torch.float64), torch.arange(4)
        with pytest.raises(ValueError, match=rf"{place}\.forward was replaced on the object"):
            LocalTrainer(broken, rule="bp").step(images, labels)
        with pytest.raises(ValueError, match=rf"{place}\.forward was replaced on the object"):
            plan(broken, (4, 3, 24, 24), rule="bp")
        assert all(torch.equal(p, before[name]) for name, p in broken.named_parameters())


@some
@pytest.mark.parametrize("name", ["forward", "_forward_impl"])
def test_a_forward_put_on_the_model_is_followed(model, name):
    if not hasattr(type(model), name):
        pytest.skip(f"this family has no {name}")
    original = getattr(type(model), name)
    setattr(model, name, types.MethodType(lambda self, x: original(self, x) * 4, model))
    assert_trains_what_was_given(model, rule="bp")


@some
@pytest.mark.parametrize("place", ["layer1", "features"])
def test_a_forward_put_on_a_container_is_followed(model, place):
    if not hasattr(model, place):
        pytest.skip(f"this family has no {place}")
    doubled(getattr(model, place))
    assert_trains_what_was_given(model, rule="bp")


def test_a_model_class_that_somebody_patched_is_followed(torchvision, monkeypatch):
    kind = torchvision.models.ResNet
    original = kind._forward_impl
    monkeypatch.setattr(kind, "_forward_impl", lambda self, x: original(self, x) * 4)
    assert_trains_what_was_given(resnet(torchvision).double(), rule="bp")


def test_a_model_class_that_skips_a_part_is_followed(torchvision, monkeypatch):
    monkeypatch.setattr(
        torchvision.models.ResNet,
        "_forward_impl",
        lambda self, x: self.fc(self.avgpool(self.layer2(self.layer1(self.maxpool(self.conv1(x))))).flatten(1)),
    )
    model = resnet(torchvision)
    model.fc = nn.Linear(8, 10)
    assert_trains_what_was_given(model.double(), rule="bp")


def test_an_operator_in_place_that_the_shortcut_sees():
    """elu_ changes what the shortcut reads too."""
    model = models.CifarResNet(1).double()
    model.layer1[0].forward = types.MethodType(
        lambda self, x: F.relu(self.bn1(self.conv1(F.elu_(x)))) + x, model.layer1[0]
    )
    assert_trains_what_was_given(model, rule="bp")


def test_an_operator_in_place_that_another_node_sees_is_refused(monkeypatch):
    """As the engine reads a forward that it takes apart: a step gives such a layer a copy, the model does not."""
    forward = models.BasicBlock.forward

    def written_over(self, x):
        return F.relu(self.bn1(self.conv1(F.elu_(x)))) + x

    written_over.__module__, written_over.__qualname__ = forward.__module__, forward.__qualname__
    monkeypatch.setattr(models.BasicBlock, "forward", written_over)
    model = models.CifarResNet(1)
    model.layer2, model.layer3 = (nn.Sequential(models.BasicBlock(16, 16)) for _ in range(2))
    model.fc = nn.Linear(16, 10)
    copied = meta_copy(model)
    with pytest.raises(ValueError, match="computes something else than its units one after another"):
        assert_same_function(copied, as_backbone(copied), torch.empty(4, 3, 16, 16, device="meta"))


# ---- how many classes ----------------------------------------------------------------------------------------


class OutFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.out, self.hidden = nn.Linear(64, 10), nn.Linear(64, 64)

    def forward(self, x):
        return self.out(F.relu(self.hidden(x)))


@pytest.mark.parametrize(
    ("head", "classes"),
    [
        (OutFirst(), 10),
        (nn.Sequential(nn.Linear(64, 20), nn.GLU(1)), 10),
        (nn.Sequential(nn.Linear(64, 12), nn.Unflatten(1, (3, 4)), nn.Flatten(1), nn.Linear(12, 7)), 7),
        (nn.Sequential(nn.Unflatten(1, (64, 1, 1)), nn.Conv2d(64, 6, 1), nn.Flatten(1)), 6),
        (nn.Sequential(nn.Linear(64, 9), nn.ZeroPad1d((0, 2))), 11),
    ],
    ids=["last registered is not last", "GLU", "unflattened", "no linear", "padded"],
)
def test_classes_are_what_comes_out(head, classes):
    model = models.CifarResNet(1)
    model.fc = head
    assert as_backbone(model).num_classes == classes
    trainer = LocalTrainer(model, depth=2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    images = torch.randn(4, 3, 16, 16)
    with pytest.raises(ValueError, match=f"labels must be from 0 to {classes - 1} for this model of {classes} classes"):
        trainer.step(images, torch.full((4,), classes))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert trainer.step(images, torch.full((4,), classes - 1)).logits.shape == (4, classes)
    assert trainer.aux_nets[0](torch.randn(2, 16, 16, 16)).shape == (2, classes)


@pytest.mark.parametrize("pool", [nn.Identity(), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d((2, 1))])
def test_classes_of_a_head_for_maps_of_one_size(torchvision, pool):
    model = vgg(torchvision, True)
    model.avgpool = pool
    model.classifier = nn.Linear(8 * pool(torch.empty(1, 8, 4, 4)).flatten(1).shape[1] // 8, 5)
    assert as_backbone(model).num_classes == 5
    images = torch.randn(4, 3, 32, 32)
    assert LocalTrainer(model, depth=2).step(images, torch.arange(4)).logits.shape == (4, 5)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (nn.ModuleList([nn.Linear(64, 10)]), r"fc cannot take an input .*\[ModuleList\] is missing"),
        (nn.Sequential(nn.Linear(64, 20), nn.Unflatten(1, (2, 10))), r"must put out \(N, classes\), given a tensor of"),
        (nn.Linear(63, 10), "fc cannot take an input of shape"),
        (nn.LazyLinear(10), "parameter fc.weight has no shape yet, its layer is a lazy one"),
    ],
)
def test_heads_that_are_none(head, message):
    model = models.CifarResNet(1)
    model.fc = head
    with pytest.raises(ValueError, match=message):
        LocalTrainer(model, depth=2)


# ---- forwards that a graph does not tell ------------------------------------------------------------------------


def without_gradient(self, x):
    with torch.no_grad():
        y = F.relu(self.bn1(self.conv1(x)))
    return F.relu(self.bn2(self.conv2(y)) + x)


def by_attribute(self, x):
    return F.relu(self.bn1(self.conv1(x)) * self.factor + x)


def by_shapes(self, x):
    y = self.bn1(self.conv1(x)).view(x.size(0), x.size(1), -1).view_as(x)
    return F.relu(F.interpolate(y, size=x.shape[2:]) + torch.cat(y.chunk(2, 1)[::-1], 1) + x)


def with_constants(self, x):
    return F.relu(self.bn1(self.conv1(x)) * torch.tensor(0.5) + x * x.new_tensor(2.0))


@pytest.mark.parametrize("forward", [without_gradient, by_attribute, by_shapes, with_constants])
@pytest.mark.parametrize("on", ["object", "class"])
def test_gradients_of_a_block_with_another_forward(forward, on, monkeypatch):
    """By autograd on the whole block: gradients too, and what an attribute says at the time of the step."""
    torch.manual_seed(0)
    model = models.CifarResNet(2).double()
    for block in model.layer1:
        block.factor = 1.0
        if on == "object":
            block.forward = types.MethodType(forward, block)
    if on == "class":
        monkeypatch.setattr(models.BasicBlock, "factor", 1.0, raising=False)
        original = models.BasicBlock.forward
        monkeypatch.setattr(
            models.BasicBlock,
            "forward",
            lambda self, x: forward(self, x) if self.downsample is None else original(self, x),
        )
    images, labels = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.arange(4)
    trainer = LocalTrainer(model, rule="bp", optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0))
    for factor in (1.0, 0.25):
        for block in model.layer1:
            block.factor = factor
        own, before = copy.deepcopy(model).train(), {n: p.detach().clone() for n, p in model.named_parameters()}
        own.zero_grad()
        F.cross_entropy(own(images), labels).backward()
        trainer.step(images, labels)
        for (name, after), expected in zip(model.named_parameters(), own.parameters(), strict=True):
            gradient = torch.zeros_like(after) if expected.grad is None else expected.grad
            torch.testing.assert_close(before[name] - after.detach(), gradient, rtol=1e-7, atol=1e-9, msg=name)


class Scaled(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run = run

    def forward(self, x):
        return self.run(x)


def with_a_guard(x):
    if torch.isnan(x).any():
        raise ValueError("NaN")
    return x


@pytest.mark.parametrize(
    "run",
    [
        lambda x: x * x.new_tensor(0.5),
        lambda x: x * torch.tensor(0.5),
        lambda x: x - torch.tensor([0.1, 0.2, 0.3], dtype=x.dtype, device=x.device).view(1, 3, 1, 1),
        lambda x: x - torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1).to(x),
        with_a_guard,
    ],
    ids=["new_tensor", "tensor", "normalise", "normalise, moved", "guard"],
)
def test_constants_and_guards_in_a_stem(run):
    torch.manual_seed(0)
    model = models.CifarResNet(1)
    model.conv1 = nn.Sequential(Scaled(run), model.conv1)
    assert_trains_what_was_given(model.double(), rule="auglocal", depth=2, modules=2)


def test_normalize_of_torchvision_as_the_first_layer(torchvision):
    from torchvision.transforms import Normalize

    model = resnet(torchvision)
    model.conv1 = nn.Sequential(Scaled(Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.2])), model.conv1)
    assert_trains_what_was_given(model.double(), rule="bp")


def test_a_head_norm_of_cumulative_average():
    model = models.CifarResNet(1)
    model.fc = nn.Sequential(nn.BatchNorm1d(64, momentum=None), nn.Linear(64, 10))
    assert_trains_what_was_given(model.double(), rule="bp")


def test_constants_of_the_model_itself_are_followed(torchvision, monkeypatch):
    kind = torchvision.models.ResNet
    original = kind._forward_impl
    monkeypatch.setattr(kind, "_forward_impl", lambda self, x: original(self, x * torch.tensor(0.5)))
    assert_trains_what_was_given(resnet(torchvision).double(), rule="bp")


def test_different_constants_are_told_apart(torchvision):
    """What the model does when it is planned is not what it did when it was read."""
    model = resnet(torchvision)
    backbone = as_backbone(model)
    forward = model.forward
    model.forward = types.MethodType(lambda self, x: type(self).forward(self, x * torch.tensor(0.5)), model)
    with pytest.raises(ValueError, match="computes something else than its units"):
        Planner(model, backbone=backbone).plan(cut(backbone, BP()), (4, 3, 24, 24), BP())
    model.forward = forward
