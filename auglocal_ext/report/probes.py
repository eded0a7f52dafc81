"""How well classes are told along the depth of several models, drawn: by linear probes, by local modules' own heads."""

from .lines import lines_by_unit, lines_picture

__all__ = ["local_accuracy_picture", "probe_picture"]


def probe_picture(panels, path, title):
    """Draws the accuracy of linear probes by unit, a line for each run.

    Args:
        panels: [(title or None, [(run, [(unit, accuracy from 0 to 1)])])], drawn beside each other. Units have their
            names below where all runs have the same ones, else numbers from 0.
        path: the file to write.
        title: above the picture.

    Raises:
        ValueError, OSError: see `check_picture`.
    """
    lines_by_unit(panels, path, title, "test accuracy of a linear probe, %", scale=100)


def local_accuracy_picture(runs, path, title):
    """Draws the accuracy of local modules' own heads by module, a line for each run.

    Args:
        runs: [(run, [accuracies from 0 to 1, None of a module that has none])].
        path: the file to write.
        title: above the picture.

    Raises:
        ValueError, OSError: see `check_picture`.
    """
    label = "local module; a run's last one has the classifier"
    lines = [(run, [None if value is None else 100 * value for value in values]) for run, values in runs]
    lines_picture([(None, lines)], path, title, label, "training accuracy of its head, last epoch, %")
