"""The search for the cheapest cut: against hand-made numbers, every cut of small tables, and its compiled twin."""

import itertools
import random
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from auglocal_ext import search
from auglocal_ext.search import CutTable, Point

NAMES = ("module_peaks", "front", "cheapest", "smallest")
PLAIN = SimpleNamespace(**{name: getattr(search, name).plain for name in NAMES})


@pytest.fixture
def compiled():
    if search.MISSING:
        pytest.skip(f"the compiled search is missing: {search.MISSING}")
    from auglocal_ext import _search

    return _search


@pytest.fixture(params=["python", "compiled"])
def either(request):
    """The search in Python, then the compiled one."""
    return PLAIN if request.param == "python" else request.getfixturevalue("compiled")


def blank(units, **fields):
    """A table of zeros but for some fields."""
    zeros = [0] * units
    segments = [[(0, 0)] * 9 for _ in range(units)]
    made = dict.fromkeys(("input_bytes", "head_macs", "head_state", "unit_scratch", "head_scratch"), zeros)
    made |= {"forward": segments, "backward": segments, "head": [(0, 0)] * units, "unit_macs": [(0, 0)] * units}
    made |= {"identity": [False] * units, "rebuild_length": [1] * units}
    made |= {"longest_rebuild": 4, "constant": 0, "carried": 0}
    return CutTable(**(made | fields))


