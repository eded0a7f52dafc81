"""The training loop around the local step: epochs, validation, memory, Ctrl-C."""

import contextlib
import gc
import math
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn
from tqdm import tqdm

from . import _checks
from ._device import usable_device
from .memory import LiveBytes
from .optim import constant, cosine, sgd
from .plan import Plan, plan
from .trainer import LocalTrainer

__all__ = ["TrainResult", "TrainingDiverged", "TrainingInterrupted", "evaluate", "train"]


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


class TrainingDiverged(FloatingPointError):
    """The training went wrong: a loss, a weight or an output is not finite, or the classifier is far worse at the end
    than at the start. `result`: the TrainResult of the finished epochs; the model is as the last step left it."""

    def __init__(self, message, result):
        super().__init__(message)
        self.result = result


class _NotFinite(FloatingPointError):
    """What `train` makes a TrainingDiverged of."""


def train(
    model,
    loader,
    depth=4,
    *,
    val_loader=None,
    epochs=10,
    rule="auglocal",
    form=None,
    modules=None,
    memory_budget=None,
    recompute=False,
    optimizer=None,
    schedule=cosine,
    precision="fp32",
    device=None,
    seed=None,
    progress=True,
    on_epoch=None,
    keep_aux_nets=False,
):
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
    epochs = _checks.whole_number(epochs, "epochs must be a whole number of at least 1", 1)
    if seed is not None:
        torch.manual_seed(_checks.check_seed(seed))
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
    if device is not None:
        model.to(usable_device(device))
    first, batches = _peek(loader, "the loader")
    optimizer = optimizer or sgd(first[0].shape[:1].numel())  # of what is no batch at all: refused below
    cutting = {"rule": rule, "form": form, "modules": modules}
    options = {"precision": precision, "recompute": recompute, "optimizer": optimizer}
    searched = {}  # what the plan keeps of a search under a budget
    if memory_budget is not None or depth == "auto":
        planned = plan(model, first[0].shape, depth, memory_budget=memory_budget, **cutting, **options)
        cutting = {"rule": planned.choice.rule, "borders": planned.borders}
        searched = {"choice": planned.choice, "eager": planned.eager}
        if progress:
            tqdm.write(str(planned.choice))
    size = first[0].shape[2:] if first[0].dim() == 4 else None  # what else it may be is refused below
    trainer = LocalTrainer(model, depth, **cutting, **options, image_size=size)
    _checks.check_device(first, trainer.device, "the loader's ")
    del first  # its images would live through the whole training
    validation = {"precision": precision, "channels": trainer.image_channels, "classes": trainer.num_classes}
    if val_loader is not None:
        first, checked = _peek(val_loader, "val_loader")
        peeked = _Validation(model, prefix="val_loader's ", **validation)
        peeked.check(first)
        peeked.raise_faults()
        del first, peeked
        if epochs == 1:
            val_loader = checked
        elif isinstance(val_loader, Iterator):
            raise ValueError("val_loader can be gone through only once: give a DataLoader or a list, not a generator")
        del checked  # with its first batch

    modes, history, odd = _modes(model), [], _not_finite(trainer)
    epoch_length = _length(loader)
    meter = _PeakMeter(trainer)

    def result():
        planned = trainer.plan and replace(trainer.plan, **searched)
        return TrainResult(history, planned, meter.peak, trainer.aux_nets if keep_aux_nets else None)

    stop = threading.Event()
    try:
        with _interrupt_sets(stop):
            for epoch in range(epochs):
                bar = tqdm(unit="batch", total=epoch_length, leave=False, disable=_no_bar(progress), mininterval=0.5)
                bar.set_description(f"epoch {epoch + 1}/{epochs}")
                factor = _factor(schedule or constant, epoch, epochs, epoch_length)
                with bar:
                    entry, epoch_length = _train_epoch(trainer, batches, epoch, epochs, factor, meter, bar, stop)
                _check_finite(trainer, odd, entry, epochs)
                if val_loader is not None:
                    top1, top5 = _accuracies(_Validation(model, **validation), val_loader, progress, stop)
                    entry |= {"val_accuracy": top1, "val_top5_accuracy": top5}
                history.append(entry)
                if progress:
                    tqdm.write(_epoch_line(entry, epochs))
                if on_epoch is not None:
                    on_epoch(entry)
                batches = loader
        _check_learnt(history, trainer)
    except _NotFinite as error:
        raise TrainingDiverged(f"{error}: training diverged; {_REMEDY}", result()) from None
    except KeyboardInterrupt as stopped:
        raise TrainingInterrupted(result(), str(stopped)) from None
    finally:
        _restore(modes)
        # The rewritten modules are reference cycles; with them the aux nets' memory goes now, not at some later time.
        outcome = result()
        trainer = meter = batches = None
        gc.collect()
    return outcome


