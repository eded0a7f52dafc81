"""The training loop: what it learns, returns and leaves behind; loaders, interruptions, bad arguments."""

import gc
import math
import os
import signal
import sys
import threading
import weakref
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from auglocal_ext import TrainingDiverged, TrainingInterrupted, evaluate, evaluation, models, train
from auglocal_ext.engine.program import Program
from auglocal_ext.optim import constant
from auglocal_ext.training import evaluate as evaluating
from auglocal_ext.training.epoch import Sums

pytestmark = pytest.mark.usefixtures("nothing_compared")


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
    assert last["val_loss"] == evaluation(model, toy(seed=1)).loss < 0.5


@pytest.mark.parametrize("rule", ["auglocal", "bp"])
def test_result(rule):
    seen = []
    result = train(small(), toy(), depth=2, rule=rule, epochs=2, progress=False, on_epoch=seen.append)
    assert seen == result.history and [entry["epoch"] for entry in seen] == [1, 2]
    keys = "epoch loss module_losses train_accuracy module_accuracies val_loss val_accuracy val_top5_accuracy "
    keys += "images_per_second seconds lr skipped_steps peak_bytes"
    assert set(seen[0]) == set(keys.split())
    assert seen[0]["module_accuracies"][-1] == seen[0]["train_accuracy"]
    assert len(seen[0]["module_accuracies"]) == len(seen[0]["module_losses"])
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
    train(model, [(images, labels)] * 2, depth=4, modules=3, epochs=1, progress=False)
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


@pytest.mark.parametrize("schedule", [torch.optim.lr_scheduler.StepLR, 0.1, lambda: 1.0, lambda a, b, c: 1.0])
def test_what_is_no_schedule(schedule):
    message = r"schedule must be a function \(epoch, epochs\) -> .* rate, given (StepLR|float|<lambda>)"
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
    assert steps == {4 + 3}  # the batch that was being made is trained on, by every module
    assert model(torch.randn(2, 3, 8, 8)).isfinite().all()


def test_a_second_ctrl_c_acts_at_once(monkeypatch):
    def stuck(self, inputs, labels, images, scale):
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
    assert "epoch 1/1  loss " in captured.out and "val " in captured.out
    assert "a step's peak memory: " in captured.out
    assert "batch" in captured.err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    train(small(), toy(), depth=2, epochs=1)
    assert "batch" not in capsys.readouterr().err  # no bar in a log file


def test_moving_to_a_device():
    result = train(small(), toy(), depth=2, epochs=1, device="cpu", precision="bf16", progress=False)
    assert result.history


# ---- loaders and numbers of every kind ---------------------------------------------------------------------------


class BySequence:
    """Goes through its batches by __getitem__ alone, and has no length that it can tell."""

    def __init__(self, error):
        self.error, self.batches = error, toy()

    def __getitem__(self, index):
        return self.batches[index]

    def __len__(self):
        raise self.error


@pytest.mark.parametrize("error", [NotImplementedError(), RuntimeError("not known"), AttributeError("x"), OSError()])
def test_loaders_without_iter_whose_length_raises_anything(error):
    result = train(small(), BySequence(error), depth=2, val_loader=BySequence(error), epochs=2, progress=False)
    assert len(result.history) == 2 and evaluate(small(), BySequence(error)) >= 0


@pytest.mark.parametrize("epochs", [np.int64(1), np.uint8(1), torch.tensor(1)])
def test_epochs_of_any_integer_kind(epochs):
    assert len(train(small(), toy(), depth=2, epochs=epochs, progress=False).history) == 1


@pytest.mark.parametrize("epochs", [True, np.True_, 1.0, np.float64(2), "1", None, torch.tensor(True)])
def test_epochs_that_are_no_whole_number(epochs):
    refused_before_any_change(ValueError, "epochs must be a whole number of at least 1, given ", toy(), epochs=epochs)


@pytest.mark.parametrize("seed", [1.5, True, 2**64, -(2**63) - 1, "0"])
def test_bad_seeds(seed):
    refused_before_any_change(ValueError, r"seed must be a whole number from -2\*\*63 to", toy(), seed=seed)


