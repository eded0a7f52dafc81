"""What the step of a planned cut costs otherwise: backpropagation on this engine and in eager PyTorch."""

from dataclasses import dataclass, replace

from .. import report
from ..common.memory import format_bytes
from ..common.messages import plural
from ..engine.emit import Phase
from ..rules.cutting import first_trained
from .eager import eager_bytes
from .fewest import FEWER, cut_into

__all__ = ["Comparison", "Cost", "compared"]


@dataclass(frozen=True)
class Cost:
    """What one training step costs.

    Attributes:
        bytes: at its peak, everything in it.
        macs: multiply-accumulates / backpropagation's; None: not known.
        milliseconds: predicted; None where no times were asked for.
    """

    bytes: int
    macs: float | None
    milliseconds: float | None = None


@dataclass(frozen=True)
class Comparison:
    """One training step at one batch shape, done in several ways, each a `Cost`; `print` shows a line for each.

    Attributes:
        modules: how many the cut has.
        cut: as planned.
        bp, checkpoint: backpropagation on this engine, rule "bp", and with every unit checkpointed, rule "checkpoint".
        eager, eager_checkpoint: backpropagation in eager PyTorch, and with every unit behind the stem checkpointed.
        warning: a sentence where the cut needs more memory than `bp`, which names what needs less; else None.
    """

    modules: int
    cut: Cost
    bp: Cost
    checkpoint: Cost
    eager: Cost
    eager_checkpoint: Cost
    warning: str | None

    def __str__(self):
        count = plural(self.modules, "module")
        return "\n".join(report.cost_lines(self.rows({f"this cut, {count}": self.cut}), self.warning))

    def rows(self, costs):
        """[(what, Cost)] of these by their names, then of the other ways; what costs the same as another way is that
        one, and is told once."""
        others = {
            "BP on this engine, rule='bp'": self.bp,
            "every unit checkpointed, rule='checkpoint'": self.checkpoint,
            "eager BP": self.eager,
            "eager BP, every unit checkpointed": self.eager_checkpoint,
        }
        rows = []
        for what, cost in costs.items():
            same = next((name for name, other in others.items() if other == cost), None)
            rows.append((f"{what}: {same}" if same else what, cost))
            others.pop(same, None)
        return rows + list(others.items())


def compared(planner, planned, like=None):
    """A plan with its `comparison`.

    Args:
        planner: the `Planner` that made it.
        planned: its Plan.
        like: see `Planner.batch`.
    """
    shape = planned.input_shape

    def at_once(recompute):
        if len(planned.modules) == 1 and planned.origin.recompute == recompute:
            return planned
        return planner.at_once(shape, recompute, like)

    bp, checkpoint, eager = at_once(False), at_once(True), eager_bytes(planner, shape, like)
    behind = {unit.name for unit in planner.backbone.units[max(1, first_trained(planner.backbone)) :]}
    units = [m for m in bp.modules[0].timeline.moments if m.phase is Phase.FORWARD]
    again = sum(moment.macs for moment in units if moment.part in behind)
    warning = _warning(planner, planned, bp, like) if planned.peak_bytes > bp.peak_bytes else None
    comparison = Comparison(
        len(planned.modules),
        _cost(planned),
        _cost(bp),
        _cost(checkpoint),
        Cost(eager["bp"], 1.0),
        Cost(eager["gc"], (bp.macs + again) / bp.macs),
        warning,
    )
    choice = planned.choice and replace(planned.choice, comparison=comparison)
    return replace(planned, comparison=comparison, choice=choice)


def _cost(plan):
    return Cost(plan.peak_bytes, plan.macs / plan.bp_macs, plan.milliseconds)


def _warning(planner, planned, bp, like):
    """The sentence about a cut that needs more than backpropagation."""
    ours, theirs = format_bytes(planned.peak_bytes), format_bytes(bp.peak_bytes)
    if ours == theirs:
        ours, theirs = f"{planned.peak_bytes:,} bytes", f"{bp.peak_bytes:,} bytes"
    best = bp
    for count in FEWER:
        if count < len(planned.modules):
            other = cut_into(count, planner, planned.input_shape, planned.origin.rule, like)
            best = min(best, other or best, key=lambda plan: plan.peak_bytes)
    remedy = "train with rule='bp'"
    if best is not bp:
        remedy = f"cut with modules={len(best.modules)}, which needs {format_bytes(best.peak_bytes)}"
    return f"a step of this cut needs {ours}, more than the {theirs} of backpropagation on this engine: {remedy}"
