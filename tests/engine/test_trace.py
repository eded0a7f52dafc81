"""Reading a module into nodes: what becomes which node, what stays an island, and where a head is joined."""

import pytest
import torch
import torch.nn.functional as F
from engine_helpers import assert_trains_as_autograd
from torch import nn

from auglocal_ext import models
from auglocal_ext.engine.nodes import Conv, Head, Island, Loss, Norm, PooledNorm
from auglocal_ext.engine.nodes.activation import Function
from auglocal_ext.engine.trace import join, trace


def read(module, *inside):
    """The nodes of a module, which is looked into."""
    return trace(module, {type(module), *inside}, "part")[0]


def kinds(nodes):
    return [type(node).__name__ for node in nodes]


def names(nodes):
    return [node.out.removeprefix("part/") for node in nodes]


def chains(nodes):
    """(has a residual, has a ReLU) of each BatchNorm chain."""
    return [(node.residual is not None, node.relu) for node in nodes if isinstance(node, Norm)]


# ---- chains -------------------------------------------------------------------------------------------------


def test_a_block_with_a_plain_shortcut():
    block = models.BasicBlock(8, 8)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    nodes, out = trace(block, {models.BasicBlock}, "layer1.0", "stem/relu")
    assert kinds(nodes) == ["Conv", "Norm", "Conv", "Norm"] and chains(nodes) == [(False, True), (True, True)]
    assert nodes[0].source == nodes[3].residual == "stem/relu" and out == nodes[-1].out
    assert [nodes[i].source for i in (1, 2, 3)] == [nodes[i].out for i in (0, 1, 2)]
    assert {node.part for node in nodes} == {"layer1.0"} and all(node.out.startswith("layer1.0/") for node in nodes)
    # The nodes hold the module's own parts, and the module is left as it was.
    assert [nodes[0].conv, nodes[1].bn, nodes[2].conv, nodes[3].bn] == list(block.children())
    after = block.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_convolutions_that_read_one_map_stand_side_by_side():
    nodes = read(models.BasicBlock(8, 16, stride=2))
    # The shortcut's BatchNorm comes last: it takes the add and the ReLU, and bn2 is its residual.
    assert kinds(nodes) == ["Conv", "Conv", "Norm", "Conv", "Norm", "Norm"]
    assert names(nodes)[:2] == ["_0_conv1", "_0_downsample_0"] and nodes[0].source == nodes[1].source == "x"
    assert chains(nodes) == [(False, True), (False, False), (True, True)] and nodes[5].residual == nodes[4].out


@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("name", ["BasicBlock", "Bottleneck"])
def test_torchvisions_blocks(torchvision, name, shortcut):
    kind = getattr(torchvision.models.resnet, name)
    wide = 16 * kind.expansion
    downsample = nn.Sequential(nn.Conv2d(wide, wide, 1, bias=False), nn.BatchNorm2d(wide)) if shortcut else None
    nodes = read(kind(wide, 16, downsample=downsample))
    convs = (2 if name == "BasicBlock" else 3) + shortcut
    assert not any(isinstance(node, Island) for node in nodes) and kinds(nodes).count("Conv") == convs
    assert chains(nodes)[-1] == (True, True) and chains(nodes).count((True, True)) == 1
    assert all(chain == (False, True) for chain in chains(nodes)[: convs - 1 - shortcut])
    assert kinds(nodes)[:2] == (["Conv", "Conv"] if shortcut else ["Conv", "Norm"])


