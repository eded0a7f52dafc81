"""Weights from a file into a model, all of them or none."""

import torch

from ..common.messages import first_line

__all__ = ["load_weights"]


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
    if wrong := _misfits(state, model.state_dict()):
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(f"{option} {path} does not fit {name}: {wrong[0]}{more}; give weights of this very model")
    try:
        model.load_state_dict(state)
    except (RuntimeError, NotImplementedError) as error:  # a sparse tensor, one without data
        raise ValueError(f"{option} {path} cannot be loaded into {name}: {first_line(error)}") from None


def _misfits(given, expected):
    wrong = [
        f"{key} is {tuple(given[key].shape)}, expected {tuple(value.shape)}"
        for key, value in expected.items()
        if key in given and given[key].shape != value.shape
    ]
    wrong += [f"{key} is not there" for key in expected if key not in given]
    return wrong + [f"{key} is no part of it" for key in given if key not in expected]
