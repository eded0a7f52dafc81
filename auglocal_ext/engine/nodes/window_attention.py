"""WindowAttention: attention within windows with a bias for each difference of places, Swin's and MaxViT's. It keeps
its projections and its result; the weights of the values are made again, for a part of the images at a time."""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ...common.torchvision import import_torchvision
from ..as_real import autocasting
from ..emit import again
from ..node import Node, computes, is_torchvisions, is_torchvisions_function, trained
from ..tensors import lower
from ..windows import as_maps, as_windows, mask_of_shift, relative_bias
from .linear import is_plain_linear, linear, linear_data_gradient, linear_weight_gradient

__all__ = ["WindowAttention"]

_CHUNKS = 8  # that the images are attended to in: the weights of so much fewer of them are there at once
_SWIN, _SWIN_V2, _MAXVIT = (
    "models.swin_transformer.ShiftedWindowAttention",
    "models.swin_transformer.ShiftedWindowAttentionV2",
    "models.maxvit.RelativePositionalMultiHeadAttention",
)


@dataclass(frozen=True)
class WindowAttention(Node):
    """out = attention(source), of maps (N, H, W, C), or of windows (N, windows, places, C)

    into, leave: the projections at its beginning and its end.
    heads, scale: of the products of queries and keys; None: they are of unit length, and scaled by logit_scale.
    window, shift: None for what is in windows already.
    """

    source: str
    attention: nn.Module
    into: nn.Linear
    leave: nn.Linear
    heads: int
    scale: float | None
    window: tuple[int, int] | None
    shift: tuple[int, int] | None

    @classmethod
    def takes_whole(cls, module):
        return any(is_torchvisions(module, name) for name in (_SWIN, _SWIN_V2, _MAXVIT))

    @classmethod
    def match(cls, at):
        module, node = at.module(), at.node
        if module is None or not cls.takes_whole(module) or len(node.args) != 1 or node.kwargs:
            return None
        if is_torchvisions(module, _MAXVIT):
            given = module.to_qkv, module.merge, module.n_heads, module.scale_factor, None, None
        else:
            if module.training and (module.dropout or module.attention_dropout):
                return None
            scale = None if is_torchvisions(module, _SWIN_V2) else (module.qkv.in_features // module.num_heads) ** -0.5
            window, shift = tuple(module.window_size), tuple(module.shift_size)
            given = module.qkv, module.proj, module.num_heads, scale, window, shift
        own = all(map(is_plain_linear, given[:2])) and _has_own_position(module) and _calls_own_function(module)
        return (cls(at.out, at.part, at.source(), module, *given), node) if own else None

    def plain(self, x):
        # Of torchvision's class, whose own forward it is, and which calls torchvision's own function.
        return type(self.attention).forward(self.attention, x)

    @property
    def parameters(self):
        return [*self.into.parameters(), *self.leave.parameters(), *self.position]

    @property
    def position(self):
        """The parameters that the bias is made of, and of unit lengths the scale of their products, first."""
        mlp = [] if self.scale is not None else self.attention.cpb_mlp.parameters()
        return [getattr(self.attention, name) for name in _names(self.attention)] + list(mlp)

    def forward(self, emit):
        windows, projected, attended, left, sizes = self._values()
        attend = partial(self._attend, (emit.autocast, emit.device_type))
        steps = (
            (partial(self._project, emit.autocast), [windows], [projected], None),
            (attend, [projected, sizes], [attended], lambda reads, _: self._macs(reads[0], 2, 1)),
            (partial(linear, weight=self.leave.weight, bias=self.leave.bias), [attended], [left], None),
        )
        emit.step(self, "windows", self._begin, [self.source], [windows, sizes])
        emit.derive(self, "rebuild", partial(again, self._windows), [self.source], [windows], alias=True)
        for run, reads, writes, macs in steps:
            emit.step(self, "attention", run, reads, writes, macs)
            if self.part in emit.recomputed:
                emit.derive(self, "recompute", partial(again, run), reads, writes, macs, by_convolution=True)
        emit.step(self, "windows", self._maps, [left, sizes], [self.out])
        emit.derive(self, "rebuild", partial(again, self._maps), [left, sizes], [self.out], alias=True)

    def backward(self, emit):
        windows, projected, attended, left, sizes = self._values()
        into, leave = self.into, self.leave
        of_left, of_attended, of_projected, of_windows = (
            f"{name} gradient" for name in (left, attended, projected, windows)
        )
        reads = [emit.take(self.out), *([self.out] if self.out == emit.features else ())]  # to be handed on
        emit.step(self, "windows", self._windows, reads, [of_left])
        self._weight_gradient(emit, leave, of_left, attended)
        if self.source in emit.constants and not trained(*into.parameters(), *self.position):
            return
        emit.step(self, "data gradient", partial(linear_data_gradient, weight=leave.weight), [of_left], [of_attended])
        run = partial(self._attend_backward, (emit.autocast, emit.device_type))
        writes = [of_projected, *emit.gradient_names(*self.position)]
        emit.step(self, "attention backward", run, [of_attended, projected, sizes], writes, self._macs_of_backward)
        self._weight_gradient(emit, into, of_projected, windows)
        if self.source not in emit.constants:
            run = partial(linear_data_gradient, weight=into.weight)
            emit.step(self, "data gradient", run, [of_projected], [of_windows])
            emit.step(self, "windows", self._as_gradient, [of_windows, sizes], [emit.give(self.source)])

    @classmethod
    def samples(cls):
        try:
            torchvision = import_torchvision("attention in windows")
        except ImportError:
            return ()
        swin, maxvit, permute = torchvision.models.swin_transformer, torchvision.models.maxvit, torchvision.ops.Permute
        attention = maxvit.RelativePositionalMultiHeadAttention(4, 2, 9)
        return (
            nn.Sequential(permute([0, 2, 3, 1]), swin.ShiftedWindowAttention(4, [3, 2], [1, 1], 2), nn.Linear(4, 4)),
            nn.Sequential(permute([0, 2, 3, 1]), swin.ShiftedWindowAttention(4, [7, 3], [3, 1], 2, qkv_bias=False)),
            nn.Sequential(permute([0, 2, 3, 1]), swin.ShiftedWindowAttentionV2(4, [2, 3], [1, 1], 2)),
            nn.Sequential(
                nn.Conv2d(4, 9, 1), nn.Flatten(2), nn.Linear(42, 8), nn.Unflatten(2, (2, 4)), _Swap(attention)
            ),
        )

    def _values(self):
        """The names of the windows, their projections (N, windows, places, 3 C), what was attended to, what is left of
        that, and the source's shape and dtype."""
        return [f"{self.out}.{name}" for name in ("windows", "projected", "attended", "left", "sizes")]

    def _weight_gradient(self, emit, module, gradient, source):
        if trained(*module.parameters()):
            writes = emit.gradient_names(module.weight, module.bias)
            run = partial(self._gradients, module, emit.autocast)
            emit.step(self, "weight gradient", run, [gradient, source], writes)

    def _macs(self, projected, products, position):
        """Of so many passes of the products with keys or values, and over what makes a table of the bias."""
        table, made = 0, self.position[1:]
        if made:
            weights = sum(parameter.numel() for parameter in made if parameter.dim() == 2)
            table = weights * self.attention.relative_coords_table[..., 0].numel()
        return products * projected.numel() // 3 * projected.shape[-2] + position * table

    def _macs_of_backward(self, reads, _writes):
        macs = self._macs(reads[1], 6, 3)
        if self.position[1:]:  # the coordinates need no gradient
            macs -= self.position[1].numel() * self.attention.relative_coords_table[..., 0].numel()
        return macs

    # ---- what the steps run ------------------------------------------------------------------------------------------

    def _begin(self, x):
        """(the windows; the shape and dtype of x)"""
        return self._windows(x), (x.shape, x.dtype)

    def _windows(self, x, _output=None):
        return x if self.window is None else as_windows(x, self.window, self.shift)

    def _maps(self, x, sizes):
        return x if self.window is None else as_maps(x, sizes[0], self.window, self.shift)

    def _as_gradient(self, x, sizes):
        return self._maps(x, sizes).to(sizes[1])

    def _project(self, autocast, x):
        bias = self.into.bias
        if self.scale is None and bias is not None:
            bias = bias.clone()
            _of_keys(bias).zero_()
        return linear(lower(x, autocast), self.into.weight, bias)

    def _gradients(self, module, autocast, grad, x):
        found = linear_weight_gradient(grad, lower(x, autocast), module.weight, module.bias)
        if module is self.into and self.scale is None and module.bias is not None:
            _of_keys(found[1]).zero_()
        return found

    def _bias(self, parameters):
        """(the scale of products of unit length, or None; the bias (1, heads, places, places)) of `position`."""
        index = self.attention.relative_position_index
        places = math.isqrt(index.numel())
        if self.scale is not None:
            return None, relative_bias(parameters[0], index, places)
        scale, first, shift, last = parameters
        table = F.linear(F.relu(F.linear(self.attention.relative_coords_table, first, shift)), last)
        scale = torch.clamp(scale, max=math.log(100.0)).exp()
        return scale, 16 * torch.sigmoid(relative_bias(table.view(-1, self.heads), index, places))

    def _mask(self, sizes, like):
        return None if self.window is None else mask_of_shift(sizes[0], self.window, self.shift, like)

    def _attended(self, projected, scale, bias, mask):
        n, windows, places, _ = projected.shape
        q, k, v = projected.reshape(n * windows, places, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if scale is None:
            products = (q * self.scale) @ k.transpose(-2, -1)
        else:
            products = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * scale
        products = products + bias
        if mask is not None:
            products = (products.unflatten(0, (n, windows)) + mask[:, None]).flatten(0, 1)
        return (F.softmax(products, dim=-1) @ v).transpose(1, 2).reshape(n, windows, places, -1)

    def _attend(self, as_eager, projected, sizes):
        attended = projected.new_empty((*projected.shape[:-1], projected.shape[-1] // 3))
        with autocasting(projected, *as_eager):
            given = *self._bias(self.position), self._mask(sizes, projected)
            for x, y in zip(_parts(projected), _parts(attended), strict=True):
                y.copy_(self._attended(x, *given))
        return attended

    def _attend_backward(self, as_eager, grad, projected, sizes):
        """(the projections' gradient, which is written over them, and those of `position`)"""
        with autocasting(projected, *as_eager):
            with torch.enable_grad():
                parameters = [parameter.detach().requires_grad_() for parameter in self.position]
                made = [x for x in self._bias(parameters) if x is not None]
            leaves = [x.detach().requires_grad_() for x in made]
            scale, bias = leaves if self.scale is None else (None, *leaves)
            mask, totals = self._mask(sizes, projected), None
            for x, dy in zip(_parts(projected), _parts(grad), strict=True):
                with torch.enable_grad():
                    part = x.detach().requires_grad_()
                    y = self._attended(part, scale, bias, mask)
                dx, *found = torch.autograd.grad(y, [part, *leaves], dy)
                x.copy_(dx)
                totals = found if totals is None else [a.add_(b) for a, b in zip(totals, found, strict=True)]
                del part, y, dx, found
            return projected, *torch.autograd.grad(made, parameters, totals)


class _Swap(nn.Module):
    """(N, places, windows, C) as windows, for `samples`."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        return self.attention(x.transpose(1, 2))


def _parts(x):
    """Those that the images are attended to in; without data the first two, as the others need no more memory."""
    parts = x.chunk(_CHUNKS)
    return parts[:2] if x.is_meta else parts


def _names(module):
    return ("logit_scale",) if hasattr(module, "logit_scale") else ("relative_position_bias_table",)


def _calls_own_function(module):
    """Whether nobody has put another function in the place of Swin's, which its classes call."""
    function = type(module).forward.__globals__.get("shifted_window_attention")
    return function is None or is_torchvisions_function(function, "models.swin_transformer.shifted_window_attention")


def _has_own_position(module):
    """Whether what its bias is made of is as its class makes it."""
    if not all(name in vars(module)["_parameters"] for name in _names(module)):
        return False
    if not hasattr(module, "cpb_mlp"):
        return True
    match list(module.cpb_mlp):
        case [first, act, last]:
            linear = is_plain_linear(first) and is_plain_linear(last) and first.bias is not None and last.bias is None
            return linear and computes(act, nn.ReLU)
    return False


def _of_keys(bias):
    return bias.chunk(3)[1]
