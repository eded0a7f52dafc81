"""What trainings came to: accuracy against what they cost, drawn."""

from .figure import check_picture, label_where_free, new_figure, save, scale_of

__all__ = ["accuracy_picture"]


_PLACES = (
    ((12, 0), "left", "center"),
    ((-12, 0), "right", "center"),
    ((0, 12), "center", "bottom"),
    ((0, -12), "center", "top"),
    ((10, 10), "left", "bottom"),
    ((10, -10), "left", "top"),
    ((-10, 10), "right", "bottom"),
    ((-10, -10), "right", "top"),
    ((0, 22), "center", "bottom"),
    ((0, -22), "center", "top"),
)
_MARKS = ("s", "o", "^", "D", "v", "P", "X", "<", "p", ">")  # of groups, in their order
_LARGEST = 300  # points squared


def accuracy_picture(path, title, runs, baseline=None):
    """Draws test accuracy against arithmetic, the memory of a step as the size of the mark, and writes it as an image.

    Args:
        path: the file to write.
        title: above the picture.
        runs: [(group, label, multiply-accumulates / BP, bytes, [accuracies of its seeds, 0 to 1])]; a group has a mark
            of its own, several seeds a bar from the lowest to the highest.
        baseline: a group whose mean accuracies are drawn across; None: none.

    Raises:
        ValueError, OSError: see `check_picture`.
    """
    check_picture(path)
    figure = new_figure(title, (9, 6))
    axes = figure.subplots()
    groups = list(dict.fromkeys(group for group, *_ in runs))
    most = max(size for *_, size, _ in runs)
    labels, marks, lines = [], [], []
    for group, label, macs, size, accuracies in runs:
        index, values = groups.index(group), [100 * value for value in accuracies]
        height = sum(values) / len(values)
        shade = str(0.75 * index / max(len(groups) - 1, 1))
        style = {"marker": _MARKS[index % len(_MARKS)], "color": shade, "ec": "k", "lw": 0.8, "zorder": 3}
        axes.scatter([macs], [height], _LARGEST * size / most, **style)
        if len(values) > 1:
            axes.plot([macs, macs], [min(values), max(values)], "-", color="k", lw=1, zorder=2)
            lines.append([(macs, min(values)), (macs, max(values))])
        if group == baseline:
            axes.axhline(height, color="0.6", ls="--", lw=1, zorder=1)
        labels.append((label, (macs, height)))
        marks.append((macs, height))
    scale, unit = scale_of(most)
    for index, group in enumerate(groups):
        shade = str(0.75 * index / max(len(groups) - 1, 1))
        axes.scatter([], [], 60, marker=_MARKS[index % len(_MARKS)], color=shade, ec="k", lw=0.8, label=group)
    axes.set(xlabel="multiply-accumulates / BP", ylabel="test accuracy, %")
    axes.margins(0.25, 0.12)  # room for the labels
    axes.grid(alpha=0.3)
    about = f"area: memory of a step, largest {most / scale:.3g} {unit}"
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, title=about)
    label_where_free(axes, labels, _PLACES, lines, marks, _LARGEST**0.5 / 2, fontsize=8)
    save(figure, path)
