"""What a search chooses from: the cuts that were asked for, and beside them those of other nets and recomputation."""

from dataclasses import dataclass, replace

from ..rules.auglocal import AugLocal
from ..rules.auxiliary import AUXILIARIES
from ..rules.bp import BP
from ..rules.cutting import first_trained
from . import search
from .cut_table import without_costs
from .walker import Walker

__all__ = ["Kind", "Menu"]

_EITHER = (False, True)
_UNITS = ("borders", "again")  # of a Point


@dataclass(frozen=True, eq=False)
class Kind:
    """Cuts that a search looks at.

    words: the arguments that ask for them.
    rules: AugLocals, whose heads a border may have; none with backpropagation.
    again: see `Walker.table`.
    modules: how many, or None: any number.
    """

    words: str
    rules: tuple[AugLocal, ...]
    again: tuple[bool, ...] | list[tuple[bool, ...]]
    modules: int | None

    def points(self, table):
        """The Points of these in a `CutTable` of them."""
        return [point for point in search.front(table) if self.modules in (None, point.modules)]

    def least(self, table):
        """The fewest bytes of these in a `CutTable` of them: found sooner where all cost the same."""
        return search.smallest(self.points(without_costs(table))).bytes


class Menu:
    """Args: see `budget.choose`.

    Attributes:
        asked: the Kind that was asked for.
        recompute: as asked for.
    """

    def __init__(self, planner, shape, rules, modules, recompute):
        self.planner, self.shape = planner, shape
        self.bp = isinstance(rules[0], BP)
        self.recompute = rules[0].recompute or recompute
        rules = () if self.bp else tuple(rules)
        self.asked = Kind("", rules, self._again(), 1 if self.bp else modules)
        self._walkers = {}

    def _again(self):
        if self.recompute == "auto":
            return _EITHER
        if isinstance(self.recompute, bool):
            return (self.recompute,)
        backbone = self.planner.backbone
        return [(unit.name in self.recompute,) for unit in backbone.units[first_trained(backbone) :]]

    def table(self, kind, shape=None):
        """The `CutTable` of a Kind, for batches of a shape."""
        shape = shape or self.shape
        # recompute=True runs the convolutions of heads again too.
        recompute = self.recompute is True and kind is self.asked
        key = shape, recompute
        if key not in self._walkers:
            self._walkers[key] = Walker(self.planner.with_recompute(recompute), shape, self.asked.rules)
        return self._walkers[key].table(kind.rules, kind.again)

    def points(self, kind):
        """The Points of a Kind; their units are the backbone's."""
        first = first_trained(self.planner.backbone)
        points = kind.points(self.table(kind))
        if not first:
            return points
        return [replace(point, **{name: _behind(first, getattr(point, name)) for name in _UNITS}) for point in points]

    # ---- what a Point means ----------------------------------------------------------------------------------------

    def recomputed(self, point):
        """A point's `recompute`."""
        if self.recompute != "auto":
            return self.recompute
        units = self.planner.backbone.units
        everything = point.modules == 1 and len(point.again) == len(units) - first_trained(self.planner.backbone)
        return everything or tuple(units[unit].name for unit in point.again) or False

    def heads(self, point):
        """The LocalHead behind each module; the last one's, of which the classifier is, None."""
        made = [self.planner.heads_by_unit(self.asked.rules[head], self.shape) for head in point.heads]
        return [*(heads[unit] for heads, unit in zip(made, point.borders, strict=True)), None]

    # ---- what was not asked for ------------------------------------------------------------------------------------

    @property
    def cheaper(self):
        """The Kind that also allows light nets and recomputation; None where all that was asked for."""
        light = self._light()
        words = [*["auxiliary='light'"] * len(light), *["recompute='auto'"] * (self.recompute != "auto")]
        return Kind(", ".join(words), self.asked.rules + light, _EITHER, self.asked.modules) if words else None

    @property
    def others(self):
        """The Kinds that were not asked for, one by one."""
        asked, kinds = self.asked, []
        if self.recompute != "auto":
            kinds.append(Kind("recompute='auto'", asked.rules, _EITHER, asked.modules))
        kinds += [Kind("auxiliary='light'", (rule,), asked.again, asked.modules) for rule in self._light()]
        if not self.bp and asked.rules[0].depth > 2:
            first = asked.rules[0]
            kinds.append(Kind("depth=2", (AugLocal(2, first.form, first.auxiliary),), asked.again, asked.modules))
        return [*kinds, Kind("rule='checkpoint'", (), (True,), 1)]

    def _light(self):
        """A light AugLocal, in a tuple; none where that was asked for, or backpropagation alone."""
        rules = self.asked.rules
        if self.bp or any(rule.auxiliary == AUXILIARIES["light"] for rule in rules):
            return ()
        return (AugLocal(rules[0].depth, rules[0].form, "light"),)


def _behind(first, units):
    """Units that a table counts from the first one that trains on, counted from the backbone's first."""
    return tuple(first + unit for unit in units)
