"""What a data source gives."""

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Data"]


@dataclass(frozen=True)
class Data:
    """What a data source gives; see `load`.

    Attributes:
        train, test: iterables of (images, labels): images (N, C, H, W), float32, normalised; labels (N,), int64.
        num_classes: of the labels; the model to train must have as many outputs.
        description: what a use of the trained model must know: "mean" and "std" of its images (scaled to 0..1),
            "image_size", [height, width], and "classes", their names.
        val: like test, of training images that were held out; None where none were.
    """

    train: Iterable
    test: Iterable
    num_classes: int
    description: dict
    val: Iterable | None = None
