"""The learning rules by name, and how a backbone is cut into local modules with a rule's nets behind them."""

from dataclasses import dataclass

from ._checks import whole_number
from .auxiliary import aux_depth, build_aux_net, sample_units
from .baselines import DGL, InfoPro, PredSim
from .rule import Border, ExtraLoss, LocalHead, Rule

__all__ = [
    "DGL",
    "FORMS",
    "RULES",
    "AugLocal",
    "BP",
    "Border",
    "Checkpoint",
    "Cut",
    "ExtraLoss",
    "InfoPro",
    "LocalHead",
    "PredSim",
    "Rule",
    "as_rule",
    "assert_apart",
    "borders_of",
    "cut",
    "for_images",
    "local_heads",
]

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


class BP(Rule):
    """Plain backpropagation: one module, the classifier's loss."""

    def borders(self, backbone):
        return ()


class Checkpoint(BP):
    """Backpropagation with every unit checkpointed: its convolutions run again in the backward, BatchNorm's statistics
    are updated once."""

    recompute = True


RULES = {rule.name: rule for rule in (AugLocal, DGL, PredSim, InfoPro, BP, Checkpoint)}


def as_rule(rule, depth=4, form=None):
    """The Rule that is meant: one of RULES by name, a subclass of Rule, or an object of one, which is given back as it
    is. depth and form are AugLocal's and its subclasses'."""
    if isinstance(rule, Rule):
        return rule
    kind = RULES.get(rule) if isinstance(rule, str) else rule
    if not (isinstance(kind, type) and issubclass(kind, Rule)):
        raise ValueError(f"rule must be one of {', '.join(RULES)}, or an auglocal_ext.Rule of your own, given {rule!r}")
    if issubclass(kind, AugLocal):
        return kind(depth, form)
    if form is not None:
        raise ValueError(f"form is a choice of rule 'auglocal': leave it out with {kind.name!r} (given {form!r})")
    return kind()


def for_images(rule, mean, std):
    """The rule for images normalised by mean and std: InfoPro for them where that is named, which draws images as they
    were before; else the rule as it was given."""
    return InfoPro(mean, std) if rule == "infopro" else rule


@dataclass(frozen=True)
class Cut:
    """One local module: units first..last, inclusive."""

    first: int
    last: int


def cut(backbone, rule, modules=None, borders=None):
    """Cuts a backbone into local modules.

    Args:
        backbone: from `as_backbone`.
        rule: a Rule; it says where the borders are, unless modules or borders do.
        modules: K, to cut into K modules of consecutive units instead, borders placed so that the largest
            module (by what its convolutions keep for the backward) is as small as possible.
        borders: the last unit of each module but the last one, to cut there instead.

    Returns:
        list of Cut, from the input to the output; behind the last one stands the classifier.

    Raises:
        ValueError: an argument is out of the range that this backbone allows.
    """
    count = len(backbone.units)
    if isinstance(rule, BP):
        expected = f"rule={rule.name!r} has one module: leave modules out, or set it to 1"
        if borders:
            raise ValueError(f"{expected}, given borders {tuple(borders)}")
        if modules is not None:
            whole_number(modules, expected, 1, 1)
        borders = ()
    elif modules is None and borders is None:
        borders = rule.borders(backbone)
    elif borders is None:
        expected = f"modules must be a whole number from 1 to {count}, the units of this network"
        modules = whole_number(modules, expected, 1, count)
        borders = _balanced_borders([unit.kept for unit in backbone.units], modules)
    rule.check(backbone)
    expected = f"borders must be units from 0 to {count - 2} in rising order, the last ones of each module but the last"
    ends = [*(whole_number(border, expected) for border in borders), count - 1]
    if ends != sorted(set(ends)) or ends[0] < 0:
        raise ValueError(f"{expected}, given {tuple(borders)}")
    return [Cut(before + 1, last) for before, last in zip([-1, *ends], ends, strict=False)]


def assert_apart(local_modules, names):
    """Raises ValueError where two local modules have a parameter in common: each would step it.

    names: parameter -> how to call it.
    """
    owner = {}
    for index, module in enumerate(local_modules):
        for parameter in module.parameters():
            if owner.setdefault(parameter, index) != index:
                name = names.get(parameter, "of an auxiliary net")
                raise ValueError(
                    f"parameter {name} is in local modules {owner[parameter]} and {index}, of which each steps its own "
                    f"parameters: cut the model so that one has it all (modules=, borders=), train with rule='bp', or "
                    f"give each layer a weight of its own"
                )


def local_heads(backbone, rule, cuts, image_shape):
    """What stands behind each local module: the rule's new nets, and last the backbone's own classifier.

    Args:
        image_shape: (C, H, W).

    Returns:
        list of LocalHead
    """
    heads = [
        LocalHead(rule.aux_net(border), rule.extra_loss(border), rule.weights(border))
        for border in borders_of(backbone, cuts, image_shape)
    ]
    return [*heads, LocalHead(backbone.classifier)]


def borders_of(backbone, cuts, image_shape):
    """The Border behind each local module but the last, for images of image_shape, (C, H, W)."""
    if len(cuts) == 1:
        return []
    shapes = backbone.feature_shapes(image_shape)
    return [
        Border(backbone, part.last, index, len(cuts) - 1, shapes[part.last], tuple(image_shape))
        for index, part in enumerate(cuts[:-1])
    ]


def _balanced_borders(sizes, parts):
    """The last index of each part but the final one, of the cut into `parts` consecutive parts whose largest
    sum is least; among equals, the one whose earlier parts are fuller."""
    best = {(0, 0): (0.0, ())}  # (items used, parts used) -> (largest sum, borders)
    for used_parts in range(1, parts + 1):
        for end in range(used_parts, len(sizes) - (parts - used_parts) + 1):
            choices = []
            for start in range(used_parts - 1, end):
                if (start, used_parts - 1) in best:
                    largest, borders = best[start, used_parts - 1]
                    choices.append((max(largest, sum(sizes[start:end])), (*borders, end - 1)))
            best[end, used_parts] = min(choices, key=lambda choice: (choice[0], [-b for b in choice[1]]))
    return best[len(sizes), parts][1][:-1]
