"""How a backbone is cut into local modules, with a rule's nets behind them."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from ..backbone.layouts import MAPS, MAPS_LAST, TOKENS, to_layout
from ..common.checks import whole_number
from .auglocal import AugLocal
from .bp import BP
from .rule import Border, LocalHead, Rule

__all__ = [
    "Span",
    "as_recompute",
    "assert_apart",
    "borders_of",
    "cut",
    "first_trained",
    "has_own_cut",
    "head_behind",
    "is_frozen",
    "local_heads",
    "trains",
]


FEW = 2  # local modules of a network that the authors of the rules did not cut


@dataclass(frozen=True)
class Span:
    """Consecutive units first..last, inclusive: those of one local module."""

    first: int
    last: int

    def of(self, units):
        """These of all the units."""
        return units[self.first : self.last + 1]


def first_trained(backbone):
    """The first unit with a parameter that is not frozen, the last unit where none has one; 0: no unit is frozen."""
    units, last = backbone.units, len(backbone.units) - 1
    first = next((index for index in range(last) if not is_frozen(units[index : index + 1])), last)
    return first if is_frozen(units[:first]) else 0


def is_frozen(units):
    """Whether units have parameters, and none of them trains."""
    parameters = [parameter for unit in units for parameter in unit.module.parameters()]
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def trains(backbone, span):
    """Whether the local module of a span has a loss: one whose units are all frozen runs forward only, its net unused.
    The last one always has, which is the classifier's."""
    return span.last == len(backbone.units) - 1 or not is_frozen(span.of(backbone.units))


def cut(backbone, rule, modules=None, borders=None):
    """Cuts a backbone into local modules. Unless borders say so, none ends before the first unit that trains: the units
    in front, whose parameters are all frozen now, belong to the first module, which trains.

    Args:
        backbone: from `as_backbone`.
        rule: a Rule; it says where the borders are, unless modules or borders do.
        modules: K, to cut into K modules of consecutive units instead, borders placed so that the largest
            module (by what its convolutions keep for the backward, of units from the first that trains on) is as small
            as possible. Default: the rule's own cut of a ResNet or VGG, two modules of another network; where a batch's
            shape is known, `train` and `plan` take the fewest of another network that need less memory than
            backpropagation.
        borders: the last unit of each module but the last one, to cut there instead.

    Returns:
        list of Span, from the input to the output; behind the last one stands the classifier.

    Raises:
        ValueError: an argument is out of the range that this backbone allows.
    """
    count, first = len(backbone.units), first_trained(backbone)
    if isinstance(rule, BP):
        expected = f"rule={rule.name!r} has one module: leave modules out, or set it to 1"
        if borders:
            raise ValueError(f"{expected}, given borders {tuple(borders)}")
        if modules is not None:
            whole_number(modules, expected, 1, 1)
        borders = ()
    elif modules is None and borders is None and has_own_cut(backbone, rule):
        borders = [border for border in rule.borders(backbone) if border not in range(first)]
    elif borders is None:
        most, of = count - first, f" from {backbone.units[first].name} on, all before being frozen" if first else ""
        expected = f"modules must be a whole number from 1 to {most}, the units of this network{of}"
        modules = min(FEW, most) if modules is None else whole_number(modules, expected, 1, most)
        borders = [first + border for border in _balanced_borders([u.kept for u in backbone.units[first:]], modules)]
    rule.check(backbone)
    expected = f"borders must be units from 0 to {count - 2} in rising order, the last ones of each module but the last"
    ends = [*(whole_number(border, expected) for border in borders), count - 1]
    if ends != sorted(set(ends)) or ends[0] < 0:
        raise ValueError(f"{expected}, given {tuple(borders)}")
    return [Span(before + 1, last) for before, last in zip([-1, *ends], ends, strict=False)]


def has_own_cut(backbone, rule):
    """Whether a rule says where a backbone is cut: its authors, of their networks, or a rule of somebody's own."""
    own = isinstance(rule, BP) or type(rule).borders not in (Rule.borders, AugLocal.borders)
    return own or backbone.form is not None


def as_recompute(given, backbone):
    """Of which units' convolutions run again in the backward: False, True, of all and of the aux nets', or a tuple of
    units' names.

    Raises:
        ValueError: it is neither, or names what is no unit.
    """
    if isinstance(given, bool):
        return given
    names = [unit.name for unit in backbone.units]
    expected = "recompute must be True, False, 'auto' under a memory budget, or names of units"
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ValueError(f"{expected}, given {given!r}")
    given = list(given)
    if unknown := [name for name in given if name not in names]:
        raise ValueError(f"{expected}, {names[0]} to {names[-1]}, given {unknown[0]!r}")
    return tuple(name for name in names if name in given) or False


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


def local_heads(backbone, rule, spans, image_shape):
    """What stands behind each local module: the rule's new nets, and last the backbone's own classifier.

    Args:
        image_shape: (C, H, W).

    Returns:
        list of LocalHead
    """
    heads = [head_behind(border, rule) for border in borders_of(backbone, spans, image_shape)]
    return [*heads, LocalHead(backbone.classifier)]


def head_behind(border, rule):
    """A rule's new LocalHead behind a border."""
    net, extra = rule.aux_net(border), rule.extra_loss(border)
    if border.layout != MAPS and not rule.takes_any_layout:
        name = border.backbone.units[border.unit].name
        if border.layout == TOKENS or extra is not None:
            raise ValueError(
                f"rule {rule.name!r} needs feature maps (N, C, H, W), and {name} puts out {border.layout}: train with "
                f"rule='auglocal' or 'bp'"
            )
        net = nn.Sequential(*to_layout(border.layout, MAPS), net)
    return LocalHead(net, extra, rule.weights(border), rule.shares_readout)


def borders_of(backbone, spans, image_shape):
    """The Border behind each local module but the last, for images of image_shape, (C, H, W)."""
    if len(spans) == 1:
        return []
    shapes = backbone.feature_shapes(image_shape)
    borders = []
    for index, span in enumerate(spans[:-1]):
        shape = shapes[span.last]
        if backbone.units[span.last].layout == MAPS_LAST:
            shape = (shape[-1], *shape[:-1])
        borders.append(Border(backbone, span.last, index, len(spans) - 1, shape, tuple(image_shape)))
    return borders


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
