"""What options can be set to.

Nothing is imported here, so that no help waits for torch; a test compares these with what they name.
"""

__all__ = [
    "CLIPS",
    "FORMS",
    "FREE",
    "NONFINITE",
    "OPTIMIZERS",
    "PRECISIONS",
    "PREFER",
    "RULES",
    "SCHEDULES",
    "WITH_MOMENTUM",
]

RULES = ("auglocal", "dgl", "predsim", "infopro", "bp", "checkpoint")
FORMS = ("cifar", "imagenet")
PREFER = ("arithmetic", "memory", "time")
PRECISIONS = ("fp32", "bf16", "fp16")
OPTIMIZERS = ("sgd", "adam", "adamw", "nadam", "radam", "adagrad", "rmsprop")
WITH_MOMENTUM = ("sgd", "rmsprop")
SCHEDULES = ("cosine", "step", "exponential", "constant", "paper")
NONFINITE = ("stop", "skip")
CLIPS = ("module", "global")

# What a training that goes on may have otherwise than it was begun with.
FREE = ("epochs", "device", "workers", "download", "max_seconds", "patience", "checkpoint_minutes", "quiet")
