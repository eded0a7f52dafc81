"""Plans a training without running it: what a step will consist of and hold."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import nn

from ..backbone.families import as_backbone
from ..common.checks import whole_number
from ..common.memory import format_bytes, parse_bytes
from ..rules.auxiliary import Auxiliary
from ..rules.cutting import as_recompute, cut, has_own_cut
from ..rules.rule import Rule
from .budget import check_device, choose, rules_of
from .calibration import load
from .comparison import compared
from .fewest import fewest
from .planner import Planner
from .result import Plan
from .stepping import Stepping

__all__ = ["check_shape", "plan"]


@torch.inference_mode(False)
def plan(
    model: nn.Module,
    input_shape: Iterable[int],
    depth: int | str = 4,
    *,
    rule: str | Rule | type[Rule] = "auglocal",
    form: str | None = None,
    auxiliary: str | Auxiliary | Callable = "paper",
    modules: int | None = None,
    units: Iterable[str] | None = None,
    precision: str = "fp32",
    memory_budget: int | str | None = None,
    prefer: str = "arithmetic",
    recompute: bool | str | Iterable[str] = False,
    optimizer: Callable | None = None,
    criterion: Callable | None = None,
    sync_batch_norm: bool = False,
    accumulate: int = 1,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    clip: str = "module",
    ema: float | None = None,
    memory_format: torch.memory_format = torch.channels_last,
    soft_labels: bool = False,
) -> Plan:
    """Plans a training without running it; the model is not changed.

    Args:
        model: see `as_backbone`. In eval mode as a whole it is planned in training mode.
        input_shape: of a batch of images, (N, C, H, W); with accumulate of one of those that are accumulated.
        depth, auxiliary, recompute: see `auglocal_ext.train`; with a budget also "auto".
        modules: see `auglocal_ext.train`; with a budget how many the cut has to have, None: any number.
        rule, form, units, precision, optimizer: see `auglocal_ext.train`.
        criterion: the loss of every local module's head and of the classifier, see `auglocal_ext.train`.
        sync_batch_norm: see `auglocal_ext.train`; a plan is of one rank's step.
        accumulate, clip_norm, clip_value, clip, ema: see `auglocal_ext.train`.
        memory_format: of the images, channels_last or contiguous; `auglocal_ext.train` makes them channels_last.
        memory_budget: None, or the bytes that a whole step may take, as "6GB" or a number: then the cut is the one of
            least arithmetic that fits, among all borders and numbers of modules, one (plain backpropagation) included.
            With depth or auxiliary "auto" each border's net may have any depth from 2 to 6, or be the paper's or light;
            with recompute "auto" each unit's convolutions may run again or not: whatever costs the least.
        soft_labels: whether labels are (N, classes), as MixUp and CutMix make them, rather than class numbers (N,).
        prefer: what is least in the cut that is chosen: "arithmetic"; "memory", the step's bytes; or "time", as it is
            predicted by what `auglocal calibrate` has measured on this machine.

    Returns:
        Plan, with a comparison to backpropagation and checkpointing; with a budget its `choice` too.

    Raises:
        ValueError: the model cannot be cut, an argument is out of the range that it allows, prefer="time" without a
            calibration, or nothing fits the budget: it then says the least that would, and the batch size that would
            fit.
        TypeError: model is no nn.Module, or input_shape cannot be gone through.
    """
    stepping = Stepping(accumulate, clip_norm, clip_value, clip, ema)
    backbone = as_backbone(model, units)
    shape = check_shape(backbone, input_shape)
    budget = None if memory_budget is None else parse_bytes(memory_budget)
    options = {"budgeted": budget is not None, "recompute": recompute, "prefer": prefer}
    rules = rules_of(backbone, rule, depth, form, auxiliary, modules, **options)
    recompute = rules[0].recompute or (recompute if recompute == "auto" else as_recompute(recompute, backbone))
    clock = load(next(model.parameters()).device, precision) if prefer == "time" else None
    made_with = criterion, clock, soft_labels, stepping, sync_batch_norm
    planner = Planner(model, precision, optimizer, recompute, memory_format, backbone, *made_with)
    with planner.progress(f"planning batches of {shape[0]}"):
        if budget is None:
            if modules is None and not has_own_cut(backbone, rules[0]):
                return compared(planner, fewest(planner, shape, rules[0]))
            return compared(planner, planner.plan(cut(backbone, rules[0], modules), shape, rules[0]))
        check_device(planner.device, budget)
        return _chosen(planner, shape, budget, rules, modules, recompute, prefer)


def _chosen(planner, shape, budget, rules, modules, recompute, prefer):
    """The Plan of the cut that is chosen, see `budget.choose`. The search does not know of gradients that wait for
    other ranks: where with them a cut does not fit, it looks for one that leaves them room."""
    left = budget
    while True:
        try:
            spans, heads, again, choice = choose(planner, shape, left, rules, modules, recompute, prefer)
        except ValueError as error:
            if left == budget:
                raise
            raise ValueError(
                f"of memory_budget {format_bytes(budget)} gradients that wait for {planner.stepping.ranks} ranks would "
                f"take {format_bytes(budget - left)}, and what is left is not enough: {error}"
            ) from None
        chosen = planner.with_recompute(again)
        planned = chosen.plan(spans, shape, choice.rule, heads)
        if planned.peak_bytes <= budget:
            choice = replace(choice, budget=budget).planned(planned)
            return compared(chosen, replace(planned, choice=choice))
        left -= planned.peak_bytes - budget


def check_shape(backbone, input_shape):
    """The shape as a tuple, or one sentence about what is wrong with it."""
    expected = f"input_shape must be (N, {backbone.image_channels}, H, W) for this model"
    if isinstance(input_shape, torch.Tensor) or not isinstance(input_shape, Iterable):
        raise TypeError(f"{expected}, given {type(input_shape).__name__}")
    input_shape = tuple(whole_number(size, f"{expected}, whole numbers") for size in input_shape)
    if len(input_shape) != 4 or input_shape[1] != backbone.image_channels or min(input_shape) < 1:
        raise ValueError(f"{expected}, given {input_shape}")
    return input_shape
