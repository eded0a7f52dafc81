"""What a simulation needs of the machines that are there: seconds of local modules while all ranks compute, and the
speed of the link between two of them."""

import statistics
import time
from dataclasses import replace

import torch
import torch.distributed as dist

from ..distributed.collectives import gathered, make_groups, own_group
from ..distributed.faults import answering
from ..distributed.group import among, on_its_own, world
from ..planning.roofline import measured_roofline
from .costs import measured_seconds, optimizer_seconds
from .pieces import Costs, Link, total
from .planned_costs import planned_costs

__all__ = ["calibrated", "measured_costs", "measured_link"]

STEPS = 6  # whose mean is taken: throughput is of the slow ones too
ROUNDS = 3
MESSAGE = 2**25  # bytes: takes much longer than an empty one


def calibrated(trainer, images, labels, units=None) -> tuple[Costs, Link]:
    """What `simulate.predicted` takes, measured on the ranks that are there, which all call this: the mean of their
    seconds while all compute at once, as they may share a processor's memory, power or cores; and the link of ranks 0
    and 1.

    Args:
        trainer: a LocalTrainer of the whole model on every rank, made `on_its_own`, its plan made. It stays as it is.
        images, labels: a batch.
        units: as the trainer was given them.
    """
    planned = _planned(trainer, units)
    gathered(None, "the others' measurement")  # all begin at once
    ranks = gathered(_measured(planned, trainer, images, labels), "seconds of modules")
    seconds = [total(costs.modules, "seconds") for costs in ranks]
    return ranks[0].scaled(statistics.fmean(seconds) / seconds[0]), measured_link()


def measured_costs(trainer, images, labels, units=None) -> Costs:
    """Costs of a LocalTrainer's modules, their seconds measured in this process alone; for arguments see `calibrated`.
    How they are shared out to forward and backward, and those of units under backpropagation, are by `Roofline`."""
    return _measured(_planned(trainer, units), trainer, images, labels)


@on_its_own()
def _planned(trainer, units):
    return planned_costs(trainer.plan, trainer.model, measured_roofline(trainer.device, trainer.precision), units)


@on_its_own()
def _measured(planned, trainer, images, labels):
    """Planned Costs with the seconds that are measured."""
    took = measured_seconds(trainer, images, labels, STEPS, statistics.fmean)
    modules = []
    for piece, seconds, module in zip(planned.modules, took, trainer.local_modules, strict=True):
        step = optimizer_seconds(trainer.plan.origin.optimizer, module, trainer.device)
        modules.append(replace(piece.scaled(seconds / (piece.forward + piece.backward)), step=step))
    factor = sum(took) / (total(planned.modules, "forward") + total(planned.modules, "backward"))
    return replace(planned, modules=tuple(modules), units=planned.scaled(factor).units)


def measured_link(size: int = MESSAGE, rounds: int = ROUNDS, device: str | torch.device = "cpu") -> Link:
    """The Link between ranks 0 and 1, by messages that go there and back. Every rank must call it; alone it is one that
    takes no time.

    Args:
        size: bytes of a large message.
        device: of the messages.
    """
    place = world()
    if place.alone:
        return Link(float("inf"), 0.0)
    pair = range(2)
    make_groups("link", [pair])
    took = None
    if place.rank < 2:
        small, large = (torch.zeros(count, dtype=torch.uint8, device=device) for count in (1, size))
        with among(pair):
            took = [_there_and_back(message, place.rank, rounds) / 2 for message in (small, large)]
    latency, whole = gathered(took, "the seconds of a message")[0]
    # Where both take as long, by a machine that is busy otherwise, it is latency only in part.
    return Link(size / max(whole - latency, whole / 2), latency)


def _there_and_back(message, rank, rounds):
    def run():
        with answering("a message that measures the link"):
            for sends in (rank == 0, rank == 1):
                if sends:
                    dist.send(message, 1 - rank, group=own_group("link"))
                else:
                    dist.recv(message, 1 - rank, group=own_group("link"))
            if message.device.type == "cuda":
                torch.cuda.synchronize(message.device)

    run()
    took = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        took.append(time.perf_counter() - began)
    return statistics.median(took)
