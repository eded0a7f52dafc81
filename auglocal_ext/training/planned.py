"""A trainer's plan and programs: made for its first batch, and anew where a batch or the modules' modes do not fit."""

import warnings
from dataclasses import replace

import torch
from torch import nn

from ..common import checks
from ..engine.tensors import layout_of
from ..engine.trace import Reader
from ..planning.comparison import compared
from ..planning.module_nodes import programs
from ..planning.planner import Planner, train_mode

__all__ = ["current_programs", "plan_batch"]


def plan_batch(trainer, images, labels, compare=False):
    """Plans the step where no plan fits; see `LocalTrainer.plan_for`. Returns the modes that the plan is for, see
    `Watch.modes`."""
    trainer.check_images(images)
    if not trainer.model.training and train_mode(trainer.model):
        trainer._warn("the model was in eval mode as a whole: a step puts it into training mode, and leaves it there")
    modes, soft = trainer._watch.modes(), labels is not None and checks.is_soft(labels)
    if trainer.plan is not None and (modes, *_kind(images)) == trainer._planned_for:
        if _fits(trainer.plan, images, soft):
            if trainer._programs is None:  # the plan was given
                trainer._rule.check_images(images)
            if compare and trainer.plan.comparison is None:  # it was planned before
                trainer.plan = compared(_planner(trainer, trainer.plan.origin.soft_labels), trainer.plan, images)
            current_programs(trainer, modes)
            return modes
        soft = _say_that_it_is_planned_again(trainer.plan, images, soft)
    _plan(trainer, images, soft, compare)
    trainer._planned_for, trainer._programs = (modes, *_kind(images)), None
    current_programs(trainer, modes)  # here, not in the step: tracing leaves meta tensors behind for a while
    return modes


def _kind(images):
    return layout_of(images), images.dtype


def _fits(plan, images, soft):
    """Whether a batch is no larger than the one that the plan is for, and its labels are of no other kind."""
    planned, planned_soft = plan.input_shape, plan.origin.soft_labels
    return images.shape[1:] == planned[1:] and images.shape[0] <= planned[0] and soft <= planned_soft


def _say_that_it_is_planned_again(plan, images, soft):
    """Warns; returns whether the next plan is for soft labels."""
    planned_soft = plan.origin.soft_labels
    named = (tuple(images.shape), soft), (plan.input_shape, planned_soft)
    given, planned = (f"{shape}{' with soft labels' * labels}" for shape, labels in named)
    warnings.warn(
        f"a batch of shape {given} does not fit the plan for {planned}: planning again, which takes a moment; "
        f"give batches of one shape, the largest first",
        stacklevel=5,
    )
    return soft or planned_soft


def _plan(trainer, images, soft, compare):
    trainer._rule.check_images(images)
    heads = [module.head for module in trainer.local_modules]
    _check_size(trainer, heads, images.shape[2:])
    planner = _planner(trainer, soft)
    planned = planner.plan(trainer._spans, tuple(images.shape), trainer._rule, heads, images, trainer.optimizers)
    if compare or (trainer.plan is not None and trainer.plan.comparison is not None):
        planned = compared(planner, planned, images)
    if trainer.plan is not None:  # what is known of the cut
        planned = replace(planned, choice=trainer.plan.choice)
    trainer.plan = planned


def _planner(trainer, soft_labels):
    return Planner(
        trainer.model,
        trainer.precision,
        trainer._optimizer,
        trainer.recompute,
        criterion=trainer.criterion,
        backbone=trainer._backbone,
        soft_labels=soft_labels,
        stepping=trainer.stepping,
        sync_batch_norm=trainer.sync_batch_norm,
    )


def _check_size(trainer, heads, size):
    if size == trainer._image_size:
        return
    with torch.device("meta"):
        fitting = trainer._make_heads(size)
    if str(fitting[:-1]) != str(heads[:-1]):
        made_for = "x".join(map(str, trainer._image_size))
        raise ValueError(
            f"the nets of rule {trainer._rule.name!r} were made for images of {made_for} pixels, given "
            f"{size[0]}x{size[1]}: pass LocalTrainer image_size={tuple(size)}"
        )


def current_programs(trainer, modes=None):
    """Each module's program, made anew after planning and where modes have changed. modes: where they are known."""
    modes = trainer._watch.modes() if modes is None else modes
    if trainer._programs is None or modes != trainer._programmed_modes:
        heads = [module.head for module in trainer.local_modules]
        planned = trainer.plan is not None and modes == trainer._planned_for[0]
        kept_gaps = [module.kept_gaps for module in trainer.plan.modules] if planned else None
        trainer._programs = programs(
            trainer._backbone,
            trainer._spans,
            heads,
            kept_gaps,
            autocast=checks.AUTOCAST[trainer.precision],
            recompute=trainer.recompute,
            criterion=trainer.criterion,
            accumulate=trainer.stepping.accumulates,
            trace=Reader(trainer.sync_batch_norm).trace,
        )
        trainer._programmed_modes = modes
        called = [island.call for program in trainer._programs for island in program.islands]
        trainer._hooks_run = {part for call in called if isinstance(call, nn.Module) for part in call.modules()}
    if "hooks" not in trainer._said and (path := trainer._watch.hooked(trainer._hooks_run)):
        trainer._warn(
            f"a hook on {path} does not run in a training step, nor does any other on a module that the step "
            f"computes by its own program; hooks on parameters run, and in evaluation all do",
            once="hooks",
        )
    return trainer._programs
