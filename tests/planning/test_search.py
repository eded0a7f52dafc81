"""The search for the cheapest cut: against hand-made numbers, every cut of small tables, and its compiled twin."""

import itertools
import random
import time
from dataclasses import astuple, replace
from math import inf
from types import SimpleNamespace

import pytest

from auglocal_ext.planning import search
from auglocal_ext.planning.cut_table import CutTable, HeadWay, UnitWay, between
from auglocal_ext.planning.module_ways import module_ways
from auglocal_ext.planning.search import Point, cheapest, next_cheaper, next_smaller, smallest


@pytest.fixture
def compiled():
    if search.MISSING:
        pytest.skip(f"the compiled search is missing: {search.MISSING}")
    from auglocal_ext import _search

    return _search


@pytest.fixture(params=["python", "compiled"])
def front(request, monkeypatch):
    """`search.front` with its core in Python, then with the compiled one."""
    core = None if request.param == "python" else request.getfixturevalue("compiled")
    monkeypatch.setattr(search, "_compiled", core)
    return search.front


def flat(*, forward, backward, unit_macs, head, head_macs, head_state, head_scratch, **fields):
    """A table of one way to run each unit and each head, from lists by unit."""
    units = [[UnitWay(False, f, b, m)] for f, b, m in zip(forward, backward, unit_macs, strict=True)]
    heads = [
        [HeadWay((segment, segment), (macs, macs), state, scratch)]
        for segment, macs, state, scratch in zip(head, head_macs, head_state, head_scratch, strict=True)
    ]
    return CutTable(units=units, heads=heads, **fields)


def blank(units, **fields):
    """A table of zeros but for some fields of `flat`."""
    zeros = [0] * units
    segments = [[(0, 0)] * 12 for _ in range(units)]
    made = dict.fromkeys(("input_bytes", "head_macs", "head_state", "unit_scratch", "head_scratch"), zeros)
    made |= {"forward": segments, "backward": segments, "head": [(0, 0)] * units, "unit_macs": [(0, 0)] * units}
    made |= {"identity": [False] * units, "rebuild_length": [1] * units}
    made |= {"longest_rebuild": 4, "constant": 0}
    return flat(**(made | fields))


def random_table(draw, units, most, ways=1):
    """Random numbers below `most`; where that is small, many cuts cost the same. ways: the most of each."""

    def number():
        return draw.randrange(most)

    def segment():
        net = draw.randrange(-most, most)
        return max(0, net) + number(), net

    def unit(again):
        forward, backward = ([segment() for _ in range(12)] for _ in "fb")
        return UnitWay(again, forward, backward, (number(), number()))

    def head(state):
        return HeadWay((segment(), segment()), (number(), number()), state, number())

    def of_each(make):
        return [make(k) for k in range(units)]

    return CutTable(
        input_bytes=of_each(lambda k: number()),
        units=of_each(lambda k: [unit(again) for again in draw.sample((False, True), draw.randint(1, min(ways, 2)))]),
        heads=of_each(lambda k: [head(number() if k < units - 1 else 0) for _ in range(draw.randint(1, ways))]),
        identity=of_each(lambda k: draw.random() < 0.6),
        rebuild_length=of_each(lambda k: draw.randrange(1, 4)),
        longest_rebuild=draw.randrange(5),
        unit_scratch=of_each(lambda k: number()),
        constant=number(),
    )


