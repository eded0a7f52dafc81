"""Dropout and stochastic depth: drawn as torch and torchvision draw, kept by a byte, gone where nothing is dropped."""

import engine_helpers
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from auglocal_ext import LocalTrainer, models
from auglocal_ext.engine.trace import trace


def kinds(module, *inside):
    return [type(node).__name__ for node in trace(module, {type(module), *inside}, "part")[0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", ["values", "row", "batch"])
def test_what_is_drawn_is_what_the_module_draws(torchvision, dtype, what):
    module = nn.Dropout(0.3) if what == "values" else torchvision.ops.StochasticDepth(0.3, what)
    x = torch.randn(64, 4, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
    (node,), _ = trace(module, set(), "part")
    for seed in range(3):
        torch.manual_seed(seed)
        expected = module(x)
        torch.manual_seed(seed)
        out, noise = node._drop(x)
        assert torch.equal(out, expected) and out.stride() == x.stride()
        torch.manual_seed(seed)
        assert torch.equal(node.plain(x), expected)
    assert noise.nbytes == {"values": x.numel(), "row": 64 * x.itemsize, "batch": x.itemsize}[what]


class Functions(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.conv, self.run = nn.Conv2d(4, 4, 1), run

    def forward(self, x):
        return self.run(self, self.conv(x))


def test_ways_to_call_it(torchvision):
    for run in (
        lambda self, x: F.dropout(x, 0.2, self.training),
        lambda self, x: F.dropout(x, training=True),
    ):
        assert kinds(Functions(run)) == ["Conv", "Dropout"]
    for run in (
        lambda self, x: F.dropout(x, 0.2, training=False),
        lambda self, x: F.dropout(x, 0.0),
    ):
        assert kinds(Functions(run)) == ["Conv"]
    for run in (
        lambda self, x: F.dropout(x, 1.0),
        lambda self, x: F.dropout2d(x, 0.2),
        lambda self, x: F.dropout(x, 0.2, True, True) + x,  # x is changed
    ):
        assert "Dropout" not in kinds(Functions(run)) and "Island" in kinds(Functions(run))
    depth = torchvision.ops.StochasticDepth
    for inside in (depth, nn.Sequential):
        assert kinds(nn.Sequential(nn.Conv2d(3, 4, 1), depth(0.5, "row")), inside) == ["Conv", "Dropout"]
        assert kinds(nn.Sequential(nn.Conv2d(3, 4, 1), depth(0.5, "row").eval()), inside) == ["Conv"]


def test_where_nothing_is_dropped_a_chain_goes_on(torchvision):
    for module in (nn.Dropout(0.0), nn.Dropout(0.5).eval(), nn.Identity(), torchvision.ops.StochasticDepth(0.0, "row")):
        assert kinds(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), module, nn.ReLU())) == ["Conv", "Norm"]


class Doubled(nn.Dropout):
    def forward(self, x):
        return super().forward(2 * x)


def test_others_are_islands():
    assert kinds(nn.Sequential(nn.Conv2d(3, 4, 1), Doubled(0.5))) == ["Conv", "Island"]
    module = nn.Dropout(0.5)
    module.forward = lambda x: x
    assert kinds(nn.Sequential(nn.Conv2d(3, 4, 1), module)) == ["Conv", "Island"]


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_a_block_with_stochastic_depth(torchvision, mode):
    models = torchvision.models.efficientnet
    block = models.MBConv(models.MBConvConfig(4, 3, 1, 8, 8, 1, 1.0, 1.0), 0.5, nn.BatchNorm2d)
    block.stochastic_depth.mode = mode
    engine_helpers.assert_trains_as_autograd(block, 8)
    assert kinds(block, *engine_helpers.looked_into(block))[-2:] == ["Dropout", "Add"]


def test_a_step_goes_by_how_a_dropout_is_set_now(batch):
    model = models.CifarResNet(1)
    model.fc = nn.Sequential(nn.Dropout(0.5), model.fc)
    trainer = LocalTrainer(model, rule="bp", optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))

    def losses():
        torch.manual_seed(0)
        expected = F.cross_entropy(model(batch[0]), batch[1])
        torch.manual_seed(0)
        return trainer.step(*batch).loss.item(), expected.item()

    seen = []
    for p, training in ((0.5, True), (0.9, True), (0.9, False)):
        model.fc[0].p, model.fc[0].training = p, training
        loss, expected = losses()
        assert loss == pytest.approx(expected, rel=1e-5)
        seen.append(loss)
    assert len(set(seen)) == 3