@pytest.mark.parametrize("mistake", [{"accumulate": 0}, {"nonfinite": "go on"}, {"patience": 0}, {"schedule": 1}])
def test_a_mistake_leaves_the_generator_as_it_was(mistake):
    model, loader = small(), toy()
    before = torch.get_rng_state()
    with pytest.raises((ValueError, TypeError)):
        train(model, loader, depth=2, progress=False, seed=5, **mistake)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("device", ["meta", "mps", "xla"])
def test_devices_that_nothing_is_trained_on(device):
    message = f"device '{device}' cannot be used here: .*; leave it out, or say 'cpu'$"
    refused_before_any_change(ValueError, message, toy(), device=device)


# ---- divergence ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "factor", [None, -1, -0.5, math.nan, math.inf, "0.5", True, 1j, [1.0], torch.tensor([1.0, 2.0]), np.float32("nan")]
)
@pytest.mark.parametrize("step", [0, 2])
def test_a_schedule_that_gives_no_factor_is_told_before_the_step(factor, step):
    model, at, before = small(), [], {}

    def schedule(epoch, epochs):
        at.append(epoch)
        if len(at) <= step:
            return 0.5
        before.update({name: value.clone() for name, value in model.state_dict().items()})
        return factor

    message = rf"schedule\(epoch, epochs\) must return, at epoch {step / 4:g} of 1, a finite number of at least 0"
    with pytest.raises(ValueError, match=message):
        train(model, toy(), depth=2, epochs=1, schedule=schedule, progress=False)
    assert len(at) == step + 1 and all(torch.equal(v, before[name]) for name, v in model.state_dict().items())


@pytest.mark.parametrize("factor", [np.float32(0.5), np.int64(1), torch.tensor(0.5), 0, 1])
def test_factors_of_any_kind_of_number(factor):
    result = train(small(), toy(), depth=2, epochs=1, schedule=lambda *_: factor, progress=False)
    assert result.history[0]["lr"] == float(factor) * 0.1 * 16 / 128 and type(result.history[0]["lr"]) is float


class SpoilsAtStep(torch.optim.SGD):
    """SGD whose step of that number makes its first parameter NaN."""

    def __init__(self, parameters, at):
        super().__init__(parameters, lr=0.01)
        self.at, self.steps = at, 0

    def step(self, closure=None):
        super().step()
        self.steps += 1
        if self.steps == self.at:
            self.param_groups[0]["params"][0].data.fill_(math.nan)


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_last_update_that_spoils_the_weights_is_told_before_they_are_saved(epoch):
    model, saved = small(), []
    options = {"optimizer": partial(SpoilsAtStep, at=4 * epoch), "epochs": 2, "progress": False}
    message = f"epoch {epoch}/2: .* has values that are NaN or infinite: training diverged; lower the learning rate"
    with pytest.raises(TrainingDiverged, match=message) as stopped:
        train(model, toy(), depth=2, val_loader=toy(), on_epoch=saved.append, **options)
    assert stopped.value.result.history == saved and len(saved) == epoch - 1


@pytest.mark.parametrize("lr", [math.nan, math.inf])
def test_learning_rates_that_spoil_the_weights_with_the_only_update(lr):
    with pytest.raises(TrainingDiverged):
        train(small(), toy(1), rule="bp", epochs=1, optimizer=partial(torch.optim.SGD, lr=lr), progress=False)


def test_running_statistics_that_are_not_finite_are_told():
    """Their momentum spoils them: no loss in training mode reads them."""
    model = small()
    model.layer3[0].bn2.momentum = math.nan
    with pytest.raises(TrainingDiverged, match="epoch 1/1: layer3.0.bn2.running_mean has values that are NaN"):
        train(model, toy(), depth=2, epochs=1, progress=False)


def test_an_aux_net_that_is_not_finite_is_told():
    steps = iter([4, 0, 0])  # of the first module only

    def factory(parameters):
        optimizer = SpoilsAtStep(parameters, next(steps, 0))
        optimizer.param_groups[0]["params"].reverse()  # the aux net's before the units'
        return optimizer

    with pytest.raises(TrainingDiverged, match="epoch 1/1: aux_nets.0"):
        trainer = {"depth": 2, "epochs": 1, "modules": 3, "optimizer": factory}
        train(small(), toy(), **trainer, progress=False)


def test_a_buffer_that_was_infinite_from_the_start_is_no_divergence():
    model = small()
    model.layer1[0].bn1.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    assert train(model, toy(), depth=2, epochs=1, progress=False).history


