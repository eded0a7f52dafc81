"""A model as an ordered list of units and a classifier, without changing the model."""

from .families import as_backbone
from .units import Backbone, Unit

__all__ = ["Backbone", "Unit", "as_backbone"]
