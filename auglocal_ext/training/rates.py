"""How learning rates go through a training: by a function of the epoch, or by torch's schedulers."""

import inspect

from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from ..common import checks
from ..common.messages import first_line, plural

__all__ = ["ByFunction", "BySchedulers", "check_schedule", "makes_schedulers", "rates_of"]


def check_schedule(schedule):
    """TypeError unless it is a function (epoch, epochs) -> factor, or a factory of schedulers."""
    fits = callable(schedule) and (makes_schedulers(schedule) or _takes_epochs(schedule))
    if not fits or (isinstance(schedule, type) and not makes_schedulers(schedule)):
        given = getattr(schedule, "__name__", type(schedule).__name__)
        raise TypeError(
            f"schedule must be a function (epoch, epochs) -> factor of the learning rate, given {given}: for instance "
            f"lambda epoch, epochs: 0.1 ** (epoch // 30), or auglocal_ext.optim.cosine; or one of an optimizer alone, "
            f"as lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 30)"
        )


def rates_of(schedule, trainer, epochs):
    """What steps the learning rates of a training by its schedule."""
    return BySchedulers(schedule, trainer) if makes_schedulers(schedule) else ByFunction(schedule, trainer, epochs)


def makes_schedulers(schedule):
    """Whether it needs one argument, an optimizer, and not (epoch, epochs)."""
    try:
        parameters = inspect.signature(schedule).parameters.values()
    except (TypeError, ValueError):  # a callable that has no signature
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters) == 1


def _takes_epochs(schedule):
    """Whether it can be called with (epoch, epochs), as far as its signature tells."""
    try:
        signature = inspect.signature(schedule)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(0, 1)
    except TypeError:
        return False
    return True


class ByFunction:
    """Learning rates by (epoch, epochs) -> factor.

    Attributes:
        state: None; see `BySchedulers`.
        sets: names of the settings of optimizers that it changes beside the learning rate.
        moved: whose learning rates hold where another number of ranks goes on, in words.
    """

    state, sets, moved = None, (), "by the optimizer that is given now"

    def __init__(self, function, trainer, epochs):
        self._function, self._trainer, self._epochs = function, trainer, epochs

    def before_step(self, epoch, step, length):
        """Before the batches of an optimizer's step; epoch, step: from 0; length: of an epoch, None: not known."""
        at = epoch + (step / length if length else 0.5)
        expected = f"schedule(epoch, epochs) must return, at epoch {at:g} of {self._epochs},"
        self._trainer.set_learning_rate_factor(checks.learning_rate_factor(self._function(at, self._epochs), expected))

    def after_step(self):
        """After an optimizer's step."""

    def after_epoch(self, entry):
        """After an epoch; entry: its history's."""

    def check(self, state):
        """ValueError unless an earlier process's `state` can be gone on from."""
        if state is not None:
            raise ValueError(_another(state["kinds"][0], "a function"))

    def check_moved(self, ranks):
        """ValueError unless a state of so many ranks, which is another number than these, can be gone on from."""

    def load(self, state):
        """Goes on from there."""


_EXPECTED = (
    "schedule, a function of one argument, must make a torch.optim.lr_scheduler of the optimizer that it is called with"
)
_FOR_INSTANCE = "for instance lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 30)"


class BySchedulers:
    """Learning rates by torch.optim.lr_scheduler, of which each local module's optimizer has one. They step after each
    epoch, but those that torch has after each batch, OneCycleLR and CyclicLR, after each step of the optimizers;
    ReduceLROnPlateau by the validation's loss, where there is none by that of training.

    Raises:
        TypeError: the factory makes no scheduler of the optimizer that it is given.
    """

    sets, moved = ("momentum", "betas"), "as its schedulers had them"  # there are schedulers that cycle these

    def __init__(self, factory, trainer):
        for group in (group for optimizer in trainer.optimizers for group in optimizer.param_groups):
            group.setdefault("initial_lr", group["lr"])  # by which a checkpoint knows it; not every scheduler keeps it
        try:
            self._schedulers = [factory(optimizer) for optimizer in trainer.optimizers]
        except Exception as error:
            raise TypeError(f"{_EXPECTED}, which failed: {first_line(error)}; {_FOR_INSTANCE}") from error
        for optimizer, made in zip(trainer.optimizers, self._schedulers, strict=True):
            if not isinstance(made, LRScheduler) or made.optimizer is not optimizer:
                raise TypeError(f"{_EXPECTED}, given one that makes {type(made).__name__}: {_FOR_INSTANCE}")
        self._by_step = isinstance(self._schedulers[0], OneCycleLR | CyclicLR)

    def before_step(self, epoch, step, length):
        pass

    def after_step(self):
        if self._by_step:
            for scheduler in self._schedulers:
                scheduler.step()

    def after_epoch(self, entry):
        loss = entry["loss"] if entry["val_loss"] is None else entry["val_loss"]
        for scheduler in self._schedulers if not self._by_step else ():
            scheduler.step(*[loss] * isinstance(scheduler, ReduceLROnPlateau))

    @property
    def state(self):
        """Plain values; what torch.load(weights_only=True) can load."""
        return {"kinds": self._kinds, "states": [scheduler.state_dict() for scheduler in self._schedulers]}

    @property
    def _kinds(self):
        return [type(scheduler).__name__ for scheduler in self._schedulers]

    def check(self, state):
        if state is None or state["kinds"] != self._kinds:
            raise ValueError(_another(state["kinds"][0] if state else "a function", self._kinds[0]))

    def check_moved(self, ranks):
        if self._by_step:
            raise ValueError(
                f"{self._kinds[0]} counts steps, of which another number of ranks makes others: go on with "
                f"{plural(ranks, 'rank')} as before, or train from the beginning in another folder"
            )

    def load(self, state):
        for scheduler, own in zip(self._schedulers, state["states"], strict=True):
            scheduler.load_state_dict(own)


def _another(saved, given):
    return f"the checkpoint's schedule is {saved}, given {given}: give the same schedule=, or another folder"
