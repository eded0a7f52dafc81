"""AugLocal: aux nets that are uniform samples of the layers behind a module (arXiv:2402.17318)."""

from dataclasses import replace

import torch
from torch import nn

from ..backbone.units import Shapes
from ..common.checks import whole_number
from .auxiliary import Auxiliary, as_auxiliary, aux_depth, build_aux_net, copies_in, sample_units
from .rule import Rule

__all__ = ["AugLocal", "FORMS"]


FORMS = ("cifar", "imagenet")


class AugLocal(Rule):
    """Aux nets that are uniform samples of the layers behind the module (arXiv:2402.17318): behind unit l of L,
    numbered from 0, the net copies units round(l + i (L - 1 - l) / b), i = 1 to b, and ends in a linear classifier. b
    is d - 1, or less: toward the output with form "cifar", by the share of an `Auxiliary`, and where fewer units are
    left.

    Args:
        depth: the paper's d, the aux nets' layers with their linear classifier: d - 1 sampled units; at least 2.
        form: "cifar" (one module per unit, aux nets less deep toward the output, the last `depth` units and
            the classifier trained jointly), "imagenet" (one module per unit, an aux net of constant depth after
            every unit but the last), or None: what the authors used for such a network.
        auxiliary: "paper", "light", another member of the family `Auxiliary`, also as text, or a function
            (`Border`) -> nn.Module, features -> logits, which under a memory budget may go by the border's unit and
            shape alone.

    Raises:
        ValueError: depth, form or auxiliary is none of these. Whether depth fits a network is told when that is cut.
    """

    takes_any_layout = True

    def __init__(self, depth=4, form=None, auxiliary="paper"):
        if form is not None and form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)} or None, given {form!r}")
        expected = "depth must be a whole number of at least 2 (one block and the classifier)"
        self.depth, self.form, self.auxiliary = whole_number(depth, expected, 2), form, as_auxiliary(auxiliary)

    def _pyramid(self, backbone):
        return (self.form or backbone.form) == "cifar"

    @property
    def shares_readout(self):
        """Whether the aux nets' last layers follow the classifier's, as the `Auxiliary` says."""
        return isinstance(self.auxiliary, Auxiliary) and self.auxiliary.readout == "shared"

    def check(self, backbone):
        self._check_depth(backbone, len(backbone.units))
        if self.shares_readout:
            self._check_readout(backbone)

    @staticmethod
    def _check_readout(backbone):
        """The classifier must end as the aux nets do."""
        last = backbone.classifier[-1]
        if not (type(last) is nn.Linear and last.in_features == backbone.units[-1].out_channels):
            raise ValueError(
                f"readout=shared needs a classifier that is a pooling and one linear layer, as a ResNet's, given one "
                f"that ends in {type(last).__name__}: leave readout out"
            )

    def _check_depth(self, backbone, deepest):
        if deepest < 2:
            raise ValueError(
                f"rule='auglocal' needs a network of more units than {len(backbone.units)}, whose layers its auxiliary "
                f"nets sample: name more with units=, or train with rule='bp'"
            )
        if self.depth > deepest:
            raise ValueError(
                f"depth must be at most {deepest} for this network of {len(backbone.units)} units, given {self.depth}"
            )

    def borders(self, backbone):
        joint = self.depth if self._pyramid(backbone) else 1  # units of the last module
        self._check_depth(backbone, len(backbone.units) - (joint > 1))
        return range(len(backbone.units) - joint)

    def sample(self, backbone, unit):
        """Which units the net behind a unit copies, an `auxiliary.Sample`; unit: its number in the backbone."""
        pyramid = self._pyramid(backbone)
        blocks = aux_depth(unit, len(backbone.units), self.depth - 1, pyramid)
        return sample_units(backbone.units, unit, blocks, pyramid, self.auxiliary)

    def aux_net(self, border):
        if not isinstance(self.auxiliary, Auxiliary):
            return self._made(border)
        sample = self.sample(border.backbone, border.unit)
        return build_aux_net(border.backbone, border.unit, sample, self.auxiliary, self._shape(border))

    @staticmethod
    def _shape(border):
        """Of the features, as the unit puts them out."""
        return border.backbone.feature_shapes(border.image_shape)[border.unit]

    def net_key(self, border):
        """What tells which net `aux_net` makes of a border: those of equal keys have nets alike."""
        if not isinstance(self.auxiliary, Auxiliary):
            return border.unit
        sample, backbone = self.sample(border.backbone, border.unit), border.backbone
        before, kinds = backbone.units[border.unit], [backbone.kinds[unit] for unit in sample.units]
        return before.out_channels, before.plain, self._shape(border), replace(sample, units=()), *kinds

    def _made(self, border):
        net = self.auxiliary(border)
        if not isinstance(net, nn.Module):
            raise TypeError(f"auxiliary must make a torch.nn.Module of a border, it made {type(net).__name__}")
        name = border.backbone.units[border.unit].name
        dtype = next((parameter.dtype for parameter in net.parameters()), torch.float32)
        features = torch.empty(2, *border.shape, device="meta", dtype=dtype)
        logits = Shapes(f"the auxiliary net behind {name}", net)(features)
        if logits.shape != (2, border.num_classes):
            raise ValueError(
                f"auxiliary must make nets of (N, {border.num_classes}) logits, the one behind {name} puts out "
                f"{('N', *logits.shape[1:])}"
            )
        return net

    def describe(self, border):
        if not isinstance(self.auxiliary, Auxiliary):
            return super().describe(border)
        sample = self.sample(border.backbone, border.unit)
        copies = copies_in(border.backbone, border.unit, sample, self.auxiliary, self._shape(border))
        words = [f"pool /{sample.pool}"] * (sample.pool > 1) + ["separable"] * self.auxiliary.separable
        words += [*map(str, copies), *["+ BatchNorm1d"] * sample.batch_norm_head]
        return " ".join([*words, *["+ shared readout"] * self.shares_readout])
