"""Trains torchvision CNNs by supervised local learning (AugLocal), on its own C++, CUDA and Triton kernels.

model = torchvision.models.resnet18(num_classes=10)
result = auglocal_ext.train(model, loader, depth=4)
"""

__version__ = "0.1.0"

from . import models, ops, rules
from .loop import TrainingDiverged, TrainingInterrupted, TrainResult, evaluate, train
from .plan import Plan, plan
from .rule import Rule
from .trainer import LocalTrainer, StepResult, assert_isolated

__all__ = [
    "LocalTrainer",
    "Plan",
    "Rule",
    "StepResult",
    "TrainResult",
    "TrainingDiverged",
    "TrainingInterrupted",
    "assert_isolated",
    "evaluate",
    "models",
    "ops",
    "plan",
    "rules",
    "train",
]
