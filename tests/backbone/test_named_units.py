"""Units that a user names, in place of those that are read from the model."""

import copy

import pytest
import torch
from torch import nn

from auglocal_ext import LocalTrainer, models, plan
from auglocal_ext.backbone import as_backbone


@pytest.fixture
def model():
    torch.manual_seed(0)
    return models.resnet20()


def test_a_unit_begins_where_its_module_does_and_reaches_to_the_next_one(model):
    backbone = as_backbone(model, ["conv1", "layer1.1", "layer3"])
    assert [unit.name for unit in backbone.units] == ["conv1", "layer1.1", "layer3"]
    assert [(unit.out_channels, unit.reduction) for unit in backbone.units] == [(16, 1), (32, 2), (64, 4)]
    owned = [{id(p) for p in unit.module.parameters()} for unit in backbone.units]
    parts = [[model.conv1, model.bn1, model.layer1[0]], [*model.layer1[1:], model.layer2], [model.layer3]]
    assert owned == [{id(p) for part in of_unit for p in part.parameters()} for of_unit in parts]
    x = torch.randn(2, 3, 32, 32)
    model.eval()
    with torch.no_grad():
        features = x
        for unit in backbone.units:
            features = unit.module(features)
        assert torch.equal(backbone.classifier(features), model(x))


def test_the_names_of_the_units_that_are_read_give_the_same_ones(model):
    names = [unit.name for unit in as_backbone(model).units]
    assert [unit.width for unit in as_backbone(model, names).units] == [unit.width for unit in as_backbone(model).units]
    assert str(plan(model, (4, 3, 32, 32), units=names)) == str(plan(model, (4, 3, 32, 32)))


def test_a_step_of_named_units_is_that_of_the_same_modules(model):
    """Three units that are stages, against a cut of the blocks at the same borders; aux nets are copies of stages."""
    twin = copy.deepcopy(model)
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 3, 5, 9])
    net = lambda border: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(border.shape[0], 10))  # noqa: E731
    torch.manual_seed(1)
    stages = LocalTrainer(model, 2, auxiliary=net, units=["conv1", "layer2", "layer3"], borders=[0, 1], image_size=16)
    torch.manual_seed(1)
    blocks = LocalTrainer(twin, 2, auxiliary=net, borders=[3, 6], image_size=16)
    for trainer in (stages, blocks):
        trainer.step(images, labels)
    for (name, ours), theirs in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    assert [module.units for module in stages.plan.modules] == [("conv1",), ("layer2",), ("layer3",)]


def test_named_units_have_aux_nets_plans_and_trainers_of_plans(model):
    planned = plan(model, (4, 3, 32, 32), 2, units=["conv1", "layer2", "layer3"], modules=3)
    assert [module.aux_net for module in planned.modules][:2] == ["layer3 (64, /2) + BatchNorm1d"] * 2
    trainer = LocalTrainer(model, plan=planned)
    assert trainer.units == ("conv1", "layer2", "layer3") == planned.units
    trainer.step(torch.randn(4, 3, 32, 32), torch.tensor([0, 3, 5, 9]))
    copied = copy.deepcopy(trainer)
    copied.step(torch.randn(4, 3, 32, 32), torch.tensor([0, 3, 5, 9]))
    assert [len(module.units) for module in copied.plan.modules] == [1, 1, 1]
    with pytest.raises(ValueError, match=r"saved with units \['conv1', 'layer2', 'layer3'\], this trainer has"):
        LocalTrainer(models.resnet20(), 2).load_state_dict(trainer.state_dict())


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ("layer1", "units must be names of modules or units, such as 'stem', 'layer1.0', .*, given 'layer1'"),
        ([], "units must be names of modules or units"),
        ([["layer1"]], "units must be names of modules or units"),
        (["conv1", "layer9"], "no module or unit of CifarResNet is called 'layer9'"),
        (["conv1", "layer1.0.conv2"], "'layer1.0.conv2' begins where more than one tensor goes on"),
        (["layer2", "layer1"], "named once each, in the order in which they run: 'layer1' comes too late"),
        (["layer2", "layer2"], "named once each, in the order in which they run: 'layer2' comes too late"),
        (["conv1", "fc"], "'fc' is not run before the classifier"),
        (["conv1", "bn1", "layer1"], "'bn1' has no layer with weights of its own: leave it out"),
    ],
)
def test_names_that_cannot_be_units(model, units, message):
    with pytest.raises(ValueError, match=message):
        as_backbone(model, units)


def test_too_few_units_for_auxiliary_nets(model):
    with pytest.raises(ValueError, match="needs a network of more units than 1, .*: name more with units=, or train"):
        LocalTrainer(model, 2, units=["stem"])
    assert len(LocalTrainer(model, rule="bp", units=["stem"]).local_modules) == 1