def test_a_classifier_that_ends_far_worse_than_it_began_has_diverged(monkeypatch):
    losses, real, saved = iter([0.9, 3.0, 2.19, 0.5, 1.9, 0.1, 0.9, 1.79]), Sums.entry, []
    monkeypatch.setattr(Sums, "entry", lambda *given: real(*given) | {"loss": next(losses)})
    options = {"rule": "bp", "progress": False, "on_epoch": saved.append}
    train(small(), toy(), epochs=3, **options)  # in the middle it may; 2 ln 3 = 2.197 is the bound at the end
    train(small(), toy(), epochs=3, **options)
    train(small(), toy(), epochs=2, **options)
    losses = iter([1.3, 2.61])
    with pytest.raises(TrainingDiverged, match="was 2.61 in the last epoch, after 1.3 in the first one") as stopped:
        train(small(), toy(), epochs=2, **options)
    assert len(stopped.value.result.history) == 2 and saved[-1]["loss"] == 2.61
    losses = iter([0.3, 2.21])
    with pytest.raises(TrainingDiverged, match="guessing has 1.099: training diverged; lower the learning rate"):
        train(small(), toy(), epochs=2, **options)


def test_divergence_is_a_floating_point_error_with_the_result_so_far():
    with pytest.raises(FloatingPointError) as stopped:
        train(small(), toy(), depth=2, epochs=2, optimizer=partial(torch.optim.SGD, lr=1e30), progress=False)
    assert isinstance(stopped.value, TrainingDiverged) and stopped.value.result.history == []
    assert stopped.value.result.plan.input_shape == (16, 3, 8, 8)


def test_a_floating_point_error_of_the_callers_own_stays_one():
    def on_epoch(entry):
        raise FloatingPointError("mine")

    with pytest.raises(FloatingPointError, match="mine") as stopped:
        train(small(), toy(), depth=2, epochs=1, on_epoch=on_epoch, progress=False)
    assert type(stopped.value) is FloatingPointError


# ---- validation ---------------------------------------------------------------------------------------------------

IMAGES, LABELS = torch.zeros(4, 3, 8, 8), torch.arange(4) % 3
BAD_VALIDATION = [
    (IMAGES, LABELS[:, None], ValueError, r"labels must be \(4,\), one per image, given shape \(4, 1\)"),
    (IMAGES, LABELS[:1], ValueError, r"labels must be \(4,\), one per image, given shape \(1,\)"),
    (IMAGES, F.one_hot(LABELS), ValueError, r"labels must be \(4,\), one per image, given shape \(4, 3\)"),
    (IMAGES, LABELS[0], ValueError, r"labels must be \(4,\), one per image, given shape \(\)"),
    (IMAGES, LABELS.float(), TypeError, "labels must be int64 class numbers, given torch.float32"),
    (IMAGES, LABELS.bool(), TypeError, "labels must be int64 class numbers, given torch.bool"),
    (IMAGES, LABELS.int(), TypeError, "labels must be int64 class numbers, given torch.int32"),
    (IMAGES, LABELS + 1, ValueError, "labels must be from 0 to 2 for this model of 3 classes, given 1 to 3"),
    (IMAGES, LABELS - 1, ValueError, "labels must be from 0 to 2 .* given -1 to 1"),
    (IMAGES * math.nan, LABELS, ValueError, "images must be finite, given NaN or infinite values"),
    (IMAGES - math.inf, LABELS, ValueError, "images must be finite, given NaN or infinite values"),
    (IMAGES.byte(), LABELS, TypeError, "images must be floating point, given torch.uint8"),
    (IMAGES.long(), LABELS, TypeError, "images must be floating point, given torch.int64"),
    (IMAGES.double(), LABELS, TypeError, "images must be torch.float32 like the model, given torch.float64"),
    (IMAGES.to("meta"), LABELS, ValueError, "the model is on cpu, .*images on meta: pass device='meta'"),
    (IMAGES, LABELS.to("meta"), ValueError, "the model is on cpu, .*labels on meta"),
]


@pytest.mark.parametrize(("images", "labels", "kind", "message"), BAD_VALIDATION)
def test_validation_batches_are_checked_as_training_batches_are(images, labels, kind, message):
    with pytest.raises(kind, match=f"validation {message}|{message}"):
        evaluate(small(), [(IMAGES, LABELS), (images, labels)])
    refused_before_any_change(kind, message, toy(), val_loader=[(images, labels)])
    with pytest.raises(kind, match=message):  # in a later batch, after an epoch
        train(small(), toy(), depth=2, epochs=1, val_loader=[(IMAGES, LABELS), (images, labels)], progress=False)


