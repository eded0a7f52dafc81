"""PatchMerging: four neighbours of a map (N, H, W, C) as one place of four times the channels, as Swin merges them."""

import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ...common.torchvision import import_torchvision
from ..node import Node, is_torchvisions_function

__all__ = ["PatchMerging"]

_NAME = "models.swin_transformer._patch_merging_pad"


@dataclass(frozen=True)
class PatchMerging(Node):
    """out: (N, H / 2, W / 2, 4 C), of an odd size rounded up. Keeps nothing: it is dropped, and made again."""

    source: str

    keeps_its_source = False

    @classmethod
    def match(cls, at):
        node = at.node
        known = node.op == "call_function" and is_torchvisions_function(node.target, _NAME)
        alone = len(node.args) == 1 and not node.kwargs and node.args[0] in at.values
        return (cls(at.out, at.part, at.source()), node) if known and alone else None

    def plain(self, x):
        x = F.pad(x, (0, 0, 0, x.shape[-2] % 2, 0, x.shape[-3] % 2))
        return torch.cat([x[..., row::2, column::2, :] for column in (0, 1) for row in (0, 1)], -1)

    def forward(self, emit):
        emit.step(self, "patch merging", self._run, [self.source], [self.out, f"{self.out}.shape"])
        emit.derive(self, "rebuild", self._again, [self.source], [self.out])

    def _run(self, x):
        """(out, the shape of x)"""
        return self._again(None, x), x.shape

    def _again(self, _over, x):
        n, height, width, channels = x.shape
        if height % 2 or width % 2:
            return self.plain(x)
        x = x.reshape(n, height // 2, 2, width // 2, 2, channels)
        return x.permute(0, 1, 3, 4, 2, 5).flatten(3)

    def backward(self, emit):
        reads = [emit.take(self.out), f"{self.out}.shape"]
        reads += [self.out] if self.out == emit.features else []  # made again here, to be handed on
        emit.step(self, "patch merging backward", self._backward, reads, [emit.give(self.source)])

    def _backward(self, grad, shape, _output=None):
        n, height, width, _ = grad.shape
        dx = grad.view(n, height, width, 2, 2, -1).permute(0, 1, 4, 2, 3, 5)
        return dx.reshape(n, 2 * height, 2 * width, -1)[:, : shape[1], : shape[2]].contiguous()

    @classmethod
    def samples(cls):
        try:
            import_torchvision("patch merging")
        except ImportError:
            return ()
        return nn.Sequential(_Merged(), nn.Linear(24, 4)), nn.Sequential(nn.LayerNorm(6), _Merged(), nn.GELU())


class _Merged(nn.Module):
    """For `samples`: torchvision's function, of a map whose last dimension stands for its channels."""

    def forward(self, x):
        return sys.modules["torchvision.models.swin_transformer"]._patch_merging_pad(x)
