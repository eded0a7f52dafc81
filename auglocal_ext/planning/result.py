"""What a plan says: modules, units, aux nets, bytes, arithmetic."""

from dataclasses import dataclass, field

from .. import report
from ..common.memory import format_bytes
from ..common.messages import plural
from ..engine.timeline import Timeline
from ..rules.auxiliary import nets_of
from .budget import Choice
from .comparison import Comparison
from .origin import Origin

__all__ = ["ModulePlan", "Plan"]


MOST_NAMES = 8  # of what runs by autograd, that are printed


@dataclass(frozen=True)
class ModulePlan:
    """One local module of a `Plan`. Bytes are those of one training step, from the second step on.

    Attributes:
        index: its number, from 0.
        units: names of its backbone units.
        recomputed: those of them whose convolutions run again in the backward.
        output_shape: of its last unit's features, with the batch: (N, C, H, W).
        aux_net: in words; empty: the classifier is its head.
        parameters: how many its units have, in the last module with the classifier's.
        frozen_parameters: those of them that do not train.
        trains: else it runs forward only, because its units are frozen; its aux net, if any, is there but unused.
        aux_parameters: how many its aux net has.
        state_bytes: parameters and buffers, its own and its aux net's.
        gradient_bytes: of the parameters' gradients.
        optimizer_bytes: the optimizer's state.
        optimizer_scratch: bytes that the optimizer and clipping need for a moment in the module's step.
        kept_bytes: what the forward pass leaves for the backward, the input included.
        activation_bytes: at the highest moment, without the parameters' gradients.
        peak_bytes: of the whole step while this module runs: state, batch, losses, activations, gradients.
        macs: multiply-accumulates of forward and backward, convolutions and linear layers.
        rebuild_share: from 0 to 1, of its memory traffic: what goes into rebuilding what was dropped.
        islands: what runs by autograd, because no instruction describes it.
        timeline: what lives when, see `engine.timeline.Timeline`.
        kept_gaps: see `engine.program.build`.
        nanoseconds: predicted, the optimizer's step included; None where no times were asked for.
    """

    index: int
    units: tuple[str, ...]
    recomputed: tuple[str, ...]
    output_shape: tuple[int, ...]
    aux_net: str
    parameters: int
    frozen_parameters: int
    trains: bool
    aux_parameters: int
    state_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    optimizer_scratch: int
    kept_bytes: int
    activation_bytes: int
    peak_bytes: int
    macs: int
    rebuild_share: float
    islands: tuple[str, ...]
    timeline: Timeline = field(repr=False)
    kept_gaps: frozenset = field(repr=False)
    nanoseconds: int | None = None

    def by_autograd(self):
        """What runs by autograd, as a sentence."""
        kept = self.timeline.kept_by_autograd
        what = f"{kept / self.kept_bytes:.0%} of what it keeps" if kept else "which keeps nothing for it"
        return f"module {self.index} runs by autograd, {what}: {_some(self.islands)}"


