"""A module as a short list of nodes, in the order in which a step runs them.

The nodes hold the module's own submodules, so running them trains the module; the module itself is left as it was.
Nothing here runs: `program` makes a training step of such a list.
"""

import itertools
from dataclasses import replace

from torch import nn

from .calls import is_item, is_no_value
from .criterion import PLAIN
from .node import At
from .nodes import KINDS, Activation, Conv, Island, MaxPool
from .nodes.chunk import is_cut
from .nodes.head import take_in_head
from .nodes.loss import cross_entropy
from .nodes.reshape import only_reshapes
from .nodes.sync_norm import check_all_are_synchronised
from .symbolic import Untraceable, symbolic_graph

__all__ = ["Reader", "is_whole", "join", "trace"]


def trace(module, inside, part, source="x", sync_batch_norm=False):
    """The nodes of one part of a network, in the order in which a step runs them.

    Args:
        module: what to read, of one input and one output.
        inside: module types whose forward is looked into, besides nn.Sequential. Forward hooks on these, and on the
            modules that nodes hold, do not run.
        part: its name, the beginning of its values' names.
        source: the name of its input.
        sync_batch_norm: see `Reader`.

    Returns:
        (nodes, out): list of Node in the order of execution, and the name of the part's output.
    """
    return Reader(sync_batch_norm).trace(module, inside, part, source)


class Reader:
    """Reads parts of networks, each once, for as long as their modules stay as they are.

    sync_batch_norm: whether every BatchNorm in training mode is synchronised, see `nodes.SyncNorm`, and not only those
    that are nn.SyncBatchNorm. ValueError where one cannot be.
    """

    def __init__(self, sync_batch_norm=False):
        self._known, self._sync_batch_norm = {}, sync_batch_norm

    def trace(self, module, inside, part, source="x"):
        """See `trace`."""
        nodes, out = self.read(module, inside, part, source)
        return _beside(_pools_first(nodes)), out

    def read(self, module, inside, part, source="x"):
        """As `trace`, in the order in which the module's own forward runs them."""
        key = id(module), part, source
        if key not in self._known:
            self._known[key] = module, *_read(module, inside, part, source, self._sync_batch_norm)
            if self._sync_batch_norm:
                check_all_are_synchronised(self._known[key][1])
        return self._known[key][1:]


def _read(module, inside, part, source, sync_batch_norm):
    root = nn.Sequential(module)
    taken = {type(inner) for inner in module.modules() if is_whole(inner)}
    opened = {type(inner) for inner in module.modules() if only_reshapes(inner)}
    try:
        graph = symbolic_graph(root, {nn.Sequential, *inside, *opened} - taken)
    except Untraceable:
        return _whole(module, part, source)
    modules, values, nodes, done = dict(root.named_modules()), {}, [], set()
    for fx_node in graph.nodes:
        if fx_node.op == "placeholder":
            values[fx_node] = source
        elif fx_node.op == "output":
            return nodes, values[fx_node.args[0]]
        elif is_cut(fx_node):
            values[fx_node] = values[fx_node.args[0]]  # of which each reader takes a part
        elif fx_node not in done and not is_no_value(fx_node) and not At.is_attribute(fx_node):
            at = At(fx_node, modules, values, f"{part}/{fx_node.name}", part, sync_batch_norm)
            plain = not any(map(at.is_attribute, fx_node.all_input_nodes))
            kinds = (kind for kind in KINDS if plain or kind.holds_attributes)
            node, last = next(found for kind in kinds if (found := kind.match(at)))
            if isinstance(node, Island) and any(map(is_item, fx_node.users)):  # it may put out a tuple
                return _whole(module, part, source)
            done.update(_chain(fx_node, last))
            values[last] = node.out
            nodes.append(node)


def is_whole(module):
    """Whether tracing never looks into a module: a layer of torch's own, or one that a kind of node takes whole."""
    kind = type(module)
    layer = kind.__module__.startswith("torch.nn.") and not module._modules and kind is not nn.Sequential
    return layer or any(kind.takes_whole(module) for kind in KINDS)


def _whole(module, part, source):
    whole = Island.of_module(module, part, source)
    return [whole], whole.out


def _chain(first, last):
    """The fx nodes from first to last, each the only reader of the one before."""
    chain = [first]
    while chain[-1] is not last:
        chain.append(At.only_reader(chain[-1]))
    return chain


def join(units, head, features, weight=1.0, criterion=PLAIN):
    """The nodes of a local module from its units' and its head's, with a loss at the end: one Head that takes in the
    last BatchNorm chain where that is how it ends and nothing else reads the chain, else the loss of the logits.

    Args:
        units, head: lists of Node in the order of execution. The head's output is the logits.
        features: the name of the value that is handed on to the next module, or None.
        weight: of the loss.
        criterion: the loss, see `criterion.as_criterion`.
    """
    nodes, last = [*units, *head], head[-1]
    head_in_one = take_in_head(nodes, features, weight, criterion)
    return head_in_one or [*nodes, cross_entropy(last.part, last.out, weight, criterion)]


# ---- orders in which less is kept, of the same values ---------------------------------------------------------------


def _pools_first(nodes):
    """The nodes with each max-pool before the Activation in place that it alone reads, which does not fall anywhere: of
    the two only the small map has to be kept."""
    ordered = list(nodes)
    readers = [source for node in nodes for source in node.sources]
    for i, (relu, pool) in enumerate(itertools.pairwise(nodes)):
        if (
            isinstance(relu, Activation)
            and relu.in_place
            and isinstance(pool, MaxPool)
            and pool.source == relu.out
            and readers.count(relu.out) == 1
        ):
            ordered[i] = replace(pool, source=relu.source, out=relu.out)
            ordered[i + 1] = replace(relu, source=relu.out, out=pool.out)
    return ordered


def _beside(nodes):
    """The nodes with each convolution moved up beside the first one that reads the same map: the map can go after
    both, and their weight gradients share one rebuild of it."""
    ordered = []
    for node in nodes:
        if isinstance(node, Conv):
            same = [i for i, other in enumerate(ordered) if isinstance(other, Conv) and other.source == node.source]
            if same:
                ordered.insert(same[-1] + 1, node)
                continue
        ordered.append(node)
    return ordered
