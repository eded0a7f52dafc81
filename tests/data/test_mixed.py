"""Batches that are mixed: what they are made of, and trainings that go on with them."""

import copy

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, TensorDataset, default_collate

from auglocal_ext import models, train
from auglocal_ext.data import DeviceLoader, Mixed, mean_and_std

v2 = pytest.importorskip("torchvision.transforms.v2", reason="MixUp and CutMix are torchvision's", exc_type=Exception)
pytestmark = pytest.mark.usefixtures("nothing_compared")

CLASSES = 10


def loader(size=40):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (size, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return DeviceLoader(images, torch.arange(size) % CLASSES, 16, *mean_and_std(images), augment=False, seed=2)


def test_images_and_labels_are_mixed_alike():
    """Each image is the sum of two neighbours by the very shares that its label has."""
    torch.manual_seed(0)
    for (images, labels), (mixed, shares) in zip(loader(), Mixed(loader(), CLASSES, mixup=1), strict=True):
        assert shares.shape == (len(labels), CLASSES) and shares.dtype == torch.float32
        torch.testing.assert_close(shares.sum(1), torch.ones(len(labels)))
        own = shares[torch.arange(len(labels)), labels][:, None, None, None]
        torch.testing.assert_close(mixed, own * images + (1 - own) * images.roll(1, 0))


def test_cuts_are_of_the_size_that_the_labels_say():
    torch.manual_seed(0)
    images, labels = next(iter(loader()))
    cut, shares = next(iter(Mixed(loader(), CLASSES, cutmix=1)))
    own = (cut == images).all(1).float().mean((1, 2))
    torch.testing.assert_close(own, shares[torch.arange(16), labels])
    assert ((cut == images) | (cut == images.roll(1, 0))).all() and 0 < own[0] < 1


def test_of_both_one_is_taken_for_each_batch():
    torch.manual_seed(0)
    given, found = loader(160), set()
    for (images, _), (mixed, _) in zip(loader(160), Mixed(given, CLASSES, 1, 1), strict=True):
        found.add(bool(((mixed == images) | (mixed == images.roll(1, 0))).all()))
    assert found == {True, False} and len(Mixed(given, CLASSES, 1)) == len(given) == 10


class ByEpoch(RandomSampler):
    epochs = ()

    def set_epoch(self, epoch):
        self.epochs = (*self.epochs, epoch)


def test_any_loader_is_taken_with_what_it_has():
    data = TensorDataset(torch.randn(20, 3, 8, 8), torch.arange(20) % CLASSES)
    sampler = ByEpoch(data)
    mixed = Mixed(DataLoader(data, 8, sampler=sampler), CLASSES, mixup=1)
    history = train(models.CifarResNet(1), mixed, modules=2, epochs=2, progress=False).history
    assert [entry["epoch"] for entry in history] == [1, 2] and sampler.epochs[-1] == 1
    assert not hasattr(mixed, "state_dict") and mixed.batch_size == 8 and copy.copy(mixed).sampler is sampler
    assert Mixed(loader(), CLASSES, mixup=1).state_dict()["batch_size"] == 16
    with pytest.raises(AttributeError, match="'DataLoader' object has no attribute 'worth'"):
        mixed.worth  # noqa: B018


@pytest.mark.parametrize(
    ("alphas", "message"),
    [
        ((0, 0), "mixup or cutmix must be above 0, given 0 for both: use the loader as it is"),
        ((-1, 0), "mixup must be a finite number of at least 0, given -1"),
        ((0, "1"), "cutmix must be a finite number of at least 0, given '1'"),
    ],
)
def test_what_is_refused(alphas, message):
    with pytest.raises(ValueError, match=message):
        Mixed(loader(), CLASSES, *alphas)


class Stop(Exception):
    pass


def model():
    torch.manual_seed(0)
    return models.CifarResNet(1)


@pytest.mark.parametrize("within", [False, True])
def test_a_stopped_training_ends_as_one_that_was_not(tmp_path, within):
    """Stopped behind the first epoch, or in the middle of the second one."""
    options = {"depth": 2, "modules": 2, "epochs": 2, "seed": 3, "progress": False}
    whole = model()
    expected = train(whole, Mixed(loader(), CLASSES, 0.2, 1), **options)

    def stop(epoch, step, result):
        if (epoch, step) == (2, 2 if within else 1):
            raise Stop

    keeping = {"checkpoint": tmp_path, "checkpoint_minutes": 0 if within else 60}
    with pytest.raises(Stop):
        train(model(), Mixed(loader(), CLASSES, 0.2, 1), on_step=stop, **keeping, **options)
    assert (torch.load(tmp_path / "last.pt", weights_only=True)["sums"] is not None) == within
    resumed = model()
    result = train(resumed, Mixed(loader(), CLASSES, 0.2, 1), **keeping, **options)
    assert all(torch.equal(t, whole.state_dict()[name]) for name, t in resumed.state_dict().items())
    for name in ("module_losses", "module_accuracies"):
        assert [entry[name] for entry in result.history] == [entry[name] for entry in expected.history]


def test_a_collate_function_of_ones_own():
    """As torchvision's documentation has it; the accuracy is that of the largest shares."""
    mix = v2.MixUp(num_classes=CLASSES)
    images, labels = torch.randn(20, 3, 8, 8), torch.arange(20) % CLASSES
    data = DataLoader(
        TensorDataset(images, labels), batch_size=10, collate_fn=lambda batch: mix(*default_collate(batch))
    )
    result = train(model(), data, rule="bp", epochs=1, seed=0, progress=False)
    assert 0 <= result.history[0]["train_accuracy"] <= 1
    assert result.plan.batch_bytes == 10 * 3 * 8 * 8 * 4 + 10 * CLASSES * 4
    assert result.peak_bytes == result.plan.peak_bytes
