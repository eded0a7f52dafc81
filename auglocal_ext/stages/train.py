"""`train_stages`: a whole training by several ranks, each with a part of the model."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from ..common import checks
from ..distributed.agree import check_alike
from ..distributed.collectives import gathered
from ..distributed.faults import telling
from ..distributed.group import among, world
from ..optim import constant, cosine, sgd
from ..planning.result import Plan
from ..planning.stepping import Stepping
from ..training.divergence import NotFinite, TrainingDiverged, check_learnt, diverged
from ..training.evaluate import checked_batches
from ..training.lines import epoch_line
from ..training.loaders import length_of, peek, set_epoch
from ..training.ranks import check_loaders, draw_apart, of_all_ranks
from ..training.rates import ByFunction, check_schedule, rates_of
from ..training.state import random_state, set_random_state
from .checkpoint import newest
from .grid import grid_of
from .trainer import StageTrainer
from .validation import validation_of

__all__ = ["StagesResult", "train_stages"]


@dataclass(frozen=True)
class StagesResult:
    """What `train_stages` returns, on every rank the same.

    Attributes:
        history: one dict per epoch: epoch, what `StagesEpoch` has, and val_loss, val_accuracy and val_top5_accuracy as
            `TrainResult` has them.
        plan, spans: see `StageTrainer`.
        rank_bytes: see `StageTrainer`; empty where the training diverged.
    """

    history: list
    plan: Plan
    spans: list
    rank_bytes: list


@telling()
def train_stages(
    model: nn.Module,
    loader: Iterable | None,
    depth: int = 4,
    *,
    val_loader: Iterable | None = None,
    epochs: int = 10,
    stages: int | None = None,
    schedule: Callable | None = cosine,
    stage_schedule: str = "decoupled",
    max_lag: int = 2,
    balance: str = "time",
    optimizer: Callable | None = None,
    seed: int | None = None,
    progress: bool = True,
    on_epoch: Callable | None = None,
    checkpoint: str | Path | None = None,
    **options,
) -> StagesResult:
    """Trains a model by layer parallel local learning, in every process that torchrun has started::

        torch.distributed.init_process_group("gloo")  # or "cpu:gloo,cuda:nccl"
        result = auglocal_ext.train_stages(model, loader, modules=8, auxiliary="light")

    Afterwards the model is whole on rank 0, and can be saved there; on the others it has its own part alone, the rest
    of it without data, on the meta device.

    Args:
        model, depth, epochs, optimizer, seed, on_epoch: see `auglocal_ext.train`. Every rank gives the same model.
        loader: of rank 0, its first batch the largest; those of other ranks are not looked at, and may be None. With
            several pipelines, of the first rank of each: rank / stages is its number, for a DistributedSampler.
        val_loader: like loader; the accuracy on it is measured after each epoch, of all pipelines' together. Its first
            batch is the largest too.
        stages: how many ranks have a model together, layer parallel; None: all. Several such pipelines train data
            parallel, with as many batches each.
        schedule: (epoch, epochs) -> factor of the learning rates; see `auglocal_ext.train`.
        stage_schedule, max_lag, balance: see `StageTrainer`.
        progress: on rank 0 a line for the plan and one for every epoch.
        checkpoint: a folder that all ranks see. It is written after every epoch; a training that has one there goes on
            from it, by any number of stages, and as many pipelines, as one that was never stopped: on a CPU to the bit.
        options: StageTrainer's nonfinite; LocalTrainer's others: rule, modules, auxiliary, precision, criterion, ...

    Raises:
        ValueError, TypeError, RankFailed: see `StageTrainer`.
        TrainingDiverged: on every rank: a loss, weight or buffer is not finite, or the classifier has become far worse;
            see `auglocal_ext.train`. The model is then left in its parts.
    """
    epochs = checks.whole_number(epochs, "epochs must be a whole number of at least 1", 1)
    schedule = schedule or constant
    check_schedule(schedule)
    if seed is not None:
        torch.manual_seed(checks.check_seed(seed))
    place = world()
    arguments = {"epochs": epochs, "checkpoint": str(checkpoint), "stages": stages, "seed": seed}
    check_alike(arguments, "give every rank the same")
    grid, accumulate = grid_of(stages), Stepping(options.get("accumulate", 1)).accumulate
    first, batches, validates = _first(loader, val_loader, grid)
    trainer = StageTrainer(
        model,
        *first,
        depth=depth,
        stages=stages,
        schedule=stage_schedule,
        max_lag=max_lag,
        balance=balance,
        optimizer=optimizer or sgd(grid.replicas * accumulate * len(first[0])),
        **options,
    )
    del first
    if validates and grid.stage == 0:
        val_loader = checked_batches(validation_of(trainer, "val_loader's "), val_loader, again=epochs > 1)
    draw_apart(seed)
    rates = rates_of(schedule, trainer, epochs)
    if not isinstance(rates, ByFunction):
        raise ValueError(
            "schedule must be a function (epoch, epochs) -> factor with several stages, given a scheduler's"
        )
    length, history = length_of(loader), []
    if checkpoint is not None and gathered(newest(checkpoint) is not None, "the checkpoint's place")[0]:
        saved = trainer.load(checkpoint)
        history, batches, length = saved["history"], loader, saved["length"]
        trainer.stage.watch.begin_with([history[-1]["module_losses"][index] for index in trainer.stage.span])
        _draw_on(saved["random"], trainer)
    if progress and place.first:
        tqdm.write(_plan_line(trainer))
    ended: TrainingDiverged | None = None
    try:
        for epoch in range(len(history), epochs):
            if grid.stage == 0:
                set_epoch(loader, epoch)
            title = f"epoch {epoch + 1}/{epochs}"
            entry = trainer.epoch(batches, partial(_set_rates, rates, epoch, length), title)
            batches, length = loader, trainer.stage.sums.steps
            validated = _validated(trainer, val_loader, epoch) if validates else dict.fromkeys(_VAL)
            history.append({"epoch": epoch + 1, **asdict(entry), **validated})
            if progress and place.first:
                tqdm.write(epoch_line(history[-1], epochs, None))
            if checkpoint is not None:
                trainer.save(checkpoint, history=history, length=length, random=_random_states(trainer))
            if on_epoch is not None:
                on_epoch(history[-1])
        check_learnt(history, trainer)
    except NotFinite as error:
        result = StagesResult(history, trainer.plan, trainer.spans, [])
        ended = diverged(error, result, checkpoint is not None)
    if ended is not None:
        raise ended  # outside: else its context would keep the trainer alive
    rank_bytes = trainer.rank_bytes
    trainer.make_whole()
    return StagesResult(history, trainer.plan, trainer.spans, rank_bytes)


def _first(loader, val_loader, grid):
    """The first batch, of ranks of other stages than the first one of its shape; a first stage's batches; and whether
    there is a validation."""
    first = batches = told = None
    if grid.stage == 0:
        set_epoch(loader, 0)
        first, batches = peek(loader, "the loader")
        with among(grid.copies):
            check_loaders(loader, first, {"validation": val_loader is not None})
        told = [(tensor.shape, tensor.dtype) for tensor in first], val_loader is not None
    shapes, validates = gathered(told, "the first batch's shape")[grid.pipeline.start]
    return first or tuple(torch.zeros(shape, dtype=dtype) for shape, dtype in shapes), batches, validates


def _validated(trainer, loader, epoch):
    """The history's entries of a validation."""
    if trainer.grid.stage == 0:
        set_epoch(loader, epoch)
    found = trainer.evaluate(loader)
    return dict(zip(_VAL, (found.loss, found.top1, found.top5), strict=True))


_VAL = "val_loss", "val_accuracy", "val_top5_accuracy"


def _random_states(trainer):
    """Of the first stage of every pipeline, whose loader draws; None on ranks of other stages."""
    if trainer.grid.stage:
        return None
    with among(trainer.grid.copies):
        return of_all_ranks(random_state(trainer.device))


def _draw_on(states, trainer):
    """Puts the random number generators where `_random_states` found them."""
    grid = trainer.grid
    if len(states) != grid.replicas:
        raise ValueError(
            f"the checkpoint is of {len(states)} pipeline{'s' * (len(states) > 1)}, each with its own batches, given "
            f"{grid.replicas}: start as many, of any number of stages"
        )
    if grid.stage == 0:
        set_random_state(states[grid.replica], trainer.device)


def _set_rates(rates, epoch, length, step):
    rates.before_step(epoch, step, length)


def _plan_line(trainer):
    parts = [
        f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}: local modules {span.start} to {span.stop - 1}"
        for ranks, span in zip(trainer.grid.columns, trainer.spans, strict=True)
    ]
    return f"{trainer.plan.title}\n{trainer.schedule}; {'; '.join(parts)}"
