"""Trainings that go on where they were stopped, as if they had not been."""

import io
import random
import time
from functools import partial
from pathlib import Path

import numpy
import processes
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from auglocal_ext import LocalTrainer, models, train
from auglocal_ext.data import DeviceLoader, mean_and_std
from auglocal_ext.training.epoch import Sums

pytestmark = pytest.mark.usefixtures("nothing_compared")

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


class Stop(Exception):
    pass


def loader(kind):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.arange(40) % 10
    if kind == "DeviceLoader":
        return DeviceLoader(images, labels, 16, *mean_and_std(images), augment=True, pad=1, flip=True)
    return DataLoader(TensorDataset(images / 255, labels), batch_size=20, shuffle=True)


def model():
    torch.manual_seed(0)
    return models.CifarResNet(1, num_classes=10)


def without_times(history):
    return [{k: v for k, v in entry.items() if k not in ("seconds", "images_per_second")} for entry in history]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.covering(1)
@pytest.mark.parametrize("kind", ["DeviceLoader", "DataLoader"])
@pytest.mark.parametrize(
    "options",
    [{"depth": 2}, {"modules": 2, "depth": 2, "optimizer": torch.optim.AdamW}, {"rule": "bp"}, {"rule": "predsim"}],
    ids=str,
)
def test_a_stopped_training_ends_as_one_that_was_not(tmp_path, options, kind):
    options = {"epochs": 3, "seed": 3, "progress": False, "val_loader": loader(kind), "optimizer": SGD} | options
    whole = model()
    expected = train(whole, loader(kind), **options)

    def stop(entry):
        if entry["epoch"] == 2:
            raise Stop

    with pytest.raises(Stop):
        train(model(), loader(kind), checkpoint=tmp_path / "run", on_epoch=stop, **options)
    resumed, told = model(), []
    result = train(resumed, loader(kind), checkpoint=tmp_path / "run", on_epoch=told.append, **options)
    assert [entry["epoch"] for entry in told] == [2, 3]  # the second was told of, and not written
    assert same(whole.state_dict(), resumed.state_dict())
    assert without_times(result.history) == without_times(expected.history)
    assert result.peak_bytes == expected.peak_bytes and result.plan == expected.plan


def test_the_next_step_is_the_same_to_the_bit(batch):
    """With dropout, whose masks are drawn, and an extra loss with a net of its own."""
    trainers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        net = models.CifarResNet(1)
        net.fc = torch.nn.Sequential(torch.nn.Dropout(0.5), net.fc)
        trainers.append(LocalTrainer(net, rule="predsim", optimizer=SGD, image_size=(16, 16)))
    first, second = trainers
    first.step(*batch)
    state = first.state_dict()
    for value in (random, numpy.random):
        value.seed(7)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    expected = [first.step(*batch).module_losses, torch.rand(3)]
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    found = [second.step(*batch).module_losses, torch.rand(3)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert same(first.model.state_dict(), second.model.state_dict())
    assert same(first.aux_nets.state_dict(), second.aux_nets.state_dict())


def test_pythons_and_numpys_generators_too(tiny_model):
    trainer = LocalTrainer(tiny_model, depth=2)
    random.seed(5), numpy.random.seed(6)
    state = trainer.state_dict()
    expected = random.random(), numpy.random.rand(), numpy.random.randn()
    random.seed(7), numpy.random.seed(8)
    trainer.load_state_dict(state)
    assert (random.random(), numpy.random.rand(), numpy.random.randn()) == expected


def test_a_finished_training_is_only_read(tmp_path):
    options = {"epochs": 1, "depth": 2, "progress": False, "checkpoint": tmp_path}
    first = train(model(), loader("DeviceLoader"), **options)
    again = model()
    result = train(again, loader("DeviceLoader"), on_epoch=lambda entry: 1 / 0, **options)
    assert result.history == first.history and result.plan == first.plan
    more = train(again, loader("DeviceLoader"), **options | {"epochs": 2})
    assert [entry["epoch"] for entry in more.history] == [1, 2]


def test_the_best_epoch_is_kept(tmp_path, monkeypatch):
    real, accuracies = Sums.entry, iter([0.2, 0.9, 0.5])
    monkeypatch.setattr(Sums, "entry", lambda *given: real(*given) | {"train_accuracy": next(accuracies)})
    train(model(), loader("DeviceLoader"), 2, epochs=3, progress=False, checkpoint=tmp_path)
    epochs = {name: torch.load(tmp_path / name, weights_only=True)["epoch"] for name in ("best.pt", "last.pt")}
    assert epochs == {"best.pt": 2, "last.pt": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 3}, "saved with depth 2, this trainer has 3"),
        ({"rule": "bp"}, "saved with rule auglocal, this trainer has bp"),
        ({"modules": 2}, r"saved with borders \[0, 1\], this trainer has \[1\]"),
        ({"precision": "bf16"}, "saved with precision fp32, this trainer has bf16"),
        ({"optimizer": torch.optim.AdamW}, "saved with optimizer SGD, this trainer has AdamW"),
        ({"epochs": 0}, "epochs must be a whole number of at least 1"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, change, message):
    options = {"depth": 2, "epochs": 2, "progress": False, "checkpoint": tmp_path}
    train(model(), loader("DeviceLoader"), **options)
    other = model()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        train(other, loader("DeviceLoader"), **options | change)
    assert same(before, other.state_dict())


