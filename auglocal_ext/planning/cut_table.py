"""What every cut of a backbone costs, as plain numbers by unit, and what a local module's peak is by them."""

from dataclasses import dataclass

__all__ = ["CutTable", "between", "check_table", "module_options"]


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
        head_state: parameters, buffers and optimizer state that this head adds, its loss and its count of right
            answers; 0 for the last unit, whose head is the model's own classifier.
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


def between(one, other, part, whole):
    """The table of which each number is `part` / `whole` of the way from that of one table to that of another one."""

    def mix(a, b):
        if isinstance(a, list | tuple):
            return type(a)(mix(x, y) for x, y in zip(a, b, strict=True))
        return a if isinstance(a, bool) else a + (b - a) * part // whole

    return CutTable(**{name: mix(value, getattr(other, name)) for name, value in vars(one).items()})


_MOST_UNITS, _MOST_BYTES, _MOST_MACS = 1000, 2**40, 2**50  # what 64 bits are enough for in every sum


def check_table(table):
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
