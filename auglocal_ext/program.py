"""A local module's training step as a straight-line program: forward, loss, backward, rebuilds and frees in one list.

Running the step, predicting its memory and drawing it are three readings of that list (`Program.run`, and `timeline`).

The schedule. Of the forward pass only convolution outputs, batch statistics and the module's input are kept; the output
of a ReLU that follows a convolution in the convolution's place; of a max-pool its output and a byte each. What is
elementwise in them, every activation and block output, is *derived*: dropped after its last forward reader, and rebuilt
where the backward needs it. A backward takes the weight gradient first and the data gradient second, so that the
rebuilt activation is gone before the data gradient is born; BatchNorm's backward writes over the incoming gradient or
over its own input; the module's input gets no gradient; the head's feature-map gradient is an (N, C) matrix. The
module's output, dropped like any other, is rebuilt once more before what it is made of is overwritten.

With `recompute`, convolution outputs are derived too, by running the convolution again, and what is kept is what more
than one node or the next unit reads, the units' inputs: gradient checkpointing of every unit, BatchNorm's statistics
taken once.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.modules.utils import _pair

from .as_real import MetaAutocast
from .graph import AddedLoss, Conv, Head, Island, Loss, MaxPool, Norm, Pool, Relu, join, trace
from .ops.batch_norm_act import memory_format
from .ops.batch_norm_act_max_pool import pool_window

__all__ = ["Program", "Step", "build", "programs"]

# How many elementwise passes a rebuild may walk before a block output on its way is kept instead.
LONGEST_REBUILD = 6


@dataclass
class Step:
    """One instruction. run(*reads) -> the writes, one tensor or a tuple; in order."""

    name: str
    part: str  # the unit or aux net it belongs to
    run: Callable
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    # The first tensor written forward, read backward -> multiply-accumulates. None: those of the operators it calls.
    macs: Callable | None = None
    frees: tuple[str, ...] = ()  # values that nothing reads after it


@dataclass(frozen=True)
class Gap:
    """A derived value that is dropped after step `start` and rebuilt by the steps from `end` on."""

    name: str
    reader: int  # which step of the schedule without rebuilds it is rebuilt for; with the name, the gap's identity
    start: int
    end: int

    @property
    def key(self):
        return self.name, self.reader


@dataclass
class Program:
    """The steps of one local module.

    Attributes:
        input, labels, features, logits, loss: names of values; features is None for the last module.
        gradients: name of a gradient's value -> the parameter it is of, each parameter once. The value is None where
            an island has a parameter that it does not use.
        islands: what runs by autograd, for people.
        called: the modules among them: what a hook on them, or on a module within, is run by.
        by_autograd: the parameters whose gradients autograd computes, and runs their hooks by that.
        gaps: where the schedule drops and rebuilds, for `build`'s `keep`.
    """

    steps: list[Step]
    input: str
    features: str | None
    logits: str
    gradients: dict[str, nn.Parameter]
    islands: list[str]
    called: list[nn.Module]
    by_autograd: set[nn.Parameter]
    gaps: list[Gap]
    loss: str = "loss"
    labels: str = "labels"
    images: str = "images"

    @torch.no_grad()
    def run(self, inputs, labels, images=None):
        """Forward and backward; leaves the gradients in the parameters.

        Args:
            inputs: a list that holds the module's input alone. It is emptied, so that the input can go as soon as
                nothing needs it.
            labels: (N,), int64.
            images: the step's, for an extra loss that looks at them.

        Returns:
            (features or None, logits, loss)
        """
        values = {self.images: images, self.input: _dense(inputs.pop()), self.labels: labels}
        try:
            # An autocast of the caller's would change the dtype of what the steps make.
            device = labels.device.type if labels.device.type != "meta" else "cpu"  # autocast does not know meta
            with torch.autocast(device, enabled=False):
                for step in self.steps:
                    self.execute(step, values)
            for name, parameter in self.gradients.items():
                _leave(parameter, values.pop(name), parameter in self.by_autograd)
            return values.get(self.features), values[self.logits], values[self.loss]
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


def _leave(parameter, gradient, by_autograd):
    """Puts a gradient into its parameter, and calls the parameter's hooks as autograd's own backward does; those on the
    gradient not again where autograd has computed it."""
    if gradient is not None and parameter._backward_hooks and not by_autograd:
        for hook in tuple(parameter._backward_hooks.values()):
            changed = hook(gradient)
            gradient = gradient if changed is None else changed
    parameter.grad = gradient
    if gradient is not None and parameter._post_accumulate_grad_hooks:
        for hook in tuple(parameter._post_accumulate_grad_hooks.values()):
            hook(parameter)


def programs(backbone, cuts, heads, autocast=None, keep=None, recompute=False, trace=trace, device_type="cpu"):
    """The programs of a backbone's local modules, in order.

    Args:
        backbone, cuts: see `rules.cut`.
        heads: each module's LocalHead, the classifier's last.
        autocast: None, or the dtype that features have beside parameters of float32.
        keep: for each module, the keys of gaps not to drop a value over; None: drop everywhere.
        recompute, device_type: see `build`.
        trace: `graph.trace`, or that of a `graph.Reader`.
    """
    made, source = [], "images"
    for part, head, kept in zip(cuts, heads, keep or [()] * len(cuts), strict=True):
        nodes, features = module_nodes(backbone, part.first, part.last, head, source, trace)
        options = {"autocast": autocast, "keep": kept, "recompute": recompute, "device_type": device_type}
        made.append(build(nodes, source, features, **options))
        source = features
    return made


def module_nodes(backbone, first, last, head, source, trace=trace):
    """The nodes of a local module, units first..last (inclusive) with a LocalHead, and the name of the features that it
    hands on: None behind the backbone's last unit. trace: see `programs`."""
    inside = _inside(backbone)
    nodes, out = unit_nodes(backbone, first, last, source, trace)
    features = out if last < len(backbone.units) - 1 else None
    extra_weight, weight = head.weights
    if head.extra is not None:
        extra_nodes, prediction = trace(head.extra.net, inside, "extra", out)
        nodes += [*extra_nodes, AddedLoss("extra loss", "extra", prediction, head.extra.loss, extra_weight)]
    head_nodes, _ = trace(head.net, inside, "head", out)
    return join(nodes, head_nodes, features, weight), features


