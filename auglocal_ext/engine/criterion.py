"""What local modules' logits are judged by: the loss of every head, and of the classifier."""

import numbers
from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

__all__ = ["PLAIN", "CrossEntropy", "as_criterion"]


@dataclass(frozen=True)
class CrossEntropy:
    """The mean cross-entropy of logits (N, K) and labels (N,), int64.

    label_smoothing: from 0 to 1, how much of a target is spread over all classes, as in nn.CrossEntropyLoss.
    """

    label_smoothing: float = 0.0

    def __call__(self, logits, labels):
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    def __str__(self):
        return f"CrossEntropyLoss(label_smoothing={self.label_smoothing:g})"


PLAIN = CrossEntropy()


def as_criterion(given):
    """A CrossEntropy from None, the plain one, an nn.CrossEntropyLoss, or itself.

    Raises:
        ValueError, TypeError: it is, or has, what no local module is trained by.
    """
    supported = (
        "criterion must be None or torch.nn.CrossEntropyLoss() with no argument but label_smoothing, from 0 to 1"
    )
    if isinstance(given, CrossEntropy):
        return given
    if given is None:
        return PLAIN
    if type(given) is not nn.CrossEntropyLoss:
        what = (
            f"the class {given.__name__}"
            if isinstance(given, type)
            else getattr(given, "__name__", type(given).__name__)
        )
        raise TypeError(f"{supported}, given {what}")
    for name, expected in (("weight", None), ("ignore_index", -100), ("reduction", "mean")):
        value = getattr(given, name)
        if value is not expected and (expected is None or value != expected):
            shown = "class weights" if name == "weight" else f"{name}={value!r}"
            raise ValueError(f"{supported}, given {shown}")
    smoothing = given.label_smoothing
    if not isinstance(smoothing, numbers.Real) or not 0 <= smoothing <= 1:
        raise ValueError(f"{supported}, given label_smoothing={smoothing!r}")
    return CrossEntropy(float(smoothing))
