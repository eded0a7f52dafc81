"""Loss: a term of the module's loss, differentiated by autograd in its prediction alone."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ..node import Node
from ..tensors import dense

__all__ = ["CROSS_ENTROPY", "Loss", "cross_entropy"]

CROSS_ENTROPY = "cross-entropy"


@dataclass(frozen=True)
class Loss(Node):
    """weight x function(source, labels[, images]); out: its name, where the loss has several terms."""

    source: str
    weight: float
    function: Callable
    given: tuple[str, ...] = ("labels", "images")

    is_a_loss = True

    def plain(self, prediction, *given):
        return self.weight * self.function(prediction, *given)

    def forward(self, emit):
        writes = [emit.loss_name(self.out), emit.give(self.source)]
        run = partial(_run, self.function, self.weight, bool(emit.scale))
        emit.step(self, "loss", run, [self.source, *self.given, *emit.scale], writes)

    def backward(self, emit):
        """The gradient is there with the loss."""


def cross_entropy(part, logits, weight, criterion):
    """The loss of logits that no Head computes; criterion: `CrossEntropy` or `OwnLoss`."""
    return Loss(CROSS_ENTROPY, part, logits, weight, criterion, ("labels",))


def _run(function, weight, scaled, prediction, *given):
    *given, scale = given if scaled else (*given, 1)
    with torch.enable_grad():
        leaf = prediction.detach().requires_grad_()
        value = weight * function(leaf if leaf.dtype == torch.float64 else leaf.float(), *given)
        scaled_value = value * scale if scaled else value
    (gradient,) = torch.autograd.grad(scaled_value, leaf)
    return value.detach(), dense(gradient)
