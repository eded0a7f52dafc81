"""What a source is asked for beside its name: the size of images, a part held out, another normalisation, a seed."""

import pickle
import struct

import numpy as np
import pytest
import torch

from auglocal_ext.data import AUGMENTATIONS, images_in_memory, large_images, load
from auglocal_ext.data.split import hold_out, hold_out_share


def test_cifar100(torchvision, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no CIFAR-100 at .*cifar-100-python; fetch it with --download"):
        load(f"cifar100:{tmp_path}", 10)
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (200, 3072), dtype=np.uint8)
    for name in ("train", "test"):
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "fine_labels": [*range(100)] * 2}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {i}" for i in range(100)]}))
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *a: True)
    source = load(f"cifar100:{tmp_path}", 50)
    assert source.num_classes == 100 and source.description["classes"][7] == "class 7"
    assert torch.equal(source.test.images.flatten(1), torch.from_numpy(pixels))
    assert source.test.labels.tolist() == [*range(100)] * 2
    assert (source.train.pad, source.train.flip) == (4, True) and source.val is None


@pytest.mark.parametrize(
    ("name", "folder", "title", "flip"),
    [("mnist", "MNIST", "MNIST", False), ("fashionmnist", "FashionMNIST", "Fashion-MNIST", True)],
)
def test_grey_images_get_three_channels(torchvision, tmp_path, name, folder, title, flip):
    with pytest.raises(FileNotFoundError, match=f"no {title} at .*{folder}/raw; fetch it with --download"):
        load(f"{name}:{tmp_path}", 10)
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, 20, 28, 28) + pixels.tobytes())
        labels = np.array([*range(10)] * 2, dtype=np.uint8)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 20) + labels.tobytes())
    source = load(f"{name}:{tmp_path}", 10)
    assert torch.equal(source.test.images, torch.from_numpy(pixels)[:, None].expand(-1, 3, -1, -1))
    assert source.test.labels.tolist() == [*range(10)] * 2 and len(source.description["classes"]) == 10
    assert (source.train.pad, source.train.flip) == (2, flip)
    assert len(set(source.description["mean"])) == 1 and next(iter(source.train))[0].shape == (10, 3, 28, 28)
    larger = load(f"{name}:{tmp_path}", 10, image_size=32)
    assert larger.train.images.shape == (20, 3, 32, 32) and larger.description["image_size"] == [32, 32]


