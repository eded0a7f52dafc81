"""What a training step will consist of and hold, before it runs: modules, units, aux nets, bytes, arithmetic."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from . import report
from ._checks import whole_number
from ._meta import as_meta_copy, meta_copy
from .backbone import as_backbone
from .budget import Choice, candidates, choose, parse_bytes
from .eager import eager_bytes
from .engine.as_real import RealLayouts
from .engine.emit import Phase
from .engine.timeline import Timeline, fill, timeline
from .engine.trace import Reader
from .equivalence import assert_same_function
from .memory import LiveBytes, bytes_of, format_bytes, tensors_of
from .module_nodes import programs
from .ops.batch_norm_act import memory_format
from .optim import make_optimizer, sgd
from .rules import Cut, LocalHead, as_rule, assert_apart, borders_of, cut, local_heads

__all__ = ["ModulePlan", "Plan", "plan", "train_mode"]

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class ModulePlan:
    """One local module. Bytes are those of one training step, from the second step on."""

    index: int
    units: tuple[str, ...]  # names of its backbone units
    output_shape: tuple[int, ...]  # of its last unit, (N, C, H, W)
    aux_net: str  # in words; empty: the classifier is its head
    parameters: int  # of its units, and of the classifier in the last module
    aux_parameters: int
    state_bytes: int  # parameters and buffers, its own and its aux net's
    gradient_bytes: int  # of the parameters
    optimizer_bytes: int  # the optimizer's state
    optimizer_scratch: int  # what the optimizer needs for a moment in its step
    kept_bytes: int  # what the forward pass leaves for the backward, the input included
    activation_bytes: int  # highest, without the parameters' gradients
    peak_bytes: int  # highest of the whole step while this module runs: state, batch, losses, activations, gradients
    macs: int  # multiply-accumulates of forward and backward, convolutions and linear layers
    rebuild_share: float  # of its memory traffic: what goes into rebuilding what was dropped
    islands: tuple[str, ...]  # what runs by autograd, because no instruction describes it
    timeline: Timeline = field(repr=False)
    keep: frozenset = field(repr=False)  # see `program.build`


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
    eager: dict | None = field(default=None, compare=False, repr=False)  # see `eager.eager_bytes`
    choice: Choice | None = field(default=None, compare=False, repr=False)  # with a memory budget: what was found

    @property
    def parameters(self):
        """Parameters of the model itself."""
        return sum(module.parameters for module in self.modules)

    @property
    def aux_parameters(self):
        """Parameters of the aux nets, which exist during training only."""
        return sum(module.aux_parameters for module in self.modules)

    @property
    def state_bytes(self):
        """What lives between steps: parameters, buffers and optimizer state, of the model and the aux nets."""
        return sum(module.state_bytes + module.optimizer_bytes for module in self.modules)

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
        aux = "aux net: unit (width, stride)" if self.rule == "auglocal" else "aux net"
        header = ("module", "units", "output", aux, "parameters", "aux parameters")
        header += ("kept", "activations", "step's peak", "MACs / BP")
        rows = [header]
        for module in self.modules:
            rows.append(
                (
                    str(module.index),
                    module.units[0] if len(module.units) == 1 else f"{module.units[0]} .. {module.units[-1]}",
                    "x".join(str(size) for size in module.output_shape[1:]),
                    module.aux_net or "none: the classifier",
                    f"{module.parameters:,}",
                    f"{module.aux_parameters:,}",
                    format_bytes(module.kept_bytes),
                    format_bytes(module.activation_bytes),
                    format_bytes(module.peak_bytes),
                    f"{module.macs / self.bp_macs:.3f}",
                )
            )
        total = ("total", "", "", "", f"{self.parameters:,}", f"{self.aux_parameters:,}", "")
        total += (format_bytes(self.activation_bytes), format_bytes(self.peak_bytes), f"{self.macs / self.bp_macs:.3f}")
        rows.append(total)
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = []
        for row in rows:
            left = [cell.ljust(width) for cell, width in zip(row[:4], widths[:4], strict=True)]
            right = [cell.rjust(width) for cell, width in zip(row[4:], widths[4:], strict=True)]
            lines.append("  ".join(left + right).rstrip())
        rule_line = "-" * max(len(line) for line in lines)
        lines = [lines[0], rule_line, *lines[1:-1], rule_line, lines[-1], "", self._peak_line()]
        for module in self.modules:
            if module.islands:
                lines.append(f"module {module.index} runs by autograd, keeping more: {', '.join(module.islands)}")
        if self.choice is not None:
            lines += [str(self.choice)]
        elif self.eager is not None:
            lines.append(
                f"eager BP would need {format_bytes(self.eager['bp'])}, and with every unit checkpointed "
                f"{format_bytes(self.eager['gc'])} at 1.33 x the MACs"
            )
        return "\n".join([self.title, *lines])

    @property
    def title(self):
        count = len(self.modules)
        what = f", depth {self.depth}" if self.depth else ""
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


@torch.inference_mode(False)
def plan(
    model,
    input_shape,
    depth=4,
    *,
    rule="auglocal",
    form=None,
    modules=None,
    precision="fp32",
    memory_budget=None,
    recompute=False,
    optimizer=None,
):
    """Plans a training without running it; the model is not changed.

    Args:
        model: see `as_backbone`.
        input_shape: of a batch of images, (N, C, H, W).
        depth, rule, form, modules, precision, recompute, optimizer: see `auglocal_ext.train`. With a budget depth may
            be "auto".
        memory_budget: None, or the bytes that a whole step may take, as "6GB" or a number: then the cut is the one of
            least arithmetic that fits, among all borders and numbers of modules, one (plain backpropagation) included.

    Returns:
        Plan

    Raises:
        ValueError: the model cannot be cut, an argument is out of the range that it allows, or nothing fits the
            budget: it then says the least that would, and the batch size that would fit.
    """
    backbone = as_backbone(model)
    shape = check_shape(backbone, input_shape)
    if memory_budget is None:
        if depth == "auto":
            raise ValueError("depth='auto' chooses under a budget: give memory_budget too, for instance '6GB'")
        rule, heads, choice = as_rule(rule, depth, form), None, None
        cuts = cut(backbone, rule, modules)
        planner = Planner(model, precision, optimizer, recompute or rule.recompute, backbone)
    else:
        budget = parse_bytes(memory_budget)
        rules = candidates(rule, depth, form, len(backbone.units))
        cut(backbone, rules[0], modules)  # says what is wrong
        planner = Planner(model, precision, optimizer, recompute or rules[0].recompute, backbone)
        _check_device(planner.device, budget)
        cuts, heads, choice = choose(planner, shape, budget, rules, modules)
        rule = choice.rule
    planned = planner.plan(cuts, shape, rule, heads)
    choice = choice and replace(choice, bp_macs=planned.bp_macs)
    return replace(planned, eager=choice.eager if choice else eager_bytes(planner, shape), choice=choice)


def _check_device(device, budget):
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        if budget > total:
            raise ValueError(
                f"memory_budget {format_bytes(budget)} is more than {device} has: give at most {format_bytes(total)}"
            )


def check_shape(backbone, input_shape):
    """The shape as a tuple, or one sentence about what is wrong with it."""
    expected = f"input_shape must be (N, {backbone.image_channels}, H, W) for this model"
    if isinstance(input_shape, torch.Tensor) or not isinstance(input_shape, Iterable):
        raise TypeError(f"{expected}, given {type(input_shape).__name__}")
    input_shape = tuple(whole_number(size, f"{expected}, whole numbers") for size in input_shape)
    if len(input_shape) != 4 or input_shape[1] != backbone.image_channels or min(input_shape) < 1:
        raise ValueError(f"{expected}, given {input_shape}")
    return input_shape


class Planner:
    """Walks the programs of a model's cuts on meta tensors: nothing is computed, the model is not touched.

    Args:
        model: see `as_backbone`. In eval mode as a whole it is planned in training mode, which a step puts it into.
        precision, optimizer, recompute: see `auglocal_ext.train`.
        backbone: of the model, where it was read already.
    """

    def __init__(self, model, precision="fp32", optimizer=None, recompute=False, backbone=None):
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, given {precision!r}")
        self.name, self.precision, self.recompute = type(model).__name__, precision, recompute
        self.factory, self.device = optimizer or sgd(128), next(model.parameters()).device
        self.model, self.backbone = _meta_copies(model, backbone or as_backbone(model))
        train_mode(self.model)
        self.dtype = next(self.model.parameters()).dtype
        self.autocast = torch.bfloat16 if precision == "bf16" else None
        self.reader, self._optimizers, self._heads, self._same = Reader(), {}, {}, set()

    def batch(self, shape, like=None):
        """(images, labels) of a batch, on the meta device; like: images whose dtype and memory format it has."""
        # Two images at least: a BatchNorm of a map of one pixel cannot be traced with one.
        dtype, layout = (self.dtype, torch.contiguous_format) if like is None else (like.dtype, memory_format(like))
        size = (max(shape[0], 2), *shape[1:])
        images = torch.empty(size, dtype=dtype, device="meta", memory_format=layout)
        return images, torch.empty(len(images), dtype=torch.int64, device="meta")

    def plan(self, cuts, shape, rule, heads=None, like=None, given_optimizers=()):
        """The Plan of `cuts` of the backbone for batches of `shape`.

        heads: the LocalHeads that the modules have already, or None to make them.
        like: see `batch`.
        given_optimizers: the modules' own, where there are any: for state of parameters that were frozen since.
        """
        if heads is None:
            heads = self.heads(cuts, shape, rule)
        else:
            heads = [*(meta_copy(head) for head in heads[:-1]), LocalHead(self.backbone.classifier)]
        bodies = [nn.ModuleList(u.module for u in self.backbone.units[part.first : part.last + 1]) for part in cuts]
        pairs = [nn.ModuleList(pair) for pair in zip(bodies, heads, strict=True)]
        assert_apart(pairs, {parameter: name for name, parameter in self.model.named_parameters()})
        images, labels = self.batch(shape, like)
        self._assert_same_function(images.to(self.dtype))
        words = [rule.describe(border) for border in borders_of(self.backbone, cuts, shape[1:])]
        optimizers = [self.optimizer_bytes(pair) for pair in pairs]
        states = [bytes_of({*tensors_of(body), *tensors_of(head)}) for body, head in zip(bodies, heads, strict=True)]
        batch_bytes = images.nbytes + labels.nbytes
        idle = sum(_frozen_state(optimizer) for optimizer in given_optimizers)
        losses = len(cuts) * self.loss_bytes
        constant = batch_bytes + sum(states) + sum(state for state, _ in optimizers) + idle + losses

        def walk(keep=None):
            made, x = [], images
            for index, program in enumerate(self.programs(cuts, heads, keep)):
                existing = [*tensors_of(bodies[index]), *tensors_of(heads[index])]
                given, (line, x) = x, timeline(program, x, labels, existing, index > 0, images)
                made.append((program, line, line.output or self._output(cuts[index], given)))
            return made

        walked = walk()
        top = max(line.peak for _, line, _ in walked)
        activations = max(line.activations for _, line, _ in walked)
        keep = [fill(program.gaps, line, top, activations) for program, line, _ in walked]
        walked = walk(keep)
        # Kept values change what is rebuilt from what: where that needs more after all, nothing is kept.
        high = [line.peak > top or line.activations > activations for _, line, _ in walked]
        if any(high):
            keep = [frozenset() if too_high else kept for kept, too_high in zip(keep, high, strict=True)]
            walked = walk(keep)
        modules = []
        for index, (part, body, head, (program, line, output)) in enumerate(
            zip(cuts, bodies, heads, walked, strict=True)
        ):
            (state, scratch), last = optimizers[index], index == len(cuts) - 1
            modules.append(
                ModulePlan(
                    index=index,
                    units=tuple(unit.name for unit in self.backbone.units[part.first : part.last + 1]),
                    output_shape=(shape[0], *output[1:]),
                    aux_net="" if last else words[index],
                    parameters=_count(body) + _count(head) * last,
                    aux_parameters=0 if last else _count(head),
                    state_bytes=states[index],
                    gradient_bytes=bytes_of({p for p in (*body.parameters(), *head.parameters()) if p.requires_grad}),
                    optimizer_bytes=state,
                    optimizer_scratch=scratch,
                    kept_bytes=line.kept,
                    activation_bytes=line.activations,
                    peak_bytes=constant + max(line.peak, line.end + scratch),
                    macs=line.macs,
                    rebuild_share=line.rebuild_share,
                    islands=tuple(island.what for island in program.islands),
                    timeline=line,
                    keep=keep[index],
                )
            )
        bp_macs = _bp_macs([line for _, line, _ in walked])
        return Plan(self.name, rule.name, rule.depth, self.precision, shape, tuple(modules), batch_bytes, bp_macs)

    def _assert_same_function(self, images):
        """See `equivalence.assert_same_function`; once for images of a shape and layout."""
        key = images.shape, images.stride()
        if key not in self._same:
            assert_same_function(self.model, self.backbone, images, self.reader)
            self._same.add(key)

    def heads(self, cuts, shape, rule):
        """The LocalHead behind each module, new ones on the meta device and last the classifier's."""
        with torch.device("meta"), RealLayouts():
            *made, classifier = local_heads(self.backbone, rule, cuts, shape[1:])
        return [*(as_meta_copy(head.to(self.dtype)) for head in made), classifier]

    def heads_by_unit(self, rule, shape):
        """AugLocal's head behind each unit, the last one's being the classifier; made once."""
        key = rule.depth, rule.form, shape[1:]
        if key not in self._heads:
            self._heads[key] = self.heads([Cut(unit, unit) for unit in range(len(self.backbone.units))], shape, rule)
        return self._heads[key]

    def programs(self, cuts, heads, keep=None):
        options = {"recompute": self.recompute, "trace": self.reader.trace, "device_type": self.device.type}
        return programs(self.backbone, cuts, heads, self.autocast, keep, **options)

    @property
    def loss_bytes(self):
        """Of a local module's loss, in the tensor of all modules' that a step makes at its start."""
        return self.dtype.itemsize

    def state_bytes(self):
        """Parameters, buffers and optimizer state of the model alone."""
        return bytes_of(tensors_of(self.model)) + self.optimizer_bytes(self.model)[0]

    def _output(self, part, x):
        """The shape of what units of the backbone put out, which the last module's program may never store."""
        x = x.to(self.dtype)
        for unit in self.backbone.units[part.first : part.last + 1]:
            x = unit.trace(x)
        return tuple(x.shape)

    def optimizer_bytes(self, module):
        """(bytes of state, bytes that a step needs for a moment) of the optimizer of one module."""
        trained = tuple((tuple(p.shape), p.stride(), p.dtype) for p in module.parameters() if p.requires_grad)
        if trained not in self._optimizers:
            self._optimizers[trained] = self._probe_optimizer(trained)
        return self._optimizers[trained]

    def _probe_optimizer(self, trained):
        """`optimizer_bytes` for parameters of (shape, strides, dtype)."""
        probe = make_optimizer(self.factory, [nn.Parameter(torch.zeros(1, dtype=self.dtype, device=self.device))])
        fused = all(group.get("fused") for group in probe.param_groups)
        try:
            state, scratch = _optimizer_step(self.factory, trained, "meta")
        except Exception:  # one that needs values: it branches on them, or has kernels for real memory only
            state, scratch = _optimizer_step(self.factory, trained, self.device)
        return state, 0 if fused else scratch


