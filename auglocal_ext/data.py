"""Data sources of the command line: digits, cifar10:ROOT, imagefolder:ROOT, fake:N.

Each gives a training and a test loader of (images, labels), float32 images normalised by the training set's
own mean and deviation. Small images are held in memory as bytes and augmented a batch at a time; large ones
are read by torchvision's ImageFolder and a DataLoader.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from ._torchvision import import_torchvision

__all__ = ["Data", "InMemoryLoader", "image_folders", "large_images", "load"]

SMALL = 96  # pixels along a side up to which images are held in memory
LARGE_SIDE = 224  # what larger ones are cropped to


@dataclass(frozen=True)
class Data:
    """train, test: iterables of (images, labels); the model to train must have num_classes outputs; description: what
    a use of the trained model must know, mean and std of its images (scaled to 0..1) and the names of its classes."""

    train: Iterable
    test: Iterable
    num_classes: int
    description: dict


class InMemoryLoader:
    """Batches from images held as bytes; with `augment`, shuffled, cropped after padding, and flipped.

    Args:
        images: (N, C, H, W), uint8.
        labels: (N,), int64.
        mean, std: (C,), of images scaled to 0..1.
        augment: for training. `pad` pixels are reflected around an image before it is cropped to its size at
            random; `flip` mirrors half of the images.
    """

    def __init__(self, images, labels, batch_size, mean, std, *, augment, pad=0, flip=False):
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.mean, self.std = (values.view(1, -1, 1, 1) for values in (mean, std))
        self.augment, self.pad, self.flip = augment, pad, flip

    def __len__(self):
        return -(-len(self.images) // self.batch_size)

    def __iter__(self):
        order = torch.randperm(len(self.images)) if self.augment else torch.arange(len(self.images))
        for chosen in order.split(self.batch_size):
            images = (self.images[chosen].float() / 255 - self.mean) / self.std
            yield self._augmented(images) if self.augment else images, self.labels[chosen]

    def _augmented(self, images):
        n, channels, height, width = images.shape
        if self.pad:
            padded = F.pad(images, [self.pad] * 4, mode="reflect")
            top, left = torch.randint(2 * self.pad + 1, (2, n, 1))
            rows = (top + torch.arange(height)).view(n, 1, height, 1)
            columns = (left + torch.arange(width)).view(n, 1, 1, width)
            images = padded[torch.arange(n).view(n, 1, 1, 1), torch.arange(channels).view(1, -1, 1, 1), rows, columns]
        if self.flip:
            mirrored = torch.rand(n) < 0.5
            images[mirrored] = images[mirrored].flip(3)
        return images


class UnreadableImage(ValueError):
    """Names the file. From a DataLoader's worker it comes with the worker's traceback, whose last line is ours."""

    def __init__(self, message):
        super().__init__(message.strip().splitlines()[-1].removeprefix(f"{__name__}.{type(self).__name__}: "))


def load(source, batch_size, *, workers=0, download=False, progress=False):
    """The data a source names.

    Args:
        source: "digits" (scikit-learn's 1,797 8x8 digits, embedded), "cifar10:ROOT" (torchvision's CIFAR10),
            "imagefolder:ROOT" (ROOT/train and ROOT/test or ROOT/val, a folder per class), or "fake:N" (N random
            32x32 images of 10 classes that can be told apart).
        workers: DataLoader processes, for large images.
        download: fetch CIFAR-10 if it is not at ROOT.
        progress: a progress bar while small images are read from their files.

    Raises:
        ValueError, FileNotFoundError, ImportError: with what was given, what is expected and what to do.
    """
    kind, _, where = source.partition(":")
    if kind == "digits" and not where:
        return _digits(batch_size)
    if kind == "cifar10" and where:
        return _cifar10(Path(where), batch_size, download)
    if kind == "imagefolder" and where:
        return _image_folder(Path(where), batch_size, workers, progress)
    if kind == "fake" and where.isdecimal() and int(where) >= 20:
        return _fake(int(where), batch_size)
    raise ValueError(
        f"data must be 'digits', 'cifar10:ROOT', 'imagefolder:ROOT' or 'fake:N' (N at least 20), given {source!r}"
    )


def _in_memory(train, test, batch_size, classes, pad, flip):
    """Data from (images uint8, labels) pairs."""
    channels = train[0].transpose(0, 1).flatten(1)  # one at a time: as float all would take four times the memory
    std, mean = (torch.tensor(v) / 255 for v in zip(*(torch.std_mean(c.float()) for c in channels), strict=True))
    std = std.clamp_min(1e-3)
    return Data(
        InMemoryLoader(*train, batch_size, mean, std, augment=True, pad=pad, flip=flip),
        InMemoryLoader(*test, batch_size, mean, std, augment=False),
        len(classes),
        {"mean": mean.tolist(), "std": std.tolist(), "image_size": list(train[0].shape[2:]), "classes": classes},
    )


def _digits(batch_size):
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
        [str(digit) for digit in range(10)],
        pad=2,
        flip=False,
    )


def _cifar10(root, batch_size, download):
    datasets = import_torchvision("data 'cifar10:ROOT'").datasets
    parts = []
    for train in (True, False):
        try:
            dataset = datasets.CIFAR10(root, train=train, download=download)
        except OSError as error:
            raise OSError(f"CIFAR-10 cannot be fetched to {root}: {error}; put its folder there by hand") from error
        except RuntimeError as error:
            raise FileNotFoundError(
                f"no CIFAR-10 at {root}: expected {root / 'cifar-10-batches-py'}; fetch it with --download ({error})"
            ) from error
        images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
        parts.append((images, torch.tensor(dataset.targets)))
    return _in_memory(*parts, batch_size, list(dataset.classes), pad=4, flip=True)


def _fake(count, batch_size):
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 256, (10, 3, 4, 4), generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)

    def split(size):
        labels = torch.arange(size) % 10
        noise = torch.randint(-96, 97, (size, 3, 32, 32), generator=generator)
        return (patterns[labels] + noise).clamp(0, 255).to(torch.uint8), labels

    return _in_memory(
        split(count), split(max(20, count // 5)), batch_size, [str(i) for i in range(10)], pad=0, flip=False
    )


def _image_folder(root, batch_size, workers, progress):
    folders = image_folders(root)
    classes = folders[0].classes
    if max(_read(folders[0].samples[0][0]).size) > SMALL:
        return large_images(*folders, batch_size, classes, workers=workers)
    parts = [_decode(folder, progress) for folder in folders]
    return _in_memory(*parts, batch_size, classes, pad=4, flip=True)


def image_folders(root):
    """torchvision's ImageFolders of ROOT/train and of ROOT/test or ROOT/val, which have a folder of images per class;
    they name a file that cannot be read.

    Raises:
        FileNotFoundError, ValueError, ImportError: with what is expected and what to do.
    """
    torchvision, root = import_torchvision("data 'imagefolder:ROOT'"), Path(root)
    train_root, test_root = root / "train", next((root / d for d in ("test", "val") if (root / d).is_dir()), None)
    if not train_root.is_dir() or test_root is None:
        raise FileNotFoundError(f"no image folder at {root}: expected {root}/train and {root}/test (or val)")
    try:
        folders = [torchvision.datasets.ImageFolder(part, loader=_read) for part in (train_root, test_root)]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no images under {root}: expected a folder of images per class ({error})") from error
    if folders[0].classes != folders[1].classes:
        raise ValueError(
            f"{train_root} and {test_root} must have the same classes, given {folders[0].classes} and "
            f"{folders[1].classes}"
        )
    return folders


def _read(path):
    """One image, or an error that names its file."""
    try:
        return import_torchvision("reading images").datasets.folder.default_loader(path)
    except (OSError, SyntaxError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnreadableImage(f"cannot read the image {path}: replace or remove it ({reason})") from error


def _decode(folder, progress):
    to_tensor, images = import_torchvision("reading images").transforms.v2.functional.pil_to_tensor, []
    samples = tqdm(folder.samples, f"reading {folder.root}", unit="image", leave=False, disable=not progress)
    for path, _ in samples:
        images.append(to_tensor(folder.loader(path)))
        if images[-1].shape != images[0].shape:
            raise ValueError(
                f"images up to {SMALL} pixels must all have one size, given {tuple(images[-1].shape[1:])} in {path} "
                f"after {tuple(images[0].shape[1:])}: resize them"
            )
    return torch.stack(images), torch.tensor(folder.targets)


def large_images(train, test, batch_size, classes, *, workers=0):
    """Data of large images, as in torchvision's ImageNet recipes: for training a random part of each resized to 224x224
    and half of them mirrored, for testing the middle 224x224 of the image resized to 256; ImageNet's normalisation.

    Args:
        train, test: datasets of (PIL image, label), for instance `image_folders(ROOT)`.
        classes: their names.
        workers: processes that read and transform.
    """
    v2 = import_torchvision("large images").transforms.v2
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    to_tensor = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean, std),
    ]
    train_transform = v2.Compose([v2.RandomResizedCrop(LARGE_SIDE), v2.RandomHorizontalFlip(), *to_tensor])
    test_transform = v2.Compose([v2.Resize(LARGE_SIDE * 8 // 7), v2.CenterCrop(LARGE_SIDE), *to_tensor])
    options = {"batch_size": batch_size, "num_workers": workers, "persistent_workers": workers > 0}
    options["pin_memory"] = torch.cuda.is_available()
    one_left = len(train) % batch_size == 1  # which BatchNorm cannot train on
    return Data(
        torch.utils.data.DataLoader(_Transformed(train, train_transform), shuffle=True, drop_last=one_left, **options),
        torch.utils.data.DataLoader(_Transformed(test, test_transform), **options),
        len(classes),
        {"mean": mean, "std": std, "image_size": [LARGE_SIDE, LARGE_SIDE], "classes": classes},
    )


class _Transformed(torch.utils.data.Dataset):
    """A dataset of (image, label) with its images transformed."""

    def __init__(self, dataset, transform):
        self.dataset, self.transform = dataset, transform

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, label = self.dataset[index]
        return self.transform(image), label
