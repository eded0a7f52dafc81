"""Covering arrays: of a table of cases, a few in which any values of different parameters still meet."""

import itertools
from collections import Counter


def covering(table, together):
    """The numbers of the cases to run, in order, of a table of {parameter: number of its value}.

    Any `together` values of different parameters that meet in a case meet in one that is taken; with 2 this is pairwise
    testing. Taken is in turn the case that has most of what is missing, of equal ones that of values seldom taken, then
    the first: the same table gives the same cases.
    """
    size = min(together, *(len(case) for case in table)) if table else 0
    combinations = [set(itertools.combinations(case.items(), size)) for case in table]
    where, seen, taken = {}, Counter(), []
    for number, of_case in enumerate(combinations):
        for combination in of_case:
            where.setdefault(combination, []).append(number)
    missing = Counter({number: len(of_case) for number, of_case in enumerate(combinations)})
    while where:
        most = max(missing.values())
        best = (number for number, count in missing.items() if count == most)
        number = min(best, key=lambda n: sum(seen[item] for item in table[n].items()))
        taken.append(number)
        seen.update(table[number].items())
        for combination in combinations[number] & where.keys():
            for other in where.pop(combination):
                missing[other] -= 1
    return sorted(taken)
