"""How alike the units of two models are, drawn."""

import numpy

from .figure import check_picture, new_figure, save

__all__ = ["cka_picture"]


COUNTED = 20  # units, up to which each cell has its number
LONGEST = 30  # characters of a name


def cka_picture(matrix, rows, columns, path, title, row_label="unit", column_label="unit"):
    """Draws a matrix of CKA as a heat map, the first units at the lower left.

    Args:
        matrix: (rows, columns), from 0 to 1; a little below 0, as the unbiased estimate is, looks like 0.
        rows, columns: the units' names.
        path: the file to write.
        title: above the picture.
        row_label, column_label: what the units are of.
    """
    check_picture(path)
    values = numpy.asarray(matrix)
    high, wide = values.shape
    cell = min(max(0.45, 3.5 / max(high, wide)), 10 / max(high, wide))  # inches
    figure = new_figure(title, (max(cell * wide + 3.6, 7.0), cell * high + 2.6))
    axes = figure.subplots()
    # Light to dark in grey too, and for every kind of colour blindness.
    image = axes.imshow(values, cmap="cividis", vmin=0, vmax=1, origin="lower")
    figure.colorbar(image, ax=axes, shrink=0.7, label="linear CKA")
    size = min(9.0, 0.75 * 72 * cell)  # points of a cell's height
    axes.set_xticks(range(wide), map(_short, columns), rotation=90, fontsize=size)
    axes.set_yticks(range(high), map(_short, rows), fontsize=size)
    axes.set(xlabel=column_label, ylabel=row_label)
    if max(high, wide) <= COUNTED:
        # As wide as the cell at most: a digit is six tenths of its height.
        fits = min(9.0, 0.8 * 72 * cell / (0.6 * len("-0.00")))
        for row in range(high):
            for column in range(wide):
                value = values[row, column]
                shade = "black" if value > 0.5 else "white"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=shade, fontsize=fits)
    save(figure, path)


def _short(name):
    """Its end, which tells neighbours apart."""
    return name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"
