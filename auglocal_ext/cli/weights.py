"""Weights of a file, or of torchvision's, into a model: all of them or none."""

from pathlib import Path

import torch

from ..common.messages import first_line
from ..common.torchvision import import_torchvision

__all__ = ["begin_with", "check_weights", "load_weights"]

_SHOWN = 3  # of what does not fit


def load_weights(model, path, name, option="--weights"):
    """Loads a state_dict, or the one under "model" or "state_dict" of a dict, or of a training's checkpoint; only
    tensors are ever unpickled.

    Args:
        path: what torch.save wrote.
        name: of the model, for errors.
        option: what the user gave the path by.

    Raises:
        ValueError: it cannot be read, or does not fit; the model is as it was.
    """
    _load(model, _read(path, option), name, f"{option} {path}")


def check_weights(given, model_name):
    """ValueError unless --weights are a file, or torchvision has weights of that name for the model."""
    if Path(given).is_file() or given.rpartition(".")[2] in (known := _known(model_name)):
        return
    also = f", or one of torchvision's for {model_name}, {', '.join(known)}" if known else ""
    raise ValueError(f"--weights {given} is no file: give a state_dict that torch.save wrote{also}")


def begin_with(model, given, model_name, num_classes):
    """Loads what --weights say, see `check_weights`; a classifier of another number of classes stays as it is.

    Returns:
        A sentence about that, or None: all was loaded.

    Raises:
        ValueError: they cannot be fetched or read, or do not fit; the model is as it was.
    """
    state = _read(given, "--weights") if Path(given).is_file() else _fetched(given, model_name)
    expected, theirs = model.state_dict(), None
    for key, value in expected.items():
        if key in state and _is_of_other_classes(state[key], value, num_classes):
            theirs = len(state[key])
            state = state | {key: value}
    _load(model, state, f"{model_name} with {num_classes} classes", f"--weights {given}")
    if theirs is None:
        return None
    return f"the classifier has {num_classes} classes, that of --weights {given} {theirs}: it begins fresh"


def _is_of_other_classes(given, ours, num_classes):
    return given.shape != ours.shape and ours.shape[:1] == (num_classes,) and given.shape[1:] == ours.shape[1:]


def _known(model_name):
    """The names of torchvision's weights for one of its models; none for another model."""
    try:
        models = import_torchvision("--weights").models
        return list(models.get_model_weights(model_name).__members__)
    except (ImportError, ValueError):
        return []


def _fetched(given, model_name):
    weights = import_torchvision("--weights").models.get_model_weights(model_name)
    try:
        return dict(weights[given.rpartition(".")[2]].get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError) as error:  # no network, no room, another file than expected
        raise ValueError(
            f"--weights {given} cannot be fetched ({first_line(error)}): give a file with a state_dict where there is "
            f"no network"
        ) from None


def _read(path, option):
    """The state_dict in a file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{option} {path} cannot be read as weights ({type(error).__name__}): expected what "
            f"torch.save(model.state_dict(), FILE) writes"
        ) from None
    for key in ("trainer", "model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(
            f"{option} {path} has no state_dict, expected a dict of tensors, or one under 'model' or 'state_dict'"
        )
    return state


def _load(model, state, name, given):
    """given: what the state is, for errors."""
    if wrong := _misfits(state, model.state_dict()):
        more = f", and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise ValueError(
            f"{given} does not fit {name}: {', '.join(wrong[:_SHOWN])}{more}; give weights of this very model"
        )
    try:
        model.load_state_dict(state)
    except (RuntimeError, NotImplementedError) as error:  # a sparse tensor, one without data
        raise ValueError(f"{given} cannot be loaded into {name}: {first_line(error)}") from None


def _misfits(given, expected):
    wrong = [
        f"{key} is {tuple(given[key].shape)}, expected {tuple(value.shape)}"
        for key, value in expected.items()
        if key in given and given[key].shape != value.shape
    ]
    wrong += [f"{key} is not there" for key in expected if key not in given]
    return wrong + [f"{key} is no part of it" for key in given if key not in expected]
