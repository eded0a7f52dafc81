"""Optimizers and learning-rate schedules by name, and what an optimizer must be to step one module."""

import inspect
import math
from functools import partial

import torch

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "constant",
    "cosine",
    "exponential",
    "make_optimizer",
    "named_optimizer",
    "paper",
    "sgd",
    "step",
]

OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}


def sgd(batch_size):
    """The paper's optimizer as a factory: SGD, Nesterov momentum 0.9, weight decay 1e-4, lr 0.1 x batch / 128."""
    return named_optimizer("sgd", 0.1 * batch_size / 128)


def named_optimizer(name, lr, momentum=None, weight_decay=None):
    """An optimizer as a factory, for `auglocal_ext.train`.

    Args:
        name: one of OPTIMIZERS.
        lr: the learning rate; None: torch's default for it.
        momentum: of "sgd", where it is Nesterov's and 0.9 by default, and of "rmsprop".
        weight_decay: by default 1e-4 for "sgd", for the others torch's.
    """
    given = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    given = {option: value for option, value in given.items() if value is not None}
    if name == "sgd":
        given = {"momentum": 0.9, "weight_decay": 1e-4} | given
        given["nesterov"] = given["momentum"] > 0
    return partial(_make, kind=OPTIMIZERS[name], **given)


def _make(parameters, kind, **options):
    parameters = list(parameters)
    # Fused where torch has it on every device: the same numbers in one pass, without scratch of the parameters' size.
    if kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        options["fused"] = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters) or None
    return kind(parameters, **options)


def cosine(epoch, epochs, warmup=None):
    """The paper's schedule: cosine from 1 to 0, with a warm-up from 0.01 over the first tenth, at most 10 epochs.

    Args:
        epoch: epochs done so far, a fraction of one included.
        epochs: of the whole training.
        warmup: over so many epochs instead; 0: none.

    Returns:
        what to multiply the learning rate by.
    """
    warmup = min(10, epochs / 10) if warmup is None else warmup
    return _warmed_up(0.5 * (1 + math.cos(math.pi * epoch / epochs)), epoch, warmup)


def step(epoch, epochs, warmup=0):
    """A schedule that goes down to a tenth after each third of the training; for arguments see `cosine`."""
    return _warmed_up(0.1 ** min(2, int(3 * epoch / epochs)), epoch, warmup)


def exponential(epoch, epochs, warmup=0):
    """A schedule from 1 to 0.01, by the same factor in every epoch; for arguments see `cosine`."""
    return _warmed_up(0.01 ** (epoch / epochs), epoch, warmup)


def constant(epoch, epochs, warmup=0):
    """A schedule that leaves the learning rate as it is; for arguments see `cosine`."""
    return _warmed_up(1.0, epoch, warmup)


SCHEDULES = {"cosine": cosine, "step": step, "exponential": exponential, "constant": constant}


def _warmed_up(factor, epoch, warmup):
    """The factor, in the first `warmup` epochs nearer to 0.01."""
    ramp = min(1.0, epoch / warmup) if warmup else 1.0
    return factor * ramp + 0.01 * (1 - ramp)


def paper(lr):
    """The schedule of the paper's code: cosine per epoch, with a warm-up of w = min(10, epochs // 10) epochs.

    In epoch e = 1..w the learning rate is 0.5 lr (1 + cos(pi e / E)) (e - 1) / w + 0.01 (w + 1 - e) / w, where 0.01 is
    a learning rate, not a share of one; then 0.5 lr (1 + cos(pi e / E)), which is 0 in the last epoch, E.

    Args:
        lr: the learning rate that the factor is of, above 0.

    Returns:
        (epoch, epochs) -> factor, for `auglocal_ext.train`.
    """

    def factor(epoch, epochs):
        e, w = int(epoch) + 1, min(10, epochs // 10)
        share = 0.5 * (1 + math.cos(math.pi * e / epochs))
        return share if e > w else share * (e - 1) / w + 0.01 / lr * (w + 1 - e) / w

    return factor


def make_optimizer(factory, parameters):
    """One module's optimizer.

    Args:
        factory: parameters -> torch.optim.Optimizer; an optimizer class, or a partial of one.
        parameters: the module's, its aux net's included.
    """
    if isinstance(factory, torch.optim.Optimizer) or not callable(factory):
        raise TypeError(
            f"optimizer must be a factory, because each local module has its own: given {type(factory).__name__}, "
            f"expected for instance functools.partial(torch.optim.AdamW, lr=1e-3)"
        )
    parameters = list(parameters)
    optimizer = factory(parameters)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must make a torch.optim.Optimizer, given one that makes {type(optimizer).__name__}")
    if {p for group in optimizer.param_groups for p in group["params"]} != set(parameters):
        raise ValueError(
            "optimizer must train exactly the parameters that it is called with, one local module's, given a factory "
            "that takes others: use its argument, as in lambda parameters: torch.optim.SGD(parameters, lr=0.1)"
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if isinstance(optimizer, torch.optim.LBFGS) or (closure and closure.default is inspect.Parameter.empty):
        raise ValueError(
            f"{type(optimizer).__name__} cannot train local modules: it re-evaluates the loss in step(), when the "
            f"module's activations are gone already; choose one without a closure, such as SGD or AdamW"
        )
    optimizer.register_load_state_dict_post_hook(_lay_out_state)
    return optimizer


def _lay_out_state(optimizer):
    """Gives state that was loaded its parameters' strides: fused optimizers go over both side by side in memory."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            beside = isinstance(value, torch.Tensor) and value.shape == parameter.shape
            if beside and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
