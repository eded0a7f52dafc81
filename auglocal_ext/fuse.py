"""Rewrites a module's BatchNorm chains to the fused ops: with a residual add and a ReLU, with the convolution that
reads the activation, with the stem's max-pool.

The result is a second view of the module: it runs the same parameters and buffers, and the module itself
is left as it was, hooks, keys and all.
"""

import operator

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.utils import _pair

from . import ops
from ._meta import meta_copy

__all__ = ["BatchNormAct", "BatchNormActMaxPool", "ConvBatchNormAct", "fuse"]


class BatchNormAct(nn.Module):
    """A BatchNorm2d of the model, run as `ops.batch_norm_act`, its running statistics updated as eager does."""

    def __init__(self, bn, relu):
        super().__init__()
        self.bn, self.relu = bn, relu

    def forward(self, x, residual=None):
        bn = self.bn
        if not bn.training:
            return self.frozen(x, residual)
        y, mean, var = ops.batch_norm_act(x, bn.weight, bn.bias, residual, eps=bn.eps, relu=self.relu)
        self.update(x, mean, var)
        return y

    def frozen(self, x, residual=None):
        """A BatchNorm in eval mode normalises by its running statistics."""
        y = self.bn(x) if residual is None else self.bn(x) + residual
        return F.relu(y) if self.relu else y

    def update(self, x, mean, var):
        if self.bn.track_running_stats:
            _update_running_statistics(self.bn, mean, var, count=x.numel() // x.shape[1])


class ConvBatchNormAct(BatchNormAct):
    """A BatchNorm2d [+ ReLU] and the convolution behind it, run as `ops.conv_batch_norm_act`."""

    def __init__(self, bn, relu, conv):
        super().__init__(bn, relu)
        self.conv = conv

    def forward(self, x):
        bn, conv = self.bn, self.conv
        if not bn.training:
            return conv(self.frozen(x))
        geometry = {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "groups")}
        y, mean, var = ops.conv_batch_norm_act(
            x, bn.weight, bn.bias, conv.weight, conv.bias, eps=bn.eps, relu=self.relu, **geometry
        )
        self.update(x, mean, var)
        return y


class BatchNormActMaxPool(BatchNormAct):
    """A BatchNorm2d + ReLU and the max-pool behind it, run as `ops.batch_norm_act_max_pool`."""

    def __init__(self, bn, pool):
        super().__init__(bn, relu=True)
        self.pool = pool

    def forward(self, x):
        bn, pool = self.bn, self.pool
        if not bn.training:
            return pool(self.frozen(x))
        window = (pool.kernel_size, pool.stride, pool.padding)
        y, mean, var = ops.batch_norm_act_max_pool(x, bn.weight, bn.bias, *window, ceil_mode=pool.ceil_mode, eps=bn.eps)
        self.update(x, mean, var)
        return y


@torch.no_grad()
def _update_running_statistics(bn, mean, var, count):
    bn.num_batches_tracked += 1
    dtype = bn.running_mean.dtype
    # momentum None: the cumulative average
    momentum = 1 / bn.num_batches_tracked.to(dtype) if bn.momentum is None else bn.momentum
    bn.running_mean.lerp_(mean.to(dtype), momentum)
    bn.running_var.lerp_((var * (count / (count - 1))).to(dtype), momentum)


class _Tracer(torch.fx.Tracer):
    """Looks into modules of the types named, not of their subclasses; everything else stays one call."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def is_leaf_module(self, module, qualified_name):
        return type(module) not in self.inside


def fuse(module, inside):
    """`module` with its BatchNorm chains fused.

    Args:
        module: what to rewrite; its weights are shared, not copied.
        inside: module types whose forward is looked into, besides nn.Sequential. Forward hooks on these, and on
            the modules that become part of a fused call, do not run.
    """
    # The copy is traced, so that no hook of the user's sees what tracing passes around.
    graph = _Tracer({nn.Sequential, *inside}).trace(meta_copy(module))
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
    """Replaces bn, and what reads its result in turn and can join it, by one call."""
    chain, residual, relu = [bn], None, False
    add = _only_reader(bn)
    if add is not None and _is_add(add):
        others = [argument for argument in add.args if argument is not bn]
        after = _only_reader(add)
        # Without a ReLU behind it an add keeps nothing: there is nothing to fuse.
        if len(others) == 1 and isinstance(others[0], torch.fx.Node) and after is not None and _is_relu(after, parts):
            residual = others[0]
            chain.append(add)
    reader = _only_reader(chain[-1])
    if reader is not None and _is_relu(reader, parts):
        chain.append(reader)
        relu = True

    norm, reader = parts[bn.target], _only_reader(chain[-1])
    behind = parts.get(reader.target) if reader is not None and reader.op == "call_module" else None
    if residual is None and _is_plain_conv(behind):
        module = ConvBatchNormAct(norm, relu, behind)
        chain.append(reader)
    elif residual is None and relu and _is_plain_pool(behind):
        module = BatchNormActMaxPool(norm, behind)
        chain.append(reader)
    else:
        module = BatchNormAct(norm, relu)

    name = f"{bn.name}_act"  # a node's name, unlike its module's, is its own where a module is called twice
    fused.add_submodule(name, module)
    with graph.inserting_before(chain[-1]):
        inputs = (bn.args[0],) if residual is None else (bn.args[0], residual)
        call = graph.call_module(name, inputs)
    chain[-1].replace_all_uses_with(call)
    for node in reversed(chain):
        graph.erase_node(node)


def _is_plain_conv(module):
    return type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _is_plain_pool(module):
    return (
        type(module) is nn.MaxPool2d
        and module.dilation in (1, (1, 1))
        and not module.return_indices
        and max(_pair(module.kernel_size)) <= 16
    )


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