def _peek(loader, name):
    """The first batch, and an iterable of all of them for one time through."""
    # Not isinstance(..., Iterable): what has __getitem__ alone can be gone through too.
    if not any(hasattr(type(loader), method) for method in ("__iter__", "__getitem__")):
        raise TypeError(f"{name} must be an iterable of (images, labels), given {type(loader).__name__}")
    batches = iter(loader)
    try:
        first = next(batches)
    except StopIteration:
        raise ValueError(f"{name} is empty: it gave no batch") from None
    _checks.check_pair(first, name)
    return first, _chain([first], batches)


def _chain(first, batches):
    """itertools.chain, but without keeping the first batch once it was given."""
    while first:
        yield first.pop()
    yield from batches


def _length(loader):
    """Batches per epoch, None where the loader cannot tell, as one over an IterableDataset: whatever it raises then."""
    try:
        return len(loader)
    except Exception:
        return None


def _no_bar(progress):
    """tqdm's `disable`: a bar only where there is a terminal to draw it on."""
    return None if progress else True


def _factor(schedule, epoch, epochs, length):
    """Step -> the schedule's factor; in the middle of the epoch where its length is not known yet."""

    def factor(step):
        at = epoch + (step / length if length else 0.5)
        expected = f"schedule(epoch, epochs) must return, at epoch {at:g} of {epochs},"
        return _checks.learning_rate_factor(schedule(at, epochs), expected)

    return factor


def _modes(model):
    return [(module, module.training) for module in model.modules()]


def _restore(modes):
    for module, training in modes:
        module.training = training


def _move(batch, device):
    """A batch on the model's device; images on CUDA in channels_last, which its convolutions are fastest in."""
    images, labels = batch
    if device.type == "cuda" and images.dim() == 4:
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
    else:
        images = images.to(device, non_blocking=True)
    return images, labels.to(device, non_blocking=True)


def _train_epoch(trainer, batches, epoch, epochs, factor, meter, bar, stop):
    losses = correct = torch.zeros((), device=trainer.device)
    seen = steps = 0
    started = shown = time.perf_counter()
    title = f"epoch {epoch + 1}/{epochs}"
    for batch in _until(stop, batches):  # no enumerate(): it keeps its last value until the next is there
        _checks.check_pair(batch, "the loader")
        _checks.check_device(batch, trainer.device, "the loader's ")
        batch = images, labels = _move(batch, trainer.device)  # no second name keeps the loader's own tensors
        bar.update()
        trainer.check_images(images)
        if len(images) == 1:
            warnings.warn(
                f"{title}: a batch of one image is skipped, BatchNorm needs at least two; use drop_last=True or "
                f"another batch size",
                stacklevel=3,
            )
            continue
        trainer.set_learning_rate_factor(factor(steps))
        trainer.plan_for(images)  # outside of what is measured
        with meter(images, labels):
            result = trainer.step(images, labels)
        losses = losses + result.module_losses * len(images)
        correct = correct + (result.logits.argmax(1) == labels).sum()
        seen, steps = seen + len(images), steps + 1
        if not bar.disable and time.perf_counter() - shown > 1:  # seconds: reading a value waits for the device
            trainer.check()
            bar.set_postfix(loss=f"{result.loss.item():.3f}", refresh=False)
            shown = time.perf_counter()
        del batch, images, labels, result
    if not seen:
        raise ValueError(f"the loader gave no batch of two images or more in {title}: it must give some in every epoch")
    mean_losses = (losses / seen).tolist()
    seconds = time.perf_counter() - started
    trainer.check()
    for index, loss in enumerate(mean_losses):
        if not math.isfinite(loss):
            raise _NotFinite(f"{title}: the loss of local module {index} is {loss}")
    entry = {
        "epoch": epoch + 1,
        "loss": mean_losses[-1],
        "module_losses": mean_losses,
        "train_accuracy": (correct / seen).item(),
        "val_accuracy": None,
        "val_top5_accuracy": None,
        "images_per_second": seen / seconds,
        "seconds": seconds,
        "lr": trainer.optimizers[0].param_groups[0]["lr"],
        "peak_bytes": meter.peak,
    }
    return entry, steps


