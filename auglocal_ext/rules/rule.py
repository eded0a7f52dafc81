"""What a learning rule is: which net and which loss stand behind a local module. For one of your own derive `Rule`."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ..backbone.units import Backbone

__all__ = ["Border", "ExtraLoss", "LocalHead", "Rule"]


@dataclass(frozen=True)
class Border:
    """The end of a local module that is not the last one: what a rule may go by.

    backbone: see `auglocal_ext.backbone`; backbone.units[unit] is the module's last unit.
    index, count: the how-manieth border from the input it is, from 0, and how many there are.
    shape: (C, H, W) of the features here, as a net of feature maps is given them; of tokens (L, C).
    image_shape: (C, H, W) of the images.
    """

    backbone: Backbone
    unit: int
    index: int
    count: int
    shape: tuple[int, int, int]
    image_shape: tuple[int, int, int]

    @property
    def place(self):
        """0 for the first border, 1 for the last, even steps between; 0 for a single one."""
        return self.index / max(self.count - 1, 1)

    @property
    def num_classes(self):
        return self.backbone.num_classes

    @property
    def layout(self):
        """Of the features, see `backbone.layouts`."""
        return self.backbone.units[self.unit].layout


class ExtraLoss(nn.Module):
    """A loss beside the cross-entropy: derive, and define `loss`. All its parameters are its net's.

    Args:
        net: features (N, C, H, W) -> prediction. It runs on the fused ops where they know its layers.

    Attributes:
        takes_inputs: whether `loss` is given a fourth argument, inputs: what the local module was given, which no
            gradient goes to.
    """

    takes_inputs = False

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def loss(self, prediction: torch.Tensor, labels: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """A scalar, differentiable by autograd in the prediction. It also runs on meta tensors, when a step is planned:
        no .item(), no branch on values; constant tensors belong into buffers (register_buffer).

        Args:
            prediction: what the net made, at least float32.
            labels: (N,), int64, with those that the criterion ignores; or soft ones, (N, classes).
            images: (N, C, H, W), as the step was given them.
        """
        raise NotImplementedError

    def forward(self, features: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        """given: what `loss` is given behind the prediction."""
        return self.loss(self.net(features), *given)


class LocalHead(nn.Module):
    """What stands behind a local module: features -> logits, and what the losses count.

    shares_readout: the net's last layer is a copy of the classifier's, see `follow`.
    """

    def __init__(self, net, extra=None, weights=(0.0, 1.0), shares_readout=False):
        super().__init__()
        if extra is not None and set(extra.parameters()) != set(extra.net.parameters()):
            raise ValueError(
                f"{type(extra).__name__} has parameters outside its net, which nothing would train: put them into it"
            )
        self.net, self.extra, self.weights, self.shares_readout = net, extra, weights, shares_readout
        if shares_readout:
            self.net[-1].requires_grad_(False)

    def forward(self, features):
        return self.net(features)

    @torch.no_grad()
    def follow(self, classifier):
        """Where the readout is shared, takes the classifier's last layer as it is now; to be called before a step."""
        if self.shares_readout:
            for ours, theirs in zip(self.net[-1].parameters(), classifier[-1].parameters(), strict=True):
                ours.requires_grad_(False).copy_(theirs)


class Rule:
    """A learning rule: give its subclass, or an object of one, as `rule=` to train, plan and LocalTrainer.

    A local module's loss is weights[0] x the extra loss + weights[1] x the cross-entropy of the aux net's logits. The
    last module's is the cross-entropy of the backbone's own classifier.

    Attributes:
        name: for people; the class's in lower case unless it says another.
        depth: the paper's d, for rules that have one.
        shares_readout: whether the aux nets' last layers follow the classifier's, see `LocalHead`.
        recompute: see `LocalTrainer`.
        takes_any_layout: whether its nets take features as the unit puts them out, see `backbone.layouts`; else they
            are given maps (N, C, H, W), and tokens are refused.
    """

    name: str
    depth = None
    shares_readout = False
    recompute = False
    takes_any_layout = False

    def __init_subclass__(cls):
        cls.name = vars(cls).get("name", cls.__name__.lower())

    def check(self, backbone: Backbone) -> None:
        """Raises ValueError where the rule does not fit a backbone."""

    def check_images(self, images: torch.Tensor) -> None:
        """Raises ValueError where the rule does not fit the images of a first batch, (N, C, H, W)."""

    def borders(self, backbone: Backbone) -> Iterable[int]:
        """The last unit of each module but the last one. Default: one module per unit."""
        return range(len(backbone.units) - 1)

    def aux_net(self, border: Border) -> nn.Module:
        """A new net behind a border: features of border.shape -> (N, border.num_classes)."""
        raise NotImplementedError(f"{type(self).__name__} must define aux_net(border), an nn.Module")

    def extra_loss(self, border: Border) -> ExtraLoss | None:
        """A new ExtraLoss behind a border, or None."""
        return None

    def weights(self, border: Border) -> tuple[float, float]:
        """(of the extra loss, of the cross-entropy)"""
        return 0.0, 1.0

    def describe(self, border: Border) -> str:
        """The aux net in a few words, for the plan's table. Default: its layers that have weights, and their width."""
        with torch.device("meta"):
            layers = self.aux_net(border).modules()
        widths = {nn.Conv2d: "out_channels", nn.Linear: "out_features"}
        return ", ".join(f"{type(m).__name__} {getattr(m, widths[type(m)])}" for m in layers if type(m) in widths)
