"""A module as a short list of nodes: convolutions, BatchNorm chains, pools, heads, and islands of everything else.

The nodes hold the module's own submodules, so running them trains the module; the module itself is left as it was.
Nothing here runs: `program` makes a training step of such a list.
"""

import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.utils import _pair

from .tracing import Untraceable, symbolic_graph

__all__ = ["AddedLoss", "Conv", "Head", "Island", "Loss", "MaxPool", "Norm", "Pool", "Relu", "Reader", "join", "trace"]


@dataclass(frozen=True)
class Node:
    """out: the name of its value; part: the unit or aux block it belongs to."""

    out: str
    part: str


@dataclass(frozen=True)
class OneSource(Node):
    source: str

    @property
    def sources(self):
        return (self.source,)


@dataclass(frozen=True)
class Conv(OneSource):
    """out = conv(source)"""

    conv: nn.Conv2d


@dataclass(frozen=True)
class Norm(OneSource):
    """out = [relu](bn(source) [+ residual]), bn in training mode."""

    bn: nn.BatchNorm2d
    relu: bool
    residual: str | None = None

    @property
    def sources(self):
        return (self.source,) if self.residual is None else (self.source, self.residual)


@dataclass(frozen=True)
class Pool(OneSource):
    """out = max_pool(relu(bn(source)))"""

    bn: nn.BatchNorm2d
    pool: nn.MaxPool2d


@dataclass(frozen=True)
class Relu(OneSource):
    """out = relu(source), written over the source: what a Conv or a MaxPool made and nothing else reads."""


@dataclass(frozen=True)
class MaxPool(OneSource):
    """out = max_pool(source)"""

    pool: nn.MaxPool2d


@dataclass(frozen=True)
class Head(Node):
    """Global average pool, [BatchNorm1d,] linear, cross-entropy of `norm`, whose output is never stored."""

    norm: Norm
    head_bn: nn.BatchNorm1d | None
    linear: nn.Linear
    weight: float = 1.0  # of the loss

    @property
    def sources(self):
        return self.norm.sources


@dataclass(frozen=True)
class Island(Node):
    """out = call(*sources), differentiated by autograd: what no other node describes."""

    sources: tuple[str, ...]
    call: Callable
    what: str  # for people: the name and kind of what runs
    parameters: tuple[nn.Parameter, ...] = ()
    may_write: bool = False  # whether the call may write over what it is given


@dataclass(frozen=True)
class Loss(OneSource):
    """weight x the cross-entropy of logits that an island computed."""

    weight: float = 1.0


@dataclass(frozen=True)
class AddedLoss(OneSource):
    """weight x loss(source, labels, images), differentiated by autograd in the source."""

    loss: Callable
    weight: float


def trace(module, inside, part, source="x"):
    """The nodes of one part of a network, in the order in which a step runs them.

    Args:
        module: what to read, of one input and one output.
        inside: module types whose forward is looked into, besides nn.Sequential. Forward hooks on these, and on the
            modules that nodes hold, do not run.
        part: its name, the beginning of its values' names.
        source: the name of its input.

    Returns:
        (nodes, out): list of Node in the order of execution, and the name of the part's output.
    """
    return Reader().trace(module, inside, part, source)


class Reader:
    """Reads parts of networks, each once, for as long as their modules stay as they are."""

    def __init__(self):
        self._known = {}

    def trace(self, module, inside, part, source="x"):
        """See `trace`."""
        nodes, out = self.read(module, inside, part, source)
        return _beside(_pools_first(nodes)), out

    def read(self, module, inside, part, source="x"):
        """As `trace`, in the order in which the module's own forward runs them."""
        key = id(module), part, source
        if key not in self._known:
            self._known[key] = module, *_read(module, inside, part, source)
        return self._known[key][1:]


def _read(module, inside, part, source):
    root = nn.Sequential(module)
    try:
        graph = symbolic_graph(root, {nn.Sequential, *inside})
    except Untraceable:  # as a whole it runs as it is
        whole = Island(f"{part}/whole", part, (source,), module, f"{part} ({type(module).__name__})",
                       tuple(module.parameters()), _may_write(None, module))  # fmt: skip
        return [whole], whole.out
    parts, values, nodes, done = dict(root.named_modules()), {}, [], set()
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = source
        elif node.op == "output":
            return nodes, values[node.args[0]]
        elif node not in done:
            made, last = _match(node, parts, values, f"{part}/{node.name}", part)
            done.update(_chain(node, last))
            values[last] = made.out
            nodes.append(made)


