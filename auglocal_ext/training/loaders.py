"""Batches from a loader: the first one, how many, on the model's device, until somebody says stop."""

import contextlib
import signal
import threading

import torch

from ..common import checks

__all__ = [
    "StoppedBetweenSteps",
    "interrupt_sets",
    "is_resumable",
    "length_of",
    "move",
    "no_bar",
    "peek",
    "set_epoch",
    "until",
]


def peek(loader, name):
    """The first batch, and an iterable of all of them for one time through."""
    # Not isinstance(..., Iterable): what has __getitem__ alone can be gone through too.
    if not any(hasattr(type(loader), method) for method in ("__iter__", "__getitem__")):
        raise TypeError(f"{name} must be an iterable of (images, labels), given {type(loader).__name__}")
    batches = iter(loader)
    try:
        first = next(batches)
    except StopIteration:
        raise ValueError(f"{name} is empty: it gave no batch") from None
    checks.check_pair(first, name)
    return first, _chain([first], batches)


def _chain(first, batches):
    """itertools.chain, but without keeping the first batch once it was given."""
    while first:
        yield first.pop()
    yield from batches


def length_of(loader):
    """Batches per epoch, None where the loader cannot tell, as one over an IterableDataset: whatever it raises then."""
    try:
        return len(loader)
    except Exception:
        return None


def is_resumable(loader):
    """Whether a loader can tell where it is within an epoch, and go on there."""
    return all(callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict"))


def set_epoch(loader, epoch):
    """Tells a loader, or its sampler, which epoch comes next, from 0: as torch's DistributedSampler wants it."""
    for one in (loader, getattr(loader, "sampler", None)):
        if callable(getattr(one, "set_epoch", None)):
            one.set_epoch(epoch)
            return


def no_bar(progress):
    """tqdm's `disable`: a bar only where there is a terminal to draw it on."""
    return None if progress else True


def move(batch, device):
    """A batch on the model's device; images in channels_last, which convolutions are fastest in."""
    images, labels = batch
    if images.dim() == 4:
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
    else:
        images = images.to(device, non_blocking=True)
    return images, labels.to(device, non_blocking=True)


@contextlib.contextmanager
def interrupt_sets(stop):
    """Within, a first Ctrl-C sets `stop`, to be acted on between steps; a second one interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_interrupt(signum, frame):
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


class StoppedBetweenSteps(KeyboardInterrupt):
    """Ctrl-C, acted on where everything is whole."""


def until(stop, batches):
    """The batches, until `stop` is set: then StoppedBetweenSteps, also where the wait for a batch failed by it
    (a DataLoader's worker processes get the Ctrl-C too, and die in the middle of sending one). A batch that was drawn
    is given all the same, so that the loader's place is that of what was done."""
    batches, end = iter(batches), object()
    while True:
        try:
            batch = end if stop.is_set() else next(batches, end)
        except Exception:
            if stop.is_set():
                raise StoppedBetweenSteps from None
            raise
        if batch is end:
            break
        held = [batch]
        del batch
        yield held.pop()  # no name here keeps a batch past its step
    if stop.is_set():
        raise StoppedBetweenSteps
