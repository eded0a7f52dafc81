"""Copies without data: of models that torch itself cannot copy too."""

import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from auglocal_ext import LocalTrainer, models, plan
from auglocal_ext.common.memory import LiveBytes
from auglocal_ext.common.meta import meta_copy


def pruned(model):
    prune.l1_unstructured(model.layer1[0].conv1, "weight", 0.5)


def pruned_twice(model):
    for _ in range(2):
        prune.random_unstructured(model.fc, "weight", 0.3)


def pruned_bias(model):
    prune.l1_unstructured(model.layer1[0].bn1, "bias", 0.5)


def weight_norm(model):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.layer2[0].conv2)


def spectral_norm(model):
    nn.utils.spectral_norm(model.layer2[0].conv2)
    model(torch.randn(2, 3, 16, 16))


def parametrized(model):
    nn.utils.parametrizations.spectral_norm(model.fc)


def stored(model):
    model.layer1[0].register_forward_hook(lambda module, given, out: setattr(module, "seen", {"last": [out]}))
    model(torch.randn(2, 3, 16, 16))


def hook_with_a_lock(model):
    class Hook:
        def __init__(self):
            self.lock = threading.Lock()

        def __call__(self, *given):
            return None

    model.layer1.register_forward_hook(Hook())


WITH_GRAPHS = [pruned, pruned_twice, pruned_bias, weight_norm, spectral_norm, parametrized, stored, hook_with_a_lock]


@pytest.mark.filterwarnings("ignore:a hook on")
@pytest.mark.parametrize("change", WITH_GRAPHS, ids=lambda change: change.__name__)
def test_models_that_hold_results_train_and_are_planned_to_the_byte(batch, change):
    torch.manual_seed(0)
    model = models.CifarResNet(1)
    change(model)
    images, labels = batch
    trainer = LocalTrainer(model, depth=2, optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9))
    first = trainer.step(images, labels).loss
    for _ in range(4):
        last = trainer.step(images, labels).loss
    assert last < first
    with LiveBytes([*trainer.tensors(), images, labels]) as live:
        trainer.step(images, labels)
    assert live.peak == trainer.plan.peak_bytes


@pytest.mark.filterwarnings("ignore:a hook on")
@pytest.mark.parametrize("change", [pruned, pruned_bias, weight_norm], ids=lambda change: change.__name__)
def test_what_a_hook_makes_a_weight_of_is_trained(batch, change):
    """Against autograd: gradients of the parameters behind the weight."""
    torch.manual_seed(0)
    model = models.CifarResNet(1)
    change(model)
    own = models.CifarResNet(1)
    change(own)
    own.load_state_dict(model.state_dict())
    nn.functional.cross_entropy(own(batch[0]), batch[1]).backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    LocalTrainer(model, rule="bp", optimizer=partial(torch.optim.SGD, lr=1.0)).step(*batch)
    for (name, after), expected in zip(model.named_parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(before[name] - after.detach(), expected.grad, rtol=1e-2, atol=1e-4, msg=name)


def test_a_pruned_model_stays_pruned(batch):
    model = models.CifarResNet(1)
    pruned(model)
    conv = model.layer1[0].conv1
    trainer = LocalTrainer(model, depth=2)
    for _ in range(3):
        trainer.step(*batch)
    model.eval()(batch[0])
    assert conv.weight.eq(0).sum() >= conv.weight.numel() // 2


def a_lock(model):
    model.layer1[0].lock = threading.Lock()


def a_scripted_layer(model):
    model.fc = torch.jit.script(nn.Linear(64, 10))


def a_lazy_layer(model):
    model.layer1[0].conv2 = nn.LazyConv2d(16, 3, padding=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (a_lock, r"CifarResNet cannot be copied, as planning needs it: .*lock.*; it is the attribute layer1.0.lock"),
        (a_scripted_layer, r"fc \(RecursiveScriptModule\) cannot be copied without its data"),
        (a_lazy_layer, "parameter layer1.0.conv2.weight has no shape yet, its layer is a lazy one: run the model once"),
    ],
    ids=["lock", "script", "lazy"],
)
def test_what_cannot_be_copied_is_named(tiny_model, change, message):
    change(tiny_model)
    with pytest.raises(ValueError, match=message):
        LocalTrainer(tiny_model, depth=2)
    with pytest.raises(ValueError, match=message):
        plan(tiny_model, (4, 3, 16, 16), depth=2)


