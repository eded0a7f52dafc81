"""The learning curve of a training."""

from .figure import check_picture, new_figure, save

__all__ = ["learning_curve"]


def learning_curve(history, path, title):
    """Draws a training's accuracy, with its best epoch, and every local module's loss over the epochs.

    Args:
        history: `TrainResult.history`, not empty; the loss of validation is drawn where entries have "val_loss".
        path: the file to write.
        title: above the picture.

    Raises:
        ValueError, OSError: see `check_picture`.
    """
    from matplotlib.ticker import MaxNLocator

    check_picture(path)
    figure = new_figure(title, (11, 4.6))
    accuracy, loss = figure.subplots(1, 2)
    _draw_accuracy(accuracy, history)
    _draw_losses(figure, loss, history)
    for axes in (accuracy, loss):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    if len(history) == 1:
        accuracy.set_xlim(0, 2), loss.set_xlim(0, 2)
    save(figure, path)


def _draw_accuracy(axes, history):
    _line(axes, history, "train_accuracy", "training", color="0.45", ls="--", marker="o", ms=4, scale=100)
    _line(axes, history, "val_accuracy", "validation", color="black", marker="s", ms=4, scale=100)
    key = "train_accuracy" if history[-1]["val_accuracy"] is None else "val_accuracy"
    scored = [entry for entry in history if entry[key] is not None]
    best = max(scored, key=lambda entry: entry[key])  # of equal ones the first, as best.pt
    label = f"best: {best[key]:.2%} in epoch {best['epoch']}"
    axes.plot(best["epoch"], 100 * best[key], "*", ms=15, mfc="white", mec="black", label=label, zorder=3)
    axes.set_ylabel("accuracy, %")
    _legend(axes)


def _draw_losses(figure, axes, history):
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap

    last = len(history[-1]["module_losses"]) - 1
    # Light for the first module to dark for the last one with an aux net: an order in grey too.
    colours = [colormaps["viridis"](0.9 - 0.75 * index / max(last - 1, 1)) for index in range(last)]
    for index, colour in enumerate(colours):
        _line(axes, history, index, None, color=colour, lw=1.2, marker="o", ms=2.5)
    name = f"training, classifier (module {last})" if last else "training"
    _line(axes, history, last, name, color="black", lw=2, marker="o", ms=4)
    _line(axes, history, "val_loss", "validation", color="black", ls="--", marker="s", ms=4)
    axes.set_ylabel("cross-entropy" if last == 0 else "loss")
    _legend(axes)
    if last > 0:
        shown = ScalarMappable(cmap=ListedColormap(colours))
        shown.set_clim(-0.5, last - 0.5)
        ticks = sorted({round(index * (last - 1) / 5) for index in range(6)})
        figure.colorbar(shown, ax=axes, ticks=ticks, label="training, aux net of local module")


def _legend(axes):
    """Below the axes, where it covers nothing."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, fontsize=9, frameon=False)


def _line(axes, history, key, label, scale=1, **style):
    """A line of what entries have under a key, or of the loss of the module of that index; none where none has it."""
    points = [
        (entry["epoch"], entry["module_losses"][key] if isinstance(key, int) else entry.get(key)) for entry in history
    ]
    points = [(epoch, scale * value) for epoch, value in points if value is not None]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, markevery=max(1, len(points) // 20), **style)