def join(units, head, features, weight=1.0):
    """The nodes of a local module from its units' and its head's, with a loss at the end: one Head that takes in the
    last BatchNorm chain where that is how it ends and nothing else reads the chain, else a Loss of the logits.

    Args:
        units, head: lists of Node in the order of execution. The head's output is the logits.
        features: the name of the value that is handed on to the next module, or None.
        weight: of the loss.
    """
    nodes = [*units, *head]
    linear = nodes[-1]
    names = {node.out: node for node in nodes}
    readers = [features, *(source for node in nodes for source in node.sources)]
    # pool, flatten, [BatchNorm1d,] linear, each an island whose call is the module itself
    tail = [linear]
    while isinstance(tail[0], Island) and len(tail[0].sources) == 1 and readers.count(tail[0].sources[0]) == 1:
        before = names.get(tail[0].sources[0])
        if before is None:
            break
        tail.insert(0, before)
        if isinstance(before, Norm):
            break
    match [getattr(node, "call", node) for node in tail]:
        case [Norm() as norm, pool, flatten, *middle, nn.Linear() as linear_module] if (
            _is_global_pool(pool)
            and _is_flatten(flatten)
            and (not middle or _is_head_norm(middle))
            and _is_plain_linear(linear_module)
        ):
            head_node = Head(linear.out, linear.part, norm, middle[0] if middle else None, linear_module, weight)
            return [node for node in nodes if node not in tail] + [head_node]
    return [*nodes, Loss("loss", linear.part, linear.out, weight)]


def _is_global_pool(call):
    return _is(call, nn.AdaptiveAvgPool2d) and _pair(call.output_size) == (1, 1)


def _is_flatten(call):
    return _is(call, nn.Flatten) and (call.start_dim, call.end_dim) == (1, -1)


def _is_head_norm(middle):
    return len(middle) == 1 and _is_plain_norm(middle[0], nn.BatchNorm1d)


def _match(node, parts, values, name, part):
    """The Node that begins at an fx node, and the last fx node that it takes in."""
    module = parts.get(node.target) if node.op == "call_module" else None
    if _is_plain_conv(module) and not node.kwargs:
        return Conv(name, part, values[node.args[0]], module), node
    if _is_relu_of_conv(node, parts):
        return Relu(name, part, values[node.all_input_nodes[0]]), node
    if _is_plain_pool(module) and not node.kwargs:
        return MaxPool(name, part, values[node.args[0]], module), node
    if _is_plain_norm(module, nn.BatchNorm2d) and not node.kwargs:
        return _match_norm(node, module, parts, values, name, part)
    return _island(node, module, values, name, part), node


def _match_norm(node, bn, parts, values, name, part):
    source, last = values[node.args[0]], node
    add = _only_reader(node)
    if add is not None and _is_add(add):
        others = [argument for argument in add.args if argument is not node]
        relu = _only_reader(add)
        # Without a ReLU behind it an add keeps nothing. The other side must have been computed by then.
        if len(others) == 1 and others[0] in values and relu is not None and _is_relu(relu, parts):
            return Norm(name, part, source, bn, True, values[others[0]]), relu
    relu = _only_reader(last)
    if relu is None or not _is_relu(relu, parts):
        return Norm(name, part, source, bn, False), last
    pool = _only_reader(relu)
    behind = parts.get(pool.target) if pool is not None and pool.op == "call_module" else None
    if _is_plain_pool(behind):
        return Pool(name, part, source, bn, behind), pool
    return Norm(name, part, source, bn, True), relu


def _chain(first, last):
    """The fx nodes from first to last, each the only reader of the one before."""
    chain = [first]
    while chain[-1] is not last:
        chain.append(_only_reader(chain[-1]))
    return chain


