"""Checkpoints of a training: a folder with the last one and the best epoch's, each there whole or not at all."""

import io
import time
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch

from ..common.checks import whole_number
from ..common.files import check_writable, write_whole
from ..common.messages import first_line, plural
from ..distributed.agree import check_alike
from ..distributed.group import world
from .epoch import Sums
from .loaders import is_resumable, length_of, set_epoch
from .ranks import of_all_ranks, tell_of_others
from .result import accuracy_of
from .state import check_state, random_state, set_random_state
from .stepping import first_learning_rates, set_first_learning_rates

__all__ = ["Checkpoints", "Resumed"]


@dataclass
class Resumed:
    """Where a training goes on.

    history: of the whole epochs.
    sums: what `Sums` put away of the epoch under way, None at its beginning.
    batches: its remaining ones, for one time through; None: all, from those of the first epoch that are there already.
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
    no validation. Of several ranks the first one writes them, and every rank reads them: beside what all have alike
    they have each rank's random numbers, its loader's place and, within an epoch, what it has come to. Another number
    of ranks goes on from the beginning of an epoch.

    Args:
        folder: made where there is none; what is in it already is gone on from.
        loader: whose place is kept too, where it has a `state_dict`.
        minutes: after which one is due within an epoch, where the loader can go on there.

    Raises:
        ValueError: last.pt is not what was written here: it cannot be read.
        OSError: nothing can be written there.
    """

    def __init__(self, folder, loader, minutes):
        self.folder, self.loader, self.minutes = Path(folder), loader, minutes
        self.within_epochs = is_resumable(loader)
        if world().first:
            check_writable(self.folder / "last.pt", "checkpoint")
        self.saved = self._read() if (self.folder / "last.pt").exists() else None
        self._written, self._ended, self._checked = time.monotonic(), {}, False

    def _read(self):
        path = self.folder / "last.pt"
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            whole_number(saved["epoch"], "epoch must be a whole number", 0)
            names = "trainer", "epoch", "history", "sums", "peak", "length", "loader"
            found = {"rates": saved.get("rates")} | {name: saved[name] for name in names}
            others = saved.get("others", [])
            if 0 < world().rank <= len(others):
                _put_own(found, others[world().rank - 1])
            return found | {"ranks": 1 + len(others), "sums of all": [saved["sums"], *(own[2] for own in others)]}
        except Exception as error:
            raise ValueError(
                f"{path} is no checkpoint of a training, or is damaged ({first_line(error)}): remove it to train from "
                f"the beginning, or choose another folder"
            ) from error

    def restore(self, trainer, epochs, rates):
        """Puts everything where the checkpoint left it; returns the Resumed, or None where there is none. rates: see
        `Run`."""
        place = (
            None if self.saved is None else (self.saved["epoch"], self.saved["sums"] and self.saved["sums"]["steps"])
        )
        check_alike({"a checkpoint (epoch, step)": place}, f"let every rank read the same {self.folder}")
        if self.saved is None:
            return None
        saved, self.saved = self.saved, None
        moves = saved["ranks"] != world().size
        if moves:
            rates.check_moved(saved["ranks"])
        if saved["epoch"] > epochs or (saved["epoch"] == epochs and saved["sums"]):
            within = " and is within the next" if saved["sums"] else ""
            raise ValueError(
                f"{self.folder} has a training of {plural(saved['epoch'], 'epoch')} already{within}, given "
                f"epochs={epochs}: give more, or another folder"
            )
        if saved["sums"] and not self.within_epochs:
            raise ValueError(
                f"{self.folder} was left within epoch {saved['epoch'] + 1} by a loader with a state_dict, this one has "
                f"none: give the same kind of loader, or another folder"
            )
        if moves:
            self._move(saved, trainer, rates)
        check_state(trainer, saved["trainer"])
        rates.check(saved["rates"])
        changing = (*rates.sets, "lr") if moves else rates.sets
        _check_settings(trainer, saved["trainer"]["optimizers"], self.folder, changing)
        if saved["loader"] is not None and self.within_epochs:
            self.loader.load_state_dict(saved["loader"])
        set_epoch(self.loader, saved["epoch"])
        given = first_learning_rates(trainer.optimizers)
        trainer.load_state_dict(saved["trainer"])
        rates.load(saved["rates"])
        if moves and saved["rates"] is None:  # schedulers have their own
            set_first_learning_rates(trainer.optimizers, given)
        # The first epoch's were begun when all ranks drew alike.
        batches = None if moves and not saved["epoch"] else self.loader
        if saved["sums"]:
            # A loader's start may draw from the generators, which it had done before the state was put away.
            batches = () if saved["sums"]["over"] else iter(self.loader)
            set_random_state(saved["trainer"]["random"], trainer.device)
        return Resumed(saved["history"], saved["sums"], batches, saved["peak"], saved["length"])

    def _move(self, saved, trainer, rates):
        """Makes what another number of ranks has saved a state of these, at the beginning of an epoch or, where all its
        batches are trained on, before its validation. Ranks that were not there draw their random numbers as in a
        training's beginning."""
        sums, again = saved["sums"], ""
        if sums and sums["over"]:
            sums = Sums.shared_out(saved["sums of all"], world().rank, world().size)
        elif sums:
            sums, again = None, f"; epoch {saved['epoch'] + 1}, which was under way, begins again"
        tell_of_others(self.folder, saved["ranks"], world().size, "rank", rates.moved, again)
        state = saved["trainer"]
        state["stepper"] |= {"count": 0, "spoilt": [], "gradients": [[] for _ in trainer.local_modules]}
        if world().rank >= saved["ranks"]:
            state["random"] = random_state(trainer.device)
        saved |= {"sums": sums, "loader": None, "length": length_of(self.loader), "peak": 0}

    def at_the_end(self, trainer):
        """To be called when an epoch's batches are all trained on: a checkpoint during the validation behind it goes on
        from here, whatever the validation draws or its loader is."""
        self._ended = {"random": random_state(trainer.device), "loader": self._place()}

    def _place(self):
        return self.loader.state_dict() if self.within_epochs else None

    def due(self):
        return self.within_epochs and time.monotonic() - self._written >= 60 * self.minutes

    def save(self, trainer, rates, history, sums, peak, length):
        """sums: None after an epoch; within one, what it has come to."""
        state = {
            "trainer": trainer.state_dict(),
            "rates": rates.state,
            "epoch": len(history),
            "history": history,
            "sums": sums and sums.state_dict(),
            "peak": peak,
            "length": length,
            "loader": self._place(),
        }
        if sums and sums.over:
            state["trainer"]["random"], state["loader"] = self._ended["random"], self._ended["loader"]
        if not world().alone:
            _, *state["others"] = of_all_ranks(_own(state))
        self._written = time.monotonic()
        if not world().first:
            return
        written = self._as_bytes(_plain(state))
        accuracies = [accuracy_of(entry) for entry in history]
        # Before last.pt: a kill between them costs nothing, as the epoch is done again.
        if sums is None and accuracies[-1] > max(accuracies[:-1], default=-1):
            write_whole(self.folder / "best.pt", lambda file: file.write(written))
        write_whole(self.folder / "last.pt", lambda file: file.write(written))

    def _as_bytes(self, state):
        """The checkpoint; the first one of a process is read back, so that none is written that cannot be."""
        file = io.BytesIO()
        torch.save(state, file)
        if not self._checked:
            try:
                file.seek(0)
                torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:
                raise ValueError(
                    f"no checkpoint can be written: the optimizer's, the loader's or a layer's state has more than "
                    f"tensors, numbers and text in it, which torch.load(weights_only=True) does not read "
                    f"({first_line(error)}); give train() no checkpoint, or keep plain values there"
                ) from error
            self._checked = True
        return file.getbuffer()


