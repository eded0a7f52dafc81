"""A plan handed to the trainer that runs it."""

import copy
import pickle
from functools import partial

import pytest
import torch

from auglocal_ext import LocalTrainer, models, plan, train
from auglocal_ext.common.memory import LiveBytes
from auglocal_ext.planning.planner import Planner

SHAPE = (8, 3, 16, 16)
ADAM = partial(torch.optim.AdamW, lr=1e-3)


@pytest.fixture
def batch(batch):
    """In the layout that a plan is for where none is named."""
    return batch[0].contiguous(memory_format=torch.channels_last), batch[1]


@pytest.fixture(scope="module")
def planned():
    """Of a model like `tiny_model`."""
    return plan(models.CifarResNet(1, num_classes=10), SHAPE, 2, modules=2, memory_budget="5MB", optimizer=ADAM)


def stepped(trainer, batch):
    losses = [trainer.step(*batch).module_losses for _ in range(2)]
    return losses, trainer.model.state_dict()


def test_the_very_plan_is_run_and_is_what_is_measured(tiny_model, planned, batch, monkeypatch):
    monkeypatch.setattr(Planner, "plan", None)  # nothing is planned again
    trainer = LocalTrainer(tiny_model, plan=planned)
    assert len(trainer.local_modules) == len(planned.modules) > 1
    assert isinstance(trainer.optimizers[0], torch.optim.AdamW)
    trainer.step(*batch)
    with LiveBytes([*trainer.tensors(), *batch]) as live:
        trainer.step(*batch)
    assert trainer.plan is planned and live.peak == planned.peak_bytes <= 5e6


def test_the_same_bits_as_with_its_borders(tiny_model, planned, batch):
    other = copy.deepcopy(tiny_model)
    torch.manual_seed(5)
    losses, state = stepped(LocalTrainer(tiny_model, plan=planned), batch)
    torch.manual_seed(5)
    options = {"rule": planned.origin.rule, "borders": planned.borders, "optimizer": ADAM}
    expected, expected_state = stepped(LocalTrainer(other, **options), batch)
    assert all(torch.equal(a, b) for a, b in zip(losses, expected, strict=True))
    assert all(torch.equal(state[name], expected_state[name]) for name in state)


def test_precision_and_recompute_are_the_plans(tiny_model, batch):
    planned = plan(tiny_model, SHAPE, rule="checkpoint", precision="bf16")
    trainer = LocalTrainer(tiny_model, plan=planned)
    assert (trainer.precision, trainer.recompute, len(trainer.local_modules)) == ("bf16", True, 1)
    trainer.step(*batch)
    assert trainer.plan is planned


def test_the_rule_looks_at_the_first_images(tiny_model, batch):
    planned = plan(tiny_model, SHAPE, rule="infopro")
    with pytest.raises(ValueError, match="rule 'infopro' draws images of 0 to 1"):
        LocalTrainer(tiny_model, plan=planned).step(batch[0] * 100, batch[1])


def test_a_model_in_eval_mode_runs_it_too(tiny_model, batch):
    planned = plan(tiny_model.eval(), SHAPE, 2)
    trainer = LocalTrainer(tiny_model, plan=planned)
    assert not any(module.training for module in tiny_model.modules())
    with pytest.warns(UserWarning, match="eval mode as a whole"):
        trainer.step(*batch)
    assert trainer.plan is planned


def test_what_does_not_fit_is_planned_anew_and_keeps_the_choice(tiny_model, planned, batch):
    images, labels = batch
    trainer = LocalTrainer(tiny_model, plan=planned)
    trainer.step(images.contiguous(), labels)
    assert trainer.plan is not planned and trainer.plan.choice is planned.choice
    with pytest.warns(UserWarning, match="planning again"):
        trainer.step(torch.cat([images, images]).contiguous(), labels.repeat(2))
    assert trainer.plan.input_shape[0] == 16 and trainer.plan.choice is planned.choice


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_layout_that_is_asked_for_is_planned(tiny_model, batch, layout):
    planned = plan(tiny_model, SHAPE, 2, memory_budget="2MB", memory_format=layout)
    trainer = LocalTrainer(tiny_model, plan=planned)
    images = batch[0].contiguous(memory_format=layout)
    trainer.step(images, batch[1])
    with LiveBytes([*trainer.tensors(), images, batch[1]]) as live:
        trainer.step(images, batch[1])
    assert trainer.plan is planned and live.peak == planned.peak_bytes == planned.choice.point.bytes


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_images_of_one_channel_are_of_the_layout_of_their_strides(batch, layout):
    """Values lie in the same places in both; convolutions make maps of different layouts of them."""
    model = models.CifarResNet(1)
    model.conv1 = torch.nn.Conv2d(1, 16, 3, padding=1, bias=False)
    images = torch.empty((8, 1, 16, 16), memory_format=layout).copy_(batch[0][:, :1])
    planned = plan(model, images.shape, 2, memory_format=layout)
    trainer = LocalTrainer(model, plan=planned)
    trainer.step(images, batch[1])
    with LiveBytes([*trainer.tensors(), images, batch[1]]) as live:
        trainer.step(images, batch[1])
    assert trainer.plan is planned and live.peak == planned.peak_bytes
    assert planned.origin.memory_format == layout