def resnet_table(blocks, seed=0):
    """Like a CIFAR ResNet's, batch 128: a stem and three stages of equal blocks; heads of sizes of their own."""
    draw = random.Random(seed)
    stage = [0] + [s for s in range(3) for _ in range(blocks)]
    units = len(stage)
    map_bytes = [128 * (16 << s) * (32 >> s) ** 2 * 4 for s in stage]
    input_bytes = [128 * 3 * 32**2 * 4, *map_bytes[:-1]]
    weights = [2 * 9 * (16 << s) ** 2 for s in stage]
    macs = [128 * weight * (32 >> s) ** 2 for weight, s in zip(weights, stage, strict=True)]
    forward, backward = [], []
    for k in range(units):
        variants = list(itertools.product(range(4), range(3)))
        kept = [2 * map_bytes[k] + (b != 0) * map_bytes[k] - (a == 1) * input_bytes[k] for a, b in variants]
        freed = [4 * weights[k] + input_bytes[k] - (2 + (b == 1)) * map_bytes[k] for _, b in variants]
        forward.append([(max(0, net) + map_bytes[k], net) for net in kept])
        backward.append([(max(0, net) + 2 * map_bytes[k], net) for net in freed])
    heads = [draw.randrange(2, 7) * macs[k] // 2 + draw.randrange(10**6) for k in range(units)]
    return flat(
        input_bytes=input_bytes,
        forward=forward,
        backward=backward,
        head=[(3 * size, 40) for size in map_bytes],
        identity=[k > 0 and stage[k] == stage[k - 1] for k in range(units)],
        rebuild_length=[2] * units,
        longest_rebuild=4,
        unit_macs=[(5 * m // 2, 3 * m) for m in macs],
        head_macs=heads,
        head_state=[draw.randrange(10**5, 2 * 10**6) for _ in range(units - 1)] + [0],
        unit_scratch=[4 * weight for weight in weights],
        head_scratch=[4 * 9 * 64**2] * units,
        constant=8 * sum(weights) + input_bytes[0],
    )


def peak_of(table, first, units, head):
    """The highest live bytes of the module that begins with unit `first`, of `UnitWay`s and a HeadWay, walked from one
    segment to the next."""
    forward, backward, before, walked, last = [], [], 0, 0, first + len(units) - 1
    for k, way in enumerate(units, first):
        length = 1 + walked if table.identity[k] else table.rebuild_length[k]
        kept = way.again or length > table.longest_rebuild
        variant = 3 * before + (2 if k == last else int(kept))
        forward.append(way.forward[variant])
        backward.append(way.backward[variant])
        before, walked = (3, 0) if way.again else (2, 0) if kept else (1, length)
    live = peak = table.input_bytes[first]
    for high, net in [*forward, head.segments[units[-1].again], *reversed(backward)]:
        peak = max(peak, live + high)
        live += net
    return max(peak, live + max(*table.unit_scratch[first : last + 1], head.scratch))


def peaks_of(table):
    """peaks[i][j - i] of the module of units i..j, by the search, of a table of one way."""
    return [[peak for ((_, _, peak, _, _),) in row] for row in module_ways(table)]


def all_cuts(table):
    """Every cut of a table, costed as the module's docstring says."""
    units = len(table.input_bytes)
    modules = {(i, j): list(_all_ways(table, i, j)) for i in range(units) for j in range(i, units)}
    points = []
    for count in range(units):
        for borders in itertools.combinations(range(units - 1), count):
            parts = list(zip([0, *(b + 1 for b in borders)], [*borders, units - 1], strict=True))
            for ways in itertools.product(*(modules[part] for part in parts)):
                macs, states, peaks, heads, again = zip(*ways, strict=True)
                size = table.constant + sum(states) + max(peaks)
                points.append(Point(count + 1, size, sum(macs), borders, heads[:-1], tuple(itertools.chain(*again))))
    return points


def _all_ways(table, i, j):
    """(macs, state, peak, head, units that run again) of the module of units i..j, in every way."""
    for units in itertools.product(*table.units[i : j + 1]):
        for index, head in enumerate(table.heads[j]):
            macs = sum(way.macs[place > 0] for place, way in enumerate(units)) + head.macs[units[-1].again]
            again = tuple(k for k, way in enumerate(units, i) if way.again)
            yield macs, head.state, peak_of(table, i, units, head), index, again


def by_macs(point):
    return point.cost, point.bytes, point.modules, point.borders


def by_bytes(point):
    return point.bytes, point.cost, point.modules, point.borders


# ---- by hand ----------------------------------------------------------------------------------------------------


def test_which_variant_a_unit_is_in():
    # A peak of one digit for each forward segment: 10 ** its variant.
    digits = [[(10**v, 10**v) for v in range(12)]] * 5
    table = blank(5, forward=digits, identity=[False, True, True, True, True], longest_rebuild=2)
    peaks = peaks_of(table)
    assert [peaks[k][0] for k in range(5)] == [10**2] * 5  # first and last at once
    assert peaks[0][1] == 10**0 + 10**5
    # Rebuilds of 1, 2 and 3 passes, so the third output is kept, and the fourth is one pass from it.
    assert peaks[0][4] == 10**0 + 10**3 + 10**4 + 10**6 + 10**5
    assert peaks[0][3] == 10**0 + 10**3 + 10**4 + 10**8
    assert peaks[2][2] == 10**0 + 10**3 + 10**5  # counted from the module's input
    # No identity: a rebuild as long as its own says, whatever comes before.
    table = replace(table, identity=[False] * 5, rebuild_length=[3, 1, 3, 2, 1])
    assert peaks_of(table)[0][4] == 10**1 + 10**6 + 10**4 + 10**6 + 10**5


def test_where_the_peak_of_a_module_is():
    numbers = {
        "input_bytes": [5, 7],
        "forward": [[(10, 4)] * 12, [(3, 2)] * 12],
        "backward": [[(1, -4)] * 12, [(2, -6)] * 12],
        "head": [(2, 1), (2, 1)],
    }
    assert peaks_of(blank(2, **numbers)) == [
        [15, 15],
        [12],
    ]  # forward of unit 0: 5 + 10; backward of unit 1: 7 + 2 + 1 + 2
    late = blank(2, **(numbers | {"backward": [[(20, -4)] * 12, [(9, -6)] * 12]}))
    # live at the backward of unit 1: 5 + 4 + 2 + 1, at that of unit 0: 6 less
    assert peaks_of(late) == [[30, 26], [19]]
    scratch = blank(2, **numbers, unit_scratch=[40, 0], head_scratch=[0, 30])
    # live at the end: 6 of unit 0 alone, 2 of both, 4 of unit 1 alone
    assert peaks_of(scratch) == [[46, 42], [34]]


def test_cuts_by_hand(front):
    # Peaks: 10 a unit and what the units before keep.
    table = blank(
        3,
        forward=[[(10, 10)] * 12] * 3,
        unit_macs=[(1, 2)] * 3,
        head_macs=[5, 6, 1],
        head_state=[3, 2, 0],
        constant=100,
    )
    one, late, early, all_three = points = [
        Point(1, 130, 6, ()),
        Point(2, 122, 11, (1,), (0,)),  # 20 and 10, head 2
        Point(2, 123, 10, (0,), (0,)),  # 10 and 20, head 3
        Point(3, 115, 15, (0, 1), (0, 0)),  # 10 each, heads 5
    ]
    assert front(table) == points
    assert smallest(points) == all_three
    assert [cheapest(points, budget) for budget in (114, 115, 121, 122, 123, 129, 130, 2**62)] == [
        *(None, all_three, all_three),
        *(late, early, early, one, one),
    ]
    assert cheapest(points, -(2**62)) is None
    assert [next_cheaper(points, point) for point in points] == [None, early, one, late]
    assert [next_smaller(points, point) for point in points] == [early, all_three, late, None]


def of(modules, points):
    return [point for point in points if point.modules == modules]


def test_of_equal_costs_fewer_modules_then_smaller_borders(front):
    points = front(blank(5))
    assert cheapest(points, 0) == smallest(points) == Point(1, 0, 0, ())
    assert cheapest(of(3, points), 0) == Point(3, 0, 0, (0, 1), (0, 0))
    one_must_end_at_two = blank(5, head_macs=[1, 1, 0, 1, 0], forward=[[(k, k)] * 12 for k in (1, 1, 1, 2, 1)])
    assert cheapest(of(3, front(one_must_end_at_two)), 5) == Point(3, 3, 1, (0, 2), (0, 0))


def test_of_equal_macs_fewer_bytes(front):
    points = front(blank(3, forward=[[(10, 10)] * 12] * 3, head_state=[3, 20, 0]))
    assert cheapest(points, 1000) == smallest(points) == Point(2, 23, 0, (0,), (0,))


def test_several_ways_to_run_a_module():
    """The core takes any number of ways for a module, and says which it takes."""
    draw = random.Random(2)
    for most in (3, 100) * 50:
        units = draw.randrange(1, 6)
        options = [
            [
                [(*(draw.randrange(most) for _ in range(3)), 0, "") for _ in range(draw.randrange(1, 4))]
                for _ in range(i, units)
            ]
            for i in range(units)
        ]
        expected = []
        for count in range(1, units + 1):
            cuts = []
            for borders in itertools.combinations(range(units - 1), count - 1):
                parts = list(zip([0, *(b + 1 for b in borders)], [*borders, units - 1], strict=True))
                for ways in itertools.product(*(enumerate(options[i][j - i]) for i, j in parts)):
                    macs, states, peaks, *_ = zip(*(way for _, way in ways), strict=True)
                    modules = [(j, option) for (_, j), (option, _) in zip(parts, ways, strict=True)]
                    cuts.append((sum(states) + max(peaks), sum(macs), modules))
            least = [inf, *itertools.accumulate((macs for _, macs, _ in sorted(cuts)), min)]
            expected.append([cut for cut, before in zip(sorted(cuts), least, strict=False) if cut[1] < before])
        assert search.fronts(options) == expected
        if search._compiled:
            assert search._compiled.fronts(options) == expected


# ---- against every cut --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [2, 5, 100, 10**9, 2**39])
def test_no_cut_is_better(front, most):
    draw = random.Random(most)
    for _ in range(60):
        table = random_table(draw, draw.randrange(1, 9), most)
        points, found = all_cuts(table), front(table)
        assert smallest(found) == min(points, key=by_bytes)
        sizes = [point.bytes for point in points]
        budgets = [min(sizes) - 1, min(sizes), max(sizes), *(draw.randint(min(sizes), max(sizes)) for _ in range(3))]
        for budget in budgets:
            assert cheapest(found, budget) == min((p for p in points if p.bytes <= budget), key=by_macs, default=None)


@pytest.mark.parametrize("ways", [1, 2, 3])
@pytest.mark.parametrize("most", [2, 5, 100, 10**9, 2**39])
def test_the_front_is_exact(front, most, ways):
    """Over borders, heads, and units that run again."""
    draw = random.Random(most)
    for _ in range(60 if ways == 1 else 25):
        table = random_table(draw, draw.randrange(1, 9 if ways == 1 else 5), most, ways)
        points, expected = all_cuts(table), []
        for modules in range(1, len(table.input_bytes) + 1):
            least = inf
            for point in sorted(of(modules, points), key=by_bytes):
                if point.cost < least:
                    expected.append(point)
                    least = point.cost
        found = front(table)
        assert set(found) <= set(points)  # each costs what its choices cost
        costs = [(point.modules, point.bytes, point.cost, point.borders) for point in found]
        assert costs == [(point.modules, point.bytes, point.cost, point.borders) for point in expected]


def test_where_no_head_is_there_is_one_module(front):
    table = replace(blank(3), heads=[[], [], blank(3).heads[2]])
    assert front(table) == [Point(1, 0, 0, ())]


def test_tables_between_others():
    draw = random.Random(0)
    one = random_table(draw, 3, 100, 2)
    assert between(one, one, 1, 3) == one
    other = replace(one, constant=one.constant + 30)
    assert between(one, other, 1, 3) == replace(one, constant=one.constant + 10)


# ---- the compiled search --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ways", [1, 3])
@pytest.mark.parametrize("most", [2, 50, 10**6, 10**11])
def test_both_return_the_same(compiled, most, ways):
    draw = random.Random(most)
    for _ in range(60):
        table = random_table(draw, draw.randrange(1, 15 if ways == 1 else 8), most, ways)
        found = module_ways(table)
        assert compiled.module_ways(*astuple(table)[:-1]) == found
        assert compiled.fronts(found) == search.fronts(found)


@pytest.mark.parametrize("blocks", [6, 9])
def test_both_return_the_same_for_a_resnet(compiled, blocks):
    table = resnet_table(blocks)
    ways = module_ways(table)
    assert compiled.fronts(ways) == search.fronts(ways)
    points = search.front(table)
    least, whole = smallest(points), cheapest(points, 2**40)
    assert whole.modules == 1 and least.modules > 5 and {p.modules for p in points} == set(range(1, 3 * blocks + 2))


@pytest.mark.parametrize("blocks", [17, 18])
def test_a_search_of_a_deep_network_takes_no_time_to_notice(compiled, blocks):
    table = resnet_table(blocks)
    start = time.process_time()
    points = search.front(table)
    assert time.process_time() - start < 2  # 0.25 s on one idle core
    assert len({point.modules for point in points}) == len(table.input_bytes)


def test_the_search_in_python_serves_a_deep_network_too(monkeypatch):
    monkeypatch.setattr(search, "_compiled", None)
    points = search.front(resnet_table(blocks=12))
    least = smallest(points)
    point = cheapest(points, 200_000_000)
    assert least.bytes < point.bytes <= 200_000_000 and 1 < point.modules < least.modules


def test_which_search_serves(monkeypatch):
    table, point = blank(1), Point(1, 0, 0, ())
    twin = SimpleNamespace(module_ways=lambda *table: [[[(0, 0, 0, 0, "1")]]], fronts=lambda ways: [[(7, 8, [(0, 0)])]])
    monkeypatch.setattr(search, "_compiled", twin)
    assert search.front(table) == [Point(1, 7, 8, (), (), (0,))]
    monkeypatch.setattr(search, "_compiled", None)
    assert search.front(table) == [point]
    monkeypatch.setenv("AUGLOCAL_NATIVE", "0")
    assert search._load() == (None, "AUGLOCAL_NATIVE=0 is set")


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_bytes": []}, "a CutTable must have from 1 to 1000 units, given 0"),
        ({"unit_scratch": [0]}, "CutTable.unit_scratch must have an entry for each of the 2 units, given 1"),
        ({"identity": [True] * 3}, "CutTable.identity must have an entry for each of the 2 units, given 3"),
        ({"forward": [[(0, 0)] * 12, [(0, 0)] * 8]}, "UnitWay.forward must have 12 variants"),
        (
            {"head": [(0, 0), (1, 2)]},
            r"HeadWay.segments must be pairs .* with max\(0, net\) <= high, .*; given \(1, 2\)",
        ),
        ({"backward": [[(-1, -1)] * 12] * 2}, r"UnitWay.backward must be pairs .* with max\(0, net\) <= high"),
        ({"head": [(0, 0), 1]}, "HeadWay.segments must be pairs of whole numbers .*; given 1"),
        ({"forward": [[(0, 0, 0)] * 12] * 2}, "UnitWay.forward must be pairs of whole numbers"),
        ({"forward": [[(0, 0.5)] * 12] * 2}, "UnitWay.forward must be pairs of whole numbers"),
        ({"unit_scratch": [0, -1]}, "CutTable.unit_scratch must be whole numbers from 0 to 1099511627776"),
        ({"input_bytes": [0.5, 1]}, "CutTable.input_bytes must be whole numbers from 0 to"),
        ({"longest_rebuild": "4"}, "CutTable.longest_rebuild must be whole numbers from 0 to"),
        ({"constant": 2**41}, "CutTable.constant must be whole numbers from 0 to 1099511627776"),
        ({"unit_macs": [(0, 0), (0, -1)]}, "UnitWay.macs must be whole numbers from 0 to 1125899906842624"),
        ({"head_state": [0, 1]}, "HeadWay.state must be 0 for the last unit"),
    ],
)
def test_malformed_tables(fields, message):
    with pytest.raises(ValueError, match=message):
        search.front(blank(2, **fields))


def test_a_unit_without_a_way():
    table = blank(2)
    for fields in ({"units": [table.units[0], []]}, {"heads": [table.heads[0], []]}):
        with pytest.raises(ValueError, match="must have at least one way for each unit"):
            search.front(replace(table, **fields))
