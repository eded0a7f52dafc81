"""Pictures of plain data. matplotlib is imported when the first one is drawn."""

from .curves import learning_curve
from .figure import check_picture
from .front import front_picture
from .step_memory import memory_picture

__all__ = ["check_picture", "front_picture", "learning_curve", "memory_picture"]
