"""Attention by torch's own functions on the meta device: there torch never takes a fused kernel, and so would hold the
weights of all values, which a real step does not."""

import functools
import types

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["MetaAttention", "multi_head_attention_forward"]

_aten = torch.ops.aten


class MetaAttention(TorchFunctionMode):
    """Within, scaled_dot_product_attention of meta tensors runs what it does on a CPU where that is the fused kernel:
    without a mask and dropout, of rows without gaps. Other devices' kernels hold the same tensors."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if function is F.multi_head_attention_forward:
            with self:
                return multi_head_attention_forward(*args, **kwargs)
        return function(*args, **kwargs)


# torch's function for a mode to call within itself: it does not ask for a mode that takes it as a whole.
multi_head_attention_forward = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    vars(F) | {"has_torch_function": lambda _tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
    alike = query.shape[-1] == key.shape[-1] == value.shape[-1]
    alike = alike and all(x.stride(-1) == 1 for x in (query, key, value))
    known = query.is_meta and attn_mask is None and not dropout_p and not options and alike
    if not known or not _takes_fused(query.dim()):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    maps = [x if x.dim() == 4 else x.unsqueeze(0) for x in (query, key, value)]
    out, _ = _aten._scaled_dot_product_flash_attention_for_cpu(*maps, 0.0, is_causal)
    return out if query.dim() == 4 else out.squeeze(0)


@functools.cache
def _takes_fused(dims):
    """Whether this torch takes the fused kernel for tensors of so many dimensions on a CPU: of three, newer ones do."""
    if dims not in (3, 4):
        return False
    x = torch.empty((1,) * dims, device="cpu")
    with _Called() as called:
        F.scaled_dot_product_attention(x, x, x)
    return _aten._scaled_dot_product_flash_attention_for_cpu.default in called.operators


class _Called(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operators.add(function)
        return function(*args, **(kwargs or {}))
