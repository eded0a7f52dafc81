"""Which cut of a backbone is cheapest under a memory budget: an exact search over all its cuts.

A backbone of L units is cut into consecutive local modules. A cut is named by its borders: the last unit of every
module but the last one. What it costs follows from a `CutTable`, plain numbers by unit; a module's peak is walked from
its units' segments (`module_peaks`), and then

    bytes = constant + head_state of every border + the highest of (peak of module m + carried * m), m = 0, 1, ...
    macs = over the modules: macs of the first unit, of the other units, of the head

The functions are written twice: here, to be read and to serve where nothing was compiled, and in csrc/planner, to be
fast. Both return the same, ties included.
"""

import copy
import functools
import os
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from math import inf

__all__ = ["MISSING", "CutTable", "Point", "cheapest", "front", "module_peaks", "smallest"]


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
        head_state: parameters, buffers and optimizer state that this head adds; 0 for the last unit, whose head is
            the model's own classifier.
        unit_scratch, head_scratch: what the optimizer needs for a moment in its step on that part.
        constant: lives during the whole step.
        carried: what each finished module leaves until the end of the step.
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
    carried: int


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


def _compiled_where_built(function):
    """Serves a function by its compiled twin where there is one; `.plain` is the one in Python."""

    @functools.wraps(function)
    def serve(*args, **kwargs):
        serving = function if _compiled is None else getattr(_compiled, function.__name__)
        return serving(*args, **kwargs)

    serve.plain = function
    return serve


# ---- what a cut costs -----------------------------------------------------------------------------------------


@_compiled_where_built
def module_peaks(table):
    """The highest live bytes of every module by itself, without what is constant or carried.

    Returns:
        peaks: L lists of L numbers, peaks[i][j] of the module of units i..j; 0 where i > j.
    """
    _check(table)
    units = range(len(table.input_bytes))
    return [[_peak(table, i, j) if i <= j else 0 for j in units] for i in units]


def _peak(table, first, last):
    variants = _variants(table, first, last)
    walk = [table.forward[k][v] for k, v in variants]
    walk.append(table.head[last])
    walk += [table.backward[k][v] for k, v in reversed(variants)]
    live = peak = table.input_bytes[first]
    for high, net in walk:
        peak = max(peak, live + high)
        live += net
    return max(peak, live + max(*table.unit_scratch[first : last + 1], table.head_scratch[last]))


def _variants(table, first, last):
    """[(unit, variant)] of a module: which outputs are kept in it, because a rebuild would walk too far."""
    variants, before, walked = [], 0, 0  # walked: passes of a rebuild of the output before; none from a kept one
    for k in range(first, last + 1):
        length = 1 + walked if table.identity[k] else table.rebuild_length[k]
        kept = length > table.longest_rebuild
        variants.append((k, 3 * before + (2 if k == last else int(kept))))
        before, walked = (2, 0) if kept else (1, length)
    return variants


