"""What happens to gradients behind a backward, as far as a plan depends on it: settings and bytes."""

import math
import numbers
from dataclasses import dataclass, field

import torch
from torch import nn

from ..common.checks import whole_number
from ..common.memory import LiveBytes, bytes_of, tensors_of
from ..distributed.group import world

__all__ = ["CLIPS", "Stepping"]


CLIPS = ("module", "global")


@dataclass(frozen=True)
class Stepping:
    """How optimizers step.

    Attributes:
        accumulate, clip_norm, clip_value, clip, ema: see `auglocal_ext.train`.
        ranks: how many processes' gradients are averaged, those of the running process group.

    Raises:
        ValueError: one of them is out of its range, or they do not go together.
    """

    accumulate: int = 1
    clip_norm: float | None = None
    clip_value: float | None = None
    clip: str = "module"
    ema: float | None = None
    ranks: int = field(default_factory=lambda: world().size)

    def __post_init__(self):
        whole_number(self.accumulate, "accumulate must be a whole number of batches, at least 1", 1)
        for name in ("clip_norm", "clip_value"):
            _check_number(name, getattr(self, name), "a finite number above 0", lambda value: value > 0)
        _check_number("ema", self.ema, "a decay from 0 to below 1, such as 0.999", lambda value: 0 <= value < 1)
        if self.clip not in CLIPS:
            raise ValueError(f"clip must be one of {', '.join(CLIPS)}, given {self.clip!r}")
        if self.clips_globally and self.clip_norm is None:
            raise ValueError("clip='global' is how clip_norm is meant: give clip_norm too, for instance clip_norm=1.0")
        if self.clips_globally and not self.accumulates:
            raise ValueError(
                "clip='global' needs accumulate=2 or more: with accumulate=1 a module's gradients are gone before the "
                "next one's exist; give that, or leave clip at 'module'"
            )

    @property
    def accumulates(self):
        return self.accumulate > 1

    @property
    def clips_globally(self):
        return self.clip == "global"

    @property
    def keeps_more(self):
        """Whether more stays between steps than parameters, buffers and the optimizers' state."""
        return self.accumulates or self.ema is not None

    def gradient_bytes(self, module):
        """Bytes of a module's gradients that are there all the time: none where they go with each batch."""
        return bytes_of({p for p in module.parameters() if p.requires_grad}) if self.accumulates else 0

    def bytes_around(self, modules, scratch):
        """Of each local module (bytes of others' gradients that are there while it runs, bytes that are there behind it
        for a moment beside what its program leaves).

        With several ranks a module's gradients wait in one tensor until they are averaged, behind the next module; that
        one's own are moved into one tensor then, and the last module's are waited for at once. What is accumulated
        lies in such tensors all the time.

        Args:
            modules: of each one the parameters that get gradients.
            scratch: of each one, what its step needs for a moment.
        """
        if self.ranks == 1 or self.clips_globally:
            return [(0, behind) for behind in scratch]
        waiting = [0 if self.accumulates else bytes_of(parameters) for parameters in modules]
        moved = [size if len(parameters) > 1 else 0 for size, parameters in zip(waiting, modules, strict=True)]
        found = []
        for index in range(len(modules)):
            before = (waiting[index - 1], scratch[index - 1]) if index else (0, 0)
            last = scratch[index] if index == len(modules) - 1 else 0
            found.append((before[0], max(sum(before), moved[index], last)))
        return found

    def average_bytes(self, model):
        """Bytes of the averaged model, and of how many it is the average."""
        return 0 if self.ema is None else bytes_of(tensors_of(model)) + torch.int64.itemsize

    def clip_scratch(self, parameters):
        """Bytes that clipping the gradients of these parameters needs for a moment; without data."""
        if self.clip_norm is None:
            return 0
        # It grows with their number only. On the CPU, as torch goes other ways on the meta device.
        standing = [nn.Parameter(torch.zeros(1, dtype=p.dtype)) for p in parameters if p.requires_grad]
        for parameter in standing:
            parameter.grad = torch.zeros_like(parameter)
        with LiveBytes([*standing, *(p.grad for p in standing)]) as live:
            before = live.now
            nn.utils.clip_grad_norm_(standing, self.clip_norm)
        return live.peak - before


def _check_number(name, value, expected, holds):
    """ValueError unless it is None, or a finite number of which this holds."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if value is not None and not (real and math.isfinite(value) and holds(value)):
        raise ValueError(f"{name} must be None or {expected}, given {value!r}")
