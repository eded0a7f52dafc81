"""The default optimizer and schedule."""

import math
from functools import partial

import pytest
import torch

from auglocal_ext import LocalTrainer, models, plan, train
from auglocal_ext.optim import (
    OPTIMIZERS,
    constant,
    cosine,
    exponential,
    named_optimizer,
    no_decay_on_norms,
    paper,
    sgd,
    step,
)


def test_sgd_is_the_papers():
    optimizer = sgd(1024)([torch.zeros(1, requires_grad=True)])
    group = optimizer.param_groups[0]
    assert group["lr"] == pytest.approx(0.8)
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 1e-4)


def test_cosine_with_warm_up():
    assert cosine(0, 100) == pytest.approx(0.01)
    assert cosine(5, 100) == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi * 0.05)) + 0.5 * 0.01)
    assert cosine(10, 100) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.1)))
    assert cosine(50, 100) == pytest.approx(0.5)
    assert cosine(100, 100) == pytest.approx(0)
    assert cosine(10, 400) == cosine(10, 400) > 0.99  # the warm-up is at most 10 epochs
    assert cosine(0.5, 5) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.1)))


def test_constant():
    assert constant(3, 5) == 1.0


def test_warm_up_over_epochs_of_ones_own():
    assert cosine(2, 100, warmup=4) == pytest.approx(0.25 * (1 + math.cos(math.pi * 0.02)) + 0.005)
    assert cosine(0, 100, warmup=0) == 1 and constant(0, 100, warmup=2) == pytest.approx(0.01)
    assert constant(1, 100, warmup=2) == pytest.approx(0.505) and constant(2, 100, warmup=2) == 1


