"""Views within a program: who may write over their memory, what keeps it alive, sizes that a forward reads."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from auglocal_ext.common.memory import LiveBytes, tensors_of
from auglocal_ext.common.meta import meta_copy
from auglocal_ext.engine.nodes import Island, Reshape
from auglocal_ext.engine.program import build
from auglocal_ext.engine.timeline import timeline
from auglocal_ext.engine.trace import join, trace


class Crossed(nn.Module):
    """Rebuilds begin with a view of what is kept, which they may not write over."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.before(x)
        return self.after(F.silu(F.silu(x.transpose(2, 3).reshape(x.shape[0], 4, 6, 6))) + F.gelu(F.gelu(x)))


class Viewed(nn.Module):
    """Views of the module's input, and of what it hands on."""

    def __init__(self):
        super().__init__()
        self.before = nn.Linear(36, 8)

    def forward(self, x):
        torch._assert(x.dim() == 4, f"not of {x.shape}")
        x = self.before(x.flatten(2))
        n, length, _ = x.shape
        return x.permute(0, 2, 1).unflatten(1, (2, 4)).view(n, 2, 4, length)


class Swapped(nn.Module):
    """Hands on a view with gaps between the values that lie side by side."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.conv(x).permute(0, 3, 1, 2)


HEAD = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1))


def read(module, features, **options):
    nodes, out = trace(module, {type(module)}, "body", "images")
    logits, _ = trace(HEAD, set(), "head", out)
    handed_on = out if features else None
    return build(join(nodes, logits, handed_on), "images", handed_on, **options), nodes


@pytest.mark.parametrize("kind", [Crossed, Viewed, Swapped])
@pytest.mark.parametrize("features", [False, True])
def test_gradients_and_bytes(kind, features):
    torch.manual_seed(0)
    module = kind().double()
    program, nodes = read(module, features, pinned=set())
    assert any(isinstance(node, Reshape) for node in nodes)
    assert not any(isinstance(node, Island) and "getitem" in node.what for node in nodes)
    own, images, labels = copy.deepcopy(module), torch.randn(2, 3, 6, 6, dtype=torch.float64), torch.tensor([0, 1])
    out, logits, loss = program.run([images.clone()], labels)
    expected = own(images)
    expected_loss = F.cross_entropy(HEAD(expected), labels)
    expected_loss.backward()
    assert torch.allclose(loss, expected_loss) and (out is None) != features
    if features:
        dense = out.is_contiguous() or out.is_contiguous(memory_format=torch.channels_last)
        assert dense and torch.allclose(out, expected)
    for parameter, other in zip(module.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)


@pytest.mark.parametrize("kind", [Crossed, Viewed, Swapped])
@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("count_input", [False, True])
def test_planned_bytes_are_those_of_a_run(kind, features, count_input):
    module = kind()
    without = meta_copy(module)
    walked, _ = read(without, features)
    images, labels = torch.randn(2, 3, 6, 6), torch.tensor([0, 1])
    meta = images.to("meta")
    line, _ = timeline(walked, meta, labels.to("meta"), tensors_of(without), count_input=count_input)
    assert all(buffer.bytes > 0 for buffer in line.buffers)
    program, _ = read(module, features)
    given = [] if count_input else [images]
    with torch.no_grad(), LiveBytes([*given, labels, *tensors_of(module)]) as live:
        base = live.now
        inputs = [images if not count_input else torch.randn(2, 3, 6, 6)]
        kept = program.run(inputs, labels)
        assert live.peak - base == line.peak and live.now - base == line.end
    del kept


def test_a_size_of_what_is_read_for_nothing_else_makes_an_island():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return x.reshape(self.conv(x).shape[0], -1)

    nodes, _ = trace(Odd(), {Odd}, "body", "images")
    assert [type(node) for node in nodes] == [Island]


def test_other_values_of_the_same_bits_are_no_reshape():
    class Bits(nn.Module):
        def forward(self, x):
            return x.view(torch.int32)

    nodes, _ = trace(Bits(), {Bits}, "body", "images")
    assert [type(node) for node in nodes] == [Island]
