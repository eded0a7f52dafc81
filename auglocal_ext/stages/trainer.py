"""Trains one model by several ranks, each of which has some of its local modules."""

import contextlib
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..common import checks
from ..common.memory import tensors_of
from ..distributed.agree import check_alike
from ..distributed.collectives import broadcast, gathered, gathered_on_first
from ..distributed.faults import telling
from ..distributed.group import among, world
from ..engine.tensors import dense
from ..training.batch import checked, raise_refused
from ..training.divergence import names_not_finite
from ..training.epoch import check_any_seen, is_skipped
from ..training.evaluate import Evaluation
from ..training.loaders import StoppedBetweenSteps, move
from ..training.ranks import in_step
from ..training.state import alike
from ..training.trainer import LocalTrainer
from .balance import balanced
from .checkpoint import load, save
from .costs import cost_of, group_bytes
from .epoch import StagesEpoch, check_all_values, entry_of_all
from .grid import grid_of
from .link import Batch, Receiver, Sender
from .parts import Parts
from .refusals import check_arguments, check_trainer
from .stage import Stage
from .validation import evaluated, unlike_in_parts

__all__ = ["StageTrainer"]


class StageTrainer:
    """Layer parallel local learning: rank after rank has some neighbouring local modules of the model, with their
    auxiliary nets and optimizers, and nothing of the others. Features go from rank to rank, nothing comes back, so a
    rank is never idle while it has a batch. Every rank makes one, of the same model, and calls the same methods::

        trainer = StageTrainer(model, images, modules=8, auxiliary="light")
        for epoch in range(10):
            entry = trainer.epoch(loader)  # of rank 0; the others' loaders are not read
        trainer.make_whole()  # the model, on rank 0

    With fewer stages than ranks there are several such pipelines, data parallel: each has the whole model and its own
    batches, and the gradients of a local module are averaged over the ranks that have it, while the next one computes.

    The result is that of one process, to the bit on a CPU, whatever the schedule: batches keep their order, and no
    gradient flows between modules. Dropout and what else is drawn at random in a step is each rank's own, and then
    differs. Modes of the modules and frozen parameters are those of the beginning.

    Args:
        model: see `LocalTrainer`; on every rank the same class and settings. The weights are rank 0's.
        images: of a batch for the plan and the measurement of balance, the largest that will come; see
            `LocalTrainer.step`. Every rank gives one of the same shape.
        labels: of that batch.
        stages: of each pipeline, a divisor of the number of ranks; None: as many as there are ranks.
        schedule: "decoupled": a rank goes on with the next batch as soon as it has it, up to max_lag batches ahead of
            the next rank. "synchronous": a batch begins when the last rank has finished the one before.
        max_lag: how many batches may be under way between two ranks, and how many buffers each of them has for that.
        balance: what the ranks have alike as far as the modules allow: "time", measured on rank 0, "arithmetic" or
            "memory", by the plan.
        nonfinite: "stop": `epoch` raises NotFinite. "skip": see `auglocal_ext.train`; every module is left out by
            itself, as nothing that a step does is of all of them.
        options: LocalTrainer's others: depth, rule, modules, ... With sync_batch_norm a BatchNorm goes by the images of
            all pipelines.

    Attributes:
        grid: which rank is which, `Grid`.
        stage: this rank's `Stage`.
        plan: of the whole model, on one rank of such a pipeline.
        spans: of every stage, the range of its local modules.
        odd: names of this rank's tensors that were not finite from the start.

    Raises:
        ValueError, TypeError: see `LocalTrainer`; fewer local modules than stages; ranks with other models or settings;
            what one rank cannot know: clip="global", ema, aux nets whose readout follows the classifier's.
        RankFailed: another rank stopped, or did not answer for the time that the process group was given.
    """

    @telling()
    def __init__(
        self,
        model: nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        stages: int | None = None,
        schedule: str = "decoupled",
        max_lag: int = 2,
        balance: str = "time",
        nonfinite: str = "stop",
        **options,
    ) -> None:
        check_arguments(images, schedule, max_lag, balance, nonfinite, options)
        check_alike({"stages": stages}, "give every rank the same")
        self.grid = grid_of(stages)
        self.grid.make_groups()
        with among(self.grid.copies):
            trainer = LocalTrainer(model, **{"image_size": images.shape[2:], **options})
            images, labels = move((images, labels), trainer.device)
            trainer.plan_for(images, labels)
        trainer.nonfinite = nonfinite
        check_trainer(trainer)
        settings = {"schedule": schedule, "max_lag": max_lag, "balance": balance, "images": tuple(images.shape)}
        settings["nonfinite"] = nonfinite
        check_alike(alike(trainer) | settings, "make the same model and trainer on every rank")
        broadcast((*tensors_of(model), *tensors_of(trainer.aux_nets)), "rank 0's weights")
        found, count = None, len(trainer.local_modules)
        if world().first:
            spans = balanced(count, self.grid.stages, cost_of(trainer, images, labels, balance))
            found = spans, unlike_in_parts(trainer, images)
        self.spans, self._unlike = gathered(found, "which local modules go where")[0]
        assert trainer.plan is not None  # it was planned
        self.plan, self.schedule = trainer.plan, schedule
        self.model, self.aux_nets = model, trainer.aux_nets
        self._rate = 1.0
        self._begin(trainer, 1 if schedule == "synchronous" else max_lag)

    def _begin(self, trainer, buffers):
        """Takes this rank's modules over from a LocalTrainer of the whole model, and lets the others go."""
        grid, mine = self.grid, self.spans[self.grid.stage]
        self.stage = Stage(trainer, mine, grid.copies)
        self.parts = Parts(trainer.model, trainer.aux_nets, trainer.local_modules, self.spans, grid.stage)
        self.odd = names_not_finite(self)
        behind = trainer.local_modules[mine.stop :]
        self._sends_images = any(module.head.extra is not None for module in behind)
        # What `training.batch.checked` asks of a trainer.
        self.device, self.dtype, self.precision = trainer.device, trainer.dtype, trainer.precision
        self.criterion, self.num_classes = trainer.criterion, trainer.num_classes
        self.image_channels = trainer.image_channels
        self._refused, self._values_are_at_hand = trainer._refused, trainer._values_are_at_hand
        first, last = grid.stage == 0, grid.stage == grid.stages - 1
        self._receiver = None if first else Receiver(grid.border(grid.stage - 1), buffers, self.device)
        self._sender = None if last else Sender(grid.border(grid.stage), buffers, self.device)

    @property
    def mesh(self) -> DeviceMesh:
        """See `Grid.mesh`; for what of your own goes over the ranks."""
        return self.grid.mesh(self.device)

    @property
    def rank_bytes(self) -> list[int]:
        """Of every rank, the highest memory of a step by the plan: what stays of its modules, the activations and
        gradients of the one that needs most, and its buffers, which exist from the first batch on."""
        return gathered(self._own_bytes(), "the bytes of every rank")

    def _own_bytes(self):
        links = sum(link.bytes for link in (self._receiver, self._sender) if link is not None)
        return group_bytes(self.plan, self.stage.span) + links

    def set_learning_rate_factor(self, factor: float) -> None:
        """Sets every rank's learning rates to `factor` times what they were at first, from the next batch on that the
        first stage gives in; on ranks of other stages it does nothing, as a batch brings its factor with it.

        Raises:
            ValueError: factor is no finite number of at least 0; no learning rate has changed.
        """
        self._rate = checks.learning_rate_factor(factor, "factor must be")

    @telling()
    @torch.inference_mode(False)
    def epoch(self, loader: Iterable | None = None, before_step=None, title: str = "this epoch") -> StagesEpoch:
        """Trains by the loaders of the first stages, on all ranks, to their end. A batch of one image is skipped, with
        a warning; where there are several pipelines, the others' too.

        Args:
            loader: of (images, labels), on a rank of the first stage; of as many batches as those of other pipelines.
            before_step: called with the number of the step, from 0, on such ranks, before each step that begins a group
                of batches that are accumulated; it may set learning rates.
            title: what warnings and errors call the epoch.

        Returns:
            StagesEpoch, the same on every rank, of losses, accuracies, images per second and seconds.

        Raises:
            training.divergence.NotFinite: on every rank, of the first step and local module whose loss was NaN or
                infinite: no more batches are read then. Or of a weight or buffer that is, behind the epoch. The weights
                are as the last step left them.
            ValueError, TypeError: a batch does not fit, or there is none. What only its values tell (labels out of
                range, images that are not finite) is raised at once on the CPU, on other devices behind the epoch; its
                steps were then taken with harmless values in their place.
            RankFailed: another rank stopped, or did not answer.
        """
        self.stage.begin()
        began, seen_from = time.monotonic(), None
        for batch in self._read(loader, before_step, title) if self._receiver is None else self._received():
            seen_from = seen_from or time.monotonic()
            self._run(batch)
        with among(self.grid.copies):
            self.stage.stepper.flush()
        if self._sender is not None:
            self._sender.end()
        if self._receiver is None:
            raise_refused(self)
        check_any_seen(self.stage.sums, title)
        check_all_values(self, title)
        with among(self.grid.copies):
            buffers = [buffer for module in self.stage.local_modules for buffer in module.buffers()]
            broadcast(buffers, "the first pipeline's running statistics")
        now = time.monotonic()
        self.stage.sums.seconds = now - (seen_from or began)
        return entry_of_all(self.stage, self.grid, now - began)

    @property
    def _stops(self):
        """Whether this stage, or one behind it, has diverged."""
        return self.stage.diverged or (self._sender is not None and self._sender.stopped)

    def _read(self, loader, before_step, title):
        """The first stage's batches."""
        stop = threading.Event()
        with among(self.grid.copies):
            batches = in_step(stop, () if loader is None else loader)
        while (pair := self._next(batches, title)) is not None:
            images, labels = pair
            if before_step is not None and not self.stage.stepper.count:
                before_step(self.stage.sums.steps)
            yield Batch(dense(images), labels.contiguous(), dense(images), self._rate)
            if self._stops:
                stop.set()  # which ends the others' reading too

    def _next(self, batches, title):
        """The next one that all pipelines train on, None behind the last."""
        with among(self.grid.copies), contextlib.suppress(StoppedBetweenSteps):
            for given in batches:
                checks.check_pair(given, "the loader")
                images, labels = move(given, self.device)
                if is_skipped(images, title):
                    continue
                images, labels, _ = checked(self, images, labels)
                return images, labels
        return None

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
    @torch.inference_mode(False)
    def evaluate(self, loader: Iterable | None = None) -> Evaluation:
        """The model's loss, accuracies and confusion matrix, on every rank, by the loaders of the first stages; see
        `auglocal_ext.evaluation`. Their first batch has to be the largest.

        Args:
            loader: of (images, labels), on a rank of the first stage; others' are not looked at.

        Returns:
            Evaluation, of all pipelines' images together.

        Raises:
            ValueError: a batch does not fit, or there is none; or the model's forward does something else in eval mode
                than its layers, which the ranks have.
            training.divergence.NotFinite: on every rank: outputs are not finite.
        """
        if self._unlike:
            raise ValueError(self._unlike)
        return evaluated(self, () if loader is None else loader)

    @telling()
    def gather(self) -> dict | None:
        """The whole model's state_dict on rank 0, tensors by name, on the CPU; None on the others. Every rank must call
        it."""
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
        own = {}
        if self.grid.replica == 0:
            own = {name: t.detach().cpu() for name, t in self.parts.owned.items() if name.startswith("model.")}
        parts = gathered_on_first(own, "the trained weights")
        return None if parts is None else {name: tensor for part in parts for name, tensor in part.items()}

    @telling()
    def save(self, folder: str | Path, **more) -> None:
        """Writes a checkpoint: weights, statistics, auxiliary nets, optimizers. The one before is deleted behind it.
        Every rank must call it.

        Args:
            folder: that all ranks see. The checkpoint is a folder in it, of which each rank writes its part.
            more: plain values to be kept with it, those of rank 0.

        Raises:
            RankFailed: another rank stopped, or did not answer.
        """
        save(self, folder, more)

    @telling()
    def load(self, folder: str | Path) -> dict:
        """Goes on from the newest checkpoint, which as many ranks or others have saved. Every rank must call it.

        Args:
            folder: as `save` was given it.

        Returns:
            What `save` was given more.

        Raises:
            ValueError: there is none, or it is of another model or cut; nothing has changed then.
            RankFailed: another rank stopped, or did not answer.
        """
        return load(self, folder)
