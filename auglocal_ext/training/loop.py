"""The training loop around the local step: epochs, validation, memory, Ctrl-C."""

import gc
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from ..common import checks
from ..common.device import usable_device
from ..optim import constant, cosine, sgd
from ..planning.plan import plan
from ..planning.result import Plan
from ..rules.rule import Rule
from .checkpoint import Checkpoints
from .divergence import REMEDY, NotFinite, TrainingDiverged, check_finite, check_learnt, names_not_finite
from .epoch import PeakMeter, factor_at, train_epoch
from .evaluate import Validation, accuracies, modes_of, restore
from .loaders import interrupt_sets, length_of, move, no_bar, peek
from .trainer import LocalTrainer

__all__ = ["TrainResult", "TrainingInterrupted", "train"]


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns.

    history: one dict per epoch, of plain numbers: epoch, loss (of the classifier), module_losses, train_accuracy
        (of the training batches, as they were seen), val_accuracy and val_top5_accuracy (None without val_loader; top-5
        None for fewer than 6 classes), images_per_second, seconds, lr (of the last step), peak_bytes.
    plan: the cut that was trained.
    peak_bytes: the highest memory of a step: on CUDA as torch's allocator saw it over all of them, on
        other devices live tensor bytes, parameters and optimizer state included, in the first two steps.
    aux_nets: with keep_aux_nets, an nn.ModuleList; else None.
    """

    history: list
    plan: Plan
    peak_bytes: int
    aux_nets: nn.ModuleList | None


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C during `train`, raised between two steps. `result`: the TrainResult of the finished epochs."""

    def __init__(self, result, note=""):
        super().__init__(f"training interrupted after {len(result.history)} whole epochs. {note}".rstrip(" ."))
        self.result = result


def train(
    model: nn.Module,
    loader: Iterable,
    depth: int | str = 4,
    *,
    val_loader: Iterable | None = None,
    epochs: int = 10,
    rule: str | Rule | type[Rule] = "auglocal",
    form: str | None = None,
    modules: int | None = None,
    memory_budget: int | str | None = None,
    recompute: bool = False,
    optimizer: Callable | None = None,
    schedule: Callable | None = cosine,
    precision: str = "fp32",
    device: str | torch.device | None = None,
    seed: int | None = None,
    progress: bool = True,
    on_epoch: Callable | None = None,
    keep_aux_nets: bool = False,
    checkpoint: str | Path | None = None,
) -> TrainResult:
    """Trains a model in place by local learning; afterwards it is the plain model again, trained.

    Args:
        model: a torchvision ResNet or VGG, or one of `auglocal_ext.models`.
        loader: an iterable of (images, labels), gone through once per epoch: a DataLoader, a list. Batches on
            the CPU are moved to the model's device.
        depth: the paper's d, layers of an auxiliary net with its classifier; more is more accurate and slower.
        val_loader: like loader; the accuracy on it is measured after each epoch.
        epochs: how often to go through loader.
        rule: "auglocal", "dgl", "predsim" or "infopro", "bp" for plain backpropagation by the same loop, "checkpoint"
            for gradient checkpointing, or a rule of your own; see `auglocal_ext.Rule`.
        form: "cifar" or "imagenet", the two forms of rule "auglocal"; None: the one its authors used for
            such a network. See `auglocal_ext.rules.AugLocal`.
        modules: K, to cut the model into K local modules instead of one per unit.
        memory_budget: the bytes that a step may take, as "6GB" or a number: the model is cut where that costs the least
            arithmetic, into as many modules as it takes; depth may then be "auto". See `auglocal_ext.plan`.
        recompute: run each block's convolutions again in the backward instead of keeping their outputs: gradient
            checkpointing inside every module, for a third more arithmetic.
        optimizer: parameters -> torch.optim.Optimizer, called once per local module; an optimizer class or a
            functools.partial of one. Default: SGD, Nesterov momentum 0.9, weight decay 1e-4, learning rate
            0.1 x batch / 128.
        schedule: (epoch, epochs) -> what to multiply the learning rates by; epoch counts fractions where the
            loader's length is known. None: constant. Default: `auglocal_ext.optim.cosine`.
        precision: "fp32" or "bf16".
        device: moves the model there first. Default: where the model is.
        seed: torch.manual_seed for the aux nets' weights and everything random after.
        progress: a progress bar and a line per epoch.
        on_epoch: called with each epoch's history entry.
        keep_aux_nets: return the aux nets in the result.
        checkpoint: a folder, for last.pt, written after every epoch, when `on_epoch` was called, and best.pt. A
            training that has one there goes on from it: the same call again, after a crash or with more epochs, ends as
            one that was never stopped, on a CPU to the bit (with loaders that draw from torch's, Python's or NumPy's
            own generators, or have a `state_dict`). A checkpoint of another model, rule or cut is refused.

    Returns:
        TrainResult

    Raises:
        ValueError, TypeError: an argument or a batch does not fit; see `LocalTrainer`. What arguments and first
            batches tell is raised before any weight changes.
            A `schedule` that returns no finite number of at least 0 is told before the step that it is for.
        TrainingDiverged: a loss, weight, buffer or validation output is not finite any more, which is looked at before
            `on_epoch` is called; or after the last epoch the classifier's cross-entropy is above twice the first
            epoch's and twice ln(classes), that of guessing. A FloatingPointError with the result so far.
        TrainingInterrupted: Ctrl-C; a KeyboardInterrupt with the result so far.
    """
    epochs, schedule = _check_arguments(loader, epochs, schedule, seed), schedule or constant
    if device is not None:
        model.to(usable_device(device))
    first, batches = peek(loader, "the loader")
    cutting = {"rule": rule, "form": form, "modules": modules, "memory_budget": memory_budget}
    options = {"precision": precision, "recompute": recompute, "optimizer": optimizer}
    trainer = _make_trainer(model, first, depth, progress, **cutting, **options)
    validation = {"precision": precision, "channels": trainer.image_channels, "classes": trainer.num_classes}
    if val_loader is not None:
        val_loader = _checked_validation(model, val_loader, epochs, validation)

    modes, odd = modes_of(model), names_not_finite(trainer)
    history: list[dict] = []
    epoch_length, meter, stop = length_of(loader), PeakMeter(trainer), threading.Event()
    if checkpoint is not None:
        checkpoints = Checkpoints(checkpoint, loader, trainer.device)
        history = checkpoints.restore(trainer, meter, epochs)
        batches = loader if history else batches  # the first batch was drawn before the generators were put back
        if history and progress:
            tqdm.write(f"going on behind epoch {len(history)}/{epochs}, from {checkpoints.folder}")
        if len(history) == epochs:
            trainer.plan_for(move(first, trainer.device)[0])  # which no step will do
    del first  # its images would live through the whole training

    def result():
        return TrainResult(history, trainer.plan, meter.peak, trainer.aux_nets if keep_aux_nets else None)

    try:
        with interrupt_sets(stop):
            for epoch in range(len(history), epochs):
                factor = factor_at(schedule, epoch, epochs, epoch_length)
                with _bar(epoch, epochs, epoch_length, progress) as bar:
                    entry, epoch_length = train_epoch(trainer, batches, epoch, epochs, factor, meter, bar, stop)
                check_finite(trainer, odd, entry, epochs)
                if val_loader is not None:
                    top1, top5 = accuracies(Validation(model, **validation), val_loader, progress, stop)
                    entry |= {"val_accuracy": top1, "val_top5_accuracy": top5}
                history.append(entry)
                if progress:
                    tqdm.write(_epoch_line(entry, epochs))
                if on_epoch is not None:
                    on_epoch(entry)
                if checkpoint is not None:
                    checkpoints.save(trainer, history, meter.peak)
                batches = loader
        check_learnt(history, trainer)
    except NotFinite as error:
        raise TrainingDiverged(f"{error}: training diverged; {REMEDY}", result()) from None
    except KeyboardInterrupt as stopped:
        raise TrainingInterrupted(result(), str(stopped)) from None
    finally:
        restore(modes)
        # The rewritten modules are reference cycles; with them the aux nets' memory goes now, not at some later time.
        outcome = result()
        trainer = meter = batches = None
        gc.collect()
    return outcome


