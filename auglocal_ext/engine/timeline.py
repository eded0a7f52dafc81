"""When each buffer of a program is born and dies, and what lives at once: one reading of the program's list.

The program is walked on meta tensors, so that nothing is computed; sizes come from the tensors that its steps make,
births from its writes, deaths from its frees, shared memory from what a step wrote over.
"""

from collections import Counter
from dataclasses import dataclass

import torch

from ..common.memory import LiveBytes
from .emit import Phase
from .walked_steps import WalkedSteps

__all__ = ["Buffer", "Moment", "Timeline", "fill", "timeline"]


GRAPHS = "autograd's graphs"  # the buffer of what islands keep


@dataclass(frozen=True)
class Buffer:
    """A piece of memory in one role. Written over, it goes on as another Buffer."""

    name: str
    part: str
    kind: str  # "input", "kept", "transient", "gradient"; see `timeline`
    bytes: int
    born: int  # index of the step that made it
    dies: int  # index of the first step that it is not there for; the number of steps: it outlives the program


@dataclass(frozen=True)
class Moment:
    """What one step does to memory, in bytes: lives before it, at its highest, and after its frees."""

    kind: str
    phase: Phase
    rebuilds: bool
    part: str
    before: int
    high: int
    after: int
    gradients: int  # of `high`: parameter gradients
    macs: int
    traffic: int  # bytes of what it reads and writes, each once
    nanoseconds: int = 0  # predicted by a clock; without one 0


@dataclass(frozen=True)
class Timeline:
    """A program's memory from its first step to its last.

    moments: one per step.
    buffers: in the order of their births.
    """

    moments: tuple[Moment, ...]
    buffers: tuple[Buffer, ...]

    @property
    def peak(self):
        """Bytes at the highest moment: input, activations, gradients."""
        return max(moment.high for moment in self.moments)

    @property
    def activations(self):
        """Bytes at the highest moment without the parameters' gradients."""
        return max(moment.high - moment.gradients for moment in self.moments)

    @property
    def kept(self):
        """Bytes that the forward pass leaves for the backward."""
        backward = (moment.before for moment in self.moments if moment.phase is Phase.BACKWARD)
        return next(backward, 0)

    @property
    def kept_by_autograd(self):
        """Those of `kept` that autograd holds, for what no kind of node describes."""
        turn = sum(moment.phase is Phase.FORWARD for moment in self.moments)
        graphs = [buffer for buffer in self.buffers if buffer.name == GRAPHS]
        return sum(buffer.bytes for buffer in graphs if buffer.born < turn <= buffer.dies)

    @property
    def end(self):
        """Bytes that the program leaves: features to hand on, gradients, the loss."""
        return self.moments[-1].after

    @property
    def macs(self):
        return sum(moment.macs for moment in self.moments)

    @property
    def nanoseconds(self):
        """Predicted by a clock; without one 0."""
        return sum(moment.nanoseconds for moment in self.moments)

    @property
    def rebuild_share(self):
        """Share of the memory traffic that goes into rebuilding what was dropped."""
        rebuilds = sum(moment.traffic for moment in self.moments if moment.rebuilds)
        return rebuilds / max(sum(moment.traffic for moment in self.moments), 1)


@torch.no_grad()
def timeline(program, x, labels, existing, count_input=True, images=None, clock=None, steps=None):
    """Walks a program of modules on the meta device.

    Args:
        program: see `program.build`.
        x, labels: meta tensors: the module's input and the labels.
        existing: what is there anyway: the modules' parameters and buffers.
        count_input: False where the input is the batch, which the caller holds through the whole step.
        images: the batch's, for an extra loss that looks at them.
        clock: None, or (step, what it reads, what it made, its multiply-accumulates) -> the nanoseconds that it takes,
            a whole number; the values are meta tensors, in the order of the step's names.
        steps: `WalkedSteps` of the same modules, or None.

    Returns:
        (Timeline, features): features the meta tensor that is handed on, or None.

    Kinds of buffers: "input", the module's input; "kept", what the forward pass leaves for the backward; "gradient",
    a parameter's gradient; "transient", the rest: activations and feature maps' gradients, there for a moment. The
    labels, images and scale, which the caller holds, are not counted.
    """
    walk = _Walk(program, x, labels, count_input, images, clock, steps or WalkedSteps())
    counted = LiveBytes([*existing, x, labels, *([] if images is None else [images])])
    walk.base = counted.now - walk.live
    for index in range(len(program.steps)):
        walk.step(index, counted)
    return Timeline(tuple(walk.moments), tuple(walk.finished())), walk.features()