class _Cuts:
    """A table as the search needs it, by module of units i..j.

    Attributes:
        units: L.
        peaks[i][j], macs[i][j]: of that module; the macs with its head's.
        state[j]: of its head.
        constant, carried: see CutTable.
    """

    def __init__(self, table):
        self.peaks = module_peaks.plain(table)
        self.units = len(self.peaks)
        self.state, self.constant, self.carried = table.head_state, table.constant, table.carried
        self.macs = [[0] * self.units for _ in range(self.units)]
        for i in range(self.units):
            body = table.unit_macs[i][0]
            for j in range(i, self.units):
                body += table.unit_macs[j][1] if j > i else 0
                self.macs[i][j] = body + table.head_macs[j]

    def counting_modules(self):
        """The same with L + 1 for a byte and one for each module: of as many bytes, fewer modules are less."""
        scale, cuts = self.units + 1, copy.copy(self)
        cuts.peaks = [[scale * peak for peak in row] for row in self.peaks]
        cuts.state = [scale * state + 1 for state in self.state]
        cuts.constant, cuts.carried = scale * self.constant, scale * self.carried
        return cuts

    def point(self, borders):
        first, macs, state, high = 0, 0, 0, 0
        for index, last in enumerate((*borders, self.units - 1)):
            macs += self.macs[first][last]
            state += self.state[last]
            high = max(high, self.peaks[first][last] + self.carried * index)
            first = last + 1
        return Point(len(borders) + 1, self.constant + state + high, macs, tuple(borders))

    def peak_ranges(self, most):
        """All peaks in at most so many ranges, rising: [(lowest, highest)]."""
        peaks = sorted({self.peaks[i][j] for i in range(self.units) for j in range(i, self.units)})
        ranges = min(most, len(peaks))
        starts = [k * len(peaks) // ranges for k in range(ranges + 1)]
        return [(peaks[starts[k]], peaks[starts[k + 1] - 1]) for k in range(ranges)]


class _Beginnings:
    """The best cuts of units 0..i-1, for every i, under a cap on the modules' peaks.

    Args:
        cap: no module has a higher peak.
        weights: (of macs, of head state); best is the least weighted sum.
        count: modules are counted, up to this number; 0: they are not counted.

    Attributes:
        price[n][i]: of cuts into n counted modules, the least sum; inf: there is none.
    """

    def __init__(self, cuts, cap, weights, count):
        self.one = min(count, 1)
        self.price = [[inf] * (cuts.units + 1) for _ in range(count + 1)]
        self._first = [[0] * (cuts.units + 1) for _ in range(count + 1)]  # first unit of the last module
        self.price[0][0] = 0.0
        for j in range(cuts.units):
            for i in range(j + 1):
                if cuts.peaks[i][j] > cap:
                    continue
                price = weights[0] * cuts.macs[i][j] + weights[1] * cuts.state[j]
                for n in range(self.one, min(count, j + 1) + 1):
                    total = self.price[n - self.one][i] + price
                    if total < self.price[n][j + 1]:
                        self.price[n][j + 1], self._first[n][j + 1] = total, i

    def borders(self, n):
        """Of the best cut of all units."""
        borders, first = [], self._first[n][-1]
        while first > 0:
            borders.append(first - 1)
            n -= self.one
            first = self._first[n][first]
        return borders[::-1]


# ---- the front ------------------------------------------------------------------------------------------------

_CAPS = 512  # at most: more make the front finer, and take more time
_MOST_POINTS = 60  # of a number of modules


@_compiled_where_built
def front(table):
    """What can be had for how much memory: for every number of modules, cuts of which none is worse in both bytes and
    macs than another.

    Nearly exact: under each of a number of caps on the peak, the cuts of least macs, of least head state and of three
    mixes of both are taken, so that a cut between these may be missing. Every point is a cut with its exact costs, and
    `smallest` is one of them.

    Returns:
        list of Point, by modules, then by bytes; at most 60 for each number of modules.
    """
    cuts = _Cuts(table)
    even = float(max(sum(table.head_macs), 1)) / float(max(sum(table.head_state), 1))
    found = [set() for _ in range(cuts.units + 1)]
    least = smallest.plain(table)
    found[least.modules].add(least.borders)
    for weight in (1e-9 * even, 0.25 * even, even, 4 * even, 1e9 * even):
        for _, cap in cuts.peak_ranges(_CAPS):
            beginnings = _Beginnings(cuts, cap, (1.0, weight), cuts.units)
            for n in range(1, cuts.units + 1):
                if beginnings.price[n][-1] < inf:
                    found[n].add(tuple(beginnings.borders(n)))
    return [point for borders in found for point in _thinned(_not_worse([cuts.point(b) for b in borders]))]


def _not_worse(points):
    kept = []
    for point in sorted(points, key=lambda p: (p.bytes, p.macs, p.borders)):
        if not kept or point.macs < kept[-1].macs:
            kept.append(point)
    return kept


def _thinned(points):
    """At most _MOST_POINTS of them, evenly, the first and the last among them."""
    most, last = _MOST_POINTS, len(points) - 1
    return points if len(points) <= most else [points[k * last // (most - 1)] for k in range(most)]


# ---- the cheapest cut -----------------------------------------------------------------------------------------
# Cuts are built from their end. An ending, a cut of units i..L-1, is three numbers: its macs, its bytes of state, and
# its highest live bytes if nothing comes before it; a module before it adds `carried` to those, so that an ending need
# not know its place in the cut. It is dropped where another one of the same units is no worse in any of the three, or
# where a bound says that no cut with it is within the limits on bytes and macs. The bounds leave so few endings that
# nearly all time goes into the bounds.


@_compiled_where_built
def cheapest(table, budget, modules=None):
    """The cut of least macs within a budget; exact.

    Args:
        table: CutTable
        budget: bytes, a whole number.
        modules: the number of modules to cut into; None: any.

    Returns:
        Point, or None where no cut is within the budget. Of equal macs the one of fewest bytes, of those the one of
        fewest modules, of those the one whose first border is least, then its second, and so on.

    Raises:
        ValueError: a malformed table, or modules out of range.
    """
    cuts = _Cuts(table)
    if modules is not None and not 1 <= modules <= cuts.units:
        raise ValueError(f"modules must be from 1 to {cuts.units}, the units of the table, given {modules}")
    return _cheapest(cuts, budget, modules or 0)


@_compiled_where_built
def smallest(table):
    """The cut of fewest bytes; exact.

    Returns:
        Point. Of equal bytes the one of least macs, and so on as in `cheapest`.
    """
    cuts = _Cuts(table)
    free = copy.copy(cuts)
    free.macs = [[0] * cuts.units for _ in range(cuts.units)]
    bound = _Bound(free, 0, (0.0, 1.0))
    endings = _endings(free, 0, [(bound, bound.best.bytes)])
    return _cheapest(cuts, min(state + high for _, state, high in endings[0][0]), 0)


def _cheapest(cuts, budget, count):
    counting = cuts.counting_modules()
    budget = (budget + 1) * (cuts.units + 1) - 1
    endings = _endings(counting, count, _limits(counting, count, budget))
    within = [(macs, state + high) for macs, state, high in endings[count][0] if state + high <= budget]
    return cuts.point(_first_borders(counting, count, endings, *min(within))) if within else None


_RANGES = 256  # of peaks that a bound tells apart, at most: more make it closer, and take more time
_SLOPES = 16  # tried for the bound on macs and bytes together, at most; about five are


class _Bound:
    """The least weighted sum of macs and bytes that a cut with a given ending may have.

    Args:
        count: modules are counted, and a cut has this number; 0: they are not counted.
        weights: (of macs, of bytes).

    Attributes:
        best: the Point of a whole cut whose sum is about the least.
    """

    def __init__(self, cuts, count, weights):
        self.weights, self._count = weights, count
        ranges = cuts.peak_ranges(_RANGES)
        self._lowest = [lowest for lowest, _ in ranges]
        beginnings = [_Beginnings(cuts, highest, weights, count) for _, highest in ranges]
        # _rest[n][i][t]: what the best beginning adds whose highest peak is in range t or a higher one.
        self._rest = [[[inf] * (len(ranges) + 1) for _ in range(cuts.units + 1)] for _ in range(count + 1)]
        for n, of_count in enumerate(self._rest):
            for i, rest in enumerate(of_count):
                for t in reversed(range(len(ranges))):
                    rest[t] = min(rest[t + 1], beginnings[t].price[n][i] + weights[1] * self._lowest[t])
        whole = self._rest[count][-1]
        best = max(t for t in range(len(ranges)) if whole[t] == whole[0])
        self.best = cuts.point(beginnings[best].borders(count))

    def of(self, n, i, ending):
        """The bound of cuts that end so, in units i..L-1 and n counted modules."""
        macs, state, high = ending
        t = max(bisect_right(self._lowest, high) - 1, 0)
        return self.weights[0] * macs + self.weights[1] * state + self._rest[self._count - n][i][t]

    def sum(self, macs, size):
        return self.weights[0] * macs + self.weights[1] * size


def _limits(cuts, count, budget):
    """[(bound, the most it may be)]: one on bytes and, where a cut is known that fits, one on macs and bytes together.

    The second is close if a byte weighs what it costs in macs around the budget. That is the slope between a cut that
    fits and one that does not, narrowed as long as there is a cut below the line through both.
    """
    on_bytes = _Bound(cuts, count, (0.0, 1.0))
    limits = [(on_bytes, budget)]
    fits, beyond = on_bytes.best, None
    if fits.bytes > budget:
        return limits
    least_macs, bound = fits.macs, _Bound(cuts, count, (1.0, 0.0))
    for _ in range(_SLOPES):
        best = bound.best
        if beyond and bound.sum(best.macs, best.bytes) >= bound.sum(fits.macs, fits.bytes):
            break
        if best.bytes <= budget:
            fits, least_macs = best, min(least_macs, best.macs)
        else:
            beyond = best
        if beyond is None or fits.macs <= beyond.macs:
            break
        slope = float(fits.macs - beyond.macs) / float(beyond.bytes - fits.bytes)
        bound = _Bound(cuts, count, (1.0, slope))
    return [*limits, (bound, bound.sum(least_macs, budget))]


def _endings(cuts, count, limits):
    """endings[n][i]: those of units i..L-1 in n counted modules, [(macs, state, high)]; state with the constant."""
    one = min(count, 1)
    limits = [(bound, limit + 1e-9 * limit + 1e-3) for bound, limit in limits]  # what rounding may have added
    endings = [[[] for _ in range(cuts.units + 1)] for _ in range(count + 1)]
    endings[0][cuts.units].append((0, cuts.constant, -cuts.carried))
    for i in reversed(range(cuts.units)):
        for n in range(one, count + 1):
            longer = set()
            for j in range(i, cuts.units):
                for macs, state, high in endings[n - one][j + 1]:
                    highest = max(cuts.peaks[i][j], high + cuts.carried)
                    longer.add((macs + cuts.macs[i][j], state + cuts.state[j], highest))
            within = [e for e in longer if all(bound.of(n, i, e) <= limit for bound, limit in limits)]
            endings[n][i] = _undominated(within)
    return endings


def _undominated(endings):
    """Those than which no other one is as good in all three numbers."""
    kept, stairs = [], []  # stairs: (state, high) of kept ones, high falling as state rises
    for ending in sorted(endings):
        _, state, high = ending
        at = bisect_right(stairs, (state, inf))
        if at == 0 or stairs[at - 1][1] > high:
            kept.append(ending)
            end = at
            while end < len(stairs) and stairs[end][1] >= high:
                end += 1
            stairs[at:end] = [(state, high)]
    return kept


def _first_borders(cuts, count, endings, macs, size):
    """Of the cuts within macs and size the one whose borders come first: each the first one that leaves an ending."""
    one = min(count, 1)
    borders, first, state, high = [], 0, 0, 0
    while first < cuts.units:
        index = len(borders)
        for j in range(first, cuts.units):
            macs_left = macs - cuts.macs[first][j]
            state_with = state + cuts.state[j]
            high_with = max(high, cuts.peaks[first][j] + cuts.carried * index)
            if any(
                e[0] <= macs_left and state_with + e[1] + max(high_with, e[2] + cuts.carried * (index + 1)) <= size
                for e in endings[count - one][j + 1]
            ):
                break
        borders.append(j)
        first, count, macs, state, high = j + 1, count - one, macs_left, state_with, high_with
    return borders[:-1]


# ---- one front of labels --------------------------------------------------------------------------------------


def exact_front(table):
    """All that can be had for how much memory: for every number of modules, the cuts of which none is worse in bytes
    or macs than another, exactly.

    Returns:
        list of Point, by modules, then by bytes, macs falling. Of equal costs the cut whose first border is least, then
        its second, and so on.
    """
    _check(table)
    found = fronts(module_options(table), table.carried)
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


@_compiled_where_built
def fronts(options, carried):
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
    endings = [{units: [(0, 0, -carried)]}]  # by number of modules, by first unit
    for count in range(1, units + 1):
        longer = {}
        for i in range(units - count + 1):
            longer[i] = _undominated(
                (macs + more, state + head, max(peak, high + carried))
                for j, ways in enumerate(options[i], i)
                for more, head, peak in ways
                for macs, state, high in endings[-1].get(j + 1, ())
            )
        endings.append(longer)
        front = []
        for size, macs in sorted((state + high, macs) for macs, state, high in longer[0]):
            if not front or macs < front[-1][1]:
                front.append((size, macs, _modules(options, carried, endings, size, macs)))
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


def _modules(options, carried, endings, size, macs):
    """Of the cuts of so many bytes and macs the one whose modules come first: each the first that leaves an ending."""
    modules, first, state, high = [], 0, 0, 0
    for index, shorter in enumerate(reversed(endings[:-1])):
        more = carried * index
        way = next(
            (j, option)
            for j, ways in enumerate(options[first], first)
            for option, way in enumerate(ways)
            if any(
                state + way[1] + ending[1] + max(high, way[2] + more, ending[2] + more + carried) <= size
                for ending in _of(shorter.get(j + 1, ()), macs - way[0])
            )
        )
        modules.append(way)
        spent, head, peak = options[first][way[0] - first][way[1]]
        first, macs, state, high = way[0] + 1, macs - spent, state + head, max(high, peak + more)
    return modules


def _of(labels, macs):
    """Those of exactly so many macs."""
    return labels[bisect_left(labels, (macs,)) : bisect_left(labels, (macs + 1,))]


# ---- what a table must be -------------------------------------------------------------------------------------

_MOST_UNITS, _MOST_BYTES, _MOST_MACS = 1000, 2**40, 2**50  # what 64 bits are enough for in every sum


def _check(table):
    """Raises ValueError where the table is malformed."""
    units = len(table.input_bytes)
    if not 1 <= units <= _MOST_UNITS:
        raise ValueError(f"a CutTable must have from 1 to {_MOST_UNITS} units, given {units}")
    for name, entries in vars(table).items():
        if name not in ("longest_rebuild", "constant", "carried") and len(entries) != units:
            raise ValueError(f"CutTable.{name} must have an entry for each of the {units} units, given {len(entries)}")
    for name in ("forward", "backward"):
        variants = getattr(table, name)
        if any(len(segments) != 9 for segments in variants):
            raise ValueError(f"CutTable.{name} must have 9 variants for each unit")
        _check_segments(name, [segment for segments in variants for segment in segments])
    _check_segments("head", table.head)
    for name in ("input_bytes", "head_state", "unit_scratch", "head_scratch", "rebuild_length"):
        _check_numbers(name, getattr(table, name), _MOST_BYTES)
    for name in ("constant", "carried", "longest_rebuild"):
        _check_numbers(name, [getattr(table, name)], _MOST_BYTES)
    _check_numbers("head_macs", table.head_macs, _MOST_MACS)
    _check_numbers("unit_macs", [macs for pair in table.unit_macs for macs in pair], _MOST_MACS)
    if table.head_state[-1] != 0:
        raise ValueError("CutTable.head_state must be 0 for the last unit: its head is the model's own classifier")


def _check_numbers(name, numbers, most):
    if not all(0 <= number <= most for number in numbers):
        raise ValueError(f"CutTable.{name} must be from 0 to {most}")


def _check_segments(name, segments):
    if not all(max(0, net) <= high <= _MOST_BYTES and net >= -_MOST_BYTES for high, net in segments):
        raise ValueError(
            f"CutTable.{name} must have max(0, net) <= high in each segment, and numbers up to {_MOST_BYTES}"
        )
