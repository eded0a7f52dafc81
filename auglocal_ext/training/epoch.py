"""One epoch of steps, what it sums up, and the memory of its highest."""

import contextlib
import time
import warnings

import torch

from ..common import checks
from ..common.memory import LiveBytes, bytes_of
from .batch import counted
from .loaders import move
from .ranks import any_rank, in_step, totals

__all__ = ["PeakMeter", "Sums", "check_any_seen", "is_skipped", "train_epoch"]


class Sums:
    """What an epoch has come to so far; it can be put away in the middle and gone on from.

    Attributes:
        losses: (modules,), the sum of each module's losses times images that count, where they are finite.
        counted: (modules,), int64: of how many images.
        judged: (), int64: how many images counted: all but those whose label the criterion ignores.
        steps, seen: how many steps there were, and images.
        trained: of each module, whether a step had a loss of it; of one whose units are all frozen none has.
        seconds: that they took.
        over: whether the loader has no more.
    """

    def __init__(self, trainer, saved=None):
        self.trainer = trainer
        modules, device = len(trainer.local_modules), trainer.device
        self.losses = torch.zeros(modules, dtype=trainer.dtype, device=device)
        self.counted = torch.zeros(modules, dtype=torch.int64, device=device)
        self.judged = torch.zeros((), dtype=torch.int64, device=device)
        self.steps = self.seen = 0
        self.trained = [False] * modules
        self.seconds, self.over = 0.0, False
        trainer.module_hits.zero_()
        self.skipped_before = sum(trainer.skipped_steps)
        if saved is not None:
            tensors = (self.losses, "losses"), (self.counted, "counted"), (self.judged, "judged")
            for tensor, name in (*tensors, (trainer.module_hits, "hits")):
                tensor.copy_(saved[name])
            self.steps, self.seen, self.over = saved["steps"], saved["seen"], saved["over"]
            self.seconds = saved["seconds"]
            self.trained = saved.get("trained", (self.counted > 0).tolist())  # which older ones do not tell
            self.skipped_before -= saved["skipped"]

    def state_dict(self):
        return {
            "losses": self.losses,
            "counted": self.counted,
            "judged": self.judged,
            "hits": self.trainer.module_hits,
            "steps": self.steps,
            "seen": self.seen,
            "seconds": self.seconds,
            "over": self.over,
            "skipped": self.skipped,
            "trained": self.trained,
        }

    @staticmethod
    def shared_out(states, rank, ranks):
        """Of the `state_dict`s of some ranks, what one of another number of ranks has: together they come to the
        same."""
        own, added = states[rank::ranks], ("losses", "counted", "judged", "hits", "seen")
        return states[0] | {name: sum((state[name] for state in own), 0 * states[0][name]) for name in added}

    @property
    def skipped(self):
        return sum(self.trainer.skipped_steps) - self.skipped_before

    def add(self, result, labels):
        """After a step of images with these labels: its StepResult."""
        losses = result.module_losses
        self.trained = [before or now for before, now in zip(self.trained, result.trained, strict=True)]
        finite, count = losses.isfinite(), counted(labels, self.trainer.criterion.ignore_index)
        self.losses += torch.where(finite, losses, 0) * count
        self.counted += finite * count
        self.judged += count
        self.seen, self.steps = self.seen + len(labels), self.steps + 1

    def entry(self, epoch, peak):
        """The history's entry of the epoch, from 1, of all ranks together. Waits for the device."""
        losses, counted, hits, judged, seen, seconds, peak = totals(self, peak)
        means = (losses / counted).tolist(), (hits / judged).tolist()
        losses, hits = ([x if t else None for x, t in zip(mean, self.trained, strict=True)] for mean in means)
        return {
            "epoch": epoch,
            "loss": losses[-1],
            "module_losses": losses,
            "train_accuracy": hits[-1],
            "module_accuracies": hits,
            "val_loss": None,
            "val_accuracy": None,
            "val_top5_accuracy": None,
            "images_per_second": seen / seconds,
            "seconds": seconds,
            "lr": self.trainer.optimizers[0].param_groups[0]["lr"],
            "skipped_steps": self.skipped,
            "peak_bytes": peak,
        }


def train_epoch(trainer, batches, title, sums, before_step, after_update, meter, stop, after_step):
    """Steps over batches, to the end or until `stop` is set; adds to sums.

    before_step: called with a batch's number, from 0, where the optimizers step by it or by a group that it begins.
    after_update: called after the optimizers have stepped.
    after_step: StepResult -> whatever is to be done between two steps.
    """
    started = time.perf_counter() - sums.seconds
    for batch in in_step(stop, batches):  # no enumerate(): it keeps its last value until the next is there
        checks.check_pair(batch, "the loader")
        checks.check_device(batch, trainer.device, "the loader's ")
        batch = images, labels = move(batch, trainer.device)  # no second name keeps the loader's own tensors
        trainer.check_images(images)
        if is_skipped(images, title):
            continue
        if not trainer.stepper.count:
            before_step(sums.steps)
        trainer.plan_for(images, labels)  # outside of what is measured
        with meter(images, labels):
            result = trainer.step(images, labels)
        if not trainer.stepper.count:
            after_update()
        sums.add(result, labels)
        sums.seconds = time.perf_counter() - started
        del batch, images, labels
        after_step(result)
        del result
    if trainer.stepper.count:  # a group that is not whole
        with meter():
            trainer.flush()
        after_update()
    sums.over = True
    check_any_seen(sums, title)
    trainer.check()  # waits for the device, which is part of the time
    sums.seconds = time.perf_counter() - started


def is_skipped(images, title):
    """Whether no rank trains on its batch, because one of them is too small, which is said."""
    if not any_rank(len(images) == 1):
        return False
    warnings.warn(
        f"{title}: a batch of one image is skipped, BatchNorm needs at least two; use drop_last=True or another batch "
        f"size",
        stacklevel=4,
    )
    return True


def check_any_seen(sums, title):
    """ValueError where an epoch had no step."""
    if not sums.seen:
        raise ValueError(f"the loader gave no batch of two images or more in {title}: it must give some in every epoch")


class PeakMeter:
    """`with meter(*batch):` around each step, `with meter():` around one that no batch is needed for; `peak` is the
    highest memory seen."""

    def __init__(self, trainer):
        self.trainer, self.cuda = trainer, trainer.device.type == "cuda"
        self.peak, self._steps, self._plan, self._others = 0, 0, None, 0

    @contextlib.contextmanager
    def __call__(self, *batch):
        if self._plan is not self.trainer.plan:  # a step of another kind, as after parts were unfrozen
            self._steps, self._plan = 0, self.trainer.plan
        self._steps += bool(batch)
        if self.cuda:
            device = self.trainer.device
            if self._steps <= 2 * self.trainer.stepping.accumulate:  # until all optimizer state exists
                own = bytes_of({*self.trainer.tensors(), *batch})
                self._others = max(0, torch.cuda.memory_allocated(device) - own)  # a loader's images, for instance
            torch.cuda.reset_peak_memory_stats(device)  # an evaluation's peak is none of a step
            yield
            self.peak = max(self.peak, torch.cuda.max_memory_allocated(device) - self._others)
        elif self._steps > 2 * self.trainer.stepping.accumulate:
            # Counting slows a step down; in the second group of batches, when all optimizer state exists, they are like
            # later ones.
            yield
        else:
            with LiveBytes([*self.trainer.tensors(), *batch]) as live:
                yield
            self.peak = max(self.peak, live.peak)
