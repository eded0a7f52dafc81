"""What accumulated gradients, clipping and averages add to plans, to the byte, under a budget too."""

import random
from dataclasses import replace

import pytest
import torch

from auglocal_ext import models, plan
from auglocal_ext.common.memory import bytes_of, tensors_of
from auglocal_ext.planning.module_ways import module_ways
from auglocal_ext.planning.planner import Planner
from auglocal_ext.planning.stepping import Stepping
from auglocal_ext.planning.walker import Walker
from auglocal_ext.rules.auglocal import AugLocal
from auglocal_ext.rules.cutting import cut

SHAPE = (8, 3, 16, 16)


def test_averages_and_gradients_are_state(tiny_model):
    """The gradients of a module no longer count where it runs, but everywhere."""
    plans = [plan(tiny_model, SHAPE, 2, **stepping) for stepping in ({}, {"ema": 0.9}, {"accumulate": 2})]
    plain, averaged, accumulated = plans
    model = bytes_of(tensors_of(tiny_model)) + 8
    assert averaged.stepping_bytes == model == averaged.peak_bytes - plain.peak_bytes
    gradients = sum(module.gradient_bytes for module in plain.modules)
    assert accumulated.stepping_bytes == gradients == accumulated.state_bytes - plain.state_bytes
    assert plain.peak_bytes < accumulated.peak_bytes < plain.peak_bytes + gradients
    assert accumulated.macs == plain.macs and accumulated.origin.stepping == Stepping(accumulate=2)


@pytest.mark.parametrize("optimizer", [None, torch.optim.Adagrad], ids=["SGD", "Adagrad"])
@pytest.mark.parametrize(
    "stepping",
    [
        Stepping(accumulate=2, ema=0.9),
        Stepping(clip_norm=1.0),
        Stepping(accumulate=2, clip_norm=1.0, clip="global"),
    ],
    ids=["accumulate, ema", "clip_norm", "global"],
)
def test_the_table_gives_every_cut_its_exact_bytes(stepping, optimizer):
    with torch.device("meta"):
        planner = Planner(models.CifarResNet(2), optimizer=optimizer, stepping=stepping)
    rules, units, rng = [AugLocal(2), AugLocal(3)], planner.backbone.units, random.Random(0)
    table = Walker(planner, SHAPE, rules).table(rules)
    heads = [planner.heads_by_unit(rule, SHAPE) for rule in rules]
    for borders in [(), *(tuple(sorted(rng.sample(range(len(units) - 1), k))) for k in (1, 2, 4))]:
        which = [rng.randrange(2) for _ in borders]
        parts = list(zip((0, *(b + 1 for b in borders)), (*borders, len(units) - 1), strict=True))
        only = [[ways[which[borders.index(k)]] if k in borders else ways[0]] for k, ways in enumerate(table.heads)]
        modules = module_ways(replace(table, heads=only))
        (ways,) = zip(*(modules[i][j - i] for i, j in parts), strict=True)
        _, states, peaks, *_ = zip(*ways, strict=True)
        made = [*(heads[rule][b] for b, rule in zip(borders, which, strict=True)), None]
        planned = planner.plan(cut(planner.backbone, rules[0], borders=borders), SHAPE, rules[0], made)
        assert planned.peak_bytes == table.constant + sum(states) + max(peaks)


def test_a_budget_counts_them(tiny_model):
    plain = plan(tiny_model, SHAPE, 2, memory_budget="5MB")
    least = min(point.bytes for point in plain.choice.front)
    stepping = {"accumulate": 4, "clip_norm": 1.0, "clip": "global", "ema": 0.99}
    with pytest.raises(ValueError, match="is too small for batches of 8: the smallest step of this model needs"):
        plan(tiny_model, SHAPE, 2, memory_budget=least, **stepping)
    with pytest.raises(ValueError, match="optimizer state alone, with what accumulate and ema keep, are "):
        plan(tiny_model, SHAPE, 2, memory_budget="1MB", **stepping)
    chosen = plan(tiny_model, SHAPE, 2, memory_budget="5MB", **stepping)
    assert chosen.peak_bytes == chosen.choice.point.bytes > plain.peak_bytes


def test_other_ways_of_a_step_are_compared_with_the_same(tiny_model):
    """Eager backpropagation keeps gradients and averages as this does."""
    plain, other = (plan(tiny_model, SHAPE, 2, **more).comparison for more in ({}, {"accumulate": 2, "ema": 0.9}))
    average, gradients = bytes_of(tensors_of(tiny_model)) + 8, bytes_of(tiny_model.parameters())
    for way in ("eager", "eager_checkpoint", "bp"):
        more = getattr(other, way).bytes - getattr(plain, way).bytes
        assert average < more <= average + gradients
