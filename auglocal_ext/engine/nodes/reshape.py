"""Reshape: the same values in another shape or order, a view of its source where the layout allows one."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.fx
from torch import nn

from ..calls import call_at, is_size
from ..node import Node, computes, is_torchvisions
from ..tensors import dense

__all__ = ["Reshape", "only_reshapes"]


@dataclass(frozen=True)
class Reshape(Node):
    """out = call(source, *sized): the source's values; of the others, where there are any, it reads sizes.

    Keeps nothing: the output is dropped after its last reader, and made again where the backward needs it. The gradient
    goes back the same way.
    """

    source: str
    sized: tuple[str, ...]
    call: Callable
    permutes: tuple[str, tuple[int, ...]] | None  # ("permute", dims) or ("transpose", two dims); None: it keeps order

    keeps_its_source = False

    @property
    def sources(self):
        return (self.source, *self.sized)

    @classmethod
    def match(cls, at):
        node, module = at.node, at.module()
        if module is not None:
            found = _of_module(module) if len(node.args) == 1 and not node.kwargs else None
            tensors = node.all_input_nodes
        else:
            found = _of_call(node)
            tensors, call = call_at(node, at.modules)
            found = found and (call, found[1])
        if found is None or tensors[0] is not node.args[0] or any(map(at.is_attribute, tensors)):
            return None
        source, *sized = (at.values[tensor] for tensor in tensors)
        return cls(at.out, at.part, source, tuple(sized), *found), node

    def plain(self, *values):
        return self.call(*values)

    def forward(self, emit):
        run = partial(_forward, self, self.out == emit.features)
        emit.step(self, "reshape", run, self.sources, [self.out, f"{self.out}.sizes"])
        again, reads = partial(_again, self, self.out == emit.features), [self.source, f"{self.out}.sizes"]
        emit.derive(self, "rebuild", again, reads, [self.out], alias=True)

    def backward(self, emit):
        reads = [emit.take(self.out), f"{self.out}.sizes"]
        reads += [self.out] if self.out == emit.features else []  # made again here, to be handed on
        emit.step(self, "reshape backward", partial(_backward, self), reads, [emit.give(self.source)])

    @classmethod
    def samples(cls):
        return (
            nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(2), nn.Unflatten(1, (2, 2))),
            nn.Sequential(nn.SiLU(), _Turned(), nn.Conv2d(4, 4, 1)),
            nn.Sequential(_Shuffled(), nn.Conv2d(4, 4, 1), _Shuffled()),
        )


class _Turned(nn.Module):
    """Changes the order, of a map and back, for `samples`."""

    def forward(self, x):
        x = torch.permute(x, (0, -1, 1, 2)).transpose(1, 3)
        return x.swapaxes(-2, 3).permute(0, 3, 2, 1).contiguous()


class _Shuffled(nn.Module):
    """Sizes read from the map, for `samples`."""

    def forward(self, x):
        n, c, h, w = x.shape
        x = x.reshape(n, 2, c // 2, h, w).transpose(1, 2)
        return torch.reshape(x, (x.size(0), -1, h, w))


def only_reshapes(module):
    """Whether a module without modules in it is made of such steps, and so worth being looked into."""
    names = "models.maxvit.WindowPartition", "models.maxvit.WindowDepartition"
    return any(is_torchvisions(module, name) for name in names)


_KEEP_ORDER = {"reshape", "view", "flatten", "unflatten", "contiguous"}
_EXCHANGE = {"transpose", "swapaxes"}
_FUNCTIONS = {getattr(torch, name): name for name in ("reshape", "flatten", "permute", "transpose", "swapaxes")}


def _of_module(module):
    """(the call, how it permutes) of a module, or None."""
    if computes(module, nn.Flatten):
        return partial(torch.flatten, start_dim=module.start_dim, end_dim=module.end_dim), None
    if computes(module, nn.Unflatten):
        return partial(torch.unflatten, dim=module.dim, sizes=module.unflattened_size), None
    if is_torchvisions(module, "ops.misc.Permute"):
        return partial(torch.permute, dims=module.dims), ("permute", tuple(module.dims))
    if is_torchvisions(module, "models.maxvit.SwapAxes"):
        axes = module.a, module.b
        return partial(torch.swapaxes, axis0=axes[0], axis1=axes[1]), ("transpose", axes)
    return None


def _of_call(node):
    """(the name, how it permutes) of a call of a method or function, or None."""
    name = node.target if node.op == "call_method" else _FUNCTIONS.get(node.target)
    given = node.args[1:]
    if name in _KEEP_ORDER:
        return (name, None) if all(map(_is_count, given)) else None
    given = given[0] if len(given) == 1 and isinstance(given[0], tuple | list) else given
    if node.kwargs or not all(isinstance(dim, int) for dim in given):
        return None
    if name == "permute":
        return name, ("permute", tuple(given))
    return (name, ("transpose", tuple(given))) if name in _EXCHANGE else None


def _is_count(argument):
    """Whether an argument is a size, or several: not a dtype, which makes other values of the same bits."""
    if isinstance(argument, tuple | list):
        return all(map(_is_count, argument))
    return is_size(argument) if isinstance(argument, torch.fx.Node) else isinstance(argument, int)


def _forward(node, handed_on, x, *others):
    y = node.call(x, *others)
    return dense(y) if handed_on else y, (x.shape, y.shape)


def _again(node, handed_on, _over, x, sizes):
    y = _permuted(node, x) if node.permutes else x.reshape(sizes[1])
    return dense(y) if handed_on else y


def _permuted(node, x):
    name, dims = node.permutes
    return getattr(x, name)(*dims)


def _backward(node, grad, sizes, _output=None):
    if node.permutes is None:
        return grad.reshape(sizes[0])
    name, dims = node.permutes
    if name == "transpose":
        return grad.transpose(*dims)
    return grad.permute(sorted(range(len(dims)), key=lambda place: dims[place] % len(dims)))
