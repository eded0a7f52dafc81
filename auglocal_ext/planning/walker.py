"""The numbers that the search works on: every segment of every local module, each walked once."""

from dataclasses import dataclass

import torch

from ..common.memory import bytes_of, tensors_of
from ..engine.nodes import Norm, PooledNorm
from ..engine.schedule import LONGEST_REBUILD
from ..engine.timeline import timeline
from ..rules.auglocal import AugLocal
from ..rules.cutting import Span
from .cut_table import CutTable
from .module_nodes import module_program, unit_nodes

__all__ = ["Walker", "cut_table", "cut_tables", "with_heads"]


def cut_tables(planner, shape, rules):
    with planner.progress(f"planning batches of {shape[0]}"):
        walker = Walker(planner, shape)
        return [cut_table(planner, shape, rule, walker) for rule in rules]


def cut_table(planner, shape, rule, walker=None):
    """The `CutTable` of a model: every segment of every module, each walked once.

    Args:
        planner, shape: see `budget.choose`.
        rule: AugLocal, or BP.
        walker: the Walker of this planner and shape, which may have walked for other rules; None: a new one.
    """
    walker, last = walker or Walker(planner, shape), len(planner.backbone.units) - 1
    heads = planner.heads_by_unit(with_heads(rule), shape)
    stubs = planner.heads_by_unit(AugLocal(2, getattr(rule, "form", None)), shape)
    variants = [walker.variants(k, stubs) for k in range(last + 1)]
    behind = [walker.head(j, heads[j]) for j in range(last)] + [((0, 0), variants[last].head_macs)]
    rebuilds = [walker.rebuild(k) for k in range(last + 1)]
    optimizers = [planner.optimizer_bytes(head) for head in heads]
    states = [bytes_of(tensors_of(head)) + state for head, (state, _) in zip(heads, optimizers, strict=True)]
    return CutTable(
        input_bytes=[0] + [x.nbytes for x in walker.inputs[1:]],
        forward=[variant.forward for variant in variants],
        backward=[variant.backward for variant in variants],
        head=[segment for segment, _ in behind],
        identity=[identity for identity, _ in rebuilds],
        rebuild_length=[length for _, length in rebuilds],
        longest_rebuild=LONGEST_REBUILD,
        unit_macs=[variant.macs for variant in variants],
        head_macs=[macs for _, macs in behind],
        head_state=[state + planner.module_bytes for state in states[:-1]] + [0],
        unit_scratch=[planner.optimizer_bytes(unit.module)[1] for unit in planner.backbone.units],
        head_scratch=[scratch for _, scratch in optimizers],
        constant=planner.state_bytes() + walker.inputs[0].nbytes + walker.labels.nbytes + planner.module_bytes,
    )


def with_heads(rule):
    """The rule whose heads a table has; with BP's one cut none is used but the classifier."""
    return rule if isinstance(rule, AugLocal) else AugLocal(2)


@dataclass(frozen=True)
class _Variants:
    """A unit's segments in `CutTable`'s nine variants."""

    forward: list
    backward: list
    macs: tuple[int, int]  # as a module's first unit, otherwise
    head_macs: int = 0


