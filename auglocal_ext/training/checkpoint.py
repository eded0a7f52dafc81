"""Checkpoints of a training: a folder with the last epoch's and the best one's, each there whole or not at all."""

from pathlib import Path

import torch

from ..common.checks import whole_number
from ..common.files import check_writable, write_whole
from ..common.messages import first_line

__all__ = ["Checkpoints"]


class Checkpoints:
    """The files last.pt and best.pt of a folder; best: of the highest validation accuracy, of training where there is
    no validation.

    Args:
        folder: made where there is none; what is in it already is gone on from.
        loader: whose state is kept too, where it has a `state_dict`.
        device: of the model.

    Raises:
        ValueError: last.pt is not what was written here: it cannot be read.
        OSError: nothing can be written there.
    """

    def __init__(self, folder, loader, device):
        self.folder, self.loader = Path(folder), loader
        check_writable(self.folder / "last.pt", "checkpoint")
        self.saved = self._read(device) if (self.folder / "last.pt").exists() else None

    def _read(self, device):
        path = self.folder / "last.pt"
        try:
            saved = torch.load(path, map_location=device, weights_only=True)
            whole_number(saved["epoch"], "epoch must be a whole number", 1)
            return {name: saved[name] for name in ("trainer", "epoch", "history", "peak", "loader")}
        except Exception as error:
            raise ValueError(
                f"{path} is no checkpoint of a training, or is damaged ({first_line(error)}): remove it to train from "
                f"the beginning, or choose another folder"
            ) from error

    def restore(self, trainer, meter, epochs):
        """Puts everything where the last epoch left it; the history until then, empty where there is none."""
        if self.saved is None:
            return []
        saved, self.saved = self.saved, None
        if saved["epoch"] > epochs:
            raise ValueError(
                f"{self.folder} has a training of {saved['epoch']} epochs already, given epochs={epochs}: give more, "
                f"or another folder"
            )
        trainer.load_state_dict(saved["trainer"])
        meter.peak = saved["peak"]
        if saved["loader"] is not None and hasattr(self.loader, "load_state_dict"):
            self.loader.load_state_dict(saved["loader"])
        return saved["history"]

    def save(self, trainer, history, peak):
        """After an epoch."""
        state = {
            "trainer": trainer.state_dict(),
            "epoch": len(history),
            "history": history,
            "peak": peak,
            "loader": self.loader.state_dict() if hasattr(self.loader, "state_dict") else None,
        }
        write_whole(self.folder / "last.pt", lambda file: torch.save(state, file))
        if _accuracy(history[-1]) >= max(map(_accuracy, history)):
            write_whole(self.folder / "best.pt", lambda file: torch.save(state, file))


def _accuracy(entry):
    return entry["train_accuracy"] if entry["val_accuracy"] is None else entry["val_accuracy"]
