"""A stage: the local modules of one rank, and what is kept of them alone."""

import time

import torch

from ..distributed.group import among
from ..engine.tensors import dense
from ..training.batch import right_answers
from ..training.divergence import LossWatch
from ..training.epoch import Sums
from ..training.errors import say_where_it_stopped
from ..training.planned import current_programs
from ..training.step_result import StepResult
from ..training.stepping import Stepper, set_learning_rate_factor, step_module
from .link import Batch

__all__ = ["Stage"]

LOOKS = 1.0  # seconds between two looks at the losses where each waits for the device


class Stage:
    """Takes over a range of a LocalTrainer's local modules, whose plan is made.

    Args:
        copies: the ranks that have the same modules, and average their gradients.

    Attributes:
        span: the range. local_modules, optimizers: its own. plan: of the whole model.
        sums: `training.epoch.Sums` of the batches since `begin`, of these modules.
        watch: `LossWatch` of them. diverged: whether it has found anything; on a GPU that is looked at now and then.
        skipped_steps, module_hits, nonfinite: see `LocalTrainer`, of these modules.
    """

    def __init__(self, trainer, span, copies):
        self.copies, self.span, self.plan, self.criterion = copies, span, trainer.plan, trainer.criterion
        self.device, self.dtype, self.nonfinite = trainer.device, trainer.dtype, trainer.nonfinite
        own = slice(span.start, span.stop)
        self.local_modules, self.optimizers = trainer.local_modules[own], trainer.optimizers[own]
        self._programs = current_programs(trainer)[own]
        self._trained = tuple(program.loss is not None for program in self._programs)
        scaled = trainer.device if trainer.precision == "fp16" else None
        self.skipped_steps = [0] * len(span)
        own = self.local_modules, self.optimizers, self.skipped_steps
        self.stepper = Stepper(trainer.stepping, None, *own, scaled, span.start)
        self.module_hits = torch.zeros(len(span), dtype=torch.int64, device=self.device)
        self.watch, self.diverged, self._looked = LossWatch(self, span.start), False, 0.0
        self.begin()

    def begin(self):
        """Of an epoch."""
        self.sums = Sums(self)

    def run(self, batch, first_done=None):
        """Trains every module by a batch. first_done: called when the batch's features are needed no longer.

        Returns:
            The batch for the next stage; its features are None behind the network's last module.
        """
        set_learning_rate_factor(self.optimizers, batch.rate)
        labels, images, inputs, rate = batch.labels, batch.images, [batch.features], batch.rate
        del batch
        losses = torch.full((len(self.span),), torch.nan, dtype=self.dtype, device=self.device)
        for index, program in enumerate(self._programs):
            place, logits = self.span[index], None
            try:
                with among(self.copies):
                    skip, name = self.nonfinite == "skip", f"local module {place}"
                    features, logits, loss = step_module(
                        program, self.stepper, index, inputs, labels, images, skip, name
                    )
            except BaseException as error:
                stepped = self.stepper.drop(index)
                say_where_it_stopped(error, place, len(self.plan.modules), stepped, self.plan, self.device)
                raise
            if index == 0 and first_done is not None:
                first_done()
            if loss is not None:
                losses[index] = loss
                self.module_hits[index] += right_answers(logits, labels, self.criterion.ignore_index)
            inputs.append(None if features is None else dense(features))
        self._note(StepResult(losses[-1], logits, losses, self._trained), labels)
        return Batch(inputs.pop(), labels, images, rate)

    def _note(self, result, labels):
        self.sums.add(result, labels)
        if self.nonfinite == "skip":
            return
        self.watch.note(self.sums.steps, result)
        now = time.monotonic()
        if self.device.type == "cpu" or now - self._looked > LOOKS:
            self.diverged, self._looked = self.watch.first() is not None, now
