"""`train`: its arguments, what is checked before anything changes, what is left afterwards."""

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from ..common import checks
from ..common.device import usable_device
from ..distributed.faults import telling
from ..distributed.group import world
from ..engine.tensors import layout_of
from ..optim import constant, cosine, sgd
from ..planning.plan import plan
from ..planning.stepping import Stepping
from ..rules.auxiliary import Auxiliary
from ..rules.cutting import has_own_cut
from ..rules.rule import Rule
from .checkpoint import Checkpoints
from .divergence import NotFinite, diverged
from .evaluate import Validation, checked_batches, evaluated, modes_of, restore
from .limits import check_limits
from .lines import first_lines
from .loaders import is_resumable, move, peek, set_epoch
from .ranks import check_loaders, draw_apart
from .rates import check_schedule, rates_of
from .result import TrainingInterrupted, TrainResult
from .run import Run
from .trainer import LocalTrainer

__all__ = ["train"]


@telling()
def train(
    model: nn.Module,
    loader: Iterable,
    depth: int | str = 4,
    *,
    val_loader: Iterable | None = None,
    epochs: int = 10,
    rule: str | Rule | type[Rule] = "auglocal",
    form: str | None = None,
    auxiliary: str | Auxiliary | Callable = "paper",
    modules: int | None = None,
    units: Iterable[str] | None = None,
    memory_budget: int | str | None = None,
    prefer: str = "arithmetic",
    recompute: bool | str | Iterable[str] = False,
    optimizer: Callable | None = None,
    criterion: Callable | None = None,
    sync_batch_norm: bool = False,
    schedule: Callable | None = cosine,
    accumulate: int = 1,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    clip: str = "module",
    ema: float | None = None,
    precision: str = "fp32",
    device: str | torch.device | None = None,
    seed: int | None = None,
    progress: bool = True,
    on_step: Callable | None = None,
    on_epoch: Callable | None = None,
    patience: int | None = None,
    max_seconds: float | None = None,
    nonfinite: str = "stop",
    keep_aux_nets: bool = False,
    checkpoint: str | Path | None = None,
    checkpoint_minutes: float = 10,
) -> TrainResult:
    """Trains a model in place by local learning; afterwards it is the plain model again, trained.

    Args:
        model: an image classifier: any of torchvision's, one of `auglocal_ext.models`, or one of your own whose forward
            is a graph of layers and functions, see `as_backbone`. What is frozen (requires_grad_(False)) or partly in
            eval mode, BatchNorms for instance, stays so, and may change in `on_epoch`; see `LocalTrainer`.
        loader: an iterable of (images, labels), gone through once per epoch: a DataLoader, a list. Batches on
            the CPU are moved to the model's device. Labels are class numbers, (N,), int64, or soft, (N, classes), as
            torchvision's MixUp and CutMix make them: then the training accuracy is that of the largest share.
        depth: the paper's d, layers of an auxiliary net with its classifier, at least 2; in the paper more is more
            accurate.
        val_loader: like loader; the accuracy on it is measured after each epoch.
        epochs: how often to go through loader.
        rule: "auglocal", "dgl", "predsim" or "infopro", "bp" for plain backpropagation by the same loop, "checkpoint"
            for gradient checkpointing, or a rule of your own; see `auglocal_ext.Rule`.
        form: "cifar" or "imagenet", the two forms of rule "auglocal"; None: the one its authors used for
            such a network. See `auglocal_ext.rules.AugLocal`.
        auxiliary: what the auxiliary nets of rule "auglocal" are like: "paper", or "light", of at most a tenth of
            backpropagation's arithmetic each, or others; see `auglocal_ext.rules.Auxiliary`, and
            `auglocal_ext.rules.AugLocal` for a function that makes them.
        modules: K, to cut the model into K local modules. Default: the authors' cut of a ResNet or VGG, which is one
            per unit or nearly so; of another network the fewest that need less memory than backpropagation.
        units: names, to say what the units are; see `as_backbone`.
        memory_budget: None, or the bytes that a step may take, as "6GB" or a number: the model is cut where that costs
            the least arithmetic, into as many modules as it takes; depth, auxiliary and recompute may then be "auto".
            See `auglocal_ext.plan`.
        prefer: with a budget, what is least in the cut that is chosen: "arithmetic", "memory" or "time"; see
            `auglocal_ext.plan`.
        recompute: True: run convolutions again in the backward instead of keeping their outputs: gradient checkpointing
            inside every module, for a third more arithmetic; names: of these units only.
        optimizer: parameters -> torch.optim.Optimizer, called once per local module; an optimizer class or a
            functools.partial of one. If its first argument is called `named` or `named_parameters`, it is given a list
            of (name, parameter), as "layer1.0.conv1.weight", of aux nets "aux_nets.0. ...", and may make groups of
            them; see `auglocal_ext.optim.no_decay_on_norms`. Default: SGD, Nesterov momentum 0.9, weight decay 1e-4,
            learning rate 0.1 x batch / 128, of the batches that are accumulated together, on all ranks.
        criterion: the loss of every local module's head and of the classifier: None, the mean cross-entropy;
            torch.nn.CrossEntropyLoss, with label_smoothing, weight and ignore_index if you like; or a function or
            module of your own, (logits (N, classes), labels) -> scalar. That runs on tensors without data too, when a
            step is planned: it may read no values, and constant tensors belong into buffers, which are moved to the
            model's device. Where every label of a batch is ignored the loss is NaN and gradients are zero, as in
            torch. The validation's loss is the plain cross-entropy in any case.
        sync_batch_norm: whether every BatchNorm goes by the images of all processes of torch.distributed's group
            together, as those that are nn.SyncBatchNorm do in any case. A single process then trains as without but for
            rounding, and needs a little more memory, which a plan counts.
        schedule: (epoch, epochs) -> what to multiply the learning rates by; epoch counts fractions where the
            loader's length is known. None: constant. Default: `auglocal_ext.optim.cosine`. Or optimizer -> one of
            torch.optim.lr_scheduler, a callable that needs one argument, called once per local module. It steps after
            each epoch, ReduceLROnPlateau by the validation's loss (of training, without val_loader); OneCycleLR and
            CyclicLR after each step of the optimizers.
        accumulate: how many batches' gradients are averaged before the optimizers step: without BatchNorm N batches of
            B are one of N x B; BatchNorm sees each batch by itself. An epoch's last ones, if fewer, are stepped by too,
            averaged over as many as they are. The gradients of all modules then live all the time, as the plan counts.
        clip_norm: a bound of the norm of each local module's gradients, its aux net's included, as
            `torch.nn.utils.clip_grad_norm_` has it; None: no bound.
        clip_value: a bound of the size of each value of the gradients, as `torch.nn.utils.clip_grad_value_` has it,
            before clip_norm; None: no bound.
        clip: "module", or "global": clip_norm is of all modules' gradients together, for which they have to exist at
            once: with accumulate above 1 only.
        ema: the decay, from 0 to below 1, of an exponential moving average of the model's weights and buffers, after
            each step of the optimizers: torch.optim.swa_utils.AveragedModel, for the result's `ema_model`. None: no
            average.
        precision: "fp32"; "bf16" or "fp16": features under autocast, parameters and statistics in fp32. With "fp16"
            each local module's loss is scaled by a torch.amp.GradScaler of its own, which leaves out steps that
            overflow.
        device: moves the model there first. Default: where the model is.
        seed: torch.manual_seed for the aux nets' weights and everything random after.
        progress: a progress bar, what is trained and what a step costs, and a line per epoch.
        on_step: called after each step with (epoch, step, StepResult), both from 1; on a GPU reading one of its values
            waits for the device.
        on_epoch: called with each epoch's history entry.
        patience: stop after so many epochs without a better validation accuracy (of training, without val_loader).
        max_seconds: stop after the step with which so many seconds have gone by. Neither is an error: the result's
            `stopped` says so, and a checkpoint is left to go on from.
        nonfinite: what to do about a loss that is NaN or infinite: "stop" tells the module, the step and its last
            finite value; "skip" leaves the modules out of the step whose loss or gradients are not finite, their
            BatchNorm statistics included, of accumulated batches if those of one are not; each step then waits for the
            device, and the history counts skipped_steps. What is not finite on one of several ranks is left
            out on all.
        keep_aux_nets: return the aux nets in the result.
        checkpoint: a folder, for last.pt, written after every epoch, when `on_epoch` was called, and best.pt. A
            training that has one there goes on from it: the same call again, after a crash or with more epochs, ends as
            one that was never stopped, on a CPU to the bit (with loaders that draw from torch's, Python's or NumPy's
            own generators, or have a `state_dict`). A checkpoint of another model, rule or cut is refused.
        checkpoint_minutes: also within epochs, after so many minutes, on Ctrl-C and at max_seconds, where the loader
            has a `state_dict` and `load_state_dict`, as torchdata's StatefulDataLoader has and those of
            `auglocal_ext.data`.

    Where torch.distributed is initialised with several ranks, all of them call this with the same arguments and train
    one model, data parallel; see `LocalTrainer`. Each goes through its own loader, of as many batches as the others': a
    DataLoader with a DistributedSampler gives each its part. The learning rate's default counts the images of all
    ranks. With a seed, loaders and weights are as of one process, and what is drawn afterwards, dropout for instance,
    differs between ranks. Behind an epoch running statistics become rank 0's; each rank goes through its own
    val_loader, the whole of the images or its part, and what they count is added up. The history is of all ranks, and
    ends alike on each, as does the model. Rank 0 prints and writes checkpoints; each rank reads them, and goes on with
    its own random numbers. Another number of ranks goes on from them too, from the beginning of an epoch, with the
    learning rate of the optimizer that it is given. `on_step` and `on_epoch` are called on every rank. A rank that
    fails ends all of them.

    Returns:
        TrainResult; the model itself has the trained weights.

    Raises:
        distributed.faults.RankFailed: another rank stopped, or did not answer in the process group's time.
        ValueError, TypeError: an argument or a batch does not fit; see `LocalTrainer`. What arguments and first
            batches tell is raised before any weight changes.
            A `schedule` that returns no finite number of at least 0 is told before the step that it is for; so is a
            later batch that does not fit.
        OSError: nothing can be written to the checkpoint's folder.
        TrainingDiverged: a loss, weight, buffer or validation output is not finite any more, which is looked at before
            `on_epoch` is called; or after the last epoch the classifier's loss is above twice the first epoch's and
            twice ln(classes), the cross-entropy of guessing. A FloatingPointError with the result so far.
        TrainingInterrupted: Ctrl-C; a KeyboardInterrupt with the result so far.
    """
    stepping = asdict(Stepping(accumulate, clip_norm, clip_value, clip, ema))
    del stepping["ranks"]  # which is found out
    patience, max_seconds = check_limits(patience, max_seconds)
    checkpoint_minutes = checks.at_least_0(checkpoint_minutes, "checkpoint_minutes")
    if nonfinite not in ("stop", "skip"):
        raise ValueError(f"nonfinite must be 'stop' or 'skip', given {nonfinite!r}")
    progress = progress and world().first
    epochs, schedule = _check_arguments(loader, epochs, schedule, seed), schedule or constant
    if device is not None:
        model.to(usable_device(device))
    set_epoch(loader, 0)
    first, batches = peek(loader, "the loader")
    arguments = {"epochs": epochs, "seed": seed, "patience": patience, "max_seconds": max_seconds}
    arguments["nonfinite"] = nonfinite
    arguments |= {"validation": val_loader is not None, "a checkpoint folder": checkpoint is not None}
    check_loaders(loader, first, arguments | {"a loader with a state_dict": is_resumable(loader)})
    cutting = {"rule": rule, "form": form, "auxiliary": auxiliary, "modules": modules, "units": units}
    cutting |= {"memory_budget": memory_budget, "prefer": prefer}
    options = {"precision": precision, "recompute": recompute, "optimizer": optimizer, "criterion": criterion}
    options |= stepping | {"sync_batch_norm": sync_batch_norm}
    trainer = _make_trainer(model, first, depth, progress, **cutting, **options)
    validate = None if val_loader is None else _validation(trainer, val_loader, epochs, progress)
    modes, checkpoints, run = modes_of(model), None, None
    try:
        images, labels = move(first, trainer.device)
        if len(images) > 1:  # else the training says that it skips such batches
            trainer.plan_for(images, labels, compare=True)
            if modules is None and memory_budget is None and trainer.plan.comparison.warning:
                options["soft_labels"] = checks.is_soft(labels)
                trainer = _cut_otherwise(trainer, images, depth, **cutting, **options)
            if progress:
                tqdm.write(first_lines(trainer))
            elif trainer.plan.comparison.warning and world().first:
                warnings.warn(trainer.plan.comparison.warning, stacklevel=3)
        del first, images, labels  # which would live through the whole training
        draw_apart(seed)
        trainer.nonfinite, rates = nonfinite, rates_of(schedule, trainer, epochs)
        if checkpoint is not None:
            checkpoints = Checkpoints(checkpoint, loader, checkpoint_minutes)
        run = Run(
            trainer,
            loader,
            batches,
            epochs,
            rates,
            validate,
            progress=progress,
            on_step=on_step,
            on_epoch=on_epoch,
            patience=patience,
            max_seconds=max_seconds,
            keep_aux_nets=keep_aux_nets,
            checkpoints=checkpoints,
        )
        del batches
        ended: Exception | KeyboardInterrupt | None = None
        try:
            run.go()
        except NotFinite as error:
            ended = diverged(error, run.result(), checkpoints is not None)
        except KeyboardInterrupt as stopped:
            ended = TrainingInterrupted(run.result(), str(stopped))
        if ended is not None:
            raise ended  # outside: else its context would keep the trainer alive
        return run.result()
    finally:
        restore(modes)
        if trainer.stepping.accumulates:  # else nothing is left
            trainer.stepper.drop()
        # The rewritten modules are reference cycles; with them the aux nets' memory goes now, not at some later time.
        trainer = run = rates = None
        gc.collect()


