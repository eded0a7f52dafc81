"""Trains torchvision CNNs by supervised local learning (AugLocal), on its own C++, CUDA and Triton kernels.

model = torchvision.models.resnet18(num_classes=10)
result = auglocal_ext.train(model, loader, depth=4)
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import analysis, data, models, ops, optim, rules
    from .planning.plan import plan
    from .planning.result import Plan
    from .rules.rule import Rule
    from .stages.train import train_stages
    from .training.divergence import TrainingDiverged
    from .training.evaluate import Evaluation, evaluate, evaluation
    from .training.isolation import assert_isolated
    from .training.loop import train
    from .training.result import TrainingInterrupted, TrainResult
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
    "analysis",
    "assert_isolated",
    "data",
    "evaluate",
    "evaluation",
    "models",
    "ops",
    "optim",
    "plan",
    "rules",
    "train",
    "train_stages",
]

_HOMES = {
    "Evaluation": ".training.evaluate",
    "LocalTrainer": ".training.trainer",
    "Plan": ".planning.result",
    "Rule": ".rules.rule",
    "StepResult": ".training.trainer",
    "TrainResult": ".training.result",
    "TrainingDiverged": ".training.divergence",
    "TrainingInterrupted": ".training.result",
    "assert_isolated": ".training.isolation",
    "evaluate": ".training.evaluate",
    "evaluation": ".training.evaluate",
    "plan": ".planning.plan",
    "train": ".training.loop",
    "train_stages": ".stages.train",
}


def __getattr__(name):
    """What is public is imported at its first use: torch takes seconds, and `auglocal --help` has no use for it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = (
        getattr(import_module(_HOMES[name], __name__), name) if name in _HOMES else import_module(f".{name}", __name__)
    )
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