_REMEDY = "lower the learning rate, for instance optimizer=functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9)"


def _not_finite(trainer):
    """Names of the model's and the aux nets' parameters and buffers that have a value that is NaN or infinite."""
    named = {}
    for prefix, module in (("", trainer.model), ("aux_nets.", trainer.aux_nets)):
        tensors = [*module.named_parameters(), *module.named_buffers()]
        named |= {prefix + name: tensor for name, tensor in tensors if tensor.is_floating_point()}
    finite = torch.stack([tensor.detach().isfinite().all() for tensor in named.values()])
    return [name for name, is_finite in zip(named, finite.tolist(), strict=True) if not is_finite]


def _check_finite(trainer, odd, entry, epochs):
    """Looks for what the last update may have spoilt, which no loss has told yet; odd: what was so from the start, a
    mask of infinite values for instance."""
    spoilt = [name for name in _not_finite(trainer) if name not in odd]
    if spoilt:
        raise _NotFinite(f"epoch {entry['epoch']}/{epochs}: {spoilt[0]} has values that are NaN or infinite")


def _check_learnt(history, trainer):
    first, last, guessing = history[0]["loss"], history[-1]["loss"], math.log(trainer.num_classes)
    if last > 2 * max(first, guessing):
        raise _NotFinite(
            f"the classifier's cross-entropy was {last:.4g} in the last epoch, after {first:.4g} in the first one; "
            f"guessing has {guessing:.4g}"
        )


def _epoch_line(entry, epochs):
    val = "" if entry["val_accuracy"] is None else f"  test {entry['val_accuracy']:.2%}"
    return (
        f"epoch {entry['epoch']}/{epochs}  loss {entry['loss']:.4f}  train {entry['train_accuracy']:.2%}{val}  "
        f"{entry['images_per_second']:.0f} images/s  peak {entry['peak_bytes'] / 1e6:.1f} MB"
    )


class _PeakMeter:
    """`with meter(*batch):` around each step; `peak` is the highest memory seen."""

    def __init__(self, trainer):
        self.trainer, self.cuda = trainer, trainer.device.type == "cuda"
        self.peak, self._steps = 0, 0

    @contextlib.contextmanager
    def __call__(self, *batch):
        self._steps += 1
        if self.cuda:
            device = self.trainer.device
            torch.cuda.reset_peak_memory_stats(device)  # an evaluation's peak is none of a step
            yield
            self.peak = max(self.peak, torch.cuda.max_memory_allocated(device))
        elif self._steps > 2:
            # Counting slows a step down; the second one, when all optimizer state exists, is like every later one.
            yield
        else:
            with LiveBytes([*self.trainer.tensors(), *batch]) as live:
                yield
            self.peak = max(self.peak, live.peak)