def _check_arguments(loader, epochs, schedule, seed):
    """What can be told before the first batch; sets the seed. Returns epochs as an int."""
    epochs = checks.whole_number(epochs, "epochs must be a whole number of at least 1", 1)
    if seed is not None:
        torch.manual_seed(checks.check_seed(seed))
    if schedule is not None and (isinstance(schedule, type) or not callable(schedule)):
        given = getattr(schedule, "__name__", type(schedule).__name__)
        raise TypeError(
            f"schedule must be a function (epoch, epochs) -> factor of the learning rate, given {given}: for instance "
            f"lambda epoch, epochs: 0.1 ** (epoch // 30), or auglocal_ext.optim.cosine"
        )
    if epochs > 1 and isinstance(loader, Iterator):
        raise ValueError(
            f"the loader can be gone through only once, which is not enough for {epochs} epochs: give a DataLoader "
            f"or a list, not a generator"
        )
    return epochs


def _make_trainer(model, first, depth, progress, *, memory_budget, optimizer, **options):
    """The LocalTrainer; under a budget that of the cut that is found for it. first: the first batch."""
    images = first[0]
    options["optimizer"] = optimizer or sgd(images.shape[:1].numel())  # of what is no batch at all: refused below
    if memory_budget is not None or depth == "auto":
        planned = plan(model, images.shape, depth, memory_budget=memory_budget, **options)
        if progress:
            tqdm.write(str(planned.choice))
        trainer = LocalTrainer(model, plan=planned)
    else:
        size = images.shape[2:] if images.dim() == 4 else None  # what else it may be is refused below
        trainer = LocalTrainer(model, depth, **options, image_size=size)
    checks.check_device(first, trainer.device, "the loader's ")
    return trainer


def _checked_validation(model, val_loader, epochs, validation):
    """val_loader, or one time through it where that is all there is and is enough, after its first batch was checked.
    validation: options of `Validation`."""
    first, batches = peek(val_loader, "val_loader")
    peeked = Validation(model, prefix="val_loader's ", **validation)
    peeked.check(first)
    peeked.raise_faults()
    if epochs == 1:
        return batches
    if isinstance(val_loader, Iterator):
        raise ValueError("val_loader can be gone through only once: give a DataLoader or a list, not a generator")
    return val_loader


def _bar(epoch, epochs, length, progress):
    bar = tqdm(unit="batch", total=length, leave=False, disable=no_bar(progress), mininterval=0.5)
    bar.set_description(f"epoch {epoch + 1}/{epochs}")
    return bar


def _epoch_line(entry, epochs):
    val = "" if entry["val_accuracy"] is None else f"  test {entry['val_accuracy']:.2%}"
    return (
        f"epoch {entry['epoch']}/{epochs}  loss {entry['loss']:.4f}  train {entry['train_accuracy']:.2%}{val}  "
        f"{entry['images_per_second']:.0f} images/s  peak {entry['peak_bytes'] / 1e6:.1f} MB"
    )
