"""Which local modules go where: contiguous groups of them, none of which costs much more than the others."""

from collections.abc import Sequence

__all__ = ["balanced"]


def balanced(costs: Sequence[float], stages: int) -> list[range]:
    """Cuts a row of local modules into groups of neighbours, such that the highest sum of costs is the least possible.

    Args:
        costs: one for each local module, at least 0, in any unit.
        stages: how many groups, none of them empty.

    Returns:
        A range of module numbers for each stage. Of equally good ones, that with the earliest borders.

    Raises:
        ValueError: there are fewer modules than stages.
    """
    count = len(costs)
    if not 1 <= stages <= count:
        raise ValueError(
            f"{count} local module{'s' * (count != 1)} cannot be spread over {stages} stages: each needs at least one; "
            f"cut the model into more, modules={stages} for instance, or start fewer processes"
        )
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # highest[end]: of the first `end` modules in the stages so far; begins: where the last of these stages began.
    highest, begins = [0.0] + [float("inf")] * count, []
    for stage in range(stages):
        reached, begin = [float("inf")] * (count + 1), [0] * (count + 1)
        for end in range(stage + 1, count + 1):
            for start in range(stage, end):
                cost = max(highest[start], sums[end] - sums[start])
                if cost < reached[end]:
                    reached[end], begin[end] = cost, start
        highest = reached
        begins.append(begin)
    groups: list[range] = []
    end = count
    for begin in reversed(begins):
        groups.insert(0, range(begin[end], end))
        end = begin[end]
    return groups