def unit_nodes(backbone, first, last, source, trace=trace):
    """The nodes of units first..last (inclusive), and the name of their output. trace: see `programs`."""
    nodes, out = [], source
    for unit in backbone.units[first : last + 1]:
        made, out = trace(unit.module, _inside(backbone), unit.name, out)
        nodes += made
    return nodes, out


def _inside(backbone):
    """The module types that are looked into."""
    return {type(unit.module) for unit in backbone.units} - {nn.Sequential}


def build(nodes, source, features, *, autocast=None, keep=(), stay=None, recompute=False, device_type="cpu"):
    """The program of one local module.

    Args:
        nodes: from `graph.join`.
        source: the name of the module's input.
        features: the name of the value to hand on, or None.
        autocast: None, or the dtype that features have beside parameters of float32.
        keep: keys of gaps not to drop a value over.
        stay: names of values never to drop, instead of every LONGEST_REBUILD-th of a chain.
        recompute: drop convolution outputs too, and run the convolutions again.
        device_type: of the real step, where the program is walked on the meta device.
    """
    emit = _Emitter(nodes, source, features, autocast, recompute, device_type)
    for node in nodes:
        emit.forward(node)
    emit.begin_backward(nodes[-1])
    for node in reversed(nodes):
        emit.backward(node)
    _sum_shared(emit)
    if stay is None:
        stay = set() if recompute else _kept(emit)
    steps, gaps = _with_rebuilds(emit, keep, stay)
    logits = nodes[-1].source if isinstance(nodes[-1], Loss) else nodes[-1].out
    kept = {features, logits, "loss", *emit.gradients} - {None}
    _add_frees(steps, {source, "labels", "images"}, kept)
    islands = [node for node in nodes if isinstance(node, Island)]
    return Program(
        steps,
        source,
        features,
        logits,
        emit.gradients,
        [island.what for island in islands],
        [island.call for island in islands if isinstance(island.call, nn.Module)],
        {parameter for island in islands for parameter in island.parameters},
        gaps,
    )


# ---- steps in the order of the schedule, as if derived values were always there -----------------------------


