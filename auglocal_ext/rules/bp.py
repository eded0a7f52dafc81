"""Backpropagation as a rule: one local module, with and without checkpoints."""

from .rule import Rule

__all__ = ["BP", "Checkpoint"]


class BP(Rule):
    """Plain backpropagation: one module of all units, the classifier's loss, no aux net."""

    def borders(self, backbone):
        return ()


class Checkpoint(BP):
    """Backpropagation with every unit checkpointed: its convolutions run again in the backward, BatchNorm's statistics
    are updated once."""

    recompute = True
