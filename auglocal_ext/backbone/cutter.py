"""Any model as units and a classifier, by its graph: where one tensor is all that goes on, and what is one part."""

import itertools
import operator
from dataclasses import dataclass

import torch
from torch import nn

from .copies import Copies
from .graph import is_block, model_graph
from .layouts import MAPS, TOKENS, channels_of, layout_of, reduction_of
from .named_units import grouped_by_names
from .segment import segment_module
from .units import Backbone, Unit

__all__ = ["cut_by_graph"]

_ELEMENTWISE = {
    "add",
    "iadd",
    "mul",
    "imul",
    "sub",
    "isub",
    "truediv",
    "expand",
    "cat",
    "concat",
    "stack",
    "to",
    "getitem",
}


def cut_by_graph(model, units=None):
    """The Backbone of a model, read by its graph.

    A unit begins with a layer that mixes pixels or channels, such as a convolution; what the model's own modules hold
    together, a residual block or an Inception module, is one. The classifier is the pooling and what is behind it.

    units: names, to begin them there instead; see `named_units`.

    Raises:
        ValueError: the model has no graph, or nothing in it to cut at; says what.
    """
    graph = model_graph(model)
    pieces = _pieces(graph, model)
    _check_classifier(graph, model)
    types = _block_types(pieces, model)
    blocks = [_block_of(piece, types, model) for piece in pieces]
    end = _end_of_the_body(pieces, blocks, model)
    groups = _grouped(pieces[:end], blocks)
    names = _unit_names(model, groups, types)
    if units is not None:
        starts = itertools.accumulate(map(len, groups[:-1]), initial=0)
        groups = grouped_by_names(pieces[:end], units, dict(zip(names, starts, strict=True)), model)
        names = list(units)
    return _backbone(model, graph, groups, names, [call for piece in pieces[end:] for call in piece.calls])


@dataclass(frozen=True)
class _Piece:
    """The calls from behind one border to the next, inclusive.

    mixes: how many of them have weights that mix pixels or channels.
    """

    calls: list
    mixes: int

    @property
    def value(self):
        return self.calls[-1].value


def _pieces(graph, model):
    pieces, start = [], 0
    for border in [*graph.borders, len(graph.calls) - 1]:
        calls = graph.calls[start : border + 1]
        if calls:
            pieces.append(_Piece(calls, sum(_mixes(call.node, model) for call in calls)))
        start = border + 1
    return pieces


def _mixes(node, model):
    if node.op == "call_module":
        return any(parameter.dim() > 1 for parameter in model.get_submodule(node.target).parameters())
    given = [source for source in node.all_input_nodes if source.op == "get_attr"]
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name not in _ELEMENTWISE and any(_attribute(model, source.target).dim() > 1 for source in given)


def _attribute(model, path):
    owner, _, name = path.rpartition(".")
    return getattr(model.get_submodule(owner), name)


# ---- where the classifier begins ------------------------------------------------------------------------------------


def _end_of_the_body(pieces, blocks, model):
    """How many pieces are the units'. What comes last is a pooling, then layers of single vectors, or a convolution to
    the classes and its pooling."""
    mixing = [index for index, piece in enumerate(pieces) if piece.mixes]
    body = [index for index in mixing[:-1] if _has_extent(pieces[index].value)]
    if not body:
        raise _refused(model, "it has no two layers with weights between which one feature map is all that goes on")
    end = body[-1] + 1
    while end < mixing[-1] and blocks[end] is not None and blocks[end] == blocks[end - 1]:
        end += 1
    # The norm, activation or pooling by maximum behind the last layer.
    while end < mixing[-1] and _belongs_to_the_body(pieces[end], pieces[end - 1], model):
        end += 1
    return end


def _check_classifier(graph, model):
    """Refuses a model whose last layer with weights does not make the classes."""
    if not graph.calls:
        raise _refused(model, "it has no layer with weights")
    logits = graph.calls[-1].value
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        given = f"of shape {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise _refused(model, f"its forward() must put out (N, classes), given a tensor {given}")
    last = next((i for i, call in reversed([*enumerate(graph.calls)]) if _mixes(call.node, model)), None)
    if last is None:
        raise _refused(model, "it has no layer with weights")
    values, node = {call.node: call.value for call in graph.calls}, graph.calls[last].node
    given = values.get(node.all_input_nodes[0])
    vectors = isinstance(given, torch.Tensor) and given[0].numel() == max(given.shape[1:])
    if not vectors and not (last in graph.borders and _makes_classes(node, graph.calls[last + 1 :], logits, model)):
        raise _refused(model, f"it has no classifier: its last layer with weights is {node.target}")


