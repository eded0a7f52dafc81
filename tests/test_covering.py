"""What the default suite runs of a table."""

import itertools
from collections import Counter

import pytest
from covering import covering


def table_of(*sizes):
    return [dict(zip("abcdef", case, strict=False)) for case in itertools.product(*map(range, sizes))]


def met(cases, together):
    return {values for case in cases for values in itertools.combinations(case.items(), together)}


@pytest.mark.parametrize(
    ("sizes", "together", "most"),
    [
        ((7, 2, 3, 4), 2, 30),
        ((2, 2, 2, 2), 2, 6),
        ((5, 3), 2, 15),
        ((2, 2, 2, 2), 3, 10),
        ((7, 2, 3), 1, 7),
        ((4,), 2, 4),
    ],
)
def test_what_meets_in_all_cases_meets_in_few(sizes, together, most):
    table = table_of(*sizes)
    taken = covering(table, together)
    chosen, together = [table[number] for number in taken], min(together, len(sizes))
    assert met(chosen, together) == met(table, together)
    assert len(taken) <= most and taken == sorted(set(taken))


def test_values_are_taken_about_as_often():
    taken = covering(table_of(8, 2, 2), 1)
    chosen = [table_of(8, 2, 2)[number] for number in taken]
    assert Counter(case["b"] for case in chosen) == Counter(case["c"] for case in chosen) == {0: 4, 1: 4}


def test_what_meets_nowhere_is_not_asked_for():
    table = [case for case in table_of(3, 3, 3) if case["a"] != case["b"]]
    assert met([table[number] for number in covering(table, 2)], 2) == met(table, 2)
    assert covering([], 2) == []
