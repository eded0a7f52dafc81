"""Attention: what it is and what it is not, beside eager torch, and what it keeps."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from auglocal_ext.common.meta import meta_copy
from auglocal_ext.engine.nodes import Attention, Island
from auglocal_ext.engine.program import build
from auglocal_ext.engine.timeline import timeline
from auglocal_ext.engine.trace import join, trace


class Block(nn.Module):
    def __init__(self, size=16, heads=2, weights=False, item=0, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(size, heads, batch_first=True, **options)
        self.weights, self.item = weights, item

    def forward(self, x):
        return self.attention(x, x, x, need_weights=self.weights)[self.item]


def program_of(block, head, **options):
    nodes, out = trace(block, {Block}, "body", "images")
    logits, _ = trace(head, set(), "head", out)
    return build(join(nodes, logits, None), "images", None, **options), nodes


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_eager_torch(autocast, bias):
    torch.manual_seed(0)
    block, head = Block(32, 4, bias=bias), nn.Sequential(nn.Linear(32, 5), nn.Flatten(1))
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, labels, own = torch.randn(3, 7, 32), torch.tensor([0, 4, 2]), copy.deepcopy(block)
    program, nodes = program_of(block, head, autocast=autocast)
    assert [type(node) for node in nodes] == [Attention]
    _, logits, _ = program.run([x.clone()], labels)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
        expected = head(own(x))
    F.cross_entropy(expected.float(), labels).backward()
    exact = copy.deepcopy(own).double()
    exact.zero_grad()
    true = copy.deepcopy(head).double()(exact(x.double()))
    F.cross_entropy(true, labels).backward()
    of_all = [(logits, expected, true)]
    of_all += [(p.grad for p in three) for three in zip(*(m.parameters() for m in (block, own, exact)), strict=True)]
    for ours, eager, true in of_all:
        assert (ours - true).norm() <= 2 * (eager - true).norm() + 1e-6 * true.norm()


@pytest.mark.parametrize(
    "block",
    [
        Block(dropout=0.1),
        Block().eval(),
        Block(12),
        Block(weights=True),
        Block(item=1, weights=True),
        Block(add_zero_attn=True),
        Block(add_bias_kv=True),
    ],
)
def test_others_are_islands(block):
    _, nodes = program_of(block, nn.Flatten(1))
    assert all(isinstance(node, Island) for node in nodes)


def test_a_frozen_projection_has_no_weight_gradient():
    block = Block()
    block.attention.in_proj_weight.requires_grad_(False)
    block.attention.in_proj_bias.requires_grad_(False)
    program, _ = program_of(block, nn.Flatten(1))
    assert set(program.gradients.values()) == set(block.attention.out_proj.parameters())
    assert [step.kind for step in program.steps].count("weight gradient") == 1


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_what_it_keeps_and_computes(device_type):
    n, length, size, heads = 2, 64, 32, 4
    block, head = meta_copy(Block(size, heads)), nn.Flatten(1)
    program, _ = program_of(block, head, device_type=device_type)
    x, labels = torch.empty(n, length, size, device="meta"), torch.empty(n, dtype=torch.long, device="meta")
    line, _ = timeline(program, x, labels, [*block.parameters()])
    row = n * length * size
    rows = n * heads * length * 4
    kept = next(moment for moment in line.moments if moment.kind == "loss").before
    assert kept == (1 + 3 + 1 + 1) * row * 4 + rows  # input, projections, attended, output
    forward = sum(moment.macs for moment in line.moments if moment.phase.value == "forward")
    assert forward == row * size * 4 + 2 * row * length
    backward = sum(moment.macs for moment in line.moments if moment.phase.value == "backward")
    assert backward == row * size * (1 + 1 + 3) + 5 * row * length
    behind = nn.Sequential(nn.Linear(size, size, device="meta"), block)
    line, _ = timeline(program_of(behind, head, device_type=device_type)[0], x, labels, [*behind.parameters()])
    more = sum(moment.macs for moment in line.moments if moment.phase.value == "backward")
    assert more == backward + row * size * (3 + 1)  # of the projection its data gradient, of the first its weight's
