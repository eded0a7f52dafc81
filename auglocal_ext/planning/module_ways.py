"""The ways to run every local module that a backbone can be cut into, by its `CutTable`: exact.

A module of units i..j runs its units' forwards, its head, and its units' backwards in reverse. Each is a segment of
memory, and each unit may run in one of several ways. Modules are made longer unit by unit from their first one; of the
beginnings that can be gone on from alike only those are kept than which no other is as good in everything that what
comes behind can tell: arithmetic, and how high and how full memory gets before it and after it.

Written twice: here, to be read and to serve where nothing was compiled, and in csrc/planner, to be fast. Both return
the same, ties included.
"""

from bisect import bisect_right

__all__ = ["module_ways", "undominated"]


def module_ways(table):
    """ways[i][j - i]: those to run the module of units i..j with its head than which none is as good, each as (macs,
    bytes of state that the head adds, highest live bytes without what is constant, which of the heads, a "1" for every
    unit whose convolutions run again and a "0" for every other one)."""
    ways = []
    for i in range(len(table.input_bytes)):
        row, scratch = [], 0
        # (a of `UnitWay`, passes of a rebuild of the output so far; 0 from a kept one) -> beginnings:
        # (macs, highest and net of the forwards, those of the forwards and the backwards together, again)
        beginnings = {(0, 0): [(0, 0, 0, 0, 0, "")]}
        for j in range(i, len(table.input_bytes)):
            scratch = max(scratch, table.unit_scratch[j])
            row.append(undominated(_ended(table, i, j, beginnings, scratch)))
            beginnings = _longer(table, i, j, beginnings)
        ways.append(row)
    return ways


def _ended(table, i, j, beginnings, scratch):
    """Modules of units i..j."""
    for (before, _), labels in beginnings.items():
        for way in table.units[j]:
            forward, backward = way.forward[3 * before + 2], way.backward[3 * before + 2]
            for index, head in enumerate(table.heads[j]):
                more = way.macs[j > i] + head.macs[way.again]
                middle, middle_net = _chain(forward, head.segments[way.again], backward)
                most = max(scratch, head.scratch)
                for macs, high, net, both, both_net, again in labels:
                    peak = max(high, net + middle, both + middle_net, both_net + middle_net + most)
                    yield macs + more, head.state, table.input_bytes[i] + peak, index, again + "01"[way.again]


def _longer(table, i, j, beginnings):
    """Beginnings of modules from unit i that are longer by unit j."""
    longer = {}
    for (before, walked), labels in beginnings.items():
        for way in table.units[j]:
            length = 1 + walked if table.identity[j] else table.rebuild_length[j]
            kept = way.again or length > table.longest_rebuild
            variant, more = 3 * before + kept, way.macs[j > i]
            (higher, fuller), (higher_back, fuller_back) = way.forward[variant], way.backward[variant]
            made = longer.setdefault((3, 0) if way.again else (2, 0) if kept else (1, length), [])
            for macs, high, net, both, both_net, again in labels:
                # Its backward comes before those so far: what is left by it lifts theirs.
                lifted = max(net + fuller + higher_back, both + fuller + fuller_back)
                after = both_net + fuller + fuller_back
                high_now = max(high, net + higher)
                made.append((macs + more, high_now, net + fuller, lifted, after, again + "01"[way.again]))
    return {state: _undominated_beginnings(labels) for state, labels in longer.items()}


def _undominated_beginnings(labels):
    """Those than which no other is as good in all five numbers."""
    kept = []
    for label in sorted(labels):
        _, high, net, both, both_net, _ = label
        if not any(o[1] <= high and o[2] <= net and o[3] <= both and o[4] <= both_net for o in kept):
            kept.append(label)
    return kept


def undominated(labels):
    """The labels than which no other is as good in macs, state and peak, their first three, by macs; of equal ones the
    first. In one sweep over a falling staircase of (state, peak)."""
    kept, states, peaks = [], [], []
    for label in sorted(set(labels)):
        state, peak = label[1:3]
        at = end = bisect_right(states, state)
        if at == 0 or peaks[at - 1] > peak:
            at -= at > 0 and states[at - 1] == state
            while end < len(states) and peaks[end] >= peak:
                end += 1
            states[at:end], peaks[at:end] = [state], [peak]
            kept.append(label)
    return kept


def _chain(*segments):
    """The segment of several, one after another."""
    high = net = 0
    for higher, more in segments:
        high, net = max(high, net + higher), net + more
    return high, net
