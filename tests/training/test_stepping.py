"""What a step does with gradients: accumulated, clipped, averaged, against plain torch; its bytes; what is refused."""

import copy
import itertools
import pickle
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from auglocal_ext import LocalTrainer, Rule, assert_isolated, models, plan
from auglocal_ext.common.memory import LiveBytes
from auglocal_ext.planning.stepping import Stepping

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01)
CLIPPING = [{}, {"clip_norm": 0.3}, {"clip_value": 0.01}, {"clip_norm": 0.1, "clip_value": 0.01}]


def batches(count, size=4):
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(size, 3, 8, 8, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [(images, torch.arange(size) % 10) for images in made]


def trainer_of(**options):
    torch.manual_seed(0)
    return LocalTrainer(models.CifarResNet(1, num_classes=10).double(), 2, optimizer=SGD, **options)


class Plain:
    """The same local modules by autograd and torch's own functions, every gradient kept to the end of a group."""

    def __init__(self, trainer, settings):
        self.model, self.settings = copy.deepcopy(trainer.model), settings
        m, nets = self.model, copy.deepcopy(trainer.aux_nets)
        self.nets = nets
        units = [nn.Sequential(m.conv1, m.bn1, nn.ReLU()), *m.layer1, *m.layer2, *m.layer3]
        heads = [*nets, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), m.fc)]
        bodies = [nn.Sequential(*units[span.first : span.last + 1]) for span in trainer._spans]
        self.modules = [nn.ModuleList(pair) for pair in zip(bodies, heads, strict=True)]
        self.optimizers = [SGD(module.parameters()) for module in self.modules]
        if settings.ema is not None:
            average = get_ema_multi_avg_fn(settings.ema)
            self.average = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)

    def group(self, given, without=()):
        """A step by several batches, but of the modules `without`."""
        for x, labels in given:
            for body, head in self.modules:
                x = body(x.detach())
                (F.cross_entropy(head(x), labels) / len(given)).backward()
        stepped = [index for index in range(len(self.modules)) if index not in without]
        together = [[p for i in stepped for p in self.modules[i].parameters()]]
        apart = [list(self.modules[i].parameters()) for i in stepped]
        for parameters in together if self.settings.clip == "global" else apart:
            if self.settings.clip_value is not None:
                nn.utils.clip_grad_value_(parameters, self.settings.clip_value)
            if self.settings.clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, self.settings.clip_norm)
        for index, optimizer in enumerate(self.optimizers):
            if index in stepped:
                optimizer.step()
            optimizer.zero_grad()
        if self.settings.ema is not None:
            self.average.update_parameters(self.model)


def assert_same(trainer, plain):
    pairs = [(trainer.model, plain.model), (trainer.aux_nets, plain.nets)]
    if trainer.ema_model is not None:
        pairs.append((trainer.ema_model, plain.average.module))
    for ours, theirs in pairs:
        for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize(
    ("accumulate", "clipping"),
    [*itertools.product((1, 2, 3), CLIPPING), *((count, {"clip_norm": 0.3, "clip": "global"}) for count in (2, 3))],
    ids=str,
)
@pytest.mark.parametrize("more", [{}, {"ema": 0.7}], ids=str)
@pytest.mark.covering(1)
def test_steps_are_those_of_plain_torch(accumulate, clipping, more):
    """Also where the norm is above what it may be, and below."""
    options = {"accumulate": accumulate, **clipping, **more}
    trainer = trainer_of(**options)
    plain, given = Plain(trainer, Stepping(**options)), batches(7)
    for batch in given:
        trainer.step(*batch)
    trainer.flush()
    for first in range(0, len(given), accumulate):
        plain.group(given[first : first + accumulate])
    assert_same(trainer, plain)


class Linear(Rule):
    """Aux nets without BatchNorm."""

    def aux_net(self, border):
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(border.shape[0], border.num_classes))


def test_micro_batches_are_one_large_batch_without_batch_norm():
    def trained(accumulate, given):
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        net = nn.Sequential(*layers, nn.Linear(8, 10)).double()
        trainer = LocalTrainer(net, rule=Linear, modules=2, optimizer=SGD, accumulate=accumulate)
        for batch in given:
            trainer.step(*batch)
        return trainer.model.state_dict()

    small = batches(4)
    large = [tuple(torch.cat(pair) for pair in zip(*small[i : i + 2], strict=True)) for i in (0, 2)]
    found, expected = trained(2, small), trained(1, large)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-12, msg=name)


