"""AugLocal: aux nets that are uniform samples of the layers behind a module (arXiv:2402.17318)."""

from ..common.checks import whole_number
from .auxiliary import aux_depth, build_aux_net, sample_units
from .rule import Rule

__all__ = ["AugLocal", "FORMS"]


FORMS = ("cifar", "imagenet")


class AugLocal(Rule):
    """Aux nets that are uniform samples of the layers behind the module (arXiv:2402.17318).

    Args:
        depth: the paper's d, the aux nets' layers with their linear classifier: d - 1 sampled units.
        form: "cifar" (one module per unit, aux nets less deep toward the output, the last `depth` units and
            the classifier trained jointly), "imagenet" (one module per unit, an aux net of constant depth after
            every unit but the last), or None: what the authors used for such a network.
    """

    def __init__(self, depth=4, form=None):
        if form is not None and form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)} or None, given {form!r}")
        expected = "depth must be a whole number of at least 2 (one block and the classifier)"
        self.depth, self.form = whole_number(depth, expected, 2), form

    def _pyramid(self, backbone):
        return (self.form or backbone.form) == "cifar"

    def check(self, backbone):
        self._check_depth(backbone, len(backbone.units))

    def _check_depth(self, backbone, deepest):
        if self.depth > deepest:
            raise ValueError(
                f"depth must be at most {deepest} for this network of {len(backbone.units)} units, given {self.depth}"
            )

    def borders(self, backbone):
        joint = self.depth if self._pyramid(backbone) else 1  # units of the last module
        self._check_depth(backbone, len(backbone.units) - (joint > 1))
        return range(len(backbone.units) - joint)

    def sample(self, backbone, unit):
        """The `auxiliary.Sample` behind a unit."""
        pyramid = self._pyramid(backbone)
        blocks = aux_depth(unit, len(backbone.units), self.depth - 1, pyramid)
        return sample_units(backbone.units, unit, blocks, batch_norm_head=pyramid)

    def aux_net(self, border):
        return build_aux_net(border.backbone, border.unit, self.sample(border.backbone, border.unit))

    def describe(self, border):
        sample, units = self.sample(border.backbone, border.unit), border.backbone.units
        copies = [
            f"{units[unit].name} ({units[unit].width}, /{stride})"
            for unit, stride in zip(sample.units, sample.strides, strict=True)
        ]
        return " ".join([*copies, *["+ BatchNorm1d"] * sample.batch_norm_head])
