"""Events for TensorBoard, of every epoch's entry in the history."""

__all__ = ["event_writer"]

_SCALARS = {
    "loss/train": "loss",
    "loss/validation": "val_loss",
    "accuracy/train": "train_accuracy",
    "accuracy/validation": "val_accuracy",
    "accuracy/validation top-5": "val_top5_accuracy",
    "learning rate": "lr",
    "images per second": "images_per_second",
    "peak bytes": "peak_bytes",
}


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

    def write(folder, entry):
        with SummaryWriter(str(folder)) as writer:
            for tag, name in _SCALARS.items():
                if entry[name] is not None:
                    writer.add_scalar(tag, entry[name], entry["epoch"])
            for index, loss in enumerate(entry["module_losses"]):
                writer.add_scalar(f"module loss/{index}", loss, entry["epoch"])

    return write
