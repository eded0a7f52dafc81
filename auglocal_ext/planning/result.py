"""What a plan says: modules, units, aux nets, bytes, arithmetic."""

from dataclasses import dataclass, field

from .. import report
from ..common.memory import format_bytes
from ..engine.timeline import Timeline
from ..rules.auxiliary import nets_of
from .budget import Choice
from .comparison import Comparison
from .origin import Origin

__all__ = ["ModulePlan", "Plan"]


MOST_NAMES = 8  # of what runs by autograd, that are printed


@dataclass(frozen=True)
class ModulePlan:
    """One local module. Bytes are those of one training step, from the second step on."""

    index: int
    units: tuple[str, ...]  # names of its backbone units
    recomputed: tuple[str, ...]  # those of them whose convolutions run again in the backward
    output_shape: tuple[int, ...]  # of its last unit, (N, C, H, W)
    aux_net: str  # in words; empty: the classifier is its head
    parameters: int  # of its units, and of the classifier in the last module
    frozen_parameters: int  # those of them that do not train
    trains: bool  # else it runs forward only, because its units are frozen: its aux net, if any, is there but unused
    aux_parameters: int
    state_bytes: int  # parameters and buffers, its own and its aux net's
    gradient_bytes: int  # of the parameters
    optimizer_bytes: int  # the optimizer's state
    optimizer_scratch: int  # what the optimizer and clipping need for a moment in the module's step
    kept_bytes: int  # what the forward pass leaves for the backward, the input included
    activation_bytes: int  # highest, without the parameters' gradients
    peak_bytes: int  # highest of the whole step while this module runs: state, batch, losses, activations, gradients
    macs: int  # multiply-accumulates of forward and backward, convolutions and linear layers
    rebuild_share: float  # of its memory traffic: what goes into rebuilding what was dropped
    islands: tuple[str, ...]  # what runs by autograd, because no instruction describes it
    timeline: Timeline = field(repr=False)
    kept_gaps: frozenset = field(repr=False)  # see `engine.program.build`
    nanoseconds: int | None = None  # predicted, the optimizer's step included; None: nobody asked for times

    def by_autograd(self):
        """What runs by autograd, as a sentence."""
        kept = self.timeline.kept_by_autograd
        what = f"{kept / self.kept_bytes:.0%} of what it keeps" if kept else "which keeps nothing for it"
        return f"module {self.index} runs by autograd, {what}: {_some(self.islands)}"


@dataclass(frozen=True)
class Plan:
    """The cut of one network, and what its step holds; `print(plan)` shows it as a table."""

    model: str
    rule: str
    depth: int | None  # of the aux nets, where the rule has one
    precision: str
    input_shape: tuple[int, ...]
    modules: tuple[ModulePlan, ...]
    batch_bytes: int  # images and labels
    bp_macs: int  # of backpropagation through the same network
    origin: Origin = field(compare=False, repr=False)  # what it was made of
    comparison: Comparison | None = field(default=None, compare=False, repr=False)  # None where nobody asked
    choice: Choice | None = field(default=None, compare=False, repr=False)  # with a memory budget: what was found
    stepping_bytes: int = 0  # that stay between steps: gradients that are accumulated, averaged weights

    @property
    def parameters(self):
        """Parameters of the model itself."""
        return sum(module.parameters for module in self.modules)

    @property
    def frozen_parameters(self):
        """Those of the model's that do not train."""
        return sum(module.frozen_parameters for module in self.modules)

    @property
    def aux_parameters(self):
        """Parameters of the aux nets, which exist during training only."""
        return sum(module.aux_parameters for module in self.modules)

    @property
    def state_bytes(self):
        """What lives between steps: parameters, buffers and optimizer state, of the model and the aux nets; with
        `accumulate` their gradients, with `ema` the averaged model."""
        return sum(module.state_bytes + module.optimizer_bytes for module in self.modules) + self.stepping_bytes

    @property
    def activation_bytes(self):
        """The highest of what a step makes besides parameters' gradients."""
        return max(module.activation_bytes for module in self.modules)

    @property
    def peak_bytes(self):
        """Predicted peak of a step, everything in it: state, batch, activations, gradients, optimizer's scratch."""
        return max(module.peak_bytes for module in self.modules)

    @property
    def macs(self):
        return sum(module.macs for module in self.modules)

    @property
    def milliseconds(self):
        """Predicted time of a step, the optimizers' included; None: nobody asked for times."""
        times = [module.nanoseconds for module in self.modules]
        return None if None in times else sum(times) / 1e6

    @property
    def units(self):
        """The names of the backbone's units."""
        return tuple(name for module in self.modules for name in module.units)

    @property
    def borders(self):
        """The last unit of each module but the last: what `LocalTrainer` takes to cut the same way."""
        ends, last = [], -1
        for module in self.modules[:-1]:
            last += len(module.units)
            ends.append(last)
        return tuple(ends)

    def save_picture(self, path):
        """Draws live bytes over the time of one step, stacked by kind, and writes them as an image."""
        report.memory_picture(self, path)

    def save_front(self, path):
        """Draws what every number of modules costs, memory against arithmetic, and writes it as an image."""
        if self.choice is None:
            raise ValueError("save_front draws the search under a memory budget: plan with memory_budget='6GB'")
        report.front_picture(self, path)

    def __str__(self):
        autograd = [module.by_autograd() for module in self.modules if module.islands]
        table = report.plan_table(self)
        told = [*self._frozen(), *autograd, *self._again(), *self._costs()]
        return "\n".join([self.title, *table, "", self._peak_line(), *told])

    def brief(self):
        """The table without its widest columns, within 100, and what the step costs otherwise."""
        return "\n".join([self.title, *report.brief_table(self), "", *self._frozen(), *self._again(), *self._costs()])

    def _frozen(self):
        """What does not train."""
        if not self.frozen_parameters:
            return []
        idle = [str(module.index) for module in self.modules if not module.trains]
        runs = f"s {', '.join(idle)} run" if len(idle) > 1 else f" {''.join(idle)} runs"
        forward = f"; module{runs} forward only" if idle else ""
        return report.wrapped(f"frozen: {self.frozen_parameters:,} of {self.parameters:,} parameters{forward}")

    def _again(self):
        """Which units' convolutions run again."""
        again = [name for module in self.modules for name in module.recomputed]
        units = sum(len(module.units) for module in self.modules)
        what = "every unit" if len(again) == units else ", ".join(again)
        return report.wrapped(f"convolutions that run again in the backward: those of {what}") if again else []

    def _costs(self):
        """What was found under a budget, and the comparison."""
        return [str(costs) for costs in (self.choice or self.comparison,) if costs]

    @property
    def title(self):
        count = len(self.modules)
        what = f", depth {self.depth}" if self.depth else ""
        nets = nets_of(self.origin.rule)
        what += f", nets {nets}" if nets else ""
        return (
            f"{self.model}, rule {self.rule}{what}: {count} local module{'s' * (count > 1)}, "
            f"input {'x'.join(str(size) for size in self.input_shape)}"
        )

    def _peak_line(self):
        top = max(self.modules, key=lambda module: module.peak_bytes)
        return (
            f"a step's peak, {format_bytes(self.peak_bytes)}, is in module {top.index}: state "
            f"{format_bytes(self.state_bytes)}, batch {format_bytes(self.batch_bytes)}, the rest activations and "
            f"gradients ({self.precision})"
        )


def _some(names):
    """The first of many names."""
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f", and {more} more" if more > 0 else "")
