"""What every cut of a backbone costs, as plain numbers by unit."""

from dataclasses import dataclass, fields, is_dataclass, replace

__all__ = ["CutTable", "HeadWay", "UnitWay", "between", "check_table", "without_costs"]


@dataclass(frozen=True)
class UnitWay:
    """One way to run a unit: with its convolutions' outputs kept, or made again in the backward.

    A segment is a stretch of the step, (high, net): `high` is the highest of the live bytes within it relative to
    those at its start, `net` those at its end, which may be negative; high >= max(0, net).

    Attributes:
        again: whether its convolutions run again. Its own output is then kept.
        forward, backward: 12 segments, one a variant, index 3 * a + b.
            a: 0 the unit is its module's first, else the output of the unit before it is 1 derived, 2 kept, 3 kept of a
                unit that runs again, which keeps nothing else of that shape;
            b: its own output is 0 derived, 1 kept, or 2 it is its module's last.
        macs: (as a module's first unit, otherwise).
    """

    again: bool
    forward: list[tuple[int, int]]
    backward: list[tuple[int, int]]
    macs: tuple[int, int]


@dataclass(frozen=True)
class HeadWay:
    """One head of a module that ends with a unit; the pairs are behind one that runs plainly, and `again`.

    Attributes:
        segments: of its forward and backward.
        macs: of these.
        state: parameters, buffers and optimizer state that it adds, its loss and its count of right answers; 0 of the
            last unit's, which is the model's own classifier.
        scratch: what the optimizer needs for a moment in its step on it.
    """

    segments: tuple[tuple[int, int], tuple[int, int]]
    macs: tuple[int, int]
    state: int
    scratch: int


@dataclass(frozen=True)
class CutTable:
    """The numbers of one training step, by unit; lists of length L, indexed by unit. Bytes and macs are whole numbers;
    where time is to be short, macs are nanoseconds.

    Attributes:
        input_bytes: the unit's input, if a module begins there.
        units: the `UnitWay`s it may run in.
        heads: the `HeadWay`s of a module that ends with it; where there is none, no module ends.
        identity: True where the unit's output is rebuilt by way of its input, an identity shortcut.
        rebuild_length: elsewhere, how many elementwise passes a rebuild of the unit's output takes.
        longest_rebuild: an output whose rebuild would take more passes than this is kept.
        unit_scratch: what the optimizer needs for a moment in its step on the unit.
        constant: lives during the whole step.
    """

    input_bytes: list[int]
    units: list[list[UnitWay]]
    heads: list[list[HeadWay]]
    identity: list[bool]
    rebuild_length: list[int]
    longest_rebuild: int
    unit_scratch: list[int]
    constant: int


def without_costs(table):
    """The table with no arithmetic in it."""
    free = {"macs": (0, 0)}
    units, heads = ([[replace(way, **free) for way in ways] for ways in each] for each in (table.units, table.heads))
    return replace(table, units=units, heads=heads)


def between(one, other, part, whole):
    """The table of which each number is `part` / `whole` of the way from that of one table to that of another one."""

    def mix(a, b):
        if is_dataclass(a):
            return type(a)(**{f.name: mix(getattr(a, f.name), getattr(b, f.name)) for f in fields(a)})
        if isinstance(a, list | tuple):
            return type(a)(mix(x, y) for x, y in zip(a, b, strict=True))
        return a if isinstance(a, bool) else a + (b - a) * part // whole

    return mix(one, other)


_MOST_UNITS, _MOST_BYTES, _MOST_MACS = 1000, 2**40, 2**50  # what 64 bits are enough for in every sum


def check_table(table):
    """Raises ValueError where the table is malformed."""
    units = len(table.input_bytes)
    if not 1 <= units <= _MOST_UNITS:
        raise ValueError(f"a CutTable must have from 1 to {_MOST_UNITS} units, given {units}")
    for name, entries in vars(table).items():
        if name not in ("longest_rebuild", "constant") and len(entries) != units:
            raise ValueError(f"CutTable.{name} must have an entry for each of the {units} units, given {len(entries)}")
    if not all(table.units) or not table.heads[-1]:
        raise ValueError("CutTable.units and the last of CutTable.heads must have at least one way for each unit")
    for way in (way for ways in table.units for way in ways):
        for name in ("forward", "backward"):
            if len(getattr(way, name)) != 12:
                raise ValueError(f"UnitWay.{name} must have 12 variants")
            _check_segments(f"UnitWay.{name}", getattr(way, name))
        _check_numbers("UnitWay.macs", way.macs, _MOST_MACS)
    for way in (way for ways in table.heads for way in ways):
        _check_segments("HeadWay.segments", way.segments)
        _check_numbers("HeadWay.macs", way.macs, _MOST_MACS)
        _check_numbers("HeadWay.state", [way.state], _MOST_BYTES)
        _check_numbers("HeadWay.scratch", [way.scratch], _MOST_BYTES)
    for name in ("input_bytes", "unit_scratch", "rebuild_length"):
        _check_numbers(f"CutTable.{name}", getattr(table, name), _MOST_BYTES)
    for name in ("constant", "longest_rebuild"):
        _check_numbers(f"CutTable.{name}", [getattr(table, name)], _MOST_BYTES)
    if any(way.state for way in table.heads[-1]):
        raise ValueError("HeadWay.state must be 0 for the last unit: its head is the model's own classifier")


def _check_numbers(name, numbers, most):
    if not all(isinstance(number, int) and 0 <= number <= most for number in numbers):
        raise ValueError(f"{name} must be whole numbers from 0 to {most}")


def _check_segments(name, segments):
    for segment in segments:
        match segment:
            case (int(high), int(net)) if max(0, net) <= high <= _MOST_BYTES and net >= -_MOST_BYTES:
                pass
            case _:
                raise ValueError(
                    f"{name} must be pairs of whole numbers (high, net) with max(0, net) <= high, up to "
                    f"{_MOST_BYTES}; given {segment}"
                )
