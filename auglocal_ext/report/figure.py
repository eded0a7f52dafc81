"""What every picture here shares: a figure without a display, its file, its unit of bytes."""

import io
import itertools
from pathlib import Path

import numpy

from ..common.files import check_writable, write_whole

__all__ = ["check_picture", "label_where_free", "new_figure", "save", "scale_of", "short"]

LONGEST = 30  # characters of a unit's name


def check_picture(path, name="path"):
    """Looks whether a picture can be written to a path: to be known before the work for it.

    Args:
        path: its suffix says which kind of picture it is to be.
        name: what the user gave it by, for the message.

    Raises:
        ValueError: matplotlib knows no such suffix.
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if Path(path).suffix[1:].lower() not in FigureCanvasAgg.filetypes:
        raise ValueError(
            f"{name} must end in .png, .pdf, .svg or another suffix that matplotlib knows, given {str(path)!r}"
        )
    check_writable(path, name, make_folder=False)


def save(figure, path):
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format=Path(path).suffix[1:].lower())
    write_whole(path, lambda file: file.write(picture.getvalue()))


def new_figure(title, size):
    """A figure of its own, without pyplot's state and without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    return figure


def short(name):
    """The end of a unit's name, which tells neighbours apart."""
    return name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"


def scale_of(size):
    return (1e9, "GB") if size >= 1e9 else (1e6, "MB")


def label_where_free(axes, labels, places, lines=(), symbols=(), radius=5, **style):
    """Writes labels beside points, those that come first, but none over another one; to be called when all else is
    drawn.

    Args:
        labels: [(text, (x, y))] in the units of the axes.
        places: where a label may be, what comes first if it is free: [(offset in points, ha, va)].
        lines: [[(x, y)]], what no label may cover.
        symbols: [(x, y)], larger than a line's points; radius: of them, in points.
        style: of `Axes.annotate`.
    """
    axes.figure.draw_without_rendering()  # which lays the axes out
    drawn = numpy.concatenate([*(_along(axes.transData.transform(line)) for line in lines), numpy.empty((0, 2))])
    symbols, boxes = [axes.transData.transform(symbol) for symbol in symbols], []
    for text, point in labels:
        for offset, ha, va in places:
            label = axes.annotate(text, point, offset, textcoords="offset points", ha=ha, va=va, **style)
            box = label.get_window_extent().padded(1)
            near, around = box.padded(-1), box.padded(radius * axes.figure.dpi / 72)
            covers = ((drawn > near.min) & (drawn < near.max)).all(axis=1).any()
            if not (covers or any(around.contains(*s) for s in symbols) or any(box.overlaps(other) for other in boxes)):
                boxes.append(box)
                break
            label.remove()


def _along(line):
    """Points along a line through points, a few pixels apart."""
    pieces = [line[-1:]]
    for begin, end in itertools.pairwise(line):
        share = numpy.linspace(0, 1, max(2, int(numpy.hypot(*(end - begin)) / 3)))[:, None]
        pieces.append(begin + share * (end - begin))
    return numpy.concatenate(pieces)
