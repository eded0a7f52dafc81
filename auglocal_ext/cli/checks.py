"""What is checked before anything is read or planned."""

import torch

from .. import models
from ..backbone.families import as_backbone
from ..common.messages import first_line
from ..planning.budget import rules_of
from ..planning.stepping import Stepping
from ..rules.by_name import RULES
from ..rules.cutting import as_recompute
from ..training.evaluate import modes_of, restore
from .freeze import freeze
from .training_options import stepping_of

__all__ = ["check_cut", "check_image_size", "on_meta"]


def on_meta(name, classes):
    """A model by name, on the meta device."""
    try:
        with torch.device("meta"):
            return models.create(name, classes)
    except (NotImplementedError, RuntimeError):  # its constructor looks at values
        return models.create(name, classes).to("meta")


def check_cut(options):
    """The options' model, on the meta device; ValueError unless it is one that can be cut, and stepped, as they say."""
    given = vars(options)
    model = on_meta(options.model, given.get("num_classes") or 10)
    if given.get("freeze"):
        freeze(model, options.freeze, options.freeze_norms, options.model)
    elif given.get("freeze_norms"):
        raise ValueError("--freeze-norms goes with --freeze, whose BatchNorms it is about: give --freeze too")
    rule = RULES[options.rule], options.depth, given.get("form"), given.get("auxiliary", "paper"), options.modules
    more = {name: given[name] for name in ("recompute", "prefer") if name in given}
    backbone = as_backbone(model, given.get("units"))
    if given.get("recompute") not in (None, "auto"):
        as_recompute(given["recompute"], backbone)
    rules_of(backbone, *rule, budgeted=given.get("budget") is not None, **more)
    Stepping(**stepping_of(options))
    return model


def check_image_size(model, height, width, option):
    """ValueError unless images of that size go through the model, which is on the meta device; option: to change."""
    modes = modes_of(model)
    try:
        with torch.no_grad():
            model.eval()(torch.empty(2, 3, height, width, device="meta"))
    except (RuntimeError, AssertionError, ValueError) as error:  # of torch, or a check of the model's own
        raise ValueError(
            f"images of {height}x{width} pixels do not go through this model: choose another {option} "
            f"({first_line(error)})"
        ) from None
    finally:
        restore(modes)
