"""A training under way: its epochs, what is told of them, when it stops, where it can go on."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from tqdm import tqdm

from ..common.memory import process_bytes
from .checkpoint import Checkpoints
from .divergence import LossWatch, check_finite, check_learnt, check_values, names_not_finite
from .epoch import PeakMeter, Sums, train_epoch
from .limits import is_patience_over
from .lines import duration, epoch_line, memory_line
from .loaders import StoppedBetweenSteps, interrupt_sets, length_of, no_bar, set_epoch
from .ranks import any_rank, spread_buffers
from .rates import ByFunction, BySchedulers
from .result import TrainResult
from .trainer import LocalTrainer

__all__ = ["Run"]


class _OutOfTime(Exception):
    """max_seconds are over; between two steps."""


@dataclass
class Run:
    """A training of `epochs` epochs; the fields are `train`'s arguments, but for these:

    batches: of the first epoch, for one time through: its first one was looked at already.
    rates: `ByFunction` or `BySchedulers`.
    validate: (model, epoch from 0, stop) -> Evaluation, or None.
    """

    trainer: LocalTrainer
    loader: object
    batches: object
    epochs: int
    rates: ByFunction | BySchedulers
    validate: Callable | None
    progress: bool
    on_step: Callable | None
    on_epoch: Callable | None
    patience: int | None
    max_seconds: float | None
    keep_aux_nets: bool
    checkpoints: Checkpoints | None

    def __post_init__(self):
        self.started = time.monotonic()
        self.meter, self.stop = PeakMeter(self.trainer), threading.Event()
        self.odd, self.watch = names_not_finite(self.trainer), LossWatch(self.trainer)
        self.history, self.sums, self.stopped = [], None, None
        self.length = length_of(self.loader)
        self._memory_is_told = False
        self._steps_done = 0  # by this process, for the time that is left
        if self.checkpoints is not None:
            self._resume()

    def _resume(self):
        found = self.checkpoints.restore(self.trainer, self.epochs, self.rates)
        if found is None:
            if self.progress and not self.checkpoints.within_epochs:
                tqdm.write("checkpoints are written at the ends of epochs only: the loader has no state_dict")
            return
        self.history, self.length = found.history, found.length
        if found.batches is not None:
            self.batches = found.batches
        if self.history:
            self.watch.begin_with(self.history[-1]["module_losses"])
        self.meter.peak = found.peak
        where = f"behind epoch {len(self.history)}/{self.epochs}"
        if found.sums:
            self.sums = Sums(self.trainer, found.sums)
            where = f"in {self._title()}, behind step {self.sums.steps}"
        if self.progress:
            tqdm.write(f"going on {where}, from {self.checkpoints.folder}")

    def _title(self):
        return f"epoch {len(self.history) + 1}/{self.epochs}"

    def result(self):
        aux_nets = self.trainer.aux_nets if self.keep_aux_nets else None
        peak, process = self.meter.peak, process_bytes(self.trainer.device)
        ema_model = self.trainer.ema_model
        return TrainResult(self.history, self.trainer.plan, peak, aux_nets, process, self.stopped, ema_model)

    def go(self):
        """Trains until the end, or until it is stopped.

        Raises:
            NotFinite: the training diverged.
            KeyboardInterrupt: Ctrl-C.
        """
        self._stop_if_patience_is_over()
        try:
            with interrupt_sets(self.stop):
                while len(self.history) < self.epochs and not self.stopped:
                    self._epoch()
        except StoppedBetweenSteps:
            self._save_within()
            spread_buffers(self.trainer)
            raise
        except _OutOfTime:
            self._check_within()
            self._save_within()
            spread_buffers(self.trainer)
            self.stopped = "max_seconds"
        if self.history and not self.stopped:
            check_learnt(self.history, self.trainer)

    def _epoch(self):
        epoch, trainer = len(self.history), self.trainer
        if self.sums is None:
            self.sums = Sums(trainer)
            if epoch:
                set_epoch(self.loader, epoch)
        with self._bar() as bar:
            self._shown = time.perf_counter()
            train_epoch(
                trainer, self.batches, self._title(), self.sums,
                lambda step: self.rates.before_step(epoch, step, self.length), self.rates.after_step,
                self.meter, self.stop, lambda result: self._after_step(result, bar),
            )  # fmt: skip
        check_values(trainer, self.watch, self.sums, self.odd, self._title())
        spread_buffers(trainer)
        if self.checkpoints is not None:
            self.checkpoints.at_the_end(trainer)
        self.batches, self.length = self.loader, self.sums.steps
        entry = self.sums.entry(epoch + 1, self.meter.peak)
        if self.validate is not None:
            entry |= self._validated(trainer.model, epoch)
            if trainer.ema_model is not None:
                entry |= self._validated(trainer.ema_model, epoch, "ema_")
        self.rates.after_epoch(entry)
        self.history.append(entry)
        self.sums = None
        if self.progress:
            tqdm.write(epoch_line(entry, self.epochs, self._seconds_left()))
        if self.progress and not self._memory_is_told and self._steps_done > 1:  # the first has no optimizer state yet
            self._memory_is_told = True
            tqdm.write(memory_line(self.trainer.plan, self.meter.peak, process_bytes(trainer.device)))
        if self.on_epoch is not None:
            self.on_epoch(dict(entry))
        if self.checkpoints is not None:
            self._save(None)
        self._stop_if_patience_is_over()

    def _validated(self, model, epoch, prefix=""):
        """The history's entries of a model's validation."""
        found = self.validate(model, epoch, self.stop)
        named = {"val_loss": found.loss, "val_accuracy": found.top1, "val_top5_accuracy": found.top5}
        return {prefix + name: value for name, value in named.items()}

    def _after_step(self, result, bar):
        self._steps_done += 1
        if self.trainer.nonfinite == "stop":
            self.watch.note(self.sums.steps, result)
            if self.trainer.device.type == "cpu":
                self.watch.check(self._title())
        bar.update()
        now = time.perf_counter()
        if not bar.disable and now - self._shown > 1:  # seconds: reading a value waits for the device
            self.trainer.check()
            self.watch.check(self._title())
            bar.set_postfix(loss=f"{result.loss.item():.3f}", left=duration(self._seconds_left()), refresh=False)
            self._shown = now
        if self.on_step is not None:
            self.on_step(len(self.history) + 1, self.sums.steps, result)
        if self.max_seconds is not None and any_rank(time.monotonic() - self.started >= self.max_seconds):
            raise _OutOfTime
        if self.checkpoints is not None and self.checkpoints.within_epochs and any_rank(self.checkpoints.due()):
            self._save_within()

    def _save_within(self):
        """A checkpoint within the epoch, where there is anything to go on from."""
        if self.checkpoints is None or not self.checkpoints.within_epochs or not self.sums or not self.sums.steps:
            return
        self._check_within()
        self._save(self.sums)

    def _check_within(self):
        self.trainer.check()
        self.watch.check(self._title())
        check_finite(self.trainer, self.odd, self._title())

    def _save(self, sums):
        self.checkpoints.save(self.trainer, self.rates, self.history, sums, self.meter.peak, self.length)

    def _stop_if_patience_is_over(self):
        if len(self.history) < self.epochs and is_patience_over(self.history, self.patience):
            self.stopped = "patience"

    def _bar(self):
        bar = tqdm(
            unit="batch",
            total=self.length,
            initial=self.sums.steps,
            leave=False,
            disable=no_bar(self.progress),
            mininterval=0.5,
        )
        bar.set_description(self._title())
        return bar

    def _seconds_left(self):
        """Of the whole training, validation included, by what the steps of this process took; None: not known."""
        if not self.length or not self._steps_done:
            return None
        steps = self.length * (self.epochs - len(self.history)) - (self.sums.steps if self.sums else 0)
        return (time.monotonic() - self.started) / self._steps_done * steps
