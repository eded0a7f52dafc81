"""Activation: an elementwise function of one value, ReLU and its like.

Where the output of a convolution or a linear layer is not needed but for it, and its own output tells its derivative,
it is written over that output. Elsewhere it is dropped, and made again from its source.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ..node import Node, computes
from ..tensors import like
from .conv import is_plain_conv
from .linear import is_plain_linear

__all__ = ["RELU", "Activation", "Function", "function_at", "is_relu"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class Function:
    """One of torch.nn.functional's, with what it is given besides its input."""

    name: str
    options: tuple = ()  # (name, value) pairs

    @property
    def by_output(self):
        """Whether its output tells its derivative."""
        return self.name in ("relu", "relu6", "leaky_relu")

    def __call__(self, x):
        return getattr(F, self.name)(x, **dict(self.options))

    def write_over(self, x):
        if self.name == "relu":
            return x.relu_()
        operator, options = _OPERATORS.get(self.name, (self.name, ()))
        return getattr(_aten, operator).out(x, *options, **dict(self.options), out=x)

    def backward(self, grad, value):
        """The gradient of its input, written over the output's where torch can. value: the input, or the output of a
        function that is `by_output`: for those that are, either tells the same."""
        if self.name == "relu":
            return _aten.threshold_backward.grad_input(grad, value, 0, grad_input=grad)
        if self.name == "hardswish":  # torch's has a way in place in name only
            return _aten.hardswish_backward(grad, value)
        operator, options = _OPERATORS.get(self.name, (self.name, ()))
        given = dict(self.options)
        if self.name == "leaky_relu":
            given["self_is_result"] = False  # a slope above 0 keeps the sign
        return getattr(_aten, f"{operator}_backward").grad_input(grad, value, *options, **given, grad_input=grad)


RELU = Function("relu")
# What torch runs where that has another name, and what it is given besides.
_OPERATORS = {"relu6": ("hardtanh", (0, 6))}
# The modules, the functions, and the settings that matter with their defaults.
_MODULES = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.GELU: "gelu",
}
_FUNCTIONS = {torch.relu: "relu"} | {getattr(F, name): name for name in _MODULES.values()}
_SETTINGS = {"leaky_relu": {"negative_slope": 0.01}, "gelu": {"approximate": "none"}}


@dataclass(frozen=True)
class Activation(Node):
    """out = function(source); in_place: written over the source, which a Conv, Linear or MaxPool made and nothing
    else reads.

    Keeps its output where that is in place; else its source, and the output is dropped after its last reader and
    rebuilt where the backward needs it.
    """

    source: str
    function: Function
    in_place: bool

    @classmethod
    def match(cls, at):
        found = function_at(at.node, at)
        if found is None:
            return None
        function, writes_over = found
        (before,) = at.node.all_input_nodes
        alone = at.only_reader(before) is at.node
        made = at.module(before)
        behind_product = (is_plain_conv(made) or is_plain_linear(made)) and not before.kwargs and alone
        if writes_over and not alone:  # it changes what others read
            return None
        return cls(at.out, at.part, at.values[before], function, behind_product and function.by_output), at.node

    def plain(self, x):
        return self.function(x)

    def forward(self, emit):
        if self.in_place:
            emit.step(self, self.function.name, self.function.write_over, [self.source], [self.out])
            return
        emit.step(self, self.function.name, self.function, [self.source], [self.out])
        emit.derive(self, "rebuild", partial(_rebuild, self.function), [self.source], [self.out], like=self.source)

    def backward(self, emit):
        reads = [emit.take(self.out), self.out if self.in_place else self.source]
        if not self.in_place and self.out == emit.features:
            reads.append(self.out)  # made again here, to be handed on
        run = partial(_backward, self.function)
        emit.step(self, f"{self.function.name} backward", run, reads, [emit.give(self.source)])

    @classmethod
    def samples(cls):
        relus = (
            nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1)),
            nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        )
        others = nn.ReLU6(), nn.LeakyReLU(0.2, inplace=True), nn.SiLU(), nn.Hardswish(), nn.GELU(), nn.GELU("tanh")
        behind_convs = (nn.Sequential(nn.Conv2d(4, 6, 1), other, nn.Conv2d(6, 4, 1)) for other in others)
        first = nn.Sequential(nn.SiLU(), nn.ReLU6(), nn.Conv2d(4, 4, 1), nn.SiLU(inplace=True))
        again = nn.Sequential(nn.BatchNorm2d(4), nn.SiLU(), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1))
        rows = nn.Sequential(nn.Flatten(2), nn.Linear(42, 6), nn.ReLU(), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 5))
        return (*relus, *behind_convs, first, again, rows)


def function_at(node, at):
    """(the Function that an fx node computes of the one value that it reads, whether it writes over that value), or
    None: none of those that are known."""
    if len(node.all_input_nodes) != 1:
        return None
    if node.op == "call_module":
        module = at.module(node)
        name = _MODULES.get(type(module))
        if name is None or not computes(module, type(module)) or len(node.args) != 1 or node.kwargs:
            return None
        given = vars(module)
    else:
        name = _FUNCTIONS.get(node.target) if node.op == "call_function" else None
        settings = _SETTINGS.get(name, {})
        if name is None or len(node.args) != 1 or not node.kwargs.keys() <= {"inplace", *settings}:
            return None
        given = settings | node.kwargs
    options = tuple((setting, given[setting]) for setting in _SETTINGS.get(name, {}))
    if name == "leaky_relu" and not options[0][1] > 0:  # whose output does not tell the sign of its input
        return None
    return Function(name, options), bool(given.get("inplace", False))


def is_relu(node, at):
    """Whether an fx node is a ReLU, module or function."""
    found = function_at(node, at)
    return found is not None and found[0] == RELU


def _rebuild(function, over, x):
    return function.write_over(x) if over[0] else function(x)


def _backward(function, grad, value, _output=None):
    return function.backward(like(grad, value), value)
