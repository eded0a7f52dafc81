"""LayerNorm: over what is last in its source, or over the channels of a map; keeps the source and two values a row."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ..node import Node, computes, is_torchvisions
from ..tensors import raised

__all__ = ["LayerNorm"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class LayerNorm(Node):
    """out = layer_norm(source)

    channels: over those of a map (N, C, H, W), as torchvision's LayerNorm2d; else over the last dimensions.

    The output is dropped after its last reader, and made again where the backward needs it.
    """

    source: str
    norm: nn.LayerNorm
    channels: bool

    @property
    def parameters(self):
        return self.norm.weight, self.norm.bias

    @classmethod
    def takes_whole(cls, module):
        return is_torchvisions(module, "models.convnext.LayerNorm2d")

    @classmethod
    def match(cls, at):
        norm, node = at.module(), at.node
        channels = norm is not None and cls.takes_whole(norm)
        alone = len(node.args) == 1 and not node.kwargs
        if not alone or not (channels or (norm is not None and computes(norm, nn.LayerNorm))):
            return None
        own = all(isinstance(x, nn.Parameter | None) for x in (norm.weight, norm.bias))  # of no hook's making
        return (cls(at.out, at.part, at.source(), norm, channels), node) if own else None

    def plain(self, x):
        x = x.permute(0, 2, 3, 1) if self.channels else x
        x = F.layer_norm(x, self.norm.normalized_shape, self.norm.weight, self.norm.bias, self.norm.eps)
        return x.permute(0, 3, 1, 2) if self.channels else x

    def forward(self, emit):
        as_eager = emit.autocast, emit.device_type
        made = [self.out, f"{self.out}.mean", f"{self.out}.rstd"]
        emit.step(self, "layer norm", partial(_forward, self, as_eager), [self.source], made)
        again = partial(_again, self, as_eager)
        emit.derive(self, "rebuild", again, [self.source], [self.out], like=self.source)

    def backward(self, emit):
        reads = [emit.take(self.out), self.source, f"{self.out}.mean", f"{self.out}.rstd"]
        reads += [self.out] if self.out == emit.features else []  # made again here, to be handed on
        writes = [emit.give(self.source), *emit.gradient_names(self.norm.weight, self.norm.bias)]
        as_eager = emit.autocast, emit.device_type
        run = partial(_backward, self, as_eager, self.source not in emit.constants)
        emit.step(self, "layer norm backward", run, reads, writes)

    @classmethod
    def samples(cls):
        return (
            nn.Sequential(nn.LayerNorm(6), nn.Conv2d(4, 4, 1)),
            nn.Sequential(nn.Flatten(2), nn.Linear(42, 6), nn.LayerNorm(6, eps=0.1), nn.GELU(), nn.Linear(6, 5)),
            nn.Sequential(nn.LayerNorm((7, 6), bias=False), nn.SiLU(), nn.LayerNorm(6, elementwise_affine=False)),
        )


def _rows(node, x):
    return x.permute(0, 2, 3, 1) if node.channels and x is not None else x


def _map(node, x):
    return x.permute(0, 3, 1, 2) if node.channels and x is not None else x


def _forward(node, as_eager, x):
    """(layer_norm(x), the mean and the inverse deviation of each row)"""
    norm = node.norm
    given = _rows(node, raised(x, *as_eager)), norm.normalized_shape, norm.weight, norm.bias, norm.eps
    y, mean, rstd = _aten.native_layer_norm(*given)
    return _map(node, y), mean, rstd


def _again(node, as_eager, _over, x):
    return _forward(node, as_eager, x)[0]


def _backward(node, as_eager, wanted, grad, x, mean, rstd, _output=None):
    norm, rows = node.norm, _rows(node, raised(x, *as_eager))
    mask = wanted, norm.weight is not None, norm.bias is not None
    given = _rows(node, grad).to(rows.dtype), rows, norm.normalized_shape, mean, rstd, norm.weight, norm.bias, mask
    dx, *parameters = _aten.native_layer_norm_backward(*given)
    dx = _map(node, dx).to(x.dtype) if wanted else None
    made = [dx, *(gradient for gradient in parameters if gradient is not None)]
    return made[0] if len(made) == 1 else made
