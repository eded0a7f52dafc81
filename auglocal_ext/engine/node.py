"""What a node is: one value of a local module, how it is recognised, computed and differentiated.

A kind of node is a subclass in a file of its own in `nodes`; `nodes.KINDS` lists those that tracing looks for.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch.fx
from torch import nn

from ..common.meta import METHODS

__all__ = [
    "At",
    "Attribute",
    "Node",
    "computes",
    "has_own_weight",
    "is_as_its_class",
    "is_torchvisions",
    "is_torchvisions_function",
    "trained",
]


@dataclass(frozen=True)
class Node:
    """One value of a local module. Derive, and define `source` or `sources`, `plain`, `forward` and `backward`; where
    tracing shall find it also `match`.

    Attributes:
        out: the name of its value.
        part: the unit it belongs to, "head" or "extra".
        output_is_ours: of the class: nobody but its readers knows its value, and their backward may write over it.
        data_gradient_waits: of the class, see `Emit.postpone`.
        keeps_its_source: of the class: what it reads of another part, one that is recomputed, is a checkpoint.
        is_a_loss: of the class: it is a term of the module's loss.
        holds_attributes: of the class: it may be given parameters and buffers, not only values.
    """

    out: str
    part: str

    output_is_ours: ClassVar[bool] = False
    data_gradient_waits: ClassVar[bool] = False
    keeps_its_source: ClassVar[bool] = True
    is_a_loss: ClassVar[bool] = False
    holds_attributes: ClassVar[bool] = False

    @property
    def sources(self):
        """The names of the values it reads: its `source`, where a kind does not say others."""
        return (self.source,)

    @property
    def parameters(self):
        """The parameters that it computes with, None among them where a layer has none."""
        return ()

    @property
    def trains(self):
        """Whether one of its parameters needs a gradient: where none does, and none of its sources, nor does its value,
        and nothing is emitted for its backward."""
        return trained(*self.parameters)

    @classmethod
    def takes_whole(cls, module):
        """Whether a node of this kind may be the whole of `module`, which has more than one layer, so that tracing
        does not look into it. Default: no."""
        return False

    @classmethod
    def match(cls, at):
        """Looks for a node of this kind.

        Args:
            at: an `At`, the place in the graph.

        Returns:
            (node, the last fx node that it takes in) where one begins there; else None.
        """
        return None

    def plain(self, *values):
        """What it computes of the values of its `sources`, in plain torch and by what is known of the kind, not by its
        module's forward. Planning compares the model's own forward with this."""
        raise NotImplementedError

    def forward(self, emit):
        """Emits its steps of the forward pass; emit: `Emit`."""
        raise NotImplementedError

    def backward(self, emit):
        """Emits its steps of the backward pass: takes the gradient of `out`, gives its sources theirs; emit: `Emit`."""
        raise NotImplementedError

    @classmethod
    def samples(cls):
        """Small modules of maps (N, 4, H, W) that have such a node: what the test of all kinds runs."""
        return ()


@dataclass(frozen=True)
class Attribute:
    """A parameter or buffer that a forward uses directly: what `owner` has under `name`."""

    owner: nn.Module
    name: str

    @property
    def value(self):
        """The tensor, or None."""
        return getattr(self.owner, self.name)

    @property
    def trained(self):
        """Whether it needs a gradient."""
        return self.value.requires_grad


@dataclass(frozen=True)
class At:
    """A place in an fx graph, where a node may begin. Its methods are of an fx node, `node`, this place's if none is
    given.

    Attributes:
        node: the fx node.
        modules: path -> module, of the traced root.
        values: fx node -> the name of its value, of all that was computed before.
        out, part: of the Node to be made.
        sync_batch_norm: whether BatchNorms of other kinds than nn.SyncBatchNorm are synchronised too.
    """

    node: torch.fx.Node
    modules: dict
    values: dict
    out: str
    part: str
    sync_batch_norm: bool = False

    def module(self, node=None):
        """The module that an fx node calls; None: it calls none."""
        node = node or self.node
        return self.modules.get(node.target) if node.op == "call_module" else None

    def calls(self, kind, node=None):
        """The module of an fx node if it `computes` what a kind of module does, nn.ReLU for instance, and is given one
        value alone; else None."""
        node = node or self.node
        module = self.module(node)
        alone = len(node.all_input_nodes) == 1 and len(node.args) == 1 and not node.kwargs
        return module if module is not None and computes(module, kind) and alone else None

    def as_module(self, kind, function, node=None):
        """As `calls`, or where an fx node calls the function that such modules run, one of the kind, made with what the
        function is given; None: neither."""
        node = node or self.node
        if node.op != "call_function":
            return self.calls(kind, node)
        known = node.target is function and list(node.args[:1]) == list(node.all_input_nodes)
        return kind(*node.args[1:], **node.kwargs) if known else None

    def source(self, node=None):
        """The name of the value that an fx node of one input reads."""
        return self.values[(node or self.node).all_input_nodes[0]]

    @staticmethod
    def is_attribute(node):
        """Whether an fx node stands for a parameter or buffer."""
        return node.op == "get_attr"

    def attribute(self, node):
        """The `Attribute` that an fx node stands for, or None: it is a value."""
        if not self.is_attribute(node):
            return None
        path, _, name = node.target.rpartition(".")
        return Attribute(self.modules[path], name)

    @staticmethod
    def only_reader(node):
        """The one fx node that reads another one's value, or None: there are several."""
        return next(iter(node.users)) if len(node.users) == 1 else None


