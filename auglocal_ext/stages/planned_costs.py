"""What the pieces of a planned network cost: its plan's bytes, and seconds by a clock."""

import math

from ..backbone.families import as_backbone
from ..common.memory import bytes_of, tensors_of
from ..engine.emit import Phase
from ..planning.planner import Planner
from ..rules.cutting import cut
from .pieces import Costs, Piece

__all__ = ["planned_costs"]


def planned_costs(planned, model, clock, units=None):
    """Costs of a plan's local modules, and of backpropagation through the same network.

    Args:
        planned: a Plan that accumulates nothing.
        model: its model.
        clock: a `Calibration`, or a `Roofline`.
        units: as the plan was given them.

    Raises:
        ValueError: the plan accumulates the gradients of several batches.
    """
    origin, shape = planned.origin, planned.input_shape
    if origin.stepping.accumulates:
        count = origin.stepping.accumulate
        raise ValueError(f"schedules of ranks step behind every batch, given {count} to accumulate: leave that out")
    backbone = as_backbone(model, units)
    made_with = origin.memory_format, backbone, origin.criterion, clock, origin.soft_labels, origin.stepping
    planner = Planner(model, planned.precision, origin.optimizer, origin.recompute, *made_with)
    timed = planner.plan(cut(backbone, origin.rule, borders=planned.borders), shape, origin.rule)
    images, labels = planner.batch(shape)
    of_number = (planner.autocast or images.dtype).itemsize
    modules = tuple(_module(module, timed.state_bytes, of_number, labels.nbytes) for module in timed.modules)
    backprop = planner.at_once(shape, origin.recompute).modules[0]
    return Costs(shape[0], modules, tuple(_units(backprop, planner, shape)), images.nbytes + labels.nbytes)


def _module(module, state, of_number, labels):
    """The Piece of a ModulePlan. state: bytes of the whole plan's; of_number: of a number of the features; labels: of
    the labels, which go with the features."""
    return Piece(
        **_seconds(module.timeline.moments),
        step=(module.nanoseconds - module.timeline.nanoseconds) / 1e9,
        output=of_number * math.prod(module.output_shape) + labels,
        state=module.state_bytes + module.optimizer_bytes,
        gradients=module.gradient_bytes,
        kept=module.kept_bytes,
        activations=module.activation_bytes,
        peak=module.peak_bytes - state,
    )


def _seconds(moments):
    """Of the forward pass, of the backward pass, and of the weights' gradients in that."""
    backward = [moment for moment in moments if moment.phase is Phase.BACKWARD]
    whole, back = (sum(moment.nanoseconds for moment in some) for some in (moments, backward))
    weights = sum(moment.nanoseconds for moment in backward if moment.kind == "weight gradient")
    return {"forward": (whole - back) / 1e9, "backward": back / 1e9, "weights": weights / 1e9}


def _units(backprop, planner, shape):
    """A Piece for each unit, the classifier in the last one; backprop: the ModulePlan of all of them."""
    line, units = backprop.timeline, planner.backbone.units
    places = {unit.name: index for index, unit in enumerate(units)} | {"head": len(units) - 1}
    parts = [[unit.module] for unit in units]
    parts[-1].append(planner.backbone.classifier)
    turn = sum(moment.phase is Phase.FORWARD for moment in line.moments)
    kept = [0] * len(units)
    for buffer in line.buffers:  # one that is written over goes on as another
        kept[places[buffer.part]] += buffer.bytes * (buffer.born < turn <= buffer.dies)
    moments, before = [[] for _ in units], 0
    for moment in line.moments:
        moments[places[moment.part]].append(moment)
    step = (backprop.nanoseconds - line.nanoseconds) / 1e9
    shapes = planner.backbone.feature_shapes(shape[1:])
    batch = shape[0] * (planner.autocast or planner.dtype).itemsize
    for index in range(len(units)):
        gradients = bytes_of({p for part in parts[index] for p in part.parameters() if p.requires_grad})
        share = gradients / max(backprop.gradient_bytes, 1)
        high = max((moment.high - moment.gradients for moment in moments[index]), default=0)
        yield Piece(
            **_seconds(moments[index]),
            step=share * step,
            output=batch * math.prod(shapes[index]),
            state=bytes_of({t for part in parts[index] for t in tensors_of(part)})
            + round(share * backprop.optimizer_bytes),
            gradients=gradients,
            kept=kept[index],
            activations=max(high - before, kept[index]),
        )
        before += kept[index]
