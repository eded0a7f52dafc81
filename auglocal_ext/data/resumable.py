"""Where a loader is, and the seeds of what is drawn there: what lets it go on from any of its batches."""

import hashlib
from collections.abc import Iterator

import torch

from ..common.checks import check_seed, whole_number

__all__ = ["Resumable", "seed_at"]


class Resumable:
    """A loader whose batches follow from its seed, the epoch and their place in it, whatever was drawn before: it can
    be stopped at any batch, and go on from there in another process.

    Each whole pass goes on to the next epoch, and one that was broken off begins anew; `set_epoch` says which it is.

    Derive, and define `_batches`.

    Args:
        seed: a whole number; None: torch.initial_seed() where epoch 0 begins, by torch.manual_seed for instance.
        images: in an epoch.
        batch_size: images in a batch.
        drop_last: leave out a last batch that is smaller.
        own: how many of the images are this rank's, of which batches are made; None: all.
    """

    def __init__(
        self, seed: int | None, images: int, batch_size: int, drop_last: bool = False, own: int | None = None
    ) -> None:
        self._own_seed = None if seed is None else check_seed(seed)
        self._seed: int | None = None  # of the pass that is under way
        self._epoch = self._batch = 0
        self._resumes = False  # whether the next pass goes on, rather than begins
        self._made_of = {"images": images, "batch_size": batch_size}
        own = images if own is None else own
        self._length = own // batch_size if drop_last else -(-own // batch_size)

    def __len__(self) -> int:
        return self._length

    def _batches(self, seed: int, epoch: int, first: int) -> Iterator:
        """The batches of an epoch from `first` on."""
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        """The next pass is this epoch, from 0; one that a loaded state is in the middle of goes on.

        Raises:
            ValueError: epoch is no whole number of at least 0.
        """
        epoch = whole_number(epoch, "epoch must be a whole number of at least 0", 0)
        if not (self._resumes and epoch == self._epoch):
            self._epoch, self._batch, self._resumes = epoch, 0, False

    def state_dict(self) -> dict:
        """Where the loader is, as a dict: "seed" (None before the first batch), "epoch" (from 0), "batch" (how many the
        epoch has given so far), and "images" and "batch_size" that it was made with."""
        return {"seed": self._seed, "epoch": self._epoch, "batch": self._batch, **self._made_of}

    def load_state_dict(self, state: dict) -> None:
        """The next pass goes on with the batch behind those that were given when the state was saved.

        Args:
            state: from `state_dict`.

        Raises:
            ValueError: it is no such state, or of other data or another batch size. Nothing has changed then.
        """
        if not isinstance(state, dict) or not {"seed", "epoch", "batch", *self._made_of} <= state.keys():
            raise ValueError("this is no state of a loader: expected what its state_dict() returned")
        theirs = {name: state[name] for name in self._made_of}
        if theirs != self._made_of:
            raise ValueError(
                f"the state is of a loader of {theirs['images']} images in batches of {theirs['batch_size']}, this one "
                f"has {self._made_of['images']} in batches of {self._made_of['batch_size']}: give it the same data and "
                f"batch_size"
            )
        seed = None if state["seed"] is None else check_seed(state["seed"])
        epoch = whole_number(state["epoch"], "the state's epoch must be a whole number of at least 0", 0)
        expected = f"the state's batch must be from 0 to {self._length}"
        batch = whole_number(state["batch"], expected, 0, self._length)
        self._seed, self._epoch, self._batch, self._resumes = seed, epoch, batch, True

    def __iter__(self) -> Iterator:
        seed, epoch, batch = self._begin()

        def counted(given):
            nonlocal batch
            batch += 1
            self._epoch, self._batch = epoch, batch
            return given

        yield from map(counted, self._batches(seed, epoch, batch))  # no name here keeps a batch past its step
        self._epoch, self._batch = epoch + 1, 0

    def _begin(self):
        """(seed, epoch, first batch) of the pass that begins or goes on now."""
        if not self._resumes:
            whole = self._batch == self._length  # but nobody asked for more than there is
            self._epoch, self._batch = self._epoch + whole, 0
            if self._epoch == 0:
                self._seed = None
        if self._seed is None:
            self._seed = torch.initial_seed() if self._own_seed is None else self._own_seed
        self._resumes = False
        return self._seed, self._epoch, self._batch


def seed_at(*place: int) -> int:
    """A seed for what is drawn at a place, such as (seed, epoch, image): near places have nothing in common."""
    return int.from_bytes(hashlib.blake2b(repr(place).encode(), digest_size=8).digest(), "little")
