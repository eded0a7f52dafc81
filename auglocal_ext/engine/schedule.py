"""When values are dropped, rebuilt and freed: from the steps as if all stayed to the steps that run."""

from bisect import bisect_right
from dataclasses import dataclass
from functools import partial

from .emit import Phase, Step

__all__ = ["LONGEST_REBUILD", "Gap", "add_frees", "block_outputs_to_pin", "passes_of", "with_rebuilds"]

# How many elementwise passes a rebuild may walk within a part, and how many parts, before a value on its way is pinned
# instead.
LONGEST_REBUILD = 7


@dataclass(frozen=True)
class Gap:
    """A value that is dropped after step `start` and rebuilt by the steps from `end` on."""

    name: str
    reader: int  # which step of the schedule without rebuilds it is rebuilt for; with the name, the gap's identity
    start: int
    end: int

    @property
    def key(self):
        return self.name, self.reader


def with_rebuilds(emit, kept_gaps, pinned):
    """The steps with each value that can be made again dropped after its last forward reader, and rebuilt where it is
    read and not there; and the gaps between.

    Args:
        emit: `Emit`, after the last node's backward.
        kept_gaps: keys of gaps not to drop a value over.
        pinned: names of values that are never dropped.
    """
    steps, gaps, live, dropped = [], [], set(), {}  # live, dropped: of what can be made again
    shared = set()  # of what was made again: what may be in the memory of something that lives
    needed = [_needed(step, emit.recipes, pinned) for step in emit.steps]
    reads_of = {name: [] for name in emit.recipes}
    for index, names in enumerate(needed):
        for name in names:
            reads_of[name].append(index)

    def rebuild(name, reader):
        recipe = emit.recipes[name]
        missing = [read for read in recipe.reads if read in emit.recipes and read not in live]
        for read in missing:
            if read not in live:
                rebuild(read, reader)
        # Made for this rebuild alone: it may go. A convolution's output stays, once it is there again.
        gone = {read for read in missing if read not in reader.reads and not emit.recipes[read].by_convolution}
        live.difference_update(gone)
        live.update(recipe.writes)
        touched.update(recipe.writes)
        over = gone - shared  # and may be written over
        shared.difference_update(recipe.writes)
        if recipe.alias and recipe.reads[0] not in over:
            shared.update((recipe.reads[0], *recipe.writes))
        run = partial(recipe.run, [read in over for read in recipe.reads])
        made = reader.phase, True, reader.part, run, recipe.reads, recipe.writes, recipe.macs
        steps.append(Step(recipe.kind, *made))

    def stays(name, index):
        at = bisect_right(reads_of[name], index)
        if at == len(reads_of[name]):
            return name == emit.features
        later = reads_of[name][at]
        again = emit.recipes[name].by_convolution and emit.steps[index].phase is Phase.BACKWARD
        in_forward = emit.steps[later].phase is Phase.FORWARD
        return in_forward or later == index + 1 or name in pinned or again or (name, later) in kept_gaps

    for index, step in enumerate(emit.steps):
        touched = {name for name in (*needed[index], *step.writes) if name in emit.recipes}  # of others nothing changes
        for name in step.reads:
            if name in emit.recipes and name not in live:
                gaps.append(Gap(name, index, dropped[name], len(steps)))
                rebuild(name, step)
        steps.append(step)
        live.update(name for name in step.writes if name in emit.recipes)
        gone = {name for name in touched & live if not stays(name, index)}
        dropped.update(dict.fromkeys(gone, len(steps) - 1))
        live -= gone
    return steps, gaps


def _needed(step, recipes, pinned):
    """Of what can be made again the values that a step reads, and in the backward pass the pinned ones that these are
    made from."""
    needed = {name for name in step.reads if name in recipes}
    left = list(needed - pinned) if step.phase is Phase.BACKWARD else []
    seen = set(left)
    while left:
        made_from = [read for read in recipes[left.pop()].reads if read in recipes]
        needed.update(read for read in made_from if read in pinned)
        new = [read for read in made_from if read not in pinned and read not in seen]
        seen.update(new)
        left += new
    return needed


def passes_of(emit):
    """How the values that can be made again are made from what is kept, part by part.

    Returns:
        (passes, before, pinned): name -> how many elementwise passes a rebuild takes within the value's part; name ->
        the values of other parts that it is made from; names of values within parts not to drop, so that no rebuild
        takes more than LONGEST_REBUILD passes there.
    """
    passes, before, pinned = {}, {}, set()
    for name, recipe in emit.recipes.items():
        if recipe.part in emit.recomputed:  # whose checkpoints are there
            continue
        outside = {read for read in recipe.reads if emit.is_from_before(read, recipe.part)}
        inside = [read for read in recipe.reads if read in passes and read not in outside | pinned]
        passes[name] = max((passes[read] for read in inside), default=0) + (not recipe.alias)
        before[name] = outside.union(*(before[read] for read in inside))
        if passes[name] > LONGEST_REBUILD and name not in emit.outputs:
            pinned.add(name)
    return passes, before, pinned


def block_outputs_to_pin(emit):
    """Names of parts' outputs not to drop, so that no rebuild walks further than LONGEST_REBUILD.

    An output that is made from the one before counts as one more than that, another one as its passes. The count starts
    anew behind the features that are handed on, so that a head does not depend on what is before them.
    """
    passes, before, _ = passes_of(emit)
    pinned, length = set(), {}
    for name in passes:
        if name in emit.outputs and name != emit.features:
            walked = 1 + max(length.get(other, 0) for other in before[name]) if before[name] else passes[name]
            if walked > LONGEST_REBUILD:
                pinned.add(name)
            else:
                length[name] = walked
    return pinned


def add_frees(steps, given, outputs):
    """Frees each value after the last step that reads it before it is written again, if it ever is.

    given, outputs: names of what is there before, and of what is to be there after.
    """
    needed = set(outputs)
    for step in reversed(steps):
        touched = dict.fromkeys((*step.reads, *step.writes))
        step.frees = tuple(name for name in touched if name not in needed)
        needed.difference_update(step.writes)
        needed.update(step.reads)
    assert needed <= given, f"read before written: {needed - given}"
