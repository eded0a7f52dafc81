"""A training in parts under way: its epochs, what is told of them, when it stops, where it can go on."""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from ..distributed.collectives import gathered
from ..distributed.faults import named
from ..distributed.group import among
from ..training.divergence import check_learnt
from ..training.limits import is_patience_over
from ..training.lines import epoch_line
from ..training.loaders import length_of, set_epoch
from ..training.ranks import of_all_ranks, tell_of_others
from ..training.rates import ByFunction
from ..training.state import random_state, set_random_state
from ..training.stepping import first_learning_rates, set_first_learning_rates
from .checkpoint import newest
from .trainer import StageTrainer

__all__ = ["Run"]

VALIDATED = "val_loss", "val_accuracy", "val_top5_accuracy"


@dataclass
class Run:
    """A training of `epochs` epochs; the fields are `train_stages`' arguments, but for these:

    batches: of the first epoch, for one time through: its first one was looked at already.
    rates: sets the learning rates.
    validates: whether there is a val_loader, which ranks of other stages than the first do not have.
    progress: whether this rank is to tell.
    """

    trainer: StageTrainer
    loader: Iterable | None
    batches: Iterable | None
    epochs: int
    rates: ByFunction
    val_loader: Iterable | None
    validates: bool
    progress: bool
    on_epoch: Callable | None
    checkpoint: str | Path | None
    patience: int | None
    max_seconds: float | None

    def __post_init__(self):
        self.started = time.monotonic()
        self.history, self.length, self.stopped = [], length_of(self.loader), None
        if self.progress:
            tqdm.write(_plan_line(self.trainer))
        if self.checkpoint is not None and gathered(newest(self.checkpoint) is not None, "the checkpoint's place")[0]:
            self._resume()

    def _resume(self):
        stage, grid = self.trainer.stage, self.trainer.grid
        given = first_learning_rates(stage.optimizers)
        saved = self.trainer.load(self.checkpoint)
        self.history, self.batches = saved["history"], self.loader
        losses, states = self.history[-1]["module_losses"], saved["random"]
        stage.watch.begin_with([losses[index] for index in stage.span])
        if grid.stage == 0 and grid.replica < len(states):
            set_random_state(states[grid.replica], self.trainer.device)
        if len(states) == grid.replicas:
            self.length = saved["length"]
        else:
            tell_of_others(self.checkpoint, len(states), grid.replicas, "pipeline", self.rates.moved)
            set_first_learning_rates(stage.optimizers, given)
        if self.progress:
            tqdm.write(f"going on behind epoch {len(self.history)}/{self.epochs}, from {self.checkpoint}")

    def go(self):
        """Trains until the end, or until it is stopped.

        Raises:
            NotFinite: the training diverged.
        """
        self._stop_if_patience_is_over()
        while len(self.history) < self.epochs and not self.stopped:
            self._epoch(len(self.history))
            self._stop_if_patience_is_over()
            self._stop_if_time_is_over()
        if not self.stopped:
            check_learnt(self.history, self.trainer)

    def _stop_if_patience_is_over(self):
        if len(self.history) < self.epochs and is_patience_over(self.history, self.patience):
            self.stopped = "patience"

    def _stop_if_time_is_over(self):
        if self.max_seconds is None or self.stopped or len(self.history) == self.epochs:
            return
        over = time.monotonic() - self.started >= self.max_seconds
        if gathered(over, "the time that is left")[0]:  # by rank 0's clock
            self.stopped = "max_seconds"

    def _epoch(self, epoch):
        trainer, reads = self.trainer, self.trainer.grid.stage == 0
        if reads:
            set_epoch(self.loader, epoch)
        before_step = partial(_set_rates, self.rates, epoch, self.length)
        entry = trainer.epoch(self.batches, before_step, f"epoch {epoch + 1}/{self.epochs}")
        self.batches, self.length = self.loader, trainer.stage.sums.steps
        validated = dict.fromkeys(VALIDATED)
        if self.validates:
            if reads:
                set_epoch(self.val_loader, epoch)
            found = trainer.evaluate(self.val_loader)
            validated = dict(zip(VALIDATED, (found.loss, found.top1, found.top5), strict=True))
        self.history.append({"epoch": epoch + 1, **asdict(entry), **validated})
        if self.progress:
            tqdm.write(epoch_line(self.history[-1], self.epochs, None))
        if self.checkpoint is not None:
            more = {"history": self.history, "length": self.length, "random": _random_states(trainer)}
            trainer.save(self.checkpoint, **more)
        if self.on_epoch is not None:
            self.on_epoch(dict(self.history[-1]))


def _set_rates(rates, epoch, length, step):
    rates.before_step(epoch, step, length)


def _random_states(trainer):
    """Of the first stage of every pipeline, whose loader draws; None on ranks of other stages."""
    if trainer.grid.stage:
        return None
    with among(trainer.grid.copies):
        return of_all_ranks(random_state(trainer.device))


def _plan_line(trainer):
    parts = [
        f"{named(ranks)}: local modules {span.start} to {span.stop - 1}"
        for ranks, span in zip(trainer.grid.columns, trainer.spans, strict=True)
    ]
    return f"{trainer.plan.title}\n{trainer.schedule}; {'; '.join(parts)}"
