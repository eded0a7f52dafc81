"""The cheapest cut that fits a memory budget.

A step's peak is made of segments that do not depend on the rest of the cut: what a unit's forward and backward do to
memory depends on its own shape, on whether it is its module's first or last, and on whether its output and the one
before it are dropped or kept; a head's on the unit it is behind. So every segment is walked once (`cut_table`), and
the search (`search`) puts them together to the peak of any module, to the byte.
"""

from dataclasses import dataclass, field

import torch

from .. import report
from ..common.memory import format_bytes
from ..rules import Rule
from ..rules.auglocal import AugLocal
from ..rules.bp import BP
from ..rules.by_name import as_rule
from ..rules.cutting import cut
from . import search
from .comparison import Comparison, Cost
from .refusal import too_small
from .walker import cut_tables, with_heads

__all__ = ["Choice", "DEPTHS", "candidates", "check_device", "choose"]


DEPTHS = range(2, 7)  # the paper's; what depth="auto" looks at


@dataclass(frozen=True)
class Choice:
    """What a search under a budget found.

    point: the cheapest cut that fits: modules, bytes of the step, macs, borders.
    rule: whose aux nets it has.
    front: for each number of modules, its cuts that no other of them beats in both bytes and macs.
    next_cheaper: the cut of least bytes that needs less arithmetic, or None: there is none cheaper.
    next_smaller: the cut of least arithmetic that needs fewer bytes, or None.
    bp_macs: of backpropagation; known, as is comparison, what the step costs otherwise, once the choice is planned.
    """

    budget: int
    point: search.Point
    rule: Rule
    front: list[search.Point] = field(repr=False)
    next_cheaper: search.Point | None
    next_smaller: search.Point | None
    bp_macs: int = 0
    comparison: Comparison | None = None

    def __str__(self):
        depth = f", depth {self.rule.depth}" if self.rule.depth and self.point.modules > 1 else ""
        points = {
            f"budget {format_bytes(self.budget)}: {_modules(self.point)}{depth}": self.point,
            "next cheaper: " + _modules(self.next_cheaper): self.next_cheaper,
            "next smaller: " + _modules(self.next_smaller): self.next_smaller,
        }
        costs = {what: Cost(point.bytes, point.macs / self.bp_macs) for what, point in points.items() if point}
        return "\n".join(report.cost_lines(self.comparison.rows(costs), self.comparison.warning))


def _modules(point):
    return f"{point.modules} module{'s' * (point.modules > 1)}" if point else ""


def candidates(rule, depth, form, auxiliary, units):
    """The rules to search under a budget for a backbone of so many units: one, or with depth "auto" AugLocal's of every
    depth."""
    if depth == "auto" and rule in ("auglocal", AugLocal):
        return [AugLocal(d, form, auxiliary) for d in DEPTHS if d <= units]
    if depth == "auto" and isinstance(rule, AugLocal):
        raise ValueError(f"depth='auto' goes with rule='auglocal', given a rule that has its depth, {rule.depth}")
    rule = as_rule(rule, 2 if depth == "auto" else depth, form, auxiliary)
    if not (type(rule) is AugLocal or isinstance(rule, BP)):  # whose heads are the same wherever the borders are
        raise ValueError(
            f"memory_budget chooses the cut of rules 'auglocal', 'bp' and 'checkpoint': with {rule.name!r} give "
            f"modules, and see auglocal_ext.plan for what a step then needs"
        )
    return [rule]


def choose(planner, shape, budget, rules, modules=None):
    """The cheapest cut of least arithmetic whose step fits `budget` bytes.

    Args:
        planner: of the model.
        shape: of the batch, (N, C, H, W).
        budget: bytes of the whole step, parameters and optimizer included.
        rules: see `candidates`; with `rules.BP` there is one cut.
        modules: K, to choose among cuts into K modules only; None: any number.

    Returns:
        (list of Span, the head behind each module, Choice)

    Raises:
        ValueError: nothing fits; says the least that would, and the batch size that would fit.
    """
    wanted = 1 if isinstance(rules[0], BP) else modules
    best, tables = None, cut_tables(planner, shape, rules)
    for rule, table in zip(rules, tables, strict=True):
        front = search.front(table)
        point = search.cheapest(front, budget, wanted)
        if point and (best is None or (point.macs, point.bytes) < (best[0].macs, best[0].bytes)):
            best = point, rule, front
    if best is None:
        raise too_small(planner, shape, budget, rules, wanted, tables)
    point, rule, front = best
    front = [p for p in front if wanted in (None, p.modules)]
    cheaper, smaller = search.next_cheaper(front, point), search.next_smaller(front, point)
    choice = Choice(budget, point, rule, front, cheaper, smaller)
    spans, heads = cut(planner.backbone, rule, borders=point.borders), planner.heads_by_unit(with_heads(rule), shape)
    return spans, [heads[span.last] for span in spans], choice


def check_device(device, budget):
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        if budget > total:
            raise ValueError(
                f"memory_budget {format_bytes(budget)} is more than {device} has: give at most {format_bytes(total)}"
            )