def random_table(draw, units, most):
    """Random numbers below `most`; where that is small, many cuts cost the same."""

    def number():
        return draw.randrange(most)

    def segment():
        net = draw.randrange(-most, most)
        return max(0, net) + number(), net

    def numbers(count=units):
        return [number() for _ in range(count)]

    return CutTable(
        input_bytes=numbers(),
        forward=[[segment() for _ in range(9)] for _ in range(units)],
        backward=[[segment() for _ in range(9)] for _ in range(units)],
        head=[segment() for _ in range(units)],
        identity=[draw.random() < 0.6 for _ in range(units)],
        rebuild_length=[draw.randrange(1, 4) for _ in range(units)],
        longest_rebuild=draw.randrange(5),
        unit_macs=[(number(), number()) for _ in range(units)],
        head_macs=numbers(),
        head_state=[*numbers(units - 1), 0],
        unit_scratch=numbers(),
        head_scratch=numbers(),
        constant=number(),
        carried=draw.choice((0, 1, number())),
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
        variants = list(itertools.product(range(3), range(3)))
        kept = [2 * map_bytes[k] + (b != 0) * map_bytes[k] - (a == 1) * input_bytes[k] for a, b in variants]
        freed = [4 * weights[k] + input_bytes[k] - (2 + (b == 1)) * map_bytes[k] for _, b in variants]
        forward.append([(max(0, net) + map_bytes[k], net) for net in kept])
        backward.append([(max(0, net) + 2 * map_bytes[k], net) for net in freed])
    heads = [draw.randrange(2, 7) * macs[k] // 2 + draw.randrange(10**6) for k in range(units)]
    return CutTable(
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
        carried=4,
    )


def all_cuts(table):
    """Every cut of a table, costed from its peaks as the module's docstring says."""
    units = len(table.input_bytes)
    peaks = PLAIN.module_peaks(table)
    points = []
    for count in range(units):
        for borders in itertools.combinations(range(units - 1), count):
            modules = list(zip([0, *(b + 1 for b in borders)], [*borders, units - 1], strict=True))
            high = max(peaks[i][j] + table.carried * m for m, (i, j) in enumerate(modules))
            state = sum(table.head_state[b] for b in borders)
            macs = sum(
                table.unit_macs[i][0] + sum(table.unit_macs[k][1] for k in range(i + 1, j + 1)) + table.head_macs[j]
                for i, j in modules
            )
            points.append(Point(count + 1, table.constant + state + high, macs, borders))
    return points


def by_macs(point):
    return point.macs, point.bytes, point.modules, point.borders


def by_bytes(point):
    return point.bytes, point.macs, point.modules, point.borders


# ---- by hand ----------------------------------------------------------------------------------------------------


def test_which_variant_a_unit_is_in(either):
    # A peak of one digit for each forward segment: 10 ** its variant.
    digits = [[(10**v, 10**v) for v in range(9)]] * 5
    table = blank(5, forward=digits, identity=[False, True, True, True, True], longest_rebuild=2)
    peaks = either.module_peaks(table)
    assert [peaks[k][k] for k in range(5)] == [10**2] * 5  # first and last at once
    assert peaks[0][1] == 10**0 + 10**5
    # Rebuilds of 1, 2 and 3 passes, so the third output is kept, and the fourth is one pass from it.
    assert peaks[0][4] == 10**0 + 10**3 + 10**4 + 10**6 + 10**5
    assert peaks[0][3] == 10**0 + 10**3 + 10**4 + 10**8
    assert peaks[2][4] == 10**0 + 10**3 + 10**5  # counted from the module's input
    assert peaks[3][2] == 0
    # No identity: a rebuild as long as its own says, whatever comes before.
    table = replace(table, identity=[False] * 5, rebuild_length=[3, 1, 3, 2, 1])
    assert either.module_peaks(table)[0][4] == 10**1 + 10**6 + 10**4 + 10**6 + 10**5


def test_where_the_peak_of_a_module_is(either):
    table = blank(
        2,
        input_bytes=[5, 7],
        forward=[[(10, 4)] * 9, [(3, 2)] * 9],
        backward=[[(1, -4)] * 9, [(2, -6)] * 9],
        head=[(2, 1), (2, 1)],
    )
    assert either.module_peaks(table) == [
        [15, 15],
        [0, 12],
    ]  # forward of unit 0: 5 + 10; backward of unit 1: 7 + 2 + 1 + 2
    late = replace(table, backward=[[(20, -4)] * 9, [(9, -6)] * 9])
    # live at the backward of unit 1: 5 + 4 + 2 + 1, at that of unit 0: 6 less
    assert either.module_peaks(late) == [[30, 26], [0, 19]]
    scratch = replace(table, unit_scratch=[40, 0], head_scratch=[0, 30])
    # live at the end: 6 of unit 0 alone, 2 of both, 4 of unit 1 alone
    assert either.module_peaks(scratch) == [[46, 42], [0, 34]]


def test_cuts_by_hand(either):
    # Peaks: 10 a unit and what the units before keep.
    table = blank(
        3,
        forward=[[(10, 10)] * 9] * 3,
        unit_macs=[(1, 2)] * 3,
        head_macs=[5, 6, 1],
        head_state=[3, 2, 0],
        constant=100,
        carried=4,
    )
    one, late, early, all_three = (
        Point(1, 130, 6, ()),
        Point(2, 122, 11, (1,)),  # 20 and 10 + 4, head 2
        Point(2, 127, 10, (0,)),  # 10 and 20 + 4, head 3
        Point(3, 123, 15, (0, 1)),  # 10, 14 and 18, heads 5
    )
    assert either.front(table) == [one, late, early, all_three]
    assert either.smallest(table) == late
    assert [either.cheapest(table, budget) for budget in (121, 122, 126, 127, 129, 130, 2**62)] == [
        *(None, late, late),
        *(early, early, one, one),
    ]
    assert either.cheapest(table, 10**6, modules=3) == all_three
    assert either.cheapest(table, 122, modules=3) is None
    assert either.cheapest(table, -(2**62)) is None


def test_of_equal_costs_fewer_modules_then_smaller_borders(either):
    assert either.cheapest(blank(5), 0) == either.smallest(blank(5)) == Point(1, 0, 0, ())
    assert either.cheapest(blank(5), 0, modules=3) == Point(3, 0, 0, (0, 1))
    one_must_end_at_two = blank(5, head_macs=[1, 1, 0, 1, 0], forward=[[(k, k)] * 9 for k in (1, 1, 1, 2, 1)])
    assert either.cheapest(one_must_end_at_two, 5, modules=3) == Point(3, 3, 1, (0, 2))


def test_of_equal_macs_fewer_bytes(either):
    table = blank(3, forward=[[(10, 10)] * 9] * 3, head_state=[3, 20, 0])
    assert either.cheapest(table, 1000) == either.smallest(table) == Point(2, 23, 0, (0,))


# ---- against every cut --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [2, 5, 100, 10**9, 2**39])
def test_no_cut_is_better(either, most):
    draw = random.Random(most)
    for _ in range(30):
        table = random_table(draw, draw.randrange(1, 9), most)
        points = all_cuts(table)
        assert either.smallest(table) == min(points, key=by_bytes)
        sizes = [point.bytes for point in points]
        budgets = [min(sizes) - 1, min(sizes), max(sizes), *(draw.randint(min(sizes), max(sizes)) for _ in range(3))]
        for budget, modules in itertools.product(budgets, (None, *range(1, len(table.input_bytes) + 1))):
            fit = [p for p in points if p.bytes <= budget and modules in (None, p.modules)]
            assert either.cheapest(table, budget, modules) == min(fit, key=by_macs, default=None)


def test_the_front(either):
    draw = random.Random(0)
    for _ in range(60):
        table = random_table(draw, draw.randrange(1, 9), draw.choice((5, 1000)))
        points, front = all_cuts(table), either.front(table)
        assert set(front) <= set(points)
        assert front == sorted(front, key=lambda p: (p.modules, p.bytes))
        assert min(points, key=by_bytes) in front
        for modules in range(1, len(table.input_bytes) + 1):
            macs = [p.macs for p in front if p.modules == modules]
            assert macs == sorted(set(macs), reverse=True)
            assert macs[-1] == min(p.macs for p in points if p.modules == modules)


def test_the_front_is_exact_where_heads_have_no_state(either):
    draw = random.Random(1)
    for _ in range(30):
        table = replace(random_table(draw, 8, 50), head_state=[0] * 8, carried=0)
        expected = []
        for modules in range(1, 9):
            of_count = sorted((p for p in all_cuts(table) if p.modules == modules), key=by_bytes)
            least = [of_count[0].macs + 1, *itertools.accumulate((p.macs for p in of_count), min)]
            expected += [p for p, before in zip(of_count, least, strict=False) if p.macs < before]
        costs = [(p.modules, p.bytes, p.macs) for p in either.front(table)]
        assert costs == [(p.modules, p.bytes, p.macs) for p in expected]


@pytest.mark.parametrize("most", [2, 5, 100, 10**9, 2**39])
def test_one_front_has_all_that_the_search_finds(most):
    draw = random.Random(most)
    for _ in range(60):
        table = random_table(draw, draw.randrange(1, 9), most)
        points, expected = all_cuts(table), []
        for modules in range(1, len(table.input_bytes) + 1):
            least = 2**62
            for point in sorted((p for p in points if p.modules == modules), key=by_bytes):
                if point.macs < least:
                    expected.append(point)
                    least = point.macs
        front = search.exact_front(table)
        assert front == expected
        options = search.module_options(table)
        assert search.fronts.plain(options, table.carried) == search.fronts(options, table.carried)
        assert min(front, key=by_bytes) == search.smallest(table)
        for point in points[:: max(1, len(points) // 10)]:
            for budget, modules in itertools.product((point.bytes - 1, point.bytes), (None, point.modules)):
                fit = [p for p in front if p.bytes <= budget and modules in (None, p.modules)]
                assert min(fit, key=by_macs, default=None) == search.cheapest(table, budget, modules)


@pytest.mark.parametrize("blocks", [6, 17])
def test_one_front_of_a_resnet_has_all_that_the_search_finds(blocks):
    table = resnet_table(blocks)
    front = search.exact_front(table)
    least = min(front, key=by_bytes)
    assert least == search.smallest(table)
    assert {(p.modules, p.bytes, p.macs) for p in search.front(table)} >= {(least.modules, least.bytes, least.macs)}
    for point in front[:: len(front) // 10]:
        for budget in (point.bytes - 1, point.bytes):
            fit = [p for p in front if p.bytes <= budget]
            assert min(fit, key=by_macs, default=None) == search.cheapest(table, budget)


# ---- the compiled search --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [2, 50, 10**6, 10**11])
def test_both_return_the_same(compiled, most):
    draw = random.Random(most)
    for _ in range(60):
        table = random_table(draw, draw.randrange(1, 15), most)
        assert compiled.module_peaks(table) == PLAIN.module_peaks(table)
        assert compiled.front(table) == PLAIN.front(table)
        smallest = PLAIN.smallest(table)
        assert compiled.smallest(table) == smallest
        whole = PLAIN.cheapest(table, 2**45, modules=1)
        for budget in (smallest.bytes, (smallest.bytes + whole.bytes) // 2, whole.bytes):
            for modules in (None, 1 + len(table.input_bytes) // 2):
                expected = PLAIN.cheapest(table, budget, modules)
                assert compiled.cheapest(table, budget, modules) == expected


def test_both_return_the_same_for_a_resnet(compiled):
    table = resnet_table(blocks=6)
    assert compiled.front(table) == PLAIN.front(table)
    least, whole = compiled.smallest(table), compiled.cheapest(table, 2**40)
    assert least == PLAIN.smallest(table) and whole.modules == 1 and least.modules > 5
    for tenth in range(11):
        budget = least.bytes + (whole.bytes - least.bytes) * tenth // 10
        assert compiled.cheapest(table, budget) == PLAIN.cheapest(table, budget)


@pytest.mark.parametrize("blocks", [17, 18])
def test_a_search_of_a_deep_network_takes_no_time_to_notice(compiled, blocks):
    table = resnet_table(blocks)
    start = time.perf_counter()
    front = compiled.front(table)
    whole = next(point for point in front if point.modules == 1)
    least = compiled.smallest(table)
    budgets = [least.bytes + (whole.bytes - least.bytes) * part // 100 for part in (0, 2, 10, 30, 60, 90)]
    best = [compiled.cheapest(table, budget) for budget in budgets]
    assert time.perf_counter() - start < 2  # 0.2 s on one idle core
    for budget, point in zip(budgets, best, strict=True):
        assert point.bytes <= budget
        assert point.macs <= min((p.macs for p in front if p.bytes <= budget), default=point.macs)
    counts = [sum(p.modules == modules for p in front) for modules in range(1, len(table.input_bytes) + 1)]
    assert min(counts) >= 1 and max(counts) <= 60


def test_the_search_in_python_serves_a_deep_network_too():
    table = resnet_table(blocks=17)
    least, budget = PLAIN.smallest(table), 200_000_000
    point = PLAIN.cheapest(table, budget)
    assert least.bytes < point.bytes <= budget and 1 < point.modules < least.modules


def test_which_search_serves(monkeypatch):
    table, point = blank(1), Point(1, 0, 0, ())
    monkeypatch.setattr(search, "_compiled", SimpleNamespace(smallest=lambda table: "compiled"))
    assert search.smallest(table) == "compiled" and search.smallest.plain(table) == point
    monkeypatch.setattr(search, "_compiled", None)
    assert search.smallest(table) == point
    monkeypatch.setenv("AUGLOCAL_NATIVE", "0")
    assert search._load() == (None, "AUGLOCAL_NATIVE=0 is set")


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_bytes": []}, "a CutTable must have from 1 to 1000 units, given 0"),
        ({"head_macs": [0]}, "CutTable.head_macs must have an entry for each of the 2 units, given 1"),
        ({"identity": [True] * 3}, "CutTable.identity must have an entry for each of the 2 units, given 3"),
        ({"forward": [[(0, 0)] * 9, [(0, 0)] * 8]}, "CutTable.forward must have 9 variants for each unit"),
        ({"head": [(0, 0), (1, 2)]}, r"CutTable.head must have max\(0, net\) <= high in each segment"),
        ({"backward": [[(-1, -1)] * 9] * 2}, r"CutTable.backward must have max\(0, net\) <= high in each segment"),
        ({"unit_scratch": [0, -1]}, "CutTable.unit_scratch must be from 0 to 1099511627776"),
        ({"constant": 2**41}, "CutTable.constant must be from 0 to 1099511627776"),
        ({"unit_macs": [(0, 0), (0, -1)]}, "CutTable.unit_macs must be from 0 to 1125899906842624"),
        ({"head_state": [0, 1]}, "CutTable.head_state must be 0 for the last unit"),
    ],
)
def test_malformed_tables(either, fields, message):
    table = blank(2, **fields)
    for call in (either.module_peaks, either.front, either.smallest, lambda table: either.cheapest(table, 0)):
        with pytest.raises(ValueError, match=message):
            call(table)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_bytes": [0.5, 1]}, "CutTable.input_bytes must be a list of whole numbers"),
        ({"head": [(0, 0), 1]}, "CutTable.head must be a list of pairs of whole numbers"),
        ({"forward": [[(0, 0, 0)] * 9] * 2}, "CutTable.forward must be a list of lists of pairs of whole numbers"),
        ({"carried": "4"}, "CutTable.carried must be a whole number"),
    ],
)
def test_tables_of_something_else(compiled, fields, message):
    with pytest.raises(ValueError, match=message):
        compiled.smallest(blank(2, **fields))


@pytest.mark.parametrize("modules", [0, -1, 4])
def test_modules_out_of_range(either, modules):
    with pytest.raises(ValueError, match=f"modules must be from 1 to 3, the units of the table, given {modules}"):
        either.cheapest(blank(3), 0, modules=modules)
