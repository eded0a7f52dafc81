"""AugLocal with nets that were chosen border by border: what a search under a memory budget finds."""

from .auglocal import AugLocal

__all__ = ["mixed"]


def mixed(choices):
    """The rule whose net behind each of these units is that unit's own; where all are alike, that rule.

    Args:
        choices: {unit: AugLocal}.

    Returns:
        AugLocal; its depth and auxiliary are None where they differ.
    """
    rules = list(choices.values())
    if all(_kind(rule) == _kind(rules[0]) for rule in rules):
        return rules[0]
    return _Mixed(choices)


def _kind(rule):
    return rule.depth, rule.form, rule.auxiliary


class _Mixed(AugLocal):
    name = "auglocal"

    def __init__(self, choices):
        depths, nets = ({getattr(rule, what) for rule in choices.values()} for what in ("depth", "auxiliary"))
        super().__init__(max(depths), next(iter(choices.values())).form)
        self.choices = choices
        self.depth = depths.pop() if len(depths) == 1 else None
        self.auxiliary = nets.pop() if len(nets) == 1 else None

    def check(self, backbone):
        for rule in self.choices.values():
            rule.check(backbone)

    def borders(self, backbone):
        return sorted(self.choices)

    def aux_net(self, border):
        return self._of(border).aux_net(border)

    def describe(self, border):
        return self._of(border).describe(border)

    def _of(self, border):
        """The rule of a border; where none was chosen, of the nearest."""
        return self.choices[min(self.choices, key=lambda unit: abs(unit - border.unit))]
