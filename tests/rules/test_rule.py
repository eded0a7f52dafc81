"""The interface of learning rules, and the rules of one's own that the documentation shows."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import auglocal_ext
from auglocal_ext import LocalTrainer, assert_isolated, models, plan, train
from auglocal_ext.backbone import as_backbone
from auglocal_ext.rules.rule import Border

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "extending.md").read_text()


def shown_rule(name):
    """A rule of the documentation, in less than thirty lines."""
    names = {"auglocal_ext": auglocal_ext}
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.S):
        assert code.count("\n") < 30
        exec(code.partition("\nauglocal_ext.train(")[0], names)
    return names[name]


@pytest.fixture
def own_rule():
    return shown_rule("Decorrelated")


def batches(count=12):
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(10, 3, 16, 16, generator=generator)
    labels = torch.arange(20) % 10
    return [(patterns[labels] + 0.3 * torch.randn(20, 3, 16, 16, generator=generator), labels) for _ in range(count)]


def test_a_rule_of_ones_own_trains(own_rule):
    torch.manual_seed(0)
    model = models.CifarResNet(1)
    names = list(model.state_dict())
    options = {"optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9), "epochs": 5, "progress": False}
    result = train(model, batches(), rule=own_rule, val_loader=batches(1), **options)
    first, last = result.history[0], result.history[-1]
    for before, after in zip(first["module_losses"], last["module_losses"], strict=True):
        assert after < before
    assert last["loss"] < 0.5 * first["loss"]
    assert last["val_accuracy"] > 0.8
    assert list(model.state_dict()) == names and len(result.plan.modules) == 4
    assert result.plan.rule == "decorrelated" and "Linear 10" in str(result.plan)
    assert result.peak_bytes == result.plan.peak_bytes


@pytest.mark.parametrize("modules", [None, 2])
def test_its_step_is_autograds(own_rule, modules):
    torch.manual_seed(0)
    model = models.CifarResNet(1).double()
    trainer = LocalTrainer(model, rule=own_rule(), modules=modules, image_size=16)
    images, labels = batches(1)[0]
    images, features = images.double(), images.double()
    assert_isolated(trainer, images, labels)
    for index, module in enumerate(trainer.local_modules):
        out, logits = module(features)
        extra_weight, weight = module.head.weights
        expected = weight * F.cross_entropy(logits, labels)
        if module.head.extra is not None:
            expected = expected + extra_weight * module.head.extra(out, labels, images)
        gradients = torch.autograd.grad(expected, list(module.parameters()))
        handed_on, _, loss = trainer.backward(index, features, labels, images)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
        for parameter, gradient in zip(module.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-10)
        features = handed_on
    assert features is None


def test_a_loss_may_look_at_what_its_module_was_given():
    """The transport penalty: values and gradients, of a module that changes resolution and width too."""
    torch.manual_seed(0)
    model = models.CifarResNet(1).double()
    rule = shown_rule("TransportAugLocal")(depth=2)
    trainer = LocalTrainer(model, rule=rule, borders=[0, 2], image_size=16)
    images, labels = batches(1)[0]
    images, x = images.double(), images.double()
    trainer.step(images, labels)  # plans it too
    for index, module in enumerate(trainer.local_modules[:-1]):
        out, logits = module(x)
        pooled = F.adaptive_avg_pool2d(x, out.shape[2:])
        padded = torch.cat([pooled, pooled.new_zeros(len(x), out.shape[1] - x.shape[1], *out.shape[2:])], 1)
        expected = 0.1 * (out - padded).square().mean() + F.cross_entropy(logits, labels)
        gradients = torch.autograd.grad(expected, list(module.parameters()))
        x, _, loss = trainer.backward(index, x, labels, images)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
        for parameter, gradient in zip(module.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-10)
    planned = plan(models.CifarResNet(1), (20, 3, 16, 16), rule=rule, modules=3)
    small = LocalTrainer(models.CifarResNet(1), plan=planned)
    result = train(models.CifarResNet(1), batches(2), rule=rule, modules=3, epochs=1, progress=False)
    assert result.peak_bytes == result.plan.peak_bytes == planned.peak_bytes and len(small.local_modules) == 3


class Scaled(auglocal_ext.Rule):
    """Everything counts a given share."""

    def __init__(self, extra, cross_entropy):
        self.shares = extra, cross_entropy

    def aux_net(self, border):
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(border.shape[0], border.num_classes))

    def extra_loss(self, border):
        return Squares(nn.Identity())

    def weights(self, border):
        return self.shares


class Squares(auglocal_ext.rules.ExtraLoss):
    def loss(self, prediction, labels, images):
        return prediction.square().mean() + images.mean() + labels.double().mean()


def test_the_weights_weigh():
    """The extra loss looks at features, images and labels; twice the weights are twice the gradients."""
    images, labels = batches(1)[0]

    def step(*shares):
        torch.manual_seed(0)
        model = models.CifarResNet(1).double()
        trainer = LocalTrainer(model, rule=Scaled(*shares), modules=2, image_size=16)
        features, logits, loss = trainer.backward(0, images.double(), labels, images.double())
        cross_entropy = F.cross_entropy(logits, labels)
        extra = features.square().mean() + images.double().mean() + labels.double().mean()
        torch.testing.assert_close(loss, shares[0] * extra + shares[1] * cross_entropy)
        return model.conv1.weight.grad

    torch.testing.assert_close(step(2.0, 0.5), 2 * step(1.0, 0.0) + 0.5 * step(0.0, 1.0))


def test_parameters_outside_the_net_are_refused():
    class Tempered(Squares):
        def __init__(self):
            super().__init__(nn.Identity())
            self.temperature = nn.Parameter(torch.ones(()))

    class Cold(Scaled):
        name = "ice"

        def extra_loss(self, border):
            return Tempered()

    rule = Cold(1, 1)
    assert rule.name == "ice"
    with pytest.raises(ValueError, match="Tempered has parameters outside its net, which nothing would train"):
        LocalTrainer(models.CifarResNet(1), rule=rule)


def test_borders_know_their_place():
    backbone = as_backbone(models.resnet20())
    places = [Border(backbone, 0, index, 5, (16, 8, 8), (3, 8, 8)).place for index in range(5)]
    assert places == [0, 0.25, 0.5, 0.75, 1]
    assert Border(backbone, 0, 0, 1, (16, 8, 8), (3, 8, 8)).place == 0


def test_nets_made_for_another_size_are_refused():
    """Only where the nets depend on it, and before anything changed."""
    images, labels = torch.rand(4, 3, 48, 48), torch.arange(4)
    trainer = LocalTrainer(models.resnet20(), rule="predsim", modules=2)
    before = [p.clone() for p in trainer.model.parameters()]
    message = r"nets of rule 'predsim' were made for images of 32x32 pixels, given 48x48: pass .*image_size=\(48, 48\)"
    with pytest.raises(ValueError, match=message):
        trainer.step(images, labels)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    trainer = LocalTrainer(models.resnet20(), rule="predsim", modules=2, image_size=(48, 48))
    assert trainer.step(images, labels).module_losses.isfinite().all()
    trainer = LocalTrainer(models.resnet20(), 2, modules=2)
    assert trainer.step(images, labels).module_losses.isfinite().all()
    assert plan(models.resnet20(), images.shape, rule="predsim", modules=2).aux_parameters
