"""Whether the units that were read of a model compute, one after another, what the model's own forward computes.

Both are run on tensors without data, and every operator that they call becomes an expression: its name and the
expressions of what it is given, parameters being the leaves. A model is read rightly if its logits are one and the same
expression. This sees what reading a model by its family cannot: a replaced forward, a module that stands at two places,
a class that somebody patched, an in-place operator that changes what another one reads.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from ..common.messages import first_line
from ..common.meta import replaced_methods
from ..engine.as_real import RealLayouts
from ..engine.trace import Reader

__all__ = ["assert_same_function"]


_aten = torch.ops.aten

_SAME_VALUE = {_aten.clone, _aten.detach, _aten.alias, _aten.lift_fresh}  # each hands on the value that it is given


@torch.no_grad()
def assert_same_function(model, backbone, images, reader=None):
    """Raises ValueError where the backbone does not compute what the model does, or the model cannot take the images.

    Args:
        model: on the meta device, in the modes it is trained in.
        backbone: from `as_backbone` of it.
        images: a batch on the meta device.
        reader: the `Reader` that reads the backbone's parts; None: a new one.
    """
    own = (("images", images), *model.named_parameters(), *model.named_buffers())
    names = {id(tensor): name for name, tensor in own}
    known = {}
    with RealLayouts(), _Expressions(known, names) as forward:
        try:
            out = model(images)
            expected = forward.expression(getattr(out, "logits", out))
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} cannot take images of shape {tuple(images.shape)}: {first_line(error)}"
                f"{_replaced(model)}"
            ) from error
    parts = _read(backbone, reader or Reader())  # now, since reading makes the constants of a forward too
    with RealLayouts(), _Expressions(known, names) as units:
        ours = units.expression(_run(parts, images))
    if ours != expected:
        differs = next((made for made in forward.made if made not in units.made), None)
        where = f", first at {forward.made[differs]}" if differs is not None else ""
        raise ValueError(
            f"cannot cut {type(model).__name__} into units: its forward() computes something else than its units one "
            f"after another{where}{_replaced(model)}"
        )


def _replaced(model):
    replaced = replaced_methods(model)
    return f"; {replaced[0]} was replaced on the object" if replaced else ""


class _Expressions(TorchDispatchMode):
    """Numbers the expressions of the tensors that are made while the mode is on.

    Args:
        known: expression, a tuple -> its number; shared by the runs that are compared.
        names: of the leaves, by id.

    Attributes:
        made: number -> the operator, and the parameter last used before it, for people; of floating point results, in
            the order of the calls.
    """

    def __init__(self, known, names):
        super().__init__()
        self.known, self.names, self.made = known, names, {}
        self.numbers, self.alive = {}, []  # a tensor's id -> its number; the tensors, so that no id is used again
        self.last, self.constants = "", 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given, _ = tree_flatten((_with_stride(function, args), kwargs))
        tensors = [a for a in given if isinstance(a, torch.Tensor)]
        if any(a.is_meta for a in tensors) and any(a.dim() and not a.is_meta for a in tensors):
            raise ValueError("it reads a tensor that is no parameter or buffer of it, and so has no copy without data")
        result = function(*args, **kwargs)
        arguments = [self.expression(a) if isinstance(a, torch.Tensor) else _plain(a) for a in given]
        name = str(function.overloadpacket)
        if function.overloadpacket in _SAME_VALUE:
            self._set(result, arguments[0])
            return result
        if name in ("aten.add", "aten.add_", "aten.mul", "aten.mul_"):
            arguments.sort(key=str)
        call = (name.rstrip("_"), *arguments)
        writes = [a.alias_info is not None and a.alias_info.is_write for a in function._schema.arguments]
        for place, (value, written) in enumerate(zip(args, writes, strict=False)):
            if written and isinstance(value, torch.Tensor):
                self._set(value, self._number(call if name.endswith("_") else (*call, "writes", place)))
        for place, value in enumerate(tree_flatten(result)[0]):
            if isinstance(value, torch.Tensor) and not any(value is a for a in args):
                number = self._number((*call, place) if place else call)
                self._set(value, number)
                if value.is_floating_point():  # not what counts batches
                    self.made.setdefault(number, f"{call[0]}{self.last}")
        return result

    def expression(self, tensor):
        if id(tensor) not in self.numbers:
            name = self.names.get(id(tensor))
            if name is None:  # made by the forward itself: by its place among such tensors, and what is known of it
                self.constants += 1
                leaf = "constant", self.constants, tuple(tensor.shape), str(tensor.dtype), _content(tensor)
            else:
                leaf = "leaf", name
                self.last = f" behind {name}" if isinstance(tensor, torch.nn.Parameter) else self.last
            self._set(tensor, self._number(leaf))
        return self.numbers[id(tensor)]

    def _number(self, call):
        return self.known.setdefault(call, len(self.known))

    def _set(self, tensor, number):
        self.numbers[id(tensor)] = number
        self.alive.append(tensor)


def _content(tensor):
    return "" if tensor.is_meta or tensor.numel() > 1000 else str(tensor.tolist())


def _with_stride(function, args):
    """The arguments of a pool with its stride, which is the kernel's size where none is given."""
    if function.overloadpacket not in (_aten.avg_pool2d, _aten.max_pool2d_with_indices) or (args[2:] and args[2]):
        return args
    return *args[:2], args[1], *args[3:]


def _plain(argument):
    """An argument that is no tensor, as something that can be compared: a list as well as a tuple."""
    comparable = isinstance(argument, int | float | str | bool | torch.dtype | type(None)) and argument == argument
    return argument if comparable else str(argument)  # NaN, which is not itself, too


def _read(backbone, reader):
    """[(nodes, the name of what they put out)] of the units and of the classifier."""
    parts, out = [], "images"
    for name, module in [*((unit.name, unit.module) for unit in backbone.units), ("head", backbone.classifier)]:
        nodes, out = reader.read(module, backbone.looked_into, name, out)
        parts.append((nodes, out))
    return parts


def _run(parts, images):
    """The logits, by the nodes that were read."""
    x, source = images, "images"
    for nodes, out in parts:
        values = {source: x}
        for node in nodes:
            values[node.out] = node.plain(*(values[source] for source in node.sources))
        x, source = values[out], out
    return x
