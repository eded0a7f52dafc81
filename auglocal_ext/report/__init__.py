"""Pictures and tables of plain data. matplotlib is imported when the first picture is drawn."""

from .analysis import analysis_report
from .cka import cka_maps_picture, cka_picture, similarity_picture
from .confusion import confusion_picture
from .curves import learning_curve
from .figure import check_picture
from .front import front_picture
from .gantt import gantt_picture
from .probes import local_accuracy_picture, probe_picture
from .scatter import accuracy_picture
from .step_memory import memory_picture
from .tables import brief_table, cost_lines, plan_table, stages_table, wrapped

__all__ = [
    "accuracy_picture",
    "analysis_report",
    "brief_table",
    "check_picture",
    "cka_maps_picture",
    "cka_picture",
    "confusion_picture",
    "cost_lines",
    "front_picture",
    "gantt_picture",
    "learning_curve",
    "local_accuracy_picture",
    "memory_picture",
    "plan_table",
    "probe_picture",
    "similarity_picture",
    "stages_table",
    "wrapped",
]
