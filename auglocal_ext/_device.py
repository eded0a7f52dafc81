"""Devices by name."""

import torch

__all__ = ["usable_device"]


def usable_device(name):
    """The torch.device of this name; ValueError where nothing can be put on it."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(name)!r} cannot be used here: {reason}; leave it out, or say 'cpu'") from None
    return device
