"""Data sources: what they give, how they augment, and what is wrong with a folder."""

import importlib
import pickle

import numpy as np
import pytest
import torch

from auglocal_ext import models
from auglocal_ext.data.device_loader import DeviceLoader, crop_and_flip, mean_and_std
from auglocal_ext.data.folders import large_images
from auglocal_ext.data.images import images_in_memory
from auglocal_ext.data.sources import AUGMENTATIONS, load


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
    return DeviceLoader(
        images, torch.arange(4), 4, torch.zeros(1), torch.full((1,), 1 / 255), augment=augment, **options
    )


def test_without_augmentation_images_come_as_they_are():
    images, labels = next(iter(loader(False)))
    torch.testing.assert_close(images.flatten(), torch.arange(144.0))
    assert labels.tolist() == [0, 1, 2, 3]


def test_crops_and_flips_are_of_the_reflected_image():
    """Each augmented image is one of the 2 x 9 crops of its padded original."""
    seen, made = set(), loader(True, pad=1, flip=True, seed=0)
    for _ in range(30):
        ((images, labels),) = made
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


def test_crops_are_slices_of_the_padded_image():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50, 3, 7, 9), dtype=torch.uint8, generator=generator)
    top, left = torch.randint(5, (2, 50), generator=generator)
    mirrored = torch.rand(50, generator=generator) < 0.5
    cropped = crop_and_flip(images, top, left, mirrored, pad=2)
    padded = torch.nn.functional.pad(images.float(), [2] * 4, mode="reflect").to(torch.uint8)
    for i, (y, x) in enumerate(zip(top.tolist(), left.tolist(), strict=True)):
        assert torch.equal(cropped[i], _maybe_flipped(padded[i, :, y : y + 7, x : x + 9], mirrored[i]))


def test_normalised_values_and_layout():
    images = torch.tensor([[0, 255], [51, 102]], dtype=torch.uint8).view(2, 2, 1, 1).expand(2, 2, 3, 3)
    mean, std = torch.tensor([0.1, 0.5]), torch.tensor([0.2, 0.25])
    made = DeviceLoader(images, torch.tensor([1, 0], dtype=torch.int32), 2, mean, std, augment=False)
    batch, labels = next(iter(made))
    torch.testing.assert_close(batch[:, :, 0, 0], torch.tensor([[-0.5, 2.0], [0.5, -0.4]]))
    assert batch.is_contiguous(memory_format=torch.channels_last) and labels.dtype == torch.int64
    assert torch.equal(made.mean, mean) and torch.equal(made.std, std)


