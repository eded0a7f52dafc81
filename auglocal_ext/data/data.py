"""What a data source gives."""

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Data"]


@dataclass(frozen=True)
class Data:
    """train, test: iterables of (images, labels); the model to train must have num_classes outputs; description: what
    a use of the trained model must know, mean and std of its images (scaled to 0..1), their size and the names of its
    classes; val: like test, of training images that were held out, None where none were."""

    train: Iterable
    test: Iterable
    num_classes: int
    description: dict
    val: Iterable | None = None
