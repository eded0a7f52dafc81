"""Auxiliary nets: which units one copies (the AugLocal rule, arXiv:2402.17318), what the copies are like, and the net.

The paper's nets cost much: on a ResNet-34 one takes a fifth of backpropagation's arithmetic. `Auxiliary` is the family
of cheaper ones.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import nn

from ..backbone.copies import Copies
from ..backbone.layouts import MAPS, TOKENS, TokenPool, channels_of, in_layout, to_layout
from ..backbone.units import Shapes, Unit
from ..models import init_weights

__all__ = [
    "AUXILIARIES",
    "Auxiliary",
    "Sample",
    "as_auxiliary",
    "aux_depth",
    "build_aux_net",
    "copied_width",
    "copies_in",
    "nets_of",
    "sample_units",
]


PYRAMID = 0.5  # the paper's c: how much less deep the last aux net is than the first

PLAIN_WIDTH = 512  # of the linear layers in a VGG's aux nets of the paper


@dataclass(frozen=True)
class Auxiliary:
    """How an aux net of AugLocal differs from the paper's, which is the one without arguments.

    Args:
        pooled: the features are averaged to the network's last resolution first, where the copies then run; a VGG's net
            ends in pooling and one linear layer, as others do, instead of three.
        width: of the copies, as a factor, above 0 and at most 4.
        separable: each k x k convolution of a copy, k > 1, is a depthwise one and a 1 x 1 one.
        share: copies at most this share of the units that are left, above 0 and at most 1; one at least.
        readout: "own", or "shared": the linear layer is a copy of the network's own from the step before, which the
            module does not train. Copies of another width than the network's last unit then end in a 1 x 1 convolution.

    As text: "paper", "light", which is "pooled width=0.5", or what differs, as in "pooled width=0.5 separable".

    Raises:
        ValueError: an argument is out of its range.
    """

    pooled: bool = False
    width: float = 1.0
    separable: bool = False
    share: float = 1.0
    readout: str = "own"

    def __post_init__(self):
        for name in ("pooled", "separable"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"an auxiliary net's {name} must be True or False, given {getattr(self, name)!r}")
        if isinstance(self.width, bool) or not isinstance(self.width, int | float) or not 0 < self.width <= 4:
            raise ValueError(f"an auxiliary net's width must be a factor above 0, at most 4, given {self.width!r}")
        if not isinstance(self.share, int | float) or not 0 < self.share <= 1:
            raise ValueError(f"an auxiliary net's share must be above 0, at most 1, given {self.share!r}")
        if self.readout not in ("own", "shared"):
            raise ValueError(f"an auxiliary net's readout must be own or shared, given {self.readout!r}")

    def __str__(self):
        if self in AUXILIARIES.values():
            return next(name for name, known in AUXILIARIES.items() if known == self)
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return " ".join(name if value is True else f"{name}={value}" for name, value in given.items())


AUXILIARIES = {"paper": Auxiliary(), "light": Auxiliary(pooled=True, width=0.5)}


def as_auxiliary(given):
    """The Auxiliary that is meant, or the function border -> nn.Module: AugLocal's argument."""
    expected = (
        "auxiliary must be 'paper', 'light', how the nets differ from the paper's, as in 'pooled width=0.5 separable' "
        "(pooled, width=, separable, share=, readout=own|shared), an auglocal_ext.rules.Auxiliary, or a function of a "
        "border that makes a net"
    )
    if given == "auto":
        raise ValueError("auxiliary='auto' chooses under a budget: give memory_budget too, for instance '6GB'")
    if isinstance(given, str):
        return AUXILIARIES[given] if given in AUXILIARIES else _parse(given, expected)
    if isinstance(given, Auxiliary) or (callable(given) and not isinstance(given, type | nn.Module)):
        return given
    raise ValueError(f"{expected}, given {given!r}")


def nets_of(rule):
    """The member of the family that a rule's nets are, as text, or the name of the function that makes them; None: the
    paper's, or of another rule."""
    auxiliary = getattr(rule, "auxiliary", None)
    if callable(auxiliary):
        return f"by {getattr(auxiliary, '__name__', type(auxiliary).__name__)}"
    return str(auxiliary) if isinstance(auxiliary, Auxiliary) and auxiliary != AUXILIARIES["paper"] else None