def _makes_classes(node, behind, logits, model):
    """Whether a layer is a 1 x 1 convolution to the classes, with no weights behind it."""
    layer = _found(model, node.target) if node.op == "call_module" else None
    if not isinstance(layer, nn.Conv2d) or max(layer.kernel_size) > 1 or layer.out_channels != logits.shape[1]:
        return False
    layers = [_found(model, call.node.target) for call in behind if call.node.op == "call_module"]
    return not any(list(layer.parameters()) for layer in layers)


def _has_extent(value):
    """Whether it is a map of more than one pixel, or several tokens."""
    if not isinstance(value, torch.Tensor) or value.dim() not in (3, 4):
        return False
    return value.shape[1] > 1 if value.dim() == 3 else max(value.shape[2:]) > 1


def _belongs_to_the_body(piece, before, model):
    (call,) = piece.calls[-1:]
    module = model.get_submodule(call.node.target) if call.node.op == "call_module" else None
    if isinstance(module, nn.Dropout | nn.AdaptiveAvgPool2d | nn.AvgPool2d | nn.Flatten | nn.Identity):
        return False
    pooled = isinstance(module, nn.MaxPool2d) or "max_pool" in str(call.node.target)
    same = isinstance(call.value, torch.Tensor) and call.value.shape == before.value.shape
    return len(piece.calls) == 1 and (pooled or same)


# ---- which pieces are one unit --------------------------------------------------------------------------------------


def _block_types(pieces, model):
    """The types of modules that somewhere hold several mixing layers that no border is between."""
    types = set()
    for piece in pieces:
        if piece.mixes > 1:
            shared = _shared([_around(call) for call in piece.calls])
            own = [type(model.get_submodule(path)) for path, _ in shared]
            types.update([kind for kind in own if kind.forward is not nn.Sequential.forward][-1:])
    return types


def _around(call):
    """The calls of the modules around one, itself not among them."""
    layer = call.node.op == "call_module" and call.within[-1][0] == call.node.target
    return call.within[:-1] if layer else call.within


def _shared(paths):
    """What all of several tuples begin with."""
    shared = paths[0]
    for path in paths[1:]:
        agree = [a == b for a, b in zip(shared, path, strict=False)]
        shared = shared[: (*agree, False).index(False)]
    return shared


def _block_of(piece, types, model):
    """The call of the outermost block that all of a piece lies in, or None."""
    shared = _shared([call.within for call in piece.calls])
    return next((call for call in shared if type(model.get_submodule(call[0])) in types), None)


def _grouped(pieces, blocks):
    """The pieces of each unit: those of one block, else a mixing layer, what leads to it in a module that it shares
    with that and not with the layer before, and what follows."""
    groups, block, mixes = [], None, 0  # of the last group
    for index, piece in enumerate(pieces):
        follows = blocks[index] is None and not piece.mixes and not _leads(pieces, blocks, index)
        same = blocks[index] is not None and blocks[index] == block
        led = blocks[index] is None and not mixes
        if groups and (same or follows or led):
            groups[-1].append(piece)
        else:
            groups.append([piece])
            block, mixes = blocks[index], 0
        mixes += piece.mixes
    return groups


def _leads(pieces, blocks, index):
    """Whether a piece without weights shares more modules with the next mixing layer than with the last."""
    behind = next((i for i in range(index, len(pieces)) if pieces[i].mixes), None)
    before = next((i for i in reversed(range(index)) if pieces[i].mixes), None)
    if behind is None or before is None:
        return before is None
    own = [call.within for call in pieces[index].calls]
    shared = [len(_shared([*own, *(call.within for call in pieces[i].calls)])) for i in (before, behind)]
    return shared[0] < shared[1] and blocks[behind] is None


# ---- the units ------------------------------------------------------------------------------------------------------


