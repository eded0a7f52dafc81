"""Island: what no other kind describes, differentiated by autograd within the program."""

import contextlib
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call

from ..as_real import MetaAutocast, autocasting
from ..calls import call_at
from ..meta_attention import MetaAttention
from ..node import Attribute, Node
from ..tensors import as_gradient, dense

__all__ = ["Island"]


@dataclass(frozen=True)
class Island(Node):
    """out = call(*sources), or with parameters and buffers among what it is given."""

    sources: tuple[str, ...] = ()
    call: Callable | None = None
    what: str = ""  # for people: the name and kind of what runs
    parameters: tuple[nn.Parameter, ...] = ()
    may_write: bool = False  # whether the call may write over what it is given
    attributes: tuple[Attribute | None, ...] = ()  # of what the call is given, in order; None: the next source

    holds_attributes = True

    @property
    def trained(self):
        """The parameters that are not frozen."""
        return [parameter for parameter in self.parameters if parameter.requires_grad]

    @classmethod
    def match(cls, at):
        node, module = at.node, at.module()
        tensors, call = call_at(node, at.modules)
        what = f"{at.part}: {getattr(node.target, '__name__', node.target)}"
        if module is not None and node.args == tuple(tensors) and len(tensors) == 1 and not node.kwargs:
            call, what = module, f"{node.target.partition('.')[2] or at.part} ({type(module).__name__})"
        attributes = tuple(at.attribute(argument) for argument in tensors)
        held = (attribute.value for attribute in attributes if attribute is not None)
        parameters = [*(() if module is None else module.parameters()), *held]
        parameters = tuple(dict.fromkeys(p for p in parameters if isinstance(p, nn.Parameter)))
        sources = tuple(at.values[argument] for argument in tensors if not at.is_attribute(argument))
        return cls(at.out, at.part, sources, call, what, parameters, _may_write(node, module), attributes), node

    @classmethod
    def of_module(cls, module, part, source):
        """One island of a whole module, which runs as it is."""
        what, parameters = f"{part} ({type(module).__name__})", tuple(module.parameters())
        return cls(f"{part}/whole", part, (source,), module, what, parameters, _may_write(None, module))

    def plain(self, *values):
        return self.call(*self.given(values))

    def given(self, values):
        """What the call is given where the sources have these values."""
        if self.may_write:
            values = [value.clone() for value in values]
        if not any(self.attributes):
            return tuple(values)
        values = iter(values)
        return tuple(next(values) if a is None else a.value for a in self.attributes)

    def forward(self, emit):
        emit.pinned.update(self.sources)
        wanted = [name not in emit.constants for name in self.sources]
        run = partial(_run, self, emit.autocast, emit.device_type, wanted)
        emit.step(self, "island", run, self.sources, [self.out, f"{self.out}.graph"])

    def backward(self, emit):
        reads = [f"{self.out}.graph", emit.take(self.out), *self.sources]
        gives = [emit.give(name) for name in self.sources if name not in emit.constants]
        emit.step(self, "island backward", _backward, reads, [*gives, *emit.gradient_names(*self.trained)])

    @classmethod
    def samples(cls):
        return (
            nn.Sequential(
                nn.Conv2d(4, 4, 1), nn.InstanceNorm2d(4, affine=True), nn.ELU(inplace=True), nn.Conv2d(4, 4, 1)
            ),
            nn.Sequential(nn.ConvTranspose2d(4, 6, 3, padding=1), nn.Softmax2d(), nn.AvgPool2d(2)),
            nn.Sequential(nn.Sigmoid(), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
            _Own(),
        )


class _Own(nn.Module):
    """A forward that uses parameters and a buffer directly, one without any value beside it, for `samples`."""

    def __init__(self):
        super().__init__()
        self.slope, self.shift = nn.Parameter(torch.full((4,), 0.3)), nn.Parameter(torch.arange(4.0).view(4, 1, 1))
        self.register_buffer("low", torch.tensor(-0.5))

    def forward(self, x):
        return torch.maximum(F.prelu(x, self.slope), self.low).sub(self.shift.sigmoid())


def _may_write(node, module):
    """Whether what runs may write over its input: in-place modules, and what torch did not define."""
    if module is None:
        known = node.target in (operator.add, torch.add)
        return not known or bool(node.kwargs.get("inplace")) or "out" in node.kwargs
    own = (type(part).__module__.startswith("torch.nn.") for part in module.modules())
    return not all(own) or any(getattr(part, "inplace", False) for part in module.modules())


def _run(node, autocast, device_type, wanted, *sources):
    given = [x.detach().requires_grad_(w) for x, w in zip(sources, wanted, strict=True)]
    first = (*given, *(a.value for a in node.attributes if a is not None))[0]
    around = autocasting(first, autocast, device_type)
    attention = MetaAttention() if first.is_meta else contextlib.nullcontext()
    with torch.enable_grad(), attention, around:
        try:
            out, parameters = _called(node, given)
        except (RuntimeError, ValueError):
            if not isinstance(around, MetaAutocast):
                raise
            # A layer whose casts are not known, a recurrent one for instance: its bytes are then about right only.
            out, parameters = _called(node, [x.float() for x in given])
            out = out.to(autocast)
        # What the backward needs: the edge that out's gradient comes in by, not out itself, whose memory may go. The
        # view: out may be a given leaf.
        edge = get_gradient_edge(out.view_as(out)) if out.requires_grad else None
    return dense(out.detach()), (edge, [x for x in given if x.requires_grad], parameters)


def _called(node, given):
    """(out, the tensors that stand for its trained parameters). Hooks on parameters run once, on the whole gradient,
    after the program: autograd differentiates by aliases of such parameters."""
    if not any(parameter._backward_hooks for parameter in node.trained):
        return node.plain(*given), node.trained
    aliases = {p: p.detach().requires_grad_() for p in node.trained}
    given = tuple(aliases.get(x, x) for x in node.given(given))
    if not isinstance(node.call, nn.Module):
        return node.call(*given), list(aliases.values())
    by_name = {name: aliases.get(p, p) for name, p in node.call.named_parameters()}
    return functional_call(node.call, by_name, given), list(aliases.values())


def _backward(graph, grad, *_sources):
    edge, given, parameters = graph
    wanted = [*given, *parameters]
    found = [None] * len(wanted) if edge is None else torch.autograd.grad(edge, wanted, grad, allow_unused=True)
    # Autograd may hand out one tensor twice, for both sides of an add. Here gradients are written over: each gets
    # memory of its own.
    gradients, taken = [], set()
    for x, gradient in zip(wanted, found, strict=True):
        if gradient is not None:
            gradient = as_gradient(gradient, x)
            gradient = gradient.clone() if gradient.untyped_storage()._cdata in taken else gradient
            taken.add(gradient.untyped_storage()._cdata)
        gradients.append(gradient)
    for index, x in enumerate(given):
        if gradients[index] is None:
            gradients[index] = torch.zeros_like(x)
    return gradients[0] if len(gradients) == 1 else gradients
