"""Optimizers and learning-rate schedules by name, and what an optimizer must be to step one module."""

import inspect
import math
from functools import partial

import torch

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "begin_momentum",
    "constant",
    "cosine",
    "exponential",
    "make_optimizer",
    "named_optimizer",
    "no_decay_on_norms",
    "paper",
    "sgd",
    "step",
    "takes_names",
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
    """The paper's optimizer as a factory: SGD, Nesterov momentum 0.9, weight decay 1e-4, lr 0.1 x batch / 128.

    Args:
        batch_size: images that one step of the optimizer goes by: of all ranks, and of batches accumulated together.

    Returns:
        parameters -> torch.optim.SGD.
    """
    return named_optimizer("sgd", 0.1 * batch_size / 128)


def named_optimizer(name, lr, momentum=None, weight_decay=None, norm_weight_decay=None, bias_weight_decay=None):
    """An optimizer as a factory, for `auglocal_ext.train`.

    Args:
        name: one of OPTIMIZERS: "sgd", "adam", "adamw", "nadam", "radam", "adagrad", "rmsprop".
        lr: the learning rate; None: torch's default for it.
        momentum: of "sgd", where it is Nesterov's and 0.9 by default, and of "rmsprop", torch's by default; the others
            have none.
        weight_decay: by default 1e-4 for "sgd", for the others torch's.
        norm_weight_decay: of normalisations, see `no_decay_on_norms`; None: as of the others.
        bias_weight_decay: of biases, likewise.

    Returns:
        A factory: parameters -> torch.optim.Optimizer; with one of the last two it takes [(name, parameter)].

    Raises:
        ValueError: there is no such name. What else does not fit torch tells when an optimizer is made.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"an optimizer's name must be one of {', '.join(OPTIMIZERS)}, given {name!r}")
    given = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    given = {option: value for option, value in given.items() if value is not None}
    if name == "sgd":
        given = {"momentum": 0.9, "weight_decay": 1e-4} | given
        given["nesterov"] = given["momentum"] > 0
    factory = partial(_make, kind=OPTIMIZERS[name], **given)
    if norm_weight_decay is None and bias_weight_decay is None:
        return factory
    return no_decay_on_norms(factory, norm_weight_decay, bias_weight_decay)


def _make(parameters, kind, **options):
    """parameters: or groups of them."""
    parameters = list(parameters)
    each = [p for one in parameters for p in (one["params"] if isinstance(one, dict) else [one])]
    # Fused where torch has it on every device: the same numbers in one pass, without scratch of the parameters' size.
    if kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        options["fused"] = all(parameter.device.type in ("cpu", "cuda") for parameter in each) or None
    return kind(parameters, **options)


def no_decay_on_norms(factory, norm_weight_decay=0.0, bias_weight_decay=0.0):
    """A factory of optimizers with another weight decay for normalisations and biases, as torchvision's references
    have it by the same names; for `auglocal_ext.train`.

    Args:
        factory: groups of parameters -> torch.optim.Optimizer; an optimizer class with a weight_decay, or a partial.
        norm_weight_decay: of normalisations: of weights of one dimension and the biases beside them. None: as others.
        bias_weight_decay: of every bias, those of normalisations included. None: as of what it is beside.

    Both go by names: a bias is what ends in "bias", a weight what is called "weight".

    Returns:
        [(name, parameter)] -> torch.optim.Optimizer, with the groups that are not empty.
    """
    return partial(_decay_apart, factory=factory, norm=norm_weight_decay, bias=bias_weight_decay)


def _decay_apart(named, factory, norm, bias):
    groups = {
        "others": {"params": []},
        "norms": {"params": [], "weight_decay": norm},
        "biases": {"params": [], "weight_decay": bias},
    }
    named = dict(named)
    for name, parameter in named.items():
        place, _, last = name.rpartition(".")
        weight = named.get(f"{place}.weight" if place else "weight")
        if bias is not None and last.endswith("bias"):  # in_proj_bias too
            kind = "biases"
        elif norm is not None and weight is not None and weight.ndim == 1 and last in ("weight", "bias"):
            kind = "norms"
        else:
            kind = "others"
        groups[kind]["params"].append(parameter)
    return factory([group for group in groups.values() if group["params"]])


def cosine(epoch, epochs, warmup=None):
    """A schedule from 1 to 0 along a cosine, with a warm-up from 0.01, as the paper has it; `paper` is its very code's.

    The cosine is (1 + cos(pi epoch / epochs)) / 2: Loshchilov and Hutter 2017 (arXiv:1608.03983), equation 5, without
    restarts.

    Args:
        epoch: epochs done so far, a fraction of one included.
        epochs: of the whole training.
        warmup: epochs that the warm-up takes; None: a tenth of the training, at most 10; 0: none.

    Returns:
        What to multiply the learning rate by.
    """
    warmup = min(10, epochs / 10) if warmup is None else warmup
    return _warmed_up(0.5 * (1 + math.cos(math.pi * epoch / epochs)), epoch, warmup)


def step(epoch, epochs, warmup=0):
    """A schedule that goes down to a tenth after each third of the training: 1, 0.1, 0.01.

    Args:
        epoch, epochs: see `cosine`.
        warmup: epochs that a warm-up from 0.01 takes.

    Returns:
        What to multiply the learning rate by.
    """
    return _warmed_up(0.1 ** min(2, int(3 * epoch / epochs)), epoch, warmup)


def exponential(epoch, epochs, warmup=0):
    """A schedule from 1 to 0.01, by the same factor in every epoch: 0.01 ** (epoch / epochs).

    Args:
        epoch, epochs: see `cosine`.
        warmup: epochs that a warm-up from 0.01 takes.

    Returns:
        What to multiply the learning rate by.
    """
    return _warmed_up(0.01 ** (epoch / epochs), epoch, warmup)


def constant(epoch, epochs, warmup=0):
    """A schedule that leaves the learning rate as it is.

    Args:
        epoch, epochs: see `cosine`.
        warmup: epochs that a warm-up from 0.01 takes.

    Returns:
        1, in a warm-up less.
    """
    return _warmed_up(1.0, epoch, warmup)


SCHEDULES = {"cosine": cosine, "step": step, "exponential": exponential, "constant": constant}


def _warmed_up(factor, epoch, warmup):
    """The factor, in the first `warmup` epochs nearer to 0.01."""
    ramp = min(1.0, epoch / warmup) if warmup else 1.0
    return factor * ramp + 0.01 * (1 - ramp)


def paper(lr):
    """The schedule of the paper's code: cosine per epoch, with a warm-up of w = min(10, epochs // 10) epochs.

    In epoch e = 1..w the learning rate is 0.5 lr (1 + cos(pi e / E)) (e - 1) / w + 0.01 (w + 1 - e) / w, where 0.01 is
    a learning rate, not a share of one; then 0.5 lr (1 + cos(pi e / E)), which is 0 in the last epoch, E. With less
    than 10 epochs there is no warm-up.

    Args:
        lr: the learning rate that the factor is of, above 0.

    Returns:
        (epoch, epochs) -> factor, for `auglocal_ext.train`; the same all through an epoch.

    Raises:
        ValueError: lr is 0 or less.
    """
    if not lr > 0:
        raise ValueError(f"paper's lr must be above 0, given {lr!r}")

    def factor(epoch, epochs):
        e, w = int(epoch) + 1, min(10, epochs // 10)
        share = 0.5 * (1 + math.cos(math.pi * e / epochs))
        return share if e > w else share * (e - 1) / w + 0.01 / lr * (w + 1 - e) / w

    return factor


def takes_names(factory):
    """Whether a factory is to be given (name, parameter) pairs: its first argument is `named` or `named_parameters`.

    Args:
        factory: see `make_optimizer`.

    Returns:
        True or False; False too for a callable without a signature.
    """
    try:
        first = next(iter(inspect.signature(factory).parameters), None)
    except (TypeError, ValueError):  # a callable that has no signature
        return False
    return first in ("named", "named_parameters")


def make_optimizer(factory, named):
    """One module's optimizer.

    Args:
        factory: parameters -> torch.optim.Optimizer; an optimizer class, or a partial of one. One whose first argument
            is called `named` or `named_parameters` is given the list of pairs instead.
        named: (name, parameter) of the module, its aux net's included.

    Returns:
        torch.optim.Optimizer. State that it loads gets its parameters' strides.

    Raises:
        TypeError: it is no factory, or makes no torch.optim.Optimizer.
        ValueError: the optimizer has other parameters than those given, or needs the loss again in its step, as LBFGS.
    """
    if isinstance(factory, torch.optim.Optimizer) or not callable(factory):
        raise TypeError(
            f"optimizer must be a factory, because each local module has its own: given {type(factory).__name__}, "
            f"expected for instance functools.partial(torch.optim.AdamW, lr=1e-3)"
        )
    named = list(named)
    optimizer = factory(named if takes_names(factory) else [parameter for _, parameter in named])
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must make a torch.optim.Optimizer, given one that makes {type(optimizer).__name__}")
    taken = {p for group in optimizer.param_groups for p in group["params"]}
    if taken != {parameter for _, parameter in named}:
        left_out = [name for name, parameter in named if parameter not in taken]
        which = f"leaves out {left_out[0]}" if left_out else "takes others"
        raise ValueError(
            f"optimizer must train exactly the parameters that it is called with, one local module's, given a factory "
            f"that {which}: use its argument, as in lambda parameters: torch.optim.SGD(parameters, lr=0.1)"
        )
    if _evaluates_again(optimizer):
        raise ValueError(
            f"{type(optimizer).__name__} cannot train local modules: it re-evaluates the loss in step(), when the "
            f"module's activations are gone already; choose one without a closure, such as SGD or AdamW"
        )
    optimizer.register_load_state_dict_post_hook(_lay_out_state)
    return optimizer


def begin_momentum(optimizer):
    """Before a step: gives what has a gradient its momentum, zero, where torch's fused SGD would make it. That fails
    where only some parameters of a group have theirs, the others having been frozen until now; and where gradients of a
    first step have overflown, it leaves memory as it was found. The step's numbers are the same.

    Args:
        optimizer: changed in place; any other than a fused SGD with momentum and no dampening is left as it is.
    """
    for group in optimizer.param_groups:
        if group.get("fused") and group.get("momentum") and not group.get("dampening"):
            for parameter in group["params"]:
                if parameter.grad is not None and optimizer.state[parameter].get("momentum_buffer") is None:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _evaluates_again(optimizer):
    """Whether a step needs the loss more than once: LBFGS's, one that demands a closure, and that of SAM and its kin,
    which goes up in a first step and down in a second."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    demanded = closure is not None and closure.default is inspect.Parameter.empty
    in_two = hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step")
    return isinstance(optimizer, torch.optim.LBFGS) or demanded or in_two


def _lay_out_state(optimizer):
    """Gives state that was loaded its parameters' strides: fused optimizers go over both side by side in memory."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            beside = isinstance(value, torch.Tensor) and value.shape == parameter.shape
            if beside and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
