"""What tensors without data do not do by themselves, and real ones do: convolutions' memory formats, and autocast.

A plan is made on the meta device. Its bytes are those of a real step only if every copy that a real step makes is made
there too.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch._prims_common import suggest_memory_format
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from .answers import asked
from .meta_attention import multi_head_attention_forward

__all__ = ["MetaAutocast", "RealLayouts", "autocasting"]

_aten = torch.ops.aten


class RealLayouts(TorchDispatchMode):
    """Within, operators on the meta device answer as they do on a CPU or GPU, where meta tensors' own answers differ:

    - convolutions in channels_last where input or weight are, gradients too;
    - what only moves channels in the input's format;
    - normalisation over groups with statistics in the weight's dtype, its backward without scratch;
    - a BatchNorm in eval mode without statistics of the batch;
    - a LayerNorm without a weight with statistics in its input's dtype;
    - where a layer reads a value (a count, whether anything is NaN), with some value, unless values=False.

    What was answered once is remembered, see `answers`.
    """

    def __init__(self, values=True):
        super().__init__()
        self.answers = _ANSWERS | ({_aten._local_scalar_dense.default: _read_value} if values else {})

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        question = asked(function, args, kwargs)
        if question is not None:
            known = question.answer()
            if known is not None:
                return known[0]
        result = self._run(function, args, kwargs)
        if question is not None:
            question.remember(result)
        return result

    def _run(self, function, args, kwargs):
        answer = self.answers.get(function)
        if answer is not None and args[0].is_meta:
            result = answer(*args, **kwargs)
            if result is not None:
                return result
        result = function(*args, **kwargs)
        if function is _aten.convolution.default:
            _lay_out([result], args[0], args[1])
        elif function is _aten.convolution_backward.default:
            _lay_out(result[:2], args[1], args[2])
        elif function in _MOVING:
            _lay_out([result], args[0])
        return result


def _read_value(tensor):
    """What a value reads as that is not there: no for a question, else one."""
    return False if tensor.dtype == torch.bool else 1


_MOVING = {
    _aten.pixel_shuffle.default, _aten.pixel_unshuffle.default, _aten.channel_shuffle.default,
    _aten.native_channel_shuffle.default, _aten.reflection_pad2d.default,
}  # fmt: skip


def _lay_out(made, *given):
    """Gives maps the memory format of what they are made of, in place: no byte more is there meanwhile."""
    if given[0].dim() != 4 or all(suggest_memory_format(x) != torch.channels_last for x in given):
        return
    for tensor in made:
        if tensor is not None and tensor.is_meta and tensor.dim() == 4:
            n, c, h, w = tensor.shape
            tensor.as_strided_(tensor.shape, (h * w * c, 1, w * c, c))


def _group_norm(x, weight, bias, n, channels, size, groups, eps):
    mixed = weight is not None and weight.dtype != x.dtype
    statistics = [x.new_empty(n, groups, dtype=weight.dtype if mixed else x.dtype) for _ in range(2)]
    return torch.empty_like(x), *statistics


def _group_norm_backward(grad, x, mean, rstd, weight, n, channels, size, groups, mask):
    affine = [x.new_empty(channels, dtype=None if weight is None else weight.dtype) if m else None for m in mask[1:]]
    return torch.empty_like(x) if mask[0] else None, *affine


def _layer_norm(x, shape, weight, bias, eps):
    mixed = weight is not None and weight.dtype != x.dtype
    rows = (*x.shape[: x.dim() - len(shape)], *(1 for _ in shape))
    statistics = [x.new_empty(rows, dtype=weight.dtype if mixed else x.dtype) for _ in range(2)]
    return torch.empty_like(x, memory_format=torch.contiguous_format), *statistics


def _layer_norm_backward(grad, x, shape, mean, rstd, weight, bias, mask):
    affine = [
        torch.empty_like(given) if wanted else None for given, wanted in zip((weight, bias), mask[1:], strict=True)
    ]
    return torch.empty_like(x, memory_format=torch.contiguous_format) if mask[0] else None, *affine


def _batch_norm(x, weight, bias, mean, var, training, momentum, eps):
    dtype = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    return torch.empty_like(x), *(_vector(x.shape[1] if training else 0, dtype) for _ in range(2))


def _batch_norm_backward(grad, x, weight, mean, var, saved_mean, saved_invstd, training, eps, mask):
    if weight is None:
        return None
    affine = [_vector(x.shape[1], weight.dtype) if wanted else None for wanted in mask[1:]]
    return torch.empty_like(x) if mask[0] else None, *affine


def _vector(size, dtype):
    return torch.empty(size, dtype=dtype, device="meta")


_ANSWERS = {
    _aten.native_group_norm.default: _group_norm,
    _aten.native_group_norm_backward.default: _group_norm_backward,
    _aten.native_layer_norm.default: _layer_norm,
    _aten.native_layer_norm_backward.default: _layer_norm_backward,
    _aten.native_batch_norm.default: _batch_norm,
    _aten.native_batch_norm_backward.default: _batch_norm_backward,
}


class MetaAutocast(TorchFunctionMode):
    """Within, functions on the meta device cast as under torch.autocast, which does not know this device.

    Of its lists (see "Autocast Op Reference" in torch's documentation) those that layers of a network call; the
    others keep the dtype that they are given.

    Args:
        autocast: the dtype that is cast to.
        device_type: of the real step.
    """

    def __init__(self, autocast, device_type):
        super().__init__()
        self.autocast, self.raised = autocast, _RAISED.get(device_type, frozenset())

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.multi_head_attention_forward:
            with self:
                return multi_head_attention_forward(*args, **kwargs)
        if function in _LOWERED:
            args, kwargs = _cast((args, kwargs), self.autocast)
        elif function in self.raised or (function is F.pad and _mode(*args, **kwargs) in ("reflect", "replicate")):
            args, kwargs = _cast((args, kwargs), torch.float32)
        return function(*args, **kwargs)


def autocasting(x, autocast, device_type):
    """The context in which torch's functions of a tensor cast as a real step's do.

    Args:
        autocast: None, or the dtype that is cast to; float64 is left alone.
        device_type: of the real step, where x is on the meta device.
    """
    if autocast is None or x.dtype == torch.float64:
        return contextlib.nullcontext()
    if x.is_meta:
        return MetaAutocast(autocast, device_type)
    return torch.autocast(x.device.type, autocast, cache_enabled=False)


def _mode(_x, _pad, mode="constant", value=None):
    return mode


def _cast(arguments, dtype):
    leaves, structure = tree_flatten(arguments)
    for at in reversed(range(len(leaves))):  # the last first, as autocast does: so their gradients die in its order
        leaf = leaves[at]
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.dtype != torch.float64:
            leaves[at] = leaf.to(dtype)
    return tree_unflatten(leaves, structure)


_LOWERED = frozenset(
    {
        F.linear, F.prelu, F.scaled_dot_product_attention, torch.prelu,
        torch.conv1d, torch.conv2d, torch.conv3d,
        torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
        torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.addbmm, torch.baddbmm,
        torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.mm, torch.Tensor.bmm,
    }
)  # fmt: skip
_RAISED = {
    "cpu": frozenset({F.avg_pool3d, F.grid_sample, F.max_unpool2d, torch.prod, torch.cdist, torch.trace}),
    "cuda": frozenset(
        {
            F.layer_norm, F.group_norm, F.softmax, F.log_softmax, F.softplus, F.normalize, F.cosine_similarity,
            torch.layer_norm, torch.group_norm, torch.softmax, torch.log_softmax, torch.exp, torch.log, torch.pow,
            torch.sum, torch.prod, torch.norm, torch.cumsum, torch.rsqrt, torch.reciprocal,
            torch.Tensor.softmax, torch.Tensor.exp, torch.Tensor.log, torch.Tensor.pow, torch.Tensor.__pow__,
            torch.Tensor.sum, torch.Tensor.norm, torch.Tensor.rsqrt,
        }
    ),
}  # fmt: skip
