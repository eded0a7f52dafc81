"""The training loop around the local step: epochs, validation, memory, Ctrl-C."""

import contextlib
import gc
import signal
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from ._device import usable_device
from .memory import LiveBytes
from .optim import constant, cosine, sgd
from .plan import Plan, plan
from .trainer import LocalTrainer

__all__ = ["TrainResult", "TrainingInterrupted", "evaluate", "train"]


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
        FloatingPointError: a loss is not finite any more.
        TrainingInterrupted: Ctrl-C; a KeyboardInterrupt with the result so far.
    """
    if not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"epochs must be a whole number of at least 1, given {epochs!r}")
    if seed is not None:
        torch.manual_seed(seed)
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
    optimizer = optimizer or sgd(len(first[0]))
    cutting = {"rule": rule, "form": form, "modules": modules}
    options = {"precision": precision, "recompute": recompute, "optimizer": optimizer}
    if memory_budget is not None or depth == "auto":
        planned = plan(model, first[0].shape, depth, memory_budget=memory_budget, **cutting, **options)
        cutting = {"rule": planned.choice.rule, "borders": planned.borders}
        if progress:
            tqdm.write(str(planned.choice))
    size = first[0].shape[2:] if first[0].dim() == 4 else None  # what else it may be is refused below
    trainer = LocalTrainer(model, depth, **cutting, **options, image_size=size)
    _check_device(first[0], trainer.device)
    del first  # its images would live through the whole training
    if val_loader is not None:
        (images, _), checked = _peek(val_loader, "val_loader")
        trainer.check_images(_move((images, images), trainer.device)[0], "val_loader's images")
        del images
        if epochs == 1:
            val_loader = checked
        elif isinstance(val_loader, Iterator):
            raise ValueError("val_loader can be gone through only once: give a DataLoader or a list, not a generator")
        del checked  # with its first batch

    modes, history = _modes(model), []
    epoch_length = _length(loader)
    meter = _PeakMeter(trainer)

    def result():
        return TrainResult(history, trainer.plan, meter.peak, trainer.aux_nets if keep_aux_nets else None)

    stop = threading.Event()
    try:
        with _interrupt_sets(stop):
            for epoch in range(epochs):
                bar = tqdm(unit="batch", total=epoch_length, leave=False, disable=_no_bar(progress), mininterval=0.5)
                bar.set_description(f"epoch {epoch + 1}/{epochs}")
                factor = _factor(schedule or constant, epoch, epochs, epoch_length)
                with bar:
                    entry, epoch_length = _train_epoch(trainer, batches, epoch, epochs, factor, meter, bar, stop)
                if val_loader is not None:
                    top1, top5 = _accuracies(model, val_loader, precision, progress, stop)
                    entry |= {"val_accuracy": top1, "val_top5_accuracy": top5}
                history.append(entry)
                if progress:
                    tqdm.write(_epoch_line(entry, epochs))
                if on_epoch is not None:
                    on_epoch(entry)
                batches = loader
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
    if not isinstance(loader, Iterable):
        raise TypeError(f"{name} must be an iterable of (images, labels), given {type(loader).__name__}")
    batches = iter(loader)
    try:
        first = next(batches)
    except StopIteration:
        raise ValueError(f"{name} is empty: it gave no batch") from None
    _check_pair(first)
    return first, _chain([first], batches)


def _chain(first, batches):
    """itertools.chain, but without keeping the first batch once it was given."""
    while first:
        yield first.pop()
    yield from batches


def _length(loader):
    """Batches per epoch, None where the loader cannot tell, as one over an IterableDataset."""
    try:
        return len(loader)
    except TypeError:
        return None


def _no_bar(progress):
    """tqdm's `disable`: a bar only where there is a terminal to draw it on."""
    return None if progress else True


def _factor(schedule, epoch, epochs, length):
    """Step -> the schedule's factor; in the middle of the epoch where its length is not known yet."""
    return lambda step: schedule(epoch + (step / length if length else 0.5), epochs)


def _modes(model):
    return [(module, module.training) for module in model.modules()]


def _restore(modes):
    for module, training in modes:
        module.training = training


def _check_pair(batch):
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not all(isinstance(t, torch.Tensor) for t in batch):
        raise TypeError(f"the loader must give pairs of tensors (images, labels), given {_describe(batch)}")


def _describe(batch):
    if isinstance(batch, tuple | list):
        return f"a {type(batch).__name__} of {', '.join(type(part).__name__ for part in batch) or 'nothing'}"
    return f"a {type(batch).__name__}"


def _check_device(images, device):
    if images.device.type not in ("cpu", device.type):
        raise ValueError(
            f"the model is on {device}, the loader's images on {images.device}: pass device='{images.device}', or "
            f"let the loader give CPU tensors"
        )


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
        _check_pair(batch)
        batch = images, labels = _move(batch, trainer.device)  # no second name keeps the loader's own tensors
        bar.update()
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
        if not abs(loss) < float("inf"):
            raise FloatingPointError(
                f"{title}: the loss of local module {index} is {loss}: training diverged; lower the learning rate, "
                f"for instance optimizer=functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9)"
            )
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
    """The model's accuracy on a loader of (images, labels), from 0 to 1, in eval mode; the modes are restored."""
    return _accuracies(model, loader, precision, progress, threading.Event())[0]


def _accuracies(model, loader, precision, progress, stop):
    """(top-1, top-5) accuracy; top-5 None for fewer than 6 classes."""
    device = next(model.parameters()).device
    modes = _modes(model)
    model.eval()
    correct, seen, out_of_range = torch.zeros(2, device=device), 0, torch.zeros((), dtype=torch.bool, device=device)
    bar = tqdm(
        desc="test", total=_length(loader), unit="batch", leave=False, disable=_no_bar(progress), mininterval=0.5
    )
    try:
        for batch in _until(stop, loader):
            _check_pair(batch)
            images, labels = _move(batch, device)
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, precision == "bf16"):
                logits = model(images)
                hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
                correct += torch.stack([hits[:, 0].sum(), hits.sum()])
                out_of_range |= ((labels < 0) | (labels >= logits.shape[1])).any()
            seen += len(images)
            bar.update()
    finally:
        bar.close()
        _restore(modes)
    if not seen:
        raise ValueError("the validation loader is empty: it gave no image, or it can be gone through only once")
    if out_of_range:
        raise ValueError(f"validation labels must be from 0 to {logits.shape[1] - 1} for this model: remap them")
    top1, top5 = (correct.double() / seen).tolist()
    return top1, top5 if logits.shape[1] > 5 else None
