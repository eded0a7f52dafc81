"""What every cut of a backbone costs, and which are worth having: an exact search over all cuts.

A backbone of L units is cut into consecutive local modules. A cut is named by its borders: the last unit of every
module but the last one. What it costs follows from a `CutTable`, plain numbers by unit; a module's peak is walked from
its units' segments (`module_options`), and then

    bytes = constant + head_state of every border + the highest of the modules' peaks
    macs = over the modules: macs of the first unit, of the other units, of the head

`front` finds all cuts worth having at once; the other questions are read from its list. Its core, `fronts`, is written
twice: here, to be read and to serve where nothing was compiled, and in csrc/planner, to be fast. Both return the same,
ties included.
"""

import os
from bisect import bisect_left, bisect_right
from dataclasses import dataclass

from .cut_table import check_table, module_options

__all__ = ["MISSING", "Point", "cheapest", "front", "fronts", "next_cheaper", "next_smaller", "smallest"]


@dataclass(frozen=True)
class Point:
    """One cut and what it costs."""

    modules: int
    bytes: int
    macs: int
    borders: tuple[int, ...]  # the last unit of every module but the last


def _load():
    """(the compiled search, None), or (None, why it is not there)"""
    if os.environ.get("AUGLOCAL_NATIVE") == "0":
        return None, "AUGLOCAL_NATIVE=0 is set"
    try:
        from .. import _search
    except ImportError as error:
        return None, f"it was not built for this Python when auglocal_ext was installed ({error})"
    return _search, None


_compiled, MISSING = _load()  # MISSING: why there is no compiled search; None where there is one


def front(table):
    """What can be had for how much memory: for every number of modules all cuts than which none has fewer bytes and no
    more macs, or fewer macs and no more bytes.

    Returns:
        list of Point, by modules, then by bytes, macs falling. Of equal costs the cut whose first border is least, then
        its second, and so on.

    Raises:
        ValueError: the table is malformed.
    """
    check_table(table)
    find = fronts if _compiled is None else _compiled.fronts
    found = find(module_options(table))
    return [
        Point(count, table.constant + size, macs, tuple(last for last, _ in modules[:-1]))
        for count, labels in enumerate(found, 1)
        for size, macs, modules in labels
    ]


def fronts(options):
    """The undominated cuts into every number of modules.

    Cuts are built from their end. A cut of units i.. is a label: its macs, its state, its highest module. In a longer
    cut another one of the same units and as many modules that is no worse in all three is as good or better, so only
    the undominated ones are made longer.

    Args:
        options: see `module_options`.

    Returns:
        [[(bytes, macs, modules)] of K = 1, 2, ...]: bytes rising, macs falling; modules: (last unit, option) of each,
        of equal costs those that come first.
    """
    units, found = len(options), []
    endings = [{units: [(0, 0, 0)]}]  # by number of modules, by first unit
    for count in range(1, units + 1):
        longer = {}
        for i in range(units - count + 1):
            longer[i] = _undominated(
                (macs + more, state + head, max(peak, high))
                for j, ways in enumerate(options[i], i)
                for more, head, peak in ways
                for macs, state, high in endings[-1].get(j + 1, ())
            )
        endings.append(longer)
        front = []
        for size, macs in sorted((state + high, macs) for macs, state, high in longer[0]):
            if not front or macs < front[-1][1]:
                front.append((size, macs, _modules(options, endings, size, macs)))
        found.append(front)
    return found


def _undominated(labels):
    """The labels than which no other is as good, by macs, in one sweep over a falling staircase of (state, peak)."""
    kept, states, peaks = [], [], []
    for label in sorted(set(labels)):
        _, state, peak = label
        at = end = bisect_right(states, state)
        if at == 0 or peaks[at - 1] > peak:
            at -= at > 0 and states[at - 1] == state
            while end < len(states) and peaks[end] >= peak:
                end += 1
            states[at:end], peaks[at:end] = [state], [peak]
            kept.append(label)
    return kept


def _modules(options, endings, size, macs):
    """Of the cuts of so many bytes and macs the one whose modules come first: each the first that leaves an ending."""
    modules, first, state, high = [], 0, 0, 0
    for shorter in reversed(endings[:-1]):
        way = next(
            (j, option)
            for j, ways in enumerate(options[first], first)
            for option, way in enumerate(ways)
            if any(
                state + way[1] + ending[1] + max(high, way[2], ending[2]) <= size
                for ending in _of(shorter.get(j + 1, ()), macs - way[0])
            )
        )
        modules.append(way)
        spent, head, peak = options[first][way[0] - first][way[1]]
        first, macs, state, high = way[0] + 1, macs - spent, state + head, max(high, peak)
    return modules


def _of(labels, macs):
    """Those of exactly so many macs."""
    return labels[bisect_left(labels, (macs,)) : bisect_left(labels, (macs + 1,))]


def cheapest(points, budget, modules=None):
    """The cut of least macs within a budget.

    Args:
        points: from `front`.
        budget: bytes.
        modules: the number of modules to cut into; None: any.

    Returns:
        Point, or None where no cut is within the budget. Of equal macs the one of fewest bytes, of those the one of
        fewest modules, of those the one whose borders come first.

    Raises:
        ValueError: modules out of range.
    """
    fit = (point for point in _into(points, modules) if point.bytes <= budget)
    return min(fit, key=lambda p: (p.macs, p.bytes, p.modules), default=None)


def smallest(points, modules=None):
    """The cut of fewest bytes; of equal ones the one of least macs, and so on as in `cheapest`."""
    return min(_into(points, modules), key=lambda p: (p.bytes, p.macs, p.modules))


def next_cheaper(points, point):
    """The cut of fewest bytes that has fewer macs than `point`, or None."""
    cheaper = (p for p in points if p.macs < point.macs)
    return min(cheaper, key=lambda p: (p.bytes, p.macs, p.modules), default=None)


def next_smaller(points, point):
    """The cut of least macs that has fewer bytes than `point`, or None."""
    return cheapest(points, point.bytes - 1)


def _into(points, modules):
    """Those of so many modules; None: all."""
    units = points[-1].modules
    if modules is not None and not 1 <= modules <= units:
        raise ValueError(f"modules must be from 1 to {units}, the units of the table, given {modules}")
    return [point for point in points if modules in (None, point.modules)]