def _island(node, module, values, name, part):
    tensors = [argument for argument in node.all_input_nodes]
    sources = tuple(values[argument] for argument in tensors)
    if module is not None and len(tensors) == 1 and node.args == (tensors[0],) and not node.kwargs:
        call, what = module, f"{node.target.partition('.')[2] or part} ({type(module).__name__})"
    else:
        function = node.target if module is None else module
        what = f"{part}: {getattr(node.target, '__name__', node.target)}"

        def call(*given):
            at = dict(zip(tensors, given, strict=True))
            args = torch.fx.map_arg(node.args, at.__getitem__)
            kwargs = torch.fx.map_arg(node.kwargs, at.__getitem__)
            if node.op == "call_method":
                return getattr(args[0], node.target)(*args[1:], **kwargs)
            return function(*args, **kwargs)

    parameters = () if module is None else tuple(module.parameters())
    return Island(name, part, sources, call, what, parameters, _may_write(node, module))


def _may_write(node, module):
    """Whether what runs may write over its input: in-place modules, and what torch did not define."""
    if module is None:
        known = node.target in (operator.add, torch.add, F.relu, torch.relu)
        return not known or bool(node.kwargs.get("inplace")) or "out" in node.kwargs
    own = (type(part).__module__.startswith("torch.nn.") for part in module.modules())
    return not all(own) or any(getattr(part, "inplace", False) for part in module.modules())


def _pools_first(nodes):
    """The nodes with each max-pool that alone reads a Relu before it: the values are the same, and of the two only the
    small map has to be kept."""
    ordered = list(nodes)
    readers = [source for node in nodes for source in node.sources]
    for i, (relu, pool) in enumerate(itertools.pairwise(nodes)):
        if (
            isinstance(relu, Relu)
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


# What the kinds of modules that are known by heart run, as torch defines it.
_FORWARDS = {
    kind: {name: getattr(kind, name) for name in ("forward", "_conv_forward", "__call__") if hasattr(kind, name)}
    for kind in (
        nn.AdaptiveAvgPool2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.Conv2d, nn.Flatten, nn.Linear, nn.MaxPool2d, nn.ReLU
    )
}  # fmt: skip


def _is(module, kind):
    """Whether a module is of this very kind and computes what torch's class does: it is no subclass, and nobody has put
    another forward on the object or on the class."""
    return type(module) is kind and all(
        name not in vars(module) and getattr(kind, name) is function for name, function in _FORWARDS[kind].items()
    )


def _is_plain_conv(module):
    return (
        _is(module, nn.Conv2d)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and _has_own_weight(module)
    )


def _is_plain_linear(module):
    return _is(module, nn.Linear) and _has_own_weight(module) and module.weight.is_contiguous()


def _is_plain_norm(bn, kind):
    return (
        _is(bn, kind)
        and bn.affine
        and bn.training
        and bn.track_running_stats
        and bn.running_mean is not None
        and bn.running_var is not None
        and _has_own_weight(bn)
        and bn.weight.is_contiguous()
        and bn.bias is not None
        and bn.bias.is_contiguous()
    )


def _has_own_weight(module):
    """False where a hook computes weight or bias from other parameters: torch.nn.utils.spectral_norm, for instance."""
    return isinstance(module.weight, nn.Parameter) and isinstance(module.bias, nn.Parameter | None)


def _is_plain_pool(module):
    return (
        _is(module, nn.MaxPool2d)
        and module.dilation in (1, (1, 1))
        and not module.return_indices
        and max(_pair(module.kernel_size)) <= 16
    )


def _is_relu_of_conv(node, parts):
    if not _is_relu(node, parts) or len(node.all_input_nodes) != 1:
        return False
    (before,) = node.all_input_nodes
    conv = parts.get(before.target) if before.op == "call_module" else None
    return _is_plain_conv(conv) and not before.kwargs and _only_reader(before) is node


def _only_reader(node):
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_add(node):
    return (
        node.op == "call_function"
        and node.target in (operator.add, operator.iadd, torch.add)
        and len(node.args) == 2
        and not node.kwargs
    )


def _is_relu(node, parts):
    if node.op == "call_module":
        return _is(parts.get(node.target), nn.ReLU)
    return node.op == "call_function" and node.target in (F.relu, torch.relu)