class _Emitter:
    def __init__(self, nodes, source, features, autocast, recompute, device_type):
        self.steps, self.gradients, self.named = [], {}, 0
        self.derived = {}  # a value that can be rebuilt -> the Step that does it
        self.pinned = set()  # derived values that stay from their birth to their last reader
        self.source, self.features, self.autocast, self.device_type = source, features, autocast, device_type
        self.gradient_of = {}  # a value -> the name of its gradient so far
        self.recompute, self.recomputed = recompute, set()  # recomputed: derived values that a convolution makes
        self.shape_of = {}  # a derived value -> a stored one of its shape and layout
        self.waiting = []  # data gradients of convolutions that read one map, after all their weight gradients
        self.first_backward = None
        self.given = 0
        self.has_extra, self.losses = any(isinstance(node, AddedLoss) for node in nodes), []  # losses: the terms' names
        self.conv_outputs = {node.out for node in nodes if isinstance(node, Conv)}
        self.checkpoints = set()  # with recompute: what is kept, of all that can be rebuilt
        self.constants = {source}  # values that need no gradient: the input, and what has no parameters behind it
        self.readers, parts = {}, {node.out: node.part for node in nodes}
        for node in nodes:
            without_parameters = isinstance(node, MaxPool) or (isinstance(node, Island) and not _trained(node))
            if without_parameters and self.constants.issuperset(node.sources):
                self.constants.add(node.out)
            for name in node.sources:
                self.readers[name] = self.readers.get(name, 0) + 1
                leaves = not isinstance(node, Head) and node.part != parts.get(name) and name not in self.conv_outputs
                if recompute and (self.readers[name] > 1 or leaves):
                    self.checkpoints.add(name)

    def add(self, node, name, run, reads, writes, macs=None):
        self.steps.append(Step(name, node.part, run, tuple(reads), tuple(writes), macs))

    def begin_backward(self, last):
        if self.losses != ["loss"]:
            self.add(last, "add", torch.add, self.losses, ["loss"])
        self.first_backward = len(self.steps)

    def forward(self, node):
        match node:
            case Conv():
                run = partial(_conv, node.conv, self.autocast)
                self.add(node, "conv", run, [node.source], [node.out], _conv_macs(node.conv))
                if self.recompute:
                    again = partial(_recomputed_conv, node.conv, self.autocast)
                    self.recomputed.add(node.out)
                    step = Step("recompute", node.part, again, (node.source,), (node.out,), _conv_macs(node.conv))
                    self.derived[node.out] = step
            case Norm():
                statistics = _statistics(node)
                self.add(node, "norm", partial(_norm, node.bn, node.relu), node.sources, [node.out, *statistics])
                self._derive(node, partial(_rebuild_norm, node.bn, node.relu), [node.source, *statistics], [node.out])
                if node.out not in self.checkpoints:
                    self.shape_of[node.out] = self.shape_of.get(node.source, node.source)
            case Pool():
                made, statistics = [node.out, f"{node.out}.index"], _statistics(node)
                self.add(node, "statistics", partial(_batch_statistics, node.bn), [node.source], statistics)
                self.add(node, "pool", partial(_pool, node), [node.source, *statistics], made)
                self._derive(node, partial(_rebuild_pool, node), [node.source, *statistics], made)
            case Relu():
                self.add(node, "relu", torch.Tensor.relu_, [node.source], [node.out])
            case MaxPool():
                made = [node.out, f"{node.out}.place", f"{node.out}.like"]
                self.add(node, "max pool", partial(_max_pool, node.pool), [node.source], made)
            case Head():
                self._head_forward(node)
            case Island():
                self.pinned.update(node.sources)
                wanted = [name not in self.constants for name in node.sources]
                run = partial(_island, node, self.autocast, self.device_type, wanted)
                self.add(node, "island", run, node.sources, [node.out, f"{node.out}.graph"])
            case Loss():
                self._loss(node, partial(_loss, F.cross_entropy, node.weight), ["labels"])
            case AddedLoss():
                self._loss(node, partial(_loss, node.loss, node.weight), ["labels", "images"])

    def _loss(self, node, run, reads):
        writes = [self._loss_name(node), self._give(node.source)]
        self.add(node, "loss", run, [node.source, *reads], writes)
        self._accumulate(node)

    def _loss_name(self, node):
        name = node.out if isinstance(node, AddedLoss) else "cross-entropy" if self.has_extra else "loss"
        self.losses.append(name)
        return name

    def _derive(self, node, run, reads, made):
        if isinstance(node, Norm) and node.residual is not None:
            reads = [*reads, node.residual]
        step = Step("rebuild", node.part, run, tuple(reads), tuple(made))
        self.derived.update(dict.fromkeys(made, step))

    def _head_forward(self, node):
        norm, head_bn, linear = node.norm, node.head_bn, node.linear
        statistics, pooled = _statistics(norm), f"{node.out}.pooled"
        reads = [norm.source, *statistics, *norm.sources[1:]]
        self.add(node, "statistics", partial(_batch_statistics, norm.bn), [norm.source], statistics)
        self.add(node, "pooled norm", partial(_pooled_norm, norm.bn, norm.relu), reads, [pooled])
        if head_bn is not None:
            made = [f"{pooled}.norm", f"{pooled}.mean", f"{pooled}.invstd"]
            self.add(node, "head norm", partial(_head_norm, head_bn), [pooled], made)
            pooled = made[0]
        weight, bias = self._gradient(linear.weight), self._gradient(linear.bias)
        writes = [node.out, self._loss_name(node), f"{node.out}.gradient", *weight, *bias]
        run = partial(_linear_cross_entropy, linear, node.weight)
        self.add(node, "linear and loss", run, [pooled, "labels"], writes, _linear_macs(linear))

    def backward(self, node):
        if not isinstance(node, Conv):
            self._data_gradients()
        match node:
            case Conv():
                self._conv_backward(node)
            case Norm():
                self._norm_backward(node)
            case Pool():
                reads = [self._take(node.out), node.source, f"{node.out}.index", *_statistics(node)]
                writes = [self._give(node.source), *self._gradient(node.bn.weight), *self._gradient(node.bn.bias)]
                reads += [node.out] if node.out == self.features else []
                self.add(node, "pool backward", partial(_pool_backward, node, self._owns(node.source)), reads, writes)
                self._accumulate(node)
            case Relu():
                reads = [self._take(node.out), node.out]
                self.add(node, "relu backward", _relu_backward, reads, [self._give(node.source)])
                self._accumulate(node)
            case MaxPool() if node.out not in self.constants:
                reads = [self._take(node.out), f"{node.out}.place", f"{node.out}.like"]
                self.add(
                    node, "max pool backward", partial(_max_pool_backward, node.pool), reads, [self._give(node.source)]
                )
                self._accumulate(node)
            case Head():
                self._head_backward(node)
            case Island() if node.out not in self.constants:
                self._island_backward(node)

    def _conv_backward(self, node):
        if self.waiting and self.waiting[0].source != node.source:
            self._data_gradients()
        if any(parameter.requires_grad for parameter in node.conv.parameters()):
            writes = [*self._gradient(node.conv.weight), *self._gradient(node.conv.bias)]
            run, reads = partial(_weight_gradient, node.conv, self.autocast), [self.gradient_of[node.out], node.source]
            self.add(node, "weight gradient", run, reads, writes, _conv_macs(node.conv))
        if node.source in self.constants:
            self._take(node.out)
        else:
            self.waiting.append(node)

    def _data_gradients(self):
        for node in self.waiting:
            like = self.shape_of.get(node.source, node.source)
            run, reads = partial(_data_gradient, node.conv), [self._take(node.out), like]
            self.add(node, "data gradient", run, reads, [self._give(node.source)], _conv_macs(node.conv))
            self._accumulate(node)
        self.waiting = []

    def _norm_backward(self, node):
        reads = [self._take(node.out), node.source, *_statistics(node)]
        parameters = [*self._gradient(node.bn.weight), *self._gradient(node.bn.bias)]
        gives = [self._give(node.source)]
        if node.residual is not None:
            run, reads = partial(_norm_residual_backward, node.bn, self._owns(node.source)), [*reads, node.out]
            gives.append(self._give(node.residual) if node.residual not in self.constants else f"{node.out}.masked")
        else:
            run = partial(_norm_backward, node.bn, node.relu)
            reads += [node.out] if node.out == self.features else []
        self.add(node, "norm backward", run, reads, [*gives, *parameters])
        self._accumulate(node)

    def _head_backward(self, node):
        norm, gradient = node.norm, f"{node.out}.gradient"
        if node.head_bn is not None:
            pooled = f"{node.out}.pooled"
            parameters = [*self._gradient(node.head_bn.weight), *self._gradient(node.head_bn.bias)]
            reads, made = [gradient, pooled, f"{pooled}.mean", f"{pooled}.invstd"], f"{pooled}.gradient"
            self.add(node, "head norm backward", partial(_head_norm_backward, node.head_bn), reads, [made, *parameters])
            gradient = made
        gives = [self._give(norm.source)]
        if norm.residual is not None and norm.residual not in self.constants:
            gives.append(self._give(norm.residual))
        run = partial(_pooled_norm_backward, norm.bn, norm.relu, len(gives) == 2, self._owns(norm.source))
        reads = [gradient, norm.source, *_statistics(norm), *norm.sources[1:]]
        parameters = [*self._gradient(norm.bn.weight), *self._gradient(norm.bn.bias)]
        self.add(node, "pooled norm backward", run, reads, [*gives, *parameters])
        self._accumulate(norm)

    def _island_backward(self, node):
        wanted = [name for name in node.sources if name not in self.constants]
        reads = [f"{node.out}.graph", self._take(node.out), *node.sources]
        gives = [self._give(name) for name in wanted]
        parameters = [name for parameter in _trained(node) for name in self._gradient(parameter)]
        self.add(node, "island backward", _island_backward, reads, [*gives, *parameters])
        self._accumulate(node)

    def _gradient(self, parameter):
        """The name of a parameter's gradient, as a list of one, or of none for None. What is frozen has one too where
        it comes with another, which nothing reads."""
        if parameter is None:
            return []
        name = f"gradient {self.named}"
        self.named += 1
        if parameter.requires_grad:
            self.gradients[name] = parameter
        return [name]

    def _take(self, value):
        return self.gradient_of.pop(value)

    def _give(self, value):
        """A name for one contribution to a value's gradient."""
        self.given += 1
        return f"{value}.grad {self.given}"

    def _owns(self, value):
        """Whether BatchNorm's backward may write over the value that BatchNorm read."""
        return value in self.conv_outputs and self.readers[value] == 1 and value != self.features

    def _accumulate(self, node):
        """Adds what the last step contributed to what was there."""
        for name in self.steps[-1].writes:
            value = name.rpartition(".grad ")[0]
            if not value or value in self.constants:
                continue
            if value in self.gradient_of:
                total = self._give(value)
                self.add(node, "add", torch.Tensor.add_, [self.gradient_of[value], name], [total])
                name = total
            self.gradient_of[value] = name


