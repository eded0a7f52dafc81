"""A stage: the local modules of one rank, and what is kept of them alone."""

from dataclasses import replace

import torch

from ..distributed.group import on_its_own
from ..engine.tensors import dense
from ..training.batch import counted, right_answers
from ..training.errors import say_where_it_stopped
from ..training.planned import current_programs
from ..training.stepping import Stepper, set_learning_rate_factor, step_module
from .link import Batch

__all__ = ["Stage"]


class Stage:
    """Takes over a range of a LocalTrainer's local modules, whose plan is made.

    Attributes:
        losses: (modules,): sums over the batches since `clear`. seen: their images; counted: those that hits are out
            of. hits: (modules,), right answers of each module's head.
    """

    def __init__(self, trainer, span):
        self.span, self.plan, self.device = span, trainer.plan, trainer.device
        self.modules = trainer.local_modules[span.start : span.stop]
        self.optimizers = trainer.optimizers[span.start : span.stop]
        self._programs = current_programs(trainer)[span.start : span.stop]
        self._ignored, self._skip = trainer.criterion.ignore_index, trainer.nonfinite == "skip"
        settings = replace(trainer.stepping, ranks=1)
        scaled = trainer.device if trainer.precision == "fp16" else None
        self.skipped_steps = [0] * len(span)
        self.stepper = Stepper(settings, None, self.modules, self.optimizers, self.skipped_steps, scaled)
        self._dtype = trainer.dtype
        self.clear()

    def clear(self):
        self.losses = torch.zeros(len(self.span), dtype=self._dtype, device=self.device)
        self.hits = torch.zeros(len(self.span), dtype=torch.int64, device=self.device)
        self.seen, self.counted = 0, torch.zeros((), dtype=torch.int64, device=self.device)

    def run(self, batch, first_done=None):
        """Trains every module by a batch. first_done: called when the batch's features are needed no longer.

        Returns:
            The batch for the next stage; its features are None behind the network's last module.
        """
        set_learning_rate_factor(self.optimizers, batch.rate)
        labels, images, inputs = batch.labels, batch.images, [batch.features]
        count, rate = len(labels), batch.rate
        del batch
        for index, program in enumerate(self._programs):
            place = self.span[index]
            try:
                with on_its_own():  # of what other ranks are to know, the links tell them
                    features, logits, loss = step_module(
                        program, self.stepper, index, inputs, labels, images, self._skip, f"local module {place}"
                    )
            except BaseException as error:
                stepped = self.stepper.drop(index)
                say_where_it_stopped(error, place, len(self.plan.modules), stepped, self.plan, self.device)
                raise
            if index == 0 and first_done is not None:
                first_done()
            if loss is not None:
                self.losses[index] += loss * count
                self.hits[index] += right_answers(logits, labels, self._ignored)
            inputs.append(None if features is None else dense(features))
        self.seen += count
        self.counted += counted(labels, self._ignored)
        return Batch(inputs.pop(), labels, images, rate)
