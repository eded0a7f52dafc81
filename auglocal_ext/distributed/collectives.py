"""What the ranks of a training tell each other beside gradients: weights, sums, and what any of them wants."""

from collections.abc import Iterable

import torch
import torch.distributed as dist

from .agree import exchange
from .faults import answering
from .group import session, timeout, world

__all__ = ["TRAINING", "broadcast", "gathered", "gathered_on_first", "highest", "own_group", "summed"]

TRAINING = "training"  # the name of the group that a training's collectives go through, gradients included


def own_group(name: str, ranks: list[int] | None = None):
    """This package's own group of that name, of all ranks or of these, made where there is none: what is sent in it
    meets nothing that is sent in another one. Every rank must call this at the same point, also one that is not of the
    group. Tensors of the CPU go by gloo, of GPUs by NCCL where the process group has it.

    Do not keep what it returns: `close` ends a connection only when nobody holds it.
    """
    groups = session().groups
    if name not in groups:
        exchange("", f"the making of group {name!r}")  # in which, unlike in the making, a rank that stopped is heard of
        backend = "cpu:gloo,cuda:nccl" if "nccl" in str(dist.get_backend_config()) else "gloo"
        groups[name] = dist.new_group(ranks, timeout=timeout(), backend=backend)
    return groups[name]


@torch.no_grad()
def broadcast(tensors: Iterable[torch.Tensor], what: str) -> None:
    """Makes the tensors those of rank 0, in place."""
    if world().alone:
        return
    with answering(what):
        for tensor in tensors:
            sent = tensor.contiguous()  # of what lies densely in another order, a copy
            dist.broadcast(sent, src=0, group=own_group(TRAINING))
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
    """Every rank's value, anything that pickles, in the order of the ranks, on rank 0; None on the others."""
    if world().alone:
        return [value]
    values = [None] * world().size if world().first else None
    with answering(what):
        dist.gather_object(value, values, group=own_group(TRAINING))
    return values
