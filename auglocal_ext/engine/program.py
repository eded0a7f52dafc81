"""A local module's training step as a straight-line program: forward, loss, backward, rebuilds and frees in one list.

Running the step, predicting its memory and drawing it are three readings of that list (`Program.run`, and `timeline`).

The schedule. Of the forward pass only convolution outputs, batch statistics and the module's input are kept; the output
of a ReLU that follows a convolution in the convolution's place; of a max-pool its output and a byte each. What is
elementwise in them, every activation and block output, is dropped after its last forward reader, and rebuilt where the
backward needs it. A backward takes the weight gradient first and the data gradient second, so that the rebuilt
activation is gone before the data gradient is born; BatchNorm's backward writes over the incoming gradient or over its
own input; the module's input gets no gradient; the head's feature-map gradient is an (N, C) matrix. The module's
output, dropped like any other, is rebuilt once more before what it is made of is overwritten.

Of the parts that are `recomputed` convolution outputs are dropped too and made by running the convolution again, and
what is kept is what more than one node or the next part reads: gradient checkpointing of these units, BatchNorm's
statistics taken once.

What stands before the first parameter that trains runs forward only and keeps nothing; so does a module without a loss.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd import profiler

from .emit import Emit, Step
from .leaving import accumulating, leave
from .nodes import Head, Island
from .schedule import Gap, add_frees, block_outputs_to_pin, passes_of, with_rebuilds
from .tensors import dense

__all__ = ["Program", "build"]


@dataclass
class Program:
    """The steps of one local module.

    Attributes:
        input, labels, images, scale, features, logits, loss: names of values; features is None for the last module,
            scale where features are not float16, logits and loss for one that runs forward only.
        gradients: name of a gradient's value -> the parameter it is of, each parameter once. The value is None where
            an island has a parameter that it does not use.
        accumulates: whether steps of its own have added the gradients to those in the parameters.
        islands: what no kind of node describes.
        gaps: where the schedule drops and rebuilds, for `build`'s `kept_gaps`.
    """

    steps: list[Step]
    input: str
    features: str | None
    logits: str | None
    gradients: dict[str, nn.Parameter]
    islands: list[Island]
    gaps: list[Gap]
    loss: str | None = "loss"
    labels: str = "labels"
    images: str = "images"
    scale: str | None = None
    accumulates: bool = False

    @property
    def by_autograd(self):
        """The islands that autograd differentiates: not those of what is frozen."""
        read = {name for step in self.steps for name in step.reads}
        return [island for island in self.islands if f"{island.out}.graph" in read]

    def given(self, x, labels, images=None, scale=None):
        """The values that are there before the first step, by name; for arguments see `run`."""
        values = {self.images: images, self.input: x, self.labels: labels}
        if self.scale is not None:
            values[self.scale] = labels.new_ones((), dtype=torch.float32) if scale is None else scale
        return values

    @torch.no_grad()
    def run(self, inputs, labels, images=None, scale=None):
        """Forward and backward; leaves the gradients in the parameters, added to those there are where it accumulates.

        Args:
            inputs: a list that holds the module's input alone. It is emptied, so that the input can go as soon as
                nothing needs it.
            labels: (N,), int64, or (N, classes) of the parameters' dtype.
            images: the step's, for an extra loss that looks at them.
            scale: a tensor (), by which gradients are multiplied where features are float16; None: 1.

        Returns:
            (features, logits, loss), None where the program has no name for it.
        """
        values = self.given(dense(inputs.pop()), labels, images, scale)
        try:
            # An autocast of the caller's would change the dtype of what the steps make.
            device = labels.device.type if labels.device.type != "meta" else "cpu"  # autocast does not know meta
            with torch.autocast(device, enabled=False):
                execute = _profiled if profiler._is_profiler_enabled else self.execute
                for step in self.steps:
                    execute(step, values)
            if not self.accumulates:
                for name, parameter in self.gradients.items():
                    leave(parameter, values.pop(name))
            return tuple(values.get(name) for name in (self.features, self.logits, self.loss))
        finally:
            values.clear()  # a traceback would keep them

    @staticmethod
    def execute(step, values):
        """Runs one step on the values that live."""
        made = step.run(*[values[name] for name in step.reads])
        if len(step.writes) == 1:
            values[step.writes[0]] = made
        else:
            values.update(zip(step.writes, made, strict=True))
        for name in step.frees:
            del values[name]


def _profiled(step, values):
    """Runs a step as a range of torch.profiler's, "layer1.0: conv backward" for instance."""
    with profiler.record_function(f"{step.part}: {step.kind}"):
        Program.execute(step, values)


def build(
    nodes,
    source,
    features,
    *,
    autocast=None,
    kept_gaps=(),
    pinned=None,
    recomputed=(),
    accumulate=False,
    device_type="cpu",
):
    """The program of one local module.

    Args:
        nodes: from `trace.join`, or without a head and a loss: of a module that runs forward only, whose parameters
            need no gradient.
        source: the name of the module's input.
        features: the name of the value to hand on, or None.
        autocast: None, or the dtype that features have beside parameters of float32.
        kept_gaps: keys of gaps not to drop a value over.
        pinned: names of parts' outputs never to drop, instead of every LONGEST_REBUILD-th of a chain.
        recomputed: the names of the parts whose convolution outputs are dropped too, and the convolutions run again.
        accumulate: whether gradients are added to those in the parameters, each as soon as it is made.
        device_type: of the real step, where the program is walked on the meta device.
    """
    emit = Emit(nodes, source, features, autocast, recomputed, device_type)
    for node in nodes:
        node.forward(emit)
    emit.begin_backward(nodes[-1])
    for node in reversed(nodes):
        if node.out not in emit.constants:
            emit.settle(node)
            node.backward(emit)
    emit.sum_shared()
    pinned = block_outputs_to_pin(emit) if pinned is None else pinned
    _, _, within = passes_of(emit)
    steps, gaps = with_rebuilds(emit, kept_gaps, emit.pinned | pinned | within)
    loss = logits = None
    if emit.losses:
        loss, logits = "loss", nodes[-1].out if isinstance(nodes[-1], Head) else nodes[-1].source
    outputs = {features, logits, loss} - {None}
    if accumulate:
        steps, gaps = accumulating(steps, gaps, emit.gradients)
    else:
        outputs |= emit.gradients.keys()
    add_frees(steps, {source, "labels", "images", "scale"}, outputs)
    islands = [node for node in nodes if isinstance(node, Island)]
    more = {"accumulates": accumulate, "scale": emit.scale[0] if emit.scale else None}
    return Program(steps, source, features, logits, emit.gradients, islands, gaps, loss, **more)
