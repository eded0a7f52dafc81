"""MixUp and CutMix: batches whose images are mixed, and their labels with them."""

from collections.abc import Iterable, Iterator

import torch

from ..common.checks import at_least_0
from ..common.torchvision import import_torchvision

__all__ = ["Mixed"]


class Mixed:
    """A loader whose batches are mixed by torchvision's transforms: MixUp (Zhang et al. 2018, arXiv:1710.09412), CutMix
    (Yun et al. 2019, arXiv:1905.04899), or where both are given one of them for each batch.

    An iterable of (images, labels): images as the loader gives them, labels (N, classes), float32. What is drawn is
    drawn from torch's own generator, whose state a training keeps, so that one that was stopped goes on alike.

    Args:
        loader: an iterable of (images, labels), labels (N,), int64, a DataLoader for instance. What else it has, such
            as `set_epoch`, a `sampler`, or the `state_dict` that its place is kept by, this one has too.
        classes: how many there are.
        mixup, cutmix: alpha of the Beta distribution that shares are drawn from, 0: not to be done.

    Raises:
        ValueError: one of them is below 0 or not finite, or neither is above 0.
        ImportError: torchvision does not import.
    """

    def __init__(self, loader: Iterable, classes: int, mixup: float = 0.0, cutmix: float = 0.0) -> None:
        v2 = import_torchvision("MixUp and CutMix").transforms.v2
        given = (v2.MixUp, at_least_0(mixup, "mixup")), (v2.CutMix, at_least_0(cutmix, "cutmix"))
        made = [kind(alpha=alpha, num_classes=classes) for kind, alpha in given if alpha]
        if not made:
            raise ValueError("mixup or cutmix must be above 0, given 0 for both: use the loader as it is")
        self.loader, self._mix = loader, made[0] if len(made) == 1 else v2.RandomChoice(made)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type] # of one that has a length

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return map(self._mix, self.loader)

    def __getattr__(self, name: str):
        if name.startswith("_") or name == "loader":  # which is not there yet where one is copied
            raise AttributeError(f"Mixed has no attribute {name!r}")
        return getattr(self.loader, name)
