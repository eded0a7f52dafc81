"""A module's forward as an fx graph, with nothing patched that another thread could see.

torch.fx.symbolic_trace replaces nn.Module.__call__ while it runs: a model that serves in another thread breaks. Here a
copy of the module is traced, and only the copy's modules are told to be recorded.
"""

import contextlib
import operator
import threading
from functools import partial

import torch.fx
from torch import nn
from torch.fx._symbolic_trace import _patch_wrapped_functions, _Patcher

from ..common.meta import meta_copy
from .calls import is_no_value, is_size
from .dropping import is_identity
from .node import is_as_its_class

__all__ = ["Tracer", "Untraceable", "symbolic_graph"]

# Functions that models wrap by torch.fx.wrap are replaced while a trace runs, by ones that record what they are given
# of the trace and do as before with everything else. Two traces must not undo each other's replacements.
_WRAPPING = threading.RLock()


class Untraceable(Exception):
    """The forward has no graph of modules and functions: it branches on values, puts out several, ..."""


def symbolic_graph(module, inside):
    """The torch.fx.Graph of a module of one input, whose every node is used and none hands on what it is given. What it
    uses of its own parameters and buffers directly are nodes "get_attr", whose targets are their paths.

    Args:
        module: left alone; a copy of it is traced.
        inside: types whose forward is looked into. Modules of other types are one call each.

    Raises:
        Untraceable
    """
    copied = meta_copy(module)
    try:
        graph = Tracer(inside).record(copied)
    except Exception as error:
        raise Untraceable(str(error)) from error
    _erase_checks(graph)
    _erase_identities(graph, dict(copied.named_modules()))
    own = {name for name, _ in (*copied.named_parameters(), *copied.named_buffers())}
    for node in graph.nodes:
        made = node.op == "get_attr" and node.target not in own  # a tensor of the trace's, which has no data
        used = any(not is_size(user) for user in node.users) or (node.users and is_size(node))
        if made or (node.op not in ("placeholder", "output") and not used):
            raise Untraceable(f"{node.name} is no step of a chain of modules and functions")
    (output,) = (node for node in graph.nodes if node.op == "output")
    (out,) = output.args
    if not isinstance(out, torch.fx.Node) or out.op in ("placeholder", "get_attr") or is_no_value(out):
        raise Untraceable("it does not put out one new tensor")
    return graph


def _erase_checks(graph):
    """Erases what is there for torch._assert alone, and items of a tuple that nothing uses. A step on tensors checks
    what it is given, and a plan walks the model's own forward first."""
    for node in reversed(graph.nodes):
        comparison = node.op == "call_function" and node.target in _COMPARISONS
        unused = not node.users and (is_size(node) or comparison or node.target is operator.getitem)
        if unused or node.target is torch._assert:
            graph.erase_node(node)


_COMPARISONS = {operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge}


def _erase_identities(graph, modules):
    for node in graph.nodes:
        if is_identity(node, modules.get(node.target) if node.op == "call_module" else None):
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)


class Tracer(torch.fx.Tracer):
    """Records a module, on the meta device and used for nothing else, by what only its own modules are told."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def is_leaf_module(self, module, qualified_name):
        return type(module) not in self.inside or not is_as_its_class(module)

    def record(self, root):
        """What `trace` does, by the copy's own modules."""
        self.root, self.graph, self.tensor_attrs = root, torch.fx.Graph(tracer_cls=type(self)), {}
        self.submodule_paths = {module: name for name, module in root.named_modules()}
        for module in self.submodule_paths:
            self.check(module)
            if module is not root:
                vars(module)["_compiled_call_impl"] = partial(self._called, module)
        x = self.create_proxy("placeholder", "x", (), {})
        with _WRAPPING, _Patcher() as patcher, self._own_tensors():
            _patch_wrapped_functions(patcher)
            out = root(x)
        self.create_node("output", "output", (self.create_arg(out),), {})
        return self.graph

    @contextlib.contextmanager
    def _own_tensors(self):
        """Within, what looks at a parameter or buffer of its own finds the graph's node of it."""
        own = []
        for module, path in self.submodule_paths.items():
            if not self.is_leaf_module(module, path):
                found = {**module._parameters, **module._buffers}
                own += [(module, path, name) for name, tensor in found.items() if tensor is not None]
        for module, path, name in own:
            vars(module)[name] = self.create_proxy("get_attr", f"{path}.{name}".lstrip("."), (), {})
        try:
            yield
        finally:
            for module, _, name in own:
                del vars(module)[name]
            for node in reversed(self.graph.nodes):
                if node.op == "get_attr" and not node.users:
                    self.graph.erase_node(node)

    def check(self, module):
        if type(module).__call__ is not nn.Module.__call__:
            raise Untraceable(f"{type(module).__name__} has a __call__ of its own")

    def _called(self, module, *args, **kwargs):
        return self.call_module(module, module.forward, args, kwargs)
