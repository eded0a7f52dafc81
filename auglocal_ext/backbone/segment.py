"""A piece of a model's graph as a module: it runs the model's own layers, and the functions between them."""

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

__all__ = ["Segment", "segment_module"]


class Segment(nn.Module):
    """From one value of a model to another.

    Args:
        nodes: fx nodes, in order.
        source: the fx node whose value it is given.
        out: the one of the nodes whose value it puts out.
        find: the path of a module or parameter -> it.
    """

    def __init__(self, nodes, source, out, find):
        super().__init__()
        self.graph, copies = fx.Graph(), {}
        copies[source] = self.graph.placeholder("x")
        names = _names([node.target for node in nodes if node.op in ("call_module", "get_attr")])
        for node in nodes:
            copies[node] = self.graph.node_copy(node, copies.__getitem__)
            if node.target in names and node.op in ("call_module", "get_attr"):
                copies[node].target = names[node.target]
                self._own(names[node.target], find(node.target))
        self.graph.output(copies[out])

    def _own(self, name, found):
        if isinstance(found, nn.Module):
            self.add_module(name, found)
        elif isinstance(found, nn.Parameter):
            self.register_parameter(name, found)
        else:
            self.register_buffer(name, found, persistent=False)

    def forward(self, x):
        return self.through(x)

    def through(self, x, before=None):
        """What it makes of x; before: called with each node that runs and its args, which may put another module or
        tensor in the place of the node's."""
        values = {}
        for node in self.graph.nodes:
            if node.op == "placeholder":
                values[node] = x
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "output":
                return args[0]
            if before is not None:
                before(node, args)
            values[node] = self._run(node, args, kwargs)

    def _run(self, node, args, kwargs):
        if node.op == "get_attr":
            return getattr(self, node.target)
        if node.op == "call_module":  # what a __call__ of its own does besides is in the graph
            return nn.Module.__call__(getattr(self, node.target), *args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        recorded = next((x for x in tree_leaves((args, kwargs)) if isinstance(x, fx.Proxy)), None)
        if recorded is not None:  # a function that was one step is one again: torch.fx.wrap made it so
            return recorded.tracer.create_proxy("call_function", node.target, args, kwargs)
        return node.target(*args, **kwargs)

    def extra_repr(self):
        """What it computes, without names of the whole model: equal pieces have equal ones."""
        own = (*self._parameters.items(), *self._buffers.items())
        place = {node: f"%{index}" for index, node in enumerate(self.graph.nodes)}
        steps = []
        for node in self.graph.nodes:
            what = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
            steps.append(f"{place[node]} = {what}{fx.map_arg((node.args, node.kwargs), place.__getitem__)}")
        return "\n".join([*(f"{name}: {tuple(tensor.shape)}" for name, tensor in own), *steps[1:]])


def segment_module(nodes, source, out, find):
    """The module of a piece: the model's own where that is one call, a Sequential where it is a chain of layers, else a
    Segment. See `Segment`."""
    layers, value = [], source
    for node in nodes:
        layer = _layer(node, value, find)
        if layer is None:
            return Segment(nodes, source, out, find)
        layers.append(layer)
        value = node
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)


def _layer(node, value, find):
    """The layer that a node of a chain is, or None."""
    given = [*node.args[1:], *node.kwargs.items()]
    if node.args[:1] != (value,):
        return None
    if node.op == "call_module" and not given:
        layer = find(node.target)
        return layer if type(layer).__call__ is nn.Module.__call__ else None
    if node.target in ("flatten", torch.flatten) and given in ([1], [("start_dim", 1)]):
        return nn.Flatten(1)
    if node.target is nn.functional.adaptive_avg_pool2d and given in ([1], [(1, 1)]):
        return nn.AdaptiveAvgPool2d(1)
    return None


def _names(paths):
    """{path: a name of it, without what all paths begin with}; a module's name has no dots."""
    parts = [path.split(".") for path in paths]
    same = 0
    while parts and all(len(one) > same + 1 and one[same] == parts[0][same] for one in parts):
        same += 1
    return {path: "/".join(one[same:]) for path, one in zip(paths, parts, strict=True)}
