"""The numbers that the search works on: every segment of every local module, each walked once."""

import itertools

import torch

from ..backbone.layouts import MAPS
from ..common.memory import bytes_of, tensors_of
from ..engine.emit import Emit
from ..engine.schedule import LONGEST_REBUILD, passes_of
from ..engine.timeline import timeline
from ..rules.auglocal import AugLocal
from ..rules.cutting import Span, first_trained, is_frozen
from .cut_table import CutTable, HeadWay, UnitWay
from .module_nodes import module_program, unit_nodes

__all__ = ["Walker"]

_PLAIN, _KEPT, _AGAIN = "plain", "kept", "again"  # a unit's output is dropped, kept; its convolutions run again


class Walker:
    """Walks modules of one to three units, for what their segments do; equal ones once.

    What a unit does depends on its own shape, on whether it is its module's first or last, on whether its output and
    the one before it are dropped or kept, and on whether its convolutions run again.

    Units here are those from the first that trains on. The first one takes in what stands in front, whose parameters
    are all frozen: no module begins or ends there.

    Args:
        planner, shape: see `budget.choose`.
        rules: AugLocals, whose heads a border may have; none for the one cut of backpropagation.

    Raises:
        ValueError: units behind the first that trains are frozen.
    """

    def __init__(self, planner, shape, rules):
        self.planner, self.shape, self.first = planner, shape, first_trained(planner.backbone)
        self.units = planner.backbone.units[self.first :]
        self.end = len(self.units) - 1
        _check_frozen(self.units)
        images, self.labels = planner.batch(shape)
        shapes = planner.backbone.feature_shapes(shape[1:])[self.first : -1]
        dtype = planner.autocast or planner.dtype
        layouts = [planner.memory_format if unit.layout == MAPS else torch.contiguous_format for unit in self.units]
        made = [
            torch.empty((len(images), *size), dtype=dtype, device="meta", memory_format=layout)
            for size, layout in zip(shapes, layouts, strict=False)
        ]
        self.inputs = [images, *made]
        kinds, modes = planner.backbone.kinds[self.first :], [_modes(unit.module) for unit in self.units]
        self.kinds = [(kind, mode, tuple(x.shape)) for kind, mode, x in zip(kinds, modes, self.inputs, strict=True)]
        self.known, self.macs, self.ways = {}, {}, {}
        self.names = ["images"]  # of each unit's input, and of the last output
        for k in range(len(self.units)):
            self.names.append(self.nodes(k)[1])
        # What a unit does is the same with any of these heads behind it; not with those that a user's function makes.
        self.given = [rule for rule in rules if callable(rule.auxiliary)]
        stub = self.given[0] if self.given else AugLocal(2, rules[0].form if rules else None)
        self.stubs = self._heads_by_unit(stub)

    def table(self, rules, again=(False,)):
        """The `CutTable` of some choice, of which only what is not known is walked.

        Args:
            rules: of those given, or of the same form.
            again: whether units' convolutions run again, of (False, True), or a list of that for each unit.
        """
        planner, units = self.planner, range(len(self.units))
        again = again if isinstance(again, list) else [again] * len(units)
        with planner.progress(f"planning batches of {self.shape[0]}"):
            heads = [self._heads_by_unit(rule) for rule in rules]
            rebuilds = [self.rebuild(k) for k in units]
            return CutTable(
                input_bytes=[0] + [x.nbytes for x in self.inputs[1:]],
                units=[[self.unit(k, way, again[k - 1]) for way in again[k]] for k in units],
                heads=[*([self.head(j, made[j], again[j]) for made in heads] for j in units[:-1]), [self.classifier()]],
                identity=[identity for identity, _ in rebuilds],
                rebuild_length=[length for _, length in rebuilds],
                longest_rebuild=LONGEST_REBUILD,
                unit_scratch=self.scratch(heads),
                constant=planner.state_bytes()
                + planner.batch_bytes(self.inputs[0], self.labels)
                + planner.module_bytes,
            )

    def _heads_by_unit(self, rule):
        return self.planner.heads_by_unit(rule, self.shape)[self.first :]

    def span(self, first, last):
        """Of units first..last in the backbone."""
        return Span(first + self.first if first else 0, last + self.first)

    def nodes(self, k):
        """The nodes of a unit, and the name of its output."""
        return unit_nodes(self.planner.backbone, self.span(k, k), self.names[k], self.planner.reader.trace)

    def walk(self, first, last, head, pinned=(), again=()):
        """The Timeline of a module of units first..last, the outputs of units `pinned` never dropped, the convolutions
        of units `again` run again."""
        self.planner.progress.walked()
        span, source = self.span(first, last), self.names[first]
        options = self.planner.options | {"pinned": {self.names[unit + 1] for unit in pinned}}
        if options["recompute"] is not True:  # which is of heads too
            options["recompute"] = [self.units[unit].name for unit in again]
        program = module_program(self.planner.backbone, span, head, source, **options)
        existing = [t for unit in span.of(self.planner.backbone.units) for t in tensors_of(unit.module)]
        existing += [*tensors_of(head), *self.planner.criterion.tensors]
        given = program, self.inputs[first], self.labels, existing
        return timeline(*given, count_input=first > 0, clock=self.planner.clock, steps=self.planner.steps)[0]

    # ---- units -----------------------------------------------------------------------------------------------------

    def unit(self, k, again, before_again):
        """Its `UnitWay`, behind a unit that may run so."""
        forward, backward = [(0, 0)] * 12, [(0, 0)] * 12
        befores = [0, *((1, 2) if False in before_again else ()), *((3,) if True in before_again else ())]
        behinds = (2,) if k == self.end else (1, 2) if again else (0, 1, 2)
        for before, behind in itertools.product(befores if k else (0,), behinds):
            variant = 3 * before + behind
            forward[variant], backward[variant] = self.segments(k, again, before, behind)
        key = self.key(k)
        first = self.macs[key, again, True]
        return UnitWay(again, forward, backward, (first, self.macs.get((key, again, False), first)))

    def key(self, k):
        """What a unit's segments depend on, besides its variant."""
        # What is before a unit matters by how its output is rebuilt, after a pool or not; the last unit has its head.
        before = "MaxPool" in self.kinds[k - 1][0] if k else None
        heads = [str(self.stubs[j]) for j in (k, min(k + 1, self.end))] if self.given else []
        return self.kinds[k], before, k in (0, self.end), *heads

    def segments(self, k, again, before, behind):
        """A unit's forward and backward in one of `UnitWay`'s variants."""
        wanted = self.key(k), again, before, behind
        if wanted not in self.known:
            # A walk tells of every unit in it: the one that tells the most that is not known yet.
            first, outputs = max(self._walks_of(k, again, before, behind), key=lambda walk: self._news(*walk))
            self._walk_and_note(first, outputs)
        return self.known[wanted]

    def _walks_of(self, k, again, before, behind):
        """(first unit, what becomes of each unit's output) of the walks of up to three units that tell of a variant."""
        # What may become of the unit's own output, of the one before it, and of any other.
        own = _AGAIN if again else _KEPT if behind == 1 else _PLAIN
        others = (_PLAIN, _KEPT, _AGAIN) if again or before == 3 else (_PLAIN, _KEPT)
        left = ((), (_PLAIN,), (_KEPT,), (_AGAIN,))[before]
        for first in range(max(0, k - 2), k) if before else (k,):
            for last in range(k + 1, min(self.end, k + 2) + 1) if behind != 2 else (k,):
                if last - first > 2:
                    continue
                around = [others] * (k - 1 - first), [left] * (k > first), [[own]], [others] * (last - k)
                for outputs in itertools.product(*itertools.chain(*around)):
                    if last == k or outputs[-1] != _KEPT:  # of the last one's nothing is to be told
                        yield first, outputs

    def _told(self, first, outputs):
        """(unit, again, before, behind) of each unit of a walk."""
        before = 0
        for index, output in enumerate(outputs):
            behind = 2 if index == len(outputs) - 1 else int(output != _PLAIN)
            yield first + index, output == _AGAIN, before, behind
            before = (_PLAIN, _KEPT, _AGAIN).index(output) + 1

    def _news(self, first, outputs):
        """How much of what a walk tells is not known."""
        return len({(self.key(k), *variant) for k, *variant in self._told(first, outputs)} - self.known.keys())

    def _walk_and_note(self, first, outputs):
        last = first + len(outputs) - 1
        kept, again = ([first + i for i, output in enumerate(outputs) if output == what] for what in (_KEPT, _AGAIN))
        line = self.walk(first, last, self.stubs[last], kept, again)
        for k, is_again, before, behind in self._told(first, outputs):
            key, parts = self.key(k), [unit.name for unit in self.span(k, k).of(self.planner.backbone.units)]
            forward, backward = _unit_segments(line, parts)
            parts += ["head"] if k == self.end else []
            if k == self.end:  # its head follows at once, and takes in its last BatchNorm
                (high, net), (head_high, head_net) = forward, _head_segment(line)
                forward = max(high, net + head_high), net + head_net
            self.known[key, is_again, before, behind] = forward, backward
            self.macs[key, is_again, k == first] = self.cost(line, *parts) + self.step_cost(self.units[k].module)

    # ---- heads -----------------------------------------------------------------------------------------------------

    def head(self, j, head, again):
        """The `HeadWay` of a head behind unit j, which may run so; what it may not is told as what it may."""
        key = id(head), self.kinds[j], again  # one head stands behind many borders
        if key not in self.ways:
            told = [self._head(j, head, way) for way in again]
            (segment, macs), (segment_again, macs_again) = told[0], told[-1]
            state, scratch = self.planner.optimizer_bytes(head)
            state += bytes_of(tensors_of(head)) + self.planner.module_bytes + self.planner.stepping.gradient_bytes(head)
            scratch = 0 if self.planner.stepping.clips_globally else scratch
            self.ways[key] = HeadWay((segment, segment_again), (macs, macs_again), state, scratch)
        return self.ways[key]

    def _head(self, j, head, again):
        """(segment, macs) of a head behind unit j."""
        key = str(head), self.kinds[j], again
        if key not in self.known:
            line = self.walk(j, j, head, again=(j,) if again else ())
            self.known[key] = _head_segment(line), self.cost(line, "head") + self.step_cost(head)
        return self.known[key]

    def classifier(self):
        """What the last unit's way has not counted yet."""
        scratch = self.planner.optimizer_bytes(self.stubs[self.end])[1]
        return HeadWay(((0, 0), (0, 0)), (self.step_cost(self.stubs[self.end]),) * 2, 0, scratch)

    # ---- costs -----------------------------------------------------------------------------------------------------

    def cost(self, line, *parts):
        """Of parts of a walk: multiply-accumulates, with a clock nanoseconds."""
        moments = [moment for moment in line.moments if moment.part in parts]
        return sum(moment.macs if self.planner.clock is None else moment.nanoseconds for moment in moments)

    def step_cost(self, module):
        """Of the optimizer's step."""
        planner = self.planner
        if planner.clock is None:
            return 0
        step = planner.clock.optimizer(planner.factory, module.parameters(), planner.optimizer_bytes(module)[0])
        return step // planner.stepping.accumulate

    def scratch(self, heads):
        """What a step needs for a moment on each unit: the optimizer, and clipping, which is told for all modules as of
        the one that it needs the most for.

        heads: those that there may be behind each unit, of each rule.
        """
        stepping, units = self.planner.stepping, [unit.module for unit in self.units]
        borders = list(zip(*heads, strict=True))[:-1]
        largest = sorted((max(behind, key=_tensors) for behind in borders), key=_tensors)
        together = [self.planner.model, *(largest if stepping.clips_globally else largest[-1:])]
        clipping = stepping.clip_scratch([parameter for module in together for parameter in module.parameters()])
        if not stepping.clips_globally:
            return [max(self.planner.optimizer_bytes(unit)[1], clipping) for unit in units]
        stepped = [*units, *(head for behind in borders for head in behind), self.stubs[self.end]]
        most = max(self.planner.optimizer_bytes(module)[1] for module in stepped)
        return [*[0] * self.end, max(most, clipping)]

    def rebuild(self, k):
        """(whether the unit's output is rebuilt by way of its input, else in how many elementwise passes)."""
        before = self.nodes(k - 1)[0] if k else []  # whose output needs a gradient, as the images do not
        nodes, out = self.nodes(k)
        nodes, source = [*before, *nodes], self.names[max(k - 1, 0)]
        emit = Emit(nodes, source, None, None, (), self.planner.device.type)
        for node in nodes:
            node.forward(emit)
        passes, before, _ = passes_of(emit)
        # What cannot be rebuilt, an island's output, is always kept.
        return bool(before.get(out)), passes.get(out, LONGEST_REBUILD + 1)


