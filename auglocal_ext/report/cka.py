"""How alike the units of two models are, drawn: all pairs of units as a heat map, the same units as lines."""

import numpy

from .figure import check_picture, new_figure, save, short
from .lines import lines_by_unit

__all__ = ["cka_maps_picture", "cka_picture", "similarity_picture"]


COUNTED = 20  # units, up to which each cell has its number


def cka_picture(matrix, rows, columns, path, title, row_label="unit", column_label="unit"):
    """Draws a matrix of CKA as a heat map, the first units at the lower left.

    Args:
        matrix: (rows, columns), from 0 to 1; a little below 0, as the unbiased estimate is, looks like 0.
        rows, columns: the units' names.
        path: the file to write.
        title: above the picture.
        row_label, column_label: what the units are of.

    Raises:
        ValueError, OSError: see `check_picture`.
    """
    check_picture(path)
    values = numpy.asarray(matrix)
    high, wide = values.shape
    cell = min(max(0.45, 3.5 / max(high, wide)), 10 / max(high, wide))  # inches
    figure = new_figure(title, (max(cell * wide + 3.6, 7.0), cell * high + 2.6))
    axes = figure.subplots()
    image = _heat_map(axes, values)
    figure.colorbar(image, ax=axes, shrink=0.7, label="linear CKA")
    size = min(9.0, 0.75 * 72 * cell)  # points of a cell's height
    axes.set_xticks(range(wide), map(short, columns), rotation=90, fontsize=size)
    axes.set_yticks(range(high), map(short, rows), fontsize=size)
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


def cka_maps_picture(maps, units, path, title, row_label="unit", column_label="unit"):
    """Draws several models' CKA with one other model as small heat maps of one scale, without numbers.

    Args:
        maps: [(label, matrix (units, units))], at least one.
        units: the names of the units of all of them.
        path: the file to write.
        title: above the picture.
        row_label, column_label: what the units are of.

    Raises:
        ValueError, OSError: see `check_picture`.
    """
    check_picture(path)
    wide = min(len(maps), 3)
    high = -(-len(maps) // wide)
    figure = new_figure(title, (max(3.1 * wide + 1.6, 7.0), 3.2 * high + 1.2))
    grid = figure.subplots(high, wide, squeeze=False)
    every = -(-len(units) // 16)
    shown = range(0, len(units), every)
    for axes, (label, matrix) in zip(grid.flat, maps, strict=False):
        image = _heat_map(axes, numpy.asarray(matrix))
        axes.set_title(label, fontsize=9)
        axes.set_xticks(shown, [short(units[index]) for index in shown], rotation=90, fontsize=7)
        axes.set_yticks(shown, [short(units[index]) for index in shown], fontsize=7)
    for axes in grid.flat[len(maps) :]:
        axes.set_axis_off()
    for axes in grid[:, 0]:
        axes.set_ylabel(row_label, fontsize=9)
    for column in range(wide):  # below the last map of each column
        grid.flat[max(range(column, len(maps), wide))].set_xlabel(column_label, fontsize=9)
    figure.colorbar(image, ax=grid, shrink=0.7, label="linear CKA")
    save(figure, path)


def similarity_picture(panels, path, title, reference):
    """Draws the CKA of each unit with the same unit of one other model, a line for each run.

    Args:
        panels: [(title or None, [(run, [(unit, CKA)])])], drawn beside each other. Units have their names below where
            all runs have the same ones, else numbers from 0.
        path: the file to write.
        title: above the picture.
        reference: what the other model is.

    Raises:
        ValueError, OSError: see `check_picture`.
    """
    lines_by_unit(panels, path, title, f"linear CKA with {reference}")


def _heat_map(axes, values):
    """Light to dark in grey too, and for every kind of colour blindness."""
    return axes.imshow(values, cmap="cividis", vmin=0, vmax=1, origin="lower")
