"""What a schedule is simulated from: pieces of a network with their seconds and bytes, and the link between ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

__all__ = ["Costs", "Link", "Piece", "total"]


@dataclass(frozen=True)
class Piece:
    """A local module, or under backpropagation a unit, for one batch. Times are in seconds.

    Attributes:
        forward, backward, step: of the forward pass, of the backward pass, of the optimizer.
        weights: the part of `backward` that makes the weights' gradients, which nothing waits for.
        output: bytes that are handed on to the next piece.
        state: bytes that live between steps: parameters, buffers, the optimizer's.
        gradients: bytes of the parameters' gradients.
        kept: bytes that the forward pass leaves for the backward.
        activations: bytes at the highest moment without the parameters' gradients, what is kept included.
        peak: bytes at the highest moment of a step, without what lives between steps.
    """

    forward: float
    backward: float
    weights: float = 0.0
    step: float = 0.0
    output: int = 0
    state: int = 0
    gradients: int = 0
    kept: int = 0
    activations: int = 0
    peak: int = 0

    @property
    def seconds(self) -> float:
        """Of a batch: forward, backward and step."""
        return self.forward + self.backward + self.step

    def scaled(self, factor: float) -> "Piece":
        """With all its times longer by a factor."""
        times = {name: factor * getattr(self, name) for name in ("forward", "backward", "weights", "step")}
        return replace(self, **times)


@dataclass(frozen=True)
class Costs:
    """What the pieces of a network cost.

    Attributes:
        images: in a batch.
        modules: its local modules.
        units: its units under backpropagation, the classifier in the last one.
        batch: bytes of images and labels.
    """

    images: int
    modules: tuple[Piece, ...]
    units: tuple[Piece, ...]
    batch: int = 0

    def scaled(self, factor: float) -> "Costs":
        """On ranks that are slower by a factor, as those that share a processor's memory are."""
        modules, units = (tuple(piece.scaled(factor) for piece in pieces) for pieces in (self.modules, self.units))
        return replace(self, modules=modules, units=units)


@dataclass(frozen=True)
class Link:
    """What one rank sends to another goes through it.

    Attributes:
        bandwidth: bytes a second.
        latency: seconds of an empty message.
    """

    bandwidth: float = 25e9
    latency: float = 5e-6

    def seconds(self, size: float) -> float:
        """Of a message; size: its bytes."""
        return self.latency + size / self.bandwidth

    def all_reduce(self, size: float, ranks: int) -> float:
        """Seconds of the sum of `size` bytes over a ring of ranks: each sends 2 (ranks - 1) / ranks of them."""
        return self.seconds(2 * (ranks - 1) / ranks * size) if ranks > 1 else 0.0


def total(pieces: Sequence[Piece], what: str) -> float:
    """The sum of what the pieces have of that name."""
    return sum(getattr(piece, what) for piece in pieces)
