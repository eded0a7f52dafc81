"""Devices by name."""

import torch

from .messages import first_line

__all__ = ["usable_device"]


def usable_device(name):
    """The torch.device of this name; ValueError where nothing can be trained on it."""
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("it must be 'cpu', 'cuda' or 'cuda:N'")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(
            f"device {str(name)!r} cannot be used here: {first_line(error)}; leave it out, or say 'cpu'"
        ) from None
    return device