def _sum_shared(emit):
    """Adds up the gradients of a parameter that several nodes use, each as soon as it is there."""
    steps, first = [], {}
    for step in emit.steps:
        steps.append(step)
        for name in step.writes:
            if name in emit.gradients and first.setdefault(emit.gradients[name], name) != name:
                total = first[emit.gradients.pop(name)]
                steps.append(Step("add", step.part, _add, (total, name), (total,)))
    emit.steps = steps


# ---- rebuilds and frees -------------------------------------------------------------------------------------


def _with_rebuilds(emit, keep, stay):
    """The steps with each derived value rebuilt where it is read and not there, and the gaps between."""
    steps, gaps, live, dropped = [], [], set(), {}  # live, dropped: derived values only
    stay = emit.pinned | emit.checkpoints | stay
    reads_of = {name: [] for name in emit.derived}
    for index, step in enumerate(emit.steps):
        for name in step.reads:
            if name in reads_of:
                reads_of[name].append(index)

    def rebuild(name, part, needed):
        recipe = emit.derived[name]
        missing = [read for read in recipe.reads if read in emit.derived and read not in live]
        for read in missing:
            if read not in live:
                rebuild(read, part, needed)
        # Made for this rebuild alone: it may write there. A convolution's output stays, once it is there again.
        over = set(missing).difference(needed, emit.recomputed)
        live.difference_update(over)
        live.update(recipe.writes)
        run = partial(recipe.run, [read in over for read in recipe.reads])
        steps.append(Step(recipe.name, part, run, recipe.reads, recipe.writes, recipe.macs))

    def stays(name, index):
        later = next((at for at in reads_of[name] if at > index), None)
        if later is None:
            return name == emit.features
        again = name in emit.recomputed and index >= emit.first_backward
        return later < emit.first_backward or later == index + 1 or name in stay or again or (name, later) in keep

    for index, step in enumerate(emit.steps):
        for name in step.reads:
            if name in emit.derived and name not in live:
                gaps.append(Gap(name, index, dropped[name], len(steps)))
                rebuild(name, step.part, step.reads)
        steps.append(step)
        live.update(name for name in step.writes if name in emit.derived)
        gone = {name for name in live if not stays(name, index)}
        dropped.update(dict.fromkeys(gone, len(steps) - 1))
        live -= gone
    return steps, gaps


