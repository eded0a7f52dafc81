"""The one place that imports timm, which is optional."""

import importlib

from .messages import first_line

__all__ = ["import_timm"]


def import_timm(wanted_for):
    """timm, or an ImportError that says what to do."""
    try:
        return importlib.import_module("timm")
    except (ImportError, RuntimeError, OSError) as error:
        raise ImportError(
            f"{wanted_for} needs timm, which does not import here ({first_line(error)}): install it with "
            f"pip install timm"
        ) from error
