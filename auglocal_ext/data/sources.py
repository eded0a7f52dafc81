"""Data sources by name: digits, cifar10:ROOT, svhn:ROOT, stl10:ROOT, imagefolder:ROOT, fake:N."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ..common.torchvision import import_torchvision
from .data import Data
from .device_loader import DeviceLoader, mean_and_std, whole_batch_size
from .folders import image_folders, large_images, read_image
from .images import images_in_memory

__all__ = ["AUGMENTATIONS", "MOST_FAKE", "SMALL", "load"]


SMALL = 96  # pixels along a side up to which images are held in memory

MOST_FAKE = 100_000  # images of fake:N, which are made in memory

# The paper's. It leaves open what SVHN and STL-10 are padded with: reflected here too, as for CIFAR-10.
AUGMENTATIONS = {
    "cifar10": {"pad": 4, "flip": True},
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
) -> Data:
    """The data a source names.

    Args:
        source: "digits" (scikit-learn's 1,797 8x8 digits, embedded), "cifar10:ROOT", "svhn:ROOT" or "stl10:ROOT"
            (torchvision's CIFAR10, SVHN and STL10; the labelled images, no extra ones), "imagefolder:ROOT" (ROOT/train
            and ROOT/test or ROOT/val, a folder per class), or "fake:N" (N random 32x32 images of 10 classes that can be
            told apart).
        device: where small images are held and batches made; batches of large ones are on the CPU.
        workers: DataLoader processes, for large images.
        download: fetch CIFAR-10, SVHN or STL-10 if it is not at ROOT.
        progress: a progress bar while small images are read.
        augmentation: of an imagefolder's small images, one of AUGMENTATIONS; the other sources have their own.

    Raises:
        ValueError, FileNotFoundError, ImportError: with what was given, what is expected and what to do.
    """
    batch_size = whole_batch_size(batch_size)
    kind, _, where = source.partition(":")
    if kind == "digits" and not where:
        return _digits(batch_size, device)
    if kind in _DOWNLOADS and where:
        return _downloaded(kind, Path(where), batch_size, device, download, progress)
    if kind == "imagefolder" and where:
        return _image_folder(Path(where), batch_size, device, workers, progress, augmentation)
    # By length first: int() refuses thousands of digits.
    if kind == "fake" and where.isdecimal() and len(where) < 20 and 20 <= int(where) <= MOST_FAKE:
        return _fake(int(where), batch_size, device)
    raise ValueError(
        f"data must be 'digits', 'cifar10:ROOT', 'svhn:ROOT', 'stl10:ROOT', 'imagefolder:ROOT' or 'fake:N' (N from 20 "
        f"to {MOST_FAKE:,}), given {source!r}"
    )


def _in_memory(train, test, batch_size, device, classes, pad=0, flip=False):
    """Data from (images uint8, labels) pairs."""
    mean, std = mean_and_std(train[0])
    return Data(
        DeviceLoader(*train, batch_size, mean, std, augment=True, pad=pad, flip=flip, device=device),
        DeviceLoader(*test, batch_size, mean, std, augment=False, device=device),
        len(classes),
        {"mean": mean.tolist(), "std": std.tolist(), "image_size": list(train[0].shape[2:]), "classes": classes},
    )


def _digits(batch_size, device):
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()  # values 0..16
    images = (torch.from_numpy(digits.images) * (255 / 16)).round().to(torch.uint8)
    images = images[:, None].expand(-1, 3, -1, -1).repeat_interleave(2, 2).repeat_interleave(2, 3)
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(torch.arange(len(labels)).numpy(), test_size=360, stratify=labels, random_state=0)
    return _in_memory(
        (images[train], labels[train]),
        (images[test], labels[test]),
        batch_size,
        device,
        [str(digit) for digit in range(10)],
        pad=2,
    )


@dataclass(frozen=True)
class _Download:
    """One of torchvision's datasets: its name, its class, what selects its two parts, what lies at its ROOT."""

    name: str
    dataset: str
    parts: tuple[dict, dict]
    files: str


_SPLITS = {"split": "train"}, {"split": "test"}

_DOWNLOADS = {
    "cifar10": _Download("CIFAR-10", "CIFAR10", ({"train": True}, {"train": False}), "cifar-10-batches-py"),
    "svhn": _Download("SVHN", "SVHN", _SPLITS, "{train,test}_32x32.mat"),
    "stl10": _Download("STL-10", "STL10", _SPLITS, "stl10_binary"),
}


def _downloaded(kind, root, batch_size, device, download, progress):
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
                f"no {known.name} at {root}: expected {root / known.files}; fetch it with --download ({error})"
            ) from error
        parts.append(images_in_memory(dataset, progress))
    classes = getattr(dataset, "classes", map(str, range(10)))  # SVHN's are the digits
    return _in_memory(*parts, batch_size, device, list(classes), **AUGMENTATIONS[kind])


def _fake(count, batch_size, device):
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 256, (10, 3, 4, 4), generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)

    def split(size):
        labels = torch.arange(size) % 10
        noise = torch.randint(-96, 97, (size, 3, 32, 32), generator=generator)
        return (patterns[labels] + noise).clamp(0, 255).to(torch.uint8), labels

    return _in_memory(split(count), split(max(20, count // 5)), batch_size, device, [str(i) for i in range(10)])


def _image_folder(root, batch_size, device, workers, progress, augmentation):
    folders = image_folders(root)
    classes = folders[0].classes
    if max(read_image(folders[0].samples[0][0]).size) > SMALL:
        return large_images(*folders, batch_size, classes, workers=workers)
    parts = [images_in_memory(folder, progress) for folder in folders]
    return _in_memory(*parts, batch_size, device, classes, **augmentation)