@pytest.mark.parametrize("shape", [(4, 1, 8, 8), (4, 3, 8), (4, 3)])
def test_validation_images_of_a_shape_that_the_model_does_not_take(shape):
    loader = [(torch.zeros(shape), LABELS)]
    with pytest.raises(ValueError, match="the model cannot be run on validation images of shape"):
        evaluate(small(), loader)
    message = r"val_loader's images must be \(N, 3, H, W\) for this model, given shape"
    refused_before_any_change(ValueError, message, toy(), val_loader=loader)


@pytest.mark.parametrize("name", ["fc.weight", "bn1.running_var"])
def test_a_model_that_is_not_finite_cannot_be_evaluated(name):
    model = small()
    model.state_dict()[name].fill_(math.nan)
    with pytest.raises(FloatingPointError, match="the model's outputs for validation images are NaN or infinite: its"):
        evaluate(model, [(IMAGES, LABELS)])


def test_outputs_that_are_not_finite_in_a_validation_mean_divergence():
    """Finite weights, and a variance of the running statistics that the outputs do not survive."""
    model = small()
    with torch.no_grad():
        model.fc.weight.fill_(3e38)
    options = {"depth": 2, "epochs": 1, "schedule": lambda *_: 0.0, "progress": False}
    model.fc.register_forward_pre_hook(lambda module, inputs: None if module.training else (inputs[0] + 1e3,))
    with pytest.raises(TrainingDiverged):
        train(model, toy(), val_loader=toy(), **options)


@pytest.mark.parametrize(
    ("output", "given"),
    [
        (lambda x: x.new_zeros(len(x)), r"\(4,\) of torch.float32"),
        (lambda x: x.new_zeros(len(x), 3, 1), r"\(4, 3, 1\) of torch.float32"),
        (lambda x: x.new_zeros(2 * len(x), 3), r"\(8, 3\) of torch.float32"),
        (lambda x: x.new_zeros(len(x), 3, dtype=torch.int64), r"\(4, 3\) of torch.int64"),
        (lambda x: {"out": x}, "a dict"),
        (lambda x: (x, x), "a tuple"),
    ],
)
def test_what_is_no_classifier_cannot_be_evaluated(output, given):
    class Net(nn.Module):
        def forward(self, x):
            return output(x)

    with pytest.raises(ValueError, match=rf"row of floating-point outputs per image, \(4, classes\), .* {given}$"):
        evaluate(Net(), [(IMAGES, LABELS)])


def test_any_classifier_can_be_evaluated():
    """Without parameters, of vectors, in float64, and with an empty batch among the others."""
    votes = torch.eye(3)[[0, 1, 2, 0]]
    empty = (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    assert evaluate(nn.Identity(), [(votes, LABELS), empty, (votes, (LABELS + 1) % 3)]) == 0.5
    linear = nn.Linear(3, 3).double()
    with torch.no_grad():
        linear.weight.copy_(torch.eye(3)), linear.bias.zero_()
    assert evaluate(linear, [(votes.double(), LABELS)]) == 1
    assert evaluate(small(), [(IMAGES.bfloat16(), LABELS)], precision="bf16") >= 0


@pytest.mark.parametrize(
    ("images", "labels", "kind", "message"),
    [
        (IMAGES * math.nan, LABELS, ValueError, "validation images must be finite"),
        (IMAGES, LABELS + 1, ValueError, "validation labels must be from 0 to 2 .* given values outside it"),
    ],
)
def test_off_the_cpu_values_are_read_once_at_the_end(images, labels, kind, message):
    """What a CUDA device does, on the CPU: a fault of the first batch is told after the last one."""

    class Elsewhere(evaluating.Validation):
        def _note(self, index, fault, labels=None):
            self.faults[index] |= fault

    validation, given = Elsewhere(small()), []

    def batches():
        for batch in [(images, labels), (IMAGES, LABELS)]:
            given.append(batch)
            yield batch

    with pytest.raises(kind, match=message):
        evaluating.evaluated(validation, batches(), False, threading.Event())
    assert len(given) == 2
