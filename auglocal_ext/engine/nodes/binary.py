"""Binary: what Add and Mul share. Their output is elementwise in two operands, which torch broadcasts: it is dropped,
and made again. An operand is a value, or a parameter or buffer of the forward's own."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from ..node import Attribute, Node
from ..tensors import as_gradient

__all__ = ["Binary", "as_operand"]


@dataclass(frozen=True)
class Binary(Node):
    """out = function(*operands). Derive, and define the class variables and `gradients`.

    attributes: of the operands in order; None: the next source.
    """

    sources: tuple[str, ...] = ()
    attributes: tuple[Attribute | None, ...] = (None, None)

    functions: ClassVar[tuple] = ()  # those that compute it, torch's first
    name: ClassVar[str] = ""  # of the method too
    reads_operands: ClassVar[bool] = False  # whether its gradients need the operands

    holds_attributes = True

    @property
    def parameters(self):
        return [a.value for a in self.attributes if a is not None]

    @property
    def trained(self):
        """The operands' attributes, None for those that have no gradient."""
        return [a if a is not None and a.trained else None for a in self.attributes]

    @classmethod
    def match(cls, at):
        if not cls.computes(at.node):
            return None
        attributes = tuple(map(at.attribute, at.node.args))
        known = all(x in at.values for x, attribute in zip(at.node.args, attributes, strict=True) if attribute is None)
        if all(attributes) or not known:  # a size, for instance
            return None
        sources = tuple(at.values[x] for x in at.node.args if x in at.values)
        return cls(at.out, at.part, sources, attributes), at.node

    @classmethod
    def computes(cls, node):
        """Whether an fx node is such a function of two values or attributes."""
        known = {"call_function": cls.functions, "call_method": (cls.name,)}.get(node.op, ())
        two = len(node.args) == 2 and all(isinstance(x, torch.fx.Node) for x in node.args)
        return node.target in known and two and not node.kwargs

    def plain(self, *values):
        return self.functions[0](*self.operands(values))

    def operands(self, values):
        """Both operands; values: of the sources."""
        values = iter(values)
        return [next(values) if a is None else a.value for a in self.attributes]

    def forward(self, emit):
        emit.step(self, self.name, self._run, self.sources, [self.out, f"{self.out}.like"])
        emit.derive(self, "rebuild", self._again, self.sources, [self.out])

    def _run(self, *values):
        operands = self.operands(values)
        return self.functions[0](*operands), tuple((x.shape, x.dtype) for x in operands)

    def _again(self, over, *values):
        a, b = self.operands(values)
        alike = a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()
        places = iter(over)
        may = [attribute is None and next(places) for attribute in self.attributes]
        out = (a if may[0] else b if may[1] else None) if alike else None
        return self.functions[0](a, b, out=out)

    def backward(self, emit):
        sources = iter(self.sources)
        wanted, writes = [], []
        for attribute, trained in zip(self.attributes, self.trained, strict=True):
            source = next(sources) if attribute is None else None
            wanted.append(trained is not None or (source is not None and source not in emit.constants))
            if wanted[-1]:
                writes += emit.gradient_names(attribute.value) if source is None else [emit.give(source)]
        reads = [emit.take(self.out), f"{self.out}.like", *(self.sources if self.reads_operands else ())]
        emit.step(self, f"{self.name} backward", partial(self._backward, wanted), reads, writes)

    def _backward(self, wanted, grad, like, *values):
        operands = self.operands(values) if values else [None, None]
        gradients = self.gradients(wanted, grad, like, *operands)
        made = [
            grad if attribute is None else as_gradient(grad, attribute.value)
            for grad, attribute, w in zip(gradients, self.attributes, wanted, strict=True)
            if w
        ]
        return made[0] if len(made) == 1 else made

    def gradients(self, wanted, grad, like, a, b):
        """Of both operands, None where it is not wanted; may write over grad, and each has memory of its own.

        like: (shape, dtype) of both; a, b: the operands where `reads_operands`.
        """
        raise NotImplementedError


def as_operand(grad, like):
    """The gradient of an operand that was added; like: its (shape, dtype). It may be grad itself."""
    shape, dtype = like
    return (grad if grad.shape == shape else grad.sum_to_size(shape)).to(dtype)
