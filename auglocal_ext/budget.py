"""The cheapest cut that fits a memory budget.

A step's peak is made of segments that do not depend on the rest of the cut: what a unit's forward and backward do to
memory depends on its own shape, on whether it is its module's first or last, and on whether its output and the one
before it are dropped or kept; a head's on the unit it is behind. So every segment is walked once (`cut_table`), and
the search (`search`) puts them together to the peak of any module, to the byte.
"""

import re
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from . import search
from .eager import eager_bytes
from .engine.nodes import Norm, PooledNorm
from .engine.program import build
from .engine.schedule import LONGEST_REBUILD
from .engine.timeline import timeline
from .memory import bytes_of, format_bytes, tensors_of
from .module_nodes import module_nodes, unit_nodes
from .rules import BP, AugLocal, Rule, as_rule, cut

__all__ = ["Choice", "candidates", "choose", "cut_table", "parse_bytes"]

DEPTHS = range(2, 7)  # the paper's; what depth="auto" looks at


def parse_bytes(text):
    """'6GB' -> 6_000_000_000; also MB, kB, B, GiB, MiB, KiB, fractions, and whole numbers of bytes."""
    sizes = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", str(text))
    if isinstance(text, bool) or not found or found[2].lower() not in sizes or float(found[1]) <= 0:
        raise ValueError(f"memory_budget must be a size such as '6GB', '500 MB' or '4GiB', given {text!r}")
    return int(float(found[1]) * sizes[found[2].lower()])


@dataclass(frozen=True)
class Choice:
    """What a search under a budget found.

    point: the cheapest cut that fits: modules, bytes of the step, macs, borders.
    rule: whose aux nets it has.
    front: for each number of modules, its cuts that no other of them beats in both bytes and macs.
    next_cheaper: the cut of least bytes that needs less arithmetic, or None: there is none cheaper.
    next_smaller: the cut of least arithmetic that needs fewer bytes, or None.
    eager: bytes of the same step of eager backpropagation ("bp") and with every unit checkpointed ("gc").
    """

    budget: int
    point: search.Point
    rule: Rule
    front: list[search.Point] = field(repr=False)
    next_cheaper: search.Point | None
    next_smaller: search.Point | None
    eager: dict[str, int]
    bp_macs: int = 0  # known when the choice is planned

    def __str__(self):
        depth = f", depth {self.rule.depth}" if self.rule.depth else ""
        lines = [f"budget {format_bytes(self.budget)}: {self._line(self.point)}{depth}"]
        if self.next_cheaper:
            lines.append(f"next cheaper:  {self._line(self.next_cheaper)}")
        if self.next_smaller:
            lines.append(f"next smaller:  {self._line(self.next_smaller)}")
        lines.append(
            f"eager BP: {format_bytes(self.eager['bp'])}, MACs 1.000 x BP; BP with every unit checkpointed: "
            f"{format_bytes(self.eager['gc'])}, about 1.333 x BP"
        )
        return "\n".join(lines)

    def _line(self, point):
        modules = f"{point.modules} module{'s' * (point.modules > 1)}"
        return f"{modules}, {format_bytes(point.bytes)}, MACs {point.macs / self.bp_macs:.3f} x BP"


def candidates(rule, depth, form, units):
    """The rules to search under a budget for a backbone of so many units: one, or with depth "auto" AugLocal's of every
    depth."""
    if depth == "auto" and rule in ("auglocal", AugLocal):
        return [AugLocal(d, form) for d in DEPTHS if d <= units]
    if depth == "auto" and isinstance(rule, AugLocal):
        raise ValueError(f"depth='auto' goes with rule='auglocal', given a rule that has its depth, {rule.depth}")
    rule = as_rule(rule, 2 if depth == "auto" else depth, form)
    if not (type(rule) is AugLocal or isinstance(rule, BP)):  # whose heads are the same wherever the borders are
        raise ValueError(
            f"memory_budget chooses the cut of rules 'auglocal', 'bp' and 'checkpoint': with {rule.name!r} give "
            f"modules, and see auglocal_ext.plan for what a step then needs"
        )
    return [rule]


