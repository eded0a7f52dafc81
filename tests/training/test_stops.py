"""Trainings that stop in the middle of an epoch, by themselves or not, and go on there."""

import gc
import os
import signal
import weakref
from functools import partial

import pytest
import torch
from test_checkpoint import SGD, Stop, loader, model, same, without_times
from torch.utils.data import DataLoader, TensorDataset

from auglocal_ext import LocalTrainer, StepResult, TrainingDiverged, TrainingInterrupted, train
from auglocal_ext.backbone import as_backbone
from auglocal_ext.training.epoch import Sums

pytestmark = pytest.mark.usefixtures("nothing_compared")

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


@pytest.mark.covering(1)
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

    with pytest.raises(TrainingInterrupted, match="after 1 whole epoch"):
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
    with pytest.raises(ValueError, match="has a training of 1 epoch already and is within the next, given epochs=1"):
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


class Pressed(list):
    """Batches that press Ctrl-C in the first pass behind their `when`, at the second batch."""

    def __init__(self, batches):
        super().__init__(batches)
        self.passes, self.when = 0, None

    def __iter__(self):
        self.passes += 1
        for index, batch in enumerate(super().__iter__()):
            torch.rand(1)  # as a DataLoader draws a seed
            if self.passes == self.when and index == 1:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch


def with_dropout():
    net = model()
    net.fc = torch.nn.Sequential(torch.nn.Dropout(0.5), net.fc)
    return net


def test_a_validation_that_draws_changes_nothing_where_it_is_broken_off(tmp_path):
    def trained(when, folder):
        net, batches = with_dropout(), Pressed(loader("DeviceLoader"))
        batches.when = when
        given = OPTIONS | {"val_loader": batches, "epochs": 2, "checkpoint": folder}
        return net, lambda: train(net, loader("DeviceLoader"), **given)

    expected, run = trained(None, tmp_path / "whole")
    run()
    _, run = trained(2, tmp_path / "part")  # the first pass is a look at the first batch
    with pytest.raises(TrainingInterrupted):
        run()
    assert torch.load(tmp_path / "part" / "last.pt", weights_only=True)["sums"]["over"]
    net, run = trained(None, tmp_path / "part")
    run()
    assert same(expected.state_dict(), net.state_dict())


def test_one_loader_for_training_and_validation_that_is_broken_off(tmp_path):
    both, calls = loader("DeviceLoader"), []
    expected = train(model(), both, epochs=2, val_loader=both, **OPTIONS).history
    real = type(both)._batch_of

    def press(self, images, place):
        calls.append(place)
        if len(calls) == 1 + 1 + 3 + 2:  # looks at the first batch, an epoch, the validation's second
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, images, place)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingInterrupted):
        patch.setattr(type(both), "_batch_of", press)
        train(model(), both, epochs=2, val_loader=both, checkpoint=tmp_path, **OPTIONS)
    again = loader("DeviceLoader")
    found = train(model(), again, epochs=2, val_loader=again, checkpoint=tmp_path, **OPTIONS).history
    assert without_times(found) == without_times(expected)


def test_a_sampler_that_wants_the_epoch_is_told_it_where_a_training_goes_on(tmp_path):
    class Sampled:
        """A loader with a state, whose order is its sampler's: as StatefulDataLoader with a DistributedSampler."""

        def __init__(self):
            self.batches, self.sampler, self.epoch, self.given = list(loader("DeviceLoader")), self, 0, 0

        def set_epoch(self, epoch):
            self.epoch = epoch

        def state_dict(self):
            return {"given": self.given}

        def load_state_dict(self, state):
            self.given = state["given"]

        def __iter__(self):
            order = torch.randperm(3, generator=torch.Generator().manual_seed(self.epoch)).tolist()
            for index in order[self.given % 3 :]:
                self.given = self.given % 3 + 1
                yield self.batches[index]

        def __len__(self):
            return 3

    torch.manual_seed(0)
    expected, net = model(), model()
    batches = Sampled()
    train(expected, batches, epochs=3, **OPTIONS)
    again = Sampled()
    again.batches = batches.batches
    with pytest.raises(Stop):
        train(model(), again, epochs=3, checkpoint=tmp_path, checkpoint_minutes=0, on_step=stop_at(2, 3), **OPTIONS)
    last = Sampled()
    last.batches = batches.batches
    train(net, last, epochs=3, checkpoint=tmp_path, **OPTIONS)
    assert same(expected.state_dict(), net.state_dict())


def test_time_that_is_over_hides_no_spoilt_model():
    net = model()

    def spoil(epoch, step, result):
        net.fc.weight.data.fill_(torch.nan)

    with pytest.raises(TrainingDiverged, match="epoch 1/2: fc.weight has values that are NaN or infinite") as error:
        train(net, loader("DeviceLoader"), epochs=2, max_seconds=0, on_step=spoil, **OPTIONS)
    assert error.value.result.stopped is None


def test_patience_that_is_over_with_the_last_epoch_stops_nothing(monkeypatch):
    real, accuracies = Sums.entry, iter([0.5, 0.4, 0.3])
    monkeypatch.setattr(Sums, "entry", lambda *given: real(*given) | {"train_accuracy": next(accuracies)})
    assert train(model(), loader("DeviceLoader"), epochs=3, patience=2, **OPTIONS).stopped is None


def test_one_epoch_more_is_as_if_there_had_been_two(tmp_path):
    """Whatever a validation draws."""
    data = TensorDataset(torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 10)
    batches = DataLoader(data, batch_size=20, shuffle=True)
    given = OPTIONS | {"val_loader": batches, "schedule": None}
    expected, net = model(), model()
    train(expected, batches, epochs=2, **given)
    train(model(), batches, epochs=1, checkpoint=tmp_path, **given)
    train(net, batches, epochs=2, checkpoint=tmp_path, **given)
    assert same(expected.state_dict(), net.state_dict())


def test_no_name_keeps_a_batch_through_its_step():
    kept = []

    class Watched:
        def __iter__(self):
            for _ in range(3):
                held = [(torch.randn(16, 3, 8, 8), torch.arange(16) % 10)]  # contiguous: a step has them otherwise
                kept.append(weakref.ref(held[0][0]))
                yield held.pop()

    alive = []
    told = {"on_step": lambda *at: alive.append(kept[-1]() is not None)}
    train(model(), Watched(), epochs=2, **OPTIONS, **told)
    assert alive == [False] * 6


def test_a_divergence_that_is_held_keeps_no_trainer(monkeypatch):
    trainers, real = [], LocalTrainer.__init__

    def made(self, *given, **more):
        trainers.append(weakref.ref(self))
        real(self, *given, **more)

    monkeypatch.setattr(LocalTrainer, "__init__", made)
    with pytest.raises(TrainingDiverged) as error:
        train(model(), loader("DeviceLoader"), epochs=2, **OPTIONS | {"optimizer": partial(torch.optim.SGD, lr=1e30)})
    held = error.value
    del error
    gc.collect()
    assert held.result.history == [] and trainers[0]() is None
