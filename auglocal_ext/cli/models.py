"""`auglocal models`"""

import fnmatch
import warnings

from tqdm import tqdm

from .. import models
from ..backbone.families import as_backbone
from .checks import on_meta

__all__ = ["models_command"]


def models_command(options):
    """Prints a line for each model of a matching name that can be cut."""
    known = models.timm_names() if options.pattern.startswith(models.TIMM) else models.names()
    names = [name for name in known if fnmatch.fnmatchcase(name, options.pattern)]
    found = []
    for name in tqdm(names, unit="model", leave=False, disable=None):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's, of initial weights
            model = on_meta(name, 10 if hasattr(models, name) else 1000)
        try:
            units = len(as_backbone(model).units)
        except ValueError:
            continue
        found.append((name, units, sum(parameter.numel() for parameter in model.parameters())))
    if not found:
        raise ValueError(
            f"no model that can be cut has a name like {options.pattern!r}: `auglocal models` lists all of them"
        )
    width = max(18, *(len(name) for name, _, _ in found))
    print(f"{'model':<{width}}  units   parameters")
    for name, units, parameters in found:
        print(f"{name:<{width}}  {units:>5}  {parameters:>11,}")
    return 0