class Chains(nn.Module):
    """Chains that must not be joined beyond the BatchNorm itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.BatchNorm2d(4) for _ in range(4))

    def forward(self, x):
        a = self.a(x)
        y = F.relu(a) + a  # a has two readers
        y = (self.b(y) + x).tanh()  # no ReLU behind the add, whose sides may have two shapes
        z = self.c(y) + 1.0  # a number, no residual
        return torch.relu(torch.add(self.d(F.relu(z)), y, alpha=2))  # scaled


def test_what_does_not_match_is_not_joined():
    nodes = read(Chains())
    assert chains(nodes) == [(False, False)] * 4
    assert kinds(nodes)[:4] == ["Norm", "Activation", "Add", "Norm"] and kinds(nodes).count("Activation") == 3
    islands = [node.what for node in nodes if isinstance(node, Island)]
    assert islands == [f"part: {what}" for what in ("tanh", "add", "add")]


def test_other_activations_are_joined_too():
    class Others(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(7))
            self.relu6, self.leaky = nn.ReLU6(), nn.LeakyReLU(0.2, inplace=True)

        def forward(self, x):
            x = self.leaky(self.bn[1](self.relu6(self.bn[0](x))))
            x = F.leaky_relu(self.bn[3](self.bn[2](x).relu())) + self.bn[4](x).clamp(min=0)
            return F.gelu(self.bn[6](F.gelu(self.bn[5](x), approximate="tanh")))

    nodes = read(Others())
    functions = [node.function for node in nodes if isinstance(node, Norm)]
    assert functions == [
        Function("relu6"),
        Function("leaky_relu", (("negative_slope", 0.2),)),
        None,  # a method
        Function("leaky_relu", (("negative_slope", 0.01),)),
        None,  # a clamp
        None,  # the op does not know this approximation
        Function("gelu", (("approximate", "none"),)),
    ]
    assert kinds(nodes).count("Island") == 2 and kinds(nodes).count("Activation") == 1


@pytest.mark.parametrize("relu", [nn.ReLU(), nn.ReLU(inplace=True)])
def test_relu_modules_are_joined(relu):
    assert chains(read(nn.Sequential(nn.BatchNorm2d(4), relu))) == [(False, True)]


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_the_stem(ceil_mode):
    pool = nn.MaxPool2d(3, 2, 1, ceil_mode=ceil_mode)
    nodes = read(nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3), nn.BatchNorm2d(8), nn.ReLU(), pool))
    assert kinds(nodes) == ["Conv", "PooledNorm"] and nodes[1].pool is pool and nodes[1].source == nodes[0].out


def test_a_relu_with_two_readers_is_not_pooled():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.pool, self.conv = nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2, 2)

        def forward(self, x):
            x = F.relu(self.bn(x))
            return self.pool(x) + self.conv(x)

    assert kinds(read(Both())) == ["Norm", "MaxPool", "Conv", "Add"]


@pytest.mark.parametrize("relu", [nn.ReLU(), nn.ReLU(inplace=True)])
def test_a_relu_behind_a_convolution(relu):
    nodes = read(nn.Sequential(nn.Conv2d(3, 4, 1), relu, nn.Conv2d(4, 4, 1)))
    assert kinds(nodes) == ["Conv", "Activation", "Conv"]
    assert [nodes[i].source for i in (1, 2)] == [nodes[i].out for i in (0, 1)]


def test_a_pool_goes_before_the_relu_of_a_convolution():
    pool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)
    nodes, out = trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(True), pool), set(), "part")
    assert kinds(nodes) == ["Conv", "MaxPool", "Activation"] and nodes[1].pool is pool
    assert [node.source for node in nodes] == ["x", nodes[0].out, nodes[1].out] and nodes[2].out == out
    assert len({node.out for node in nodes}) == 3


def test_relus_that_may_not_write_over_what_they_read():
    class Others(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.pool = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.MaxPool2d(2)

        def forward(self, x):
            a = self.a(x)  # two readers
            b = F.relu(self.b(F.relu(a) + a))  # another reader beside the pool
            return self.pool(b) + self.pool(F.relu(x)) + b.mean()

    nodes = read(Others())
    relus = [node for node in nodes if type(node).__name__ == "Activation"]
    assert [relu.in_place for relu in relus] == [False, True, False]
    assert kinds(nodes).index("MaxPool") > nodes.index(relus[1])
    _, relu = read(nn.Sequential(nn.Conv2d(3, 4, 2, padding="same"), nn.ReLU()))
    assert not relu.in_place


@pytest.mark.parametrize(
    "behind",
    [
        nn.Conv2d(4, 4, 2, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.ConvTranspose2d(4, 4, 3),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)),
        nn.utils.spectral_norm(nn.Conv2d(4, 4, 3)),
        nn.MaxPool2d(2, dilation=2),
        nn.MaxPool2d(17, 1, 8),
        nn.MaxPool2d((17, 1)),
        nn.LPPool2d(2, 2),
        nn.AdaptiveAvgPool2d(2),
    ],
    ids=repr,
)
def test_what_is_an_island_behind_a_chain(behind):
    nodes = read(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), behind))
    assert kinds(nodes) == ["Norm", "Island"] and chains(nodes) == [(False, True)]
    assert nodes[1].call is behind and nodes[1].parameters == tuple(behind.parameters())
    assert nodes[1].what == f"2 ({type(behind).__name__})" and nodes[1].sources == (nodes[0].out,)


def frozen(bn):
    return bn.eval()


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "norm",
    [
        nn.GroupNorm(2, 4),
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.BatchNorm2d(4, affine=False).eval(),
        nn.InstanceNorm2d(4, affine=True),
        nn.SyncBatchNorm(4, affine=False),
        Doubled(4),
    ],
    ids=repr,
)
def test_other_norms_are_islands(norm):
    nodes = read(nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.ReLU()))
    assert kinds(nodes) == ["Conv", "Island", "Activation"] and nodes[1].call is norm


def test_batch_norms_whose_statistics_do_not_change_are_chains(torchvision):
    block = models.BasicBlock(4, 4).eval()
    block.bn1 = torchvision.ops.FrozenBatchNorm2d(4)
    nodes = trace(block, {models.BasicBlock}, "part")[0]
    assert kinds(nodes) == ["Conv", "FixedNorm", "Conv", "FixedNorm"]
    assert [node.bn for node in nodes[1::2]] == [block.bn1, block.bn2]
    assert nodes[1].function == nodes[3].function == Function("relu") and nodes[3].residual == "x"


def test_a_batch_norm_of_cumulative_average_is_a_chain():
    assert kinds(read(nn.Sequential(nn.BatchNorm2d(4, momentum=None), nn.ReLU()))) == ["Norm"]


def test_a_batch_norm_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn(F.relu(self.bn(x)))

    module = Twice()
    nodes = read(module)
    assert chains(nodes) == [(False, True), (False, False)] and nodes[0].out != nodes[1].out
    assert nodes[0].bn is nodes[1].bn is module.bn


def test_a_container_with_its_own_forward_is_not_looked_into():
    class Gate(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    gate = Gate(nn.BatchNorm2d(4))
    nodes = read(nn.Sequential(gate, nn.Sequential(nn.BatchNorm2d(4)), nn.ReLU()))
    assert kinds(nodes) == ["Island", "Norm"] and nodes[0].call is gate
    assert nodes[0].parameters == tuple(gate.parameters())


def test_islands_that_are_no_module_run_with_their_arguments():
    class Functional(nn.Module):
        def forward(self, x):
            return torch.cat([x.flatten(1), F.avg_pool2d(x, kernel_size=2).flatten(start_dim=1) + 1], 1)

    x, values = torch.randn(2, 3, 4, 4), {}
    nodes = read(Functional())
    values["x"] = x
    for node in nodes:
        values[node.out] = node.plain(*(values[name] for name in node.sources))
    assert sorted(kinds(nodes)) == ["AvgPool", "Concat", "Island", "Reshape", "Reshape"]
    assert torch.equal(values[nodes[-1].out], Functional()(x))


class Own(nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("module", "may_write"),
    [
        (nn.Hardtanh(inplace=True), True),
        (nn.ELU(inplace=True), True),
        (nn.Hardtanh(), False),
        (nn.GroupNorm(2, 4), False),
        (Own(), True),  # who knows
    ],
    ids=repr,
)
def test_islands_that_may_write_over_their_input_are_told(module, may_write):
    class Container(nn.Sequential):
        pass

    (node,) = read(nn.Sequential(module))
    assert node.may_write is may_write
    (node,) = read(nn.Sequential(Container(nn.Identity(), module)))
    assert node.may_write


def test_functions_that_may_write_over_their_input_are_told():
    class Functions(nn.Module):
        def forward(self, x):
            return F.elu(torch.add(x, x, alpha=2), inplace=True).add_(x)

    assert [node.may_write for node in read(Functions())] == [False, True, True]


def test_hooks_do_not_see_tracing():
    module, seen = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid()), []
    for part in module.modules():
        part.register_forward_hook(lambda *_: seen.append(1))
        part.register_forward_pre_hook(lambda *_: seen.append(1))
    assert kinds(read(module)) == ["Conv", "Island"] and not seen
    assert all(len(part._forward_hooks) == 1 for part in module.modules())


# ---- heads --------------------------------------------------------------------------------------------------

STEM = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]


def joined(units, head, handed_on=False):
    """The nodes of a module of these units and head; with its features handed on or not."""
    nodes, out = [], "images"
    for index, unit in enumerate(units):
        made, out = trace(unit, {models.BasicBlock}, f"unit{index}", out)
        nodes += made
    head_nodes, _ = trace(head, {models.BasicBlock}, "head", out)
    return join(nodes, head_nodes, out if handed_on else None)


def tail(*middle, channels=4, pool=None, flatten=None):
    linear = nn.Linear(channels, 5)
    return nn.Sequential(pool or nn.AdaptiveAvgPool2d(1), flatten or nn.Flatten(1), *middle, linear)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_head_takes_in_the_last_chain(batch_norm):
    middle = [nn.BatchNorm1d(4)] if batch_norm else []
    head = tail(*middle)
    nodes = joined([nn.Sequential(*STEM)], head)
    assert kinds(nodes) == ["Conv", "Head"]
    assert nodes[1].norm.bn is STEM[1] and nodes[1].norm.relu and nodes[1].linear is head[-1]
    assert nodes[1].head_bn is (middle[0] if middle else None)
    assert nodes[1].sources == (nodes[0].out,) and nodes[1].part == "head"


@pytest.mark.parametrize("pool", [nn.AdaptiveAvgPool2d((1, 1)), nn.AdaptiveAvgPool2d([1, 1])])
def test_ways_to_say_global_pool(pool):
    assert kinds(joined([nn.Sequential(*STEM)], tail(pool=pool))) == ["Conv", "Head"]


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 5)

    def forward(self, x):
        return self.linear(x.mean([2, 3]))


def test_a_mean_is_a_global_pool_too():
    nodes, out = trace(nn.Sequential(*STEM), set(), "unit", "images")
    head, _ = trace(Mean(), {Mean}, "head", out)
    assert kinds(join(nodes, head, None)) == ["Conv", "Head"]


@pytest.mark.parametrize(("stride", "channels"), [(1, 4), (2, 8)])
def test_a_head_takes_in_a_residual(stride, channels):
    """From the identity, and from a downsampling."""
    nodes = joined([nn.Sequential(*STEM), models.BasicBlock(4, channels, stride)], tail(channels=channels))
    head = nodes[-1]
    assert isinstance(head, Head) and "Island" not in kinds(nodes) and kinds(nodes).count("Conv") == len(nodes) // 2
    assert head.norm.residual == (nodes[1].out if stride == 1 else nodes[-2].out)
    assert head.sources == (head.norm.source, head.norm.residual)
    assert head.norm not in nodes


def test_features_handed_on_are_not_taken_in():
    units = [nn.Sequential(*STEM)]
    kinds_of = kinds(joined(units, tail(), handed_on=True))
    assert kinds_of == ["Conv", "Norm", "GlobalPool", "Reshape", "Linear", "Loss"]
    # The aux net's own last chain is.
    aux = nn.Sequential(models.BasicBlock(4, 4), *tail())
    nodes = joined(units, aux, handed_on=True)
    assert kinds(nodes) == ["Conv", "Norm", "Conv", "Norm", "Conv", "Head"] and nodes[-1].norm.residual == nodes[1].out


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("units", "head"),
    [
        ([nn.Conv2d(3, 4, 1)], tail()),  # no chain
        ([*STEM, nn.MaxPool2d(2)], tail()),
        ([*STEM[:2], nn.ReLU6()], tail()),
        (STEM, tail(nn.Dropout(0.5))),
        (STEM, tail(nn.ReLU())),
        (STEM, tail(nn.BatchNorm1d(4, affine=False))),
        (STEM, tail(frozen(nn.BatchNorm1d(4)))),
        (STEM, tail(nn.BatchNorm1d(4), nn.BatchNorm1d(4))),
        (STEM, tail(nn.Linear(4, 4))),
        (STEM, tail(pool=nn.AdaptiveAvgPool2d(2), channels=16)),
        (STEM, tail(pool=nn.AdaptiveAvgPool2d((1, None)), channels=36)),
        (STEM, tail(pool=nn.AdaptiveMaxPool2d(1))),
        (STEM, tail(flatten=nn.Flatten(2), channels=1)),
        (STEM, tail(flatten=nn.Flatten(1, 2), channels=1)),
        (STEM, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(0), nn.Unflatten(0, (4, 4)), nn.Linear(4, 5))),
        (STEM, nn.Sequential(*tail()[:2], Scaled(4, 5))),
        (STEM, nn.Sequential(*tail()[:2], nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)))),
        (STEM, nn.Sequential(*tail()[:2], nn.utils.spectral_norm(nn.Linear(4, 5)))),
        (STEM, nn.Sequential(nn.Conv2d(4, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())),
    ],
)
def test_what_is_no_head_ends_in_a_loss(units, head):
    nodes = joined([nn.Sequential(*units)], head)
    assert not any(isinstance(node, Head) for node in nodes)
    assert isinstance(nodes[-1], Loss) and nodes[-1].source == nodes[-2].out and nodes[-1].out == "cross-entropy"


def test_a_chain_with_another_reader_is_not_taken_in():
    """As where a second branch of the head read it."""
    units, out = trace(nn.Sequential(*STEM), set(), "unit", "images")
    head, _ = trace(tail(), set(), "head", out)
    assert isinstance(join(units, head, None)[-1], Head)
    other = Conv("other", "unit", out, STEM[0])
    assert isinstance(join([*units, other], head, None)[-1], Loss)


def test_the_pool_of_a_chain_that_is_read_here():
    """A PooledNorm is no chain for a head to take in, though its BatchNorm is one."""
    nodes = joined([nn.Sequential(*STEM, nn.MaxPool2d(2))], tail())
    assert kinds(nodes) == ["Conv", "PooledNorm", "GlobalPool", "Reshape", "Linear", "Loss"] and isinstance(
        nodes[1], PooledNorm
    )


class Views(nn.Module):
    """Several views of one tensor, some given on as they are."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        a, b = self.norm(x).split([1, 3], dim=1)
        c, d, e, f = self.conv(x).unbind(1)
        halves = torch.cat(x.tensor_split(2, dim=1)[::-1], 1)
        return torch.cat([a, b], 1) + torch.stack([f, c, e, d], 1).to(x.dtype) * halves


class Pair(nn.Module):
    """A module that puts out two tensors and looks at values, and a function that does."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.norm(x)
            return y * 2 if x.sum() > 0 else y, x * 2

    def __init__(self):
        super().__init__()
        self.norm, self.inner = nn.BatchNorm2d(4), self.Inner()

    def forward(self, x):
        a, b = self.inner(self.norm(x))
        var, mean = torch.var_mean(x, dim=1, keepdim=True)
        return a * var + b * mean


@pytest.mark.parametrize("block", [Views, Pair])
def test_what_puts_out_several_tensors_trains_as_autograd(block):
    assert_trains_as_autograd(block(), 4)