@dataclass(frozen=True)
class Plan:
    """The cut of one network, and what its step holds; `print(plan)` shows it as a table.

    Attributes:
        model: the model's name, see `auglocal_ext.models.name_of`.
        rule: the rule's name.
        depth: of the aux nets; None where the rule has none, or they differ.
        precision: of the features: "fp32", "bf16" or "fp16".
        input_shape: of a batch of images, (N, C, H, W).
        modules: a `ModulePlan` for each local module, from the input to the output.
        batch_bytes: of images and labels; on a GPU also of the step's own copy of them.
        bp_macs: multiply-accumulates of a step of backpropagation through the same network.
        origin: what it was made of and with.
        comparison: what the step costs otherwise, `planning.comparison.Comparison`; None where nobody asked.
        choice: what the search under a memory budget found, `planning.budget.Choice`; None without one.
        stepping_bytes: that stay between steps: gradients that are accumulated, averaged weights.
    """

    model: str
    rule: str
    depth: int | None
    precision: str
    input_shape: tuple[int, ...]
    modules: tuple[ModulePlan, ...]
    batch_bytes: int
    bp_macs: int
    origin: Origin = field(compare=False, repr=False)
    comparison: Comparison | None = field(default=None, compare=False, repr=False)
    choice: Choice | None = field(default=None, compare=False, repr=False)
    stepping_bytes: int = 0

    @property
    def parameters(self):
        """How many parameters the model itself has."""
        return sum(module.parameters for module in self.modules)

    @property
    def frozen_parameters(self):
        """How many of the model's parameters do not train."""
        return sum(module.frozen_parameters for module in self.modules)

    @property
    def aux_parameters(self):
        """How many parameters the aux nets have, which exist during training only."""
        return sum(module.aux_parameters for module in self.modules)

    @property
    def state_bytes(self):
        """Bytes that live between steps. These are parameters, buffers and optimizer state, of the model and the aux
        nets; with `accumulate` their gradients, with `ema` the averaged model."""
        return sum(module.state_bytes + module.optimizer_bytes for module in self.modules) + self.stepping_bytes

    @property
    def activation_bytes(self):
        """Bytes of what a step makes besides parameters' gradients, at the highest moment."""
        return max(module.activation_bytes for module in self.modules)

    @property
    def peak_bytes(self):
        """Bytes of a step at its highest moment, with everything in it. These are state, batch, activations, gradients
        and the optimizer's scratch."""
        return max(module.peak_bytes for module in self.modules)

    @property
    def macs(self):
        """Multiply-accumulates of a step, of convolutions and linear layers, forward and backward, of aux nets too."""
        return sum(module.macs for module in self.modules)

    @property
    def milliseconds(self):
        """Predicted time of a step, the optimizers' included; None but for prefer="time"."""
        times = [module.nanoseconds for module in self.modules]
        return None if None in times else sum(times) / 1e6

    @property
    def units(self):
        """The names of the backbone's units."""
        return tuple(name for module in self.modules for name in module.units)

    @property
    def borders(self):
        """The number of the last unit of each module but the last, from 0, which `LocalTrainer` takes to cut the same
        way."""
        ends, last = [], -1
        for module in self.modules[:-1]:
            last += len(module.units)
            ends.append(last)
        return tuple(ends)

    def save_picture(self, path):
        """Draws live bytes over the instructions of one step, stacked by kind, and writes them as an image.

        Args:
            path: its suffix says which kind of image: .png, .pdf, .svg or another that matplotlib knows.

        Raises:
            ValueError: another suffix.
            OSError: the file cannot be written.
        """
        report.memory_picture(self, path)

    def save_front(self, path):
        """Draws what every number of modules costs, memory against arithmetic, with prefer="time" against predicted
        time, and writes it as an image.

        Args:
            path: see `save_picture`.

        Raises:
            ValueError: the plan was made without a memory budget, or path has another suffix.
            OSError: the file cannot be written.
        """
        if self.choice is None:
            raise ValueError("save_front draws the search under a memory budget: plan with memory_budget='6GB'")
        report.front_picture(self, path)

    def __str__(self):
        autograd = [module.by_autograd() for module in self.modules if module.islands]
        table = report.plan_table(self)
        told = [*self._frozen(), *autograd, *self._again(), *self._costs()]
        return "\n".join([self.title, *table, "", self._peak_line(), *told])

    def brief(self):
        """The table without its widest columns, at most 100 characters wide, and what the step costs otherwise; a str
        of several lines."""
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
        """Model, rule, nets, number of modules and batch shape, in one line."""
        what = f", depth {self.depth}" if self.depth else ""
        nets = nets_of(self.origin.rule)
        what += f", nets {nets}" if nets else ""
        return (
            f"{self.model}, rule {self.rule}{what}: {plural(len(self.modules), 'local module')}, "
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
