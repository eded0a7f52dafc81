"""What has to be equal on all ranks is compared before anything is sent that depends on it."""

import hashlib
import json
import time

from .faults import RankFailed, answering, missed, named, stopped, store
from .group import session, timeout, world

__all__ = ["check_alike", "exchange"]

LONGEST = 60  # characters of a value that a message shows


def exchange(text: str, what: str) -> list[str]:
    """Every rank's text, in the order of the ranks. They go through the store: no group is needed, and of a rank that
    stops before it comes here one hears at once.

    what: what is waited for, as an error calls it.

    Raises:
        RankFailed: another rank stopped, or did not come within the process group's time.
    """
    if world().alone:
        return [text]
    ours, shared, place = session(), store(), world()
    ours.exchanged[place.ranks] += 1
    turn = f"round {ours.round}/exchange {ours.exchanged[place.ranks]} of {place.ranks}"
    keys = [f"{turn}/rank {rank}" for rank in place.ranks]
    with answering(what):
        shared.set(keys[place.rank], text)
        _wait_for(shared, keys, what)
        return [shared.get(key).decode() for key in keys]


def _wait_for(shared, keys, what):
    """Until every rank's key is in the store."""
    waited, deadline = 0.001, time.monotonic() + timeout().total_seconds()
    while not shared.check(keys):
        told = stopped()
        if told and not shared.check(keys):  # else it stopped by what all have exchanged
            raise RankFailed(told)
        if missed() and not shared.check(keys):
            raise RuntimeError("a rank is gone")  # `answering` finds out which
        if time.monotonic() > deadline:
            missing = [rank for rank, key in zip(world().ranks, keys, strict=True) if not shared.check([key])]
            raise RankFailed(f"{named(missing)} did not answer for {timeout().total_seconds():.0f} s in {what}")
        time.sleep(waited)
        waited = min(2 * waited, 0.1)


def check_alike(what: dict[str, object], remedy: str = "start every rank with the same arguments") -> None:
    """ValueError, on every rank, unless all of them give values that print alike; names the first item that differs and
    the first rank that has another one than the first.

    what: name -> value, the names as a message calls them.
    """
    place = world()
    if place.alone:
        return
    ours = json.dumps({name: _told(value) for name, value in what.items()})
    first, *others = map(json.loads, exchange(ours, "the comparison of settings"))
    for rank, theirs in zip(place.ranks[1:], others, strict=True):
        for name in (*first, *theirs):
            (mine, _), (shown, _) = pair = [told.get(name, ["none", ""]) for told in (first, theirs)]
            if pair[0] != pair[1]:
                raise ValueError(f"rank {rank} has {name} {shown}, rank {place.ranks[0]} has {mine}: {remedy}")


def _told(value):
    """How a value is shown, in one short line, and what tells it from others."""
    text = " ".join(repr(value).split())
    shown = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    return shown, hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
