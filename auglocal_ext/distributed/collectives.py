"""What the ranks of a training tell each other beside gradients: weights, sums, and what any of them wants.

Every rank of `world()` must call these at the same point. `what` is what is waited for, as the message of a RankFailed
calls it, which they raise where another rank stopped, or did not answer.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist

from .agree import exchange
from .faults import RankFailed, answering
from .group import everybody, session, timeout, world

__all__ = [
    "STATISTICS",
    "TRAINING",
    "broadcast",
    "gathered",
    "gathered_on_first",
    "highest",
    "make_groups",
    "own_group",
    "summed",
]

# Names of groups. What is sent in one meets nothing that is sent in another.
TRAINING = "training"  # a training's collectives, gradients included
STATISTICS = "statistics"  # of BatchNorms, which do not wait for gradients that are under way


def own_group(name: str):
    """This package's own group of that name, of the ranks of `world()`. Where that is all ranks it is made when it is
    first asked for, which they all must do at the same point; for some of them see `make_groups`.

    Do not keep what it returns: `close` ends a connection only when nobody holds it.
    """
    place, groups = world(), session().groups
    if (name, place.ranks) not in groups:
        if place != everybody():
            raise RankFailed(
                f"ranks {', '.join(map(str, place.ranks))} have no connection {name!r} any more, as when one has "
                f"failed: make a new trainer"
            )
        make_groups(name, [place.ranks])
    return groups[name, place.ranks]


def make_groups(name: str, parts: Iterable[range]) -> None:
    """Makes the groups of that name of some of the ranks, for `among`. All ranks of the process group must call this at
    the same point, with the same parts. Tensors of the CPU go by gloo, of GPUs by NCCL where the process group has it.
    """
    groups = session().groups
    backend = "cpu:gloo,cuda:nccl" if "nccl" in str(dist.get_backend_config()) else "gloo"
    exchange("", f"the making of groups {name!r}")  # in which, unlike in the making, a rank that stopped is heard of
    for part in parts:
        if (name, part) not in groups:
            groups[name, part] = dist.new_group(list(part), timeout=timeout(), backend=backend)


@torch.no_grad()
def broadcast(tensors: Iterable[torch.Tensor], what: str) -> None:
    """Makes the tensors those of the first rank, in place."""
    if world().alone:
        return
    with answering(what):
        for tensor in tensors:
            sent = tensor.contiguous()  # of what lies densely in another order, a copy
            as_bytes = sent.view(-1).view(torch.uint8)  # gloo does not know every dtype
            dist.broadcast(as_bytes, src=world().ranks[0], group=own_group(TRAINING))
            if sent is not tensor:
                tensor.copy_(sent)


def summed(tensor: torch.Tensor, what: str) -> torch.Tensor:
    """The sum of all ranks' tensors, of the same shape and dtype; the tensor is not changed."""
    if world().alone:
        return tensor
    total = tensor.clone()
    with answering(what):
        dist.all_reduce(total, group=own_group(TRAINING))
    return total


def highest(values: list, what: str) -> list:
    """Of each of so many numbers the highest that any rank has. Waits for no GPU."""
    if world().alone:
        return values
    found = torch.tensor(values, dtype=torch.float64)
    with answering(what):
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=own_group(TRAINING))
    return found.tolist()


def gathered(value, what: str) -> list:
    """Every rank's value, anything that pickles, in the order of the ranks."""
    if world().alone:
        return [value]
    values = [None] * world().size
    with answering(what):
        dist.all_gather_object(values, value, group=own_group(TRAINING))
    return values


def gathered_on_first(value, what: str) -> list | None:
    """Every rank's value, anything that pickles, in the order of the ranks, on the first; None on the others."""
    if world().alone:
        return [value]
    values = [None] * world().size if world().first else None
    with answering(what):
        dist.gather_object(value, values, dst=world().ranks[0], group=own_group(TRAINING))
    return values
