"""The numbers of a network's units are those of whole plans, whatever their outputs are made again from."""

import random
from dataclasses import dataclass, replace

import pytest
from torch import nn

from auglocal_ext.backbone.units import Backbone, Unit
from auglocal_ext.planning.module_ways import module_ways
from auglocal_ext.planning.planner import Planner
from auglocal_ext.planning.walker import Walker
from auglocal_ext.rules.auglocal import AugLocal
from auglocal_ext.rules.cutting import cut


class Net(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True))
        self.units = nn.Sequential(stem, *blocks)
        self.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(16, 10))

    def forward(self, x):
        return self.classifier(self.units(x))


@dataclass(frozen=True)
class Read(Backbone):
    @property
    def looked_into(self):
        parts = (part for unit in self.units for part in unit.module.modules())
        return {type(part) for part in parts if not type(part).__module__.startswith("torch.nn.")}


def depths(models):
    """Stochastic depth, squeeze-excitation and a chain of shortcuts."""
    block, config = models.efficientnet.MBConv, models.efficientnet.MBConvConfig
    wide, same = config(2, 3, 2, 8, 16, 1, 1.0, 1.0), config(2, 3, 1, 16, 16, 1, 1.0, 1.0)
    return [8, 16, 16, 16], [block(each, 0.2, nn.BatchNorm2d) for each in (wide, same, same)]


def shuffles(models):
    """Shortcuts that are read and given back in parts, a chain of them longer than a rebuild may walk."""
    block = models.shufflenetv2.InvertedResidual
    return [8, *[16] * 9], [block(8, 16, 2), *(block(16, 16, 1) for _ in range(8))]


def concatenations(models):
    dense, transition = models.densenet._DenseBlock, models.densenet._Transition
    return [8, 16, 8, 16], [dense(2, 8, 2, 4, 0.0), transition(16, 8), dense(2, 8, 2, 4, 0.1)]


@pytest.mark.parametrize(("made", "recompute"), [(depths, True), (shuffles, False), (concatenations, False)])
def test_the_table_gives_every_cut_its_exact_bytes(torchvision, made, recompute):
    channels, blocks = made(torchvision.models)
    net, shape, rule = Net(*blocks), (4, 3, 32, 32), AugLocal(2, None, _net)
    units = [
        Unit(f"unit{k}", unit, c, c, 2, 1.0, None) for k, (unit, c) in enumerate(zip(net.units, channels, strict=True))
    ]
    planner = Planner(net, backbone=Read(tuple(units), net.classifier, 3, 10, "imagenet"))
    units, rng = planner.backbone.units, random.Random(0)
    table, heads = (
        Walker(planner, shape, [rule]).table([rule], (False, True)[: 1 + recompute]),
        planner.heads_by_unit(rule, shape),
    )
    for case in range(3):
        borders = tuple(sorted(rng.sample(range(len(units) - 1), min(case, 2))))
        again = [recompute and rng.random() < 0.5 for _ in units]
        only = replace(table, units=[[ways[a]] for ways, a in zip(table.units, again, strict=True)])
        parts = zip((0, *(b + 1 for b in borders)), (*borders, len(units) - 1), strict=True)
        ways = module_ways(only)
        macs, states, peaks, *_ = zip(*(ways[i][j - i][0] for i, j in parts), strict=True)
        names = tuple(unit.name for unit, a in zip(units, again, strict=True) if a) or False
        spans = cut(planner.backbone, rule, borders=borders)
        planned = planner.with_recompute(names).plan(spans, shape, rule, [*(heads[b] for b in borders), None])
        predicted = table.constant + sum(states) + max(peaks)
        if names:  # what fits under the peak is kept, not run again
            assert planned.peak_bytes <= predicted <= 1.07 * planned.peak_bytes and planned.macs <= sum(macs)
        else:
            assert (planned.peak_bytes, planned.macs) == (predicted, sum(macs))


def _net(border):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(border.shape[0], border.num_classes))
