"""How gradients come into their parameters."""

import pytest
import torch
from engine_helpers import Net, read
from torch import nn

from auglocal_ext.common.memory import LiveBytes, bytes_of, tensors_of
from auglocal_ext.engine.program import build


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)), 8).double()
    net(torch.zeros(2, 3, 8, 8).double())
    return net


def batches():
    return [(torch.randn(3, 3, 8, 8).double(), torch.tensor([0, 2, 1])) for _ in range(2)]


def test_gradients_are_added_to_those_there_are(net):
    given, expected = batches(), [0] * len(list(net.parameters()))
    for images, labels in given:
        build(read(net), "images", None).run([images], labels)
        expected = [total + p.grad for total, p in zip(expected, net.parameters(), strict=True)]
    net.zero_grad()
    program = build(read(net), "images", None, accumulate=True)
    for images, labels in given:
        program.run([images], labels)
    for p, total in zip(net.parameters(), expected, strict=True):
        assert torch.equal(p.grad, total)


def test_a_gradient_does_not_outlive_its_addition(net):
    program, (images, labels) = build(read(net), "images", None, accumulate=True), batches()[0]
    program.run([images], labels)
    gradients = [p.grad for p in net.parameters()]
    with LiveBytes([*tensors_of(net), *gradients, images, labels]) as live:
        before = live.now
        _, logits, loss = program.run([images], labels)
        assert live.now == before + bytes_of([logits, loss])


def test_hooks_see_each_gradient_before_it_is_added(net):
    seen, steps = [], []
    net.stem.weight.register_hook(lambda gradient: seen.append(gradient) or 2 * gradient)
    net.stem.weight.register_post_accumulate_grad_hook(lambda parameter: steps.append(parameter.grad.clone()))
    program = build(read(net), "images", None, accumulate=True)
    for images, labels in batches():
        program.run([images], labels)
    torch.testing.assert_close(steps, [2 * seen[0], 2 * seen[0] + 2 * seen[1]], rtol=1e-14, atol=0)