@pytest.mark.parametrize("rule", ["auglocal", "bp"])
def test_a_training_under_a_budget_keeps_what_was_found(tmp_path, rule):
    images, labels = torch.randn(16, 3, 16, 16), torch.arange(16) % 10
    budget = {"depth": 2, "rule": rule, "memory_budget": "20MB", "epochs": 1, "progress": False}
    planned = train(models.CifarResNet(1), [(images, labels)], **budget).plan
    assert planned.choice.point.bytes == planned.peak_bytes <= 20e6 and planned.comparison == planned.choice.comparison
    assert planned == plan(models.CifarResNet(1), images.shape, 2, rule=rule, memory_budget="20MB")
    planned.save_front(tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG") and "budget 20 MB" in str(planned)


def test_a_training_under_a_budget_plans_once(batch, monkeypatch):
    made, real = [], Planner.__init__
    monkeypatch.setattr(Planner, "__init__", lambda self, *a, **o: made.append(self) or real(self, *a, **o))
    result = train(models.CifarResNet(1), [batch], 2, memory_budget="1.7MB", epochs=2, progress=False)
    assert len(made) == 1 and result.plan.choice.point.bytes == result.plan.peak_bytes == result.peak_bytes


@pytest.mark.usefixtures("nothing_compared")
@pytest.mark.covering(1)
@pytest.mark.parametrize("options", [{}, {"rule": "bp"}, {"memory_budget": "1GB"}])
@pytest.mark.parametrize("shape", [(4, 1, 8, 8), (4, 1, 1, 1), (4, 3, 1, 1), (4, 3, 1, 5), (4, 3, 4, 1), (2, 1, 4, 4)])
def test_a_training_holds_what_was_planned_where_strides_tell_no_layout(shape, options):
    """Images of one channel, maps of one pixel, row or column are contiguous and channels_last at once."""
    planned = plan(models.CifarResNet(1, in_channels=shape[1]), shape, 2, **options)
    loader = [(torch.rand(shape), torch.arange(shape[0]))] * 2
    result = train(models.CifarResNet(1, in_channels=shape[1]), loader, 2, epochs=1, progress=False, **options)
    assert result.plan == planned and result.peak_bytes == planned.peak_bytes


def test_a_training_runs_in_channels_last(batch):
    seen, model = [], models.CifarResNet(1)
    model.conv1.register_forward_pre_hook(lambda _, images: seen.append(images[0].stride()))
    loader = [(batch[0].contiguous(), batch[1])]
    planned = plan(model, SHAPE, 2, memory_format=torch.channels_last)
    result = train(model, loader, 2, val_loader=loader, epochs=1, progress=False)
    assert seen and set(seen) == {(3 * 16 * 16, 1, 3 * 16, 3)}
    assert result.plan == planned and result.plan.origin.memory_format == torch.channels_last


@pytest.mark.usefixtures("nothing_compared")
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.fc.requires_grad_(False),
        lambda model: model.layer1.eval(),
        lambda model: model.double(),
        lambda model: model.to(memory_format=torch.channels_last),
        lambda model: setattr(model.layer1[0].conv1, "stride", (2, 2)),
        lambda model: setattr(model, "fc", torch.nn.Linear(64, 11)),
    ],
)
def test_the_plan_of_another_model_is_refused(tiny_model, planned, change):
    change(tiny_model)
    with pytest.raises(ValueError, match="the plan was made of another CifarResNet, or of this one before"):
        LocalTrainer(tiny_model, plan=planned)


@pytest.mark.parametrize("options", [{"depth": 3}, {"rule": "bp"}, {"modules": 2}, {"precision": "bf16"}])
def test_what_the_plan_tells_is_not_given_twice(tiny_model, planned, options):
    with pytest.raises(
        ValueError,
        match="plan= tells depth, rule, form, auxiliary, modules, borders, units, optimizer, crit",
    ):
        LocalTrainer(tiny_model, plan=planned, **options)


def test_what_is_no_plan_is_refused(tiny_model):
    with pytest.raises(TypeError, match="plan must be what auglocal_ext.plan returns, given str"):
        LocalTrainer(tiny_model, plan="6GB")


def test_a_planned_trainer_can_be_copied_and_pickled(tiny_model, planned, batch):
    trainer = LocalTrainer(tiny_model, plan=planned)
    for other in (copy.deepcopy(trainer), pickle.loads(pickle.dumps(trainer))):
        assert other.step(*batch).loss.isfinite()
