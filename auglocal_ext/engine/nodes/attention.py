"""Attention: torch's multi-head self-attention, kept for the backward by its projections, its result and one value for
each row of each head. The weights of the values are never stored: torch's fused kernels make them again."""

import operator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ..emit import again
from ..node import Node, computes, trained
from ..tensors import as_gradient, lower
from .linear import linear, linear_data_gradient, linear_weight_gradient

__all__ = ["Attention"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class Attention(Node):
    """out = attention(source, source, source), (N, L, C) -> (N, L, C), without dropout"""

    source: str
    attention: nn.MultiheadAttention

    output_is_ours = True

    @property
    def parameters(self):
        m = self.attention
        return m.in_proj_weight, m.in_proj_bias, m.out_proj.weight, m.out_proj.bias

    @classmethod
    def match(cls, at):
        node, module, reader = at.node, at.module(), at.only_reader(at.node)
        if module is None or not computes(module, nn.MultiheadAttention) or not _is_plain(module):
            return None
        item = reader is not None and reader.target is operator.getitem and reader.args[1] == 0
        to_itself = len(node.args) == 3 and len(node.all_input_nodes) == 1
        if not item or not to_itself or node.kwargs != {"need_weights": False}:
            return None
        return cls(at.out, at.part, at.source(), module), reader

    def plain(self, x):
        m, x = self.attention, x.transpose(1, 0)
        given = m.embed_dim, m.num_heads, m.in_proj_weight, m.in_proj_bias, None, None, False, 0.0
        out = m.out_proj.weight, m.out_proj.bias
        return F.multi_head_attention_forward(x, x, x, *given, *out, need_weights=False)[0].transpose(1, 0)

    def forward(self, emit):
        m, (projected, attended, rows) = self.attention, self._kept()
        project = partial(_project, m.in_proj_weight, m.in_proj_bias, emit.autocast)
        attend = partial(_attend, m.num_heads, emit.device_type)
        leave = partial(linear, weight=m.out_proj.weight, bias=m.out_proj.bias)
        emit.step(self, "attention", project, [self.source], [projected, f"{self.out}.dtype"])
        emit.step(self, "attention", attend, [projected], [attended, rows], _macs)
        emit.step(self, "attention", leave, [attended], [self.out])
        if self.part in emit.recomputed:
            steps = (
                (lambda x: project(x)[0], [self.source], [projected], None),
                (attend, [projected], [attended, rows], _macs),
                (leave, [attended], [self.out], None),
            )
            for run, reads, writes, macs in steps:
                emit.derive(self, "recompute", partial(again, run), reads, writes, macs, by_convolution=True)

    def backward(self, emit):
        m, (projected, attended, rows) = self.attention, self._kept()
        gradient, back = emit.take(self.out), f"{self.out}.attended gradient"
        out, into = (m.out_proj.weight, m.out_proj.bias), (m.in_proj_weight, m.in_proj_bias)
        if trained(*out):
            run = partial(linear_weight_gradient, weight=out[0], bias=out[1])
            emit.step(self, "weight gradient", run, [gradient, attended], emit.gradient_names(*out))
        if self.source in emit.constants and not trained(*into):
            return
        emit.step(self, "data gradient", partial(linear_data_gradient, weight=out[0]), [gradient], [back])
        parts = [f"{self.out}.{name} gradient" for name in ("query", "key", "value")]
        run = partial(_attend_backward, m.num_heads, emit.device_type)
        emit.step(self, "attention backward", run, [back, projected, attended, rows], parts, _macs_backward)
        if trained(*into):
            run = partial(_weight_gradient, *into, emit.autocast)
            emit.step(self, "weight gradient", run, [*parts, self.source], emit.gradient_names(*into))
        if self.source not in emit.constants:
            run, reads = partial(_data_gradient, into[0]), [*parts, f"{self.out}.dtype"]
            emit.step(self, "data gradient", run, reads, [emit.give(self.source)], self._macs_into)

    def _macs_into(self, reads, _writes):
        return sum(grad.numel() for grad in reads[:-1]) * self.attention.embed_dim

    def _kept(self):
        """The names of the projections (N, L, 3 C), what was attended to (N, L, C), and of the rows' values."""
        return [f"{self.out}.{name}" for name in ("projected", "attended", "rows")]

    @classmethod
    def samples(cls):
        return nn.Sequential(nn.Flatten(2), nn.Linear(42, 16), _Block(), nn.Linear(16, 5)), _Block(42, bias=False)


class _Block(nn.Module):
    """An attention to all tokens with a shortcut, for `samples`."""

    def __init__(self, size=16, bias=True):
        super().__init__()
        self.norm = nn.LayerNorm(16) if size == 16 else nn.Sequential(nn.Flatten(2), nn.Linear(size, 16))
        self.attention = nn.MultiheadAttention(16, 2, bias=bias, batch_first=True)

    def forward(self, x):
        x = self.norm(x)
        attended, _ = self.attention(x, x, x, need_weights=False)
        return attended + x


def _is_plain(module):
    """Whether it is one that this describes; torch's kernels take heads of a multiple of 8 on every device."""
    own = module.in_proj_weight, module.in_proj_bias, module.out_proj.weight, module.out_proj.bias
    return (
        module.training  # in eval mode torch takes another way where nothing needs a gradient
        and module.batch_first
        and module.dropout == 0
        and module.bias_k is None
        and not module.add_zero_attn
        and module.head_dim % 8 == 0
        and isinstance(module.in_proj_weight, nn.Parameter)
        and all(isinstance(parameter, nn.Parameter | None) for parameter in own)
    )


def _project(weight, bias, autocast, x):
    """(query, key and value side by side, (N, L, 3 C); the dtype of x)"""
    return linear(lower(x, autocast), weight, bias), x.dtype


def _heads(x, heads):
    """(N, L, C) -> (N, heads, L, C / heads), a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _joined(x):
    """(N, heads, L, C / heads) -> (N, L, C)"""
    return x.transpose(1, 2).flatten(2)


def _on_cuda(x, device_type):
    return (device_type if x.is_meta else x.device.type) == "cuda"


def _attend(heads, device_type, projected):
    """(the values, each row weighted by the softmax of its products with the keys, (N, L, C); the logarithms of the
    rows' sums)"""
    q, k, v = (_heads(x, heads) for x in projected.chunk(3, -1))
    if _on_cuda(projected, device_type):
        attended, rows, *_ = _aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    else:
        attended, rows = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return _joined(attended), rows


def _macs(reads, _writes):
    """Of the products of all queries with all keys, and of these with the values."""
    (projected,) = reads
    return 2 * (projected.numel() // 3) * projected.shape[1]


def _macs_backward(reads, _writes):
    """Of the products with the keys again, and of two gradients for each of both."""
    return _macs(reads[1:2], None) // 2 * 5


def _attend_backward(heads, device_type, grad, projected, attended, rows):
    """The gradients of queries, keys and values, each (N, L, C)."""
    given = [_heads(x, heads) for x in (grad, *projected.chunk(3, -1))]
    attended = _heads(attended, heads)
    if _on_cuda(projected, device_type):
        unused = torch.empty((), dtype=torch.long, device=projected.device)  # the random numbers of a dropout
        wanted = [True, True, True, False]
        found = _aten._scaled_dot_product_efficient_attention_backward(
            *given, None, attended, rows, unused, unused, 0.0, wanted
        )
    else:
        found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, attended, rows, 0.0, False)
    return [_joined(x) for x in found[:3]]


def _weight_gradient(weight, bias, autocast, *given):
    """Of the projection; given: the gradients of its three parts, and its source."""
    *grads, x = given
    x = lower(x, autocast)
    found = [linear_weight_gradient(grad, x, part, None) for grad, part in zip(grads, weight.chunk(3), strict=True)]
    dweight = as_gradient(torch.cat(found), weight)
    if bias is None:
        return dweight
    return dweight, as_gradient(torch.cat([grad.flatten(0, 1).sum(0) for grad in grads]), bias)


def _data_gradient(weight, *given):
    *grads, dtype = given
    first, *others = (part.to(grads[0].dtype) for part in weight.chunk(3))
    dx = linear_data_gradient(grads[0], first)
    for grad, part in zip(grads[1:], others, strict=True):
        dx.flatten(0, 1).addmm_(grad.flatten(0, 1), part)
    return dx.to(dtype)
