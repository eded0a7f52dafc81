"""The history of a training for other programs: as CSV, and as events for TensorBoard."""

import csv
import io

__all__ = ["as_csv", "event_writer"]

_SCALARS = {
    "loss/train": "loss",
    "loss/validation": "val_loss",
    "accuracy/train": "train_accuracy",
    "accuracy/validation": "val_accuracy",
    "accuracy/validation top-5": "val_top5_accuracy",
    "loss/validation of the averaged model": "ema_val_loss",
    "accuracy/validation of the averaged model": "ema_val_accuracy",
    "learning rate": "lr",
    "images per second": "images_per_second",
    "peak bytes": "peak_bytes",
}


def as_csv(history):
    """A line per epoch; what each local module has, in a column of its own, as module_losses.0."""
    lines, rows = io.StringIO(), []
    for entry in history:
        row = {}
        for name, value in entry.items():
            several = isinstance(value, list)
            row |= {f"{name}.{index}": one for index, one in enumerate(value)} if several else {name: value}
        rows.append(row)
    writer = csv.DictWriter(lines, list(rows[-1]), restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return lines.getvalue()


def event_writer():
    """torch's SummaryWriter for folders, or an ImportError that says what to install.

    Returns:
        (folder, entry) -> None, which adds the entry of one epoch to the events in the folder.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            f"--tensorboard needs the package tensorboard, which does not import here ({error}): install it with pip "
            f"install tensorboard, or leave --tensorboard out"
        ) from None

    writers = {}  # one a folder, as each makes a file of its own

    def write(folder, entry):
        if folder not in writers:
            writers[folder] = SummaryWriter(str(folder))
        writer = writers[folder]
        for tag, name in _SCALARS.items():
            if entry.get(name) is not None:
                writer.add_scalar(tag, entry[name], entry["epoch"])
        for tag, name in (("module loss", "module_losses"), ("module accuracy", "module_accuracies")):
            for index, value in enumerate(entry[name]):
                if value is not None:
                    writer.add_scalar(f"{tag}/{index}", value, entry["epoch"])
        writer.flush()

    return write