def _optimizer_step(factory, trained, device):
    def zeros():
        return [torch.empty_strided(*like, dtype=dtype, device=device).zero_() for *like, dtype in trained]

    if not trained:
        return 0, 0
    parameters = [nn.Parameter(value) for value in zeros()]
    optimizer = make_optimizer(factory, parameters)
    for parameter, gradient in zip(parameters, zeros(), strict=True):
        parameter.grad = gradient
    with RealLayouts(values=False):
        optimizer.step()
        state = [value for values in optimizer.state.values() for value in values.values()]
        state = [value for value in state if isinstance(value, torch.Tensor)]
    with LiveBytes([*parameters, *(p.grad for p in parameters), *state]) as live, RealLayouts(values=False):
        before = live.now
        optimizer.step()
    return bytes_of(state), live.peak - before


def _meta_copies(model, backbone):
    """A model and its backbone on the meta device; they share their modules as the given ones do."""
    copied, *units, classifier = meta_copy(
        nn.ModuleList([model, *(unit.module for unit in backbone.units), backbone.classifier])
    )
    units = tuple(replace(unit, module=module) for unit, module in zip(backbone.units, units, strict=True))
    return copied, replace(backbone, units=units, classifier=classifier)


def train_mode(model):
    """Puts a model that is in eval mode as a whole into training mode; returns whether it was. Where parts are in
    training mode, somebody chose which."""
    wholly_eval = not any(module.training for module in model.modules())
    if wholly_eval:
        model.train()
    return wholly_eval


def _frozen_state(optimizer):
    """Bytes of the state of an optimizer's frozen parameters."""
    states = [state for parameter, state in optimizer.state.items() if not parameter.requires_grad]
    return bytes_of(t for state in states for t in state.values() if isinstance(t, torch.Tensor))


def _bp_macs(lines):
    """Multiply-accumulates of backpropagation: those of the first unit, which gives the images no gradient there
    either; of every other unit forward and twice backward; and the classifier's."""
    units = [m for line in lines for m in line.moments if m.part not in ("head", "extra") and not m.rebuilds]
    first = sum(moment.macs for moment in units if moment.part == units[0].part)
    others = [m.macs for m in units if m.part != units[0].part and m.phase is Phase.FORWARD]
    classifier = [moment.macs for moment in lines[-1].moments if moment.part == "head"]
    return first + 3 * sum(others) + sum(classifier)


def _count(module):
    return sum(parameter.numel() for parameter in module.parameters())
