"""What the dimensions of a value between two units mean, and modules that bring one layout into another."""

import math

import torch
from torch import nn

__all__ = [
    "MAPS",
    "MAPS_LAST",
    "TOKENS",
    "ToMaps",
    "ToMapsLast",
    "TokenPool",
    "channels_of",
    "in_layout",
    "layout_of",
    "reduction_of",
    "to_layout",
]

MAPS, MAPS_LAST, TOKENS = "maps", "maps, channels last", "tokens"  # (N, C, H, W), (N, H, W, C), (N, L, C)


def layout_of(value):
    """The layout of what a model made of square images."""
    if value.dim() == 3:
        return TOKENS
    _, first, second, third = value.shape
    return MAPS_LAST if first == second != third else MAPS


def channels_of(value, layout):
    return value.shape[1 if layout == MAPS else -1]


def reduction_of(value, layout, side):
    """Image pixels per pixel or token along a side, a power of two."""
    own = math.sqrt(value.shape[1]) if layout == TOKENS else value.shape[2]
    return 2 ** max(0, round(math.log2(side / own)))


def to_layout(given, wanted):
    """The layers that bring values of one layout into another.

    Raises:
        ValueError: tokens, of which one may be no pixel, do not tell a map.
    """
    if given == wanted:
        return []
    if given == TOKENS:
        raise ValueError("a net of feature maps cannot stand behind tokens")
    if wanted == TOKENS:
        return [*to_layout(given, MAPS_LAST), nn.Flatten(1, 2)]
    return [ToMaps() if wanted == MAPS else ToMapsLast()]


def in_layout(layers, layout):
    """Layers of maps, between what brings another layout into theirs and back."""
    return [*to_layout(layout, MAPS), *layers, *to_layout(MAPS, layout)]


class ToMaps(nn.Module):
    """(N, H, W, C) -> (N, C, H, W)"""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 3, 1, 2)


class ToMapsLast(nn.Module):
    """(N, C, H, W) -> (N, H, W, C)"""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1)


class TokenPool(nn.Module):
    """(N, L, C) -> (N, C): the class token, which is the first one, or the mean of all."""

    def __init__(self, class_token: bool) -> None:
        super().__init__()
        self.class_token = class_token

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 0] if self.class_token else x.mean(1)

    def extra_repr(self) -> str:
        return f"class_token={self.class_token}"
