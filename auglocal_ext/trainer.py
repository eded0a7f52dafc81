"""The training step of local learning, and the loop around it.

A step goes through the local modules from the input to the output. Each module's loss is differentiated at
once; its parameters are stepped, its gradients and activations freed, and only its detached output goes on to
the next module. No loss is ever summed over modules.
"""
import contextlib
import itertools
import signal
import threading
import time
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from .backbone import as_backbone
from .fuse import fuse
from .memory import LiveBytes
from .optim import cosine, make_optimizer, sgd
from .plan import Plan, describe
from .rules import build_head, cut

__all__ = ["LocalTrainer", "StepResult", "TrainResult", "TrainingInterrupted", "assert_isolated", "evaluate", "train"]

PRECISIONS = ("fp32", "bf16")


class LocalModule(nn.Module):
    """Consecutive units of the backbone and the head behind them: x -> (features, logits)."""

    def __init__(self, units, head):
        super().__init__()
        self.body, self.head = nn.Sequential(*units), head

    def forward(self, x):
        features = self.body(x)
        return features, self.head(features)


@dataclass(frozen=True)
class StepResult:
    """What one step computed, before its parameters changed. Tensors on the model's device, detached."""

    loss: torch.Tensor  # (): cross-entropy of the model's own classifier; NaN where the batch was refused
    logits: torch.Tensor  # (N, num_classes), of the model's own classifier
    module_losses: torch.Tensor  # (modules,): each local module's loss, the classifier's last


