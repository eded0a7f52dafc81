"""New blocks like a unit that was read by its graph, of another width, for what another unit puts out."""

import copy
import math
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.utils import _pair

from ..engine.as_real import RealLayouts
from ..engine.node import is_torchvisions
from ..models import BasicBlock
from .layouts import MAPS, TOKENS, channels_of, in_layout, to_layout
from .segment import Segment

__all__ = ["Copies", "TokenBlock"]


@dataclass(frozen=True)
class Copies:
    """Makes copies of a unit: (in_channels, stride, width) -> new module, of the layouts that the unit takes and makes.

    A copy is the unit's own architecture with its channels scaled, behind a 1 x 1 convolution (a linear layer, where
    channels come last) if it is given another number of channels, and an average-pool if it is to have a stride that
    the unit has not. Where a unit cannot be scaled so, a residual block of that width stands for it.

    Args:
        module: the unit's.
        given, made: what the unit takes and puts out, without data.
        takes, makes: their layouts.
        stride: the unit's own.
    """

    module: nn.Module
    given: torch.Tensor
    made: torch.Tensor
    takes: str
    makes: str
    stride: int
    _known: dict = field(default_factory=dict, compare=False, repr=False)  # width, stride -> see `_scaled`

    def __call__(self, in_channels, stride, width):
        found = self._scaled(width, stride)
        if found is None:
            return self.residual(in_channels, stride, width)
        body, channels, _ = found
        body = _fresh(body, self.module)
        return nn.Sequential(*self._adapter(in_channels, channels, stride // self._own_stride(stride)), body)

    def channels(self, width, stride):
        """Of a copy's output."""
        found = self._scaled(width, stride)
        return width if found is None else found[2]

    def is_residual(self, width, stride):
        """Whether a residual block stands for the unit."""
        return self._scaled(width, stride) is None

    def _own_stride(self, stride):
        """What the unit's own layers do of a copy's stride: of none they lose theirs."""
        return self.stride if stride > 1 else 1

    def _scaled(self, width, stride):
        """(the unit's module, its channels scaled, on the meta device; its channels in; out), None: it cannot be."""
        stride = self._own_stride(stride)
        if (width, stride) not in self._known:
            scale = _Scale(width / channels_of(self.made, self.makes), stride == 1 < self.stride)
            try:
                with torch.device("meta"), torch.no_grad(), RealLayouts():
                    self._known[width, stride] = self._fit(scale)
            except Exception:  # whatever its own layers and functions say of other sizes
                self._known[width, stride] = None
        return self._known[width, stride]

    def _fit(self, scale):
        channels = scale(channels_of(self.given, self.takes))
        shape = list(self.given.shape)
        shape[1 if self.takes == MAPS else -1] = channels
        module = copy.deepcopy(self.module).to("meta")
        fitted, out = scale.fit(module, torch.empty(shape, dtype=self.given.dtype))
        return fitted, channels, channels_of(out, self.makes)

    def _adapter(self, in_channels, channels, stride):
        """The layers before the unit's own. Tokens stay as many as they are."""
        layers = []
        if stride > 1 and self.takes != TOKENS:
            layers += in_layout([nn.AvgPool2d(stride, ceil_mode=True)], self.takes)
        if in_channels != channels and self.takes == MAPS:
            layers += [nn.Conv2d(in_channels, channels, 1, bias=False), nn.BatchNorm2d(channels)]
        elif in_channels != channels:
            layers += [nn.Linear(in_channels, channels), nn.LayerNorm(channels)]
        return layers

    def residual(self, in_channels, stride, width):
        """The residual block that stands for the unit where it must."""
        if self.takes == TOKENS:
            return TokenBlock(in_channels, width)
        block = BasicBlock(in_channels, width, stride)
        layers = [*to_layout(self.takes, MAPS), block, *to_layout(MAPS, self.makes)]
        return block if len(layers) == 1 else nn.Sequential(*layers)


class TokenBlock(nn.Module):
    """LayerNorm, two linear layers with a GELU between, plus the shortcut: (N, L, in_channels) -> (N, L, channels)."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(in_channels), nn.GELU()
        self.linear1, self.linear2 = nn.Linear(in_channels, 2 * channels), nn.Linear(2 * channels, channels)
        self.shortcut = None if in_channels == channels else nn.Linear(in_channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return shortcut + self.linear2(self.act(self.linear1(self.norm(x))))


def _fresh(fitted, module):
    """A fitted module on the default device, with new weights, all to be trained; module: the one that it is of, whose
    tables it has, and of which parts may be frozen."""
    made = copy.deepcopy(fitted).to_empty(device=torch.get_default_device()).requires_grad_(True).train()
    own = dict((*module.named_parameters(), *module.named_buffers()))
    with torch.no_grad():
        for name, buffer in made.named_buffers():
            if name in own and own[name].shape == buffer.shape:
                buffer.copy_(own[name])
        for path, part in made.named_modules():
            reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
            if reset is not None:
                reset()
                continue
            for name, parameter in part._parameters.items():
                _init(parameter, own.get(f"{path}.{name}".lstrip(".")))
    return made


def _init(parameter, of):
    """New values for a parameter without a layer of its own: as `of` where that is one constant, such as the scale of a
    layer, else small ones."""
    if parameter is None or parameter.is_meta:
        return
    if of is not None and bool((of == of.flatten()[0]).all()):
        parameter.fill_(of.flatten()[0])
    else:
        nn.init.trunc_normal_(parameter, std=0.02)


class _Scale:
    """Scales a unit's channels, layer by layer, each to what it is then given.

    factor: of the channels.
    without_stride: whether layers lose their strides.
    """

    def __init__(self, factor, without_stride):
        self.factor, self.without_stride = factor, without_stride

    def __call__(self, channels):
        return max(1, round(channels * self.factor))

    def fit(self, module, x):
        """(the module as it is to be, what it makes of x)"""
        if isinstance(module, nn.Sequential):
            layers = []
            for layer in module:
                layer, x = self.fit(layer, x)
                layers.append(layer)
            return nn.Sequential(*layers), x
        if isinstance(module, Segment):
            return module, self._through(module, x)
        fitted = self._layer(module, x)
        return fitted, fitted(x)

    def _through(self, segment, x):
        fitted = set()

        def fit(node, args):
            if node.op in ("call_module", "get_attr") and node.target not in fitted:
                fitted.add(node.target)
                own = getattr(segment, node.target)
                made = self._layer(own, args[0]) if node.op == "call_module" else self._tensor(own)
                setattr(segment, node.target, made)

        return segment.through(x, fit)

    def _tensor(self, tensor):
        if sum(size > 1 for size in tensor.shape) > 1 and self.factor != 1:
            raise ValueError("a tensor of several dimensions")
        shape = [size if size == 1 else self(size) for size in tensor.shape]
        made = torch.empty(shape, dtype=tensor.dtype)
        return nn.Parameter(made) if isinstance(tensor, nn.Parameter) else made

    def _layer(self, layer, x):
        if isinstance(layer, nn.Conv2d):
            return self._conv(layer, x.shape[1])
        if isinstance(layer, nn.MaxPool2d | nn.AvgPool2d) and self.without_stride and max(_pair(layer.stride)) > 1:
            return nn.Identity()
        if is_torchvisions(layer, "ops.misc.FrozenBatchNorm2d"):  # of pretrained layers; a copy's are new
            return nn.BatchNorm2d(x.shape[1], eps=layer.eps)
        if self.factor == 1 or not list(layer.parameters()):
            return layer
        if isinstance(layer, nn.Linear):
            return nn.Linear(x.shape[-1], self(layer.out_features), layer.bias is not None)
        if isinstance(layer, _BatchNorm):
            return type(layer)(x.shape[1], eps=layer.eps, momentum=layer.momentum, affine=layer.affine)
        if isinstance(layer, nn.LayerNorm):  # torchvision's LayerNorm2d too, of maps
            return type(layer)(self(layer.normalized_shape[-1]), eps=layer.eps)
        if isinstance(layer, nn.GroupNorm):
            return nn.GroupNorm(math.gcd(layer.num_groups, x.shape[1]), x.shape[1], layer.eps, layer.affine)
        if isinstance(layer, nn.MultiheadAttention):
            heads = math.gcd(layer.num_heads, x.shape[-1])
            return nn.MultiheadAttention(x.shape[-1], heads, layer.dropout, batch_first=layer.batch_first)
        raise ValueError(f"{type(layer).__name__} cannot be scaled")

    def _conv(self, conv, channels):
        groups, out = conv.groups, self(conv.out_channels)
        if groups == conv.in_channels > 1:
            groups, out = channels, channels * (conv.out_channels // conv.in_channels)
        elif groups > 1 and self.factor != 1:
            most = max(1, channels * groups // conv.in_channels)  # groups of the same width
            groups = next(count for count in range(most, 0, -1) if channels % count == out % count == 0)
        kernel, stride, padding = conv.kernel_size, conv.stride, conv.padding
        if self.without_stride and max(stride) > 1:
            kernel, padding = ((1, 1), 0) if kernel == stride else (kernel, padding)
            stride = (1, 1)
        return nn.Conv2d(channels, out, kernel, stride, padding, conv.dilation, groups, conv.bias is not None)