def test_another_network_and_fewer_epochs_are_refused(tmp_path):
    options = {"depth": 2, "progress": False, "checkpoint": tmp_path}
    train(model(), loader("DeviceLoader"), epochs=2, **options)
    with pytest.raises(ValueError, match="has a training of 2 epochs already, given epochs=1"):
        train(model(), loader("DeviceLoader"), epochs=1, **options)
    with pytest.raises(ValueError, match=r"another model: its fc.weight has shape \(10, 64\), expected \(11, 64\)"):
        train(models.CifarResNet(1, num_classes=11), loader("DeviceLoader"), epochs=2, **options)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * 100])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    path = tmp_path / "last.pt"
    train(model(), loader("DeviceLoader"), 2, epochs=1, progress=False, checkpoint=tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"last.pt is no checkpoint of a training, or is damaged \("):
        train(model(), loader("DeviceLoader"), 2, epochs=2, progress=False, checkpoint=tmp_path)


def train_eight_epochs(folder, options):
    train(model(), loader("DeviceLoader"), epochs=8, seed=3, progress=False, checkpoint=folder, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"depth": 2},
        {"depth": 2, "modules": 2, "checkpoint_minutes": 0},
        {"rule": "checkpoint", "checkpoint_minutes": 0},
    ],
    ids=str,
)
def test_killed_at_any_moment_it_ends_as_one_that_was_not(tmp_path, options):
    """A real process and a real SIGKILL, at a moment drawn within the training."""
    expected, draw = model(), random.Random(str(options))
    train(expected, loader("DeviceLoader"), epochs=8, seed=3, progress=False, **options)
    process = processes.begun(train_eight_epochs, tmp_path, options)
    while not (tmp_path / "last.pt").exists() and process.is_alive():
        time.sleep(0.01)
    time.sleep(draw.uniform(0, 0.3))
    process.kill()
    process.join()
    resumed = model()
    train(resumed, loader("DeviceLoader"), epochs=8, seed=3, progress=False, checkpoint=tmp_path, **options)
    assert same(expected.state_dict(), resumed.state_dict())


# ---- what a checkpoint must not do, or be -------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["optimizer", "history"])
def test_numpys_numbers_can_be_read_back(tmp_path, where):
    optimizer = partial(torch.optim.SGD, lr=numpy.float64(0.05)) if where == "optimizer" else SGD
    told = {"on_epoch": lambda entry: entry.update(when=numpy.float64(1))}
    given = {"epochs": 1, "progress": False, "checkpoint": tmp_path, "optimizer": optimizer} | told
    train(model(), loader("DeviceLoader"), 2, **given)
    assert len(train(model(), loader("DeviceLoader"), 2, **given | {"epochs": 2}).history) == 2


def test_what_could_not_be_read_back_is_not_written(tmp_path):
    class Odd(DeviceLoader):
        def state_dict(self):
            return super().state_dict() | {"more": Path("x")}

    images = torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8)
    batches = Odd(images, torch.arange(40) % 10, 16, *mean_and_std(images), augment=True)
    with pytest.raises(ValueError, match="no checkpoint can be written: the optimizer's, the loader's"):
        train(model(), batches, 2, epochs=2, progress=False, checkpoint=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_optimizer_with_other_settings_is_refused(tmp_path):
    given = {"epochs": 1, "progress": False, "checkpoint": tmp_path}
    train(model(), loader("DeviceLoader"), 2, optimizer=SGD, **given)
    for other, message in (
        (partial(SGD, lr=0.001), "an optimizer with lr 0.05, given one with 0.001: give the same optimizer="),
        (partial(SGD, weight_decay=0.1), "an optimizer with weight_decay 0, given one with 0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            train(model(), loader("DeviceLoader"), 2, optimizer=other, **given | {"epochs": 2})


def test_the_best_is_written_before_the_last(tmp_path, monkeypatch):
    from auglocal_ext.training import checkpoint

    written = []
    monkeypatch.setattr(checkpoint, "write_whole", lambda path, write: written.append(path.name))
    train(model(), loader("DeviceLoader"), 2, epochs=1, progress=False, checkpoint=tmp_path)
    assert written == ["best.pt", "last.pt"]


def test_a_refused_checkpoint_leaves_the_loader_as_it_was(tmp_path):
    batches = loader("DeviceLoader")
    given = {"epochs": 1, "depth": 2, "progress": False, "seed": 3}
    train(model(), batches, checkpoint=tmp_path, max_seconds=0, **given)
    with pytest.raises(ValueError, match="borders"):
        train(model(), batches, checkpoint=tmp_path, modules=2, **given)
    steps = []
    train(model(), batches, on_step=lambda *at: steps.append(at), **given)
    assert len(steps) == 3


def test_what_was_frozen_stays_frozen(tmp_path):
    def trained(folder, **more):
        net = model()

        def freeze(entry):
            net.layer1.requires_grad_(False)
            net.layer1[0].bn1.eval()

        given = {"epochs": 3, "depth": 2, "progress": False, "seed": 3, "checkpoint": folder, "on_epoch": freeze}
        train(net, loader("DeviceLoader"), **given | more)
        return net.state_dict()

    def stop(epoch, step, result):
        if (epoch, step) == (2, 2):
            raise Stop

    with pytest.raises(Stop):
        trained(tmp_path / "part", on_step=stop, checkpoint_minutes=0)
    assert same(trained(tmp_path / "part"), trained(tmp_path / "whole"))