def _kept(emit):
    """The derived values that are kept after all, so that no rebuild walks further than LONGEST_REBUILD. The count
    starts anew behind the features that are handed on, so that a head does not depend on what is before them."""
    kept, length = set(), {}
    for name, recipe in emit.derived.items():
        walked = [length[read] for read in recipe.reads if read in emit.derived and read not in kept]
        length[name] = 1 + max(walked, default=0)
        if name == emit.features:
            length[name] = 0
        elif length[name] > LONGEST_REBUILD:
            kept.add(name)
    return kept


def _add_frees(steps, given, outputs):
    """Frees each value after the last step that reads it before it is written again, if it ever is."""
    needed = set(outputs)
    for step in reversed(steps):
        touched = dict.fromkeys((*step.reads, *step.writes))
        step.frees = tuple(name for name in touched if name not in needed)
        needed.difference_update(step.writes)
        needed.update(step.reads)
    assert needed <= given, f"read before written: {needed - given}"


# ---- what the steps run ---------------------------------------------------------------------------------------

_aten, _ops = torch.ops.aten, torch.ops.auglocal_ext


def _statistics(node):
    return [f"{node.out}.mean", f"{node.out}.var"]


def _affine(bn):
    return bn.weight, bn.bias


def _geometry(conv):
    return conv.stride, conv.padding, conv.dilation, False, (0, 0), conv.groups


