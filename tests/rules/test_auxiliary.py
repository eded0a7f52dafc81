"""The family of AugLocal's aux nets: what each member is, what it costs, and that a step trains it as autograd does."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from auglocal_ext import LocalTrainer, models, plan
from auglocal_ext.backbone import as_backbone
from auglocal_ext.common.memory import LiveBytes
from auglocal_ext.rules import AugLocal, Auxiliary
from auglocal_ext.rules.auxiliary import AUXILIARIES, as_auxiliary
from auglocal_ext.rules.cutting import Span, borders_of
from auglocal_ext.rules.mixed import mixed

MEMBERS = [
    "light",
    "pooled",
    "width=0.5",
    "separable",
    "pooled width=0.25 separable",
    "share=0.3",
    "readout=shared",
    "pooled width=0.5 readout=shared",
]


def border_of(model, unit, image=(3, 32, 32)):
    backbone = as_backbone(model)
    spans = [Span(0, unit), Span(unit + 1, len(backbone.units) - 1)]
    return borders_of(backbone, spans, image)[0]


def net_of(model, unit, auxiliary, depth=4, image=(3, 32, 32)):
    return AugLocal(depth, auxiliary=auxiliary).aux_net(border_of(model, unit, image))


# ---- what the members are -------------------------------------------------------------------------------------------


def test_texts_are_members_and_members_are_texts():
    assert as_auxiliary("pooled width=0.5 separable") == Auxiliary(pooled=True, width=0.5, separable=True)
    assert as_auxiliary("pooled,width=0.5") == AUXILIARIES["light"]
    assert as_auxiliary("share=0.5, readout=shared") == Auxiliary(share=0.5, readout="shared")
    for text in ("paper", *MEMBERS):
        assert as_auxiliary(str(as_auxiliary(text))) == as_auxiliary(text)
    assert str(Auxiliary(pooled=True, width=0.5)) == "light" and str(Auxiliary()) == "paper"


@pytest.mark.parametrize(
    "given", ["", "wide", "width", "pooled=1", "pooled pooled", "width=half", 3, None, nn.Linear, "readout="]
)
def test_what_is_no_member(given):
    with pytest.raises(ValueError, match=r"auxiliary must be 'paper', 'light', how .* given|readout must be own or"):
        as_auxiliary(given)


@pytest.mark.parametrize(("text", "what"), [("width=0", "width"), ("share=2", "share"), ("readout=mine", "readout")])
def test_values_out_of_range(text, what):
    with pytest.raises(ValueError, match=f"an auxiliary net's {what} must be"):
        as_auxiliary(text)


def test_other_rules_have_no_choice():
    with pytest.raises(ValueError, match="auxiliary is a choice of rule 'auglocal': leave it out with 'dgl'"):
        plan(models.resnet20(), (4, 3, 32, 32), rule="dgl", auxiliary="light")


def test_pooled_nets_run_at_the_last_resolution():
    for unit, pool in ((0, 4), (3, 4), (5, 2), (7, None)):
        net = net_of(models.resnet20(), unit, "pooled")
        assert (net[0].kernel_size if isinstance(net[0], nn.AvgPool2d) else None) == pool
        strides = {m.stride for m in net.modules() if isinstance(m, nn.Conv2d)}
        assert strides == {(1, 1)}
    # As the network's own strides round: 9 pixels are 5, then 3.
    features = torch.randn(2, 16, 9, 9)
    assert net_of(models.resnet20(), 1, "pooled")[0](features).shape[2:] == (3, 3)


def test_widths(torchvision):
    net = net_of(models.resnet20(), 2, "width=0.5")
    assert [block.conv1.out_channels for block in net if isinstance(block, models.BasicBlock)] == [16, 32, 32]
    assert net[-1].in_features == 32
    net = net_of(torchvision.models.resnet50(), 3, "width=0.5", 3, (3, 64, 64))
    assert [(b.conv2.out_channels, b.conv3.out_channels) for b in net if hasattr(b, "conv3")] == [
        (128, 512),
        (256, 1024),
    ]
    grouped = net_of(torchvision.models.resnext50_32x4d(), 3, "width=0.01", 3, (3, 64, 64))
    assert grouped(torch.randn(2, 256, 16, 16)).shape == (2, 1000)
    assert [b.conv2.groups for b in grouped if hasattr(b, "conv3")] == [32, 32]


def test_separable_copies():
    net = net_of(models.resnet20(), 2, "separable")
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert all(m.groups == m.in_channels == m.out_channels for m in convs if m.kernel_size == (3, 3))
    plain = net_of(models.resnet20(), 2, "paper")
    x = torch.randn(2, 16, 32, 32)
    assert net(x).shape == plain(x).shape
    for made, of_paper in zip(net, plain, strict=True):
        assert type(made) is type(of_paper)


def test_a_share_of_what_is_left():
    def blocks(unit):
        return sum(isinstance(m, models.BasicBlock) for m in net_of(models.resnet32(), unit, "share=0.2", 6))

    assert [blocks(unit) for unit in (0, 4, 9)] == [3, 2, 1]


def test_a_vgg_ends_in_pooling_and_one_layer(torchvision):
    model = torchvision.models.vgg11_bn(num_classes=10)
    paper, light = (net_of(model, 2, auxiliary, 3, (3, 64, 64)) for auxiliary in ("paper", "light"))
    linear = [[m for m in net if isinstance(m, nn.Linear)] for net in (paper, light)]
    assert [len(layers) for layers in linear] == [3, 1] and linear[1][0].in_features == 256
    assert light(torch.randn(2, 256, 16, 16)).shape == (2, 10)


# ---- what they cost -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_compared")
@pytest.mark.parametrize(
    ("name", "shape", "share"),
    [("resnet34", (32, 3, 224, 224), 0.29), ("resnet50", (32, 3, 224, 224), 0.31), ("resnet32", (32, 3, 32, 32), 0.29)],
)
def test_a_light_net_costs_little(torchvision, name, shape, share):
    """At most 0.04 of backpropagation's arithmetic, and `share` of the parameters of the paper's behind the same
    border."""
    with torch.device("meta"):
        model = models.create(name, 1000 if shape[2] == 224 else 10)
    light, paper = (plan(model, shape, auxiliary=each, modules=4) for each in ("light", "paper"))
    for cheap, dear in zip(light.modules[:-1], paper.modules, strict=False):
        of_head = sum(moment.macs for moment in cheap.timeline.moments if moment.part == "head")
        assert of_head <= 0.04 * light.bp_macs
        assert cheap.aux_parameters <= share * dear.aux_parameters
        assert not cheap.islands


# ---- a step -----------------------------------------------------------------------------------------------------


@pytest.mark.covering(1)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("auxiliary", MEMBERS)
def test_a_step_is_autograds_and_its_bytes_are_planned(auxiliary, layout):
    torch.manual_seed(0)
    images = torch.randn(6, 3, 20, 20, dtype=torch.float64).to(memory_format=layout)
    labels = torch.arange(6) % 10
    model = models.CifarResNet(2).double()
    trainer = LocalTrainer(model, 4, auxiliary=auxiliary, modules=3, image_size=20)
    trainer.step(images, labels)
    twins = copy.deepcopy(trainer.local_modules)
    x = images
    for index, twin in enumerate(twins):
        twin.zero_grad()
        y, logits = twin(x.detach())
        F.cross_entropy(logits, labels).backward()
        # The trainer's own gradients of the same module, from the same weights and input.
        trainer.backward(index, x.detach(), labels)
        for (name, p), q in zip(twin.named_parameters(), trainer.local_modules[index].parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None) or not q.requires_grad, name
            if p.grad is not None:
                torch.testing.assert_close(q.grad, p.grad, rtol=1e-8, atol=1e-10, msg=name)
        trainer.local_modules[index].zero_grad()
        x = y
    gc.collect()
    with LiveBytes([*trainer.tensors(), images, labels]) as live:
        trainer.step(images, labels)
    assert live.peak == trainer.plan.peak_bytes


def test_a_shared_readout_is_the_classifiers_of_the_step_before():
    torch.manual_seed(0)
    model, images, labels = models.resnet20(), torch.randn(4, 3, 16, 16), torch.arange(4)
    trainer = LocalTrainer(model, 3, auxiliary="pooled width=0.5 readout=shared", modules=3)
    before = copy.deepcopy(model.fc)
    trainer.step(images, labels)
    for head in trainer.aux_nets:
        assert torch.equal(head.net[-1].weight, before.weight) and torch.equal(head.net[-1].bias, before.bias)
        assert not head.net[-1].weight.requires_grad
    assert not torch.equal(model.fc.weight, before.weight)
    after = copy.deepcopy(model.fc)
    trainer.step(images, labels)
    assert torch.equal(trainer.aux_nets[0].net[-1].weight, after.weight)


def test_a_shared_readout_needs_a_classifier_of_one_layer(torchvision):
    with pytest.raises(ValueError, match="readout=shared needs a classifier that is a pooling and one linear layer"):
        plan(torchvision.models.vgg11(), (2, 3, 64, 64), 3, auxiliary="readout=shared")


def test_a_mix_keeps_what_its_parts_have_in_common():
    shared = [AugLocal(depth, None, "pooled readout=shared") for depth in (2, 3)]
    both = mixed(dict(enumerate(shared)))
    assert both.shares_readout and both.auxiliary == shared[0].auxiliary and both.depth is None
    other = mixed({0: AugLocal(3), 1: AugLocal(3, None, "light")})
    assert (other.depth, other.auxiliary, other.shares_readout) == (3, None, False)
    assert mixed({0: shared[0], 4: AugLocal(2, None, "pooled readout=shared")}) is shared[0]
    border = border_of(models.resnet20(), 1)
    assert isinstance(other.aux_net(border)[0], nn.AvgPool2d)  # of unit 1
    assert other.describe(border).startswith("pool /4 ")


def test_nets_that_do_not_fit():
    def net(inputs, outputs):
        return lambda border: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, outputs))

    model = models.CifarResNet(1)
    with pytest.raises(ValueError, match=r"nets of \(N, 10\) logits, the one behind stem puts out \('N', 3\)"):
        LocalTrainer(model, auxiliary=net(16, 3), modules=4)
    with pytest.raises(ValueError, match=r"the auxiliary net behind stem \(Sequential\) cannot take an input of shape"):
        LocalTrainer(model, auxiliary=net(7, 10), modules=4)
    with pytest.raises(ValueError, match="auxiliary must be 'paper', .* given Sequential"):
        LocalTrainer(model, auxiliary=nn.Sequential(nn.Flatten()))
    with pytest.raises(ValueError, match="auxiliary goes with a rule by name, given a rule that has its own"):
        plan(model, (4, 3, 16, 16), rule=AugLocal(2), auxiliary="light")
    with pytest.raises(ValueError, match="pooled must be True or False, given 'no'"):
        Auxiliary(pooled="no")


def test_a_checkpoint_of_other_nets_is_refused():
    one, other = (LocalTrainer(models.CifarResNet(1), 2, auxiliary=aux) for aux in ("paper", "readout=shared"))
    with pytest.raises(ValueError, match="saved with auxiliary None, this trainer has readout=shared"):
        other.load_state_dict(one.state_dict())


def test_nets_of_ones_own():
    def net(border):
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(border.shape[0], border.num_classes))

    trainer = LocalTrainer(models.resnet20(), auxiliary=net, modules=3)
    trainer.step(torch.randn(4, 3, 16, 16), torch.arange(4))
    assert [head.net[-1].in_features for head in trainer.aux_nets] == [16, 32]
    assert "Linear 10" in str(trainer.plan) and ", nets by net: 3 local modules" in trainer.plan.title