# What the kinds of modules that are known by heart run, as torch defines it.
_FORWARDS = {
    kind: {name: getattr(kind, name) for name in (*METHODS, "__call__") if hasattr(kind, name)}
    for kind in (
        nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.Conv2d, nn.Dropout, nn.Flatten, nn.GELU,
        nn.Hardswish, nn.Identity, nn.LayerNorm, nn.LeakyReLU, nn.Linear, nn.MaxPool2d, nn.MultiheadAttention, nn.ReLU,
        nn.ReLU6, nn.SiLU, nn.SyncBatchNorm, nn.Unflatten
    )
}  # fmt: skip


def computes(module, kind):
    """Whether a module is of this very kind and computes what torch's class does: it is no subclass, and nobody has put
    another forward on the object or on the class."""
    return type(module) is kind and all(
        name not in vars(module) and getattr(kind, name) is function for name, function in _FORWARDS[kind].items()
    )


def is_as_its_class(module):
    """Whether a module's forward is the one that the source of its class has: neither the object's nor the class's was
    replaced, as far as functions tell where they are from. Others may do what a graph does not tell, such as looking at
    values or at an attribute that changes."""
    kind = type(module)
    home = next((base for base in kind.__mro__ if "forward" in vars(base)), nn.Module)
    forward = vars(home)["forward"]
    return (
        kind.__call__ is nn.Module.__call__
        and not vars(module).keys() & METHODS
        and getattr(forward, "__module__", None) == home.__module__
        and getattr(forward, "__qualname__", None) == f"{home.__qualname__}.forward"
        and not hasattr(forward, "__wrapped__")
    )


def is_torchvisions(module, name):
    """Whether a module is of torchvision's class of this name, such as "ops.misc.Permute", and computes what it does.
    By name, so that nothing imports torchvision."""
    return is_torchvisions_function(type(module), name) and is_as_its_class(module)


def is_torchvisions_function(function, name):
    """Whether a function or class is torchvision's of this name."""
    home, own = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    return f"{home}.{own}" == f"torchvision.{name}"


def trained(*parameters):
    """Whether one of these needs a gradient; None: no parameter."""
    return any(parameter is not None and parameter.requires_grad for parameter in parameters)


def has_own_weight(module):
    """Whether a module's weight and bias are parameters of its own: not where a hook computes one from others, as
    torch.nn.utils.spectral_norm does."""
    return isinstance(module.weight, nn.Parameter) and isinstance(module.bias, nn.Parameter | None)