def _own(saved):
    """What a rank has for itself of what it would save, in lists, so that it can be put into another's."""
    trainer = saved["trainer"]
    return [trainer["random"], trainer["stepper"]["gradients"], saved["sums"], saved["loader"]]


def _put_own(saved, own):
    trainer = saved["trainer"]
    trainer["random"], trainer["stepper"]["gradients"], saved["sums"], saved["loader"] = own


def _plain(value):
    """Numbers of NumPy's as Python's, in whatever they are."""
    if isinstance(value, dict):
        return type(value)({key: _plain(one) for key, one in value.items()})
    if type(value) in (list, tuple):
        return type(value)(_plain(one) for one in value)
    return value.item() if isinstance(value, numpy.generic) else value


def _check_settings(trainer, optimizers, folder, changing):
    """ValueError where an optimizer was given with other settings than the checkpoint's, which would have no effect;
    changing: names of those that change in a training."""
    for optimizer, saved in zip(trainer.optimizers, optimizers, strict=True):
        for ours, theirs in zip(optimizer.param_groups, saved["param_groups"], strict=True):
            ours = ours | {"lr": ours.get("initial_lr", ours["lr"])}
            theirs = theirs | {"lr": theirs.get("initial_lr", theirs["lr"])}
            for name in ours.keys() & theirs.keys() - {"params", "initial_lr", *changing}:
                if ours[name] != theirs[name]:
                    raise ValueError(
                        f"{folder} has a training by an optimizer with {name} {theirs[name]}, given one with "
                        f"{ours[name]}: give the same optimizer=, or another folder"
                    )
