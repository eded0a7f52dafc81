"""What an fx node calls, as a function of tensors alone: sizes that a forward reads of its maps are no values of their
own, but part of the calls that they are given to, as the batch's in x.reshape(x.shape[0], -1). So are the several views
that a function like torch.split makes of one tensor."""

import operator

import torch.fx

__all__ = ["call_at", "is_item", "is_no_value", "is_size"]

_ARITHMETIC = {
    operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg, operator.getitem
}  # fmt: skip


def is_size(node):
    """Whether an fx node's value is a size of a map, a tuple of sizes, or is computed from sizes alone."""
    if node.op == "call_method":
        return node.target in ("size", "dim") and not node.kwargs
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    return node.target in _ARITHMETIC and bool(node.all_input_nodes) and all(map(is_size, node.all_input_nodes))


def is_no_value(node):
    """Whether what an fx node makes is part of the calls that it is given to: a size or another property of a tensor,
    or several views of one."""
    return is_size(node) or _is_views(node) or (node.target is getattr and node.args[1] in ("dtype", "device"))


def _is_views(node):
    if node.op == "call_function" and node.target is operator.getitem and isinstance(node.args[1], slice):
        return isinstance(node.args[0], torch.fx.Node) and _is_views(node.args[0])
    return node.target in _VIEWS.get(node.op, ())


_VIEWS = {
    "call_function": {torch.chunk, torch.split, torch.tensor_split, torch.unbind},
    "call_method": {"chunk", "split", "tensor_split", "unbind"},
}


def is_item(node):
    """Whether an fx node takes one of several things, or the first dimension's one."""
    return node.op == "call_function" and node.target is operator.getitem and isinstance(node.args[1], int)


def call_at(node, modules):
    """(the fx nodes of the tensors that an fx node reads, itself or of which it is given a size or views, each once; a
    function of their values that calls what the fx node does).

    modules: path -> module, of the traced root.
    """
    tensors = list(dict.fromkeys(_tensors(node)))

    def call(*given):
        known = dict(zip(tensors, given, strict=True))
        return _evaluate(node, known, modules)

    return tensors, call


def _tensors(node):
    for argument in node.all_input_nodes:
        yield from _tensors(argument) if is_no_value(argument) else (argument,)


def _evaluate(node, known, modules):
    if node in known:
        return known[node]

    def value(argument):
        return _evaluate(argument, known, modules)

    args, kwargs = torch.fx.map_arg(node.args, value), torch.fx.map_arg(node.kwargs, value)
    if node.op == "call_method":
        return getattr(args[0], node.target)(*args[1:], **kwargs)
    function = modules[node.target] if node.op == "call_module" else node.target
    return function(*args, **kwargs)
