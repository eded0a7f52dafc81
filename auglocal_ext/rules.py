"""Learning rules: how a backbone is cut into local modules, and what each module's head is."""

import operator
from dataclasses import dataclass

from .auxiliary import Sample, aux_depth, build_aux_net, sample_units

__all__ = ["RULES", "Cut", "build_head", "cut"]

RULES = ("auglocal", "bp")
FORMS = ("cifar", "imagenet")


@dataclass(frozen=True)
class Cut:
    """One local module: units first..last (inclusive) and its aux net's sample; None: the classifier."""

    first: int
    last: int
    sample: Sample | None


def cut(backbone, depth=4, *, rule="auglocal", form=None, modules=None, borders=None):
    """Cuts a backbone into local modules.

    Args:
        backbone: from `as_backbone`.
        depth: the paper's d, the aux nets' layers with their linear classifier: d - 1 sampled units.
        rule: "auglocal", or "bp": one module, the classifier's loss, plain backpropagation.
        form: "cifar" (one module per unit, aux nets less deep toward the output, the last `depth` units and
            the classifier trained jointly), "imagenet" (one module per unit, an aux net of constant depth after
            every unit but the last), or None: what the authors used for such a network.
        modules: K, to cut into K modules of consecutive units instead, borders placed so that the largest
            module (by what its convolutions keep for the backward) is as small as possible.
        borders: the last unit of each module but the last one, to cut there instead.

    Returns:
        list of Cut, from the input to the output; the last one ends in the classifier.

    Raises:
        ValueError: an argument is out of the range that this backbone allows.
    """
    units = backbone.units
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, given {rule!r}")
    if form is not None and form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)} or None, given {form!r}")
    if rule == "bp":
        if modules not in (None, 1) or borders:
            raise ValueError(f"rule='bp' has one module: leave modules out, or set it to 1 (given {modules})")
        return [Cut(0, len(units) - 1, None)]

    form = form or backbone.form
    depth = _whole(depth)
    if not isinstance(depth, int) or depth < 2:
        raise ValueError(f"depth must be a whole number of at least 2 (one block and the classifier), given {depth!r}")
    blocks = depth - 1
    one_per_unit = modules is None and borders is None
    deepest = len(units) - 1 if form == "cifar" and one_per_unit else len(units)
    if depth > deepest:
        raise ValueError(f"depth must be at most {deepest} for this network of {len(units)} units, given {depth}")
    if one_per_unit:
        borders = range((len(units) - blocks if form == "cifar" else len(units)) - 1)
    elif borders is None:
        modules = _whole(modules)
        if not isinstance(modules, int) or not 1 <= modules <= len(units):
            raise ValueError(
                f"modules must be a whole number from 1 to {len(units)}, the units of this network, given {modules!r}"
            )
        borders = _balanced_borders([unit.kept for unit in units], modules)

    cuts, first = [], 0
    for last in borders:
        m = aux_depth(last, len(units), blocks, pyramid=form == "cifar")
        cuts.append(Cut(first, last, sample_units(units, last, m, batch_norm_head=form == "cifar")))
        first = last + 1
    return [*cuts, Cut(first, len(units) - 1, None)]


def _whole(value):
    """An int where value is one of any kind, numpy's for instance; else value itself."""
    try:
        return operator.index(value)
    except TypeError:
        return value


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


def build_head(backbone, part):
    """The head of a local module: its new aux net, or for the last one the backbone's own classifier."""
    if part.sample is None:
        return backbone.classifier
    return build_aux_net(backbone, part.last, part.sample)