def _tensors(module):
    return len(list(module.parameters()))


def _check_frozen(units):
    frozen = [unit.name for unit in units[1:] if is_frozen([unit])]
    if frozen:
        raise ValueError(
            f"memory_budget chooses the cut where what is frozen comes first, and {frozen[0]} is frozen behind "
            f"{units[0].name}, which trains: give modules without a budget, or freeze the first units only"
        )


def _modes(module):
    """What of a module trains, and which of its layers are in training mode."""
    trained = tuple(parameter.requires_grad for parameter in module.parameters())
    return trained, tuple(layer.training for layer in module.modules())


def _unit_segments(line, parts):
    """((high, net) of the forward of a unit of these parts, of its backward)."""
    moments = line.moments
    at = [index for index, moment in enumerate(moments) if moment.part in parts]
    turn = next(index for index, moment in enumerate(moments) if moment.part == "head")
    return _segment(moments, [i for i in at if i < turn]), _segment(moments, [i for i in at if i > turn])


def _head_segment(line):
    return _segment(line.moments, [i for i, moment in enumerate(line.moments) if moment.part == "head"])


def _segment(moments, at):
    if not at:
        return 0, 0
    start = moments[at[0]].before
    return max(moments[i].high for i in at) - start, moments[at[-1]].after - start