class _Walk:
    def __init__(self, program, x, labels, count_input, images, clock, steps):
        self.clock, self.steps = clock, steps
        self.program, self.values = program, program.given(x, labels, images)
        self.open = {}  # storage -> [name, part, kind, bytes, born], of what lives
        self.held, self.holders = {}, Counter()  # value -> its storage's key; key -> how many values
        self.moments, self.buffers = [], []
        self.live = self.gradients = self.base = 0
        self.turn = sum(step.phase is Phase.FORWARD for step in program.steps)  # the first step of the backward pass
        self.last_read = {}
        for index, step in enumerate(program.steps):
            for name in step.reads:
                self.last_read[name] = index
        self.input = x.untyped_storage()._cdata
        self.count_input = count_input
        if count_input:
            self._open(program.input, "input", x.untyped_storage(), 0, "input")

    def step(self, index, counted):
        step, values = self.program.steps[index], self.values
        reads = [values[name] for name in step.reads]
        before = self.live
        made, scratch, macs = self.steps.run(step, reads, counted)
        tensors = {name: t for name, t in zip(step.writes, made, strict=True) if isinstance(t, torch.Tensor)}
        values.update(zip(step.writes, made, strict=True))
        traffic = sum(t.nbytes for t in (*reads, *tensors.values()) if isinstance(t, torch.Tensor))
        nanoseconds = 0 if self.clock is None else self.clock(step, reads, made, macs)
        del reads, made
        for name in tensors:  # no name outlives the loop that would keep what is freed at once
            self._open(name, self._kind(name, index), tensors[name].untyped_storage(), index, step.part)
        self._settle(counted, index, step.part)
        high = before + scratch
        gradients = self.gradients
        tensors.clear()
        for name in step.frees:
            self._free(name, index + 1)
            del values[name]
        self._settle(counted, index + 1, step.part)
        costs = before, high, self.live, gradients, macs, traffic, nanoseconds
        self.moments.append(Moment(step.kind, step.phase, step.rebuilds, step.part, *costs))

    def _settle(self, counted, index, part):
        """Opens or resizes the buffer of what only islands' graphs hold: the rest of what lives."""
        hidden = counted.now - self.base - self.live
        if not hidden:
            return
        before = 0
        if "graphs" in self.open:
            before = self.open["graphs"][3]
            self._close("graphs", index)
            del self.open["graphs"]
        if before + hidden:
            self.open["graphs"] = [GRAPHS, part, "kept", before + hidden, index]
        self.live += hidden

    def _kind(self, name, index):
        if name in self.program.gradients:
            return "gradient"
        return "kept" if index < self.turn <= self.last_read.get(name, -1) else "transient"

    def _open(self, name, kind, storage, index, part):
        key = storage._cdata
        if key == self.input and not self.count_input:  # a view of it
            return
        if key in self.open:  # written over: the memory goes on in another role
            self._close(key, index)
            self.gradients -= self._gradient_bytes(key)
        else:
            self.live += storage.nbytes()
        self.open[key] = [name, part, kind, storage.nbytes(), index]
        if name in self.held:  # it is made again, in the same memory perhaps
            self.holders[self.held[name]] -= 1
        self.held[name] = key
        self.holders[key] += 1
        self.gradients += self._gradient_bytes(key)

    def _free(self, name, index):
        key = self.held.pop(name, None)
        if key is None:
            return
        self.holders[key] -= 1
        if self.holders[key] or key not in self.open:
            return
        self.live -= self.open[key][3]
        self.gradients -= self._gradient_bytes(key)
        if key == self.input:
            self.base += self.open[key][3]  # the walk's caller holds it, unlike the program's
        self._close(key, index)
        del self.open[key]

    def _gradient_bytes(self, key):
        _, _, kind, size, _ = self.open[key]
        return size * (kind == "gradient")

    def _close(self, key, index):
        name, part, kind, size, born = self.open[key]
        self.buffers.append(Buffer(name, part, kind, size, born, index))

    def finished(self):
        for key in self.open:
            self._close(key, len(self.moments))
        return sorted(self.buffers, key=lambda buffer: buffer.born)

    def features(self):
        return self.values.get(self.program.features)


def fill(gaps, line, peak, activations):
    """Chooses values to keep rather than rebuild, where that raises neither the step's peak nor its activations'.

    Args:
        gaps: the program's.
        line: its Timeline with every gap open.
        peak, activations: bytes that the module may reach, with and without parameters' gradients.

    Returns:
        frozenset of the chosen gaps' keys, the shortest gaps first.
    """
    sizes = {buffer.name: buffer.bytes for buffer in line.buffers}
    room = [min(peak - moment.high, activations - moment.high + moment.gradients) for moment in line.moments]
    chosen = set()
    for gap in sorted(gaps, key=lambda gap: gap.end - gap.start):
        between = range(gap.start + 1, gap.end)
        size = sizes[gap.name]
        if all(room[index] >= size for index in between):
            chosen.add(gap.key)
            for index in between:
                room[index] -= size
    return frozenset(chosen)
