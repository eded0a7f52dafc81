"""A command under torchrun: each process is a rank of one training, and the first one prints and writes."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

from ..distributed.agree import exchange
from ..distributed.faults import telling
from ..distributed.group import World, joined, launched, local_rank, world
from .runs import new_folder

__all__ = ["device_of_rank", "first_of_machine", "folder_of_run", "joined_ranks"]


@contextlib.contextmanager
def joined_ranks() -> Iterator[World]:
    """Within, this process is one of the ranks that torchrun has started, and what it raises is told to the others;
    without torchrun it is alone. Warnings are rank 0's."""
    with joined() as place, telling(), warnings.catch_warnings():
        if not place.first:
            warnings.simplefilter("ignore")
        yield place


def device_of_rank(name):
    """ "cuda" under torchrun as this rank's GPU; other names as they are."""
    return f"cuda:{local_rank()}" if name == "cuda" and launched() else name


@contextlib.contextmanager
def first_of_machine():
    """Within, the first rank of each machine goes ahead and the others wait for it: one fetches what all read."""
    ahead = local_rank() == 0
    if not ahead:
        exchange("", "what the first rank fetches")
    yield
    if ahead and not world().alone:
        exchange("", "what the first rank fetches")


@contextlib.contextmanager
def folder_of_run(options):
    """`runs.new_folder`, made by rank 0 and told to the others."""
    if not world().first:
        yield Path(exchange("", "the run's folder")[0])
        return
    with new_folder(options) as folder:
        if not world().alone:
            exchange(str(folder), "the run's folder")
        yield folder
