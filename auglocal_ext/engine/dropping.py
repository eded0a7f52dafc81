"""What an fx node drops at random, dropout and torchvision's stochastic depth, and what hands on what it is given."""

import sys
from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from .node import computes, is_torchvisions

__all__ = ["Dropping", "dropping_at", "is_identity"]

VALUES = "values"


@dataclass(frozen=True)
class Dropping:
    """p: the probability; what: VALUES, or of stochastic depth "row" or "batch"."""

    p: float
    what: str
    training: bool
    inplace: bool

    @property
    def drops(self):
        return self.training and self.p > 0


def dropping_at(node, module):
    """The `Dropping` that an fx node is, or None. module: the one that it calls, or None."""
    if len(node.all_input_nodes) != 1:
        return None
    depth = sys.modules.get("torchvision.ops.stochastic_depth")
    if module is not None:
        if len(node.args) != 1 or node.kwargs:
            return None
        if computes(module, nn.Dropout):
            return Dropping(module.p, VALUES, module.training, module.inplace)
        if is_torchvisions(module, "ops.stochastic_depth.StochasticDepth"):
            return Dropping(module.p, module.mode, module.training, False)
        return None
    if node.op == "call_function" and node.target is F.dropout:
        return Dropping(what=VALUES, **_given(node, p=0.5, training=True, inplace=False))
    if node.op == "call_function" and depth and node.target is depth.stochastic_depth:
        given = _given(node, p=None, mode=None, training=True)
        return Dropping(what=given.pop("mode"), inplace=False, **given)
    return None


def is_identity(node, module):
    """Whether an fx node's value is the one that it is given."""
    dropping = dropping_at(node, module)
    alone = len(node.args) == 1 and not node.kwargs
    return (computes(module, nn.Identity) and alone) or (dropping is not None and not dropping.drops)


def _given(node, **defaults):
    """The arguments of a call behind its first one, by name; node.args are of the defaults' order."""
    return defaults | dict(zip(defaults, node.args[1:], strict=False)) | node.kwargs
