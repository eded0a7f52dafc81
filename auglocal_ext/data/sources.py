"""Data sources by name: digits, cifar10:ROOT and others of torchvision's, imagefolder:ROOT, fake:N."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ..common.messages import first_line
from ..common.torchvision import import_torchvision
from .arguments import check_image_size, check_normalisation, check_part, check_share, whole_batch_size
from .data import Data
from .device_loader import DeviceLoader, mean_and_std
from .folders import LARGE_SIDE, image_folders, large_images, read_image
from .images import images_in_memory, resized
from .split import hold_out, hold_out_share

__all__ = ["AUGMENTATIONS", "MOST_FAKE", "SMALL", "load"]


SMALL = 96  # pixels along a side up to which images are held in memory

MOST_FAKE = 100_000  # images of fake:N, which are made in memory

# The paper's, where it has them. It leaves open what SVHN and STL-10 are padded with: reflected here too, as CIFAR-10.
AUGMENTATIONS = {
    "cifar10": {"pad": 4, "flip": True},
    "cifar100": {"pad": 4, "flip": True},
    "mnist": {"pad": 2, "flip": False},
    "fashionmnist": {"pad": 2, "flip": True},
    "svhn": {"pad": 2, "flip": False},
    "stl10": {"pad": 4, "flip": True},
}


def load(
    source: str,
    batch_size: int,
    *,
    device: str | torch.device = "cpu",
    workers: int = 0,
    download: bool = False,
    progress: bool = False,
    augmentation=AUGMENTATIONS["cifar10"],
    image_size: int | None = None,
    val_split: float = 0.0,
    normalisation=None,
    seed: int | None = None,
    part: tuple[int, int] = (0, 1),
) -> Data:
    """The data a source names.

    Args:
        source: "digits" (scikit-learn's 1,797 8x8 digits, embedded), "cifar10:ROOT", "cifar100:ROOT", "svhn:ROOT",
            "stl10:ROOT", "mnist:ROOT" or "fashionmnist:ROOT" (torchvision's; the labelled images, no extra ones; grey
            ones get three channels), "imagefolder:ROOT" (ROOT/train and ROOT/test or ROOT/val, a folder per class), or
            "fake:N" (N random 32x32 images of 10 classes that can be told apart, N from 20 to 100,000). digits, cifar10
            and the like are of small images; those of an imagefolder are small where its first one is at most 96 pixels
            along a side.
        batch_size: images in a batch.
        device: where small images are held and batches made; batches of large ones are on the CPU.
        workers: DataLoader processes, for large images.
        download: fetch torchvision's data if it is not at ROOT.
        progress: a progress bar while small images are read.
        augmentation: of an imagefolder's small images, one of AUGMENTATIONS; the other sources have their own.
        image_size: pixels along a side: small images are resized to it once, large ones cropped to it. None: small
            images stay as they are, large ones are cropped to 224.
        val_split: the share of the training images that is held out as `Data.val`, of each class its share where there
            are enough, the same ones each time. Mean and deviation are of the rest.
        normalisation: (mean, std) of images scaled to 0..1, those that a saved model was trained with; None: of the
            training images, of large ones ImageNet's.
        seed, part: of the loaders; see `DeviceLoader`.

    Returns:
        Data, with loaders of images (N, 3, H, W), float32, normalised, and labels (N,), int64.

    Raises:
        ValueError: there is no such source, an argument is out of its range, or an image cannot be read or does not
        fit. FileNotFoundError: nothing is at ROOT. OSError: what is there cannot be read, or cannot be fetched.
        ImportError: torchvision is needed and does not import.
    """
    batch_size, val_split = whole_batch_size(batch_size), check_share(val_split)
    image_size = None if image_size is None else check_image_size(image_size)
    if normalisation is not None:
        normalisation = check_normalisation(normalisation, 3)
    made = {"val_split": val_split, "normalisation": normalisation, "seed": seed, "part": check_part(part)}
    kind, _, where = source.partition(":")
    # By length first: int() refuses thousands of digits.
    if kind == "fake" and where.isdecimal() and len(where) < 20 and 20 <= int(where) <= MOST_FAKE:
        images = _fake(int(where))
    elif kind == "digits" and not where:
        images = _digits()
    elif kind in _DOWNLOADS and where:
        images = _downloaded(kind, Path(where), download, progress, image_size)
    elif kind == "imagefolder" and where:
        train, test = image_folders(Path(where))
        if max(read_image(train.samples[0][0]).size) > SMALL:
            side = LARGE_SIDE if image_size is None else image_size
            return large_images(train, test, batch_size, train.classes, workers=workers, image_size=side, **made)
        classes = train.classes
        train, test = (images_in_memory(part, progress, image_size) for part in (train, test))
        images = _Images(train, test, classes, augmentation)
    else:
        roots = ", ".join(f"'{name}:ROOT'" for name in (*_DOWNLOADS, "imagefolder"))
        raise ValueError(f"data must be 'digits', {roots} or 'fake:N' (N from 20 to {MOST_FAKE:,}), given {source!r}")
    return _in_memory(images, batch_size, device, image_size, **made)


@dataclass(frozen=True)
class _Images:
    """train, test: (images (N, C, H, W) uint8, labels). augmentation: options of a DeviceLoader."""

    train: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]
    classes: list[str]
    augmentation: dict


def _in_memory(given, batch_size, device, image_size, *, val_split, normalisation, seed, part):
    """Data of `_Images`, those not yet of that size resized."""
    (images, labels), *others = ((resized(images, image_size), labels) for images, labels in (given.train, given.test))
    kept, held = hold_out_share(labels, len(labels), val_split)
    if len(held):
        others.append((images[held], labels[held]))
        images, labels = images[kept], labels[kept]
    mean, std = mean_and_std(images) if normalisation is None else map(torch.tensor, normalisation)
    made = {"batch_size": batch_size, "mean": mean, "std": std, "device": device, "seed": seed, "part": part}
    train = DeviceLoader(images, labels, augment=True, **given.augmentation, **made)
    test, *val = (DeviceLoader(*other, augment=False, **made) for other in others)
    description = {"mean": mean.tolist(), "std": std.tolist(), "image_size": list(images.shape[2:])}
    return Data(train, test, len(given.classes), description | {"classes": given.classes}, *val)


def _digits():
    from sklearn.datasets import load_digits

    digits = load_digits()  # values 0..16
    images = (torch.from_numpy(digits.images) * (255 / 16)).round().to(torch.uint8)
    images = images[:, None].expand(-1, 3, -1, -1).repeat_interleave(2, 2).repeat_interleave(2, 3)
    labels = torch.from_numpy(digits.target).long()
    train, test = ((images[part], labels[part]) for part in hold_out(labels, len(labels), 360))
    return _Images(train, test, [str(digit) for digit in range(10)], {"pad": 2})


@dataclass(frozen=True)
class _Download:
    """One of torchvision's datasets: its name, its class, what selects its two parts, what lies at its ROOT."""

    name: str
    dataset: str
    parts: tuple[dict, dict]
    files: str


_TRAIN = {"train": True}, {"train": False}
_SPLITS = {"split": "train"}, {"split": "test"}

_DOWNLOADS = {
    "cifar10": _Download("CIFAR-10", "CIFAR10", _TRAIN, "cifar-10-batches-py"),
    "cifar100": _Download("CIFAR-100", "CIFAR100", _TRAIN, "cifar-100-python"),
    "svhn": _Download("SVHN", "SVHN", _SPLITS, "{train,test}_32x32.mat"),
    "stl10": _Download("STL-10", "STL10", _SPLITS, "stl10_binary"),
    "mnist": _Download("MNIST", "MNIST", _TRAIN, "MNIST/raw"),
    "fashionmnist": _Download("Fashion-MNIST", "FashionMNIST", _TRAIN, "FashionMNIST/raw"),
}


def _downloaded(kind, root, download, progress, image_size):
    known = _DOWNLOADS[kind]
    make, parts = getattr(import_torchvision(f"data '{kind}:ROOT'").datasets, known.dataset), []
    for part in known.parts:
        try:
            dataset = make(root, download=download, **part)
        except OSError as error:
            raise OSError(
                f"{known.name} cannot be read at {root}, or fetched to it: {error}; put {known.files} there by hand"
            ) from error
        except RuntimeError as error:
            raise FileNotFoundError(
                f"no {known.name} at {root}: expected {root / known.files}; fetch it with --download "
                f"({first_line(error)})"
            ) from error
        images, labels = images_in_memory(dataset, progress, image_size)
        parts.append((images.expand(-1, 3, -1, -1), labels))
    classes = getattr(dataset, "classes", map(str, range(10)))  # SVHN's are the digits
    return _Images(*parts, list(classes), AUGMENTATIONS[kind])


def _fake(count):
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 256, (10, 3, 4, 4), generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)

    def split(size):
        labels = torch.arange(size) % 10
        noise = torch.randint(-96, 97, (size, 3, 32, 32), generator=generator)
        return (patterns[labels] + noise).clamp(0, 255).to(torch.uint8), labels

    return _Images(split(count), split(max(20, count // 5)), [str(i) for i in range(10)], {})
