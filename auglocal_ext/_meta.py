"""A module's structure without its data: for tracing shapes and graphs with the user's module left alone."""

import copy

import torch
from torch import nn

__all__ = ["meta_copy"]


def meta_copy(module):
    """A copy of a module on the meta device, in the same modes, without its hooks. No data is copied."""
    replaced = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in module.parameters()}
    replaced |= {id(b): b.to("meta") for b in module.buffers()}
    with torch.no_grad():
        copied = copy.deepcopy(module, replaced)
    for part in copied.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
            hooks.clear()
    return copied
