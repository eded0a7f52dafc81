"""Trainings that stop in the middle of an epoch, by themselves or not, and go on there."""

import os
import signal

import pytest
import torch
from test_checkpoint import SGD, Stop, loader, model, same, without_times
from torch.utils.data import DataLoader, TensorDataset

from auglocal_ext import StepResult, TrainingInterrupted, train
from auglocal_ext.backbone import as_backbone
from auglocal_ext.training.epoch import Sums

OPTIONS = {"depth": 2, "seed": 3, "progress": False, "optimizer": SGD}


def stop_at(epoch, step):
    def on_step(*at):
        if at[:2] == (epoch, step):
            raise Stop

    return on_step


def undisturbed(**options):
    net = model()
    return net.state_dict(), train(net, loader("DeviceLoader"), **OPTIONS | options).history


def goes_on(tmp_path, expected, **options):
    net = model()
    result = train(net, loader("DeviceLoader"), checkpoint=tmp_path, **OPTIONS | options)
    weights, history = expected
    assert same(weights, net.state_dict()) and without_times(history) == without_times(result.history)
    return result


@pytest.mark.parametrize("rule", ["auglocal", "predsim", "checkpoint"])
@pytest.mark.parametrize("at", [(1, 1), (2, 2), (2, 3)])  # of three steps
def test_it_goes_on_within_an_epoch(tmp_path, rule, at):
    expected = undisturbed(epochs=3, rule=rule, val_loader=loader("DeviceLoader"))
    with pytest.raises(Stop):
        stopped = {"on_step": stop_at(at[0], at[1] + 1) if at[1] < 3 else None}
        if at[1] == 3:  # the epoch is over, but nothing is told of it yet
            stopped = {"on_epoch": lambda entry: stop_at(*at)(entry["epoch"], 3)}
        given = {"epochs": 3, "rule": rule, "val_loader": loader("DeviceLoader"), "checkpoint_minutes": 0}
        train(model(), loader("DeviceLoader"), checkpoint=tmp_path, **OPTIONS | given | stopped)
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    assert (saved["epoch"] + 1, saved["sums"]["steps"]) == at
    goes_on(tmp_path, expected, epochs=3, rule=rule, val_loader=loader("DeviceLoader"))


def test_ctrl_c_leaves_a_checkpoint_of_the_last_step(tmp_path):
    expected = undisturbed(epochs=2)

    def press(epoch, step, result):
        if (epoch, step) == (2, 2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingInterrupted, match="after 1 whole epochs"):
        train(model(), loader("DeviceLoader"), epochs=2, checkpoint=tmp_path, on_step=press, **OPTIONS)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["sums"]["steps"] == 2
    goes_on(tmp_path, expected, epochs=2)


def test_ctrl_c_in_the_validation_costs_no_step(tmp_path):
    class Pressed(list):
        def __iter__(self):
            if not (tmp_path / "pressed").exists():
                (tmp_path / "pressed").touch()
                os.kill(os.getpid(), signal.SIGINT)
            return super().__iter__()

    (tmp_path / "pressed").touch()
    batches = list(loader("DeviceLoader"))
    expected = undisturbed(epochs=2, val_loader=Pressed(batches))
    with pytest.raises(TrainingInterrupted):
        # The first pass is a look at the first batch.
        told = {"on_step": lambda *at: (tmp_path / "pressed").unlink(missing_ok=True)}
        given = {"epochs": 2, "val_loader": Pressed(batches), "checkpoint": tmp_path}
        train(model(), loader("DeviceLoader"), **OPTIONS, **given, **told)
    sums = torch.load(tmp_path / "last.pt", weights_only=True)["sums"]
    assert sums["over"] and sums["steps"] == 3
    steps = []
    result = goes_on(
        tmp_path, expected, epochs=2, val_loader=Pressed(batches), on_step=lambda *at: steps.append(at[:2])
    )
    assert steps == [(2, 1), (2, 2), (2, 3)] and len(result.history) == 2


def test_time_that_is_over_is_no_error(tmp_path):
    expected = undisturbed(epochs=2)
    for steps in (1, 2, 3, 4, 5):  # one step a call
        result = train(model(), loader("DeviceLoader"), epochs=2, checkpoint=tmp_path, max_seconds=0, **OPTIONS)
        assert result.stopped == "max_seconds" and len(result.history) == steps // 4
        assert "stopped by max_seconds" in str(result)
    assert goes_on(tmp_path, expected, epochs=2).stopped is None


def test_without_a_checkpoint_the_model_is_as_the_last_step_left_it():
    net = model()
    result = train(net, loader("DeviceLoader"), epochs=2, max_seconds=0, **OPTIONS)
    assert result.history == [] and result.val_accuracy is None and result.best is None
    assert int(net.bn1.num_batches_tracked) == 1


