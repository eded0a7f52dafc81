"""Which classes are taken for which, drawn."""

import numpy

from .figure import check_picture, new_figure, save

__all__ = ["confusion_picture"]


COUNTED = 20  # classes, up to which each cell says how many images it has
NAMED = 120  # classes, up to which their names fit beside the cells
LONGEST = 18  # characters of a name


def confusion_picture(confusion, classes, path, title):
    """Draws a matrix of confusion, each row's shades in shares of its own images.

    Args:
        confusion: (classes, classes) whole numbers, images by true class (rows) and predicted class (columns).
        classes: their names.
        path: the file to write.
        title: above the picture.

    Raises:
        ValueError, OSError: see `check_picture`.
    """
    check_picture(path)
    counts = numpy.asarray(confusion)
    count = len(classes)
    shares = counts / numpy.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(max(4.0, 0.45 * count), 10.0)  # inches
    figure = new_figure(title, (side + 2.6, side + 1.4))
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Greys", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.7, label="share of the true class's images")
    size = min(9.0, 0.75 * 72 * side / count)  # points of a cell's height
    if count <= NAMED:
        names = [name if len(name) <= LONGEST else name[: LONGEST - 1] + "…" for name in map(str, classes)]
        axes.set_xticks(range(count), names, rotation=90, fontsize=size)
        axes.set_yticks(range(count), names, fontsize=size)
    axes.set(xlabel="predicted class", ylabel="true class")
    if count <= COUNTED:
        for row in range(count):
            for column in range(count):
                shade = "white" if shares[row, column] > 0.5 else "black"
                number = str(counts[row, column])
                # As wide as the cell at most: a digit is six tenths of its height.
                fits = min(9.0, 0.75 * 72 * side / count / (0.6 * len(number)))
                axes.text(column, row, number, ha="center", va="center", color=shade, fontsize=fits)
    save(figure, path)
