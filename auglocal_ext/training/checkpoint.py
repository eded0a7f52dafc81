"""Checkpoints of a training: a folder with the last one and the best epoch's, each there whole or not at all."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ..common.checks import whole_number
from ..common.files import check_writable, write_whole
from ..common.messages import first_line
from .result import accuracy_of
from .state import set_random_state

__all__ = ["Checkpoints", "Resumed", "is_resumable"]


def is_resumable(loader):
    """Whether a loader can tell where it is within an epoch, and go on there."""
    return all(callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict"))


@dataclass
class Resumed:
    """Where a training goes on.

    history: of the whole epochs.
    sums: what `Sums` put away of the epoch under way, None at its beginning.
    batches: its remaining ones, for one time through.
    peak: see `PeakMeter`.
    length: batches of an epoch, None where it is not known.
    """

    history: list
    sums: dict | None
    batches: object
    peak: int
    length: int | None


class Checkpoints:
    """The files last.pt and best.pt of a folder; best: of the highest validation accuracy, of training where there is
    no validation.

    Args:
        folder: made where there is none; what is in it already is gone on from.
        loader: whose place is kept too, where it has a `state_dict`.
        device: of the model.
        minutes: after which one is due within an epoch, where the loader can go on there.

    Raises:
        ValueError: last.pt is not what was written here: it cannot be read.
        OSError: nothing can be written there.
    """

    def __init__(self, folder, loader, device, minutes):
        self.folder, self.loader, self.minutes = Path(folder), loader, minutes
        self.within_epochs = is_resumable(loader)
        check_writable(self.folder / "last.pt", "checkpoint")
        self.saved = self._read(device) if (self.folder / "last.pt").exists() else None
        self._written = time.monotonic()

    def _read(self, device):
        path = self.folder / "last.pt"
        try:
            saved = torch.load(path, map_location=device, weights_only=True)
            whole_number(saved["epoch"], "epoch must be a whole number", 0)
            return {name: saved[name] for name in ("trainer", "epoch", "history", "sums", "peak", "length", "loader")}
        except Exception as error:
            raise ValueError(
                f"{path} is no checkpoint of a training, or is damaged ({first_line(error)}): remove it to train from "
                f"the beginning, or choose another folder"
            ) from error

    def restore(self, trainer, epochs):
        """Puts everything where the checkpoint left it; returns the Resumed, or None where there is none."""
        if self.saved is None:
            return None
        saved, self.saved = self.saved, None
        if saved["epoch"] > epochs or (saved["epoch"] == epochs and saved["sums"]):
            within = " and is within the next" if saved["sums"] else ""
            raise ValueError(
                f"{self.folder} has a training of {saved['epoch']} epochs already{within}, given epochs={epochs}: give "
                f"more, or another folder"
            )
        if saved["sums"] and not self.within_epochs:
            raise ValueError(
                f"{self.folder} was left within epoch {saved['epoch'] + 1} by a loader with a state_dict, this one has "
                f"none: give the same kind of loader, or another folder"
            )
        if saved["loader"] is not None and self.within_epochs:
            self.loader.load_state_dict(saved["loader"])
        trainer.load_state_dict(saved["trainer"])
        batches = self.loader
        if saved["sums"]:
            # A loader's start may draw from the generators, which it had done before the state was put away.
            batches = () if saved["sums"]["over"] else iter(self.loader)
            set_random_state(saved["trainer"]["random"], trainer.device)
        return Resumed(saved["history"], saved["sums"], batches, saved["peak"], saved["length"])

    def due(self):
        return self.within_epochs and time.monotonic() - self._written >= 60 * self.minutes

    def save(self, trainer, history, sums, peak, length):
        """sums: None after an epoch; within one, what it has come to."""
        state = {
            "trainer": trainer.state_dict(),
            "epoch": len(history),
            "history": history,
            "sums": sums and sums.state_dict(),
            "peak": peak,
            "length": length,
            "loader": self.loader.state_dict() if self.within_epochs else None,
        }
        last = self.folder / "last.pt"
        write_whole(last, lambda file: torch.save(state, file))
        if sums is None and accuracy_of(history[-1]) >= max(map(accuracy_of, history)):
            with last.open("rb") as written:
                write_whole(self.folder / "best.pt", lambda file: shutil.copyfileobj(written, file))
        self._written = time.monotonic()
