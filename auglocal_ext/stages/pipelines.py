"""Schedules of a training on several ranks: what each does in which order, and what it waits for.

A schedule is a function that returns lanes of tasks, see `events.run`. Stages are lists of `Piece`, one for each rank.
"""

from collections import defaultdict

from .events import Task
from .pieces import total

__all__ = ["backprop_data_parallel", "gpipe", "layer_parallel", "local_data_parallel", "one_f_one_b", "zero_bubble"]

F, B, W, STEP = "forward", "backward", "weight gradient", "step"
SEND, BACK, REDUCE = "send", "send back", "all-reduce"
DOWN, UP = "down", "up"  # to the next rank, to the one before


# ---- local learning -----------------------------------------------------------------------------------------------


def layer_parallel(stages, link, batches, max_lag, synchronous=False):
    """Each rank trains its local modules and hands features on; nothing comes back but that a buffer is free again.

    A rank waits where `max_lag` batches are under way to the next one, which frees a buffer behind its first module.
    synchronous: a batch begins when the last rank has finished the one before.
    """
    lanes, last = defaultdict(list), len(stages) - 1
    for rank, modules in enumerate(stages):
        for batch in range(batches):
            after = [(SEND, rank - 1, batch, 0)] if rank else []
            if batch and synchronous:
                after.append((STEP, last, batch - 1, len(stages[last]) - 1))
            elif rank < last and batch > max_lag:
                after.append((STEP, rank + 1, batch - 1 - max_lag, 0))
            for index, module in enumerate(modules):
                lanes[rank].append(Task((F, rank, batch, index), module.forward, after if not index else ()))
                lanes[rank].append(Task((B, rank, batch, index), module.backward))
                lanes[rank].append(Task((STEP, rank, batch, index), module.step))
            if rank < last:
                after = [(STEP, rank, batch, len(modules) - 1)]
                if batch >= max_lag:
                    after.append((STEP, rank + 1, batch - max_lag, 0))
                lanes[rank, DOWN].append(Task((SEND, rank, batch, 0), link.seconds(modules[-1].output), after))
    return lanes


def local_data_parallel(modules, link, batches, ranks):
    """Each rank trains all local modules on its share of the batch; a module's gradients are averaged while the next
    one computes, and it is stepped behind that. All ranks do the same at the same time: the lanes are of one."""
    lanes = defaultdict(list)
    for batch in range(batches):
        for index, module in enumerate(modules):
            lanes[0].append(Task((F, 0, batch, index), module.forward / ranks))
            lanes[0].append(Task((B, 0, batch, index), module.backward / ranks))
            if index:
                lanes[0].append(_step(modules, index - 1, batch))
            lanes[0, DOWN].append(_reduce(module, index, batch, link, ranks))
        lanes[0].append(_step(modules, len(modules) - 1, batch))
    return lanes


def _step(modules, index, batch):
    return Task((STEP, 0, batch, index), modules[index].step, [(REDUCE, 0, batch, index)])


def _reduce(piece, index, batch, link, ranks):
    return Task((REDUCE, 0, batch, index), link.all_reduce(piece.gradients, ranks), [(B, 0, batch, index)])


# ---- backpropagation ----------------------------------------------------------------------------------------------


def backprop_data_parallel(units, link, batches, ranks):
    """Each rank trains all units on its share of the batch; gradients are averaged unit by unit while the backward pass
    goes on, and all are stepped behind it. The lanes are of one rank, as above."""
    lanes = defaultdict(list)
    for batch in range(batches):
        for index, unit in enumerate(units):
            lanes[0].append(Task((F, 0, batch, index), unit.forward / ranks))
        for index, unit in reversed(list(enumerate(units))):
            lanes[0].append(Task((B, 0, batch, index), unit.backward / ranks))
            lanes[0, DOWN].append(_reduce(unit, index, batch, link, ranks))
        reduced = [(REDUCE, 0, batch, index) for index in range(len(units))]
        lanes[0].append(Task((STEP, 0, batch, 0), total(units, "step"), reduced))
    return lanes


def gpipe(stages, link, batches, micro):
    """All micro-batches forward, then all backward (Huang et al. 2019)."""

    def order(rank):
        return [(what, index) for what in (F, B) for index in range(micro)]

    return _pipeline(stages, link, batches, micro, order)


def one_f_one_b(stages, link, batches, micro):
    """A rank goes backward as soon as it can, so that it holds no more micro-batches than there are ranks behind it and
    itself (Narayanan et al. 2019, with a flush)."""

    def order(rank):
        return [task for task in _one_by_one(rank, len(stages), micro) if task[0] != W]

    return _pipeline(stages, link, batches, micro, order)


def zero_bubble(stages, link, batches, micro):
    """ZB-H1 (Qi et al. 2023): as one_f_one_b, but weights' gradients are made later by as many micro-batches as there
    are ranks in front, where the rank would wait; it holds no more micro-batches than there are ranks."""

    def order(rank):
        return _one_by_one(rank, len(stages), micro)

    return _pipeline(stages, link, batches, micro, order, split=True)


def _one_by_one(rank, ranks, micro):
    """The order of ZB-H1's tasks."""
    ahead = min(ranks - 1 - rank, micro)
    tasks = [(F, index) for index in range(ahead)]
    for index in range(micro):
        tasks += [(F, ahead + index)] if ahead + index < micro else []
        tasks += [(B, index)]
        tasks += [(W, index - rank)] if index >= rank else []
    return tasks + [(W, index) for index in range(max(micro - rank, 0), micro)]


def _pipeline(stages, link, batches, micro, order, split=False):
    """Batches of so many micro-batches; all ranks step behind the last of them.

    order: rank -> [(what, micro-batch)] of a batch.
    split: whether weights' gradients are tasks of their own, W.
    """
    lanes, last = defaultdict(list), len(stages) - 1
    for rank, units in enumerate(stages):
        seconds = {F: total(units, "forward"), W: total(units, "weights")}
        seconds[B] = total(units, "backward") - seconds[W] * split
        down = link.seconds(units[-1].output / micro)
        up = link.seconds(stages[rank - 1][-1].output / micro) if rank else 0.0
        for batch in range(batches):
            for what, index in order(rank):
                number, after = batch * micro + index, []
                if what == F and rank:
                    after = [(SEND, rank - 1, number, 0)]
                elif what == B and rank < last:
                    after = [(BACK, rank + 1, number, 0)]
                lanes[rank].append(Task((what, rank, number, 0), seconds[what] / micro, after))
                if what == F and rank < last:
                    lanes[rank, DOWN].append(Task((SEND, rank, number, 0), down, [(F, rank, number, 0)]))
                if what == B and rank:
                    lanes[rank, UP].append(Task((BACK, rank, number, 0), up, [(B, rank, number, 0)]))
            lanes[rank].append(Task((STEP, rank, (batch + 1) * micro - 1, 0), total(units, "step")))
    return lanes