def _parse(text, expected):
    options, kinds = {}, {f.name: f.type for f in fields(Auxiliary)}
    for word in text.replace(",", " ").split():
        name, equals, value = word.partition("=")
        try:
            if name not in kinds or name in options or (not equals) != (kinds[name] is bool):
                raise ValueError
            options[name] = True if kinds[name] is bool else kinds[name](value)
        except ValueError:
            raise ValueError(f"{expected}, given {text!r}") from None
    if not options:
        raise ValueError(f"{expected}, given {text!r}")
    return Auxiliary(**options)


@dataclass(frozen=True)
class Sample:
    """The units an aux net copies, in order, with the stride each copy has."""

    units: tuple[int, ...]
    strides: tuple[int, ...]
    batch_norm_head: bool  # BatchNorm1d before the linear classifier
    pool: int = 1  # pixels per pixel, along a side, that the features are averaged to first


def aux_depth(last, units, blocks, pyramid):
    """Blocks in the aux net behind unit `last` of `units` in all: `blocks`, or with `pyramid` fewer toward the output:
    the authors' rule for one module per unit, by the unit's place, so that it holds for any other cut too.
    Python's round, half to even, as theirs."""
    borders = units - blocks - 1  # in the authors' cut; its last border is unit borders - 1
    if not pyramid or borders < 2:
        return blocks
    share = min(last / (borders - 1), 1) * PYRAMID
    return max(1, round(blocks * (1 - share) + share))


