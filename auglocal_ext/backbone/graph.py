"""A whole model as a graph of its layers' calls, and the values in it that everything behind depends on.

A model can be cut where one tensor is all that goes on: at a value that lies on every path from the images to the
logits. In a list of steps, each behind what it reads, that is a value over which no other one is read.
"""

import operator
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import fx, nn

from ..common.messages import first_line
from ..common.meta import forward_of, meta_copy
from ..engine.as_real import RealLayouts
from ..engine.calls import is_size
from ..engine.node import is_as_its_class
from ..engine.symbolic import Tracer
from ..engine.trace import is_whole

__all__ = ["Call", "ModelGraph", "is_block", "model_graph"]

# Of images, tried in this order.
SIDES = (256, 224, 32, 64, 28, 128, 96, 160, 192, 240, 288, 299, 320, 336, 384, 448, 512, 16)
MOST = 1000  # numbers in a tensor that the forward makes
IMAGES = 3  # in a batch: no other size of a first tensor is likely to be it


@dataclass(frozen=True)
class Call:
    """A step of the model: a layer's call, or a function's.

    node: the fx node.
    within: (path, how-manieth call of it) of the modules around, from the outside in; a layer's own is the last.
    value: what it makes, on the meta device; no tensor perhaps.
    """

    node: fx.Node
    within: tuple[tuple[str, int], ...]
    value: object


@dataclass(frozen=True)
class ModelGraph:
    """A model's forward in training mode.

    Attributes:
        calls: the steps from images to logits, in the order in which they run; what needs no image is not among them.
        images: the fx node of the images.
        borders: indices of calls whose value is all that goes on, a feature map or tokens of each image; before there
            is a single vector of each.
        image_shape: (C, H, W) of the images that were tried.
        left_out: names of what else the model puts out, in training mode, and nothing here computes.
    """

    calls: list[Call]
    images: fx.Node
    borders: list[int]
    image_shape: tuple[int, int, int]
    left_out: tuple[str, ...] = field(default=())


def model_graph(model):
    """The ModelGraph of a model, which is left alone.

    Raises:
        ValueError: its forward cannot be followed; says where.
    """
    graph, tracer, values, image_shape, left_out = _followed(model)
    (images,) = (node for node in graph.nodes if node.op == "placeholder")
    (output,) = (node for node in graph.nodes if node.op == "output")
    calls = [Call(node, tracer.within.get(node, ()), values[node]) for node in _between(graph, images, output)]
    single = _single_file(calls, images)
    vectors = next((i for i in single if isinstance(calls[i].value, torch.Tensor) and calls[i].value.dim() == 2), None)
    borders = [i for i in single if _is_of_images(calls[i].value) and (vectors is None or i < vectors)]
    return ModelGraph(calls, images, borders, image_shape, left_out)


class _ModelTracer(Tracer):
    """Looks into every module that has modules in it, but torch's own.

    whole: types of those that have no graph, and are one call each.
    model, images: the images, without data, by whose size the model's questions about sizes are answered.

    asked: whether there was one, so that the graph is that of this size.
    """

    def __init__(self, whole, model, images):
        super().__init__(())
        self.whole, self.model, self.images, self.run = whole, model, images, None
        self.within, self.stack, self.counts, self.failed = {}, [], {}, None

    def is_leaf_module(self, module, qualified_name):
        whole = is_whole(module) or type(module) in self.whole
        return whole or not is_block(module) or not is_as_its_class(module)

    def check(self, module):
        """A __call__ of its own is followed as any other code."""

    def create_arg(self, a):
        """A tensor that the forward makes itself, or finds somewhere, is made by a step of the graph."""
        if isinstance(a, torch.Tensor) and id(a) not in self.own:
            if a.is_meta or a.numel() > MOST:
                raise ValueError("it reads a tensor that is no parameter or buffer of it")
            return self.create_node(
                "call_function", torch.tensor, (a.tolist(),), {"dtype": a.dtype, "device": a.device}
            )
        return super().create_arg(a)

    def to_bool(self, obj):
        """The answer to a question such as x.shape[2] == 7; what is asked of values has none."""
        node = obj.node
        if node.target not in _QUESTIONS or not all(map(is_size, node.all_input_nodes)):
            return super().to_bool(obj)
        if self.run is None:
            self.run = _Shapes(meta_copy(self.model).train(), self.graph)
        return bool(self.run.value_of(node, self.images))

    @property
    def asked(self):
        return self.run is not None

    def record(self, root):
        self.own = {id(tensor) for tensor in (*root.parameters(), *root.buffers())}
        try:
            return super().record(root)
        finally:  # no call is recorded any more
            for module in self.submodule_paths:
                vars(module)["_compiled_call_impl"] = forward_of(module)

    def _called(self, module, *args, **kwargs):
        path = self.submodule_paths[module]
        self.counts[path] = self.counts.get(path, 0) + 1
        self.stack.append((path, self.counts[path]))
        try:
            return super()._called(module, *args, **kwargs)
        except Exception:
            self.failed = self.failed or module
            raise
        finally:
            self.stack.pop()

    def create_node(self, *args, **kwargs):
        node = super().create_node(*args, **kwargs)
        self.within[node] = tuple(self.stack)
        return node


