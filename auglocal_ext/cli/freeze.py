"""Parts of a model that are not trained, by name."""

from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["freeze"]


def freeze(model, names, norms, of):
    """Freezes parts of a model.

    Args:
        names: of modules or parameters, such as layer1 or layer1.0.conv1: all parameters below are frozen.
        norms: whether BatchNorms there are put into eval mode too, and keep their statistics.
        of: the model's name, for errors.

    Raises:
        ValueError: a name is of no parameter, or nothing is left to train; the model is as it was.
    """
    parameters, chosen = dict(model.named_parameters()), set()
    for name in names:
        found = {own for own in parameters if _is_below(own, name)}
        if not found:
            first = ", ".join(path for path, child in model.named_children() if any(True for _ in child.parameters()))
            raise ValueError(
                f"--freeze {name} is no part of {of} that has parameters: give names such as {first}, or of what is "
                f"in them"
            )
        chosen |= found
    if len(chosen) == len(parameters):
        raise ValueError(f"--freeze {' '.join(names)} leaves nothing of {of} to train: leave out what is to learn")
    for own in chosen:
        parameters[own].requires_grad_(False)
    if norms:
        for path, module in model.named_modules():
            if isinstance(module, _BatchNorm) and any(_is_below(path, name) for name in names):
                module.eval()


def _is_below(path, name):
    return f"{path}.".startswith(f"{name}.")
