"""A clock for a machine that is not calibrated, or not there: by its speed in arithmetic and in memory alone."""

from dataclasses import dataclass

import torch
from torch import nn

from ..common.checks import AUTOCAST
from ..common.memory import bytes_of
from ..common.stopwatch import median_seconds

__all__ = ["Roofline", "measured_roofline"]

REPEATS = 5  # after one that warms up


@dataclass(frozen=True)
class Roofline:
    """A clock, see `engine.timeline.timeline`: an instruction takes as long as its multiply-accumulates do, or as the
    bytes that it reads and writes, whichever takes longer.

    Attributes:
        macs: multiply-accumulates a second, as convolutions reach them.
        bandwidth: of memory, bytes a second.
    """

    macs: float
    bandwidth: float

    def __call__(self, step, reads, made, macs):
        """The nanoseconds of a step; for arguments see `timeline`."""
        made = made if isinstance(made, tuple | list) else (made,)
        traffic = bytes_of(value for value in (*reads, *made) if isinstance(value, torch.Tensor))
        return round(1e9 * max(macs / self.macs, traffic / self.bandwidth))

    def optimizer(self, factory, parameters, state_bytes):
        """The nanoseconds of an optimizer's step, which reads and writes its state and the parameters, and reads their
        gradients; see `Calibration.optimizer`."""
        trained = bytes_of(parameter for parameter in parameters if parameter.requires_grad)
        return round(1e9 * (3 * trained + 2 * state_bytes) / self.bandwidth)


@torch.no_grad()
def measured_roofline(device, precision):
    """The Roofline of a device, by a convolution and a multiplication: a fraction of a second.

    Args:
        device: a torch.device.
        precision: "fp32", "bf16" or "fp16".
    """
    dtype = AUTOCAST[precision] or torch.float32
    conv = nn.Conv2d(128, 128, 3, padding=1, bias=False).to(device, dtype, memory_format=torch.channels_last)
    # A GPU is not busy with what a core is.
    images, numbers = (256, 2**26) if device.type == "cuda" else (8, 2**22)
    x = torch.ones(images, 128, 28, 28, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    large = torch.ones(numbers, device=device)
    out, macs = torch.empty_like(large), x.numel() * conv.weight[0].numel()
    runs = (lambda: conv(x)), (lambda: torch.mul(large, 2.0, out=out))
    seconds = [max(median_seconds(device, run, REPEATS), 1e-9) for run in runs]
    return Roofline(macs / seconds[0], 2 * large.nbytes / seconds[1])