def test_mean_and_std_are_exact():
    images = torch.randint(0, 256, (40, 3, 5, 5), dtype=torch.uint8)
    std, mean = torch.std_mean(images.double() / 255, (0, 2, 3), correction=0)
    given = mean_and_std(images)
    torch.testing.assert_close(given, (mean.float(), std.float()), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": torch.zeros(4, 1, 6, 6)},
            r"images must be \(N, C, H, W\) bytes, given \(4, 1, 6, 6\) of torch.float32",
        ),
        ({"labels": torch.zeros(3)}, r"labels must be \(4,\), one per image, given shape \(3,\)"),
        ({"batch_size": 0}, "batch_size must be at least 1, given 0"),
        ({"pad": 6}, "pad must be from 0 to 5 for these images, given 6"),
        ({"device": "gpu"}, "device 'gpu' cannot be used here"),
    ],
)
def test_what_a_loader_refuses(change, message):
    given = {
        "images": torch.zeros(4, 1, 6, 6, dtype=torch.uint8), "labels": torch.zeros(4), "batch_size": 2,
        "mean": torch.zeros(1), "std": torch.ones(1), "augment": True,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        DeviceLoader(**given | change)


IMAGES = torch.zeros(4, 3, 6, 6, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"labels": torch.tensor([0, 1.7, 2, 3])}, TypeError, "labels must be whole numbers, given torch.float32"),
        ({"labels": torch.ones(4).bfloat16()}, TypeError, "labels must be whole numbers, given torch.bfloat16"),
        ({"labels": torch.ones(4).bool()}, TypeError, "labels must be whole numbers, given torch.bool"),
        ({"labels": torch.arange(4) - 1}, ValueError, "labels must be from 0, given -1"),
        ({"labels": [0, 1, 2, 3]}, TypeError, "labels must be a tensor, given list"),
        ({"images": IMAGES.numpy()}, TypeError, "images must be a tensor, given ndarray"),
        ({"images": IMAGES[:, :, :, :0]}, ValueError, r"at least one pixel, given shape \(4, 3, 6, 0\)"),
        ({"images": IMAGES[:0], "labels": torch.arange(0)}, ValueError, "images must be at least one"),
        ({"std": [1, 0, 1]}, ValueError, r"std must be finite and above 0.*, given \[1.0, 0.0, 1.0\]"),
        ({"std": torch.tensor([1, -0.2, 1])}, ValueError, "std must be finite and above 0"),
        ({"std": [1, np.nan, 1]}, ValueError, "std must be finite and above 0"),
        ({"std": [1, np.inf, 1]}, ValueError, "std must be finite and above 0"),
        ({"std": [1e-60, 1, 1]}, ValueError, "std must be finite and above 0"),  # 0 in float32
        ({"mean": [np.nan, 0, 0]}, ValueError, "mean must be finite"),
        ({"mean": [0, 0, -np.inf]}, ValueError, "mean must be finite"),
        ({"mean": [0.5]}, ValueError, r"mean must be of shape \(3,\), one number per channel, given shape \(1,\)"),
        ({"mean": 0.5}, ValueError, r"mean must be of shape \(3,\)"),
        ({"std": torch.ones(1, 3, 1, 1)}, ValueError, r"std must be of shape \(3,\)"),
        ({"std": None}, ValueError, "std must be 3 numbers, one per channel, given None"),
        ({"mean": ["a", "b", "c"]}, ValueError, "mean must be 3 numbers"),
        ({"batch_size": 2.5}, ValueError, "batch_size must be a whole number, given 2.5"),
        ({"batch_size": True}, ValueError, "batch_size must be a whole number, given True"),
        ({"pad": 1.0}, ValueError, "pad must be from 0 to 5 for these images, given 1.0"),
        ({"pad": -1}, ValueError, "pad must be from 0 to 5 for these images, given -1"),
        ({"device": "meta"}, ValueError, "device 'meta' cannot be used here"),
    ],
)
def test_what_would_be_converted_in_silence_is_refused(change, kind, message):
    given = {"images": IMAGES, "labels": torch.arange(4), "batch_size": 2, "mean": [0, 0, 0], "std": [1, 1, 1]}
    DeviceLoader(**given, augment=True)
    with pytest.raises(kind, match=message):
        DeviceLoader(**given | change, augment=True)


def test_numbers_of_numpys_kinds_are_taken():
    labels = torch.arange(4, dtype=torch.uint8)
    made = DeviceLoader(IMAGES, labels, np.int32(3), np.zeros(3), np.ones(3), augment=True, pad=np.int64(1))
    assert [(images.dtype, len(labels)) for images, labels in made] == [(torch.float32, 3), (torch.float32, 1)]


@pytest.mark.parametrize("images", [IMAGES.float(), IMAGES[:0], IMAGES[0], IMAGES[:, :, :0]])
def test_what_has_no_mean_and_std(images):
    with pytest.raises(ValueError, match="images must be"):
        mean_and_std(images)


def pil(pixels, mode):
    """A PIL image of that mode with those rows of numbers in it."""
    from PIL import Image

    kinds = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4", "F": "<f4"}
    data = np.array(pixels).astype(kinds[mode])
    return Image.frombytes(mode, data.shape[::-1], data.tobytes())


DEEP = [[0, 128, 129], [257, 32896, 65535]]  # 257 is one step of 8 bits
SCALED = [[0, 0, 1], [1, 128, 255]]


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_deep_grey_is_scaled(torchvision, mode):
    images, _ = images_in_memory([(pil(DEEP, mode), 0), (pil(DEEP, mode), 1)])
    assert images.tolist() == [[SCALED]] * 2


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_files_of_deep_grey_are_scaled(torchvision, tmp_path, suffix):
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        pil(np.tile(DEEP, (3, 2)), "I;16").save(tmp_path / split / "a" / f"0.{suffix}")
    source = load(f"imagefolder:{tmp_path}", 1)
    assert source.train.images.tolist() == [[np.tile(SCALED, (3, 2)).tolist()] * 3]
    grey = pil(np.full((120, 120), 32896), "I;16")  # large images: of a folder, and as they come
    grey.save(tmp_path / "train" / "a" / f"0.{suffix}"), grey.save(tmp_path / "test" / "a" / f"0.{suffix}")
    for source in (load(f"imagefolder:{tmp_path}", 1), large_images([(grey, 0)] * 2, [(grey, 0)] * 2, 2, ["a"])):
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in normalisation(source))
        for part in (source.train, source.test):
            torch.testing.assert_close(next(iter(part))[0][0] * std + mean, torch.full((3, 224, 224), 128 / 255))


