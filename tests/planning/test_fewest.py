"""Into how many local modules a network is cut where neither the user nor the paper says."""

import warnings

import pytest
import torch
from torch import nn

from auglocal_ext import LocalTrainer, plan, train

SHAPE = (8, 3, 16, 16)


def small():
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def net(costly):
    """A function that makes nets behind borders: of cuts into so many modules costly ones, else a linear layer."""

    def make(border):
        layers = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(border.shape[0], 4)]
        if border.count + 1 in costly:
            layers = [nn.Conv2d(border.shape[0], 64, 3, padding=1), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
            layers.append(nn.Linear(64, 4))
        return nn.Sequential(*layers)

    return make


@pytest.mark.parametrize(("costly", "count"), [((), 2), ((2,), 3), ((2, 3), 4), ((2, 3, 4), 2)])
def test_the_fewest_modules_that_need_less_than_backpropagation(costly, count):
    planned = plan(small(), SHAPE, 2, auxiliary=net(costly))
    assert len(planned.modules) == count
    less = planned.peak_bytes < planned.comparison.bp.bytes
    assert less == (costly != (2, 3, 4)) == (planned.comparison.warning is None)
    by_number = [plan(small(), SHAPE, 2, auxiliary=net(costly), modules=k).peak_bytes for k in range(2, count)]
    assert all(size >= planned.comparison.bp.bytes for size in by_number)


def test_a_training_takes_them_too():
    torch.manual_seed(0)
    batches = [(torch.randn(SHAPE), torch.randint(4, SHAPE[:1]))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = train(small(), batches, 2, auxiliary=net((2,)), epochs=1, progress=False, nonfinite="skip")
    assert len(result.plan.modules) == 3 and result.plan.peak_bytes < result.plan.comparison.bp.bytes
    assert len(result.history[0]["module_accuracies"]) == 3 and result.history[0]["skipped_steps"] == 0


def test_what_is_asked_for_is_done():
    planned = plan(small(), SHAPE, 2, auxiliary=net((2,)), modules=2)
    assert len(planned.modules) == 2 and "modules=" not in str(planned.comparison.warning)
    assert len(plan(small(), SHAPE, rule="bp").modules) == 1
    assert len(LocalTrainer(small(), 2, auxiliary=net((2,))).local_modules) == 2  # no batch has told the shape
