"""Rewrites BatchNorm [+ residual] [+ ReLU] chains of a module to the fused op.

The result is a second view of the module: it runs the same parameters and buffers, and the module itself
is left as it was, hooks, keys and all.
"""

import operator

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

from . import ops

__all__ = ["BatchNormAct", "fuse"]


class BatchNormAct(nn.Module):
    """A BatchNorm2d of the model, run as `ops.batch_norm_act`, its running statistics updated as eager does."""

    def __init__(self, bn, relu):
        super().__init__()
        self.bn, self.relu = bn, relu

    def forward(self, x, residual=None):
        bn = self.bn
        if not bn.training:  # a BatchNorm frozen in eval mode normalises by its running statistics
            y = bn(x) if residual is None else bn(x) + residual
            return F.relu(y) if self.relu else y
        y, mean, var = ops.batch_norm_act(x, bn.weight, bn.bias, residual, eps=bn.eps, relu=self.relu)
        if bn.track_running_stats:
            _update_running_statistics(bn, mean, var, count=x.numel() // x.shape[1])
        return y


@torch.no_grad()
def _update_running_statistics(bn, mean, var, count):
    bn.num_batches_tracked += 1
    momentum = bn.momentum
    if momentum is None:  # cumulative average
        momentum = 1 / bn.num_batches_tracked.to(mean.dtype)
    unbiased = var * (count / (count - 1))
    bn.running_mean += momentum * (mean.to(bn.running_mean.dtype) - bn.running_mean)
    bn.running_var += momentum * (unbiased.to(bn.running_var.dtype) - bn.running_var)


class _Tracer(torch.fx.Tracer):
    """Looks into containers and the modules named; everything else stays one call."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def is_leaf_module(self, module, qualified_name):
        return not isinstance(module, self.inside)


def fuse(module, inside):
    """`module` with its BatchNorm chains fused.

    Args:
        module: what to rewrite; its weights are shared, not copied.
        inside: module classes whose forward is looked into, besides nn.Sequential.
    """
    graph = _Tracer((nn.Sequential, *inside)).trace(module)
    fused = torch.fx.GraphModule(module, graph)
    parts = dict(fused.named_modules())
    for node in list(graph.nodes):
        if node.op == "call_module" and _can_fuse(parts[node.target]):
            _fuse_chain(fused, graph, node, parts)
    fused.delete_all_unused_submodules()
    graph.lint()
    fused.recompile()
    return fused


def _can_fuse(module):
    return type(module) is nn.BatchNorm2d and module.affine


def _fuse_chain(fused, graph, bn, parts):
    """Replaces bn, and the add and ReLU that are its only readers, by one call."""
    last, residual, relu = bn, None, False
    add = _only_reader(last)
    if add is not None and _is_add(add):
        others = [argument for argument in add.args if argument is not last]
        after = _only_reader(add)
        # Without a ReLU behind it an add keeps nothing: there is nothing to fuse.
        if len(others) == 1 and isinstance(others[0], torch.fx.Node) and after is not None and _is_relu(after, parts):
            residual, last = others[0], add
    reader = _only_reader(last)
    if reader is not None and _is_relu(reader, parts):
        last, relu = reader, True

    name = f"{bn.target}_act".replace(".", "_")
    fused.add_submodule(name, BatchNormAct(parts[bn.target], relu))
    with graph.inserting_before(last):
        inputs = (bn.args[0],) if residual is None else (bn.args[0], residual)
        call = graph.call_module(name, inputs)
    last.replace_all_uses_with(call)
    for node in _chain(bn, last):
        graph.erase_node(node)


def _chain(first, last):
    """The nodes from last back to first, along each one's fused input."""
    chain = [first]
    while chain[-1] is not last:
        chain.append(_only_reader(chain[-1]))
    return reversed(chain)


def _only_reader(node):
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_add(node):
    return (
        node.op == "call_function"
        and node.target in (operator.add, operator.iadd, torch.add)
        and len(node.args) == 2
        and not node.kwargs
    )


def _is_relu(node, parts):
    if node.op == "call_module":
        return type(parts.get(node.target)) is nn.ReLU
    return node.op == "call_function" and node.target in (F.relu, torch.relu)
