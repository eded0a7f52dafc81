"""What ends a training before its last epoch: an accuracy that does not get better, a limit of time."""

from ..common import checks
from .result import accuracy_of

__all__ = ["check_limits", "is_patience_over"]


def check_limits(patience, max_seconds):
    """Both, as an int and a float; None of what is not limited. ValueError or TypeError for what they cannot be."""
    if patience is not None:
        patience = checks.whole_number(patience, "patience must be a whole number of epochs, at least 1", 1)
    if max_seconds is not None:
        max_seconds = checks.at_least_0(max_seconds, "max_seconds")
    return patience, max_seconds


def is_patience_over(history, patience):
    """Whether the last `patience` epochs were none of them better than all before; patience: None for no limit."""
    if patience is None or not history:
        return False
    accuracies = [accuracy_of(entry) for entry in history]
    return len(accuracies) - 1 - accuracies.index(max(accuracies)) >= patience