def _conv_macs(conv):
    """Multiply-accumulates of one pass; the convolution's output, or its gradient, comes first."""
    return lambda output: output.numel() * conv.weight[0].numel()


def _dense(x):
    """x without gaps and overlaps, which in-place kernels need; nearly always it is x itself."""
    return x.contiguous(memory_format=memory_format(x))


def _like(given, x):
    """A gradient or a residual in x's layout and dtype, which in-place kernels need; nearly always it has them."""
    return given.to(x.dtype).contiguous(memory_format=memory_format(x))


def _lower(x, autocast):
    """x as autocast hands it to a convolution; float64 stays."""
    return x if autocast is None or x.dtype == torch.float64 else x.to(autocast)


def _add(a, b):
    """Sum of two gradients, written over the first; None: no gradient."""
    return b if a is None else a if b is None else a.add_(b)


def _as_gradient(grad, parameter):
    """A gradient in its parameter's dtype and strides, as autograd leaves it: optimizers go over both side by side."""
    if grad.dtype == parameter.dtype and _order(grad) == _order(parameter):
        return grad.as_strided(parameter.shape, parameter.stride())
    return torch.empty_like(parameter).copy_(grad)


def _order(x):
    """How the elements of x lie in memory: its strides along what is longer than one."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


def _conv(conv, autocast, x):
    x = _lower(x, autocast)
    bias = None if conv.bias is None else conv.bias.to(x.dtype)
    return _aten.convolution(x, conv.weight.to(x.dtype), bias, *_geometry(conv))


def _recomputed_conv(conv, autocast, _over, x):
    return _conv(conv, autocast, x)


def _weight_gradient(conv, autocast, grad, x):
    x = _lower(x, autocast)
    grad = grad.to(x.dtype)
    sizes, mask = (None, (False, True, False)) if conv.bias is None else (conv.bias.shape, (False, True, True))
    weight = conv.weight.to(x.dtype)
    _, dweight, dbias = _aten.convolution_backward(grad, x, weight, sizes, *_geometry(conv), mask)
    dweight = _as_gradient(dweight, conv.weight)
    return dweight if dbias is None else (dweight, _as_gradient(dbias, conv.bias))


def _data_gradient(conv, grad, like):
    weight, dtype = conv.weight.to(grad.dtype), like.dtype
    like = like if dtype == grad.dtype else torch.empty_like(like, dtype=grad.dtype)
    mask = (True, False, False)
    return _aten.convolution_backward(grad, like, weight, None, *_geometry(conv), mask)[0].to(dtype)


def _norm(bn, relu, x, residual=None):
    residual = None if residual is None else _like(residual, x)
    y, mean, var = _ops.batch_norm_act(x, *_affine(bn), residual, bn.eps, relu)
    _update_running_statistics(bn, mean, var, x)
    return y, mean, var


def _rebuild_norm(bn, relu, over, x, mean, var, residual=None):
    if residual is not None:
        residual = _like(residual, x)
    out = next((read for read, may in zip((x, mean, var, residual), over, strict=False) if may), None)
    out = torch.empty_like(x) if out is None else out
    _ops.batch_norm_act_apply_out(x, *_affine(bn), mean, var, residual, bn.eps, relu, out)
    return out


def _norm_backward(bn, relu, grad, x, mean, var, _output=None):
    dx = _like(grad, x)
    return dx, *_ops.batch_norm_act_backward_out(dx, x, *_affine(bn), mean, var, None, bn.eps, relu, dx, None)


def _norm_residual_backward(bn, over, grad, x, mean, var, y):
    dresidual, dx = _like(grad, x), x if over else torch.empty_like(x)
    given = (dresidual, x, *_affine(bn), mean, var, _like(y, x), bn.eps, True, dx, dresidual)
    return dx, dresidual, *_ops.batch_norm_act_backward_out(*given)


def _batch_statistics(bn, x):
    mean, var = _ops.batch_norm_statistics(x)
    _update_running_statistics(bn, mean, var, x)
    return mean, var


def _update_running_statistics(bn, mean, var, x):
    bn.num_batches_tracked += 1
    dtype, count = bn.running_mean.dtype, x.numel() // x.shape[1]
    # momentum None: the cumulative average
    momentum = 1 / bn.num_batches_tracked.to(dtype) if bn.momentum is None else bn.momentum
    bn.running_mean.lerp_(mean.to(dtype), momentum)
    bn.running_var.lerp_((var * (count / (count - 1))).to(dtype), momentum)


def _pool(node, x, mean, var):
    return _ops.batch_norm_act_max_pool_apply(x, *_affine(node.bn), mean, var, node.bn.eps, *pool_window(x, node.pool))


def _rebuild_pool(node, over, *reads):
    return _pool(node, *reads)


def _pool_backward(node, over, grad, x, index, mean, var, _output=None):
    dx, window = x if over else torch.empty_like(x), pool_window(x, node.pool)[:6]
    given = (_like(grad, x), x, index, *_affine(node.bn), mean, var, node.bn.eps, *window, dx)
    return dx, *_ops.batch_norm_act_max_pool_backward_out(*given)


def _relu_backward(grad, y):
    grad = _like(grad, y)
    return _aten.threshold_backward.grad_input(grad, y, 0, grad_input=grad)


def _max_pool(pool, x):
    """(max_pool(x), the place of each maximum in its window, the shape and layout of x)"""
    geometry = pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode
    y, index = _aten.max_pool2d_with_indices(x, *geometry)
    kernel_w, width = _pair(pool.kernel_size)[1], x.shape[3]
    row = index.div(width, rounding_mode="floor")
    place = index.add_(row, alpha=kernel_w - width).sub_(_window_starts(pool, y, kernel_w))
    return y, place.to(torch.uint8), (x.shape, memory_format(x))


def _max_pool_backward(pool, grad, place, like):
    (shape, layout), kernel_w = like, _pair(pool.kernel_size)[1]
    index = place.long().add_(place // kernel_w, alpha=shape[3] - kernel_w)
    index.add_(_window_starts(pool, place, shape[3]))
    dx = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)
    geometry = pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode
    # Of the pool's input it takes the shape alone, so that dx can stand for it.
    given = grad.contiguous(memory_format=layout), dx, *geometry, index
    return _aten.max_pool2d_with_indices_backward.grad_input(*given, grad_input=dx)


def _window_starts(pool, y, width):
    """Where each window of a pool begins, counted along rows of `width`; goes with a map of the pool's outputs."""
    (stride_h, stride_w), (padding_h, padding_w) = _pair(pool.stride), _pair(pool.padding)
    rows, columns = (torch.arange(size, device=y.device) for size in y.shape[2:])
    return (rows[:, None] * stride_h - padding_h) * width + columns * stride_w - padding_w