def choose(planner, shape, budget, rules, modules=None):
    """The cheapest cut of least arithmetic whose step fits `budget` bytes.

    Args:
        planner: of the model.
        shape: of the batch, (N, C, H, W).
        budget: bytes of the whole step, parameters and optimizer included.
        rules: see `candidates`; with `rules.BP` there is one cut.
        modules: K, to choose among cuts into K modules only; None: any number.

    Returns:
        (cuts, the head behind each module, Choice)

    Raises:
        ValueError: nothing fits; says the least that would, and the batch size that would fit.
    """
    wanted = 1 if isinstance(rules[0], BP) else modules
    best, tables = None, _tables(planner, shape, rules)
    for rule, table in zip(rules, tables, strict=True):
        front = search.front(table)
        point = search.cheapest(front, budget, wanted)
        if point and (best is None or (point.macs, point.bytes) < (best[0].macs, best[0].bytes)):
            best = point, rule, front
    if best is None:
        raise _too_small(planner, shape, budget, rules, wanted, tables)
    point, rule, front = best
    front = [p for p in front if wanted in (None, p.modules)]
    cheaper, smaller = search.next_cheaper(front, point), search.next_smaller(front, point)
    choice = Choice(budget, point, rule, front, cheaper, smaller, eager_bytes(planner, shape))
    cuts, heads = cut(planner.backbone, rule, borders=point.borders), planner.heads_by_unit(_with_heads(rule), shape)
    return cuts, [heads[part.last] for part in cuts], choice


def _too_small(planner, shape, budget, rules, wanted, tables):
    """The error of a budget that nothing fits: what the least is, and which batch would fit. tables: at this batch."""
    smallest = _least(tables, wanted)
    batch = _largest_batch(planner, shape, budget, rules, wanted, tables)
    remedy = f"or batches of {batch}" if batch else "and no batch of two images fits it"
    state = planner.state_bytes()
    if budget <= state:
        remedy = f"the model's parameters and optimizer state alone are {format_bytes(state)}"
    return ValueError(
        f"memory_budget {format_bytes(budget)} is too small for batches of {shape[0]}: the smallest step of this model "
        f"needs {format_bytes(smallest)} ({smallest:,} bytes); give at least that, {remedy}"
    )


def _largest_batch(planner, shape, budget, rules, wanted, tables):
    """The largest batch below shape[0] of which some cut fits the budget; 0: none of two images does.

    Tables are nearly affine in the batch. So a batch is guessed by tables between those of the nearest batches that are
    known, then walked: what is returned, and that one more does not fit, was walked.
    """
    fits, known = 2, {shape[0]: tables}

    def walked(batch):
        known[batch] = _tables(planner, (batch, *shape[1:]), rules)
        return _least(known[batch], wanted) <= budget

    beyond = shape[0]
    if beyond <= 2 or budget <= planner.state_bytes() or not walked(2):
        return 0
    while beyond - fits > 1:
        guess = fits
        low, high = fits + 1, beyond - 1  # batches that it may be
        while low <= high:
            batch = (low + high) // 2
            between = [
                search.between(ours, theirs, batch - fits, beyond - fits)
                for ours, theirs in zip(known[fits], known[beyond], strict=True)
            ]
            if _least(between, wanted) <= budget:
                guess, low = batch, batch + 1
            else:
                high = batch - 1
        guess = max(guess, fits + 1)
        if walked(guess):
            fits = guess
        else:
            beyond = guess
    return fits


def _least(tables, wanted):
    return min(search.smallest(search.front(table), wanted).bytes for table in tables)


def _tables(planner, shape, rules):
    with tqdm(desc=f"planning batches of {shape[0]}", unit=" walks", delay=2, leave=False, disable=None) as bar:
        walker = Walker(planner, shape, bar.update)
        return [cut_table(planner, shape, rule, walker) for rule in rules]


# ---- the table that the search works on -----------------------------------------------------------------------


