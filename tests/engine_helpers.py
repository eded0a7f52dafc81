"""A block as the only unit of a network: its training step against autograd's, and what it keeps."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from auglocal_ext.common.memory import LiveBytes, tensors_of
from auglocal_ext.common.meta import meta_copy
from auglocal_ext.engine.as_real import RealLayouts
from auglocal_ext.engine.program import build
from auglocal_ext.engine.timeline import timeline
from auglocal_ext.engine.trace import join, trace


class Net(nn.Module):
    """A convolution, the block and a classifier."""

    def __init__(self, block, channels):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, channels, 1), block
        self.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(3))

    def forward(self, x):
        return self.classifier(self.block(self.stem(x)))


def looked_into(module):
    """The types of its parts that are not of torch.nn."""
    return {type(part) for part in module.modules() if not type(part).__module__.startswith("torch.nn.")}


def read(net):
    """The net's nodes."""
    inside = looked_into(net)
    stem, out = trace(net.stem, inside, "stem", "images")
    block, out = trace(net.block, inside, "block", out)
    head, _ = trace(net.classifier, inside, "head", out)
    return join([*stem, *block], head, None)


def assert_trains_as_autograd(block, channels, size=8, memory_format=torch.contiguous_format):
    """The gradients and buffers of a step in float64, from the same seed."""
    images, labels = torch.randn(3, 3, size, size).double().to(memory_format=memory_format), torch.tensor([0, 2, 1])
    net = Net(block, channels).double()
    net(images)
    own = copy.deepcopy(net)
    torch.manual_seed(1)
    F.cross_entropy(own(images), labels).backward()
    torch.manual_seed(1)
    build(read(net), "images", None).run([images], labels)
    for (name, a), b in zip(net.named_parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-10, msg=name)
    for (name, a), b in zip(net.named_buffers(), own.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def kept_share(block, channels, size=64):
    """Bytes that the forward leaves for the backward, as a share of what autograd saves; fp32, without data."""
    net = Net(block, channels)
    net(torch.randn(2, 3, size, size))
    net = meta_copy(net)
    images, labels = torch.empty(16, 3, size, size, device="meta"), torch.zeros(16, dtype=torch.long, device="meta")
    with LiveBytes([images, labels, *tensors_of(net)]) as live, RealLayouts(), torch.enable_grad():
        before = live.now
        loss = F.cross_entropy(net(images), labels)
        saved = live.now - before
    del loss
    program = build(read(net), "images", None)
    return timeline(program, images, labels, tensors_of(net), count_input=False, images=images)[0].kept / saved
