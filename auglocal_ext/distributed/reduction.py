"""Gradients are averaged over the ranks while the next module computes."""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import nn

from .collectives import TRAINING, own_group
from .faults import answering
from .group import world

__all__ = ["Reduction"]


class Reduction:
    """Averages gradients over all ranks, those of one local module in one message.

    The gradients are moved into one flat tensor and become views of it, so that they come back averaged without being
    copied again. Gradients that lie in one tensor already, as those that stay from step to step, are not moved.

    Args:
        begin: the number of the local module that has key 0.

    Attributes:
        count: how many reductions were started.
    """

    def __init__(self, begin: int = 0) -> None:
        self.count, self._begin = 0, begin
        self._pending: list = []  # (key, flat tensor, work), in the order in which they were started

    @property
    def pending(self) -> list:
        """The keys of what was started and not waited for."""
        return [key for key, *_ in self._pending]

    def start(self, key: int, parameters: Iterable[nn.Parameter]) -> None:
        """Begins to average what is in the parameters' `grad`; nothing may read or change it until `wait` has given
        this key, the local module's number from `begin` on. Every rank must start the same ones in the same order."""
        held = [parameter for parameter in parameters if parameter.grad is not None]
        if not held:
            self._pending.append((key, None, None))
            return
        flat = flatten(held)
        self.count += 1
        with self._answering(key):
            work = dist.all_reduce(flat, group=own_group(TRAINING), async_op=True)
        self._pending.append((key, flat, work))

    def wait(self) -> Iterator[int]:
        """Gives the keys of what was started, in that order, each when its gradients are averaged; one is pending until
        the next is asked for. On a GPU it is the GPU that waits."""
        while self._pending:
            key, flat, work = self._pending[0]
            if work is not None:
                with self._answering(key):
                    work.wait()
                flat.div_(world().size)
            del flat, work  # no name here keeps them longer than their parameters do
            yield key
            self._pending.pop(0)

    def _answering(self, key):
        return answering(f"the gradients of local module {self._begin + key}")

    def drop(self) -> None:
        """Forgets what was started."""
        self._pending.clear()

    def __reduce__(self):
        return Reduction, (self._begin,)  # pickled and copied without what is under way, as gradients are


@torch.no_grad()
def flatten(parameters: list[nn.Parameter]) -> torch.Tensor:
    """The gradients' memory as one tensor, (values,), of which they are views afterwards, each with its parameter's
    strides. One gradient is let go after the other: for a moment there are both."""
    if (flat := _in_one([_gradient_of(parameter) for parameter in parameters])) is not None:
        return flat
    flat = _gradient_of(parameters[0]).new_empty(sum(parameter.numel() for parameter in parameters))
    start = 0
    for parameter in parameters:
        view = flat.as_strided(parameter.shape, _strides(parameter), start)
        parameter.grad = view.copy_(_gradient_of(parameter))
        start += parameter.numel()
    return flat


def _gradient_of(parameter: nn.Parameter) -> torch.Tensor:
    """Of one that has a gradient."""
    assert parameter.grad is not None
    return parameter.grad


def _strides(parameter):
    """Its own where it lies densely, in whatever order; else those of a contiguous tensor."""
    lengths, expected = [], 1
    for size in reversed(parameter.shape):
        lengths.append(expected)
        expected *= size
    expected = 1
    for stride, size in sorted(zip(parameter.stride(), parameter.shape, strict=True)):
        if size > 1 and stride != expected:
            return tuple(reversed(lengths))
        expected *= size
    return parameter.stride()


def _in_one(gradients):
    """The tensor that the gradients fill in their order, or None."""
    first, start = gradients[0].untyped_storage(), 0
    for gradient in gradients:
        if gradient.untyped_storage().data_ptr() != first.data_ptr() or gradient.storage_offset() != start:
            return None
        start += gradient.numel()
    if start * gradients[0].itemsize != first.nbytes() or len({gradient.dtype for gradient in gradients}) > 1:
        return None
    return gradients[0].as_strided((start,), (1,), 0)
