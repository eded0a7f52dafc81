"""A module's structure without its data: for tracing shapes and graphs with the user's module left alone."""

import copy
from collections import OrderedDict
from functools import partial

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .messages import first_line

__all__ = ["HOOKS", "METHODS", "as_meta_copy", "forward_of", "meta_copy", "replaced_methods"]


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

METHODS = frozenset({"forward", "_forward_impl", "_conv_forward", "_call_impl"})  # what a call goes through


def meta_copy(module):
    """A copy of a module on the meta device, in the same modes. No data is copied.

    No hook runs when the copy is called, the process's global ones included: they are made for tensors with values. The
    exceptions are those by which torch.nn.utils makes a weight of other parameters (pruning, weight and spectral
    norms): they are part of what the module computes. An nn.SyncBatchNorm of the copy sends nothing.

    Raises:
        ValueError: a part of the module cannot be copied so; names it.
    """
    for name, parameter in module.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise ValueError(
                f"parameter {name} has no shape yet, its layer is a lazy one: run the model once on a batch of images"
            )
    for name, buffer in module.named_buffers():
        if buffer.layout != torch.strided:
            raise ValueError(
                f"buffer {name} is of layout {buffer.layout}, whose bytes cannot be planned: make it dense"
            )
    known = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in module.parameters()}
    known |= {id(b): b.detach().to("meta") for b in module.buffers()}
    for part in module.modules():
        found = [vars(part)[hooks] for hooks in HOOKS if hooks in vars(part)]
        known |= {id(hooks): _kept_hooks(hooks) for hooks in found}
        if getattr(part, "process_group", None) is not None:
            known[id(part.process_group)] = part.process_group  # which cannot be copied
    try:
        with torch.inference_mode(False), torch.no_grad(), _TensorsToMeta():
            copied = copy.deepcopy(module, known)
    except Exception as error:
        raise ValueError(
            f"{type(module).__name__} cannot be copied, as planning needs it: {first_line(error)}{_culprit(module)}"
        ) from error
    for name, part in copied.named_modules():
        own = (*part.parameters(recurse=False), *part.buffers(recurse=False))
        if isinstance(part, torch.jit.ScriptModule) or not all(tensor.is_meta for tensor in own):
            raise ValueError(
                f"{name or type(module).__name__} ({type(part).__name__}) cannot be copied without its data, as "
                f"planning needs it: use the module that it was made from"
            )
    _skip_hooks(copied)
    return copied


def as_meta_copy(module):
    """`meta_copy` of a module that nobody else uses: itself, where it is on the meta device and has no hooks."""
    own = [*module.parameters(), *module.buffers()]
    hooked = any(vars(part).get(hooks) for part in module.modules() for hooks in HOOKS)
    if hooked or not all(tensor.is_meta for tensor in own):
        return meta_copy(module)
    _skip_hooks(module)
    return module


def _skip_hooks(module):
    """Lets calls of a module and of its parts go past all hooks, but those that make a weight."""
    for part in module.modules():
        if not part._forward_pre_hooks:
            vars(part)["_compiled_call_impl"] = forward_of(part)  # what nn.Module.__call__ goes to, where there is one


def forward_of(module):
    """What a module without data is to run: its forward; an nn.SyncBatchNorm, whose own takes nothing but tensors of a
    GPU where there is a process group, what it runs where there is none."""
    return partial(nn.BatchNorm2d.forward, module) if type(module) is nn.SyncBatchNorm else module.forward


def replaced_methods(module):
    """The paths of those parts of a module whose forward was replaced on the object, as "fc.forward"."""
    return [
        f"{path}.{method}".removeprefix(".")
        for path, part in module.named_modules()
        for method in sorted(METHODS)
        if method in vars(part) and not isinstance(part, torch.jit.ScriptModule)
    ]


def _kept_hooks(hooks):
    return OrderedDict((k, hook) for k, hook in hooks.items() if type(hook).__module__.startswith("torch.nn.utils."))


class _TensorsToMeta(TorchFunctionMode):
    """Within, a deepcopy of a tensor is on the meta device. So whatever a module has stored can be copied: results with
    a graph behind them too, which torch refuses to copy."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__deepcopy__:
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.detach().to("meta"))
        return function(*args, **(kwargs or {}))


def _culprit(module):
    """Which part cannot be copied by itself, as a clause of a sentence."""
    for name, part in module.named_modules():
        for attribute, value in vars(part).items():
            if attribute.startswith("_") and attribute in vars(nn.Module()):
                continue
            try:
                with _TensorsToMeta():
                    copy.deepcopy(value)
            except Exception:
                return f"; it is the attribute {f'{name}.{attribute}'.removeprefix('.')} ({type(value).__name__})"
    return ""
