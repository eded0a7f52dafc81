"""Plans of models with frozen parts: where they are cut, what they say, and the search under a budget."""

import pytest
import torch

from auglocal_ext import LocalTrainer, models, plan
from auglocal_ext.backbone import as_backbone
from auglocal_ext.rules.bp import BP
from auglocal_ext.rules.by_name import as_rule
from auglocal_ext.rules.cutting import cut, first_trained

SHAPE = (8, 3, 16, 16)
STEM = ("conv1", "bn1")
UP_TO = {"nothing": (), "stem": STEM, "stage": (*STEM, "layer1"), "backbone": (*STEM, "layer1", "layer2", "layer3")}


def frozen(*names, blocks=2, eval_mode=False):
    """A small ResNet with these parts frozen: the stem, then so many blocks in each of three stages."""
    torch.manual_seed(0)
    model = models.CifarResNet(blocks)
    for part in map(model.get_submodule, names):
        part.requires_grad_(False).train(not eval_mode)
    return model


@pytest.mark.parametrize(("upto", "first"), [("nothing", 0), ("stem", 1), ("stage", 3), ("backbone", 6)])
def test_the_first_unit_that_trains(upto, first):
    assert first_trained(as_backbone(frozen(*UP_TO[upto]))) == first
    assert first_trained(as_backbone(frozen(*UP_TO[upto], "layer2"))) == (5 if first == 3 else first)


@pytest.mark.parametrize(
    ("upto", "given", "ends"),
    [
        ("nothing", {"modules": 3}, [1, 3, 6]),
        ("stage", {}, [3, 4, 5, 6]),
        ("stage", {"modules": 2}, [3, 6]),
        ("stage", {"borders": (0, 2)}, [0, 2, 6]),
        ("backbone", {}, [6]),
    ],
)
def test_cuts_of_what_trains(upto, given, ends):
    spans = cut(as_backbone(frozen(*UP_TO[upto])), as_rule("auglocal", 2, "imagenet", "paper"), **given)
    assert [span.last for span in spans] == ends and spans[0].first == 0


def test_more_modules_than_units_that_train():
    expected = (
        "modules must be a whole number from 1 to 4, the units of this network from layer2.0 on, all before being"
    )
    with pytest.raises(ValueError, match=expected):
        plan(frozen(*UP_TO["stage"]), SHAPE, 2, modules=5)


def test_what_a_plan_says_of_it():
    model = frozen(*UP_TO["stage"])
    planned = plan(model, SHAPE, 2, modules=2)
    of_frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert planned.frozen_parameters == planned.modules[0].frozen_parameters == of_frozen
    assert planned.parameters == sum(p.numel() for p in model.parameters())
    expected = f"frozen: {of_frozen:,} of {planned.parameters:,} parameters"
    assert expected in str(planned).splitlines() and expected in planned.brief().splitlines()
    assert "frozen" not in str(plan(frozen(), SHAPE, 2, modules=2))


def test_layers_that_only_run_forward_do_not_run_by_autograd():
    model = frozen(blocks=1)
    model.layer1[0].bn2, model.layer3[0].bn2 = torch.nn.GroupNorm(4, 16), torch.nn.GroupNorm(4, 64)
    islands = [len(module.islands) for module in plan(model, SHAPE, 2, modules=2).modules]
    for part in map(model.get_submodule, UP_TO["stage"]):
        part.requires_grad_(False)
    assert sum(islands) == sum(len(module.islands) for module in plan(model, SHAPE, 2, modules=2).modules) + 1


def test_backpropagation_stops_at_the_first_unit_that_trains_too():
    """Forward of all, and from layer2.0 on twice as much backward, but for the data gradients of its first convolution
    and of its shortcut's."""
    planned = plan(frozen(*UP_TO["stage"]), SHAPE, rule="bp")
    forward = forward_macs(planned)
    trained = sum(macs for name, macs in forward.items() if name.startswith(("layer2", "layer3", "head")))
    first = 8 * 8 * 8 * 32 * 16 * (9 + 1)
    assert planned.macs == planned.bp_macs == sum(forward.values()) + 2 * trained - first
    assert planned.comparison.bp.macs == 1 and planned.comparison.eager_checkpoint.macs < 4 / 3


def forward_macs(planned):
    """Of each part; the classifier's linear layer and both its gradients are computed at once."""
    found = {}
    for moment in planned.modules[0].timeline.moments:
        if moment.phase.value == "forward":
            macs = moment.macs // 3 if moment.part == "head" else moment.macs
            found[moment.part] = found.get(moment.part, 0) + macs
    return found


@pytest.mark.parametrize("eval_mode", [False, True])
@pytest.mark.parametrize("upto", ["stem", "stage", "backbone"])
def test_every_point_of_a_search_is_exact(upto, eval_mode):
    """Bytes and arithmetic of each cut that was found, beside its plan."""
    model = frozen(*UP_TO[upto], blocks=2 if upto == "stage" else 1, eval_mode=eval_mode)
    planned = plan(model, SHAPE, 2, memory_budget="1GB")
    images = torch.randn(SHAPE).contiguous(memory_format=torch.channels_last)
    assert planned.choice.front
    for point in planned.choice.front:
        given = {"borders": point.borders} if point.borders else {"rule": "bp"}
        trainer = LocalTrainer(model, depth=2, **given)
        trainer.plan_for(images)
        assert (trainer.plan.peak_bytes, trainer.plan.macs) == (point.bytes, point.cost)
        assert all(border >= first_trained(trainer._backbone) for border in point.borders)


def test_a_search_over_everything_is_obeyed():
    model = frozen(*STEM, blocks=1)
    auto = {"depth": 2, "auxiliary": "auto", "recompute": "auto", "memory_budget": "1GB"}
    smallest = plan(model, SHAPE, prefer="memory", **auto)
    cheapest = plan(model, SHAPE, **auto)
    assert smallest.peak_bytes < cheapest.peak_bytes and smallest.macs > cheapest.macs
    assert "stem" not in {name for module in smallest.modules for name in module.recomputed}
    whole = plan(frozen(blocks=1), SHAPE, prefer="memory", **auto)
    assert smallest.peak_bytes < whole.peak_bytes
    below = smallest.peak_bytes - 1
    with pytest.raises(ValueError, match="is too small for batches of 8: the smallest step of this model needs"):
        plan(model, SHAPE, **auto | {"memory_budget": below // 2})


def test_a_search_where_frozen_units_are_behind_trained_ones_is_refused():
    expected = (
        "chooses the cut where what is frozen comes first, and layer2.0 is frozen behind stem, which trains: give"
    )
    with pytest.raises(ValueError, match=expected):
        plan(frozen("layer2"), SHAPE, 2, memory_budget="1GB")
    assert len(plan(frozen("layer2"), SHAPE, 2, modules=2).modules) == 2
    assert cut(as_backbone(frozen("layer2")), BP())[0].last == 6
