"""A model as an ordered list of units and a classifier, without changing the model.

A unit is the smallest part that a local module can end after: of a ResNet the stem, then each residual block; of a
VGG each convolution with what follows it up to the next one. Units hold the model's own submodules, so training them
trains the model.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from ..common.messages import first_line
from ..common.meta import meta_copy
from ..engine.as_real import RealLayouts
from ..models import BasicBlock
from .copies import Copies, TokenBlock
from .layouts import MAPS
from .segment import Segment

__all__ = ["Backbone", "Shapes", "Unit"]


@dataclass(frozen=True)
class Unit:
    """A part of the backbone: (N, in, H, W) -> (N, out_channels, H / stride, W / stride), or what `takes` and `layout`
    say: maps whose channels come last, or tokens (N, L, C).

    Attributes:
        name: mostly a path in the model, "layer1.0"; one that several units lie in has a number behind.
        module: the model's own, or several of its in a row.
        width: base width, before a bottleneck's expansion (the paper's ch, torchvision's planes).
        out_channels: of its output.
        reduction: image pixels per output pixel, along a side.
        kept: convolution output elements per image pixel: what its backward keeps, by the main part.
        copy: (in_channels, stride, width=its own) -> new block like it, of that base width; None: the stem.
        plain: whether it is the conv-[BN-]ReLU of a VGG, no residual block.
        least_width: that a copy can have.
        takes: the layout of its input, see `layouts`.
        layout: of its output.
    """

    name: str
    module: nn.Module
    width: int
    out_channels: int
    reduction: int
    kept: float
    copy: Callable[..., nn.Module] | None
    plain: bool = False
    least_width: int = 1
    takes: str = MAPS
    layout: str = MAPS

    def copied_channels(self, width, stride):
        """How many channels a copy of that base width and stride puts out."""
        if isinstance(self.copy, Copies):
            return self.copy.channels(width, stride)
        return width * (self.out_channels // self.width)

    def trace(self, x):
        """The output for x, (N, in, H, W) or as `takes` says, both on the meta device: shapes without arithmetic, the
        module untouched.

        Raises:
            ValueError: the unit cannot take x.
        """
        return Shapes(self.name, self.module)(x)


@dataclass(frozen=True)
class Backbone:
    """A model as units, one after another, and a classifier.

    Attributes:
        units: a `Unit` each, from the images on.
        classifier: the last unit's output -> logits (N, num_classes).
        image_channels: of the images.
        num_classes: how many logits.
        form: the AugLocal form that its authors used for such a network: "cifar" or "imagenet"; None: they used none.
        image_side: pixels along a side of images that the model takes, and of which the units' numbers are.
        class_token: whether the classifier reads the first one of tokens.
        left_out: names of what the model puts out besides logits while it is trained, and is not trained here.
    """

    units: tuple[Unit, ...]
    classifier: nn.Module
    image_channels: int
    num_classes: int
    form: str | None
    image_side: int = 224
    class_token: bool = False
    left_out: tuple[str, ...] = ()
    _shapes: dict = field(default_factory=dict, compare=False, repr=False)  # what `feature_shapes` has found

    @functools.cached_property
    def kinds(self):
        """What each unit's module is made of, as text: equal ones have units alike."""
        return [str(unit.module) for unit in self.units]

    @property
    def made_for(self):
        """Pixels along a side of the images that such a network is made for, as far as is known."""
        return {"cifar": 32, "imagenet": 224}.get(self.form, self.image_side)

    def say_what_is_left_out(self):
        """Warns of heads of the model's own that are not trained."""
        if self.left_out:
            heads = " and ".join(self.left_out)
            warnings.warn(
                f"the model has auxiliary heads of its own, {heads}: they are not trained, the logits alone are",
                stacklevel=4,
            )

    @property
    def looked_into(self):
        """The module types whose forward tracing looks into."""
        families = {type(u.module) for u in self.units if u.copy is not None and not isinstance(u.copy, Copies)}
        return families - {nn.Sequential, nn.Conv2d} | {Segment, BasicBlock, TokenBlock}

    def feature_shapes(self, image_shape):
        """The shape of each unit's output without the batch, for images of image_shape, (C, H, W); a list of tuples.

        Raises:
            ValueError: a unit cannot take what images of this shape come to.
        """
        image_shape = tuple(image_shape)
        if image_shape not in self._shapes:
            shapes = []
            x = torch.empty(2, *image_shape, device="meta", dtype=next(self.units[0].module.parameters()).dtype)
            for unit in self.units:
                x = unit.trace(x)
                shapes.append(tuple(x.shape[1:]))
            self._shapes[image_shape] = shapes
        return self._shapes[image_shape]


class Shapes:
    """x -> the shape of what a module makes of it, as a meta tensor: without arithmetic, the module left alone."""

    def __init__(self, name, module):
        # In eval mode: training mode looks at values here and there, and has no other shapes.
        self.name, self.module = name, meta_copy(module).eval()

    @torch.no_grad()
    def __call__(self, x):
        try:
            with RealLayouts():
                out = self.module(x)
        except Exception as error:
            raise ValueError(
                f"{self.name} ({type(self.module).__name__}) cannot take an input of shape {tuple(x.shape)}: "
                f"{first_line(error)}"
            ) from error
        if not isinstance(out, torch.Tensor):
            raise ValueError(f"{self.name} ({type(self.module).__name__}) must put out a tensor, given {type(out)}")
        return out
