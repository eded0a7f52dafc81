"""How many local modules a network has where nobody said: the fewest that need less memory than backpropagation."""

from ..rules.cutting import cut

__all__ = ["FEWER", "cut_into", "fewest"]


FEWER = (2, 3, 4, 8)  # numbers of modules that are tried


def fewest(planner, shape, rule, like=None):
    """The Plan of the fewest local modules, of FEWER, whose step needs less memory than backpropagation on this engine;
    where none does, of the first.

    planner, shape, rule, like: see `Planner.plan`.
    """
    bp, first = planner.at_once(shape, like=like), None
    for count in FEWER[: max(1, sum(count <= len(planner.backbone.units) for count in FEWER))]:
        planned = cut_into(min(count, len(planner.backbone.units)), planner, shape, rule, like)
        first = first or planned
        if planned and planned.peak_bytes < bp.peak_bytes:
            return planned
    return first or planner.plan(cut(planner.backbone, rule), shape, rule, like=like)  # which says why it cannot be


def cut_into(count, planner, shape, rule, like=None):
    """The plan with modules=count, or None: the model cannot be cut there."""
    try:
        return planner.plan(cut(planner.backbone, rule, count), shape, rule, like=like)
    except ValueError:  # two modules would share a weight
        return None
