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

__all__ = ["MISSING", "CutTable", "Point", "cheapest", "front", "next_cheaper", "next_smaller", "smallest"]


@dataclass(frozen=True)
class CutTable:
    """The numbers of one training step, by unit; lists of length L, indexed by unit. Bytes and macs are whole numbers.

    A segment is a stretch of the step, (high, net): `high` is the highest of the live bytes within it relative to
    those at its start, `net` those at its end, which may be negative; high >= max(0, net).

    Attributes:
        input_bytes: the unit's input, if a module begins there.
        forward, backward: per unit a list of 9 segments, one a variant, index 3 * a + b.
            a: 0 the unit is its module's first, else the output of the unit before it is 1 derived, 2 kept;
            b: its own output is 0 derived, 1 kept, or 2 it is its module's last.
        head: the segment of a head's forward and backward, of a module that ends with the unit.
        identity: True where the unit's output is rebuilt by way of its input, an identity shortcut.
        rebuild_length: elsewhere, how many elementwise passes a rebuild of the unit's output takes.
        longest_rebuild: an output whose rebuild would take more passes than this is kept.
        unit_macs: (as a module's first unit, otherwise).
        head_macs: of the head of a module that ends with the unit.
        head_state: parameters, buffers and optimizer state that this head adds, and its loss; 0 for the last unit,
            whose head is the model's own classifier.
        unit_scratch, head_scratch: what the optimizer needs for a moment in its step on that part.
        constant: lives during the whole step.
    """

    input_bytes: list[int]
    forward: list[list[tuple[int, int]]]
    backward: list[list[tuple[int, int]]]
    head: list[tuple[int, int]]
    identity: list[bool]
    rebuild_length: list[int]
    longest_rebuild: int
    unit_macs: list[tuple[int, int]]
    head_macs: list[int]
    head_state: list[int]
    unit_scratch: list[int]
    head_scratch: list[int]
    constant: int


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
        from . import _search
    except ImportError as error:
        return None, f"it was not built for this Python when auglocal_ext was installed ({error})"
    return _search, None


_compiled, MISSING = _load()  # MISSING: why there is no compiled search; None where there is one


# ---- one front of labels --------------------------------------------------------------------------------------


def front(table):
    """What can be had for how much memory: for every number of modules all cuts than which none has fewer bytes and no
    more macs, or fewer macs and no more bytes.

    Returns:
        list of Point, by modules, then by bytes, macs falling. Of equal costs the cut whose first border is least, then
        its second, and so on.

    Raises:
        ValueError: the table is malformed.
    """
    _check(table)
    find = fronts if _compiled is None else _compiled.fronts
    found = find(module_options(table))
    return [
        Point(count, table.constant + size, macs, tuple(last for last, _ in modules[:-1]))
        for count, labels in enumerate(found, 1)
        for size, macs, modules in labels
    ]


def module_options(table):
    """options[i][j - i]: the ways to run the module of units i..j with its head, each as (macs, bytes of state that the
    head adds, highest live bytes without what is constant). Today there is one way."""
    options = []
    for i, (macs, _) in enumerate(table.unit_macs):
        # What the units so far do to memory, one after another, in their forwards and in their backwards.
        forward = backward = (0, 0)
        row, before, walked, scratch = (
            [],
            0,
            0,
            0,
        )  # walked: passes of a rebuild of the output before; 0 from a kept one
        for j in range(i, len(table.input_bytes)):
            macs += table.unit_macs[j][1] if j > i else 0
            scratch = max(scratch, table.unit_scratch[j])
            end = 3 * before + 2
            high, net = _chain(forward, table.forward[j][end], table.head[j], table.backward[j][end], backward)
            peak = table.input_bytes[i] + max(high, net + max(scratch, table.head_scratch[j]))
            row.append([(macs + table.head_macs[j], table.head_state[j], peak)])
            length = 1 + walked if table.identity[j] else table.rebuild_length[j]
            kept = length > table.longest_rebuild
            forward = _chain(forward, table.forward[j][3 * before + kept])
            backward = _chain(table.backward[j][3 * before + kept], backward)
            before, walked = (2, 0) if kept else (1, length)
        options.append(row)
    return options


def _chain(*segments):
    """The segment of several, one after another."""
    high = net = 0
    for higher, more in segments:
        high, net = max(high, net + higher), net + more
    return high, net


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


# ---- what is read from it -----------------------------------------------------------------------------------------


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


# ---- tables ---------------------------------------------------------------------------------------------------


def between(one, other, part, whole):
    """The table of which each number is `part` / `whole` of the way from that of one table to that of another one."""

    def mix(a, b):
        if isinstance(a, list | tuple):
            return type(a)(mix(x, y) for x, y in zip(a, b, strict=True))
        return a if isinstance(a, bool) else a + (b - a) * part // whole

    return CutTable(**{name: mix(value, getattr(other, name)) for name, value in vars(one).items()})


_MOST_UNITS, _MOST_BYTES, _MOST_MACS = 1000, 2**40, 2**50  # what 64 bits are enough for in every sum


def _check(table):
    """Raises ValueError where the table is malformed."""
    units = len(table.input_bytes)
    if not 1 <= units <= _MOST_UNITS:
        raise ValueError(f"a CutTable must have from 1 to {_MOST_UNITS} units, given {units}")
    for name, entries in vars(table).items():
        if name not in ("longest_rebuild", "constant") and len(entries) != units:
            raise ValueError(f"CutTable.{name} must have an entry for each of the {units} units, given {len(entries)}")
    for name in ("forward", "backward"):
        variants = getattr(table, name)
        if any(len(segments) != 9 for segments in variants):
            raise ValueError(f"CutTable.{name} must have 9 variants for each unit")
        _check_segments(name, [segment for segments in variants for segment in segments])
    _check_segments("head", table.head)
    for name in ("input_bytes", "head_state", "unit_scratch", "head_scratch", "rebuild_length"):
        _check_numbers(name, getattr(table, name), _MOST_BYTES)
    for name in ("constant", "longest_rebuild"):
        _check_numbers(name, [getattr(table, name)], _MOST_BYTES)
    _check_numbers("head_macs", table.head_macs, _MOST_MACS)
    _check_numbers("unit_macs", [macs for pair in table.unit_macs for macs in pair], _MOST_MACS)
    if table.head_state[-1] != 0:
        raise ValueError("CutTable.head_state must be 0 for the last unit: its head is the model's own classifier")


def _check_numbers(name, numbers, most):
    if not all(isinstance(number, int) and 0 <= number <= most for number in numbers):
        raise ValueError(f"CutTable.{name} must be whole numbers from 0 to {most}")


def _check_segments(name, segments):
    for segment in segments:
        match segment:
            case (int(high), int(net)) if max(0, net) <= high <= _MOST_BYTES and net >= -_MOST_BYTES:
                pass
            case _:
                raise ValueError(
                    f"CutTable.{name} must be pairs of whole numbers (high, net) with max(0, net) <= high, up to "
                    f"{_MOST_BYTES}; given {segment}"
                )
