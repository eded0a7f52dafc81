"""The nodes and programs of a backbone's local modules: where what is cut meets the engine."""

from .engine.nodes import Loss
from .engine.program import build
from .engine.trace import join, trace

__all__ = ["module_nodes", "programs", "unit_nodes"]


def programs(backbone, cuts, heads, autocast=None, keep=None, recompute=False, trace=trace, device_type="cpu"):
    """The programs of a backbone's local modules, in order.

    Args:
        backbone, cuts: see `rules.cut`.
        heads: each module's LocalHead, the classifier's last.
        autocast: None, or the dtype that features have beside parameters of float32.
        keep: for each module, the keys of gaps not to drop a value over; None: drop everywhere.
        recompute, device_type: see `engine.program.build`.
        trace: `engine.trace.trace`, or that of a `Reader`.
    """
    made, source = [], "images"
    for part, head, kept in zip(cuts, heads, keep or [()] * len(cuts), strict=True):
        nodes, features = module_nodes(backbone, part.first, part.last, head, source, trace)
        options = {"autocast": autocast, "keep": kept, "recompute": recompute, "device_type": device_type}
        made.append(build(nodes, source, features, **options))
        source = features
    return made


def module_nodes(backbone, first, last, head, source, trace=trace):
    """The nodes of a local module, units first..last (inclusive) with a LocalHead, and the name of the features that it
    hands on: None behind the backbone's last unit. trace: see `programs`."""
    inside = backbone.looked_into
    nodes, out = unit_nodes(backbone, first, last, source, trace)
    features = out if last < len(backbone.units) - 1 else None
    extra_weight, weight = head.weights
    if head.extra is not None:
        extra_nodes, prediction = trace(head.extra.net, inside, "extra", out)
        nodes += [*extra_nodes, Loss("extra loss", "extra", prediction, extra_weight, head.extra.loss)]
    head_nodes, _ = trace(head.net, inside, "head", out)
    return join(nodes, head_nodes, features, weight), features


def unit_nodes(backbone, first, last, source, trace=trace):
    """The nodes of units first..last (inclusive), and the name of their output. trace: see `programs`."""
    nodes, out = [], source
    for unit in backbone.units[first : last + 1]:
        made, out = trace(unit.module, backbone.looked_into, unit.name, out)
        nodes += made
    return nodes, out
