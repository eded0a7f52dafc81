"""The nodes and programs of a backbone's local modules: where what is cut meets the engine."""

from ..engine.criterion import PLAIN
from ..engine.nodes import Loss
from ..engine.program import build
from ..engine.trace import join, trace
from ..rules.cutting import trains

__all__ = ["module_nodes", "module_program", "programs", "unit_nodes"]


def programs(backbone, spans, heads, kept_gaps=None, **options):
    """The programs of a backbone's local modules, in order.

    Args:
        backbone, spans: see `rules.cutting.cut`.
        heads: each module's LocalHead, the classifier's last.
        kept_gaps: for each module, see `engine.program.build`; None: none.
        options: see `module_program`.
    """
    made, source = [], "images"
    for span, head, kept in zip(spans, heads, kept_gaps or [()] * len(spans), strict=True):
        made.append(module_program(backbone, span, head, source, kept_gaps=kept, **options))
        source = made[-1].features
    return made


def module_program(backbone, span, head, source, trace=trace, criterion=PLAIN, recompute=False, **options):
    """The program of one local module; forward only where all its units are frozen, see `rules.cutting.trains`.

    Args:
        source: the name of its input.
        trace: `engine.trace.trace`, or that of a `Reader`.
        criterion: the loss of its logits.
        recompute: whether convolutions run again in the backward, or the names of the units of which they do.
        options: see `engine.program.build`.
    """
    if not trains(backbone, span):
        nodes, features = unit_nodes(backbone, span, source, trace)
        return build(nodes, source, features, **options)
    nodes, features = module_nodes(backbone, span, head, source, trace, criterion)
    recomputed = {node.part for node in nodes} if recompute is True else recompute or ()
    return build(nodes, source, features, recomputed=recomputed, **options)


def module_nodes(backbone, span, head, source, trace, criterion):
    """The nodes of a local module, of units with a LocalHead, and the name of the features that it hands on: None
    behind the backbone's last unit. trace, criterion: see `module_program`."""
    inside = backbone.looked_into
    nodes, out = unit_nodes(backbone, span, source, trace)
    features = out if span.last < len(backbone.units) - 1 else None
    extra_weight, weight = head.weights
    if head.extra is not None:
        extra_nodes, prediction = trace(head.extra.net, inside, "extra", out)
        given = ("labels", "images", source) if head.extra.takes_inputs else ("labels", "images")
        nodes += [*extra_nodes, Loss("extra loss", "extra", prediction, extra_weight, head.extra.loss, given)]
    head_nodes, _ = trace(head.net, inside, "head", out)
    return join(nodes, head_nodes, features, weight, criterion), features


def unit_nodes(backbone, span, source, trace=trace):
    """The nodes of units, and the name of their output. trace: see `module_program`."""
    nodes, out = [], source
    for unit in span.of(backbone.units):
        made, out = trace(unit.module, backbone.looked_into, unit.name, out)
        nodes += made
    return nodes, out
