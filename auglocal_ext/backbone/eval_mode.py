"""A backbone's units in eval mode: they are read from a forward as it is in training mode."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from .segment import Segment

__all__ = ["evaluating", "unlike"]


@contextlib.contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within, the modules are in eval mode, and so are functions such as F.dropout(x, training=self.training) in pieces
    of a model's graph; then all is as it was."""
    parts = list(dict.fromkeys(part for module in modules for part in module.modules()))
    modes = [(part, part.training) for part in parts]
    nodes = [node for part in parts if isinstance(part, Segment) for node in part.graph.nodes]
    training = [node for node in nodes if node.kwargs.get("training") is True]
    try:
        for part in parts:
            part.training = False
        for node in training:
            node.update_kwarg("training", False)
        yield
    finally:
        for part, mode in modes:
            part.training = mode
        for node in training:
            node.update_kwarg("training", True)


def unlike(model: nn.Module, found: torch.Tensor, wanted: torch.Tensor) -> str | None:
    """Whether the logits that a model's units made in eval mode are other ones than its own, as a sentence, or None."""
    close = {torch.float64: 1e-9, torch.float32: 1e-3}.get(wanted.dtype, 0.1)
    largest = float(wanted.nan_to_num(0, 0, 0).abs().amax())
    if torch.allclose(found, wanted, close, close * largest, equal_nan=True):
        return None
    return (
        f"the units of {type(model).__name__} do not compute what its forward does in eval mode: let layers such as "
        f"nn.Dropout, and not the forward itself, look at self.training"
    )