def test_a_module_is_left_out_of_a_group_with_something_not_finite():
    options = {"accumulate": 2, "clip_norm": 0.2, "ema": 0.5}
    for clip in ("module", "global"):
        trainer = trainer_of(clip=clip, **options)
        trainer.nonfinite = "skip"
        plain, given = Plain(trainer, Stepping(clip=clip, **options)), batches(4)
        fault = [False]

        def infinite(gradient, fault=fault):
            return gradient * torch.inf if fault[0] else None

        trainer.model.layer1[0].conv1.weight.register_hook(infinite)
        statistics = None
        for index, batch in enumerate(given):
            fault[0] = index == 1
            trainer.step(*batch)
            if index == 0:
                statistics = trainer.model.layer1[0].bn1.running_mean.clone()
            if index == 1:
                assert torch.equal(trainer.model.layer1[0].bn1.running_mean, statistics)
        assert trainer.skipped_steps == [0, 1, 0]
        plain.group(given[:2], without=[1])
        plain.group(given[2:])
        for name, p in plain.model.named_parameters():
            torch.testing.assert_close(trainer.model.get_parameter(name), p, rtol=1e-8, atol=1e-10, msg=name)


# ---- memory ----------------------------------------------------------------------------------------------------------


def measured_peak(trainer, given):
    """Of the steps of a group, when everything that stays between steps is there."""
    for batch in given:
        trainer.step(*batch)
    peaks = []
    for batch in given:
        with LiveBytes([*trainer.tensors(), *batch]) as live:
            trainer.step(*batch)
        peaks.append(live.peak)
    return max(peaks)


@pytest.mark.usefixtures("nothing_compared")
@pytest.mark.covering(1)
@pytest.mark.parametrize("optimizer", [SGD, torch.optim.Adagrad], ids=["SGD", "Adagrad"])
@pytest.mark.parametrize(
    "cutting", [{}, {"rule": "bp"}, {"modules": 2, "precision": "bf16"}, {"recompute": True}], ids=str
)
@pytest.mark.parametrize(
    "stepping",
    [
        {"accumulate": 2},
        {"accumulate": 3, "clip_norm": 1.0, "ema": 0.9},
        {"accumulate": 2, "clip_norm": 1.0, "clip": "global"},
        {"clip_norm": 1.0, "clip_value": 1.0},
        {"ema": 0.99},
    ],
    ids=str,
)
def test_the_prediction_is_what_is_measured(stepping, cutting, optimizer):
    trainer = LocalTrainer(models.CifarResNet(1), 2, optimizer=optimizer, **stepping, **cutting)
    given = [(images.float(), labels) for images, labels in batches(stepping.get("accumulate", 1), 8)]
    peak = measured_peak(trainer, given)
    assert peak == trainer.plan.peak_bytes
    kept = sum(t.nbytes for t in trainer.tensors()) - trainer.module_hits.nbytes
    assert kept == trainer.plan.state_bytes


