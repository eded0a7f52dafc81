"""Which local modules go where: contiguous groups of them, none of which costs much more than the others."""

from collections.abc import Callable, Sequence
from itertools import accumulate

from ..common.messages import plural

__all__ = ["balanced", "sums_of"]


def sums_of(costs: Sequence[float]) -> Callable[[range], float]:
    """What a group of neighbours costs, where that is the sum of what each does."""
    sums = [0.0, *accumulate(costs)]
    return lambda group: sums[group.stop] - sums[group.start]


def balanced(count: int, stages: int, cost: Callable[[range], float]) -> list[range]:
    """Cuts a row of local modules into groups of neighbours, such that the highest cost of a group is the least
    possible.

    Args:
        count: of the local modules.
        stages: how many groups, none of them empty.
        cost: of a group, at least 0, in any unit; a group costs no less than a part of it. See `sums_of`.

    Returns:
        A range of module numbers for each stage. Of equally good ones, that with the earliest borders.

    Raises:
        ValueError: there are fewer modules than stages.
    """
    if not 1 <= stages <= count:
        raise ValueError(
            f"{plural(count, 'local module')} cannot be spread over {stages} stages: each needs at least one; "
            f"cut the model into more, modules={stages} for instance, or start fewer processes"
        )
    # highest[end]: of the first `end` modules in the stages so far; begins: where the last of these stages began.
    highest, begins = [0.0] + [float("inf")] * count, []
    for stage in range(stages):
        reached, begin = [float("inf")] * (count + 1), [0] * (count + 1)
        for end in range(stage + 1, count + 1):
            for start in range(stage, end):
                most = max(highest[start], cost(range(start, end)))
                if most < reached[end]:
                    reached[end], begin[end] = most, start
        highest = reached
        begins.append(begin)
    groups: list[range] = []
    end = count
    for begin in reversed(begins):
        groups.insert(0, range(begin[end], end))
        end = begin[end]
    return groups
