"""The learning rules by name."""

from .auglocal import AugLocal
from .bp import BP, Checkpoint
from .dgl import DGL
from .infopro import InfoPro
from .predsim import PredSim
from .rule import Rule

__all__ = ["RULES", "as_rule", "for_images"]


RULES = {rule.name: rule for rule in (AugLocal, DGL, PredSim, InfoPro, BP, Checkpoint)}


def as_rule(rule, depth=4, form=None, auxiliary="paper"):
    """The Rule that is meant.

    Args:
        rule: one of RULES by name, a subclass of Rule, or an object of one, which is given back as it is.
        depth, form, auxiliary: of AugLocal and its subclasses, see there.

    Returns:
        Rule

    Raises:
        ValueError: it is no rule, or form or auxiliary is given to one that takes none.
    """
    if isinstance(rule, Rule):
        if auxiliary != "paper":
            raise ValueError("auxiliary goes with a rule by name, given a rule that has its own: leave it out")
        return rule
    kind = RULES.get(rule) if isinstance(rule, str) else rule
    if not (isinstance(kind, type) and issubclass(kind, Rule)):
        raise ValueError(f"rule must be one of {', '.join(RULES)}, or an auglocal_ext.Rule of your own, given {rule!r}")
    if issubclass(kind, AugLocal):
        return kind(depth, form) if auxiliary == "paper" else kind(depth, form, auxiliary)
    for name, value, default in (("form", form, None), ("auxiliary", auxiliary, "paper")):
        if value != default:
            raise ValueError(
                f"{name} is a choice of rule 'auglocal': leave it out with {kind.name!r} (given {value!r})"
            )
    return kind()


def for_images(rule, mean, std):
    """The rule for images normalised by mean and std.

    Args:
        rule: a rule, or its name.
        mean, std: one number per channel, of images scaled to 0..1.

    Returns:
        InfoPro for them where rule is "infopro", which draws images as they were before; else the rule as it was given.
    """
    return InfoPro(mean, std) if rule == "infopro" else rule
