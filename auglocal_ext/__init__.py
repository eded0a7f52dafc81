"""Trains torchvision CNNs by supervised local learning (AugLocal), on its own C++, CUDA and Triton kernels.

model = torchvision.models.resnet18(num_classes=10)
result = auglocal_ext.train(model, loader, depth=4)
"""

__version__ = "0.1.0"

from . import models, ops, rules
from .planning.plan import plan
from .planning.result import Plan
from .rules.rule import Rule
from .training.divergence import TrainingDiverged
from .training.evaluate import Evaluation, evaluate, evaluation
from .training.isolation import assert_isolated
from .training.loop import TrainingInterrupted, TrainResult, train
from .training.trainer import LocalTrainer, StepResult

__all__ = [
    "Evaluation",
    "LocalTrainer",
    "Plan",
    "Rule",
    "StepResult",
    "TrainResult",
    "TrainingDiverged",
    "TrainingInterrupted",
    "assert_isolated",
    "evaluate",
    "evaluation",
    "models",
    "ops",
    "plan",
    "rules",
    "train",
]