def test_step_and_exponential():
    assert [step(epoch, 9) for epoch in (0, 2.9, 3, 5.9, 6, 9)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert [exponential(epoch, 4) for epoch in (0, 2, 4)] == pytest.approx([1, 0.1, 0.01])
    assert step(1, 9, warmup=2) == exponential(0, 9) * 0.5 + 0.005


def test_the_papers_schedule():
    factor = paper(0.8)

    def lr(e, epochs=400):
        assert factor(e - 1, epochs) == factor(e - 0.01, epochs)  # one learning rate an epoch
        return 0.8 * factor(e - 1, epochs)

    assert lr(1) == pytest.approx(0.01)
    assert lr(2) == pytest.approx(0.4 * (1 + math.cos(math.pi / 200)) * 0.1 + 0.009)
    assert lr(10) == pytest.approx(0.4 * (1 + math.cos(math.pi / 40)) * 0.9 + 0.001)
    assert lr(11) == pytest.approx(0.4 * (1 + math.cos(math.pi * 11 / 400)))
    assert lr(200) == pytest.approx(0.4) and lr(400) == pytest.approx(0)
    assert lr(1, 20) == pytest.approx(0.01) and lr(2, 20) == pytest.approx(0.2 * (1 + math.cos(0.1 * math.pi)) + 0.005)
    assert lr(3, 20) == pytest.approx(0.4 * (1 + math.cos(0.15 * math.pi)))  # two epochs of warm-up
    assert lr(1, 5) == pytest.approx(0.4 * (1 + math.cos(math.pi / 5)))  # none


def test_named_optimizers():
    def group(*arguments):
        optimizer = named_optimizer(*arguments)([torch.zeros(1, requires_grad=True)])
        return type(optimizer), optimizer.param_groups[0]

    kind, made = group("sgd", 0.3, 0, 0.5)
    assert kind is torch.optim.SGD and (made["momentum"], made["nesterov"], made["weight_decay"]) == (0, False, 0.5)
    kind, made = group("adamw", None)
    assert kind is torch.optim.AdamW and (made["lr"], made["weight_decay"]) == (1e-3, 1e-2)
    kind, made = group("rmsprop", 0.1, 0.5)
    assert kind is torch.optim.RMSprop and (made["lr"], made["momentum"], made["weight_decay"]) == (0.1, 0.5, 0)


def named_groups(optimizer, named):
    """The (weight decay, names) of each group."""
    names = {p: name for name, p in named}
    return [(g["weight_decay"], [names[p] for p in g["params"]]) for g in optimizer.param_groups]


@pytest.mark.parametrize(
    ("decays", "expected"),
    [
        ((0.0, None), [(0.5, ["conv.weight", "conv.bias"]), (0.0, ["bn.weight", "bn.bias"])]),
        ((0.1, 0.2), [(0.5, ["conv.weight"]), (0.1, ["bn.weight"]), (0.2, ["bn.bias", "conv.bias"])]),
        ((None, 0.0), [(0.5, ["bn.weight", "conv.weight"]), (0.0, ["bn.bias", "conv.bias"])]),
    ],
)
def test_another_weight_decay_of_norms_and_biases(decays, expected):
    layers = torch.nn.ModuleDict({"bn": torch.nn.BatchNorm2d(4), "conv": torch.nn.Conv2d(4, 4, 1)})
    named = list(layers.named_parameters())
    adamw = partial(torch.optim.AdamW, weight_decay=0.5)
    assert named_groups(no_decay_on_norms(adamw, *decays)(named), named) == expected
    assert named_groups(named_optimizer("sgd", 0.1, None, 0.5, *decays)(named), named) == expected
    assert named_optimizer("adamw", 0.1, None, 0.5, *decays)(named).param_groups[-1]["fused"]


def test_a_factory_may_look_at_names(tiny_model, batch):
    """Those of the model, and of the aux nets; a plan gives it the same, and a budget's search."""
    given = []

    def factory(named):
        given.append([name for name, _ in named])
        groups = [{"params": [p], "momentum": 0.9 if "conv" in name else 0} for name, p in named]
        return torch.optim.SGD(groups, lr=0.1)

    trainer = LocalTrainer(tiny_model, depth=2, optimizer=factory)
    names = {name for name, _ in tiny_model.named_parameters()}
    names |= {f"aux_nets.{name}" for name, _ in trainer.aux_nets.named_parameters()}
    assert sorted(sum(given, [])) == sorted(names) and len(given) == 3
    assert "layer1.0.conv1.weight" in given[1] and any(name.startswith("aux_nets.1.") for name in given[1])
    of_trainer, given[:] = list(given), []
    for budget in (None, "5MB"):
        plan(models.CifarResNet(1), (8, 3, 16, 16), 2, optimizer=factory, memory_budget=budget)
    assert all(names in given for names in of_trainer)
    result = train(models.CifarResNet(1), [batch] * 2, 2, epochs=1, optimizer=factory, progress=False)
    assert result.peak_bytes == result.plan.peak_bytes


def test_what_a_factory_leaves_out_is_named(tiny_model):
    with pytest.raises(ValueError, match="given a factory that leaves out conv1.weight: use its argument"):
        LocalTrainer(tiny_model, depth=2, optimizer=lambda named: torch.optim.SGD(named[1:]))


def test_optimizers_that_need_the_loss_again_are_refused(tiny_model):
    class SAM(torch.optim.SGD):
        def first_step(self): ...

        def second_step(self): ...

    for kind in (torch.optim.LBFGS, SAM):
        with pytest.raises(
            ValueError, match=f"{kind.__name__} cannot train local modules: it re-evaluates the loss in"
        ):
            LocalTrainer(tiny_model, depth=2, optimizer=kind)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_trains_local_modules_in_the_bytes_that_are_planned(name, tiny_model, batch):
    result = train(tiny_model, [batch] * 2, 2, epochs=1, optimizer=named_optimizer(name, 1e-3), progress=False)
    assert math.isfinite(result.history[0]["loss"]) and result.peak_bytes == result.plan.peak_bytes


def test_what_is_no_optimizer_and_no_rate():
    with pytest.raises(ValueError, match="one of sgd, adam, adamw, nadam, radam, adagrad, rmsprop, given 'lion'"):
        named_optimizer("lion", 0.1)
    for lr in (0, -0.1, math.nan):
        with pytest.raises(ValueError, match="paper's lr must be above 0, given"):
            paper(lr)