def cut_table(planner, shape, rule, walker=None):
    """The `search.CutTable` of a model: every segment of every module, each walked once.

    Args:
        planner, shape: see `choose`.
        rule: AugLocal, or BP.
        walker: the Walker of this planner and shape, which may have walked for other rules; None: a new one.
    """
    walker, last = walker or Walker(planner, shape), len(planner.backbone.units) - 1
    heads = planner.heads_by_unit(_with_heads(rule), shape)
    stubs = planner.heads_by_unit(AugLocal(2, getattr(rule, "form", None)), shape)
    variants = [walker.variants(k, stubs) for k in range(last + 1)]
    behind = [walker.head(j, heads[j]) for j in range(last)] + [((0, 0), variants[last].head_macs)]
    rebuilds = [walker.rebuild(k) for k in range(last + 1)]
    optimizers = [planner.optimizer_bytes(head) for head in heads]
    states = [bytes_of(tensors_of(head)) + state for head, (state, _) in zip(heads, optimizers, strict=True)]
    return search.CutTable(
        input_bytes=[0] + [x.nbytes for x in walker.inputs[1:]],
        forward=[variant.forward for variant in variants],
        backward=[variant.backward for variant in variants],
        head=[segment for segment, _ in behind],
        identity=[identity for identity, _ in rebuilds],
        rebuild_length=[length for _, length in rebuilds],
        longest_rebuild=LONGEST_REBUILD,
        unit_macs=[variant.macs for variant in variants],
        head_macs=[macs for _, macs in behind],
        head_state=[state + planner.loss_bytes for state in states[:-1]] + [0],
        unit_scratch=[planner.optimizer_bytes(unit.module)[1] for unit in planner.backbone.units],
        head_scratch=[scratch for _, scratch in optimizers],
        constant=planner.state_bytes() + walker.inputs[0].nbytes + walker.labels.nbytes + planner.loss_bytes,
    )


def _with_heads(rule):
    """The rule whose heads a table has; with BP's one cut none is used but the classifier."""
    return rule if isinstance(rule, AugLocal) else AugLocal(2)


@dataclass(frozen=True)
class _Variants:
    """A unit's segments in `search.CutTable`'s nine variants."""

    forward: list
    backward: list
    macs: tuple[int, int]  # as a module's first unit, otherwise
    head_macs: int = 0


class Walker:
    """Walks modules of one to three units, for what their segments do; equal ones once. Only what heads do depends on
    the rule."""

    def __init__(self, planner, shape, say=lambda: None):
        """say: called at each walk."""
        self.planner, self.units, self.say = planner, planner.backbone.units, say
        images, self.labels = planner.batch(shape)
        shapes = planner.backbone.feature_shapes(shape[1:])[:-1]
        dtype = planner.autocast or planner.dtype
        self.inputs = [images, *(torch.empty(len(images), *size, dtype=dtype, device="meta") for size in shapes)]
        self.kinds = [(str(unit.module), tuple(x.shape)) for unit, x in zip(self.units, self.inputs, strict=True)]
        self.known, self.names = {}, ["images"]  # names: of each unit's input, and of the last output
        for k in range(len(self.units)):
            self.names.append(self.nodes(k)[1])

    def nodes(self, k):
        """The nodes of a unit, and the name of its output."""
        return unit_nodes(self.planner.backbone, k, k, self.names[k], self.planner.reader.trace)

    def walk(self, first, last, head, kept=()):
        """The Timeline of a module of units first..last, the outputs of units `kept` kept and no others."""
        self.say()
        source, stay = self.names[first], {self.names[unit + 1] for unit in kept}
        nodes, features = module_nodes(self.planner.backbone, first, last, head, source, self.planner.reader.trace)
        options = {"autocast": self.planner.autocast, "recompute": self.planner.recompute}
        program = build(nodes, source, features, stay=stay, device_type=self.planner.device.type, **options)
        existing = [t for unit in self.units[first : last + 1] for t in tensors_of(unit.module)] + tensors_of(head)
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
            lines[0], lines[1] = (self.walk(k, k + 1, heads[k + 1], kept) for kept in ((), (k,)))
        if k > 0:
            lines[5], lines[8] = (self.walk(k - 1, k, heads[k], kept) for kept in ((), (k - 1,)))
        if 0 < k < end:
            for variant, kept in {3: (), 4: (k,), 6: (k - 1,), 7: (k - 1, k)}.items():
                lines[variant] = self.walk(k - 1, k + 1, heads[k + 1], kept)
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