class LocalTrainer:
    """Trains a model in place, one call of `step` a batch, for people with their own loop.

        trainer = LocalTrainer(model, depth=4)
        for images, labels in loader:
            result = trainer.step(images, labels)

    The model keeps its class, its keys and its behaviour; no hook is left on it. Gradient accumulation and
    clipping by the global norm are not possible: a module's gradients are gone before the next one's exist.

    Args:
        model: see `as_backbone`. It is trained on the device it is on.
        depth, rule, form, modules: how the model is cut; see `auglocal_ext.rules.cut`.
        optimizer: parameters -> torch.optim.Optimizer, called once per local module. Default: SGD with Nesterov
            momentum 0.9, weight decay 1e-4, and the learning rate for batches of 128, 0.1.
        precision: "fp32", or "bf16": features in bfloat16 under autocast, parameters and statistics in fp32.

    Attributes:
        local_modules: list of nn.Module, x -> (features, logits); they share the model's weights.
        aux_nets: nn.ModuleList, one for each local module but the last.
        optimizers: list, one per local module; change their learning rates between steps as you like.
        plan: `auglocal_ext.plan.Plan`, once a first batch has told its shape.
    """

    def __init__(self, model, depth=4, *, rule="auglocal", form=None, modules=None, optimizer=None, precision="fp32"):
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, given {precision!r}")
        backbone = as_backbone(model)
        self._cuts = cut(backbone, depth, rule=rule, form=form, modules=modules)
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                raise ValueError(
                    f"parameter {name} is frozen: local modules train every parameter; call "
                    f"model.requires_grad_(True), or train with the frozen part outside the model"
                )
        self.model, self.precision, self.plan = model, precision, None
        self._backbone, self._rule, self._depth = backbone, rule, depth
        parameter = next(model.parameters())
        self.device = parameter.device
        heads = [build_head(backbone, part) for part in self._cuts]
        self.aux_nets = nn.ModuleList(heads[:-1]).to(parameter.device, parameter.dtype)
        self.local_modules = []
        for part, head in zip(self._cuts, heads, strict=True):
            units = [unit.module for unit in backbone.units[part.first : part.last + 1]]
            self.local_modules.append(LocalModule(units, head))
        self.optimizers = [make_optimizer(optimizer or sgd(128), m.parameters()) for m in self.local_modules]
        blocks = {type(unit.module) for unit in backbone.units} - {nn.Sequential}
        self._fused = [fuse(module, inside=(LocalModule, *blocks)) for module in self.local_modules]
        self._refused = torch.zeros(2, dtype=torch.bool, device=self.device)  # images, labels
        self._values_are_at_hand = self.device.type == "cpu"  # elsewhere reading one waits for the device

    def step(self, images, labels):
        """One training step of every local module.

        Args:
            images: (N, channels, H, W), floating point, on the model's device; N at least 2. Its memory format,
                contiguous or channels_last, is that of the whole step.
            labels: (N,), int64, from 0 to num_classes - 1.

        Returns:
            StepResult. Nothing waits for the device until one of its values is read.

        Raises:
            ValueError, TypeError: the batch does not fit, before any weight changed. What only its values
                tell (labels out of range, images that are not finite) is raised at once on the CPU; on other
                devices it is flagged, the step is taken with those values replaced by zeros, its losses read
                NaN, and `check` raises.
        """
        images, labels, refused = self._check_batch(images, labels)
        if self.plan is None:
            cuts, rule, depth = self._cuts, self._rule, self._depth
            self.plan = describe(self.model, self._backbone, cuts, tuple(images.shape), rule, depth)
        if not self.model.training:
            self.model.train()
        features, losses = images, []
        for index, optimizer in enumerate(self.optimizers):
            try:
                features, logits, loss = self.backward(index, features, labels)
                optimizer.step()
            except Exception as error:
                _say_where_it_stopped(error, index, len(self.optimizers))
                raise
            finally:
                optimizer.zero_grad(set_to_none=True)
            losses.append(loss)
        losses = torch.stack(losses)
        if refused is not None:
            losses = torch.where(refused, torch.nan, losses)
        return StepResult(losses[-1], logits, losses)

    def backward(self, index, features, labels):
        """Forward and backward of one local module, leaving its gradients in its parameters.

        Returns:
            (features, logits, loss): the module's output, its head's and its loss, detached.
        """
        with torch.autocast(features.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            features, logits = self._fused[index](features)
            loss = F.cross_entropy(logits, labels)
        loss.backward()
        return features.detach(), logits.detach(), loss.detach()

    def check(self):
        """Raises ValueError if a batch since the last call was refused on the device. Waits for the device."""
        images, labels = self._refused.tolist()
        self._refused.zero_()
        if images or labels:
            raise ValueError(_bad_labels(self._backbone) if labels else _BAD_IMAGES)

    def set_learning_rate_factor(self, factor):
        """Sets every learning rate to `factor` times what it was when the optimizers were made."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor

    def tensors(self):
        """Every tensor that training keeps between steps: parameters, buffers, optimizer state."""
        for module in (self.model, self.aux_nets):
            yield from itertools.chain(module.parameters(), module.buffers())
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, torch.Tensor))

    def _check_batch(self, images, labels):
        for name, value in (("images", images), ("labels", labels)):
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"{name} must be a tensor, given {type(value).__name__}")
            if value.device != self.device:
                raise ValueError(
                    f"{name} must be on the model's device, {self.device}, given {value.device}: move one of them with .to()"
                )
        channels = self._backbone.image_channels
        if images.dim() != 4 or images.shape[1] != channels:
            raise ValueError(f"images must be (N, {channels}, H, W) for this model, given shape {tuple(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(f"images must be floating point, given {images.dtype}: scale them with .float() / 255")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"labels must be ({len(images)},), one per image, given shape {tuple(labels.shape)}")
        if labels.dtype != torch.int64:
            raise TypeError(f"labels must be int64 class numbers, given {labels.dtype}: convert them with .long()")
        if len(images) < 2:
            raise ValueError(f"a step needs at least 2 images for its batch statistics, given {len(images)}")
        not_finite = ~images.sum().isfinite()
        out_of_range = (labels.amin() < 0) | (labels.amax() >= self._backbone.num_classes)
        if self._values_are_at_hand:
            if not_finite:
                raise ValueError(_BAD_IMAGES)
            if out_of_range:
                raise ValueError(_bad_labels(self._backbone, labels))
            return images, labels, None
        # Reading the flags would wait for the device, and a label out of range would end its context: keep the
        # flags, and take the step on values that harm nothing. For finite images this changes no bit.
        images.nan_to_num_(0, 0, 0)
        self._refused |= torch.stack([not_finite, out_of_range])
        return images, labels.clamp(0, self._backbone.num_classes - 1), not_finite | out_of_range


_BAD_IMAGES = "images must be finite, given NaN or infinite values: look at the data and its normalisation"


def _bad_labels(backbone, labels=None):
    given = "values outside it" if labels is None else f"{labels.min().item()} to {labels.max().item()}"
    return (
        f"labels must be from 0 to {backbone.num_classes - 1} for this model of {backbone.num_classes} classes, given "
        f"{given}: remap the labels, or make the model with num_classes= to fit them"
    )


def _say_where_it_stopped(error, index, count):
    """Adds to the error's message how far the step came; its type stays, so that callers can still tell it."""
    ahead = {0: "No module was changed."}.get(
        index, f"Modules 0 to {index - 1} have taken this step already and are one step ahead of the rest."
    )
    note = f"The step stopped in local module {index} of {count}. {ahead} The model is whole and can be used or saved."
    if error.args and isinstance(error.args[0], str):
        error.args = (f"{error.args[0]}\n{note}", *error.args[1:])


def assert_isolated(trainer, images, labels):
    """Raises AssertionError unless the loss of each local module reaches the parameters of that module and its
    head, all of them, and no others. Changes no parameter; BatchNorm's running statistics see the batch."""
    names = {p: name for name, p in trainer.model.named_parameters()}
    names |= {p: f"aux_nets.{name}" for name, p in trainer.aux_nets.named_parameters()}
    features = images
    for index, module in enumerate(trainer.local_modules):
        features, _, _ = trainer.backward(index, features, labels)
        reached = {p for p in names if p.grad is not None}
        own = set(module.parameters())
        for optimizer in trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if reached != own:
            wrong = ", ".join(sorted(names[p] for p in reached ^ own))
            raise AssertionError(f"the loss of local module {index} reaches, or misses, against its cut: {wrong}")


# ---- the loop ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns.

    history: one dict per epoch, of plain numbers: epoch, loss (of the classifier), module_losses, train_accuracy
        (of the training batches, as they were seen), val_accuracy (None without val_loader), images_per_second,
        seconds, lr (of the last step), peak_bytes.
    plan: the cut that was trained.
    peak_bytes: the highest memory of a step: on CUDA as torch's allocator saw it over the whole training, on
        other devices live tensor bytes, parameters and optimizer state included, in the first two steps.
    aux_nets: with keep_aux_nets, an nn.ModuleList; else None.
    """

    history: list
    plan: Plan
    peak_bytes: int
    aux_nets: nn.ModuleList | None


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C during `train`, raised between two steps. `result`: the TrainResult of the finished epochs."""

    def __init__(self, result):
        super().__init__(f"training interrupted after {len(result.history)} whole epochs")
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
        model: a torchvision ResNet or one of `auglocal_ext.models`.
        loader: an iterable of (images, labels), gone through once per epoch: a DataLoader, a list. Batches on
            the CPU are moved to the model's device.
        depth: the paper's d, layers of an auxiliary net with its classifier; more is more accurate and slower.
        val_loader: like loader; the accuracy on it is measured after each epoch.
        epochs: how often to go through loader.
        rule: "auglocal", or "bp" for plain backpropagation by the same loop.
        form: "cifar" or "imagenet", the two forms of the AugLocal rule; None: the one its authors used for
            such a network. See `auglocal_ext.rules.cut`.
        modules: K, to cut the model into K local modules instead of one per unit.
        optimizer: parameters -> torch.optim.Optimizer, called once per local module; an optimizer class or a
            functools.partial of one. Default: SGD, Nesterov momentum 0.9, weight decay 1e-4, learning rate
            0.1 x batch / 128.
        schedule: (epoch, epochs) -> what to multiply the learning rates by; epoch counts fractions where the
            loader has a length. Default: `auglocal_ext.optim.cosine`.
        precision: "fp32" or "bf16".
        device: moves the model there first. Default: where the model is.
        seed: torch.manual_seed for the aux nets' weights and everything random after.
        progress: a progress bar and a line per epoch.
        on_epoch: called with each epoch's history entry.
        keep_aux_nets: return the aux nets in the result.

    Returns:
        TrainResult

    Raises:
        ValueError, TypeError: an argument or a batch does not fit; see `LocalTrainer`.
        FloatingPointError: a loss is not finite any more.
        TrainingInterrupted: Ctrl-C; a KeyboardInterrupt with the result so far.
    """
    if not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"epochs must be a whole number of at least 1, given {epochs!r}")
    if seed is not None:
        torch.manual_seed(seed)
    if device is not None:
        model.to(device)
    first, batches = _peek(loader)
    optimizer = optimizer or sgd(len(first[0]))
    cutting = {"rule": rule, "form": form, "modules": modules}
    trainer = LocalTrainer(model, depth, optimizer=optimizer, precision=precision, **cutting)
    _check_device(first[0], trainer.device)

    was_training, history = model.training, []
    meter = _PeakMeter(trainer)

    def result():
        return TrainResult(history, trainer.plan, meter.peak, trainer.aux_nets if keep_aux_nets else None)

    stop = threading.Event()
    try:
        with _interrupt_sets(stop):
            for epoch in range(epochs):
                entry = _train_epoch(trainer, batches, loader, epoch, epochs, schedule, meter, progress, stop)
                if val_loader is not None:
                    entry["val_accuracy"] = evaluate(model, val_loader, precision=precision, _stop=stop)
                history.append(entry)
                if progress:
                    tqdm.write(_epoch_line(entry, epochs))
                if on_epoch is not None:
                    on_epoch(entry)
                batches = loader
    except KeyboardInterrupt:
        raise TrainingInterrupted(result()) from None
    finally:
        model.train(was_training)
    return result()


def _peek(loader):
    """The first batch, and an iterable of all of them for the first epoch."""
    batches = iter(loader)
    try:
        first = next(batches)
    except StopIteration:
        raise ValueError("the loader is empty: it gave no batch") from None
    _check_pair(first)
    return first, itertools.chain([first], batches)


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


def _train_epoch(trainer, batches, loader, epoch, epochs, schedule, meter, progress, stop):
    steps = len(loader) if hasattr(loader, "__len__") else None
    losses = correct = torch.zeros((), device=trainer.device)
    seen = taken = 0
    started = time.perf_counter()
    title = f"epoch {epoch + 1}/{epochs}"
    with tqdm(batches, title, steps, unit="batch", leave=False, disable=not progress, mininterval=0.5) as bar:
        for index, batch in enumerate(_until(stop, bar)):
            _check_pair(batch)
            images, labels = _move(batch, trainer.device)
            if len(images) == 1:
                warnings.warn(
                    f"{title}: a batch of one image is skipped, BatchNorm needs at least two; use drop_last=True or "
                    f"another batch size",
                    stacklevel=3,
                )
                continue
            trainer.set_learning_rate_factor(schedule(epoch + (index / steps if steps else 0), epochs))
            with meter:
                result = trainer.step(images, labels)
            losses = losses + result.module_losses * len(images)
            correct = correct + (result.logits.argmax(1) == labels).sum()
            seen, taken = seen + len(images), taken + 1
            if progress and taken % 50 == 1:  # reading a value waits for the device
                bar.set_postfix(loss=f"{result.loss.item():.3f}", refresh=False)
    if not seen:
        raise ValueError(
            f"the loader gave no batch of two images or more in {title}: it must be non-empty, and iterable once per "
            f"epoch (a DataLoader or a list, not a generator)"
        )
    mean_losses = (losses / seen).tolist()
    seconds = time.perf_counter() - started
    trainer.check()
    for index, loss in enumerate(mean_losses):
        if not abs(loss) < float("inf"):
            raise FloatingPointError(
                f"{title}: the loss of local module {index} is {loss}: training diverged; lower the learning rate, "
                f"for instance optimizer=functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9)"
            )
    return {
        "epoch": epoch + 1,
        "loss": mean_losses[-1],
        "module_losses": mean_losses,
        "train_accuracy": (correct / seen).item(),
        "val_accuracy": None,
        "images_per_second": seen / seconds,
        "seconds": seconds,
        "lr": trainer.optimizers[0].param_groups[0]["lr"],
        "peak_bytes": meter.peak,
    }


def _epoch_line(entry, epochs):
    val = "" if entry["val_accuracy"] is None else f"  test {entry['val_accuracy']:.2%}"
    return (
        f"epoch {entry['epoch']}/{epochs}  loss {entry['loss']:.4f}  train {entry['train_accuracy']:.2%}{val}  "
        f"{entry['images_per_second']:.0f} images/s  peak {entry['peak_bytes'] / 1e6:.1f} MB"
    )


class _PeakMeter:
    """`with meter:` around each step; `peak` is the highest memory seen."""

    def __init__(self, trainer):
        self.trainer, self.cuda = trainer, trainer.device.type == "cuda"
        self._peak, self._steps = 0, 0
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(trainer.device)

    @property
    def peak(self):
        return torch.cuda.max_memory_allocated(self.trainer.device) if self.cuda else self._peak

    def __enter__(self):
        # Counting slows a step down; the second step, when all optimizer state exists, is like every later one.
        self._live = LiveBytes(self.trainer.tensors()) if not self.cuda and self._steps < 2 else None
        self._steps += 1
        if self._live is not None:
            self._live.__enter__()

    def __exit__(self, *error):
        if self._live is not None:
            self._live.__exit__(*error)
            self._peak = max(self._peak, self._live.peak)


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
    (a DataLoader's worker processes get the Ctrl-C too)."""
    batches = iter(batches)
    while True:
        try:
            batch = next(batches, None)
        except RuntimeError:
            if stop.is_set():
                raise KeyboardInterrupt from None
            raise
        if stop.is_set():
            raise KeyboardInterrupt
        if batch is None:
            return
        yield batch


@torch.inference_mode()
def evaluate(model, loader, *, precision="fp32", _stop=None):
    """The model's accuracy on a loader of (images, labels), from 0 to 1, in eval mode; the mode is restored."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    correct, seen = torch.zeros((), device=device), 0
    try:
        for batch in _until(_stop or threading.Event(), loader):
            _check_pair(batch)
            images, labels = _move(batch, device)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                correct += (model(images).argmax(1) == labels).sum()
            seen += len(images)
    finally:
        model.train(was_training)
    if not seen:
        raise ValueError("the validation loader is empty: it gave no image, or it can be gone through only once")
    return correct.item() / seen