def _pooled_norm(bn, relu, x, mean, var, residual=None):
    residual = None if residual is None else _like(residual, x)
    return _ops.batch_norm_act_mean_apply(x, *_affine(bn), mean, var, residual, bn.eps, relu)


def _pooled_norm_backward(bn, relu, residual_grad, over, grad, x, mean, var, residual=None):
    dx = x if over else torch.empty_like(x)
    residual = None if residual is None else _like(residual, x)
    dresidual = torch.empty_like(dx) if residual_grad else None
    given = (grad, x, *_affine(bn), mean, var, residual, bn.eps, relu, dx, dresidual)
    parameters = _ops.batch_norm_act_mean_backward_out(*given)
    return (dx, *parameters) if dresidual is None else (dx, dresidual, *parameters)


def _head_norm(bn, x):
    bn.num_batches_tracked += 1
    momentum = 1 / float(bn.num_batches_tracked) if bn.momentum is None else bn.momentum
    running = bn.running_mean, bn.running_var
    return _aten.native_batch_norm(x, *_affine(bn), *running, True, momentum, bn.eps)


def _head_norm_backward(bn, grad, x, mean, invstd):
    running = bn.running_mean, bn.running_var
    mask = (True, True, True)
    return _aten.native_batch_norm_backward(grad, x, bn.weight, *running, mean, invstd, True, bn.eps, mask)


