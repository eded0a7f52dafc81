"""What a training step computed."""

from dataclasses import dataclass

import torch

__all__ = ["StepResult"]


@dataclass(frozen=True)
class StepResult:
    """What one step computed, before its parameters changed. Tensors on the model's device, detached.

    Attributes:
        loss: (), the criterion of the model's own classifier; NaN where the batch was refused.
        logits: (N, num_classes), of the model's own classifier.
        module_losses: (modules,), each local module's loss, the classifier's last; NaN where it has none.
        trained: of each local module, whether it has a loss: one whose units are all frozen has none.
    """

    loss: torch.Tensor
    logits: torch.Tensor
    module_losses: torch.Tensor
    trained: tuple[bool, ...]
