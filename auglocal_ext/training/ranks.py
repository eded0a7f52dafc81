"""A training by several ranks, data parallel: each has the whole model and trains on its own batches; their gradients
are averaged (`stepping`). What they must have alike, what is rank 0's, what is of all, and when they stop.

With one process each of these does nothing.
"""

import warnings

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from ..common.messages import plural
from ..distributed.agree import check_alike
from ..distributed.collectives import broadcast, gathered, highest, summed
from ..distributed.group import world
from .loaders import StoppedBetweenSteps, length_of, until
from .state import alike

__all__ = [
    "any_rank",
    "begin_alike",
    "check_loaders",
    "draw_apart",
    "in_step",
    "of_all_ranks",
    "spread_buffers",
    "tell_of_others",
    "totals",
]


def begin_alike(trainer):
    """Weights, aux nets and buffers become rank 0's. ValueError where models or settings differ."""
    if world().alone:
        return
    check_alike(alike(trainer), "make the same model and trainer on every rank")
    broadcast((*trainer.model.state_dict().values(), *trainer.aux_nets.state_dict().values()), "rank 0's weights")
    if trainer.ema_model is not None:
        broadcast(trainer.ema_model.state_dict().values(), "rank 0's weights")


def check_loaders(loader, first, arguments):
    """ValueError unless batches and arguments are alike on all ranks; warns where nothing gives each rank its own
    images. first: the first batch."""
    if world().alone:
        return
    images, labels = first
    arguments = {**arguments, "batches in an epoch": length_of(loader)}
    arguments |= {"batches of images of shape": tuple(images.shape), "labels of shape": tuple(labels.shape)}
    check_alike(arguments, "give every rank the same")
    if world().first and _gives_all(loader):
        warnings.warn(
            f"each of {world().size} ranks trains on every batch of its loader, which has no DistributedSampler: give "
            f"it one, DataLoader(..., sampler=torch.utils.data.DistributedSampler(dataset)), so that each has its part",
            stacklevel=4,
        )


def _gives_all(loader):
    """Whether a loader is known to give every rank the same images."""
    loader = getattr(loader, "loader", loader)
    if hasattr(loader, "part"):  # of auglocal_ext.data
        return loader.part[1] == 1
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    samplers = loader.sampler, getattr(loader.batch_sampler, "sampler", None)
    return not any(isinstance(one, DistributedSampler) for one in samplers)


def draw_apart(seed):
    """What is drawn from now on differs between ranks: dropout, MixUp. seed: as it was given, or None."""
    if seed is not None and not world().first:
        torch.manual_seed((torch.initial_seed() + world().rank) % 2**63)


# ---- during an epoch -------------------------------------------------------------------------------------------------


def in_step(stop, batches):
    """The batches, as `loaders.until` gives them. Of several ranks each gives as many as any: ValueError on all of
    them where one has no more and another has. Where `stop` is set on any of them, they all do the step that they have
    a batch for, and stop behind it."""
    return until(stop, batches) if world().alone else _together(stop, batches)


def _together(stop, batches):
    batches, end, count = iter(batches), object(), 0
    while True:
        try:
            batch = next(batches, end)
        except Exception:
            if stop.is_set():  # which the others have not agreed on: they hear of it as of a failure
                raise KeyboardInterrupt("a batch was not read to its end") from None
            raise
        over = batch is end
        *ended, stopped = highest([world().number if over else -1, not over, stop.is_set()], "the next batch")
        if ended[0] >= 0 and ended[1]:
            raise ValueError(
                f"the loader of rank {int(ended[0])} ended after {count} batches, another rank's has more: every rank "
                f"must have as many, as with a DistributedSampler"
            )
        if not over:
            held, count = [batch], count + 1
            del batch
            yield held.pop()  # no name here keeps a batch past its step
        if stopped:
            raise StoppedBetweenSteps
        if over:
            return


def any_rank(value):
    """Whether it is so on any rank."""
    return bool(highest([value], "what every rank does next")[0])


def totals(sums, peak):
    """Of all ranks' `epoch.Sums`: losses, counted, hits (modules,) and judged (), float64 on the CPU; seen; the most
    seconds; and the highest peak. Waits for the device."""
    parts = [sums.losses, sums.counted, sums.trainer.module_hits, sums.judged]
    ours = torch.cat([part.double().flatten() for part in parts]).cpu()
    found = summed(torch.cat([ours, ours.new_tensor([sums.seen])]), "what an epoch came to")
    losses, counted, hits, judged, seen = found.split([part.numel() for part in parts] + [1])
    seconds, peak = highest([sums.seconds, peak], "what an epoch took")
    return losses, counted, hits, judged[0], int(seen), seconds, int(peak)


# ---- between epochs --------------------------------------------------------------------------------------------------


def spread_buffers(trainer):
    """Running statistics, of which each rank has its own batches', become rank 0's: then all have the same model."""
    for model in (trainer.model, trainer.aux_nets, trainer.ema_model):
        if model is not None:
            broadcast(model.buffers(), "rank 0's running statistics")


def tell_of_others(folder, before, now, who, rates, more=""):
    """Warns, on rank 0, that a checkpoint of a number of ranks, or of `who`, is gone on from by another number; rates:
    whose learning rates it then has, in words."""
    if world().first:
        warnings.warn(
            f"{folder} has a training by {plural(before, who)}, which goes on with {now}: learning rates "
            f"are {rates}, and what is drawn at random differs{more}",
            stacklevel=2,
        )


def of_all_ranks(value):
    """Every rank's, tensors in it on the CPU, in the order of the ranks; plain values, lists and dicts of them."""
    return gathered(_on_cpu(value), "what a checkpoint has of every rank")


def _on_cpu(value):
    if isinstance(value, dict):
        return {name: _on_cpu(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(one) for one in value)
    return value.cpu() if isinstance(value, torch.Tensor) else value
