"""What the ranks of a real layer parallel training did when: the same events as of a simulated one."""

import contextlib
import time
from collections.abc import Iterator

import torch

from ..distributed.collectives import gathered
from ..engine.emit import Phase
from .events import Event
from .trainer import StageTrainer

__all__ = ["traced", "tracing"]


@contextlib.contextmanager
def tracing(trainer: StageTrainer) -> Iterator[list[Event]]:
    """Within, notes what this rank does, in the list that it yields; batches are numbered from 0. A "send" is the time
    that the rank itself spends on it: the copy, and the wait for a free buffer. Waits for a GPU at every note.

    Times are those of the machine's monotonic clock, in seconds; see `traced`.
    """
    notes = _Notes(trainer)
    try:
        yield notes.events
    finally:
        notes.end()


def traced(events: list[Event]) -> list[Event]:
    """The events of all ranks, which all call this with their own, from the moment on at which the first begins. The
    ranks must be on one machine, whose clock they share."""
    found = [event for of_rank in gathered(events, "the trace of every rank") for event in of_rank]
    begin = min(event.start for event in found)
    return [event._replace(start=event.start - begin, end=event.end - begin) for event in found]


class _Notes:
    """Stands before what a rank does, on its objects alone."""

    def __init__(self, trainer):
        self.events, self._device, self._rank = [], trainer.device, trainer.grid.rank
        self._batch, self._began, self._turn = -1, 0.0, None
        self._stepper, self._sender = trainer.stage.stepper, trainer._sender
        self._programs = trainer.stage._programs
        self._real = self._stepper.before, self._stepper.after
        self._stepper.before, self._stepper.after = self._before, self._after
        for program in self._programs:
            program.execute = self._execute
        if self._sender is not None:
            self._sender.send = self._send

    def end(self):
        """Steps aside."""
        del self._stepper.before, self._stepper.after
        for program in self._programs:
            del program.execute
        if self._sender is not None:
            del self._sender.send

    def _before(self, index, **options):
        self._batch += index == 0
        self._began, self._turn = self._now(), None
        self._real[0](index, **options)

    def _execute(self, step, values):
        if self._turn is None and step.phase is Phase.BACKWARD:
            self._turn = self._now()
        type(self._programs[0]).execute(step, values)

    def _after(self, index, loss):
        begin = self._now()
        self._note("forward", self._began, self._turn or begin)
        if self._turn is not None:
            self._note("backward", self._turn, begin)
        self._real[1](index, loss)
        self._note("step", begin, self._now())

    def _send(self, batch):
        begin = self._now()
        type(self._sender).send(self._sender, batch)
        if batch.features is not None:  # else it ends the epoch
            self._note("send", begin, self._now())

    def _note(self, what, start, end):
        self.events.append(Event(self._rank, self._batch, what, start, end))

    def _now(self):
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # a receive may be waiting in another one
        return time.monotonic()
