"""Local modules over stages."""

import itertools
import random

import pytest

from auglocal_ext.stages.balance import balanced, sums_of


def test_no_other_groups_of_neighbours_have_a_lower_highest_sum():
    draw = random.Random(0)
    for _ in range(200):
        costs = [draw.randint(0, 9) for _ in range(draw.randint(1, 8))]
        stages = draw.randint(1, len(costs))
        groups = balanced(len(costs), stages, sums_of(costs))
        assert [index for group in groups for index in group] == list(range(len(costs)))
        assert len(groups) == stages and all(groups)
        best = min(
            max(sum(costs[i:j]) for i, j in zip((0, *borders), (*borders, len(costs)), strict=True))
            for borders in itertools.combinations(range(1, len(costs)), stages - 1)
        )
        assert max(sum(costs[index] for index in group) for group in groups) == best


def test_of_equal_ones_the_earliest_borders():
    assert balanced(3, 2, sums_of([1, 1, 1])) == [range(0, 1), range(1, 3)]


def test_fewer_modules_than_stages():
    with pytest.raises(ValueError, match="2 local modules cannot be spread over 3 stages: .* modules=3"):
        balanced(2, 3, sums_of([1, 1]))
