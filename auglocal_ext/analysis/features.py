"""A model's features: what each unit puts out for the same images."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ..backbone.eval_mode import evaluating, unlike
from ..backbone.families import as_backbone
from ..backbone.layouts import MAPS, MAPS_LAST, TokenPool
from ..common.checks import check_pair
from ..common.messages import first_line
from ..training.evaluate import Validation

__all__ = ["Features"]


class Features:
    """A model whose units run one after another, in eval mode: no hook is left in it, and one unit's features live at a
    time.

    Args:
        model: what `as_backbone` takes, on the CPU or a GPU.
        before: images -> images, what is done to a loader's images first; None: nothing.

    Attributes:
        names: of the units.

    Raises:
        ValueError, TypeError: the model has no units, see `as_backbone`.
    """

    def __init__(self, model: nn.Module, before=None) -> None:
        self.model, self.before = model, before
        self.backbone = as_backbone(model)
        self.names = [unit.name for unit in self.backbone.units]
        self._checks = Validation(model, channels=self.backbone.image_channels, prefix="")
        self._compared = False

    @contextlib.contextmanager
    def evaluating(self):
        """Within, the model is in eval mode; then as it was."""
        with evaluating([self.model, *(unit.module for unit in self.backbone.units), self.backbone.classifier]):
            yield
        self._checks.raise_faults()

    @torch.no_grad()
    def of(self, batch) -> Iterator[torch.Tensor]:
        """Each unit's features for a loader's batch of (images, labels), in turn; to be called within `evaluating`.

        What one unit put out may be overwritten by the next one.

        Raises:
            TypeError, ValueError: the batch does not fit the model, or the units do not compute what the model does.
        """
        check_pair(batch, "the loader")
        images, _ = self._checks.check(batch)
        x = images if self.before is None else self.before(images)
        wanted = None if self._compared else self._logits(x)
        for unit in self.backbone.units:
            x = unit.module(x)
            yield x
        if wanted is not None:
            self._compared = True
            if said := unlike(self.model, self.backbone.classifier(x), wanted):
                raise ValueError(said)

    def pooled(self, index: int, features: torch.Tensor) -> torch.Tensor:
        """(N, C) of the features of the unit of that index: maps' mean over pixels; of tokens the class token where the
        classifier reads one, else their mean."""
        layout = self.backbone.units[index].layout
        if layout in (MAPS, MAPS_LAST):
            return features.mean((2, 3) if layout == MAPS else (1, 2))
        return TokenPool(self.backbone.class_token)(features)

    def _logits(self, images):
        try:
            return self.model(images)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                f"the model cannot be run on images of shape {tuple(images.shape)}: {first_line(error)}"
            ) from error
