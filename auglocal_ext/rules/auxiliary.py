"""Auxiliary nets: which units one copies (the AugLocal rule, arXiv:2402.17318), and the net itself."""

import math
from dataclasses import dataclass

from torch import nn

from ..models import init_weights

__all__ = ["PLAIN_WIDTH", "PYRAMID", "Sample", "aux_depth", "build_aux_net", "sample_units"]


PYRAMID = 0.5  # the paper's c: how much less deep the last aux net is than the first

PLAIN_WIDTH = 512  # of the linear layers in a VGG's aux nets


@dataclass(frozen=True)
class Sample:
    """The units an aux net copies, in order, with the stride each copy has."""

    units: tuple[int, ...]
    strides: tuple[int, ...]
    batch_norm_head: bool  # BatchNorm1d before the linear classifier


def aux_depth(last, units, blocks, pyramid):
    """Blocks in the aux net behind unit `last` of `units` in all: `blocks`, or with `pyramid` fewer toward the output:
    the authors' rule for one module per unit, by the unit's place, so that it holds for any other cut too.
    Python's round, half to even, as theirs."""
    borders = units - blocks - 1  # in the authors' cut; its last border is unit borders - 1
    if not pyramid or borders < 2:
        return blocks
    share = min(last / (borders - 1), 1) * PYRAMID
    return max(1, round(blocks * (1 - share) + share))


def sample_units(units, last, blocks, batch_norm_head):
    """A uniform sample of `blocks` of the units after `last`, always ending at the network's last unit.

    Strides: a residual block's copy halves the resolution once if the network has by then halved it at least once
    more than the copies so far, so that a sample ends at the network's own resolution wherever it can. A VGG's does
    where the channels change, as its authors have it, but not beyond the network's last resolution: an image that the
    network itself can take then has a pixel left to pool in every aux net.
    """
    remaining = len(units) - 1 - last
    if blocks >= remaining:
        chosen = tuple(range(last + 1, len(units)))
    else:
        chosen = tuple(round(last + i * remaining / blocks) for i in range(1, blocks + 1))
    plain, sampled = units[last].plain, [units[unit] for unit in chosen]
    if plain:
        strides = _plain_strides(units[last], sampled, units[-1].reduction)
    else:
        strides = _residual_strides(units[last], sampled)
    return Sample(chosen, tuple(strides), batch_norm_head and len(chosen) == 1 and not plain)


def _residual_strides(before, sampled):
    strides, pending = [], 0.0
    for unit in sampled:
        pending += math.log2(unit.reduction / before.reduction)
        strides.append(2 if pending >= 1 else 1)
        pending -= strides[-1] - 1
        before = unit
    return strides


def _plain_strides(before, sampled, last_reduction):
    strides, reduction = [], before.reduction
    for unit in sampled:
        strides.append(2 if unit.out_channels != before.out_channels and 2 * reduction <= last_reduction else 1)
        reduction *= strides[-1]
        before = unit
    return strides


def build_aux_net(backbone, last, sample):
    """The aux net behind unit `last`: blocks like the sampled units', pooling, and a linear classifier, of a VGG one of
    three layers.

    Its weights are its own: no tensor is shared with the backbone. (N, C, H, W) -> (N, num_classes)
    """
    layers, channels = [], backbone.units[last].out_channels
    for unit, stride in zip(sample.units, sample.strides, strict=True):
        layers.append(backbone.units[unit].copy(channels, stride))
        channels = backbone.units[unit].out_channels
    if backbone.units[last].plain:
        layers += [nn.Flatten(1), nn.AdaptiveAvgPool1d(PLAIN_WIDTH)]
        channels = PLAIN_WIDTH
        for _ in range(2):
            layers += [nn.Linear(channels, channels), nn.BatchNorm1d(channels), nn.ReLU()]
    else:
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(1)]
    if sample.batch_norm_head:
        layers.append(nn.BatchNorm1d(channels))
    net = nn.Sequential(*layers, nn.Linear(channels, backbone.num_classes))
    init_weights(net)
    return net
