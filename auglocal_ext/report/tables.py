"""What a plan says, as text: its tables."""

import textwrap

from ..common.memory import format_bytes

__all__ = ["WIDTH", "brief_table", "cost_lines", "plan_table", "stages_table", "wrapped"]


WIDTH = 100  # columns, of all but the whole table


def cost_lines(rows, warning=None):
    """Lines about what steps cost.

    Args:
        rows: [(what, `planning.comparison.Cost`)], a line each.
        warning: a sentence that stands below them; None: none.

    Returns:
        list of str.
    """
    timed = any(cost.milliseconds is not None for _, cost in rows)
    cells = [(what, format_bytes(cost.bytes), _macs(cost), *([_time(cost)] if timed else ())) for what, cost in rows]
    return [*_aligned(cells, left=1), *(wrapped(f"warning: {warning}") if warning else ())]


def _macs(cost):
    return "" if cost.macs is None else f"MACs {cost.macs:.3f} x BP"


def _time(cost):
    return "" if cost.milliseconds is None else f"{cost.milliseconds:.1f} ms predicted"


def wrapped(sentence):
    """The lines of a sentence, of at most WIDTH columns; a list of str."""
    return textwrap.wrap(sentence, WIDTH)


def plan_table(plan):
    """Lines about every local module of a plan, with its header and totals; a list of str. plan: a `Plan`."""
    aux = "aux net: unit (width, stride)" if plan.rule == "auglocal" else "aux net"
    header = ("module", "units", "output", aux, "parameters", "aux parameters")
    header += ("kept", "activations", "step's peak", "MACs / BP")
    rows = [
        (
            *_place(module),
            module.aux_net + ", unused" * (not module.trains) or "none: the classifier",
            f"{module.parameters:,}",
            f"{module.aux_parameters:,}",
            format_bytes(module.kept_bytes),
            format_bytes(module.activation_bytes),
            format_bytes(module.peak_bytes),
            f"{module.macs / plan.bp_macs:.3f}",
        )
        for module in plan.modules
    ]
    total = ("total", "", "", "", f"{plan.parameters:,}", f"{plan.aux_parameters:,}", "")
    total += (format_bytes(plan.activation_bytes), format_bytes(plan.peak_bytes), f"{plan.macs / plan.bp_macs:.3f}")
    return _ruled([header, *rows, total], left=4)


def brief_table(plan):
    """`plan_table` without its widest columns, so that it mostly fits into WIDTH columns; plan: a `Plan`."""

    def rest(part):
        aux = f" (+{part.aux_parameters:,})" if part.aux_parameters else ""
        return f"{part.parameters:,}{aux}", format_bytes(part.peak_bytes), f"{part.macs / plan.bp_macs:.3f}"

    header = ("module", "units", "output", "parameters (+aux)", "peak", "MACs / BP")
    rows = [(*_place(module), *rest(module)) for module in plan.modules]
    return _ruled([header, *rows, ("total", "", "", *rest(plan))], left=3)


def stages_table(rows):
    """Lines about trainings by several ranks.

    Args:
        rows: [(ranks, what they do, `stages.simulate.Prediction`)], a line each; instead of the last None where they
            cannot.

    Returns:
        list of str, the header first.
    """
    cells = [("ranks", "training", "images/s", "idle", "highest rank's memory")]
    for ranks, what, way in rows:
        told = ("-", "-", "fewer units or images")
        if way is not None:
            told = _rate(way.images_per_second), f"{way.bubble:.1%}", format_bytes(max(way.memory))
        cells.append((str(ranks), what, *told))
    lines = _aligned(cells, left=2)
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _rate(images):
    return f"{images:,.0f}" if images >= 1000 else f"{images:.4g}"


def _place(module):
    first, last = module.units[0], module.units[-1]
    units = first if len(module.units) == 1 else f"{first} .. {last}"
    return str(module.index), units, "x".join(str(size) for size in module.output_shape[1:])


def _ruled(rows, left):
    """The lines with rules below the first row and above the last."""
    lines = _aligned(rows, left)
    rule = "-" * max(map(len, lines))
    return [lines[0], rule, *lines[1:-1], rule, lines[-1]]


def _aligned(rows, left):
    """A line a row, of cells in columns: the first `left` of them flush left, the rest flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
