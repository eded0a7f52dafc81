"""How gradients come into their parameters: at a program's end, or each added to what is there when it is made."""

from dataclasses import replace
from functools import partial

from .emit import Step
from .tensors import as_gradient

__all__ = ["accumulating", "leave"]


def leave(parameter, gradient, add=False):
    """Puts a gradient into its parameter, and calls the parameter's hooks as autograd's own backward does.

    gradient: None where the parameter was not used.
    add: to the gradient that is there already.
    """
    if gradient is not None and parameter._backward_hooks:
        for hook in tuple(parameter._backward_hooks.values()):
            changed = hook(gradient)
            gradient = gradient if changed is None else changed
        gradient = as_gradient(gradient, parameter)
    if not add:
        parameter.grad = gradient
    elif gradient is not None and parameter.grad is not None:
        parameter.grad.add_(gradient)
    elif gradient is not None:
        parameter.grad = as_gradient(gradient, parameter)
    if gradient is not None and parameter._post_accumulate_grad_hooks:
        for hook in tuple(parameter._post_accumulate_grad_hooks.values()):
            hook(parameter)


def accumulating(steps, gaps, gradients):
    """The steps, each gradient added to its parameter's as soon as it is whole, so that it need not stay; and the gaps
    between these steps.

    Args:
        steps, gaps: from `schedule.with_rebuilds`.
        gradients: name of a gradient's value -> the parameter it is of.
    """
    whole = {name: index for index, step in enumerate(steps) for name in step.writes if name in gradients}
    longer, places = [], []  # places: of each step in the longer list
    for index, step in enumerate(steps):
        places.append(len(longer))
        longer.append(step)
        for name in step.writes:
            if whole.get(name) == index:
                run = partial(_add, gradients[name])
                longer.append(Step("accumulate", step.phase, False, step.part, run, (name,), (), _no_macs))
    return longer, [replace(gap, start=places[gap.start], end=places[gap.end]) for gap in gaps]


def _add(parameter, gradient):
    if gradient is None or not gradient.is_meta:  # walked without data, it is counted as the parameter's that is there
        leave(parameter, gradient, add=True)
    return ()


def _no_macs(_reads, _made):
    return 0
