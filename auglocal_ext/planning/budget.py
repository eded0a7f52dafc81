"""The cheapest cut that fits a memory budget.

A step's peak is made of segments that do not depend on the rest of the cut: what a unit's forward and backward do to
memory depends on its own shape, on whether it is its module's first or last, on whether its output and the one before
it are dropped or kept, and on whether its convolutions run again; a head's on the unit it is behind. So every segment
is walked once (`Walker`), and the search (`search`) puts them together to the peak of any module, to the byte.
"""

from dataclasses import dataclass, field, replace

import torch

from .. import report
from ..common.memory import format_bytes
from ..common.messages import plural
from ..rules import Rule
from ..rules.auglocal import AugLocal
from ..rules.bp import BP, Checkpoint
from ..rules.by_name import as_rule
from ..rules.cutting import cut
from ..rules.mixed import mixed
from . import search
from .comparison import Comparison, Cost
from .menu import Menu
from .refusal import too_small

__all__ = ["Choice", "DEPTHS", "PREFER", "candidates", "check_device", "choose", "rules_of"]


DEPTHS = range(2, 7)  # the paper's; what depth="auto" looks at
NETS = ("paper", "light")  # what auxiliary="auto" looks at
PREFER = ("arithmetic", "memory", "time")


@dataclass(frozen=True)
class Choice:
    """What a search under a budget found; cuts are `planning.search.Point`.

    Attributes:
        budget: bytes.
        point: the cut that was chosen, as it is planned: what fits under its peak is kept, not run again, which can
            make it better than what was found.
        rule: whose aux nets it has.
        front: for each number of modules, its cuts that no other of them beats in both bytes and cost.
        next_cheaper: the cut of least bytes that costs less, or None: there is none cheaper.
        next_smaller: the cut of least cost that needs fewer bytes, or None.
        more: what cheaper nets and recomputation would reach within the budget, (arguments in words, Point); None: they
            would not cost less.
        prefer: what was to be least, see `auglocal_ext.plan`; costs are multiply-accumulates, with "time" nanoseconds.
        bp_macs: of backpropagation; known, as is comparison, once the choice is planned.
        comparison: what the step costs otherwise.
    """

    budget: int
    point: search.Point
    rule: Rule
    front: list[search.Point] = field(repr=False)
    next_cheaper: search.Point | None
    next_smaller: search.Point | None
    more: tuple[str, search.Point] | None = None
    prefer: str = "arithmetic"
    bp_macs: int = 0
    comparison: Comparison | None = None

    def planned(self, plan):
        """The choice, of which this is the Plan."""
        cost = self.point.cost if self.prefer == "time" else plan.macs
        return replace(self, point=replace(self.point, bytes=plan.peak_bytes, cost=cost), bp_macs=plan.bp_macs)

    def __str__(self):
        depth = f", depth {self.rule.depth}" if self.rule.depth and self.point.modules > 1 else ""
        points = {
            f"budget {format_bytes(self.budget)}: {_modules(self.point)}{depth}": self.point,
            "next cheaper: " + _modules(self.next_cheaper): self.next_cheaper,
            "next smaller: " + _modules(self.next_smaller): self.next_smaller,
        }
        if self.more:
            points[f"with {self.more[0]}: {_modules(self.more[1])}"] = self.more[1]
        costs = {what: self._cost(point) for what, point in points.items() if point}
        return "\n".join(report.cost_lines(self.comparison.rows(costs), self.comparison.warning))

    def _cost(self, point):
        if self.prefer == "time":
            return Cost(point.bytes, None, point.cost / 1e6)
        return Cost(point.bytes, point.cost / self.bp_macs)


def _modules(point):
    return plural(point.modules, "module") if point else ""


