"""Data sources: what they give, how they augment, and what is wrong with a folder."""

import pickle

import numpy as np
import pytest
import torch

from auglocal_ext import _torchvision, models
from auglocal_ext.data import InMemoryLoader, large_images, load


def write_images(root, sizes, classes=("cat", "dog"), per_class=3, splits=("train", "test")):
    from PIL import Image

    generator = np.random.default_rng(0)
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for index in range(per_class):
                pixels = generator.integers(0, 256, (sizes[1], sizes[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


def test_digits():
    source = load("digits", 100)
    images, labels = next(iter(source.test))
    assert images.shape == (100, 3, 16, 16) and images.dtype == torch.float32 and labels.dtype == torch.int64
    assert source.num_classes == 10
    assert sum(len(labels) for _, labels in source.train) == 1437
    assert sum(len(labels) for _, labels in source.test) == 360
    assert torch.bincount(torch.cat([labels for _, labels in source.test])).tolist() == pytest.approx([36] * 10, abs=2)
    assert len(source.train) == 15


def test_training_images_are_normalised():
    source = load("fake:200", 50)
    images = torch.cat([images for images, _ in source.train])
    assert images.mean((0, 2, 3)).abs().max() < 1e-4 and (images.std((0, 2, 3)) - 1).abs().max() < 1e-3


def loader(augment, **options):
    images = torch.arange(4 * 6 * 6, dtype=torch.uint8).view(4, 1, 6, 6)
    return InMemoryLoader(
        images, torch.arange(4), 4, torch.zeros(1), torch.full((1,), 1 / 255), augment=augment, **options
    )


def test_without_augmentation_images_come_as_they_are():
    images, labels = next(iter(loader(False)))
    torch.testing.assert_close(images.flatten(), torch.arange(144.0))
    assert labels.tolist() == [0, 1, 2, 3]


def test_crops_and_flips_are_of_the_reflected_image():
    """Each augmented image is one of the 2 x 9 crops of its padded original."""
    torch.manual_seed(0)
    seen = set()
    for _ in range(20):
        images, labels = next(iter(loader(True, pad=1, flip=True)))
        for image, label in zip(images, labels, strict=True):
            original = torch.arange(36.0).view(1, 1, 6, 6) + 36 * label
            padded = torch.nn.functional.pad(original, [1] * 4, mode="reflect")[0]
            found = [
                (top, left, mirrored)
                for top in range(3)
                for left in range(3)
                for mirrored in (False, True)
                if torch.allclose(image, _maybe_flipped(padded[:, top : top + 6, left : left + 6], mirrored), atol=1e-3)
            ]
            assert found
            seen.update(found)
    assert len(seen) == 18


def _maybe_flipped(image, mirrored):
    return image.flip(2) if mirrored else image


def test_each_epoch_has_every_image_once_in_a_new_order():
    torch.manual_seed(0)
    source = load("fake:100", 30)
    orders = [[label for _, labels in source.train for label in labels.tolist()] for _ in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]


@pytest.mark.parametrize(
    "source", ["mnist", "digits:x", "cifar10", "cifar10:", "imagefolder:", "fake:", "fake:many", "fake:10"]
)
def test_unknown_sources(source):
    with pytest.raises(ValueError, match=f"data must be 'digits', .* given '{source}'"):
        load(source, 10)


def test_small_image_folder(torchvision, tmp_path):
    source = load(f"imagefolder:{write_images(tmp_path, (12, 12))}", 4)
    images, labels = next(iter(source.train))
    assert images.shape == (4, 3, 12, 12) and source.num_classes == 2
    assert [labels.tolist() for _, labels in source.test] == [[0, 0, 0, 1], [1, 1]]


@pytest.mark.parametrize("workers", [0, 1])
def test_large_image_folder(torchvision, tmp_path, workers):
    root = write_images(tmp_path, (120, 100), splits=("train", "val"))
    source = load(f"imagefolder:{root}", 4, workers=workers)
    for part in (source.train, source.test):
        batches = list(part)
        assert [len(labels) for _, labels in batches] == [4, 2]
        assert batches[0][0].shape == (4, 3, 224, 224) and batches[0][0].dtype == torch.float32


def test_large_images_are_augmented_for_training_only(torchvision):
    """A picture whose left half is black: training flips and crops it anew each time, testing does not."""
    from PIL import Image

    image = Image.new("RGB", (448, 448))
    image.paste((255, 255, 255), (224, 0, 448, 448))
    source = large_images([(image, 1)] * 9, [(image, 1)] * 3, 4, ["a", "b"])
    torch.manual_seed(0)
    train, labels = (torch.cat(parts) for parts in zip(*source.train, strict=True))
    assert train.shape == (8, 3, 224, 224) and labels.tolist() == [1] * 8  # without the one that is left over
    left, right = train[:, 0, :, :8].mean((1, 2)), train[:, 0, :, -8:].mean((1, 2))
    assert (left < right).any() and (left > right).any()
    assert len({image.numpy().tobytes() for image in train}) > 4

    test = torch.cat([images for images, _ in source.test])
    assert test.shape == (3, 3, 224, 224)
    black, white = (torch.tensor([(v - m) / s for m, s in zip(*normalisation(source), strict=True)]) for v in (0, 1))
    for image in test:
        torch.testing.assert_close(image[:, 100, 0], black)
        torch.testing.assert_close(image[:, 100, -1], white)
        torch.testing.assert_close(image, test[0], rtol=0, atol=0)
    assert source.description["image_size"] == [224, 224] and source.num_classes == 2


def normalisation(source):
    return source.description["mean"], source.description["std"]


def test_missing_folders(torchvision, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no image folder at .*: expected .*/train and .*/test \(or val\)"):
        load(f"imagefolder:{tmp_path / 'nowhere'}", 4)
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    with pytest.raises(FileNotFoundError, match="expected a folder of images per class"):
        load(f"imagefolder:{tmp_path}", 4)


def test_unreadable_and_unequal_images(torchvision, tmp_path):
    root = write_images(tmp_path, (12, 12))
    (root / "train" / "cat" / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot read the image .*train/cat/1.png: replace or remove it"):
        load(f"imagefolder:{root}", 4)
    from PIL import Image

    Image.new("RGB", (10, 12)).save(root / "train" / "cat" / "1.png")
    with pytest.raises(ValueError, match=r"must all have one size, given \(12, 10\) in .*1.png after \(12, 12\)"):
        load(f"imagefolder:{root}", 4)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_large_image_is_named(torchvision, tmp_path, workers):
    root = write_images(tmp_path, (120, 100))
    (root / "train" / "dog" / "2.png").write_bytes(b"no image")
    with pytest.raises(
        ValueError, match=r"^cannot read the image .*train/dog/2.png: replace or remove it .*$"
    ) as given:
        list(load(f"imagefolder:{root}", 4, workers=workers).train)
    assert len(str(given.value).splitlines()) == 1


def test_classes_must_agree(torchvision, tmp_path):
    write_images(tmp_path, (12, 12), splits=("train",))
    write_images(tmp_path, (12, 12), classes=("cat", "cow"), splits=("test",))
    with pytest.raises(ValueError, match=r"must have the same classes, given \['cat', 'dog'\] and \['cat', 'cow'\]"):
        load(f"imagefolder:{tmp_path}", 4)


def test_cifar10(torchvision, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no CIFAR-10 at .* fetch it with --download"):
        load(f"cifar10:{tmp_path}", 10)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    batch = {
        "data": np.arange(20 * 3072, dtype=np.uint32).astype(np.uint8).reshape(20, 3072),
        "labels": [*range(10)] * 2,
    }
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *a: True)
    source = load(f"cifar10:{tmp_path}", 50)
    images, _ = next(iter(source.train))
    assert images.shape == (50, 3, 32, 32) and source.num_classes == 10 and len(source.train) == 2
    shown = next(iter(source.test))[0] * source.test.std + source.test.mean
    torch.testing.assert_close(shown[0].flatten(), torch.from_numpy(batch["data"][0]) / 255)


def test_where_torchvision_does_not_import_a_sentence_says_so(monkeypatch):
    real = _torchvision.importlib.import_module

    def broken(name):
        if name.startswith("torchvision"):
            raise RuntimeError("operator torchvision::nms does not exist")
        return real(name)

    monkeypatch.setattr(_torchvision.importlib, "import_module", broken)
    message = r"data 'imagefolder:ROOT' needs torchvision, which does not import here \(operator .*\)\. Install the"
    with pytest.raises(ImportError, match=message):
        load("imagefolder:x", 4)
    with pytest.raises(ImportError, match="the model 'resnet18' needs torchvision"):
        models.create("resnet18", 10)
    assert len(load("digits", 10).train) and models.create("resnet20", 10)
