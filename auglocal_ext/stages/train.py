"""`train_stages`: a whole training by several ranks, each with a part of the model."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..common import checks
from ..distributed.agree import check_alike
from ..distributed.collectives import gathered
from ..distributed.faults import telling
from ..distributed.group import among, world
from ..optim import constant, cosine, sgd
from ..planning.result import Plan
from ..planning.stepping import Stepping
from ..training.divergence import NotFinite, diverged
from ..training.evaluate import checked_batches
from ..training.limits import check_limits
from ..training.loaders import peek, set_epoch
from ..training.ranks import check_loaders, draw_apart
from ..training.rates import ByFunction, check_schedule, makes_schedulers
from .grid import grid_of
from .run import Run
from .trainer import StageTrainer
from .validation import validation_of

__all__ = ["StagesResult", "train_stages"]


@dataclass(frozen=True)
class StagesResult:
    """What `train_stages` returns, on every rank the same.

    Attributes:
        history: one dict per epoch: epoch, what `StagesEpoch` has, and val_loss, val_accuracy and val_top5_accuracy as
            `TrainResult` has them.
        plan: of the whole model, see `StageTrainer`.
        spans: of every stage the range of its local modules.
        rank_bytes: of every rank the bytes of a step at its highest, by the plan; empty where the training diverged.
        stopped: why there are fewer epochs than asked for: "patience", "max_seconds", or None.
    """

    history: list
    plan: Plan
    spans: list
    rank_bytes: list
    stopped: str | None = None


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
    patience: int | None = None,
    max_seconds: float | None = None,
    checkpoint: str | Path | None = None,
    **options,
) -> StagesResult:
    """Trains a model by layer parallel local learning, in every process that torchrun has started::

        torch.distributed.init_process_group("gloo")  # or "cpu:gloo,cuda:nccl"
        result = auglocal_ext.train_stages(model, loader, modules=8, auxiliary="light")

    Afterwards the model is whole on rank 0, and can be saved there; on the others it has its own part alone, the rest
    of it without data, on the meta device.

    Args:
        model: see `auglocal_ext.train`. Every rank gives the same.
        depth, epochs, optimizer, seed, on_epoch, patience: see `auglocal_ext.train`.
        loader: of rank 0, its first batch the largest; those of other ranks are not looked at, and may be None. With
            several pipelines, of the first rank of each: rank / stages is its number, for a DistributedSampler.
        val_loader: like loader; the accuracy on it is measured after each epoch, of all pipelines' together. Its first
            batch is the largest too.
        stages: how many ranks have a model together, layer parallel; None: all. Several such pipelines train data
            parallel, with as many batches each.
        schedule: (epoch, epochs) -> factor of the learning rates; see `auglocal_ext.train`.
        stage_schedule, max_lag, balance: see `StageTrainer`.
        progress: on rank 0 a line for the plan and one for every epoch.
        max_seconds: stop after the epoch with which so many seconds have gone by on rank 0; within an epoch ranks are
            at different steps.
        checkpoint: a folder that all ranks see. It is written after every epoch; a training that has one there goes on
            from it, by any number of stages and pipelines; by as many pipelines as one that was never stopped, on a CPU
            to the bit.
        options: StageTrainer's nonfinite; LocalTrainer's others: rule, modules, auxiliary, precision, criterion, ...

    Returns:
        StagesResult

    Raises:
        ValueError, TypeError, RankFailed: see `StageTrainer`. Also a schedule of torch's, which needs the optimizer.
        TrainingDiverged: on every rank: a loss, weight or buffer is not finite, or the classifier has become far worse;
            see `auglocal_ext.train`. The model is then left in its parts.
    """
    epochs = checks.whole_number(epochs, "epochs must be a whole number of at least 1", 1)
    patience, max_seconds = check_limits(patience, max_seconds)
    schedule = schedule or constant
    check_schedule(schedule)
    if makes_schedulers(schedule):
        raise ValueError(
            "schedule must be a function (epoch, epochs) -> factor with several stages, given a scheduler's"
        )
    if seed is not None:
        torch.manual_seed(checks.check_seed(seed))
    arguments = {"epochs": epochs, "checkpoint": str(checkpoint), "stages": stages, "seed": seed}
    arguments |= {"patience": patience, "max_seconds": max_seconds}
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
    rates, progress = ByFunction(schedule, trainer, epochs), progress and world().first
    given = epochs, rates, val_loader, validates, progress, on_epoch, checkpoint, patience, max_seconds
    run, ended = Run(trainer, loader, batches, *given), None
    try:
        run.go()
    except NotFinite as error:
        result = StagesResult(run.history, trainer.plan, trainer.spans, [])
        ended = diverged(error, result, checkpoint is not None)
    if ended is not None:
        raise ended  # outside: else its context would keep the trainer alive
    rank_bytes = trainer.rank_bytes
    trainer.make_whole()
    return StagesResult(run.history, trainer.plan, trainer.spans, rank_bytes, run.stopped)


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
