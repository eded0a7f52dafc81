"""The steps of a local module in the order of its schedule, as if every value stayed; nodes emit their own."""

import enum
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Emit", "Phase", "Recipe", "Step", "again"]


class Phase(enum.Enum):
    """In which pass a step is; the loss is in the forward pass."""

    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass
class Step:
    """One instruction.

    Attributes:
        kind: what it does, for people.
        phase: forward or backward.
        rebuilds: whether it makes again what was there already.
        part: the unit it belongs to, "head" or "extra".
        run: (*values read) -> the values written, one or a tuple; in the order of `reads` and `writes`.
        reads, writes: names of values.
        macs: (values read, values written) -> multiply-accumulates. None: those of the operators that it calls.
        frees: names of values that nothing reads after it.
    """

    kind: str
    phase: Phase
    rebuilds: bool
    part: str
    run: Callable
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    macs: Callable | None = None
    frees: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """How a value that is dropped is made again.

    Attributes:
        kind, part, reads, writes, macs: see `Step`.
        run: (over, *values read) -> the values written; over: a bool for each of the reads, whether it may be written
        over. by_convolution: whether a convolution makes it: it then stays until its last reader. alias: whether it may
        be a view of what it is made from.
    """

    kind: str
    part: str
    run: Callable
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    macs: Callable | None
    by_convolution: bool
    alias: bool


def again(run, _over, *reads):
    """The run of a Recipe that does what a step's run does, and writes over nothing: partial(again, run). run: the
    step's; _over: see `Recipe`, not used; reads: the values."""
    return run(*reads)


