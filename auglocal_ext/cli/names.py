"""What options can be set to.

Nothing is imported here, so that no help waits for torch; a test compares these with what they name.
"""

__all__ = ["FORMS", "PRECISIONS", "RULES"]

RULES = ("auglocal", "dgl", "predsim", "infopro", "bp", "checkpoint")
FORMS = ("cifar", "imagenet")
PRECISIONS = ("fp32", "bf16")