def sample_units(units, last, blocks, batch_norm_head, auxiliary=AUXILIARIES["paper"]):
    """A uniform sample of `blocks` of the units after `last`, always ending at the network's last unit.

    Strides: a residual block's copy halves the resolution once if the network has by then halved it at least once
    more than the copies so far, so that a sample ends at the network's own resolution wherever it can. A VGG's does
    where the channels change, as its authors have it, but not beyond the network's last resolution: an image that the
    network itself can take then has a pixel left to pool in every aux net. Of pooled features no copy has a stride.
    """
    remaining = len(units) - 1 - last
    blocks = min(blocks, max(1, round(auxiliary.share * remaining)))
    if blocks >= remaining:
        chosen = tuple(range(last + 1, len(units)))
    else:
        chosen = tuple(round(last + i * remaining / blocks) for i in range(1, blocks + 1))
    plain, sampled = units[last].plain, [units[unit] for unit in chosen]
    head = batch_norm_head and len(chosen) == 1 and not plain
    if auxiliary.pooled:
        return Sample(chosen, (1,) * len(chosen), head, units[-1].reduction // units[last].reduction)
    if plain:
        strides = _plain_strides(units[last], sampled, units[-1].reduction)
    else:
        strides = _residual_strides(units[last], sampled)
    return Sample(chosen, tuple(strides), head)


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


@dataclass(frozen=True)
class Copied:
    """A copy in an aux net: of a unit, of a base width, with a stride; or a residual block that stands for it."""

    unit: Unit
    width: int
    stride: int
    residual: bool

    def make(self, channels):
        """The block; channels: that it is given."""
        if self.residual:
            return self.unit.copy.residual(channels, self.stride, self.width)
        return self.unit.copy(channels, self.stride, self.width)

    @property
    def channels(self):
        """That it puts out."""
        return self.width if self.residual else self.unit.copied_channels(self.width, self.stride)

    def __str__(self):
        return f"{self.unit.name} ({self.width}, /{self.stride}{', a residual block' * self.residual})"


def copies_in(backbone, last, sample, auxiliary, shape):
    """The `Copied` of an aux net. Units that were read by a graph are tried, without data, on features of `shape`, (C,
    H, W) or as the unit puts them out."""
    units, copies = backbone.units, []
    channels, layout, x = units[last].out_channels, units[last].layout, torch.empty(2, *shape, device="meta")
    layers = _pool(sample, layout)
    for index, stride in zip(sample.units, sample.strides, strict=True):
        unit = units[index]
        width = copied_width(unit, auxiliary)
        layers += to_layout(layout, unit.takes)
        if isinstance(unit.copy, Copies):
            copied, x = _tried(unit, width, stride, layers, channels, x)
            layers = []
        else:
            copied = Copied(unit, width, stride, False)
        copies.append(copied)
        channels, layout = copied.channels, unit.layout
    return copies


def _tried(unit, width, stride, layers, channels, x):
    """(the Copied of a unit that can take x behind some layers, what it makes of it)"""
    for residual in (False, True):
        copied = Copied(unit, width, stride, residual or unit.copy.is_residual(width, stride))
        with torch.device("meta"):
            net = nn.Sequential(*layers, copied.make(channels))
        try:
            out = Shapes(f"the copy of {unit.name}", net)(x)
        except ValueError:
            if residual:
                raise
            continue
        if channels_of(out, unit.layout) == copied.channels:
            return copied, out
    raise ValueError(f"the copy of {unit.name} puts out {tuple(out.shape)}, not {copied.channels} channels")


def _pool(sample, layout):
    if sample.pool == 1 or layout == TOKENS:
        return []
    return in_layout([nn.AvgPool2d(sample.pool, ceil_mode=True)], layout)  # as the network's own strides round


def build_aux_net(backbone, last, sample, auxiliary=AUXILIARIES["paper"], shape=None):
    """The aux net behind unit `last`: blocks like the sampled units', pooling, and a linear classifier, of a VGG one of
    three layers.

    Its weights are its own: no tensor is shared with the backbone. (N, C, H, W) -> (N, num_classes)

    shape: see `copies_in`; None: as in images of the size that the backbone's numbers are of.
    """
    units, end, layout = backbone.units, backbone.units[-1].out_channels, backbone.units[last].layout
    if shape is None:
        shape = backbone.feature_shapes((backbone.image_channels, *[backbone.image_side] * 2))[last]
    layers, channels = _pool(sample, layout), units[last].out_channels
    for copied in copies_in(backbone, last, sample, auxiliary, shape):
        layers += to_layout(layout, copied.unit.takes)
        block = copied.make(channels)
        layers.append(_separable(block) if auxiliary.separable else block)
        channels, layout = copied.channels, copied.unit.layout
    if auxiliary.readout == "shared" and channels != end:
        layers += [nn.Conv2d(channels, end, 1, bias=False), nn.BatchNorm2d(end), nn.ReLU()]
        channels = end
    if units[last].plain and not auxiliary.pooled:
        layers += [nn.Flatten(1), nn.AdaptiveAvgPool1d(PLAIN_WIDTH)]
        channels = PLAIN_WIDTH
        for _ in range(2):
            layers += [nn.Linear(channels, channels), nn.BatchNorm1d(channels), nn.ReLU()]
    elif layout == TOKENS:
        layers.append(TokenPool(backbone.class_token))
    else:
        layers += [*to_layout(layout, MAPS), nn.AdaptiveAvgPool2d(1), nn.Flatten(1)]
    if sample.batch_norm_head:
        layers.append(nn.BatchNorm1d(channels))
    bias = auxiliary.readout == "own" or backbone.classifier[-1].bias is not None
    net = nn.Sequential(*layers, nn.Linear(channels, backbone.num_classes, bias=bias))
    init_weights(net)
    return net


def copied_width(unit, auxiliary):
    """The base width of a unit's copy."""
    return max(unit.least_width, round(unit.width * auxiliary.width))


def _separable(block):
    """The block with its convolutions of more than one pixel replaced, in place, by a depthwise and a 1 x 1 one."""
    for name, child in list(block.named_children()):
        if isinstance(child, nn.Conv2d) and max(child.kernel_size) > 1:
            channels = child.in_channels
            place = {"stride": child.stride, "padding": child.padding, "dilation": child.dilation}
            each = nn.Conv2d(channels, channels, child.kernel_size, **place, groups=channels, bias=False)
            across = nn.Conv2d(channels, child.out_channels, 1, bias=child.bias is not None)
            setattr(block, name, nn.Sequential(each, across))
        else:
            _separable(child)
    return block