_QUESTIONS = {operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge}


def is_block(module):
    """Whether it is made of modules, and by a forward that is not one of torch's own layers."""
    kind = type(module)
    own = not kind.__module__.startswith("torch.nn.") or kind.forward is nn.Sequential.forward
    return own and bool(module._modules)


class _OfOneSize(ValueError):
    """A forward that cannot be followed with images of one size; with others perhaps."""


def _followed(model):
    """(fx graph, its tracer, {fx node: its value without data}, (C, H, W) of the images that fit, names of what else it
    puts out)"""
    copied, tracer, furthest = meta_copy(model).train(), None, (-1, None)  # how many steps ran, and why no more
    for images in _images(copied):
        run = None
        try:
            if tracer is None or tracer.asked:
                tracer = None
                graph, tracer, left_out = _record(copied, model, images)
            run = _Shapes(copied, graph)
            run.on(images)
        except _OfOneSize as error:
            furthest = max(furthest, (0, error), key=lambda tried: tried[0])
        except Exception as error:
            if run is None:
                raise
            furthest = max(furthest, (len(run.values), error), key=lambda tried: tried[0])
        else:
            return graph, tracer, run.values, tuple(images.shape[1:]), left_out
    raise ValueError(
        f"cannot cut {type(copied).__name__} into units: it takes no square images of {min(SIDES)} to {max(SIDES)} "
        f"pixels a side; {first_line(furthest[1])}"
    ) from furthest[1]


def _images(copied):
    """Batches without data, of all sizes that are tried."""
    conv = next((part for part in copied.modules() if isinstance(part, nn.Conv2d)), None)
    channels = dict.fromkeys([*([conv.in_channels] if conv is not None else []), 3, 1])
    dtype = next((p.dtype for p in copied.parameters() if p.is_floating_point()), torch.float32)
    for side in dict.fromkeys([*_own_side(copied), *SIDES]):
        for count in channels:
            yield torch.empty(IMAGES, count, side, side, dtype=dtype, device="meta")


def _own_side(model):
    """In a list, the side of the images that a model says it is made for, as torchvision's and timm's transformers do;
    empty: it says nothing."""
    timms = getattr(model, "pretrained_cfg", None)
    side = timms.get("input_size", (None,))[-1] if isinstance(timms, dict) else getattr(model, "image_size", None)
    return [side] if isinstance(side, int) else []


def _record(copied, model, images):
    """(fx graph, tracer, names of what is left out); what has no graph inside is one call."""
    whole = set()
    while True:
        tracer = _ModelTracer(whole, model, images)
        try:
            graph = tracer.record(copied)
        except Exception as error:
            if tracer.failed is None or type(tracer.failed) in whole:
                raise (_OfOneSize if tracer.asked else ValueError)(
                    f"cannot cut {type(copied).__name__} into units: its forward() has no graph of layers and "
                    f"functions ({first_line(error)}{_spot(error)})"
                ) from error
            whole.add(type(tracer.failed))
            continue
        modules = dict(copied.named_modules())
        writing = [node for node in graph.nodes if _writes_over_its_input(node, modules)]
        kept = next((node for node in writing if node.args[0].op == "get_attr"), None)
        if kept is None:
            _read_what_was_written(graph, writing)
            return graph, tracer, _logits_alone(copied, graph)
        if not tracer.within[kept]:
            raise ValueError(
                f"cannot cut {type(copied).__name__} into units: its forward() writes to {kept.args[0].target}, which "
                f"no step here would do: put that into a module of its own"
            )
        whole.add(type(modules[tracer.within[kept][-1][0]]))  # it changes a buffer, and runs as it is


