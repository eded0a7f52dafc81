"""Trainings that keep an averaged model, and trainings whose batches are accumulated."""

from functools import partial

import pytest
import torch
from test_checkpoint import Stop, loader, model, same, without_times

from auglocal_ext import LocalTrainer, evaluate, evaluation, train

pytestmark = pytest.mark.usefixtures("nothing_compared")

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
GIVEN = {"depth": 2, "progress": False, "optimizer": SGD, "seed": 3}


def test_the_result_has_the_averaged_model_and_its_validation():
    net, held_out, weights = model(), list(loader("DeviceLoader")), []
    net.eval()
    result = train(
        net, loader("DeviceLoader"), val_loader=held_out, epochs=1, ema=0.5,
        on_step=lambda *_: weights.append(net.fc.weight.detach().clone()), **GIVEN,
    )  # fmt: skip
    average = result.ema_model
    assert type(average) is type(net) and average.state_dict().keys() == net.state_dict().keys()
    assert not average.training and not any(p is q for p, q in zip(average.parameters(), net.parameters(), strict=True))
    first, second, third = weights
    torch.testing.assert_close(average.fc.weight, (first / 2 + second / 2) / 2 + third / 2)
    (entry,) = result.history
    found = evaluation(average, held_out)
    assert (entry["ema_val_loss"], entry["ema_val_accuracy"]) == (found.loss, found.top1)
    assert entry["ema_val_top5_accuracy"] == found.top5
    assert entry["val_accuracy"] == result.val_accuracy == evaluate(net, held_out)
    assert "averaged model: accuracy" in str(result) and result.peak_bytes == result.plan.peak_bytes
    plain = train(model(), loader("DeviceLoader"), epochs=1, **GIVEN)
    assert plain.ema_model is None and "ema_val_loss" not in plain.history[0]
    assert plain.plan.peak_bytes + sum(t.nbytes for t in net.state_dict().values()) + 8 == result.plan.peak_bytes


def test_a_validation_loader_for_one_time_through_is_too_few():
    with pytest.raises(ValueError, match="val_loader can be gone through only once: give a DataLoader or a list"):
        train(model(), loader("DeviceLoader"), val_loader=iter(loader("DeviceLoader")), epochs=1, ema=0.9, **GIVEN)


@pytest.mark.parametrize(
    "options", [{"accumulate": 2, "ema": 0.8}, {"accumulate": 5, "clip_norm": 0.1, "clip": "global"}]
)
def test_a_training_stopped_in_a_group_ends_as_one_that_was_not(tmp_path, options):
    """Three batches an epoch: groups of two and one, or of three."""

    def stop(epoch, step, result):
        if (epoch, step) == (2, 2):
            raise Stop

    nets, results = [], []
    given = {"epochs": 3, "checkpoint_minutes": 0, **GIVEN, **options}
    with pytest.raises(Stop):
        train(model(), loader("DeviceLoader"), on_step=stop, checkpoint=tmp_path / "part", **given)
    for name in ("part", "whole"):
        nets.append(model())
        results.append(train(nets[-1], loader("DeviceLoader"), checkpoint=tmp_path / name, **given))
    assert same(*(net.state_dict() for net in nets))
    assert without_times(results[0].history) == without_times(results[1].history)
    assert results[0].plan == results[1].plan and all(p.grad is None for p in nets[0].parameters())
    if "ema" in options:
        assert same(*(result.ema_model.state_dict() for result in results))
        assert results[1].peak_bytes == results[1].plan.peak_bytes


def test_an_epochs_last_batches_are_stepped_by():
    """The learning rate of a step is that of the group's first batch."""
    net, twin, batches = model(), model(), list(loader("DeviceLoader"))
    train(net, batches, epochs=1, accumulate=2, schedule=lambda epoch, epochs: 1 - epoch, **GIVEN)
    torch.manual_seed(3)
    trainer = LocalTrainer(twin, 2, optimizer=SGD, accumulate=2)
    for index, (images, labels) in enumerate(batches):
        if index != 1:
            trainer.set_learning_rate_factor(1 - index / 3)
        trainer.step(images.contiguous(memory_format=torch.channels_last), labels)
    trainer.flush()
    assert same(net.state_dict(), twin.state_dict())


def test_a_budget_counts_what_a_training_keeps():
    options = {"epochs": 2, "accumulate": 2, "clip_norm": 1.0, "clip": "global", "ema": 0.9, **GIVEN}
    result = train(model(), loader("DeviceLoader"), memory_budget="5MB", **options)
    assert result.plan.choice.point.bytes == result.plan.peak_bytes == result.peak_bytes <= 5e6


def test_the_default_learning_rate_is_of_all_batches_together():
    options = {"depth": 2, "progress": False, "epochs": 1, "schedule": None}
    (entry,) = train(model(), loader("DeviceLoader"), accumulate=3, **options).history
    assert entry["lr"] == pytest.approx(0.1 * 3 * 16 / 128)


def test_what_cannot_be_copied_is_refused():
    net = model()
    net.remembered = net.fc.weight * 2
    with pytest.raises(
        ValueError, match="CifarResNet cannot be copied, as ema needs it: Only Tensors created expl.*; train"
    ):
        LocalTrainer(net, 2, ema=0.9)


def test_refused_before_a_batch_is_drawn():
    with pytest.raises(ValueError, match="accumulate must be a whole number of batches, at least 1, given 0"):
        train(model(), [], accumulate=0, **GIVEN)
