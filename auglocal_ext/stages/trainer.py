"""Trains one model by several ranks, each of which has some of its local modules."""

import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from ..common import checks
from ..common.memory import tensors_of
from ..distributed.agree import check_alike
from ..distributed.collectives import broadcast, gathered, gathered_on_first, own_group
from ..distributed.faults import telling
from ..distributed.group import on_its_own, world
from ..engine.tensors import dense
from ..training.batch import checked
from ..training.divergence import names_not_finite
from ..training.epoch import check_any_seen, is_skipped
from ..training.loaders import move
from ..training.state import alike
from ..training.trainer import LocalTrainer
from .balance import balanced
from .checkpoint import load, save
from .costs import COSTS, cost_of, group_bytes
from .epoch import StagesEpoch, check_all_values, entry_of_all
from .link import Batch, Receiver, Sender
from .parts import Parts
from .stage import Stage

__all__ = ["SCHEDULES", "StageTrainer"]

SCHEDULES, NONFINITE = ("decoupled", "synchronous"), ("stop", "skip")


class StageTrainer:
    """Layer parallel local learning: rank after rank has some neighbouring local modules of the model, with their
    auxiliary nets and optimizers, and nothing of the others. Features go from rank to rank, nothing comes back, so a
    rank is never idle while it has a batch. Every rank makes one, of the same model, and calls the same methods::

        trainer = StageTrainer(model, images, modules=8, auxiliary="light")
        for epoch in range(10):
            entry = trainer.epoch(loader)  # of rank 0; the others' loaders are not read
        trainer.make_whole()  # the model, on rank 0

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
        nonfinite: "stop": `epoch` raises NotFinite. "skip": see `auglocal_ext.train`; every module is left out by
            itself, as nothing that a step does is of all of them.
        options: LocalTrainer's others.

    Attributes:
        stage: this rank's `Stage`. spans: of every rank, the range of its local modules. plan: of the whole model.
        odd: what of this rank's tensors was not finite from the start.

    Raises:
        ValueError: fewer local modules than ranks; ranks with other models or settings; what one rank cannot know:
            clip="global", ema, aux nets whose readout follows the classifier's.
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
        nonfinite: str = "stop",
        **options,
    ) -> None:
        _check(schedule, max_lag, balance, nonfinite, options)
        if len(images) < 2:
            raise ValueError(f"the first batch must be the largest, and have at least 2 images: given {len(images)}")
        with on_its_own():
            trainer = LocalTrainer(model, **{"image_size": images.shape[2:], **options})
            images, labels = move((images, labels), trainer.device)
            trainer.plan_for(images, labels)
        trainer.nonfinite = nonfinite
        _check_readouts(trainer)
        settings = {"schedule": schedule, "max_lag": max_lag, "balance": balance, "images": tuple(images.shape)}
        settings["nonfinite"] = nonfinite
        check_alike(alike(trainer) | settings, "make the same model and trainer on every rank")
        place = world()
        broadcast((*tensors_of(model), *tensors_of(trainer.aux_nets)), "rank 0's weights")
        spans, count = None, len(trainer.local_modules)
        if place.first:
            spans = balanced(count, place.size, cost_of(trainer, images, labels, balance))
        self.spans = gathered(spans, "which local modules go where")[0]
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
        self.parts = Parts(trainer.model, trainer.aux_nets, trainer.local_modules, self.spans, place.rank)
        self.odd = names_not_finite(self)
        behind = trainer.local_modules[mine.stop :]
        self._sends_images = any(module.head.extra is not None for module in behind)
        # What `training.batch.checked` asks of a trainer.
        self.device, self.dtype, self.precision = trainer.device, trainer.dtype, trainer.precision
        self.criterion, self.num_classes = trainer.criterion, trainer.num_classes
        self.image_channels = trainer.image_channels
        self._refused, self._values_are_at_hand = trainer._refused, trainer._values_are_at_hand
        last = place.rank == place.size - 1
        self._receiver = None if place.first else Receiver(place.rank - 1, buffers, self.device)
        self._sender = None if last else Sender(place.rank, buffers, self.device)

    @property
    def rank_bytes(self) -> list[int]:
        """Of every rank, the highest memory of a step by the plan: what stays of its modules, the activations and
        gradients of the one that needs most, and its buffers, which exist from the first batch on."""
        return gathered(self._own_bytes(), "the bytes of every rank")

    def _own_bytes(self):
        links = sum(link.bytes for link in (self._receiver, self._sender) if link is not None)
        return group_bytes(self.plan, self.stage.span) + links

    def set_learning_rate_factor(self, factor: float) -> None:
        """Sets every rank's learning rates to `factor` times what they were at first, from the next batch on that rank
        0 gives in; on other ranks it does nothing."""
        self._rate = factor

    @telling()
    @torch.inference_mode(False)
    def epoch(self, loader: Iterable | None = None, before_step=None, title: str = "this epoch") -> StagesEpoch:
        """Trains by rank 0's loader, on all ranks, to its end. A batch of one image is skipped, with a warning.

        Args:
            loader: of (images, labels), on rank 0.
            before_step: called with the number of the step, from 0, on rank 0, before each step that begins a group of
                batches that are accumulated; it may set learning rates.
            title: what warnings and errors call the epoch.

        Raises:
            training.divergence.NotFinite: on every rank, of the first step and local module whose loss was NaN or
                infinite: no more batches are read then. Or of a weight or buffer that is, behind the epoch. The weights
                are as the last step left them.
            ValueError: a batch does not fit, or there is none.
        """
        self.stage.begin()
        began, seen_from = time.monotonic(), None
        for batch in self._read(loader, before_step, title) if self._receiver is None else self._received():
            seen_from = seen_from or time.monotonic()
            self._run(batch)
        with on_its_own():
            self.stage.stepper.flush()
        if self._sender is not None:
            self._sender.end()
        check_any_seen(self.stage.sums, title)
        check_all_values(self, title)
        now = time.monotonic()
        self.stage.sums.seconds = now - (seen_from or began)
        return entry_of_all(self.stage, now - began)

    @property
    def _stops(self):
        """Whether this stage, or one behind it, has diverged."""
        return self.stage.diverged or (self._sender is not None and self._sender.stopped)

    def _read(self, loader, before_step, title):
        """The first stage's batches."""
        for given in loader or ():
            checks.check_pair(given, "the loader")
            images, labels = move(given, self.device)
            with on_its_own():
                if is_skipped(images, title):
                    continue
            images, labels, refused = checked(self, images, labels)
            if refused is not None and refused:
                raise ValueError("a batch has images that are not finite, or labels that are no classes")
            if before_step is not None and not self.stage.stepper.count:
                before_step(self.stage.sums.steps)
            yield Batch(dense(images), labels.contiguous(), dense(images), self._rate)
            if self._stops:
                return

    def _received(self):
        """Another stage's."""
        while (batch := self._receiver.receive()) is not None:
            yield batch
            self._receiver.stop = self._stops

    def _run(self, batch):
        synchronous, release = self.schedule == "synchronous", self._receiver and self._receiver.release
        out = self.stage.run(batch, None if synchronous else release)
        if self._sender is not None:
            images = out.images if self._sends_images else None
            self._sender.send(Batch(out.features, out.labels, images, out.rate))
        if synchronous:
            if self._sender is not None:
                self._sender.drain()
            if self._receiver is not None:
                self._receiver.release()

    @telling()
    def gather(self) -> dict | None:
        """The whole model's state_dict on rank 0, on the CPU; None on the others."""
        found = self._gathered()
        if found is None:
            return None
        return {name: found.get(f"model.{name}", value) for name, value in self.model.state_dict().items()}

    @telling()
    def make_whole(self) -> None:
        """On rank 0 the model has all weights and buffers again; on the others, only what is theirs. The training is
        over with it: what rank 0 is given here no step changes."""
        found = self._gathered()
        if found is not None:
            self.parts.put_back(found, self.device)

    def _gathered(self):
        own = {name: t.detach().cpu() for name, t in self.parts.owned.items() if name.startswith("model.")}
        parts = gathered_on_first(own, "the trained weights")
        return None if parts is None else {name: tensor for part in parts for name, tensor in part.items()}

    @telling()
    def save(self, folder: str | Path, **more) -> None:
        """Writes a checkpoint, a folder; see `stages.checkpoint.save`. more: plain values, of rank 0."""
        save(self, folder, more)

    @telling()
    def load(self, folder: str | Path) -> dict:
        """Goes on from a checkpoint, of as many ranks or others; returns what `save` was given more."""
        return load(self, folder)


def _check(schedule, max_lag, balance, nonfinite, options):
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, given {schedule!r}")
    checks.whole_number(max_lag, "max_lag must be a whole number of batches, at least 1", 1)
    if balance not in COSTS:
        raise ValueError(f"balance must be one of {', '.join(COSTS)}, given {balance!r}")
    if nonfinite not in NONFINITE:
        raise ValueError(f"nonfinite must be 'stop' or 'skip', given {nonfinite!r}")
    for name, needs_all in (("clip", options.get("clip") == "global"), ("ema", options.get("ema") is not None)):
        if needs_all:
            raise ValueError(
                f"{name}={options[name]!r} needs all modules in one process, given several stages: leave it out"
            )


def _check_readouts(trainer):
    if any(module.head.shares_readout for module in trainer.local_modules):
        raise ValueError(
            f"the nets of rule {trainer._rule.name!r} end in the classifier's weights, copied in every step, which "
            "several stages do not have in one process: leave readout=shared out, in a rule of your own shares_readout"
        )