@pytest.mark.parametrize(
    ("pixels", "mode", "reason"),
    [
        ([[0.0, 0.5]], "F", "its pixels are floating-point numbers"),
        ([[0, 65536]], "I", "its pixels go from 0 to 65536, expected 0 to 65535 at most"),
        ([[-1, 5]], "I", "its pixels go from -1 to 5"),
    ],
)
def test_pixels_that_have_no_right_conversion_are_refused(torchvision, tmp_path, pixels, mode, reason):
    image = pil(pixels, mode)
    with pytest.raises(ValueError, match=f"cannot read the image image 1: .*{reason}"):
        images_in_memory([(image.convert("L"), 0), (image, 0)])
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        image.save(tmp_path / split / "a" / "0.tiff")
    with pytest.raises(ValueError, match=rf"cannot read the image .*train/a/0.tiff: replace or remove it \({reason}"):
        load(f"imagefolder:{tmp_path}", 1)
    with pytest.raises(ValueError, match=f"cannot read the image image 0: .*{reason}"):
        next(iter(large_images([(image, 0)] * 2, [(image, 0)] * 2, 2, ["a"]).test))


def test_palettes_and_black_and_white(torchvision):
    from PIL import Image

    red_and_blue = Image.new("P", (2, 1))
    red_and_blue.putpalette([255, 0, 0, 0, 0, 255])
    red_and_blue.putpixel((1, 0), 1)
    images, _ = images_in_memory([(red_and_blue, 0)])
    assert images.tolist() == [[[[255, 0]], [[0, 0]], [[0, 255]]]]
    lines = Image.new("1", (2, 1))
    lines.putpixel((1, 0), 1)
    assert images_in_memory([(lines, 0)])[0].tolist() == [[[[0, 255]]]]


@pytest.mark.parametrize("label", [1.7, 1.0, True, np.True_, -1, "1", None, torch.tensor(1.0), [1], 2**63])
def test_labels_that_are_no_class_numbers(torchvision, label):
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="labels must be whole numbers from 0 .*, as image 1 must have one, given "):
        images_in_memory([(image, 0), (image, label)])


def test_labels_of_any_integer_kind(torchvision):
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    _, labels = images_in_memory([(image, label) for label in (np.int64(1), np.uint8(2), torch.tensor(3))])
    assert labels.tolist() == [1, 2, 3]


def test_images_in_memory_of_no_pixel_or_no_image(torchvision):
    with pytest.raises(TypeError, match=r"given \(3, 0, 4\) of torch.uint8 in image 0"):
        images_in_memory([(torch.zeros(3, 0, 4, dtype=torch.uint8), 0)])
    with pytest.raises(TypeError, match="images must be PIL images .* given a ndarray in image 0"):
        images_in_memory([(np.zeros((4, 4, 3), dtype=np.uint8), 0)])


def test_an_image_too_large_to_be_meant_is_named(torchvision, tmp_path, monkeypatch):
    from PIL import Image

    root = write_images(tmp_path, (12, 12))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 71)  # an error from twice as many on
    with pytest.raises(ValueError, match=r"cannot read the image .*train/cat/0.png: replace or remove it \(Image size"):
        load(f"imagefolder:{root}", 4)
    dataset = torchvision.datasets.ImageFolder(root / "train", loader=Image.open)
    with pytest.raises(ValueError, match=r"cannot read the image .*train/cat/0.png"):
        images_in_memory(dataset)


@pytest.mark.parametrize("count", ["100001", "99999999999999999999", "9" * 5000])
def test_too_many_fake_images(count):
    with pytest.raises(ValueError, match=r"'fake:N' \(N from 20 to 100,000\), given 'fake:"):
        load(f"fake:{count}", 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, given 0"),
        ({"batch_size": 1.5}, "batch_size must be a whole number, given 1.5"),
        ({"batch_size": 2, "workers": -1}, "workers must be a whole number of at least 0, given -1"),
        ({"batch_size": 2, "workers": True}, "workers must be a whole number of at least 0, given True"),
    ],
)
def test_what_large_images_refuse(torchvision, options, message):
    with pytest.raises(ValueError, match=message):
        large_images([], [], classes=["a"], **options)


def test_images_in_memory_of_an_image_folder(torchvision, tmp_path):
    from PIL import Image

    dataset = torchvision.datasets.ImageFolder(write_images(tmp_path, (9, 7)) / "train")
    images, labels = images_in_memory(dataset)
    assert images.shape == (6, 3, 7, 9) and labels.tolist() == [0, 0, 0, 1, 1, 1]
    last = np.asarray(Image.open(tmp_path / "train" / "dog" / "2.png"))
    assert torch.equal(images[5], torch.from_numpy(last.copy()).permute(2, 0, 1))
    (tmp_path / "train" / "dog" / "2.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot read the image .*dog/2.png: replace or remove it"):
        images_in_memory(dataset)