def pictures(sizes, label=lambda index: index % 2):
    from PIL import Image

    generator = np.random.default_rng(0)
    made = [Image.fromarray(generator.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    return [(image, label(index)) for index, image in enumerate(made)]


@pytest.mark.parametrize("size", [8, 17, 40])
def test_small_images_are_resized_once_as_pillow_does(torchvision, size):
    from PIL import Image

    given = pictures([(20, 24), (30, 16)])  # of different sizes, which without it are refused
    images, _ = images_in_memory(given, image_size=size)
    assert images.shape == (2, 3, size, size) and images.dtype == torch.uint8
    for ours, (image, _) in zip(images, given, strict=True):
        theirs = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
        assert (ours.permute(1, 2, 0).numpy().astype(int) - theirs).__abs__().max() <= 1


@pytest.mark.parametrize("name", ["digits", "fake:20"])
def test_embedded_images_are_resized_too(name):
    source = load(name, 10, image_size=24)
    for part in (source.train, source.test):
        assert part.images.shape[1:] == (3, 24, 24)
    assert source.description["image_size"] == [24, 24]
    before = load(name, 10)
    assert abs(source.train.images.float().mean() - before.train.images.float().mean()) < 1


def folder_of(tmp_path, size, per_class=4):
    for split in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for index, (image, _) in enumerate(pictures([size] * per_class)):
                image.point(lambda value, label=label: value // 2 + 100 * label).save(folder / f"{index}.png")
    return f"imagefolder:{tmp_path}"


@pytest.mark.parametrize("size", [(20, 20), (120, 100)])
def test_a_part_of_an_image_folder_is_held_out(torchvision, tmp_path, size):
    """Small and large images: of each class its share, with the test's transforms."""
    source = load(folder_of(tmp_path, size), 4, val_split=0.25, image_size=32)
    assert [sum(len(labels) for _, labels in part) for part in (source.train, source.test, source.val)] == [6, 8, 2]
    ((images, labels),) = source.val
    assert images.shape == (2, 3, 32, 32) and labels.tolist() == [0, 1]
    assert sorted(torch.cat([labels for _, labels in source.train]).tolist()) == [0, 0, 0, 1, 1, 1]
    again = list(source.val)
    assert torch.equal(images, again[0][0])
    test = torch.cat([images for images, _ in source.test])  # the folders have the same images
    assert all(any(torch.equal(image, other) for other in test) for image in images)
    assert source.description["image_size"] == [32, 32]


def test_statistics_are_of_what_is_trained_on():
    whole, source = load("fake:50", 10), load("fake:50", 10, val_split=0.2)
    assert (len(source.train.images), len(source.val.images)) == (40, 10)
    images = torch.cat([images for images, _ in source.train])
    assert images.mean((0, 2, 3)).abs().max() < 1e-4 and (images.std((0, 2, 3)) - 1).abs().max() < 1e-3
    assert source.description["mean"] != whole.description["mean"]
    for part in (source.val, source.test):
        assert torch.equal(part.mean, source.train.mean) and not part.augment
    both = torch.cat([source.train.images, source.val.images])
    assert {image.numpy().tobytes() for image in both} == {image.numpy().tobytes() for image in whole.train.images}
    assert source.val.labels.bincount().tolist() == [1] * 10


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_each_class_gives_its_share(share):
    labels = torch.tensor([0] * 40 + [1] * 20 + [3] * 60)
    kept, held = hold_out_share(labels, 120, share)
    assert labels[held].bincount().tolist() == [40 * share, 20 * share, 0, 60 * share]
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(120))
    assert torch.equal(held, hold_out_share(labels, 120, share)[1]) and held.tolist() == sorted(held.tolist())


@pytest.mark.parametrize("labels", [None, [0, 0, 0, 0, 1], [0, 1, 2, 0, 1]])
def test_where_a_class_has_too_few_they_are_drawn_from_all(labels):
    kept, held = hold_out(labels, 5, 2)
    assert len(held) == 2 and sorted([*kept.tolist(), *held.tolist()]) == list(range(5))


def test_nothing_is_held_out_of_itself():
    kept, held = hold_out_share(torch.arange(4), 4, 0.0)
    assert kept.tolist() == [0, 1, 2, 3] and len(held) == 0
    assert len(hold_out_share(torch.arange(4), 4, 0.01)[1]) == 1


def test_large_images_that_do_not_tell_their_labels(torchvision):
    """And those that are refused are named by their place in the whole."""
    from PIL import Image

    given = pictures([(40, 30)] * 6, label=lambda index: index)
    source = large_images(given, given[:1], 2, list("abcdef"), val_split=0.5, image_size=16)
    found = [torch.cat([labels for _, labels in part]).tolist() for part in (source.train, source.val)]
    assert [len(labels) for labels in found] == [2, 3]  # of three one batch would have one image
    assert len({*found[0], *found[1]}) == 5
    held = found[1][1]
    given[held] = Image.new("F", (40, 30)), held
    with pytest.raises(ValueError, match=f"cannot read the image image {held}: "):
        list(source.val)


def test_a_saved_models_normalisation(torchvision):
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    source = load("fake:40", 10, normalisation=(mean, std))
    large = large_images(pictures([(40, 40)] * 2), pictures([(40, 40)]), 2, ["a", "b"], normalisation=(mean, std))
    assert large.description["mean"] == mean and large.description["std"] == std
    assert source.description["mean"] == torch.tensor(mean).tolist()
    shown = torch.tensor(mean).view(3, 1, 1) + torch.tensor(std).view(3, 1, 1) * next(iter(source.test))[0]
    torch.testing.assert_close(shown, source.test.images[:10] / 255)
    image = next(iter(large.test))[0][0] * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    assert image.min() >= 0 and image.max() <= 1.000001


def test_the_tests_part_is_in_proportion(torchvision):
    """Of a picture the middle 7/8, whatever the size: its border of an eighth is not seen."""
    from PIL import Image

    image = Image.new("RGB", (160, 160))
    image.paste((255, 255, 255), (20, 20, 140, 140))
    for size in (28, 56):
        source = large_images(
            [(image, 0)] * 2, [(image, 0)], 2, ["a"], image_size=size, normalisation=([0] * 3, [1] * 3)
        )
        ((shown, _),) = source.test
        black = size * 8 // 7 // 8 - (size * 8 // 7 - size) // 2  # what is left of the border, in pixels
        assert shown.shape == (1, 3, size, size) and shown[0, 0, size // 2, black + 2 : -black - 2].min() > 0.99
        assert shown[0, 0, size // 2, 0] < 0.5


def test_a_seed_decides():
    first, second, other = (list(load("fake:20", 10, seed=seed).train) for seed in (3, 3, 4))
    assert torch.equal(first[0][0], second[0][0]) and not torch.equal(first[0][0], other[0][0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 7}, "image_size must be a whole number of pixels from 8 to 4096, given 7"),
        ({"image_size": 32.0}, "image_size must be a whole number of pixels from 8 to 4096, given 32.0"),
        ({"image_size": (32, 32)}, r"image_size must be a whole number .*, given \(32, 32\)"),
        (
            {"val_split": 1},
            "val_split must be the share of the training images to hold out, from 0 to below 1, given 1",
        ),
        ({"val_split": -0.1}, "val_split must be .*, given -0.1"),
        ({"val_split": "0.1"}, "val_split must be .*, given '0.1'"),
        ({"val_split": float("nan")}, "val_split must be .*, given nan"),
        ({"val_split": True}, "val_split must be .*, given True"),
        ({"val_split": 0.97}, "val_split 0.97 leaves 1 of 20 training images, expected at least 2: give less"),
        ({"normalisation": 0.5}, r"normalisation must be \(mean, std\), 3 numbers each, .* given 0.5"),
        ({"normalisation": ([0.5] * 2, [1] * 3)}, r"mean must be of shape \(3,\)"),
        ({"normalisation": ([0.5] * 3, [0] * 3)}, "std must be finite and above 0"),
        ({"seed": 1.5}, "seed must be a whole number"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load("fake:20", 10, **options)


def test_every_source_has_an_augmentation():
    assert AUGMENTATIONS["cifar100"] == AUGMENTATIONS["cifar10"]
    with pytest.raises(
        ValueError, match="'cifar100:ROOT', 'svhn:ROOT', 'stl10:ROOT', 'mnist:ROOT', 'fashionmnist:ROOT'"
    ):
        load("emnist:x", 10)
