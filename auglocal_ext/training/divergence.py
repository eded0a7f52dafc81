"""Trainings that went wrong: how that is told, and what it is called."""

import math

import torch

__all__ = ["NotFinite", "REMEDY", "TrainingDiverged", "check_finite", "check_learnt", "names_not_finite"]


class TrainingDiverged(FloatingPointError):
    """The training went wrong: a loss, a weight or an output is not finite, or the classifier is far worse at the end
    than at the start. `result`: the TrainResult of the finished epochs; the model is as the last step left it."""

    def __init__(self, message, result):
        super().__init__(message)
        self.result = result


class NotFinite(FloatingPointError):
    """What `train` makes a TrainingDiverged of."""


REMEDY = "lower the learning rate, for instance optimizer=functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9)"


def names_not_finite(trainer):
    """Names of the model's and the aux nets' parameters and buffers that have a value that is NaN or infinite."""
    named = {}
    for prefix, module in (("", trainer.model), ("aux_nets.", trainer.aux_nets)):
        tensors = [*module.named_parameters(), *module.named_buffers()]
        named |= {prefix + name: tensor for name, tensor in tensors if tensor.is_floating_point()}
    finite = torch.stack([tensor.detach().isfinite().all() for tensor in named.values()])
    return [name for name, is_finite in zip(named, finite.tolist(), strict=True) if not is_finite]


def check_finite(trainer, odd, entry, epochs):
    """Looks for what the last update may have spoilt, which no loss has told yet; odd: what was so from the start, a
    mask of infinite values for instance."""
    spoilt = [name for name in names_not_finite(trainer) if name not in odd]
    if spoilt:
        raise NotFinite(f"epoch {entry['epoch']}/{epochs}: {spoilt[0]} has values that are NaN or infinite")


def check_learnt(history, trainer):
    first, last, guessing = history[0]["loss"], history[-1]["loss"], math.log(trainer.num_classes)
    if last > 2 * max(first, guessing):
        raise NotFinite(
            f"the classifier's cross-entropy was {last:.4g} in the last epoch, after {first:.4g} in the first one; "
            f"guessing has {guessing:.4g}"
        )
