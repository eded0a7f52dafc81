"""What every picture here shares: a figure without a display, its file, its unit of bytes."""

import io
from pathlib import Path

from ..common.files import check_writable, write_whole

__all__ = ["check_picture", "new_figure", "save", "scale_of"]


def check_picture(path, name="path"):
    """Raises ValueError or OSError unless a picture can be written to that path: to be known before the work for it.

    Args:
        path: its suffix says which kind of picture it is to be.
        name: what the user gave it by.
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


def scale_of(size):
    return (1e9, "GB") if size >= 1e9 else (1e6, "MB")
