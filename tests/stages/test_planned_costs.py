"""What a plan's pieces cost, against the plan."""

import pytest
import torch

from auglocal_ext import models, plan
from auglocal_ext.planning.roofline import Roofline
from auglocal_ext.stages.pieces import total
from auglocal_ext.stages.planned_costs import planned_costs
from auglocal_ext.stages.simulate import predicted

SHAPE = (8, 3, 16, 16)
CLOCK = Roofline(1e9, 1e9)


@pytest.fixture(scope="module")
def model():
    return models.CifarResNet(1)


@pytest.fixture(scope="module")
def planned(model):
    return plan(model, SHAPE, 2, modules=3)


@pytest.fixture(scope="module")
def costs(planned, model):
    return planned_costs(planned, model, CLOCK)


def test_local_modules_have_the_plans_bytes(costs, planned):
    assert costs.images == 8 and costs.batch == planned.batch_bytes and len(costs.modules) == 3
    assert total(costs.modules, "state") == planned.state_bytes
    assert [piece.output - 8 * 8 for piece in costs.modules] == [131072, 131072, 32768]  # and labels
    assert [piece.kept for piece in costs.modules] == [module.kept_bytes for module in planned.modules]
    for ranks in (1, 2, 3):
        spans = [range(ranks - 1), range(ranks - 1, 3)] if ranks > 1 else [range(3)]
        found = predicted(costs, len(spans), spans=spans)
        highest = max(module.peak_bytes for module in planned.modules[spans[-1].start :])
        state = sum(module.state_bytes + module.optimizer_bytes for module in planned.modules[: spans[-1].start])
        received = 2 * costs.modules[spans[-1].start - 1].output * (ranks > 1)
        assert found.memory[-1] == highest - state + received


def test_units_of_backpropagation_have_its_bytes(costs, planned, model):
    assert len(costs.units) == 4
    parameters = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert total(costs.units, "gradients") == parameters
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert total(costs.units, "state") == 2 * parameters + buffers  # and momentum
    peak = planned.comparison.bp.bytes
    memory = predicted(costs, 1, "bp data parallel").memory[0]
    assert peak <= memory <= peak + parameters
    assert [piece.output for piece in costs.units] == [131072, 131072, 65536, 32768]


def test_seconds_are_the_clocks(costs, model):
    whole = planned_costs(plan(model, SHAPE, rule="bp"), model, CLOCK)
    (only,) = whole.modules
    for what in ("forward", "backward", "weights", "step"):
        assert total(costs.units, what) == pytest.approx(getattr(only, what))
        assert total(whole.units, what) == pytest.approx(getattr(only, what))
    assert 0 < only.weights < only.backward and only.forward < only.backward
    half = planned_costs(plan(model, SHAPE, rule="bp"), model, Roofline(5e8, 5e8))
    assert half.modules[0].seconds == pytest.approx(2 * only.seconds, rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"memory_budget": "2MB", "depth": "auto", "auxiliary": "auto", "recompute": "auto"},
        {"modules": 2, "depth": 2, "recompute": True, "soft_labels": True},
        {"modules": 2, "rule": "infopro", "precision": "bf16"},
        {"rule": "checkpoint"},
    ],
)
def test_one_rank_holds_what_was_planned(model, options):
    planned = plan(model, SHAPE, **options)
    costs = planned_costs(planned, model, CLOCK)
    assert predicted(costs, 1).memory == (planned.peak_bytes,)
    assert [piece.state for piece in costs.modules] == [m.state_bytes + m.optimizer_bytes for m in planned.modules]


def test_units_by_name(model):
    units = ["conv1", "layer2"]
    found = planned_costs(plan(model, SHAPE, 2, modules=2, units=units), model, CLOCK, units)
    assert len(found.units) == len(found.modules) == 2
    with pytest.raises(ValueError, match="2 local modules cannot be spread over 3 stages"):
        predicted(found, 3)


def test_batches_that_accumulate_are_refused(model):
    with pytest.raises(ValueError, match="given 2 to accumulate: leave that out"):
        planned_costs(plan(model, SHAPE, 2, modules=2, accumulate=2), model, CLOCK)


def test_frozen_parts_train_nothing(model):
    model = models.CifarResNet(1)
    for parameter in (*model.conv1.parameters(), *model.bn1.parameters(), *model.layer1.parameters()):
        parameter.requires_grad_(False)
    found = planned_costs(plan(model, SHAPE, 2, modules=2), model, CLOCK)
    assert [piece.gradients > 0 for piece in found.units] == [False, False, True, True]
    assert found.units[1].backward == 0 and torch.tensor(found.units[2].backward) > 0
