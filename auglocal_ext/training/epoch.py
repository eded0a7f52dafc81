"""One epoch of steps, and the memory of its highest."""

import contextlib
import math
import time
import warnings

import torch

from ..common import checks
from ..common.memory import LiveBytes
from .divergence import NotFinite
from .loaders import move, until

__all__ = ["PeakMeter", "factor_at", "train_epoch"]


def factor_at(schedule, epoch, epochs, length):
    """Step -> the schedule's factor; in the middle of the epoch where its length is not known yet."""

    def factor(step):
        at = epoch + (step / length if length else 0.5)
        expected = f"schedule(epoch, epochs) must return, at epoch {at:g} of {epochs},"
        return checks.learning_rate_factor(schedule(at, epochs), expected)

    return factor


def train_epoch(trainer, batches, epoch, epochs, factor, meter, bar, stop):
    losses = correct = torch.zeros((), device=trainer.device)
    seen = steps = 0
    started = shown = time.perf_counter()
    title = f"epoch {epoch + 1}/{epochs}"
    for batch in until(stop, batches):  # no enumerate(): it keeps its last value until the next is there
        checks.check_pair(batch, "the loader")
        checks.check_device(batch, trainer.device, "the loader's ")
        batch = images, labels = move(batch, trainer.device)  # no second name keeps the loader's own tensors
        bar.update()
        trainer.check_images(images)
        if len(images) == 1:
            warnings.warn(
                f"{title}: a batch of one image is skipped, BatchNorm needs at least two; use drop_last=True or "
                f"another batch size",
                stacklevel=3,
            )
            continue
        trainer.set_learning_rate_factor(factor(steps))
        trainer.plan_for(images)  # outside of what is measured
        with meter(images, labels):
            result = trainer.step(images, labels)
        losses = losses + result.module_losses * len(images)
        correct = correct + (result.logits.argmax(1) == labels).sum()
        seen, steps = seen + len(images), steps + 1
        if not bar.disable and time.perf_counter() - shown > 1:  # seconds: reading a value waits for the device
            trainer.check()
            bar.set_postfix(loss=f"{result.loss.item():.3f}", refresh=False)
            shown = time.perf_counter()
        del batch, images, labels, result
    if not seen:
        raise ValueError(f"the loader gave no batch of two images or more in {title}: it must give some in every epoch")
    mean_losses = (losses / seen).tolist()
    seconds = time.perf_counter() - started
    trainer.check()
    for index, loss in enumerate(mean_losses):
        if not math.isfinite(loss):
            raise NotFinite(f"{title}: the loss of local module {index} is {loss}")
    entry = {
        "epoch": epoch + 1,
        "loss": mean_losses[-1],
        "module_losses": mean_losses,
        "train_accuracy": (correct / seen).item(),
        "val_loss": None,
        "val_accuracy": None,
        "val_top5_accuracy": None,
        "images_per_second": seen / seconds,
        "seconds": seconds,
        "lr": trainer.optimizers[0].param_groups[0]["lr"],
        "peak_bytes": meter.peak,
    }
    return entry, steps


class PeakMeter:
    """`with meter(*batch):` around each step; `peak` is the highest memory seen."""

    def __init__(self, trainer):
        self.trainer, self.cuda = trainer, trainer.device.type == "cuda"
        self.peak, self._steps = 0, 0

    @contextlib.contextmanager
    def __call__(self, *batch):
        self._steps += 1
        if self.cuda:
            device = self.trainer.device
            torch.cuda.reset_peak_memory_stats(device)  # an evaluation's peak is none of a step
            yield
            self.peak = max(self.peak, torch.cuda.max_memory_allocated(device))
        elif self._steps > 2:
            # Counting slows a step down; the second one, when all optimizer state exists, is like every later one.
            yield
        else:
            with LiveBytes([*self.trainer.tensors(), *batch]) as live:
                yield
            self.peak = max(self.peak, live.peak)
