"""Windows of maps (N, H, W, C), as of Swin: which values attend to each other."""

import torch
import torch.nn.functional as F

__all__ = ["as_maps", "as_windows", "mask_of_shift", "relative_bias"]


def as_windows(x, window, shift):
    """A map (N, H, W, C), padded with zeros to whole windows and rolled by a shift, as (N, windows, places, C)."""
    (height, width), shift = _padded(x.shape, window), _shift(x.shape, window, shift)
    if (height, width) != tuple(x.shape[1:3]):
        x = F.pad(x, (0, 0, 0, width - x.shape[2], 0, height - x.shape[1]))
    if any(shift):
        x = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
    x = x.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))
    return x.transpose(2, 3).reshape(len(x), -1, window[0] * window[1], x.shape[-1])


def as_maps(x, shape, window, shift):
    """Back from `as_windows` of a map of this shape, without the padding."""
    (height, width), shift = _padded(shape, window), _shift(shape, window, shift)
    x = x.view(len(x), height // window[0], width // window[1], *window, -1)
    x = x.transpose(2, 3).reshape(len(x), height, width, -1)
    if any(shift):
        x = torch.roll(x, tuple(shift), (1, 2))
    return x[:, : shape[1], : shape[2]].contiguous()


def mask_of_shift(shape, window, shift, like):
    """(windows, places, places), -100 where two places of a window were no neighbours before the roll, else 0; None
    where nothing is rolled. like: a tensor of the dtype and device."""
    sizes, shift = _padded(shape, window), _shift(shape, window, shift)
    if not any(shift):
        return None
    parts = []
    for size, length, moved in zip(sizes, window, shift, strict=True):
        place = torch.arange(size, device=like.device)
        parts.append((place >= size - length).int() + (place >= size - moved).int())
    part = (3 * parts[0][:, None] + parts[1]).view(1, *sizes, 1)
    part = as_windows(part, window, (0, 0))[0, :, :, 0]
    apart = part[:, None] != part[:, :, None]
    return like.new_zeros(apart.shape).masked_fill_(apart, -100.0)


def relative_bias(table, index, places):
    """(1, heads, places, places) of a table with a row for each difference of places; index: of all pairs' rows."""
    return table[index.view(-1)].view(places, places, -1).permute(2, 0, 1).contiguous().unsqueeze(0)


def _padded(shape, window):
    return tuple(size + -size % length for size, length in zip(shape[1:3], window, strict=True))


def _shift(shape, window, shift):
    """Without the shift along what one window covers."""
    sizes = _padded(shape, window)
    return [0 if length >= size else moved for size, length, moved in zip(sizes, window, shift, strict=True)]