@contextlib.contextmanager
def _interrupt_sets(stop):
    """Within, a first Ctrl-C sets `stop`, to be acted on between steps; a second one interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_interrupt(signum, frame):
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _until(stop, batches):
    """The batches, until `stop` is set: then KeyboardInterrupt, also where the wait for a batch failed by it
    (a DataLoader's worker processes get the Ctrl-C too, and die in the middle of sending one)."""
    batches, end = iter(batches), object()
    while True:
        try:
            batch = next(batches, end)
        except Exception:
            if stop.is_set():
                raise KeyboardInterrupt from None
            raise
        if stop.is_set():
            raise KeyboardInterrupt
        if batch is end:
            return
        yield batch
        del batch


def evaluate(model, loader, *, precision="fp32", progress=False):
    """The model's accuracy on a loader, in eval mode; the modes are restored.

    Args:
        model: any classifier, images -> (N, classes).
        loader: an iterable of (images, labels): floating-point images of the model's dtype, int64 labels (N,).
        precision: "fp32", or "bf16": under autocast.
        progress: a progress bar.

    Returns:
        from 0 to 1.

    Raises:
        ValueError, TypeError: a batch does not fit the model, its values are not finite, or there is none.
        FloatingPointError: the model's outputs are not finite.
    """
    return _accuracies(_Validation(model, precision), loader, progress, threading.Event())[0]


class _Validation:
    """Checks the batches of a validation as a step checks its own, and counts hits. What only values tell is raised at
    once on the CPU; on other devices it is flagged, so that nothing waits for them but `raise_faults`.

    Args:
        channels, classes: of the model, where they are known beforehand.
        prefix: of the names in messages.
    """

    def __init__(self, model, precision="fp32", channels=None, classes=None, prefix="validation "):
        self.model, self.precision, self.prefix = model, precision, prefix
        self.channels, self.classes = channels, classes
        first = next(model.parameters(), torch.empty(0))
        self.device, self.dtype = first.device, first.dtype
        self.hits = torch.zeros(2, device=self.device)  # in the first place, in the first five
        self.faults = torch.zeros(3, dtype=torch.bool, device=self.device)  # of images, labels, outputs

    def check(self, batch):
        """The batch on the model's device; raises for what can be told without running the model."""
        _checks.check_device(batch, self.device, self.prefix)
        images, labels = batch = _move(batch, self.device)
        options = {"channels": self.channels, "half": self.precision == "bf16", "prefix": self.prefix}
        _checks.check_batch(images, labels, self.device, self.dtype, **options)
        self._note(0, _checks.not_finite(images, self.dtype))
        if self.classes is not None and len(labels):
            self._note(1, _checks.out_of_range(labels, self.classes), labels)
        return batch

    def add(self, batch):
        """Runs the model on a batch; returns how many images it has."""
        images, labels = self.check(batch)
        if not len(images):
            return 0
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, self.precision == "bf16"):
            logits = self._logits(images)
            if self.classes is None:
                self.classes = logits.shape[1]
                self._note(1, _checks.out_of_range(labels, self.classes), labels)
            # -inf is how classes are masked; a row of nothing else is not.
            self._note(2, (logits.isnan() | (logits == torch.inf)).any() | ~logits.isfinite().any(1).all())
            hits = logits.topk(min(5, self.classes)).indices == labels[:, None]
            self.hits += torch.stack([hits[:, 0].sum(), hits.sum()])
        return len(images)

    def accuracies(self, seen):
        """(top-1, top-5) accuracy of so many images; top-5 None for fewer than 6 classes."""
        self.raise_faults()
        top1, top5 = (self.hits.double() / seen).tolist()
        return top1, top5 if self.classes > 5 else None

    def raise_faults(self):
        """Raises for what is flagged. Waits for the device."""
        for index, fault in enumerate(self.faults.tolist()):
            if fault:
                raise self._error(index)

    def _logits(self, images):
        try:
            logits = self.model(images)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                f"the model cannot be run on {self.prefix}images of shape {tuple(images.shape)}, {images.dtype}: "
                f"{str(error).partition(chr(10))[0]}"
            ) from error
        is_tensor = isinstance(logits, torch.Tensor)
        shape = len(images), self.classes or (logits.shape[-1] if is_tensor and logits.dim() else 1)
        if not is_tensor or logits.shape != shape or not logits.is_floating_point():
            given = f"{tuple(logits.shape)} of {logits.dtype}" if is_tensor else f"a {type(logits).__name__}"
            raise ValueError(
                f"the model must give a row of floating-point outputs per image, ({len(images)}, "
                f"{self.classes or 'classes'}), given {given}"
            )
        return logits

    def _note(self, index, fault, labels=None):
        if self.device.type != "cpu":
            self.faults[index] |= fault
        elif fault:
            raise self._error(index, labels)

    def _error(self, index, labels=None):
        if index == 0:
            return _checks.bad_images(self.prefix)
        if index == 1:
            return _checks.bad_labels(self.classes, labels, self.prefix)
        return _NotFinite(
            f"the model's outputs for {self.prefix}images are NaN or infinite: its weights or running statistics are, "
            f"or are far too large"
        )


def _accuracies(validation, loader, progress, stop):
    """(top-1, top-5) accuracy of the model on the loader; top-5 None for fewer than 6 classes."""
    modes, seen = _modes(validation.model), 0
    validation.model.eval()
    bar = tqdm(
        desc="test", total=_length(loader), unit="batch", leave=False, disable=_no_bar(progress), mininterval=0.5
    )
    try:
        for batch in _until(stop, loader):
            _checks.check_pair(batch, "the validation loader")
            seen += validation.add(batch)
            bar.update()
    finally:
        bar.close()
        _restore(modes)
    if not seen:
        raise ValueError("the validation loader is empty: it gave no image, or it can be gone through only once")
    return validation.accuracies(seen)
