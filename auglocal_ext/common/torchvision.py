"""The one place that imports torchvision: beside a CPU build of torch its compiled part may not load."""

import importlib

__all__ = ["import_torchvision"]


def import_torchvision(wanted_for):
    """torchvision with its datasets, models and transforms, or an ImportError that says what to do."""
    try:
        for part in ("datasets", "models", "transforms.v2"):
            importlib.import_module(f"torchvision.{part}")
        return importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError) as error:
        raise ImportError(
            f"{wanted_for} needs torchvision, which does not import here ({error}). Install the torchvision that "
            f"matches this torch (see pytorch.org/get-started). Without it, auglocal_ext.models' own ResNets and "
            f"the data sources 'digits' and 'fake:N' work."
        ) from error
