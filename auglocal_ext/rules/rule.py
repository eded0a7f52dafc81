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

    Attributes:
        backbone: see `auglocal_ext.backbone.Backbone`.
        unit: the number of the module's last unit, backbone.units[unit].
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
        """How many logits a net here has to make."""
        return self.backbone.num_classes

    @property
    def layout(self):
        """What the dimensions of the features mean, as "maps", "maps, channels last" or "tokens"; see
        `backbone.layouts`."""
        return self.backbone.units[self.unit].layout


class ExtraLoss(nn.Module):
    """A loss beside the cross-entropy: derive, and define `loss`. All its parameters are its net's.

    Args:
        net: a module, features (N, C, H, W) -> prediction. It runs on the fused ops where they know its layers.

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

        Returns:
            The loss, ().
        """
        raise NotImplementedError

    def forward(self, features: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        """The loss of features, as autograd would have it; given: what `loss` is given behind the prediction."""
        return self.loss(self.net(features), *given)


class LocalHead(nn.Module):
    """What stands behind a local module: features -> logits (N, classes), and what the losses count.

    Args:
        net: features -> logits.
        extra: an `ExtraLoss`, or None.
        weights: of the extra loss, and of the cross-entropy.
        shares_readout: whether the net's last layer is a copy of the classifier's, see `follow`.

    Raises:
        ValueError: the extra loss has parameters outside its net.
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
    """A learning rule: give its subclass, or an object of one, as `rule=` to train, plan and LocalTrainer. Derive it,
    and define `aux_net`; the other methods have defaults.

    A local module's loss is weights[0] x the extra loss + weights[1] x the cross-entropy of the aux net's logits. The
    last module's is the cross-entropy of the backbone's own classifier.

    Attributes:
        name: for people; the class's in lower case unless it says another.
        depth: the paper's d, for rules that have one; else None.
        shares_readout: whether the aux nets' last layers follow the classifier's, see `LocalHead`.
        recompute: whether convolutions run again in the backward, see `LocalTrainer`.
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
        """Looks whether the rule fits a backbone, before its nets are made. Default: it does.

        Args:
            backbone: see `auglocal_ext.backbone.Backbone`.

        Raises:
            ValueError: it does not.
        """

    def check_images(self, images: torch.Tensor) -> None:
        """Looks whether the rule fits the images of a first batch. Default: it does.

        Args:
            images: (N, C, H, W), on the model's device.

        Raises:
            ValueError: it does not.
        """

    def borders(self, backbone: Backbone) -> Iterable[int]:
        """Where the backbone is cut.

        Args:
            backbone: see `auglocal_ext.backbone.Backbone`.

        Returns:
            The number of the last unit of each module but the last one, in rising order. By default one module ends
            behind every unit of a ResNet or VGG; another network is then cut into the fewest modules that need less
            memory than backpropagation.
        """
        return range(len(backbone.units) - 1)

    def aux_net(self, border: Border) -> nn.Module:
        """A new net behind a border.

        Args:
            border: see `Border`.

        Returns:
            nn.Module, from features, (N, ...) with the rest as border.shape says, to logits (N, border.num_classes).

        Raises:
            NotImplementedError: the subclass does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define aux_net(border), an nn.Module")

    def extra_loss(self, border: Border) -> ExtraLoss | None:
        """A new ExtraLoss behind a border, or None, which is the default.

        Args:
            border: see `Border`.
        """
        return None

    def weights(self, border: Border) -> tuple[float, float]:
        """What the losses behind a border count.

        Args:
            border: see `Border`.

        Returns:
            (of the extra loss, of the cross-entropy), by default 0 and 1.
        """
        return 0.0, 1.0

    def describe(self, border: Border) -> str:
        """The aux net in a few words, for the plan's table.

        Args:
            border: see `Border`.

        Returns:
            str, by default of its convolutions and linear layers and of how much they put out.
        """
        with torch.device("meta"):
            layers = self.aux_net(border).modules()
        widths = {nn.Conv2d: "out_channels", nn.Linear: "out_features"}
        return ", ".join(f"{type(m).__name__} {getattr(m, widths[type(m)])}" for m in layers if type(m) in widths)
