"""Label smoothing: in every local module and in the classifier, on the fused head and where the head is another."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from auglocal_ext import LocalTrainer, models, plan
from auglocal_ext.common.memory import LiveBytes

SMOOTHED = nn.CrossEntropyLoss(label_smoothing=0.1)


def net(fused):
    torch.manual_seed(0)
    model = models.CifarResNet(1)
    if not fused:  # a classifier of two layers is no Head
        model.fc = nn.Sequential(model.fc, nn.Linear(10, 10))
    return model


def has_fused_classifier(trainer):
    return any(step.kind == "linear and loss" for step in trainer._programs[-1].steps)


@pytest.mark.parametrize("options", [{"depth": 2}, {"rule": "bp"}, {"rule": "predsim"}], ids=str)
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_is_that_of_autograd_on_each_module(batch, fused, options):
    images, labels = batch[0].double(), batch[1]
    torch.manual_seed(1)
    trainer = LocalTrainer(net(fused).double(), **options, criterion=SMOOTHED, image_size=16)
    trainer.plan_for(images)
    x = images
    for index, module in enumerate(trainer.local_modules):
        twin = copy.deepcopy(module)
        features, logits = twin(x)
        expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
        if index < len(trainer.local_modules) - 1:
            (extra_weight, weight), extra = module.head.weights, twin.head.extra
            expected = weight * expected + (0 if extra is None else extra_weight * extra(features, labels, images))
        expected.backward()
        _, ours, loss = trainer.backward(index, x, labels, images)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(ours, logits.detach(), rtol=1e-10, atol=1e-12)
        for (name, p), q in zip(module.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-10, msg=name)
        x = features.detach()
    assert has_fused_classifier(trainer) == fused


@pytest.mark.parametrize("options", [{"depth": 2}, {"rule": "bp"}, {"rule": "dgl"}], ids=str)
@pytest.mark.parametrize("fused", [True, False])
def test_planned_bytes_are_those_that_are_measured(batch, fused, options):
    model, batch = net(fused), (batch[0].contiguous(memory_format=torch.channels_last), batch[1])
    planned = plan(model, batch[0].shape, **options, criterion=SMOOTHED)
    trainer = LocalTrainer(model, plan=planned)
    trainer.step(*batch)
    with LiveBytes([*trainer.tensors(), *batch]) as live:
        result = trainer.step(*batch)
    assert trainer.plan is planned and live.peak == planned.peak_bytes
    expected = F.cross_entropy(result.logits, batch[1], label_smoothing=0.1)
    torch.testing.assert_close(result.loss, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("fused", [True, False])
def test_no_smoothing_is_no_criterion_to_the_bit(batch, fused):
    results, plans = [], []
    for criterion in (None, nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.0)):
        model = net(fused)
        trainer = LocalTrainer(model, depth=2, criterion=criterion)
        losses = [trainer.step(*batch).module_losses for _ in range(2)]
        results.append([*losses, *model.state_dict().values()])
        plans.append(trainer.plan)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    assert plans[0] == plans[1] == plans[2]


def test_a_plan_under_a_budget_keeps_the_criterion(tiny_model, batch):
    planned = plan(tiny_model, batch[0].shape, 2, memory_budget="5MB", criterion=SMOOTHED)
    trainer = LocalTrainer(tiny_model, plan=planned)
    assert trainer.criterion.label_smoothing == planned.origin.criterion.label_smoothing == 0.1
    result = trainer.step(*batch)
    expected = F.cross_entropy(result.logits, batch[1], label_smoothing=0.1)
    torch.testing.assert_close(result.loss, expected, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="plan= tells depth, .* criterion, .*: leave them out"):
        LocalTrainer(tiny_model, plan=planned, criterion=SMOOTHED)


@pytest.mark.parametrize("use", [LocalTrainer, lambda model, **options: plan(model, (8, 3, 16, 16), **options)])
def test_what_is_no_criterion_is_refused(tiny_model, use):
    with pytest.raises(TypeError, match="criterion must be None, a torch.nn.CrossEntropyLoss.* given str"):
        use(tiny_model, depth=2, criterion="mse")


def test_a_state_of_another_criterion_is_refused(tiny_model, batch):
    state = LocalTrainer(copy.deepcopy(tiny_model), 2, criterion=SMOOTHED).state_dict()
    message = r"saved with criterion CrossEntropyLoss\(label_smoothing=0.1\), this trainer has CrossEntropyLoss\("
    with pytest.raises(ValueError, match=message):
        LocalTrainer(tiny_model, 2).load_state_dict(state)
    LocalTrainer(tiny_model, 2, criterion=SMOOTHED).load_state_dict(state)
