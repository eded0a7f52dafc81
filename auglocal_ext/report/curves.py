"""The learning curve of a training."""

from .figure import check_picture, new_figure, save

__all__ = ["learning_curve"]


def learning_curve(history, path, title):
    """Draws a training's accuracy and every local module's loss over the epochs to a PNG.

    Args:
        history: `TrainResult.history`.
        path: the file to write.
        title: above the picture.
    """
    from matplotlib.ticker import MaxNLocator

    check_picture(path)
    epochs = [entry["epoch"] for entry in history]
    figure = new_figure(title, (10, 4.2))
    accuracy, loss = figure.subplots(1, 2)

    accuracy.plot(epochs, [100 * entry["train_accuracy"] for entry in history], "k--o", ms=3, label="train")
    if history[-1]["val_accuracy"] is not None:
        accuracy.plot(epochs, [100 * entry["val_accuracy"] for entry in history], "k-s", ms=4, label="test")
    accuracy.set(xlabel="epoch", ylabel="accuracy, %")
    accuracy.legend()

    modules = len(history[-1]["module_losses"])
    for index in range(modules):
        values = [entry["module_losses"][index] for entry in history]
        if index == modules - 1:
            loss.plot(epochs, values, "k-", lw=2.5, label="classifier (last module)")
        else:
            # First modules light, last ones dark: readable without colour.
            shade = str(0.8 - 0.6 * index / max(modules - 2, 1))
            label = {0: "aux net of the first module", modules - 2: "aux net of the last but one"}.get(index)
            loss.plot(epochs, values, color=shade, lw=1.2, label=label)
    loss.set(xlabel="epoch", ylabel="training loss (cross-entropy)")
    loss.legend()
    for axes in (accuracy, loss):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    save(figure, path)
