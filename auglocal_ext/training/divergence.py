"""Trainings that went wrong: how that is told, and what it is called."""

import math

import torch
from torch import nn

from ..engine.criterion import CrossEntropy
from .ranks import any_rank

__all__ = [
    "LossWatch",
    "NotFinite",
    "REMEDY",
    "TrainingDiverged",
    "UndoWhereNotFinite",
    "check_finite",
    "check_learnt",
    "check_values",
    "diverged",
    "names_not_finite",
]


class TrainingDiverged(FloatingPointError):
    """The training went wrong: a loss, a weight or an output is not finite, or the classifier is far worse at the end
    than at the start. The model is as the last step left it.

    Args:
        message: what went wrong, and what to do.
        result: the TrainResult, of `train_stages` the StagesResult, of the finished epochs; an attribute too.
    """

    def __init__(self, message, result):
        super().__init__(message)
        self.result = result


class NotFinite(FloatingPointError):
    """What `train` makes a TrainingDiverged of."""


def diverged(error, result, has_checkpoints):
    """The TrainingDiverged of a NotFinite. has_checkpoints: whether the training would go on from one that it wrote."""
    remedy = f"{REMEDY}, and another checkpoint folder" if has_checkpoints else REMEDY
    made = TrainingDiverged(f"{error}: training diverged; {remedy}", result)
    made.told_ranks = getattr(error, "told_ranks", False)  # see `distributed.faults.telling`
    return made


REMEDY = "lower the learning rate, for instance optimizer=functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9)"


def names_not_finite(trainer):
    """Names of the model's and the aux nets' parameters and buffers that have a value that is NaN or infinite; of those
    that have data here."""
    named = {}
    for prefix, module in (("", trainer.model), ("aux_nets.", trainer.aux_nets)):
        tensors = [*module.named_parameters(), *module.named_buffers()]
        named |= {prefix + name: t for name, t in tensors if t.is_floating_point() and not t.is_meta}
    if not named:
        return []
    finite = torch.stack([tensor.detach().isfinite().all() for tensor in named.values()])
    return [name for name, is_finite in zip(named, finite.tolist(), strict=True) if not is_finite]


def check_finite(trainer, odd, title):
    """Looks for what the last update may have spoilt, which no loss has told yet; odd: what was so from the start, a
    mask of infinite values for instance."""
    spoilt = [name for name in names_not_finite(trainer) if name not in odd]
    if spoilt:
        raise NotFinite(f"{title}: {spoilt[0]} has values that are NaN or infinite")


def check_values(trainer, watch, sums, odd, title):
    """Behind an epoch: raises NotFinite where a loss, a weight or a buffer is not finite any more. watch: `LossWatch`;
    sums: the epoch's; odd: see `check_finite`."""
    watch.check(title)
    counted = enumerate(sums.counted.tolist(), watch.begin)
    never = [number for (number, count), trained in zip(counted, sums.trained, strict=True) if trained and not count]
    if never:
        raise NotFinite(f"{title}: the loss of local module {never[0]} was finite in no step")
    check_finite(trainer, odd, title)


class LossWatch:
    """Remembers each local module's last finite loss, and the first step whose loss was not. Nothing in `note` waits
    for the device; `first` and `check` do.

    begin: where the trainer's local modules begin among the plan's.
    """

    def __init__(self, trainer, begin=0):
        self.trainer, self.begin = trainer, begin
        modules = len(trainer.local_modules)
        self._last = torch.full((modules,), torch.nan, dtype=trainer.dtype, device=trainer.device)
        self._first = torch.full((modules,), -1, dtype=torch.int64, device=trainer.device)
        self._frozen = {}

    def begin_with(self, losses):
        """Of each module, from an earlier process; None: it had none."""
        losses = [torch.nan if loss is None else loss for loss in losses]
        self._last = torch.as_tensor(losses, dtype=self._last.dtype, device=self._last.device)

    def note(self, step, result):
        """step: from 1; result: its StepResult. A module without a loss has none that could go wrong."""
        losses, finite = result.module_losses, result.module_losses.isfinite()
        self._last = torch.where(finite, losses, self._last)
        if not all(result.trained):
            finite = finite.index_fill(0, self._without_a_loss(result.trained), True)
        self._first = torch.where(finite | (self._first >= 0), self._first, step)

    def _without_a_loss(self, trained):
        if trained not in self._frozen:  # made once: a copy from the host waits for the device
            without = [index for index, has_a_loss in enumerate(trained) if not has_a_loss]
            self._frozen[trained] = torch.tensor(without, device=self._first.device)
        return self._frozen[trained]

    def check(self, title):
        """Raises NotFinite of the first step and its first module whose loss was not finite."""
        if (found := self.first()) is None:
            return
        (step, number), modules = found, self.trainer.plan.modules
        units = modules[number].units
        of = units[0] if len(units) == 1 else f"{units[0]} .. {units[-1]}"
        last = [f"{loss:.4g}" for loss in self._last.tolist()]
        own = last[number - self.begin]
        before = f"its last finite one was {own}" if own != "nan" else "none of its losses was before"
        others = f" (of all modules: {', '.join(last)})" if 1 < len(last) == len(modules) <= 16 else ""
        raise NotFinite(
            f"{title}, step {step}: the loss of local module {number} of {len(modules)} ({of}) is not finite; "
            f"{before}{others}"
        )

    def first(self):
        """(step, number among the plan's) of the first step and its first module whose loss was not finite, or None.
        Waits for the device."""
        found = [(step, self.begin + index) for index, step in enumerate(self._first.tolist()) if step >= 0]
        return min(found, default=None)


class UndoWhereNotFinite:
    """Of one local module, made before its forward: takes back what a pass that went wrong has done to its statistics.
    Until its step is over it holds as many bytes more as the module has buffers.
    """

    def __init__(self, module):
        self._module, self._before = module, [(buffer, buffer.clone()) for buffer in module.buffers()]

    def needed(self, loss, gradients=True):
        """Whether the loss, or where told to look at them a gradient, is not finite, on any rank, so that the module
        must not be stepped on any; then the buffers are as they were before. Waits for the device."""
        gradients = [p.grad for p in self._module.parameters() if gradients and p.grad is not None]
        finite = loss.isfinite() & nn.utils.get_total_norm(gradients).isfinite()
        if not any_rank(not finite.item()):
            return False
        for buffer, before in self._before:
            buffer.copy_(before)
        return True


def check_learnt(history, trainer):
    """Raises NotFinite where the classifier's loss has become far worse. What guessing has is known of a cross-entropy;
    another loss has to be above the same number, so that small ones may vary."""
    first, last, guessing = history[0]["loss"], history[-1]["loss"], math.log(trainer.num_classes)
    if last > 2 * max(first, guessing):
        is_cross_entropy = isinstance(trainer.criterion, CrossEntropy)
        raise NotFinite(
            f"the classifier's {'cross-entropy' if is_cross_entropy else 'loss'} was {last:.4g} in the last epoch, "
            f"after {first:.4g} in the first one{f'; guessing has {guessing:.4g}' if is_cross_entropy else ''}"
        )