def rules_of(backbone, rule, depth, form, auxiliary, modules, *, budgeted, recompute=False, prefer="arithmetic"):
    """The rules that a plan looks at, one without a budget, `candidates` with one; for arguments see
    `auglocal_ext.plan`. ValueError where they do not go together, or with the backbone."""
    if prefer not in PREFER:
        raise ValueError(f"prefer must be one of {', '.join(PREFER)}, given {prefer!r}")
    if not budgeted:
        asked = {"prefer": prefer != "arithmetic", "depth": depth == "auto", "auxiliary": auxiliary == "auto"}
        for name, needs_one in (asked | {"recompute": recompute == "auto"}).items():
            if needs_one:
                value = prefer if name == "prefer" else "auto"
                raise ValueError(
                    f"{name}={value!r} chooses under a budget: give memory_budget too, for instance memory_budget='6GB'"
                )
        rules = [as_rule(rule, depth, form, auxiliary)]
    else:
        rules = candidates(rule, depth, form, auxiliary, len(backbone.units))
    # Under a budget the cut is not the rule's own: only whether there can be so many modules is to be known.
    cut(backbone, rules[0], (modules or 1) if budgeted else modules)
    return rules


def candidates(rule, depth, form, auxiliary, units):
    """The rules to search under a budget for a backbone of so many units: one, or with depth "auto" AugLocal's of every
    depth, with auxiliary "auto" of both nets; a border may then have any of them."""
    named = rule in ("auglocal", AugLocal)
    if not named and isinstance(rule, AugLocal) and "auto" in (depth, auxiliary):
        raise ValueError(
            f"depth='auto' and auxiliary='auto' go with rule='auglocal', given a rule that has its own, of depth "
            f"{rule.depth}"
        )
    if named:
        depths = [d for d in DEPTHS if d <= max(units, 2)] if depth == "auto" else [depth]
        nets = NETS if auxiliary == "auto" else [auxiliary]
        return [AugLocal(d, form, each) for d in depths for each in nets]
    rule = as_rule(rule, 2 if depth == "auto" else depth, form, "paper" if auxiliary == "auto" else auxiliary)
    if not (type(rule) is AugLocal or isinstance(rule, BP)):  # whose heads are the same wherever the borders are
        raise ValueError(
            f"memory_budget chooses the cut of rules 'auglocal', 'bp' and 'checkpoint': with {rule.name!r} give "
            f"modules, and see auglocal_ext.plan for what a step then needs"
        )
    return [rule]


def choose(planner, shape, budget, rules, modules=None, recompute=False, prefer="arithmetic"):
    """The best cut whose step fits `budget` bytes.

    Args:
        planner: of the model.
        shape: of the batch, (N, C, H, W).
        budget: bytes of the whole step, parameters and optimizer included.
        rules: see `candidates`; with `rules.BP` there is one cut.
        modules: K, to choose among cuts into K modules only; None: any number.
        recompute: False, True, names of units, or "auto": which units' convolutions run again is chosen too.
        prefer: what is to be least, one of PREFER; with "time" the planner has a clock.

    Returns:
        (list of Span, the head behind each module, recompute as it is chosen, Choice)

    Raises:
        ValueError: nothing fits; says the least that would, and the batch size that would fit.
    """
    menu = Menu(planner, shape, rules, modules, recompute)
    front = menu.points(menu.asked)
    point = search.cheapest(front, budget)
    if point is None:
        raise too_small(menu, budget)
    if prefer == "memory":
        point = search.smallest(front)
    cheaper, smaller = search.next_cheaper(front, point), search.next_smaller(front, point)
    rule, again = _rule_of(menu, point), menu.recomputed(point)
    more = _more(menu, budget, point) if prefer != "memory" else None
    choice = Choice(budget, point, rule, front, cheaper, smaller, more, prefer)
    return cut(planner.backbone, rule, borders=point.borders), menu.heads(point), again, choice


def _rule_of(menu, point):
    if point.modules == 1:
        return Checkpoint() if menu.recomputed(point) is True else BP()
    return mixed({unit: menu.asked.rules[head] for unit, head in zip(point.borders, point.heads, strict=True)})


def _more(menu, budget, point):
    """See `Choice.more`."""
    kind = None if point.modules == 1 and not point.again else menu.cheaper
    found = kind and search.cheapest(menu.points(kind), budget)
    return (kind.words, found) if found and found.cost < point.cost else None


def check_device(device, budget):
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        if budget > total:
            raise ValueError(
                f"memory_budget {format_bytes(budget)} is more than {device} has: give at most {format_bytes(total)}"
            )
