"""Trains one model by several ranks, each of which has some of its local modules."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..common.checks import whole_number
from ..distributed.agree import check_alike
from ..distributed.collectives import broadcast, gathered, gathered_on_first, own_group
from ..distributed.faults import telling
from ..distributed.group import on_its_own, world
from ..engine.tensors import dense
from ..rules.auxiliary import nets_of
from ..training.batch import checked
from ..training.loaders import move
from ..training.state import alike
from ..training.trainer import LocalTrainer
from .balance import balanced
from .checkpoint import load, save
from .costs import COSTS, costs_of
from .link import Batch, Receiver, Sender
from .stage import Stage

__all__ = ["SCHEDULES", "StageTrainer", "StagesEpoch"]

SCHEDULES = ("decoupled", "synchronous")


@dataclass(frozen=True)
class StagesEpoch:
    """What an epoch came to, the same on every rank.

    Attributes:
        loss: the classifier's, the mean over the images. train_accuracy: of the training batches, as they were seen.
        module_losses, module_accuracies: of each local module's own head.
        images_per_second: of the last rank, from its first batch to its last.
        seconds: from the first rank's first batch to the last rank's end.
    """

    loss: float
    train_accuracy: float
    module_losses: list[float]
    module_accuracies: list[float]
    images_per_second: float
    seconds: float


class StageTrainer:
    """Layer parallel local learning: rank after rank has some neighbouring local modules of the model, with their
    auxiliary nets and optimizers, and nothing of the others. Features go from rank to rank, nothing comes back, so a
    rank is never idle while it has a batch. Every rank makes one, of the same model, and calls the same methods::

        trainer = StageTrainer(model, images, modules=8, auxiliary="light")
        for epoch in range(10):
            entry = trainer.epoch(loader)  # of rank 0; the others' loaders are not read
        trainer.gather()  # the model is whole again on rank 0

    The result is that of one process, to the bit on a CPU, whatever the schedule: batches keep their order, and no
    gradient flows between modules. Dropout and what else is drawn at random in a step is each rank's own, and then
    differs. Modes of the modules and frozen parameters are those of the beginning.

    Args:
        model: see `LocalTrainer`; on every rank the same class and settings. The weights are rank 0's.
        images, labels: a batch for the plan and the measurement of balance, the largest that will come; see
            `LocalTrainer.step`. Every rank gives one of the same shape.
        schedule: "decoupled": a rank goes on with the next batch as soon as it has it, up to max_lag batches ahead of
            the next rank. "synchronous": a batch begins when the last rank has finished the one before.
        max_lag: how many batches may be under way between two ranks, and how many buffers each of them has for that.
        balance: what the ranks have alike as far as the modules allow: "time", measured on rank 0, "arithmetic" or
            "memory", by the plan.
        options: LocalTrainer's others.

    Attributes:
        stage: this rank's `Stage`. spans: of every rank, the range of its local modules. plan: of the whole model.

    Raises:
        ValueError: fewer local modules than ranks; ranks with other models or settings; what one rank cannot know:
            clip="global", ema, a readout that is shared.
        RankFailed: another rank stopped, or did not answer for the time that the process group was given.
    """

    @telling()
    def __init__(
        self,
        model: nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        schedule: str = "decoupled",
        max_lag: int = 2,
        balance: str = "time",
        **options,
    ) -> None:
        _check(schedule, max_lag, balance, options)
        with on_its_own():
            trainer = LocalTrainer(model, **{"image_size": images.shape[2:], **options})
            images, labels = move((images, labels), trainer.device)
            trainer.plan_for(images, labels)
        _check_rule(trainer)
        settings = {"schedule": schedule, "max_lag": max_lag, "balance": balance, "images": tuple(images.shape)}
        check_alike(alike(trainer) | settings, "make the same model and trainer on every rank")
        place = world()
        broadcast((*model.state_dict().values(), *trainer.aux_nets.state_dict().values()), "rank 0's weights")
        costs = [None] * len(trainer.local_modules)
        if place.first:
            costs = costs_of(trainer, images, labels, balance)
        self.costs = gathered(costs, "what the local modules cost")[0]
        self.spans = balanced(self.costs, place.size)
        for border in range(place.size - 1):  # every rank takes part in the making of every group
            own_group(f"border {border}", [border, border + 1])
        assert trainer.plan is not None  # it was planned
        self.plan, self.schedule = trainer.plan, schedule
        self.model, self.aux_nets = model, trainer.aux_nets
        self._rate, self._place = 1.0, place
        self._begin(trainer, 1 if schedule == "synchronous" else max_lag)

    def _begin(self, trainer, buffers):
        """Takes this rank's modules over from a LocalTrainer of the whole model, and lets the others go."""
        place, mine = self._place, self.spans[self._place.rank]
        self.stage = Stage(trainer, mine)
        behind = trainer.local_modules[mine.stop :]
        self._sends_images = any(module.head.extra is not None for module in behind)
        # What `training.batch.checked` asks of a trainer.
        self.device, self.dtype, self.precision = trainer.device, trainer.dtype, trainer.precision
        self.criterion, self.num_classes = trainer.criterion, trainer.num_classes
        self.image_channels = trainer.image_channels
        self._refused, self._values_are_at_hand = trainer._refused, trainer._values_are_at_hand
        for index, module in enumerate(trainer.local_modules):
            if index not in mine:
                module.to("meta")
        last = place.rank == place.size - 1
        self._receiver = None if place.first else Receiver(place.rank - 1, buffers, self.device)
        self._sender = None if last else Sender(place.rank, buffers, self.device)

    @property
    def rank_bytes(self) -> list[int]:
        """Of every rank, the highest memory of a step by the plan: its modules' state, the activations and gradients of
        the one that holds most, and its buffers, which exist from the first batch on."""
        return gathered(self._own_bytes(), "the bytes of every rank")

    def _own_bytes(self):
        modules = [self.plan.modules[index] for index in self.stage.span]
        state = sum(module.state_bytes + module.optimizer_bytes for module in modules)
        whole = self.plan.state_bytes
        links = sum(link.bytes for link in (self._receiver, self._sender) if link is not None)
        return state + max(module.peak_bytes - whole for module in modules) + links

    def set_learning_rate_factor(self, factor: float) -> None:
        """Sets every rank's learning rates to `factor` times what they were at first, from the next batch on that rank
        0 gives in; on other ranks it does nothing."""
        self._rate = factor

    @telling()
    @torch.inference_mode(False)
    def epoch(self, loader: Iterable | None = None, before_step=None) -> StagesEpoch:
        """Trains by rank 0's loader, on all ranks, to its end.

        Args:
            loader: of (images, labels), on rank 0.
            before_step: called with the number of the step, from 0, before each on rank 0; it may set learning rates.
        """
        self.stage.clear()
        began, seen_from = time.monotonic(), None
        if self._place.first:
            for step, batch in enumerate(loader or ()):
                if before_step is not None:
                    before_step(step)
                self._run(self._first(batch))
            if not self.stage.seen:
                raise ValueError("the loader gave no batch: an epoch needs at least one")
        else:
            while (batch := self._receiver.receive()) is not None:
                seen_from = seen_from or time.monotonic()
                self._run(batch, self._receiver.release)
        with on_its_own():
            self.stage.stepper.flush()
        if self._sender is not None:
            self._sender.end()
        return self._entry(began, seen_from or began)

    def _first(self, batch):
        images, labels = move(batch, self.device)
        images, labels, refused = checked(self, images, labels)
        if refused is not None and refused:
            raise ValueError("a batch has images that are not finite, or labels that are no classes")
        return Batch(dense(images), labels.contiguous(), dense(images), self._rate)

    def _run(self, batch, release=None):
        synchronous = self.schedule == "synchronous"
        out = self.stage.run(batch, None if synchronous else release)
        if self._sender is not None:
            images = out.images if self._sends_images else None
            self._sender.send(Batch(out.features, out.labels, images, out.rate))
        if synchronous:
            if self._sender is not None:
                self._sender.drain()
            if release is not None:
                release()

    @telling()
    def gather(self) -> dict | None:
        """The whole model's state_dict on rank 0, on the CPU; None on the others."""
        own = {name: tensor.cpu() for name, tensor in self.model.state_dict().items() if not tensor.is_meta}
        parts = gathered_on_first(own, "the trained weights")
        if parts is None:
            return None
        return {name: next(part[name] for part in parts if name in part) for name in self.model.state_dict()}

    @telling()
    def save(self, folder: str | Path, **more) -> None:
        """Writes a checkpoint, a folder; see `stages.checkpoint.save`. more: plain values, of rank 0."""
        save(self, folder, more)

    @telling()
    def load(self, folder: str | Path) -> dict:
        """Goes on from a checkpoint, of as many ranks or others; returns what `save` was given more."""
        return load(self, folder)

    def _entry(self, began, seen_from):
        stage, now = self.stage, time.monotonic()
        ours = (
            stage.losses.tolist(),
            stage.hits.tolist(),
            stage.seen,
            int(stage.counted),
            now - began,
            now - seen_from,
        )
        found = gathered(ours, "what an epoch came to")
        seen, counted, seconds, busy = found[-1][2:]
        losses = [loss / max(counted, 1) for part in found for loss in part[0]]
        accuracies = [hits / max(counted, 1) for part in found for hits in part[1]]
        whole = max(part[4] for part in found)
        return StagesEpoch(losses[-1], accuracies[-1], losses, accuracies, seen / busy if busy else 0.0, whole)


def _check(schedule, max_lag, balance, options):
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, given {schedule!r}")
    whole_number(max_lag, "max_lag must be a whole number of batches, at least 1", 1)
    if balance not in COSTS:
        raise ValueError(f"balance must be one of {', '.join(COSTS)}, given {balance!r}")
    for name, needs_all in (("clip", options.get("clip") == "global"), ("ema", options.get("ema") is not None)):
        if needs_all:
            raise ValueError(
                f"{name}={options[name]!r} needs all modules in one process, given several stages: leave it out"
            )


def _check_rule(trainer):
    if nets_of(trainer._rule) is not None and "readout=shared" in str(nets_of(trainer._rule)):
        raise ValueError(
            "readout=shared copies the classifier's weights in every step, which several stages do not have in one "
            "process: leave it out"
        )
