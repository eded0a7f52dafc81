"""What a plan was made of: by it a trainer runs the step that was planned, and knows a model that is another one."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..engine.criterion import CrossEntropy, OwnLoss
from ..rules.rule import Rule
from .stepping import Stepping

__all__ = ["Origin", "fingerprint"]


@dataclass(frozen=True)
class Origin:
    """What a plan was made of and with.

    Attributes:
        rule, recompute, optimizer, criterion, memory_format, soft_labels, sync_batch_norm: as `plan` was given them, or
            chose them.
        model: the `fingerprint` of its model.
        stepping: accumulate, clip_norm, clip_value, clip, ema, and the number of ranks.
    """

    rule: Rule
    recompute: bool | tuple[str, ...]
    optimizer: Callable
    criterion: CrossEntropy | OwnLoss
    memory_format: torch.memory_format
    soft_labels: bool
    model: tuple
    stepping: Stepping = Stepping()
    sync_batch_norm: bool = False


def fingerprint(model):
    """What the plan of a model depends on, comparable: layers with their settings, their modes, which are those of
    training where the model is in eval mode as a whole, and parameters' places and shapes."""
    modes = [module.training for module in model.modules()]
    parameters = [
        (name, tuple(p.shape), p.stride(), p.dtype, p.device, p.requires_grad) for name, p in model.named_parameters()
    ]
    return repr(model), modes if any(modes) else [True] * len(modes), parameters
