"""Lines along the depth of several models, which are told apart without colours too."""

from .figure import check_picture, new_figure, save, short

__all__ = ["lines_by_unit", "lines_picture"]


_LINES = ("-", "--", "-.", ":")
_MARKS = ("o", "s", "^", "D", "v", "P", "X")
_NAMED = 80  # units, up to which their names fit below the axis


def lines_picture(panels, path, title, xlabel, ylabel, names=None):
    """Draws lines in panels beside each other, of one scale, each with marks and dashes of its own in its panel, whose
    legend is below its axes.

    Args:
        panels: [(title or None, [(label, [heights along the depth, None where there is none])])].
        path: the file to write.
        title: above the picture.
        xlabel, ylabel: of the axes.
        names: of the places along the depth; None: numbers from 0.
    """
    check_picture(path)
    longest = max(len(values) for _, lines in panels for _, values in lines)
    width = min(max(7.0, 0.22 * longest + 1.5), 16.0) if len(panels) == 1 else 6.0  # inches
    figure = new_figure(title, (width * len(panels), 5.4))
    parts = figure.subfigures(1, len(panels), squeeze=False)[0]
    labels = [label for _, lines in panels for label, _ in lines]
    most = max(len(lines) for _, lines in panels)
    fits = int(width / (0.6 + 0.08 * max(map(len, labels))))  # labels beside each other
    for part, (panel, lines) in zip(parts, panels, strict=True):
        axes = part.subplots()
        axes.set(xlabel=xlabel, ylabel=ylabel, title=panel)
        _draw(axes, lines)
        _name_places(axes, names, longest)
        for _ in range(most - len(lines)):  # legends of one height leave axes of one height
            axes.plot([], [], " ", label=" ")
        part.legend(loc="outside lower center", ncols=min(max(fits, 1), 3, most), fontsize=9)
    lowest, highest = zip(*(axes.get_ylim() for axes in figure.axes), strict=True)
    for axes in figure.axes:
        axes.set_ylim(min(lowest), max(highest))
    save(figure, path)


def lines_by_unit(panels, path, title, ylabel, scale=1):
    """`lines_picture` of [(title or None, [(run, [(unit, value)])])], values times a scale. Units have their names
    below where all runs have the same ones."""
    units = {tuple(unit for unit, _ in values) for _, runs in panels for _, values in runs}
    names = next(iter(units)) if len(units) == 1 else None
    drawn = [(panel, [(run, [scale * value for _, value in values]) for run, values in runs]) for panel, runs in panels]
    lines_picture(drawn, path, title, "unit", ylabel, names)


def _draw(axes, lines):
    for index, (label, values) in enumerate(lines):
        shade = str(0.6 * index / max(len(lines) - 1, 1))
        style = {"ls": _LINES[index % len(_LINES)], "marker": _MARKS[index % len(_MARKS)], "color": shade}
        axes.plot(range(len(values)), values, label=label, mfc="white", ms=5, lw=1.3, **style)
    axes.grid(alpha=0.3)


def _name_places(axes, names, longest):
    from matplotlib.ticker import MaxNLocator

    if names is not None and longest <= _NAMED:
        axes.set_xticks(range(longest), map(short, names), rotation=90, fontsize=min(9.0, 0.75 * 72 * 14 / longest))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
