"""What a model makes of a loader's images: its loss, its accuracies, which classes it takes for which."""

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from ..common import checks
from ..common.messages import first_line
from ..distributed.collectives import summed
from .divergence import NotFinite
from .loaders import StoppedBetweenSteps, length_of, move, no_bar, peek, until
from .ranks import any_rank

__all__ = [
    "Evaluation",
    "Validation",
    "check_any",
    "checked_batches",
    "evaluate",
    "evaluated",
    "evaluation",
    "modes_of",
    "restore",
]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluation` returns; `print` shows it as a line.

    Attributes:
        loss: the mean cross-entropy, without label smoothing or weights, whatever the model was trained by.
        top1, top5: accuracies, from 0 to 1; top5 None for fewer than 6 classes.
        images: how many there were.
        confusion: (classes, classes), int64, on the CPU: how many images of the row's class were taken for the
            column's.
    """

    loss: float
    top1: float
    top5: float | None
    images: int
    confusion: torch.Tensor = field(repr=False)

    @property
    def per_class(self) -> list[float | None]:
        """Of each class the share of its images, from 0 to 1, that were taken for it; None for a class without
        images."""
        rows = zip(self.confusion.diagonal().tolist(), self.confusion.sum(1).tolist(), strict=True)
        return [right / images if images else None for right, images in rows]

    def __str__(self) -> str:
        top5 = "" if self.top5 is None else f", top-5 {self.top5:.2%}"
        return f"{self.images:,} images: loss {self.loss:.4f}, top-1 {self.top1:.2%}{top5}"


def modes_of(model):
    return [(module, module.training) for module in model.modules()]


def restore(modes):
    for module, training in modes:
        module.training = training


def evaluate(model: nn.Module, loader: Iterable, *, precision: str = "fp32", progress: bool = False) -> float:
    """The model's accuracy on a loader, in eval mode; the modes are restored.

    Args:
        model: any classifier, images -> (N, classes), evaluated on the device it is on.
        loader: an iterable of (images, labels): images (N, ...), floating point, of the model's dtype, int64 labels
            (N,). Batches on the CPU are moved to the model's device.
        precision: "fp32", or "bf16" or "fp16": under autocast.
        progress: a progress bar.

    Returns:
        The share of images that were taken for their class, from 0 to 1.

    Raises:
        ValueError: a batch or the model's output does not fit, images are not finite, labels are out of range, or there
            is no image.
        TypeError: what the loader gives are no pairs of tensors, or of another dtype.
        FloatingPointError: the model's outputs are not finite.
    """
    return evaluation(model, loader, precision=precision, progress=progress).top1


def evaluation(model: nn.Module, loader: Iterable, *, precision: str = "fp32", progress: bool = False) -> Evaluation:
    """The model's loss, accuracies and confusion matrix on a loader, in eval mode; the modes are restored.

    Args:
        model, loader, precision, progress: see `evaluate`.

    Returns:
        Evaluation

    Raises:
        ValueError, TypeError, FloatingPointError: see `evaluate`.
    """
    checks.check_precision(precision)
    return evaluated(Validation(model, precision), loader, progress, threading.Event())


class Validation:
    """Checks the batches of a validation as a step checks its own, and counts what they come to. What only values tell
    is raised at once on the CPU; on other devices it is flagged, so that nothing waits for them but `raise_faults`.

    Args:
        channels, classes: of the model, where they are known beforehand.
        prefix: of the names in messages.
    """

    def __init__(self, model, precision="fp32", channels=None, classes=None, prefix="validation "):
        self.model, self.precision, self.prefix = model, precision, prefix
        self.channels, self.classes = channels, classes
        first = next(model.parameters(), torch.empty(0))
        self.device, self.dtype = first.device, first.dtype
        self.images, self.confusion = 0, None  # the matrix with the first batch, which tells the classes
        self.hits = torch.zeros((), dtype=torch.int64, device=self.device)  # among the first five
        self.loss = torch.zeros((), dtype=torch.float64, device=self.device)  # of all images together
        self.faults = torch.zeros(3, dtype=torch.bool, device=self.device)  # of images, labels, outputs

    def check(self, batch):
        """The batch on the model's device; raises for what can be told without running the model."""
        checks.check_device(batch, self.device, self.prefix)
        images, labels = batch = move(batch, self.device)
        options = {"channels": self.channels, "half": self.precision != "fp32", "prefix": self.prefix}
        checks.check_batch(images, labels, self.device, self.dtype, **options)
        self._note(0, checks.not_finite(images, self.dtype))
        if self.classes is not None and len(labels):
            self._note(1, checks.out_of_range(labels, self.classes), labels)
        return batch

    def add(self, batch):
        """Runs the model on a batch."""
        images, labels = self.check(batch)
        if not len(images):
            return
        with torch.inference_mode(), checks.autocasting(self.device, self.precision):
            self.judge(self._logits(images), labels)

    def judge(self, logits, labels):
        """Counts a batch's logits."""
        if self.classes is None:
            self.classes = logits.shape[1]
            self._note(1, checks.out_of_range(labels, self.classes), labels)
        # -inf is how classes are masked; a row of nothing else is not.
        self._note(2, (logits.isnan() | (logits == torch.inf)).any() | ~logits.isfinite().any(1).all())
        self._count(logits, labels.clamp(0, self.classes - 1))  # one out of range would end a GPU's context
        self.images += len(labels)

    def _count(self, logits, labels):
        if self.confusion is None:
            self.confusion = torch.zeros(self.classes**2, dtype=torch.int64, device=self.device)
        ranked = logits.topk(min(5, self.classes)).indices
        self.hits += (ranked == labels[:, None]).sum()
        self.confusion.scatter_add_(0, labels * self.classes + ranked[:, 0], torch.ones_like(labels))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        self.loss += F.cross_entropy(logits, labels, reduction="sum")

    def evaluation(self):
        """The Evaluation of every image until now, at least one. Waits for the device."""
        self.raise_faults()
        confusion = self.confusion.view(self.classes, self.classes).cpu().clone()  # no inference tensor
        top1, top5 = (hits / self.images for hits in (confusion.diagonal().sum().item(), self.hits.item()))
        top5 = top5 if self.classes > 5 else None
        return Evaluation(self.loss.item() / self.images, top1, top5, self.images, confusion)

    def sum_up(self):
        """Adds what all ranks have counted, each on its own batches; they must know the classes beforehand."""
        if self.confusion is None:
            self.confusion = torch.zeros(self.classes**2, dtype=torch.int64, device=self.device)
        self.raise_faults()
        parts = [self.confusion, self.hits[None], self.loss[None], self.loss.new_tensor([self.images])]
        total = summed(torch.cat([part.double() for part in parts]), "a validation").split([len(p) for p in parts])
        self.confusion, self.hits = total[0].to(torch.int64), total[1][0].to(torch.int64)
        self.loss, self.images = total[2][0], int(total[3])

    def raise_faults(self):
        """Raises for what is flagged. Waits for the device."""
        for index, fault in enumerate(self.faults.tolist()):
            if fault:
                raise self._error(index)

    def _logits(self, images):
        try:
            logits = self.model(images)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                f"the model cannot be run on {self.prefix}images of shape {tuple(images.shape)}, {images.dtype}: "
                f"{first_line(error)}"
            ) from error
        is_tensor = isinstance(logits, torch.Tensor)
        shape = len(images), self.classes or (logits.shape[-1] if is_tensor and logits.dim() else 1)
        if not is_tensor or logits.shape != shape or not logits.is_floating_point():
            given = f"{tuple(logits.shape)} of {logits.dtype}" if is_tensor else f"a {type(logits).__name__}"
            raise ValueError(
                f"the model must give a row of floating-point outputs per image, ({len(images)}, "
                f"{self.classes or 'classes'}), given {given}"
            )
        return logits

    def _note(self, index, fault, labels=None):
        if self.device.type != "cpu":
            self.faults[index] |= fault
        elif fault:
            raise self._error(index, labels)

    def _error(self, index, labels=None):
        if index == 0:
            return checks.bad_images(self.prefix)
        if index == 1:
            return checks.bad_labels(self.classes, labels, self.prefix)
        return NotFinite(
            f"the model's outputs for {self.prefix}images are NaN or infinite: its weights or running statistics are, "
            f"or are far too large"
        )


def checked_batches(validation, loader, again):
    """The batches of a val_loader, whose first one was checked; again: whether it is gone through more than once."""
    first, batches = peek(loader, "val_loader")
    validation.check(first)
    validation.raise_faults()
    if not isinstance(loader, Iterator):
        return loader
    if again:
        raise ValueError("val_loader can be gone through only once: give a DataLoader or a list, not a generator")
    return batches


def check_any(validation):
    """ValueError where no image was counted."""
    if not validation.images:
        raise ValueError("the validation loader is empty: it gave no image, or it can be gone through only once")


def evaluated(validation, loader, progress, stop, of_all_ranks=False):
    """The Evaluation of a Validation's model on the loader; stop: an Event that ends it by a KeyboardInterrupt.
    of_all_ranks: on the loaders of all ranks together, which are all ended where one is."""
    stopped, modes = False, modes_of(validation.model)
    validation.model.eval()
    bar = tqdm(
        desc="test", total=length_of(loader), unit="batch", leave=False, disable=no_bar(progress), mininterval=0.5
    )
    try:
        for batch in until(stop, loader):
            checks.check_pair(batch, "the validation loader")
            validation.add(batch)
            bar.update()
    except StoppedBetweenSteps:
        if not of_all_ranks:
            raise
        stopped = True
    finally:
        bar.close()
        restore(modes)
    if of_all_ranks:
        if any_rank(stopped):
            raise StoppedBetweenSteps
        validation.sum_up()
    check_any(validation)
    return validation.evaluation()
