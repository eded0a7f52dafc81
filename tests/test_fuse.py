"""Rewriting BatchNorm chains: which ones, same values and statistics, and a module left as it was."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from auglocal_ext import models
from auglocal_ext.fuse import BatchNormAct, BatchNormActMaxPool, ConvBatchNormAct, fuse


def fused_chains(module):
    """(kind of the fused module, has a residual, has a ReLU) of each fused call, in order."""
    parts, chains = dict(module.named_modules()), []
    for node in module.graph.nodes:
        part = parts.get(node.target) if node.op == "call_module" else None
        if isinstance(part, BatchNormAct):
            chains.append((type(part), len(node.args) == 2, part.relu))
    return chains


def compare(module, fused, x):
    """Outputs, gradients and buffers of both on x, in float64."""
    grad, results = None, []
    initial = {name: buffer.clone() for name, buffer in module.named_buffers()}
    for run in (module, fused):
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                buffer.copy_(initial[name])
        y = run(x)
        grad = torch.randn(y.shape, dtype=y.dtype) if grad is None else grad
        gradients = torch.autograd.grad(y, list(module.parameters()), grad)
        results.append([y, *gradients, *(buffer.clone() for buffer in module.buffers())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_residual_block_becomes_fused_calls():
    block = models.BasicBlock(8, 16, stride=2).double()
    before = {name: value.clone() for name, value in block.state_dict().items()}
    fused = fuse(block, inside=(models.BasicBlock,))
    assert fused_chains(fused) == [
        (ConvBatchNormAct, False, True),  # bn1, relu, conv2
        (BatchNormAct, False, False),  # the shortcut's
        (BatchNormAct, True, True),  # bn2, add, relu
    ]
    after = block.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert type(block.bn1) is nn.BatchNorm2d
    assert {id(p) for p in fused.parameters()} == {id(p) for p in block.parameters()}
    compare(block, fused, torch.randn(4, 8, 6, 6, dtype=torch.float64))


@pytest.mark.parametrize("name", ["BasicBlock", "Bottleneck"])
def test_torchvisions_blocks(torchvision, name):
    kind = getattr(torchvision.models.resnet, name)
    block = kind(16 * kind.expansion, 16).double()
    fused = fuse(block, inside=(kind,))
    chains = fused_chains(fused)
    assert chains[-1] == (BatchNormAct, True, True)  # the last BatchNorm takes the residual and the ReLU
    assert all(chain == (ConvBatchNormAct, False, True) for chain in chains[:-1])
    compare(block, fused, torch.randn(4, 16 * kind.expansion, 5, 5, dtype=torch.float64))


class Chains(nn.Module):
    """Chains that must not be fused beyond the BatchNorm itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.BatchNorm2d(4) for _ in range(4))

    def forward(self, x):
        a = self.a(x)
        y = F.relu(a) + a  # a has two readers
        y = self.b(y) + x  # no ReLU behind the add
        z = self.c(y) + 1.0  # a number, no residual
        return torch.relu(torch.add(self.d(F.relu(z)), y, alpha=2))  # scaled


def test_what_does_not_match_runs_unfused():
    module = Chains().double()
    fused = fuse(module, inside=(Chains,))
    assert [chain[1:] for chain in fused_chains(fused)] == [(False, False)] * 4
    compare(module, fused, torch.randn(4, 4, 5, 5, dtype=torch.float64))


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_the_stem(ceil_mode):
    stem = nn.Sequential(
        nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1, ceil_mode=ceil_mode)
    ).double()
    fused = fuse(stem, inside=())
    assert fused_chains(fused) == [(BatchNormActMaxPool, False, True)]
    compare(stem, fused, torch.randn(2, 3, 22, 25, dtype=torch.float64))
    stem.eval()
    x = torch.randn(2, 3, 22, 25, dtype=torch.float64)
    assert torch.equal(fused(x), stem(x))


@pytest.mark.parametrize(
    "behind",
    [
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.MaxPool2d(2, dilation=2),
        nn.MaxPool2d(17, 1, 8),
        nn.AvgPool2d(2),
    ],
)
def test_what_cannot_join_stays_outside(behind):
    module = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), behind).double()
    fused = fuse(module, inside=())
    assert fused_chains(fused) == [(BatchNormAct, False, True)]
    compare(module, fused, torch.randn(2, 4, 18, 18, dtype=torch.float64))


def test_a_convolution_of_a_plain_batch_norm():
    module = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, 2, 1, groups=2)).double()
    fused = fuse(module, inside=())
    assert fused_chains(fused) == [(ConvBatchNormAct, False, False)]
    compare(module, fused, torch.randn(2, 4, 9, 9, dtype=torch.float64))
    module.eval()
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    assert torch.equal(fused(x), module(x))


def test_a_batch_norm_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn(F.relu(self.bn(x)))

    module = Twice().double()
    fused = fuse(module, inside=(Twice,))
    assert [chain[1:] for chain in fused_chains(fused)] == [(False, True), (False, False)]
    compare(module, fused, torch.randn(4, 4, 5, 5, dtype=torch.float64))


def test_a_container_with_its_own_forward_is_not_looked_into():
    class Gate(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    fused = fuse(nn.Sequential(Gate(nn.BatchNorm2d(4)), nn.ReLU()), inside=())
    assert fused_chains(fused) == [] and fused(-torch.ones(2, 4, 3, 3)).sum() == 0


def test_other_norms_stay_as_they_are():
    module = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.ReLU(), nn.BatchNorm2d(4, affine=False), nn.ReLU()
    )
    fused = fuse(module, inside=())
    assert fused_chains(fused) == []
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(fused(x), module(x))


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_running_statistics_move_as_in_eager(momentum):
    eager, ours = (nn.BatchNorm2d(3, momentum=momentum) for _ in range(2))
    fused = BatchNormAct(ours, relu=True)
    for seed in range(3):
        x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(seed)) * 3 + 1
        eager(x)
        fused(x)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(ours, name), getattr(eager, name))


def test_without_running_statistics_there_is_nothing_to_move():
    bn = nn.BatchNorm2d(3, track_running_stats=False)
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(BatchNormAct(bn, relu=True)(x), F.relu(bn(x)))


@pytest.mark.parametrize("residual", [False, True])
def test_a_batch_norm_in_eval_mode_uses_its_running_statistics(residual):
    bn = nn.BatchNorm2d(3)
    bn.running_mean += 2
    bn.eval()
    x = torch.randn(4, 3, 5, 5)
    added = torch.randn_like(x) if residual else None
    expected = F.relu(bn(x) + added) if residual else F.relu(bn(x))
    assert torch.equal(BatchNormAct(bn, relu=True)(x, added), expected)
    assert bn.num_batches_tracked == 0
