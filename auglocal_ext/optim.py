"""The default optimizer and learning-rate schedule, and what an optimizer must be to step one module."""

import inspect
import math
from functools import partial

import torch

__all__ = ["constant", "cosine", "make_optimizer", "sgd"]


def sgd(batch_size):
    """The paper's optimizer as a factory: SGD, Nesterov momentum 0.9, weight decay 1e-4, lr 0.1 x batch / 128."""
    return partial(_sgd, lr=0.1 * batch_size / 128)


def _sgd(parameters, lr):
    parameters = list(parameters)
    # Fused where torch has it: the same numbers in one pass, without scratch of the parameters' size.
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    options = {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
    return torch.optim.SGD(parameters, lr=lr, fused=fused or None, **options)


def cosine(epoch, epochs):
    """The paper's schedule: cosine from 1 to 0, with a warm-up from 0.01 over the first tenth, at most 10 epochs.

    Args:
        epoch: epochs done so far, a fraction of one included.
        epochs: of the whole training.

    Returns:
        what to multiply the learning rate by.
    """
    warm_up = min(10, epochs / 10)
    ramp = min(1.0, epoch / warm_up)
    return 0.5 * (1 + math.cos(math.pi * epoch / epochs)) * ramp + 0.01 * (1 - ramp)


def constant(epoch, epochs):
    """A schedule that leaves the learning rate as it is."""
    return 1.0


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