class Walker:
    """Walks modules of one to three units, for what their segments do; equal ones once. Only what heads do depends on
    the rule."""

    def __init__(self, planner, shape):
        self.planner, self.units = planner, planner.backbone.units
        images, self.labels = planner.batch(shape)
        shapes = planner.backbone.feature_shapes(shape[1:])[:-1]
        dtype = planner.autocast or planner.dtype
        layout = {"dtype": dtype, "device": "meta", "memory_format": planner.memory_format}
        self.inputs = [images, *(torch.empty((len(images), *size), **layout) for size in shapes)]
        self.kinds = [(str(unit.module), tuple(x.shape)) for unit, x in zip(self.units, self.inputs, strict=True)]
        self.known, self.names = {}, ["images"]  # names: of each unit's input, and of the last output
        for k in range(len(self.units)):
            self.names.append(self.nodes(k)[1])

    def nodes(self, k):
        """The nodes of a unit, and the name of its output."""
        return unit_nodes(self.planner.backbone, Span(k, k), self.names[k], self.planner.reader.trace)

    def walk(self, first, last, head, pinned=()):
        """The Timeline of a module of units first..last, the outputs of units `pinned` never dropped."""
        self.planner.progress.walked()
        span, source = Span(first, last), self.names[first]
        names = {self.names[unit + 1] for unit in pinned}
        program = module_program(self.planner.backbone, span, head, source, pinned=names, **self.planner.options)
        existing = [t for unit in span.of(self.units) for t in tensors_of(unit.module)] + tensors_of(head)
        return timeline(program, self.inputs[first], self.labels, existing, count_input=first > 0)[0]

    def variants(self, k, heads):
        end = len(self.units) - 1
        # What is before a unit matters by how its output is rebuilt, after a pool or not; the last unit has its head.
        key = self.kinds[k], "MaxPool" in self.kinds[k - 1][0] if k else None, k in (0, end)
        if key not in self.known:
            self.known[key] = self._variants(k, heads, end)
        return self.known[key]

    def _variants(self, k, heads, end):
        name, forward, backward = self.units[k].name, [(0, 0)] * 9, [(0, 0)] * 9
        alone = self.walk(k, k, heads[k])
        lines = {2: alone}
        if k < end:
            lines[0], lines[1] = (self.walk(k, k + 1, heads[k + 1], pinned) for pinned in ((), (k,)))
        if k > 0:
            lines[5], lines[8] = (self.walk(k - 1, k, heads[k], pinned) for pinned in ((), (k - 1,)))
        if 0 < k < end:
            for variant, pinned in {3: (), 4: (k,), 6: (k - 1,), 7: (k - 1, k)}.items():
                lines[variant] = self.walk(k - 1, k + 1, heads[k + 1], pinned)
        for variant, line in lines.items():
            forward[variant], backward[variant] = _unit_segments(line, name)
            if k == end:  # its head follows at once, and takes in its last BatchNorm
                (high, net), (head_high, head_net) = forward[variant], _head_segment(line)
                forward[variant] = max(high, net + head_high), net + head_net
        other = lines.get(5, alone)
        return _Variants(forward, backward, (_macs(alone, name), _macs(other, name)), _macs(alone, "head"))

    def head(self, j, head):
        """((high, net), macs) of a head's forward and backward behind unit j."""
        key = str(head), self.kinds[j]
        if key not in self.known:
            line = self.walk(j, j, head)
            self.known[key] = _head_segment(line), _macs(line, "head")
        return self.known[key]

    def rebuild(self, k):
        """(whether the unit's output is rebuilt by way of its input, else in how many elementwise passes)."""
        nodes, out = self.nodes(k)
        by_name, length = {node.out: node for node in nodes}, 0
        while out in by_name and isinstance(by_name[out], Norm | PooledNorm):
            length += 1
            out = getattr(by_name[out], "residual", None)
        if out == self.names[k] and not self.planner.recompute:
            return True, 0
        # With recompute a block's output is kept. What cannot be rebuilt, an island's output, is always kept.
        derived = out is None and length and not self.planner.recompute
        return False, length if derived else LONGEST_REBUILD + 1


def _unit_segments(line, name):
    """((high, net) of the unit's forward, of its backward)."""
    moments = line.moments
    at = [index for index, moment in enumerate(moments) if moment.part == name]
    turn = next(index for index, moment in enumerate(moments) if moment.part == "head")
    return _segment(moments, [i for i in at if i < turn]), _segment(moments, [i for i in at if i > turn])


def _head_segment(line):
    return _segment(line.moments, [i for i, moment in enumerate(line.moments) if moment.part == "head"])


def _segment(moments, at):
    if not at:
        return 0, 0
    start = moments[at[0]].before
    return max(moments[i].high for i in at) - start, moments[at[-1]].after - start


def _macs(line, part):
    return sum(moment.macs for moment in line.moments if moment.part == part)