def test_images_in_memory_of_any_dataset(torchvision):
    dataset = torchvision.datasets.FakeData(3, (1, 5, 5), transform=lambda image: image.convert("L"))
    images, labels = images_in_memory(dataset)
    assert images.shape == (3, 1, 5, 5) and labels.dtype == torch.int64
    assert torch.equal(images[1, 0], torch.from_numpy(np.array(dataset[1][0]))) and labels[1] == dataset[1][1]
    sizes = [(torch.zeros(3, 4, 4, dtype=torch.uint8), 0), (torch.zeros(3, 4, 5, dtype=torch.uint8), 1)]
    with pytest.raises(ValueError, match=r"must all have one size, given \(4, 5\) in image 1 after \(4, 4\)"):
        images_in_memory(sizes)
    with pytest.raises(
        TypeError, match=r"must be PIL images or \(C, H, W\) bytes, given .* of torch.float32 in image 0"
    ):
        images_in_memory([(torch.zeros(3, 4, 4), 0)])
    with pytest.raises(ValueError, match="the dataset is empty"):
        images_in_memory([])


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
    assert (source.train.pad, source.train.flip) == (4, True)
    digits = load(f"imagefolder:{tmp_path}", 4, augmentation=AUGMENTATIONS["svhn"]).train
    assert (digits.pad, digits.flip) == (2, False)


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
    mean, std = (values.view(3, 1, 1) for values in (source.test.mean, source.test.std))
    shown = next(iter(source.test))[0] * std + mean
    torch.testing.assert_close(shown[0].flatten(), torch.from_numpy(batch["data"][0]) / 255)
    assert (source.train.pad, source.train.flip) == (4, True)


def test_svhn(torchvision, tmp_path, monkeypatch):
    """Files as SVHN has them: (H, W, C, N), and the digit 0 as class 10."""
    scipy_io = pytest.importorskip("scipy.io")
    with pytest.raises(FileNotFoundError, match=r"no SVHN at .*: expected .*32x32.mat; fetch it with --download"):
        load(f"svhn:{tmp_path}", 10)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 20), dtype=np.uint8)
    for part in ("train", "test"):
        content = {"X": pixels, "y": np.array([10, *range(1, 10)] * 2, dtype=np.uint8)[:, None]}
        scipy_io.savemat(tmp_path / f"{part}_32x32.mat", content)
    monkeypatch.setattr(torchvision.datasets.SVHN, "_check_integrity", lambda self: True)
    source = load(f"svhn:{tmp_path}", 20)
    assert torch.equal(source.test.images, torch.from_numpy(pixels.transpose(3, 2, 0, 1).copy()))
    assert source.test.labels.tolist() == [*range(10)] * 2 and source.test.labels.dtype == torch.int64
    assert source.description["classes"] == [str(digit) for digit in range(10)]
    assert (source.train.pad, source.train.flip) == (2, False)


def test_stl10(torchvision, tmp_path, monkeypatch):
    """Files as STL-10 has them: each channel column by column, and classes from 1."""
    with pytest.raises(FileNotFoundError, match=r"no STL-10 at .*: expected .*stl10_binary; fetch it with --download"):
        load(f"stl10:{tmp_path}", 10)
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (10, 3, 96, 96), dtype=np.uint8)
    for part in ("train", "test"):
        pixels.transpose(0, 1, 3, 2).tofile(folder / f"{part}_X.bin")
        np.arange(1, 11, dtype=np.uint8).tofile(folder / f"{part}_y.bin")
    (folder / "class_names.txt").write_text("\n".join(f"class {i}" for i in range(10)))
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    source = load(f"stl10:{tmp_path}", 10)
    assert torch.equal(source.train.images, torch.from_numpy(pixels))
    assert source.train.labels.tolist() == [*range(10)] and source.description["classes"][3] == "class 3"
    assert (source.train.pad, source.train.flip) == (4, True)


def test_where_torchvision_does_not_import_a_sentence_says_so(monkeypatch):
    real = importlib.import_module

    def broken(name):
        if name.startswith("torchvision"):
            raise RuntimeError("operator torchvision::nms does not exist")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", broken)
    message = r"data 'imagefolder:ROOT' needs torchvision, which does not import here \(operator .*\)\. Install the"
    with pytest.raises(ImportError, match=message):
        load("imagefolder:x", 4)
    with pytest.raises(ImportError, match="the model 'resnet18' needs torchvision"):
        models.create("resnet18", 10)
    assert len(load("digits", 10).train) and models.create("resnet20", 10)
