"""A rank that fails says why, and those that wait for it stop with its reason instead of waiting on."""

import contextlib
import time
from collections.abc import Iterator

import torch.distributed as dist
from torch.distributed import distributed_c10d

from ..common.messages import first_line
from .group import close, everybody, session, timeout, world

__all__ = ["RankFailed", "answering", "missed", "named", "stopped", "store", "telling"]

GRACE = 2.0  # seconds in which every rank that is still there has noticed that one is not


class RankFailed(RuntimeError):
    """Another rank stopped, or did not answer; the message names it and says why. Raised on every other rank."""


def store():
    """The key-value store that the ranks share, this package's part of it."""
    return dist.PrefixStore("auglocal_ext", distributed_c10d._get_default_store())


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """Within, an exception is told to the other ranks, whatever it is, before it goes on its way; the package's own
    groups are closed then, which ends the wait of others in them. Of nested ones the inner one does it. Also a
    decorator."""
    if world().alone:
        yield
        return
    try:
        yield
    except BaseException as error:
        if not getattr(error, "told_ranks", False):
            error.told_ranks = True  # type: ignore[attr-defined]
            if not isinstance(error, RankFailed):
                _tell(error)
            ours = session()
            ours.round += 1
            ours.exchanged.clear()
            close()
        raise


def _tell(error):
    kind, message = type(error).__name__, first_line(error)
    with contextlib.suppress(RuntimeError):  # the store is gone with the rank that had it
        store().set(_key("stopped"), kind if message == kind else f"{kind}: {message}")


def _key(what, rank=None):
    """Of what a rank, None: this one, says in this round."""
    return f"round {session().round}/{what}/rank {everybody().rank if rank is None else rank}"


@contextlib.contextmanager
def answering(what: str) -> Iterator[None]:
    """Around a wait for other ranks. What fails there for their sake is raised as RankFailed.

    what: what is waited for, "the gradients of local module 3" for instance.
    """
    began = time.monotonic()
    try:
        yield
    except RankFailed:
        raise
    except RuntimeError as error:
        if world().alone:
            raise
        raise RankFailed(_why(what, began)) from error


def _others():
    whole = everybody()
    return [rank for rank in whole.ranks if rank != whole.rank]


def stopped() -> str | None:
    """What the first of the other ranks that stopped has said, or None."""
    for rank in _others():
        if store().check([_key("stopped", rank)]):
            return f"rank {rank} stopped: {store().get(_key('stopped', rank)).decode()}"
    return None


def missed() -> bool:
    """Whether another rank has noticed that one is gone without a word."""
    return any(store().check([_key("noticed", rank)]) for rank in _others())


def _why(what, began):
    """What is known of the ranks that did not answer. Each rank that notices it says so: those that neither do that nor
    say why they stopped are the ones that are gone, and the last to do it is the one that was late. A rank that waits
    for others than this one notices later: where one of those that this one works with is gone, it is that."""
    seconds = time.monotonic() - began
    missing = late = _others()
    hangs = seconds >= 0.9 * timeout().total_seconds()
    try:
        store().set(_key("noticed"), "hangs" if hangs else "")
        deadline = time.monotonic() + GRACE
        while missing and time.monotonic() < deadline:
            if told := stopped():
                return told
            late, missing = missing, [rank for rank in missing if not store().check([_key("noticed", rank)])]
            time.sleep(0.02)
        if told := stopped():
            return told
        for rank in set(_others()) - set(missing):  # which may wait for longer than this one
            hangs |= store().get(_key("noticed", rank)) == b"hangs"
    except RuntimeError:
        return f"the rank that holds the store of all ranks ended in {what}, and did not say why"
    missing = [rank for rank in missing if rank in world().ranks] or missing
    if hangs:
        waited = max(seconds, timeout().total_seconds())
        return f"{named(missing or late)} did not answer for {waited:.0f} s in {what}"
    if not missing:
        return f"the ranks lost their connection in {what}"
    return f"{named(missing)} ended in {what}, and did not say why, as a process that was killed"


def named(ranks):
    """ "rank 1", "ranks 1, 3"."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
