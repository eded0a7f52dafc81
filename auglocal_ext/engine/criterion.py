"""What local modules' logits are judged by: the loss of every head, and of the classifier."""

import math
import numbers
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import nn

from ..common.memory import tensors_of
from ..common.messages import first_line
from ..common.meta import meta_copy

__all__ = ["PLAIN", "CrossEntropy", "OwnLoss", "as_criterion"]


@dataclass(frozen=True)
class CrossEntropy:
    """The mean cross-entropy of logits (N, K) and labels: (N,), int64, or soft ones, (N, K); as nn.CrossEntropyLoss.

    label_smoothing: from 0 to 1, how much of a target is spread over all classes.
    ignore_index: images of this label do not count.
    class_weights: what each class counts, None: as much as any other.
    weight: class_weights as (K,), where the loss is computed; see `on`.
    """

    label_smoothing: float = 0.0
    ignore_index: int = -100
    class_weights: tuple[float, ...] | None = None
    weight: torch.Tensor | None = field(default=None, compare=False, repr=False)

    def on(self, device, dtype, classes):
        """This loss for a model of so many classes, with its tensors on the model's device and of its dtype; ValueError
        where it does not fit."""
        if self.class_weights is None:
            return self
        if len(self.class_weights) != classes:
            raise ValueError(
                f"criterion's weight must be ({classes},), one number per class of the model, given shape "
                f"({len(self.class_weights)},)"
            )
        return replace(self, weight=torch.tensor(self.class_weights, dtype=dtype, device=device))

    @property
    def tensors(self):
        """What is there all the time."""
        return [] if self.weight is None else [self.weight]

    def __call__(self, logits, labels):
        weight = None if self.weight is None else self.weight.to(logits.dtype)
        given = {} if labels.is_floating_point() else {"ignore_index": self.ignore_index}
        return F.cross_entropy(logits, labels, weight, label_smoothing=self.label_smoothing, **given)

    def __str__(self):
        words = f"label_smoothing={self.label_smoothing:g}"
        if self.ignore_index != PLAIN.ignore_index:
            words += f", ignore_index={self.ignore_index}"
        if self.class_weights is not None:
            words += f", weight={_shown(self.class_weights)}"
        return f"CrossEntropyLoss({words})"


PLAIN = CrossEntropy()


@dataclass(frozen=True)
class OwnLoss:
    """A user's function (logits (N, K), at least float32, labels) -> scalar, differentiated by autograd in the logits.

    It also runs on tensors without data, when a step is planned.
    """

    function: Callable

    def on(self, device, dtype, classes):
        """See `CrossEntropy.on`. A module is moved itself, as its owner would; without data it is a copy."""
        if not isinstance(self.function, nn.Module):
            return self
        without_data = torch.device(device).type == "meta"
        return OwnLoss(meta_copy(self.function) if without_data else self.function.to(device))

    @property
    def ignore_index(self):
        """The module's own, where it has one; None: every label counts."""
        own = getattr(self.function, "ignore_index", None)
        return own if isinstance(own, int) else None

    @property
    def tensors(self):
        """See `CrossEntropy.tensors`."""
        return tensors_of(self.function) if isinstance(self.function, nn.Module) else []

    def __call__(self, logits, labels):
        logits = logits if logits.dtype == torch.float64 else logits.float()
        try:
            value = self.function(logits, labels)
        except Exception as error:
            if not logits.is_meta:
                raise
            raise ValueError(
                f"criterion {self} does not run on logits {tuple(logits.shape)} and labels {tuple(labels.shape)} of "
                f"{labels.dtype} without data, as planning needs it: {first_line(error)}; it may read no values, and "
                f"constant tensors belong into buffers of an nn.Module"
            ) from error
        if not isinstance(value, torch.Tensor) or value.dim() or not value.is_floating_point():
            is_tensor = isinstance(value, torch.Tensor)
            given = f"{tuple(value.shape)} of {value.dtype}" if is_tensor else f"a {type(value).__name__}"
            raise TypeError(f"criterion {self} must return a floating-point scalar, a tensor (), given {given}")
        if logits.requires_grad and not value.requires_grad:
            raise ValueError(
                f"criterion {self} must return what autograd can differentiate in the logits, given a value that does "
                f"not depend on them: leave out .detach(), .item() and argmax"
            )
        return value

    def __str__(self):
        if isinstance(self.function, nn.Module):
            return " ".join(repr(self.function).split())
        return getattr(self.function, "__qualname__", type(self.function).__name__)


def as_criterion(given):
    """A CrossEntropy from None, the plain one, or an nn.CrossEntropyLoss; an OwnLoss from another callable; what is one
    of them is returned itself.

    Raises:
        ValueError, TypeError: it is, or has, what no local module is trained by.
    """
    if isinstance(given, CrossEntropy | OwnLoss):
        return given
    if given is None:
        return PLAIN
    if isinstance(given, type) or not callable(given):
        what = f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__
        raise TypeError(
            f"criterion must be None, a torch.nn.CrossEntropyLoss() or a function (logits, labels) -> scalar, given "
            f"{what}"
        )
    if type(given) is nn.CrossEntropyLoss:
        return _cross_entropy(given)
    trained = given.named_parameters() if isinstance(given, nn.Module) else ()
    for name, parameter in trained:
        if parameter.requires_grad:
            raise ValueError(
                f"criterion {type(given).__name__} has a parameter, {name}, which nothing would train: make it a "
                f"buffer, or call requires_grad_(False)"
            )
    return OwnLoss(given)


def _cross_entropy(given):
    """The CrossEntropy of an nn.CrossEntropyLoss."""
    if given.reduction != "mean":
        raise ValueError(f"criterion must have reduction='mean', given reduction={given.reduction!r}")
    smoothing, ignored = given.label_smoothing, given.ignore_index
    if not isinstance(smoothing, numbers.Real) or not 0 <= smoothing <= 1:
        raise ValueError(f"criterion's label_smoothing must be from 0 to 1, given {smoothing!r}")
    if not isinstance(ignored, int) or isinstance(ignored, bool):
        raise ValueError(f"criterion's ignore_index must be a whole number, given {ignored!r}")
    return CrossEntropy(float(smoothing), ignored, None if given.weight is None else _numbers(given.weight))


def _shown(values):
    """Some numbers; of many, which would fill a screen, how many and a checksum."""
    words = ", ".join(f"{value:g}" for value in values)
    return f"[{words}]" if len(values) <= 10 else f"({len(values)} numbers, {zlib.crc32(words.encode()):08x})"


def _numbers(weight):
    if weight.dim() != 1 or not weight.is_floating_point():
        raise ValueError(
            f"criterion's weight must be (classes,) of floating-point numbers, given {tuple(weight.shape)} of "
            f"{weight.dtype}"
        )
    values = tuple(weight.tolist())
    for value in values:
        if not 0 <= value < math.inf:
            raise ValueError(f"criterion's weight must be finite numbers of at least 0, given {value}")
    return values