def test_patience(monkeypatch, tmp_path):
    real = Sums.entry

    def stopped_after(patience, accuracies, **options):
        accuracies = iter(accuracies)
        monkeypatch.setattr(Sums, "entry", lambda *given: real(*given) | {"train_accuracy": next(accuracies)})
        result = train(model(), loader("DeviceLoader"), epochs=6, patience=patience, **OPTIONS | options)
        return len(result.history), result.stopped, result.best["epoch"]

    assert stopped_after(1, [0.1, 0.2, 0.2]) == (3, "patience", 2)
    assert stopped_after(2, [0.5, 0.2, 0.6, 0.1, 0.6], checkpoint=tmp_path) == (5, "patience", 3)
    assert stopped_after(2, [], checkpoint=tmp_path) == (5, "patience", 3)  # as it was left
    assert stopped_after(3, [0.9], checkpoint=tmp_path) == (6, None, 6)


def test_a_loader_that_cannot_go_on_goes_on_at_the_epoch(tmp_path, capsys):
    data = TensorDataset(torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 10)
    batches = DataLoader(data, batch_size=20, shuffle=True)
    expected = model()
    history = train(expected, batches, epochs=2, **OPTIONS).history
    given = OPTIONS | {"epochs": 2, "checkpoint": tmp_path, "checkpoint_minutes": 0, "progress": True}
    with pytest.raises(Stop):
        train(model(), batches, on_step=stop_at(2, 2), **given)
    assert "checkpoints are written at the ends of epochs only: the loader has no state_dict" in capsys.readouterr().out
    net = model()
    result = train(net, batches, **given)
    assert "going on behind epoch 1/2" in capsys.readouterr().out
    assert same(expected.state_dict(), net.state_dict())
    assert without_times(result.history) == without_times(history)


def test_a_checkpoint_within_an_epoch_needs_a_loader_that_can_go_on(tmp_path):
    train(model(), loader("DeviceLoader"), epochs=2, checkpoint=tmp_path, max_seconds=0, **OPTIONS)
    with pytest.raises(ValueError, match="was left within epoch 1 by a loader with a state_dict, this one has none"):
        train(model(), list(loader("DeviceLoader")), epochs=2, checkpoint=tmp_path, **OPTIONS)
    train(model(), loader("DeviceLoader"), epochs=1, checkpoint=tmp_path, **OPTIONS)
    train(model(), loader("DeviceLoader"), epochs=2, checkpoint=tmp_path, max_seconds=0, **OPTIONS)
    with pytest.raises(ValueError, match="has a training of 1 epochs already and is within the next, given epochs=1"):
        train(model(), loader("DeviceLoader"), epochs=1, checkpoint=tmp_path, **OPTIONS)


def test_a_loader_of_unknown_length_has_the_same_schedule_where_it_goes_on(tmp_path):
    class Endless:
        def __init__(self):
            self.loader = loader("DeviceLoader")
            for name in ("state_dict", "load_state_dict", "set_epoch"):
                setattr(self, name, getattr(self.loader, name))

        def __iter__(self):
            return iter(self.loader)

    lr = []
    train(model(), Endless(), epochs=2, on_epoch=lambda entry: lr.append(entry["lr"]), **OPTIONS)
    given = OPTIONS | {"epochs": 2, "checkpoint": tmp_path, "checkpoint_minutes": 0}
    with pytest.raises(Stop):
        train(model(), Endless(), on_step=stop_at(2, 2), **given)
    assert [entry["lr"] for entry in train(model(), Endless(), **given).history] == lr


def test_on_step_is_told_every_step():
    told = []
    result = train(model(), loader("DeviceLoader"), epochs=2, on_step=lambda *given: told.append(given), **OPTIONS)
    assert [at[:2] for at in told] == [(epoch, step) for epoch in (1, 2) for step in (1, 2, 3)]
    assert all(isinstance(at[2], StepResult) for at in told)
    images = [16, 16, 8]
    mean = sum(n * at[2].loss for n, at in zip(images, told[3:], strict=True)) / 40
    assert result.history[1]["loss"] == pytest.approx(mean.item(), rel=1e-6)


def test_each_modules_accuracy():
    net, batches = model(), list(loader("DeviceLoader"))
    still = {"schedule": lambda epoch, epochs: 0.0, "keep_aux_nets": True, "epochs": 1}
    result = train(net, batches, **OPTIONS | still)
    units = [unit.module for unit in as_backbone(net).units]
    hits = torch.zeros(3)
    net.train()
    for images, labels in batches:
        features = [units[0](images)]
        features.append(units[1](features[0]))
        logits = [aux(x) for aux, x in zip(result.aux_nets, features, strict=True)] + [net(images)]
        hits += torch.stack([(each.argmax(1) == labels).sum() for each in logits])
    assert result.history[0]["module_accuracies"] == pytest.approx((hits / 40).tolist())


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("patience", 0, "patience must be a whole number of epochs, at least 1, given 0"),
        ("patience", 1.5, "patience must be a whole number of epochs, at least 1, given 1.5"),
        ("max_seconds", -1, "max_seconds must be a finite number of at least 0, given -1"),
        ("checkpoint_minutes", float("nan"), "checkpoint_minutes must be a finite number of at least 0, given nan"),
        ("nonfinite", "ignore", "nonfinite must be 'stop' or 'skip', given 'ignore'"),
    ],
)
def test_limits_that_are_none(option, value, message):
    net = model()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        train(net, loader("DeviceLoader"), **OPTIONS | {option: value})
    assert same(before, net.state_dict())
