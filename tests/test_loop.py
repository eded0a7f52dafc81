"""The training loop: what it learns, returns and leaves behind; loaders, interruptions, bad arguments."""

import gc
import os
import signal
import sys
import threading
import weakref

import pytest
import torch

from auglocal_ext import TrainingInterrupted, evaluate, models, train
from auglocal_ext.optim import constant
from auglocal_ext.program import Program


def toy(batches=4, size=16, classes=3, seed=0):
    """Images whose class is a bright quadrant: learnt within a few steps."""
    generator = torch.Generator().manual_seed(seed)
    loader = []
    for _ in range(batches):
        labels = torch.randint(classes, (size,), generator=generator)
        images = torch.randn(size, 3, 8, 8, generator=generator) * 0.3
        for image, label in zip(images, labels, strict=True):
            image[:, 4 * (label // 2) :][:, :4, 4 * (label % 2) :][:, :, :4] += 1.5
        loader.append((images, labels))
    return loader


def small(classes=3):
    torch.manual_seed(0)
    return models.CifarResNet(1, num_classes=classes)


def test_it_learns_in_every_module():
    model = small()
    result = train(model, toy(), depth=2, val_loader=toy(seed=1), epochs=6, progress=False)
    first, last = result.history[0], result.history[-1]
    assert all(b < a for a, b in zip(first["module_losses"], last["module_losses"], strict=True))
    assert last["train_accuracy"] > 0.9 and last["val_accuracy"] > 0.9
    assert last["val_accuracy"] == evaluate(model, toy(seed=1))


@pytest.mark.parametrize("rule", ["auglocal", "bp"])
def test_result(rule):
    seen = []
    result = train(small(), toy(), depth=2, rule=rule, epochs=2, progress=False, on_epoch=seen.append)
    assert seen == result.history and [entry["epoch"] for entry in seen] == [1, 2]
    keys = (
        "epoch loss module_losses train_accuracy val_accuracy val_top5_accuracy images_per_second seconds lr peak_bytes"
    )
    assert set(seen[0]) == {*keys.split(), "peak_bytes"}
    assert seen[0]["val_accuracy"] is None and seen[0]["loss"] == seen[0]["module_losses"][-1]
    assert len(result.plan.modules) == len(seen[0]["module_losses"]) == (3 if rule == "auglocal" else 1)
    assert result.plan.input_shape == (16, 3, 8, 8)
    assert result.peak_bytes == seen[-1]["peak_bytes"] > 2 * sum(p.nbytes for p in small().parameters())
    assert result.aux_nets is None


def test_the_same_seed_gives_the_same_bits():
    states = []
    for seed in (5, 5, 6):
        model = small()
        train(model, toy(), depth=2, epochs=2, seed=seed, progress=False)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["conv1.weight"], states[2]["conv1.weight"])


def test_aux_nets_are_kept_on_request():
    result = train(small(), toy(), depth=2, epochs=1, progress=False, keep_aux_nets=True)
    assert len(result.aux_nets) == 2
    assert result.aux_nets[0](torch.randn(2, 16, 8, 8)).shape == (2, 3)


def test_what_comes_out_is_the_plain_torchvision_model(torchvision):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    keys = list(model.state_dict())
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    train(model, [(images, labels)] * 2, depth=4, epochs=1, progress=False)
    assert type(model) is torchvision.models.ResNet and list(model.state_dict()) == keys
    fresh = torchvision.models.resnet18(num_classes=10)
    fresh.load_state_dict(model.state_dict())
    model.eval(), fresh.eval()
    with torch.no_grad():
        assert torch.equal(fresh(images), model(images))


def test_loaders_of_every_kind():
    from torch.utils.data import DataLoader, TensorDataset

    images, labels = torch.randn(10, 3, 8, 8), torch.arange(10) % 3
    loader = DataLoader(TensorDataset(images, labels), batch_size=5)  # gives lists
    train(small(), loader, depth=2, epochs=2, progress=False)
    train(small(), (pair for pair in [(images, labels)]), depth=2, epochs=1, progress=False)  # no length


def test_a_last_batch_of_one_is_skipped_with_a_warning():
    loader = [*toy(2), (torch.randn(1, 3, 8, 8), torch.tensor([0]))]
    with pytest.warns(UserWarning, match=r"epoch 1/1: a batch of one image is skipped, .* drop_last=True"):
        result = train(small(), loader, depth=2, epochs=1, progress=False)
    assert len(result.history) == 1


@pytest.mark.parametrize(
    ("loader", "kind", "message"),
    [
        ([], ValueError, "the loader is empty"),
        (None, TypeError, r"the loader must be an iterable of \(images, labels\), given NoneType"),
        ([torch.randn(2, 3, 8, 8)], TypeError, r"pairs of tensors \(images, labels\), given a Tensor"),
        ([(torch.randn(2, 3, 8, 8),)], TypeError, r"given a tuple of Tensor"),
        ([("a", "b", "c")], TypeError, "given a tuple of str, str, str"),
        (
            [(torch.randn(2, 3, 8, 8, device="meta"), torch.arange(2))],
            ValueError,
            "model is on cpu, the loader's images on meta",
        ),
        ([(torch.randn(1, 3, 8, 8), torch.tensor([0]))], ValueError, "no batch of two images or more in epoch 1/10"),
    ],
)
@pytest.mark.filterwarnings("ignore:epoch 1/10. a batch of one")
def test_bad_loaders(loader, kind, message):
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(kind, match=message):
        train(model, loader, depth=2, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def refused_before_any_change(kind, message, loader, **options):
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(kind, match=message):
        train(model, loader, depth=2, progress=False, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_loaders_for_one_time_only():
    message = "gone through only once, which is not enough for 2 epochs: give a DataLoader"
    refused_before_any_change(ValueError, message, iter(toy()), epochs=2)
    message = "val_loader can be gone through only once"
    refused_before_any_change(ValueError, message, toy(), val_loader=iter(toy()), epochs=2)
    assert train(small(), iter(toy()), depth=2, val_loader=iter(toy()), epochs=1, progress=False).history


class RunsDry(list):
    """Gives its batches in the first epoch only."""

    def __iter__(self):
        batches, self[:] = list(super().__iter__()), []
        return iter(batches)


def test_a_loader_that_runs_dry_is_told():
    message = r"no batch of two images or more in epoch 2/2: it must give some in every epoch"
    with pytest.raises(ValueError, match=message):
        train(small(), RunsDry(toy()), depth=2, epochs=2, progress=False)


def test_bad_validation_loaders():
    labels = torch.arange(2)
    for val_loader, kind, message in [
        ([], ValueError, "val_loader is empty"),
        ([(torch.zeros(2, 1, 8, 8), labels)], ValueError, r"val_loader's images must be \(N, 3, H, W\)"),
        ([(torch.zeros(2, 3, 8, 8).byte(), labels)], TypeError, "val_loader's images must be floating point"),
        ([{"images": 1}], TypeError, "given a dict"),
    ]:
        refused_before_any_change(kind, message, toy(), val_loader=val_loader)
    with pytest.raises(ValueError, match="validation loader is empty"):
        evaluate(small(), [])
    with pytest.raises(ValueError, match="validation labels must be from 0 to 2 for this model"):
        evaluate(small(), [(torch.zeros(2, 3, 8, 8), labels + 2)])


@pytest.mark.parametrize("schedule", [torch.optim.lr_scheduler.StepLR, 0.1])
def test_what_is_no_schedule(schedule):
    message = r"schedule must be a function \(epoch, epochs\) -> factor of the learning rate, given (StepLR|float)"
    refused_before_any_change(TypeError, message, toy(), schedule=schedule)


def test_a_batch_of_none_is_not_the_end_of_the_epoch():
    with pytest.raises(TypeError, match="given a NoneType"):
        train(small(), [toy()[0], None, toy()[0]], depth=2, epochs=1, progress=False)


def test_a_device_that_is_not_there():
    message = "device 'gpu' cannot be used here: .* leave it out, or say 'cpu'"
    refused_before_any_change(ValueError, message, toy(), device="gpu")


class Endless(torch.utils.data.IterableDataset):
    """A data set without a length."""

    def __iter__(self):
        return iter(toy())


def test_a_loader_without_a_length_follows_the_schedule_too():
    seen = []

    def schedule(epoch, epochs):
        seen.append(epoch)
        return 1.0

    loader = torch.utils.data.DataLoader(Endless(), batch_size=None)
    train(small(), loader, depth=2, epochs=2, schedule=schedule, progress=False)
    assert seen == [0.5] * 4 + [1, 1.25, 1.5, 1.75]  # the second epoch goes by the first one's length
    assert train(small(), toy(), depth=2, epochs=1, schedule=None, progress=False).history[0]["lr"] == 0.1 * 16 / 128


def test_validation_batches_can_be_trained_on():
    """A loader that caches its batches, seen by the validation first."""

    class Caching:
        def __iter__(self):
            self.batches = getattr(self, "batches", None) or [(x * 1.0, y) for x, y in toy()]
            return iter(self.batches)

    loader = Caching()
    evaluate(small(), loader)
    assert train(small(), loader, depth=2, epochs=1, progress=False).history


def test_no_image_outlives_its_step():
    alive = []

    def loader():
        for images, labels in toy():
            images = images.clone()
            alive.append(weakref.ref(images))
            yield images, labels
            del images
            assert sum(ref() is not None for ref in alive) == 0

    train(small(), loader(), depth=2, epochs=1, progress=False)


def test_aux_nets_are_gone_afterwards():
    parameters = {id(p) for p in gc.get_objects() if type(p) is torch.nn.Parameter}
    model = small()
    train(model, toy(), depth=2, epochs=1, progress=False)
    own = {id(p) for p in model.parameters()}
    left = [p for p in gc.get_objects() if type(p) is torch.nn.Parameter and id(p) not in parameters | own]
    assert not left


def test_a_batch_norm_frozen_in_eval_mode_stays_frozen():
    model = small()
    model.bn1.eval()
    before = model.bn1.running_mean.clone()
    train(model, toy(), depth=2, val_loader=toy(), epochs=2, progress=False)
    assert model.training and not model.bn1.training and torch.equal(model.bn1.running_mean, before)


@pytest.mark.parametrize("epochs", [0, -1, 1.5])
def test_bad_epochs(epochs):
    with pytest.raises(ValueError, match=f"epochs must be a whole number of at least 1, given {epochs}"):
        train(small(), toy(), depth=2, epochs=epochs)


def test_divergence_is_told():
    def explode(parameters):
        return torch.optim.SGD(parameters, lr=1e30)

    with pytest.raises(
        FloatingPointError, match="the loss of local module .* training diverged; lower the learning rate"
    ):
        train(small(), toy(), depth=2, epochs=2, optimizer=explode, schedule=constant, progress=False)


def test_the_schedule_is_followed_within_epochs():
    seen, steps = [], 4

    def schedule(epoch, epochs):
        seen.append((epoch, epochs))
        return 0.5

    result = train(small(), toy(steps), depth=2, epochs=2, schedule=schedule, progress=False)
    assert seen == [(i / steps, 2) for i in range(2 * steps)]
    assert result.history[-1]["lr"] == pytest.approx(0.5 * 0.1 * 16 / 128)


def interrupt_at(step, loader):
    """The loader, with a Ctrl-C while batch `step` is made."""
    for index, batch in enumerate(loader):
        if index == step:
            os.kill(os.getpid(), signal.SIGINT)
        yield batch


class Interrupted(list):
    """A loader that is interrupted at a step of its second epoch."""

    epochs = 0

    def __iter__(self):
        self.epochs += 1
        return interrupt_at(2 if self.epochs == 2 else None, super().__iter__())


def test_ctrl_c_acts_between_steps():
    model, handler = small(), signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterrupted, match="interrupted after 1 whole epoch") as stopped:
        train(model, Interrupted(toy()), depth=2, epochs=3, progress=False)
    assert isinstance(stopped.value, KeyboardInterrupt)
    assert [entry["epoch"] for entry in stopped.value.result.history] == [1]
    assert signal.getsignal(signal.SIGINT) is handler
    steps = {int(bn.num_batches_tracked) for bn in model.modules() if isinstance(bn, torch.nn.BatchNorm2d)}
    assert steps == {4 + 2}  # every module took every step that was begun
    assert model(torch.randn(2, 3, 8, 8)).isfinite().all()


def test_a_second_ctrl_c_acts_at_once(monkeypatch):
    def stuck(self, inputs, labels, images):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    monkeypatch.setattr(Program, "run", stuck)
    with pytest.raises(TrainingInterrupted, match="0 whole epochs. The step stopped in local module 0 of 3."):
        train(small(), toy(), depth=2, progress=False)


def test_a_data_loader_worker_killed_by_ctrl_c_is_not_an_error():
    def loader():
        yield toy(1)[0]
        os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("DataLoader worker exited unexpectedly")

    with pytest.raises(TrainingInterrupted):
        train(small(), loader(), depth=2, epochs=1, progress=False)


def test_training_in_a_thread_leaves_signals_alone():
    results = []
    thread = threading.Thread(target=lambda: results.append(train(small(), toy(), depth=2, epochs=1, progress=False)))
    thread.start()
    thread.join()
    assert len(results) == 1


def test_an_error_leaves_a_usable_model():
    model = small().eval()
    bad = [*toy(2), (torch.randn(4, 3, 8, 8) * torch.nan, torch.zeros(4, dtype=torch.int64))]
    with pytest.raises(ValueError, match="images must be finite"):
        train(model, bad, depth=2, epochs=1, progress=False)
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert model(torch.randn(2, 3, 8, 8)).isfinite().all()
    assert train(model, toy(), depth=2, epochs=1, progress=False).history


def test_the_mode_of_the_model_is_restored():
    model = small().eval()
    train(model, toy(), depth=2, val_loader=toy(), epochs=1, progress=False)
    assert not model.training
    evaluate(model.train(), toy())
    assert model.training


def test_progress_goes_to_the_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    train(small(), toy(), depth=2, val_loader=toy(), epochs=1)
    captured = capsys.readouterr()
    assert "epoch 1/1  loss " in captured.out and "test " in captured.out and "peak " in captured.out
    assert "batch" in captured.err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    train(small(), toy(), depth=2, epochs=1)
    assert "batch" not in capsys.readouterr().err  # no bar in a log file


def test_moving_to_a_device():
    result = train(small(), toy(), depth=2, epochs=1, device="cpu", precision="bf16", progress=False)
    assert result.history
