"""The learning rules: which nets and which losses stand behind local modules, and where a backbone is cut.

A rule is a file here; one of your own derives `Rule`.
"""

from .auglocal import FORMS, AugLocal
from .auxiliary import Auxiliary
from .bp import BP, Checkpoint
from .by_name import RULES, as_rule, for_images
from .dgl import DGL
from .infopro import InfoPro
from .predsim import PredSim
from .rule import Border, ExtraLoss, LocalHead, Rule

__all__ = [
    "DGL",
    "FORMS",
    "RULES",
    "AugLocal",
    "Auxiliary",
    "BP",
    "Border",
    "Checkpoint",
    "ExtraLoss",
    "InfoPro",
    "LocalHead",
    "PredSim",
    "Rule",
    "as_rule",
    "for_images",
]
