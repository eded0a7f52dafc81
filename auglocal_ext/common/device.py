"""Devices by name."""

import platform
from pathlib import Path

import torch

from .messages import first_line

__all__ = ["name_of_processor", "usable_device"]


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


def name_of_processor():
    """What this machine's CPU calls itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.split(": ")[1] for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
