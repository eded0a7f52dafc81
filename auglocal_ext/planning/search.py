"""What every cut of a backbone costs, and which are worth having: an exact search over all cuts.

A backbone of L units is cut into consecutive local modules. A cut is named by its borders: the last unit of every
module but the last one; by which head stands behind each; and by the units whose convolutions run again. What it costs
follows from a `CutTable`, plain numbers by unit: a module can be run in several ways (`module_ways`), and then

    bytes = constant + state of every border's head + the highest of the modules' peaks
    macs = over the modules: of their units, of their heads

`front` finds all cuts worth having at once; the other questions are read from its list. Its core, `fronts`, is written
twice: here, to be read and to serve where nothing was compiled, and in csrc/planner, to be fast. Both return the same,
ties included.
"""

import os
from bisect import bisect_left
from dataclasses import astuple, dataclass

from .cut_table import check_table
from .module_ways import module_ways, undominated

__all__ = ["MISSING", "Point", "cheapest", "front", "fronts", "next_cheaper", "next_smaller", "smallest"]


@dataclass(frozen=True)
class Point:
    """One cut and what it costs.

    Attributes:
        modules: how many.
        bytes: of a step at its peak.
        cost: multiply-accumulates of a step; nanoseconds where the table is of these.
        borders: the last unit of every module but the last.
        heads: which of the table's heads stands behind each of them.
        again: the units whose convolutions run again.
    """

    modules: int
    bytes: int
    cost: int
    borders: tuple[int, ...]
    heads: tuple[int, ...] = ()
    again: tuple[int, ...] = ()


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
    if _compiled is None:
        ways = module_ways(table)
        found = fronts(ways)
    else:
        ways = _compiled.module_ways(*astuple(table)[:-1])
        found = _compiled.fronts(ways)
    return [_point(table.constant + size, macs, modules, ways) for labels in found for size, macs, modules in labels]


def _point(size, macs, modules, ways):
    """modules: (last unit, which of the ways) of each."""
    first, heads, again = 0, [], []
    for last, way in modules:
        *_, head, flags = ways[first][last - first][way]
        heads.append(head)
        again += [first + index for index, flag in enumerate(flags) if flag == "1"]
        first = last + 1
    borders = tuple(last for last, _ in modules[:-1])
    return Point(len(modules), size, macs, borders, tuple(heads[:-1]), tuple(again))


def fronts(ways):
    """The undominated cuts into every number of modules.

    Cuts are built from their end. A cut of units i.. is a label: its macs, its state, its highest module. In a longer
    cut another one of the same units and as many modules that is no worse in all three is as good or better, so only
    the undominated ones are made longer.

    Args:
        ways: see `module_ways`; of each way its first three numbers.

    Returns:
        [[(bytes, macs, modules)] of K = 1, 2, ...]: bytes rising, macs falling; modules: (last unit, way) of each, of
        equal costs those that come first.
    """
    units, found = len(ways), []
    endings = [{units: [(0, 0, 0)]}]  # by number of modules, by first unit
    for count in range(1, units + 1):
        longer = {}
        for i in range(units - count + 1):
            longer[i] = undominated(
                (macs + more, state + head, max(peak, high))
                for j, of_module in enumerate(ways[i], i)
                for more, head, peak, *_ in of_module
                for macs, state, high in endings[-1].get(j + 1, ())
            )
        endings.append(longer)
        front = []
        for size, macs in sorted((state + high, macs) for macs, state, high in longer[0]):
            if not front or macs < front[-1][1]:
                front.append((size, macs, _modules(ways, endings, size, macs)))
        found.append(front)
    return found


def _modules(ways, endings, size, macs):
    """Of the cuts of so many bytes and macs the one whose modules come first: each the first that leaves an ending."""
    modules, first, state, high = [], 0, 0, 0
    for shorter in reversed(endings[:-1]):
        last, index = next(
            (j, index)
            for j, of_module in enumerate(ways[first], first)
            for index, way in enumerate(of_module)
            if any(
                state + way[1] + ending[1] + max(high, way[2], ending[2]) <= size
                for ending in _of(shorter.get(j + 1, ()), macs - way[0])
            )
        )
        modules.append((last, index))
        spent, head, peak, *_ = ways[first][last - first][index]
        first, macs, state, high = last + 1, macs - spent, state + head, max(high, peak)
    return modules


def _of(labels, macs):
    """Those of exactly so many macs."""
    return labels[bisect_left(labels, (macs,)) : bisect_left(labels, (macs + 1,))]


def cheapest(points, budget):
    """The cut of least cost within a budget.

    Args:
        points: from `front`.
        budget: bytes.

    Returns:
        Point, or None where no cut is within the budget. Of equal cost the one of fewest bytes, of those the one of
        fewest modules, of those the one whose borders come first.
    """
    return min((p for p in points if p.bytes <= budget), key=lambda p: (p.cost, p.bytes, p.modules), default=None)


def smallest(points):
    """The cut of fewest bytes; of equal ones the one of least cost, and so on as in `cheapest`."""
    return min(points, key=lambda p: (p.bytes, p.cost, p.modules))


def next_cheaper(points, point):
    """The cut of fewest bytes that costs less than `point`, or None."""
    cheaper = (p for p in points if p.cost < point.cost)
    return min(cheaper, key=lambda p: (p.bytes, p.cost, p.modules), default=None)


def next_smaller(points, point):
    """The cut of least cost that has fewer bytes than `point`, or None."""
    return cheapest(points, point.bytes - 1)