def test_a_copy_has_no_data_no_hooks_and_leaves_the_module_alone(tiny_model):
    stored(tiny_model)
    before = {name: vars(module).copy() for name, module in tiny_model.named_modules()}
    copied = meta_copy(tiny_model)
    assert all(t.is_meta for t in (*copied.parameters(), *copied.buffers(), copied.layer1[0].seen["last"][0]))
    assert not any(module._forward_hooks for module in copied.modules())
    assert {name: vars(module) for name, module in tiny_model.named_modules()} == before
    assert copied(torch.empty(2, 3, 16, 16, device="meta")).shape == (2, 10)


def test_modules_that_are_one_stay_one(tiny_model):
    tiny_model.layer1[0].bn2 = tiny_model.layer1[0].bn1
    tiny_model.layer1[0].conv2.weight = tiny_model.layer1[0].conv1.weight
    copied = meta_copy(tiny_model)
    assert copied.layer1[0].bn2 is copied.layer1[0].bn1
    assert copied.layer1[0].conv2.weight is copied.layer1[0].conv1.weight


class Scaled(nn.BatchNorm2d):
    def __init__(self, channels, scale, **options):
        super().__init__(channels, **options)
        self.scale = scale


class Grouped(nn.BatchNorm2d):
    def __init__(self, groups):
        super().__init__(sum(groups))


@pytest.mark.parametrize("norm", [Scaled(64, 2.0), Grouped([32, 32])], ids=["Scaled", "Grouped"])
def test_a_batch_norm_that_cannot_be_made_anew_is_named(torchvision, norm):
    model = torchvision.models.resnet18(num_classes=10)
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:
            block.bn1 = type(norm)(block.bn1.num_features, 1.0) if isinstance(norm, Scaled) else Grouped(
                [block.bn1.num_features]
            )  # fmt: skip
    with pytest.raises(ValueError, match=rf"{type(norm).__name__}\(channels, eps=, momentum=\) makes none .* 'bp'"):
        LocalTrainer(model, depth=2)
    LocalTrainer(model, rule="bp")


@pytest.mark.parametrize("name", ["bn1.weight", "layer2.0.bn2.bias", "fc.weight", "layer1.0.conv1.weight"])
def test_weights_of_any_strides(batch, name):
    """Every second element of a larger tensor."""
    torch.manual_seed(0)
    model = models.CifarResNet(1)
    module, own = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    value = getattr(module, own).data
    setattr(module, own, nn.Parameter(value.repeat_interleave(2, -1)[..., ::2]))
    assert not getattr(module, own).is_contiguous()
    expected = nn.functional.cross_entropy(model(batch[0]), batch[1])
    trainer = LocalTrainer(model, rule="bp", optimizer=partial(torch.optim.SGD, lr=0.05))
    assert trainer.step(*batch).loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert trainer.step(*batch).loss < expected


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(64, 10, batch_first=True)

    def forward(self, x):
        return self.rnn(x[:, None])[0][:, 0]


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_a_recurrent_head_in_bf16(batch, kind):
    """What autocast does to it is not known to the plan; it trains all the same."""
    torch.manual_seed(0)
    model = models.CifarResNet(1)
    model.fc = Recurrent(kind)
    trainer = LocalTrainer(model, depth=2, precision="bf16", optimizer=partial(torch.optim.SGD, lr=0.1))
    first = trainer.step(*batch).loss
    for _ in range(4):
        last = trainer.step(*batch).loss
    assert last < first
