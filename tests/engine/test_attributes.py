"""Parameters and buffers that a forward uses directly."""

import torch
from torch import nn

from auglocal_ext.engine.node import Attribute
from auglocal_ext.engine.nodes import Island
from auglocal_ext.engine.program import build
from auglocal_ext.engine.trace import join, trace


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.shift = nn.Conv2d(3, 3, 1), nn.Parameter(torch.randn(3, 1, 1))
        self.register_buffer("low", torch.zeros(3, 1, 1))

    def forward(self, x):
        return torch.maximum(self.conv(x) - self.shift, self.low)


def test_a_unit_that_uses_its_own_parameters_is_no_island_as_a_whole():
    module = Own()
    nodes, _ = trace(module, {Own}, "unit")
    assert [type(node).__name__ for node in nodes] == ["Conv", "Island", "Island"]
    assert nodes[1].attributes == (None, Attribute(module, "shift")) and nodes[1].parameters == (module.shift,)
    assert nodes[2].attributes == (None, Attribute(module, "low")) and nodes[2].parameters == ()
    assert len(nodes[1].sources) == len(nodes[2].sources) == 1


def test_a_hook_on_one_runs_once_on_its_gradient():
    module, head = Own(), nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    nodes, out = trace(module, {Own}, "unit", "images")
    program = build(join(nodes, trace(head, set(), "head", out)[0], None), "images", None)
    seen = []
    module.shift.register_hook(lambda grad: seen.append(grad.clone()) or 2 * grad)
    program.run([torch.randn(2, 3, 4, 4)], torch.tensor([0, 1]))
    assert len(seen) == 1 and seen[0].any() and torch.equal(module.shift.grad, 2 * seen[0])


def test_what_a_buffer_is_replaced_by_is_used():
    module = Own()
    (_, _, node), _ = trace(module, {Own}, "unit")
    module.low = torch.ones(3, 1, 1)
    assert isinstance(node, Island) and node.plain(torch.zeros(1, 3, 2, 2)).min() == 1
