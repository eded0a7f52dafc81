"""What `auglocal plan --stages` adds: trainings by several ranks, predicted."""

from functools import partial

import torch

from .. import report
from ..planning.calibration import calibration_file, load, machine
from ..planning.roofline import Roofline, measured_roofline
from ..stages.balance import balanced
from ..stages.pieces import Link, total
from ..stages.planned_costs import planned_costs
from ..stages.simulate import PIPELINES, predicted
from .options import default_device

__all__ = ["check_stages", "stages_of"]

# Form -> how it is called here.
WAYS = {
    "decoupled": "local learning, layer parallel",
    "local data parallel": "local learning, data parallel",
    "gpipe": "backpropagation, GPipe",
    "1f1b": "backpropagation, 1F1B",
    "zero-bubble": "backpropagation, zero-bubble (ZB-H1)",
    "bp data parallel": "backpropagation, data parallel",
}
ONE = {"decoupled": "local learning", "bp data parallel": "backpropagation"}  # all that one rank can do
DRAWN = {"decoupled": 3, "gpipe": 1, "1f1b": 1, "zero-bubble": 1}  # form -> of how many batches


def check_stages(options):
    """ValueError where an option is given that says nothing without --stages, or against it."""
    for name in ("bandwidth", "latency", "speed"):
        if options.stages is None and getattr(options, name) is not None:
            raise ValueError(f"--{name} is about several ranks: give --stages too, for instance --stages 4")
    if options.stages is not None and options.accumulate > 1:
        raise ValueError("--stages predicts ranks that step behind every batch: leave --accumulate out")


def stages_of(planned, model, options):
    """(lines of a table, path -> draws the schedules), predicted for 1, 2, 4, ... ranks up to --stages; ValueError
    where there are fewer local modules."""
    clock, told = _clock(options)
    costs = planned_costs(planned, model, clock, options.units)
    given = {name: getattr(options, name) for name in ("bandwidth", "latency") if getattr(options, name) is not None}
    link = Link(**given)
    most = options.stages
    ways = {1: ONE} | {ranks: WAYS for ranks in (*_doubled(most), most)}
    balanced(len(costs.modules), most, lambda group: 0.0)  # where it refuses, so does this
    found = {
        ranks: {
            form: predicted(costs, ranks, form, link=link) if ranks <= _most(costs, form) else None for form in forms
        }
        for ranks, forms in ways.items()
    }
    rows = [(ranks, ways[ranks][form], way) for ranks, forms in found.items() for form, way in forms.items()]
    micro = max(way.micro_batches for *_, way in rows if way is not None)
    slowest = max(range(len(costs.modules)), key=lambda index: costs.modules[index].seconds)
    seconds = costs.modules[slowest].seconds
    lines = report.stages_table(rows)
    lines += report.wrapped(
        f"batches of {costs.images} images; pipelines cut one into four micro-batches for each rank, here into at most "
        f"{micro}, and BatchNorm sees what a rank computes at once; links of {link.bandwidth / 1e9:g} GB/s and "
        f"{link.latency * 1e6:g} µs; seconds by {told}. A share of a batch is taken to cost that share of its time."
    )
    lines += report.wrapped(
        f"Layer parallel local learning reaches {costs.images / seconds:,.0f} images/s at most: local module {slowest} "
        f"alone takes {seconds / total(costs.modules, 'seconds'):.0%} of a batch's time."
    )
    return lines, partial(_draw, planned, found[most], most)


def _doubled(most):
    return [2**power for power in range(1, most.bit_length()) if 2**power < most]


def _most(costs, form):
    """The most ranks that a form of training can have."""
    if "data parallel" in form:
        return costs.images
    return len(costs.units if form in PIPELINES else costs.modules)


def _clock(options):
    """(what tells the seconds of a step, what it is)"""
    if options.speed is not None:
        return Roofline(*options.speed), "the speed that was given"
    device = torch.device(default_device())
    if calibration_file(machine(device, options.precision)).is_file():
        return load(device, options.precision), "what `auglocal calibrate` has measured here"
    clock = measured_roofline(device, options.precision)
    speed = f"{clock.macs / 1e9:.3g} G multiply-accumulates/s and {clock.bandwidth / 1e9:.3g} GB/s"
    return clock, f"this machine's speed, {speed}, as `auglocal calibrate` has not been run"


def _draw(planned, found, ranks, path):
    panels = [
        (f"{WAYS[form]}: {_told(way)}", way.beginning(DRAWN[form]), None)
        for form, way in found.items()
        if form in DRAWN and way is not None
    ]
    report.gantt_picture(panels, path, f"{planned.title}\n{ranks} ranks from their first batch on")


def _told(way):
    return f"{way.images_per_second:,.0f} images/s in the long run, {way.bubble:.0%} of the time idle"
