"""How well classes are told along the depth of several models, drawn: by linear probes, by local modules' own heads."""

from .figure import check_picture, new_figure, save

__all__ = ["local_accuracy_picture", "probe_picture"]


_LINES = ("-", "--", "-.", ":")
_MARKS = ("o", "s", "^", "D", "v", "P", "X")
_NAMED = 80  # units, up to which their names fit below the axis
_LONGEST = 30  # characters of a name


def probe_picture(runs, path, title):
    """Draws the accuracy of linear probes by unit, a line for each run.

    Args:
        runs: [(run, [(unit, accuracy from 0 to 1)])]. Units have their names below where all runs have the same ones,
            else numbers from 0.
        path: the file to write.
        title: above the picture.
    """
    units = {tuple(unit for unit, _ in values) for _, values in runs}
    names = next(iter(units)) if len(units) == 1 else None
    lines = [(run, [accuracy for _, accuracy in values]) for run, values in runs]
    _picture(lines, path, title, "unit", "test accuracy of a linear probe, %", names)


def local_accuracy_picture(runs, path, title):
    """Draws the accuracy of local modules' own heads by module, a line for each run.

    Args:
        runs: [(run, [accuracies from 0 to 1, None of a module that has none])].
        path: the file to write.
        title: above the picture.
    """
    label = "local module; a run's last one has the classifier"
    _picture(runs, path, title, label, "training accuracy of its head, last epoch, %")


def _picture(lines, path, title, xlabel, ylabel, names=None):
    from matplotlib.ticker import MaxNLocator

    check_picture(path)
    longest = max(len(values) for _, values in lines)
    width = min(max(7.0, 0.22 * longest + 1.5), 16.0)  # inches
    figure = new_figure(title, (width, 5.4))
    axes = figure.subplots()
    for index, (label, values) in enumerate(lines):
        shade = str(0.6 * index / max(len(lines) - 1, 1))
        style = {"ls": _LINES[index % len(_LINES)], "marker": _MARKS[index % len(_MARKS)], "color": shade}
        heights = [None if value is None else 100 * value for value in values]
        axes.plot(range(len(values)), heights, label=label, mfc="white", ms=5, lw=1.3, **style)
    if names is not None and longest <= _NAMED:
        short = [name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}" for name in names]
        axes.set_xticks(range(longest), short, rotation=90, fontsize=min(9.0, 0.75 * 72 * 14 / longest))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    fits = int(width / (0.6 + 0.08 * max(len(label) for label, _ in lines)))  # labels beside each other
    figure.legend(loc="outside lower center", ncols=min(max(fits, 1), 3, len(lines)), fontsize=9)
    save(figure, path)