def _linear_macs(linear):
    """Of the linear layer and both its gradients, which are computed together."""
    return lambda logits: 3 * logits.numel() * linear.in_features


def _linear_cross_entropy(linear, weight, pooled, labels):
    given = (pooled, linear.weight, linear.bias, labels, 0.0, -100)
    loss, logits, *gradients = _ops.linear_cross_entropy(*given)
    if weight != 1:
        for value in (loss, *gradients):
            value.mul_(weight)
    return logits, loss, *(gradients if linear.bias is not None else gradients[:-1])


def _loss(loss, weight, prediction, *given):
    with torch.enable_grad():
        leaf = prediction.detach().requires_grad_()
        value = weight * loss(leaf if leaf.dtype == torch.float64 else leaf.float(), *given)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), _dense(gradient)


def _island(node, autocast, device_type, wanted, *sources):
    given = [x.detach().requires_grad_(w) for x, w in zip(sources, wanted, strict=True)]
    if autocast is None or given[0].dtype == torch.float64:  # which autocast leaves alone
        lowered = contextlib.nullcontext()
    elif given[0].is_meta:
        lowered = MetaAutocast(autocast, device_type)
    else:
        lowered = torch.autocast(given[0].device.type, autocast, cache_enabled=False)
    with torch.enable_grad(), lowered:
        # What may write over its input must not change what others read: it gets a copy.
        out = node.call(*(x.clone() for x in given) if node.may_write else given)
    return _dense(out.detach()), _graph(out, given, node)


def _graph(out, given, node):
    """What the backward needs: the edge that out's gradient comes in by, not out itself, whose memory may go."""
    with torch.enable_grad():
        edge = get_gradient_edge(out.view_as(out)) if out.requires_grad else None  # the view: out may be a given leaf
    return edge, [x for x in given if x.requires_grad], _trained(node)


def _trained(island):
    """Its parameters that are not frozen."""
    return [parameter for parameter in island.parameters if parameter.requires_grad]


def _island_backward(graph, grad, *_sources):
    edge, given, parameters = graph
    wanted = [*given, *parameters]
    found = [None] * len(wanted) if edge is None else torch.autograd.grad(edge, wanted, grad, allow_unused=True)
    # Autograd may hand out one tensor twice, for both sides of an add. Here gradients are written over: each gets
    # memory of its own.
    gradients, taken = [], set()
    for x, gradient in zip(wanted, found, strict=True):
        if gradient is not None:
            gradient = _as_gradient(gradient, x)
            gradient = gradient.clone() if gradient.untyped_storage()._cdata in taken else gradient
            taken.add(gradient.untyped_storage()._cdata)
        gradients.append(gradient)
    for index, x in enumerate(given):
        if gradients[index] is None:
            gradients[index] = torch.zeros_like(x)
    return gradients[0] if len(gradients) == 1 else gradients
