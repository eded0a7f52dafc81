"""Learning rates by torch's schedulers, one for each local module."""

from functools import partial

import pytest
import torch
from test_checkpoint import Stop, loader, model, same, without_times
from torch.optim import lr_scheduler

from auglocal_ext import train

pytestmark = pytest.mark.usefixtures("nothing_compared")

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def trained(schedule, **options):
    given = {"epochs": 4, "depth": 2, "progress": False, "optimizer": SGD, "seed": 3}
    return train(model(), loader("DeviceLoader"), schedule=schedule, **given | options)


def rates(result):
    return [entry["lr"] for entry in result.history]


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 4),
        partial(lr_scheduler.MultiStepLR, milestones=[1, 3]),
        lr_scheduler.LinearLR,
    ],
    ids=["a function", "a partial", "a class"],
)
def test_they_step_once_an_epoch(schedule):
    optimizer = SGD([torch.zeros(1, requires_grad=True)])
    scheduler, expected = schedule(optimizer), []
    for _ in range(4):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates(trained(schedule)) == expected and len(set(expected)) > 1


def test_some_step_with_the_optimizers():
    seen, cycle = [], partial(lr_scheduler.OneCycleLR, max_lr=0.2, total_steps=9)
    optimizer = SGD([torch.zeros(1, requires_grad=True)])
    scheduler, expected = cycle(optimizer), []
    for _ in range(8):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()

    def factory(parameters):
        made = SGD(parameters)
        made.register_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
        return made

    # Three batches an epoch, by two and one: two steps of the optimizer.
    trained(cycle, accumulate=2, rule="bp", optimizer=factory)
    assert seen[-8:] == expected  # before them come those of planning


def test_a_plateau_is_of_the_validations_loss_else_of_trainings():
    plateau = partial(lr_scheduler.ReduceLROnPlateau, factor=0.5, patience=0, threshold=1e9, threshold_mode="abs")
    assert rates(trained(plateau, val_loader=loader("DeviceLoader"))) == [0.1, 0.1, 0.05, 0.025]
    assert rates(trained(plateau)) == [0.1, 0.1, 0.05, 0.025]


@pytest.mark.parametrize(
    ("schedule", "minutes"),
    [
        (partial(lr_scheduler.MultiStepLR, milestones=[2, 3]), 10),
        (partial(lr_scheduler.OneCycleLR, max_lr=0.2, total_steps=13), 0),
        (partial(lr_scheduler.ReduceLROnPlateau, patience=0, threshold=1e9, threshold_mode="abs"), 10),
    ],
    ids=["MultiStepLR", "OneCycleLR", "ReduceLROnPlateau"],
)
def test_a_stopped_training_ends_as_one_that_was_not(tmp_path, schedule, minutes):
    def stop(epoch, step, result):
        if (epoch, step) == (3, 2):
            raise Stop

    found, states = {}, {}
    for name in ("whole", "part"):
        net = model()
        given = {"epochs": 4, "depth": 2, "progress": False, "optimizer": SGD, "seed": 3, "schedule": schedule}
        given |= {"checkpoint": tmp_path / name, "checkpoint_minutes": minutes}
        if name == "part":
            with pytest.raises(Stop):
                train(model(), loader("DeviceLoader"), on_step=stop, **given)
        found[name], states[name] = train(net, loader("DeviceLoader"), **given), net.state_dict()
    assert same(states["whole"], states["part"])
    assert without_times(found["whole"].history) == without_times(found["part"].history)


def test_another_schedule_than_the_checkpoints_is_refused(tmp_path):
    step = partial(lr_scheduler.StepLR, step_size=2)
    trained(step, epochs=1, checkpoint=tmp_path / "a")
    with pytest.raises(
        ValueError, match="the checkpoint's schedule is StepLR, given a function: give the same schedule="
    ):
        trained(None, epochs=2, checkpoint=tmp_path / "a")
    with pytest.raises(ValueError, match="the checkpoint's schedule is StepLR, given LinearLR"):
        trained(lr_scheduler.LinearLR, epochs=2, checkpoint=tmp_path / "a")
    trained(None, epochs=1, checkpoint=tmp_path / "b")
    with pytest.raises(ValueError, match="the checkpoint's schedule is a function, given StepLR"):
        trained(step, epochs=2, checkpoint=tmp_path / "b")


def test_what_makes_no_scheduler_is_refused():
    message = "schedule, a function of one argument, must make a torch.optim.lr_scheduler of the optimizer that it is "
    message += "called with, given one that makes"
    other = lr_scheduler.StepLR(SGD([torch.zeros(1, requires_grad=True)]), 1)
    for schedule, kind in ((lambda epoch: 0.5, "float"), (lambda optimizer: other, "StepLR")):
        with pytest.raises(TypeError, match=f"{message} {kind}"):
            trained(schedule)
    with pytest.raises(
        TypeError, match="called with, which failed: unsupported operand.*; for instance lambda optimizer"
    ):
        trained(lambda epoch: epoch / 2)
    with pytest.raises(TypeError, match="given StepLR: .*; or one of an optimizer alone, as lambda optimizer: torch"):
        trained(lr_scheduler.StepLR)