class Emit:
    """What nodes emit their steps into; `Node.forward` and `Node.backward` are given it.

    Args:
        nodes: the module's, in the order of execution.
        source: the name of the module's input.
        features: the name of the value to hand on, or None.
        autocast, recomputed, device_type: see `program.build`.

    Attributes:
        steps: so far, a list of `Step`.
        phase: of the steps that are added now.
        losses: names of the terms of the loss.
        gradients: name of a gradient's value -> the parameter it is of.
        recipes: name of a value that can be made again -> its Recipe.
        pinned: names of such values that are never dropped, between their births and their last readers: of what is
            recomputed the checkpoints.
        constants: names of values that need no gradient: the input, and what is made of it without a parameter that
            does.
        readers: name -> how many nodes read the value.
        outputs: names of values that nodes of another part read, and the features.
    """

    def __init__(self, nodes, source, features, autocast, recomputed, device_type):
        self.steps, self.gradients, self.recipes = [], {}, {}
        self.source, self.features = source, features
        self.autocast, self.recomputed, self.device_type = autocast, recomputed, device_type
        self.pinned, self.constants, self.readers = set(), {source}, {}
        self.losses = []
        self._one_loss = sum(node.is_a_loss for node in nodes) == 1
        self.phase = Phase.FORWARD
        self._gradient_of = {}  # a value -> the name of its gradient so far
        self._named = self._given = 0
        self._of_input = {source}  # of the constants the input, and what is made of it again
        self._postponed = []  # (source, emitter of a data gradient)
        self._layouts = {}  # a value that is dropped -> a stored one of its shape and layout
        self._ours = {node.out for node in nodes if node.output_is_ours}
        self._parts = parts = {node.out: node.part for node in nodes}
        self.outputs = {features}
        if parts.get(features) in recomputed:  # which every head then finds there
            self.pinned.add(features)
        for node in nodes:
            if not node.trains and self.constants.issuperset(node.sources):
                self.constants.add(node.out)
            for name in node.sources:
                self.readers[name] = self.readers.get(name, 0) + 1
                if node.part != parts.get(name):
                    self.outputs.add(name)
                leaves = node.keeps_its_source and node.part != parts.get(name) and name not in self._ours
                if parts.get(name) in recomputed and (self.readers[name] > 1 or leaves):
                    self.pinned.add(name)

    @property
    def scale(self):
        """The name of what gradients are multiplied by with the loss, as those in float16 must be; in a list, which is
        empty where they need not."""
        return ["scale"] if self.autocast is torch.float16 else []

    # ---- steps ---------------------------------------------------------------------------------------------------

    def step(self, node, kind, run, reads, writes, macs=None):
        """Adds a step; in the backward pass also what sums the gradients that it contributes.

        Args:
            node: whose it is.
            kind, run, macs: see `Step`.
            reads, writes: names of values: of `sources` and `out`, of its own, such as f"{node.out}.mean", or what
                `take`, `give` and `gradient_names` return.
        """
        self.steps.append(Step(kind, self.phase, False, node.part, run, tuple(reads), tuple(writes), macs))
        for name in writes:
            value = name.rpartition(_GRADIENT)[0]
            if not value or value in self.constants:
                continue
            if value in self._gradient_of:
                total = self.give(value)
                self.steps.append(
                    Step(
                        "add",
                        self.phase,
                        False,
                        node.part,
                        torch.Tensor.add_,
                        (self._gradient_of[value], name),
                        (total,),
                    )
                )
                name = total
            self._gradient_of[value] = name

    def loss_name(self, name):
        """The name for a term of the loss: the one given; of a single term "loss"."""
        self.losses.append("loss" if self._one_loss else name)
        return self.losses[-1]

    def begin_backward(self, last):
        """After the forward of the last node, `last`: sums the terms of the loss, and turns to the backward pass."""
        if len(self.losses) > 1:
            self.step(last, "add", torch.add, self.losses, ["loss"])
        self.phase = Phase.BACKWARD

    def derive(self, node, kind, run, reads, writes, macs=None, like=None, by_convolution=False, alias=False):
        """Lets values be dropped and made again. Of constants those only that are elementwise in the input: of what
        makes the others nothing is kept.

        Args:
            node, kind, reads, writes, macs: see `step`.
            run, by_convolution, alias: see `Recipe`.
            like: the name of a value of the shape and layout of the first one, for where only those are needed.
        """
        if node.out in self.constants:
            if by_convolution or not self._of_input.issuperset(reads):
                return
            self._of_input.update(writes)
        recipe = Recipe(kind, node.part, run, tuple(reads), tuple(writes), macs, by_convolution, alias)
        self.recipes.update(dict.fromkeys(writes, recipe))
        if like is not None and writes[0] not in self.pinned:
            self._layouts[writes[0]] = self._layouts.get(like, like)

    def is_from_before(self, value, part):
        """Whether another part than `part` made a value, or it is the module's input; value: its name."""
        return value == self.source or self._parts.get(value, part) != part

    def layout_of(self, value):
        """The name of a value that is there and has this one's shape and layout."""
        return self._layouts.get(value, value)

    # ---- gradients -----------------------------------------------------------------------------------------------

    def gradient_names(self, *parameters):
        """A list of a name for each parameter's gradient; none for None. What is frozen has one too where it comes with
        another, which nothing reads."""
        names = []
        for parameter in parameters:
            if parameter is not None:
                names.append(f"gradient {self._named}")
                self._named += 1
                if parameter.requires_grad:
                    self.gradients[names[-1]] = parameter
        return names

    def take(self, value):
        """The name of the whole gradient of a value, for its only reader; value: its name. KeyError: it has none."""
        return self._gradient_of.pop(value)

    def gradient_of(self, value):
        """As `take`, for a reader of the value's gradient that is not the last one."""
        return self._gradient_of[value]

    def give(self, value):
        """A new name for one contribution to a value's gradient, for a step to write; contributions are added up."""
        self._given += 1
        return f"{value}{_GRADIENT}{self._given}"

    def contribute(self, node, kind, first, add, reads, value):
        """Adds a step that gives a contribution to a value's gradient which need not be made as a map of its own.

        Args:
            node, kind, reads: see `step`.
            first: (*reads) -> the gradient, where nothing was given yet.
            add: (the gradient so far, *reads) -> the gradient, written over the one so far.
            value: the name of the value.
        """
        before = self._gradient_of.get(value)
        if before is None:
            self.step(node, kind, first, reads, [self.give(value)])
            return
        total = self._gradient_of[value] = self.give(value)
        self.steps.append(Step(kind, self.phase, False, node.part, add, (before, *reads), (total,)))

    def owns(self, value):
        """Whether the backward of the node that reads a value may write over it."""
        return value in self._ours and self.readers[value] == 1 and value != self.features

    def postpone(self, source, emit_data_gradient):
        """A convolution's data gradient, until the weight gradients of all that read the same map are emitted: the map,
        rebuilt for them, is then gone before a gradient of its size is born.

        Args:
            source: the name of the map.
            emit_data_gradient: () -> None, emits the steps.
        """
        self._postponed.append((source, emit_data_gradient))

    def settle(self, node):
        """Emits what was postponed, before the backward of a node that it does not wait for."""
        waits = node is not None and node.data_gradient_waits
        if not waits or any(source != node.sources[0] for source, _ in self._postponed):
            postponed, self._postponed = self._postponed, []
            for _, emit_data_gradient in postponed:
                emit_data_gradient()

    def sum_shared(self):
        """Adds up the gradients of a parameter that several nodes use, each as soon as it is there."""
        steps, first = [], {}  # first: parameter -> the name of its gradient
        for step in self.steps:
            steps.append(step)
            for name in step.writes:
                if name in self.gradients and first.setdefault(self.gradients[name], name) != name:
                    total = first[self.gradients.pop(name)]
                    steps.append(Step("add", step.phase, False, step.part, _sum, (total, name), (total,)))
        self.steps = steps


_GRADIENT = ".grad "


def _sum(a, b):
    """Of two gradients, written over the first; None: no gradient."""
    return b if a is None else a if b is None else a.add_(b)