def test_where_nothing_but_the_step_needs_memory():
    """Two images of one pixel: clipping's own few bytes are the peak."""
    wide = nn.Sequential(nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 1), nn.ReLU())
    model = nn.Sequential(*wide, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    images, labels = torch.randn(2, 3, 1, 1), torch.arange(2)
    peaks = {}
    for stepping in ({}, {"clip_norm": 1.0}):
        trainer = LocalTrainer(copy.deepcopy(model), rule="bp", optimizer=torch.optim.Adagrad, **stepping)
        assert measured_peak(trainer, [(images, labels)]) == trainer.plan.peak_bytes
        peaks[len(stepping)] = trainer.plan.peak_bytes
    assert peaks[1] >= peaks[0]


@pytest.mark.parametrize("cutting", [{}, {"memory_budget": "5MB"}], ids=str)
def test_a_plan_tells_the_trainer_how_to_step(cutting):
    stepping = {"accumulate": 2, "clip_norm": 1.0, "ema": 0.9}
    model = models.CifarResNet(1)
    planned = plan(model, (8, 3, 8, 8), 2, **stepping, **cutting, memory_format=torch.contiguous_format)
    trainer = LocalTrainer(model, plan=planned)
    assert trainer.stepping == Stepping(**stepping) and trainer.ema_model is not None
    given = [(images.float(), labels) for images, labels in batches(2, 8)]
    assert measured_peak(trainer, given) == planned.peak_bytes and trainer.plan is planned
    with pytest.raises(
        ValueError,
        match="precision, recompute, sync_batch_norm, accumulate, clip_norm, clip_value, clip and ema: leave",
    ):
        LocalTrainer(model, plan=planned, accumulate=2)


# ---- between steps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("done", [2, 3])
def test_goes_on_to_the_bit_in_a_group_and_behind_one(done):
    options = {"accumulate": 2, "clip_norm": 0.3, "ema": 0.7}
    first, given = trainer_of(**options), batches(5)
    for batch in given[:done]:
        first.step(*batch)
    state, others = first.state_dict(), [trainer_of(**options) for _ in range(2)]
    others[0].step(*given[0])
    for other in others:
        other.load_state_dict(copy.deepcopy(state))
    for trainer in (first, *others, pickle.loads(pickle.dumps(others[1])), copy.deepcopy(others[1])):
        for batch in given[done:]:
            trainer.step(*batch)
        for name, value in first.state_dict()["model"].items():
            assert torch.equal(value, trainer.model.state_dict()[name]), name
        for name, value in first.ema_model.state_dict().items():
            assert torch.equal(value, trainer.ema_model.state_dict()[name]), name


def test_the_state_of_another_way_to_step_is_refused():
    state = trainer_of(accumulate=2).state_dict()
    with pytest.raises(
        ValueError, match="saved with accumulate 2, this trainer has 3: make the model and the trainer as"
    ):
        trainer_of(accumulate=3).load_state_dict(state)
    with pytest.raises(ValueError, match="saved with ema None, this trainer has 0.9"):
        trainer_of(accumulate=2, ema=0.9).load_state_dict(state)


def test_a_step_that_stops_forgets_its_group(monkeypatch):
    trainer, given = trainer_of(accumulate=2), batches(3)
    trainer.step(*given[0])
    before = copy.deepcopy(trainer.model.state_dict())
    run = trainer._current_programs()[1]
    monkeypatch.setattr(run, "run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError, match="Module 0 has taken this step already"):
        trainer.step(*given[1])
    trainer.stepper.drop()
    for name, value in before.items():
        trainer.model.state_dict()[name].copy_(value)
    with pytest.raises(ZeroDivisionError, match="No finished module was changed"):
        trainer.step(*given[0])
    assert trainer.stepper.count == 0 and all(p.grad is None for p in trainer.model.parameters())


def test_isolation_is_seen_in_a_group_too():
    trainer, (batch, *_) = trainer_of(accumulate=2), batches(1)
    trainer.step(*batch)
    gradients = [p.grad.clone() for p in trainer.model.parameters()]
    assert_isolated(trainer, *batch)
    assert all(torch.equal(p.grad, g) for p, g in zip(trainer.model.parameters(), gradients, strict=True))


@pytest.mark.parametrize(("done", "more"), [(2, 2), (3, 1), (3, 0)], ids=["between groups", "in one", "before a flush"])
def test_what_was_frozen_is_not_stepped_by_what_is_left(done, more):
    trainer, given = trainer_of(accumulate=2), batches(4)
    for batch in given[:done]:
        trainer.step(*batch)
    weight = trainer.model.conv1.weight.requires_grad_(False)
    before, other = weight.clone(), trainer.model.bn1.weight.clone()
    for batch in given[done : done + more]:
        trainer.step(*batch)
    trainer.flush()
    assert torch.equal(weight, before) and not torch.equal(trainer.model.bn1.weight, other)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate must be a whole number of batches, at least 1, given 0"),
        ({"accumulate": 1.5}, "accumulate must be a whole number of batches, at least 1, given 1.5"),
        ({"clip_norm": 0}, "clip_norm must be None or a finite number above 0, given 0"),
        ({"clip_value": float("inf")}, "clip_value must be None or a finite number above 0, given inf"),
        ({"ema": 1}, "ema must be None or a decay from 0 to below 1, such as 0.999, given 1"),
        ({"ema": True}, "ema must be None or a decay from 0 to below 1, such as 0.999, given True"),
        ({"clip": "all"}, "clip must be one of module, global, given 'all'"),
        ({"clip": "global", "accumulate": 2}, "clip='global' is how clip_norm is meant: give clip_norm too"),
        (
            {"clip": "global", "clip_norm": 1.0},
            "clip='global' needs accumulate=2 or more: with accumulate=1 a module's gradients are gone before the next",
        ),
    ],
)
def test_refusals(options, message):
    for call in (partial(LocalTrainer, models.CifarResNet(1)), partial(plan, models.CifarResNet(1), (2, 3, 8, 8))):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(**options)
