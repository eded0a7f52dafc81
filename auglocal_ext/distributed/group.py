"""The running process group: this process's place in it, and what this package keeps while it is there."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

__all__ = [
    "World",
    "among",
    "close",
    "everybody",
    "joined",
    "launched",
    "local_rank",
    "on_its_own",
    "session",
    "timeout",
    "world",
]


@dataclass(frozen=True)
class World:
    """Ranks that work together. rank: of this process among them, from 0; ranks: their numbers in the process group."""

    rank: int = 0
    ranks: range = range(1)

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def number(self) -> int:
        """This process's number in the process group."""
        return self.ranks[self.rank]

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which prints and writes."""
        return self.rank == 0


@dataclass
class Session:
    """What is kept of a process group while it is there.

    Attributes:
        default: torch's default process group.
        round: how many times the ranks' work has ended by a failure.
        exchanged: ranks -> how many times they have exchanged texts in this round, see `agree.exchange`.
        groups: (name, ranks) -> a group of this package's own.
    """

    default: object
    round: int = 0
    exchanged: Counter = field(default_factory=Counter)
    groups: dict = field(default_factory=dict)


_session: Session | None = None
_among: range | None = None


def world() -> World:
    """This process's place among the ranks that it works with: all of them, or those that `among` says; alone where
    torch.distributed is not initialised."""
    whole = everybody()
    return whole if _among is None or whole.alone else World(_among.index(whole.rank), _among)


def everybody() -> World:
    """This process's place in the process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return World()
    return World(dist.get_rank(), range(dist.get_world_size()))


@contextlib.contextmanager
def among(ranks: range) -> Iterator[None]:
    """Within, the world is these of the process group's ranks, of which this process is one. Their groups have to be
    there, see `collectives.make_groups`."""
    global _among
    before, _among = _among, ranks
    try:
        yield
    finally:
        _among = before


@contextlib.contextmanager
def on_its_own() -> Iterator[None]:
    """Within, this process is alone: what works on one rank's part of a model asks no other rank. Also a decorator."""
    rank = everybody().rank
    with among(range(rank, rank + 1)):
        yield


def session() -> Session:
    """The Session of the process group that is there."""
    global _session
    if _session is None or _session.default is not dist.group.WORLD:
        _session = Session(dist.group.WORLD)
    return _session


def timeout() -> timedelta:
    """How long a rank waits for another, as the process group was told when it was initialised."""
    default = distributed_c10d._get_default_group()
    return default._get_backend(default._device_types[0]).options._timeout


def close() -> None:
    """Ends the package's own groups, so that ranks that wait in one hear at once that this one has left."""
    groups = session().groups
    while groups:
        _, group = groups.popitem()
        with contextlib.suppress(Exception):  # one whose connections are broken already
            dist.destroy_process_group(group)


def launched() -> bool:
    """Whether torchrun has started this process, or what sets the same variables."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def local_rank() -> int:
    """This process's number on its machine, from 0, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


@contextlib.contextmanager
def joined(seconds: float = 600) -> Iterator[World]:
    """Within, this process is one of those that torchrun has started; alone, with nothing done, where it has not.

    Args:
        seconds: how long a rank waits for another. A rank that ends is noticed at once; this is for one that hangs, so
            that it has to be longer than what only one rank does, as writing a checkpoint.
    """
    if not launched() or dist.is_initialized():
        yield world()
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    dist.init_process_group(backend, timeout=timedelta(seconds=seconds))
    try:
        yield world()
    finally:
        close()
        dist.destroy_process_group()