def _check_arguments(loader, epochs, schedule, seed):
    """What can be told before the first batch; sets the seed. Returns epochs as an int."""
    epochs = checks.whole_number(epochs, "epochs must be a whole number of at least 1", 1)
    seed = None if seed is None else checks.check_seed(seed)
    if schedule is not None:
        check_schedule(schedule)
    if epochs > 1 and isinstance(loader, Iterator):
        raise ValueError(
            f"the loader can be gone through only once, which is not enough for {epochs} epochs: give a DataLoader "
            f"or a list, not a generator"
        )
    if seed is not None:
        torch.manual_seed(seed)
    return epochs


def _make_trainer(model, first, depth, progress, *, memory_budget, prefer, optimizer, **options):
    """The LocalTrainer; under a budget that of the cut that is found for it. first: the first batch."""
    images, labels = first
    # Images; of what is no batch at all 1: refused below.
    together = world().size * options["accumulate"] * images.shape[:1].numel()
    options["optimizer"] = optimizer or sgd(together)
    chosen = prefer != "arithmetic" or "auto" in (depth, options["auxiliary"], options["recompute"])
    if memory_budget is not None or chosen:
        counted = {"memory_budget": memory_budget, "prefer": prefer, "soft_labels": checks.is_soft(labels)}
        planned = plan(model, images.shape, depth, **counted, **options)
        if progress:
            tqdm.write(str(planned.choice))
        trainer = LocalTrainer(model, plan=planned)
    else:
        size = images.shape[2:] if images.dim() == 4 else None  # what else it may be is refused below
        trainer = LocalTrainer(model, depth, **options, image_size=size)
    checks.check_device(first, trainer.device, "the loader's ")
    return trainer


def _cut_otherwise(trainer, images, depth, **options):
    """The trainer, or where nobody chose its cut, and another number of modules needs less memory than backpropagation,
    one of that cut."""
    if has_own_cut(trainer._backbone, trainer._rule):
        return trainer
    options["optimizer"] = trainer._optimizer
    planned = plan(trainer.model, images.shape, depth, memory_format=layout_of(images), **options)
    same = len(planned.modules) == len(trainer.local_modules)
    return trainer if same else LocalTrainer(trainer.model, plan=planned)


def _validation(trainer, val_loader, epochs, progress):
    """(model, epoch from 0, stop) -> Evaluation, after val_loader's first batch was checked."""
    options = {
        "precision": trainer.precision,
        "channels": trainer.image_channels,
        "classes": trainer.num_classes,
    }
    peeked = Validation(trainer.model, prefix="val_loader's ", **options)
    batches = checked_batches(peeked, val_loader, again=epochs > 1 or trainer.ema_model is not None)

    def validate(model, epoch, stop):
        set_epoch(batches, epoch)
        return evaluated(Validation(model, **options), batches, progress, stop, of_all_ranks=not world().alone)

    return validate