def _writes_over_its_input(node, modules):
    """Whether an fx node changes the tensor that is its first argument. modules: path -> module."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.op == "call_module":
        return getattr(modules[node.target], "inplace", False) is True
    if node.op == "call_method":
        return node.target.endswith("_") and not node.target.endswith("__")
    return node.target in _IN_PLACE or node.kwargs.get("inplace") is True


_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv}


def _read_what_was_written(graph, writing):
    """Lets what reads a tensor after an operator has written over it read what that has made."""
    places = {node: place for place, node in enumerate(graph.nodes)}
    for node in writing:
        node.args[0].replace_all_uses_with(node, lambda user, place=places[node]: places[user] > place)


def _spot(error):
    """Where in the code of a model an error was raised, as a clause of a sentence."""
    ours = tuple(str(folder) for folder in (Path(torch.__file__).parent, Path(__file__).parents[1]))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    return f"; {Path(frames[-1].filename).name}, line {frames[-1].lineno}: {frames[-1].line}" if frames else ""


def _logits_alone(copied, graph):
    """Lets a graph put out the logits alone, where a model puts out its own auxiliary heads' too, by name; returns the
    others' names."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    out, others = output.args[0], ()
    fields = getattr(getattr(out, "target", None), "_fields", ())  # of a named tuple that is made there
    if "logits" in fields:
        made = dict(zip(fields, out.args, strict=False)) | out.kwargs
        others = tuple(name for name in fields if name != "logits" and made.get(name) is not None)
        output.args = (made["logits"],)
    elif not isinstance(out, fx.Node):
        raise ValueError(
            f"cannot cut {type(copied).__name__} into units: its forward() must put out the logits, a tensor, given "
            f"{'dict' if isinstance(out, dict) else type(out).__name__}"
        )
    return others


class _Shapes(fx.Interpreter):
    """Runs a graph without data.

    values: of the nodes that ran.
    """

    def __init__(self, root, graph):
        super().__init__(root, garbage_collect_values=False, graph=graph)
        self.values = {}
        self.extra_traceback = False

    def on(self, images):
        with torch.no_grad(), RealLayouts():
            self.run(images)

    def value_of(self, node, images):
        """Of a node of a graph that is not complete yet."""
        with torch.no_grad(), RealLayouts():
            for each in self.graph.nodes:
                if each not in self.env:
                    self.env[each] = images if each.op == "placeholder" else self.run_node(each)
        return self.env[node]

    def run_node(self, node):
        try:
            self.values[node] = super().run_node(node)
        except Exception as error:
            shapes = [tuple(self.values[x].shape) for x in node.all_input_nodes
                      if isinstance(self.values.get(x), torch.Tensor)]  # fmt: skip
            what = str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
            given = " and ".join(map(str, shapes)) or "this"
            raise ValueError(f"{what} cannot take an input of shape {given}: {first_line(error)}") from error
        return self.values[node]


def _between(graph, images, output):
    """The nodes that lie on some path from the images to the output, in order."""
    reached, wanted = {images}, {output}
    for node in graph.nodes:
        if any(source in reached for source in node.all_input_nodes):
            reached.add(node)
    for node in reversed(graph.nodes):
        if node in wanted:
            wanted.update(node.all_input_nodes)
    return [node for node in graph.nodes if node in reached and node in wanted and node not in (images, output)]


def _single_file(calls, images):
    """The indices of calls over which no other value is read."""
    place = {call.node: index for index, call in enumerate(calls)}
    last_read = [max((place.get(user, index) for user in call.node.users), default=index)
                 for index, call in enumerate(calls)]  # fmt: skip
    furthest = max((place[user] for user in images.users if user in place), default=0)
    found = []
    for index, last in enumerate(last_read):
        if furthest <= index:
            found.append(index)
        furthest = max(furthest, last)
    return found


def _is_of_images(value):
    return (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.dim() in (3, 4)
        and value.shape[0] == IMAGES
    )