def _backbone(model, graph, groups, names, tail):
    units, source, side = [], graph.images, graph.image_shape[1]
    before, takes, reduced = None, MAPS, 1
    for name, pieces in zip(names, groups, strict=True):
        calls = [call for piece in pieces for call in piece.calls]
        module, out = _module(model, calls, source), calls[-1].value
        layout = layout_of(out)
        channels, reduction = channels_of(out, layout), reduction_of(out, layout, side)
        kept = sum(_elements(call) for call in calls if _mixes(call.node, model)) / side**2
        copies = Copies(module, before, out, takes, layout, max(1, reduction // reduced)) if units else None
        numbers = channels, channels, reduction, kept
        units.append(Unit(name, module, *numbers, copies, takes=takes, layout=layout))
        source, before, takes, reduced = calls[-1].node, out, layout, reduction
    classes, classifier = tail[-1].value.shape[1], _classifier(model, tail, source)
    token = takes == TOKENS and _reads_the_first(source)
    return Backbone(tuple(units), classifier, graph.image_shape[0], classes, None, side, token, graph.left_out)


def _reads_the_first(tokens):
    """Whether what reads the tokens, perhaps behind a norm, takes the first one alone."""
    node = tokens
    while len(node.users) == 1:
        (node,) = node.users
        if node.target is operator.getitem:
            return node.args[1] == (slice(None), 0)
    return False


def _elements(call):
    value = call.value[0] if isinstance(call.value, tuple) else call.value
    return value[0].numel() if isinstance(value, torch.Tensor) and value.dim() else 0


def _module(model, calls, source):
    nodes = _with_constants([call.node for call in calls])
    return segment_module(nodes, source, calls[-1].node, lambda path: _found(model, path))


def _with_constants(nodes):
    """The nodes, each behind those that it reads and that need no image."""
    ordered, known = [], set(nodes)

    def add(node):
        for source in node.all_input_nodes:
            if source not in known and source.op != "placeholder" and not _from_images(source):
                known.add(source)
                add(source)
        ordered.append(node)

    for node in nodes:
        add(node)
    return ordered


def _from_images(node):
    seen, stack = set(), [node]
    while stack:
        at = stack.pop()
        if at.op == "placeholder":
            return True
        if at not in seen:
            seen.add(at)
            stack.extend(at.all_input_nodes)
    return False


def _found(model, path):
    try:
        return model.get_submodule(path)
    except AttributeError:
        return _attribute(model, path)


def _lies_in(pieces):
    """The calls of modules that all of a unit's layers with weights lie in."""
    mixing = [piece for piece in pieces if piece.mixes] or pieces
    return _shared([_around(call) for piece in mixing for call in piece.calls])


def _unit_names(model, groups, types):
    """Of the units; where several would be called alike, the later ones are numbered."""
    lies_in, names = [_lies_in(pieces) for pieces in groups], []
    for index, pieces in enumerate(groups):
        name = _unit_name(model, [call for piece in pieces for call in piece.calls], lies_in, index, types)
        count = sum(known == name or known.startswith(f"{name} (") for known in names)
        names.append(f"{name} ({count + 1})" if count else name)
    return names


def _unit_name(model, calls, lies_in, index, types):
    """The path of the module that the unit lies in and no other does; else of its first mixing layer."""
    others = {call for i, shared in enumerate(lies_in) if i != index for call in shared}
    own = [call for call in lies_in[index] if call not in others]
    blocks = [path for path, _ in own if type(model.get_submodule(path)) in types]
    mixing = next((call.node for call in calls if _mixes(call.node, model)), calls[0].node)
    layer = _found(model, mixing.target) if mixing.op == "call_module" else None
    if blocks:
        return blocks[0]
    if own and not (layer is not None and is_block(layer)):
        return own[0][0]
    if not lies_in[index] and not index:
        return "stem"
    return mixing.name if layer is None else mixing.target


def _classifier(model, calls, source):
    """A Sequential; where the model ends with a linear layer, that is its last one."""
    nodes = [call.node for call in calls]
    last = _found(model, nodes[-1].target) if nodes[-1].op == "call_module" else None
    if type(last) is nn.Linear and len(nodes) > 1 and nodes[-1].args == (nodes[-2],):
        front = segment_module(_with_constants(nodes[:-1]), source, nodes[-2], lambda path: _found(model, path))
        return nn.Sequential(*(front if type(front) is nn.Sequential else [front]), last)
    whole = segment_module(_with_constants(nodes), source, nodes[-1], lambda path: _found(model, path))
    return whole if type(whole) is nn.Sequential else nn.Sequential(whole)


def _refused(model, why):
    return ValueError(f"cannot cut {type(model).__name__} into units: {why}")
