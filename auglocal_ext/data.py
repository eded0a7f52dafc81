"""Data sources by name, and a loader as fast as the device: digits, cifar10:ROOT, svhn:ROOT, stl10:ROOT,
imagefolder:ROOT, fake:N.

Each gives a training and a test loader of (images, labels), float32 images normalised by the training set's
own mean and deviation. Small images are held as bytes on the device, and shuffled, augmented and normalised there a
batch at a time; large ones are read by torchvision's ImageFolder and a DataLoader.

With any dataset of small images:

    images, labels = images_in_memory(torchvision.datasets.CIFAR100("data"))
    loader = DeviceLoader(images, labels, 128, *mean_and_std(images), augment=True, pad=4, flip=True, device="cuda")
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from ._checks import normalisation, whole_number
from ._device import usable_device
from ._torchvision import import_torchvision

__all__ = [
    "AUGMENTATIONS",
    "Data",
    "DeviceLoader",
    "crop_and_flip",
    "image_folders",
    "images_in_memory",
    "large_images",
    "load",
    "mean_and_std",
]

SMALL = 96  # pixels along a side up to which images are held in memory
LARGE_SIDE = 224  # what larger ones are cropped to
MOST_FAKE = 100_000  # images of fake:N, which are made in memory

# The paper's. It leaves open what SVHN and STL-10 are padded with: reflected here too, as for CIFAR-10.
AUGMENTATIONS = {
    "cifar10": {"pad": 4, "flip": True},
    "svhn": {"pad": 2, "flip": False},
    "stl10": {"pad": 4, "flip": True},
}


@dataclass(frozen=True)
class Data:
    """train, test: iterables of (images, labels); the model to train must have num_classes outputs; description: what
    a use of the trained model must know, mean and std of its images (scaled to 0..1) and the names of its classes."""

    train: Iterable
    test: Iterable
    num_classes: int
    description: dict


class DeviceLoader:
    """Batches from images held as bytes on a device, and made there; nothing in its loop waits for the device.

    An iterable of (images, labels): images (N, C, H, W), float32, normalised, contiguous, on CUDA channels_last; labels
    (N,), int64. With `augment` shuffled, cropped after padding, and flipped. All random numbers come from torch's
    default generator of the device (the CPU's, or that GPU's), which torch.manual_seed and train's `seed` set.

    Args:
        images: (N, C, H, W), uint8.
        labels: (N,), integers from 0.
        batch_size: images in a batch; the last one of an epoch has what is left.
        mean, std: (C,), of images scaled to 0..1; finite, std above 0.
        augment: for training. `pad` pixels are reflected around an image before it is cropped to its size at
            random; `flip` mirrors half of the images.
        device: where the images lie, and the batches are made.

    Raises:
        ValueError, TypeError: naming the argument that is none of this.
    """

    def __init__(self, images, labels, batch_size, mean, std, *, augment, pad=0, flip=False, device="cpu"):
        _check_bytes(images)
        if not isinstance(labels, torch.Tensor):
            raise TypeError(f"labels must be a tensor, given {type(labels).__name__}")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"labels must be ({len(images)},), one per image, given shape {tuple(labels.shape)}")
        batch_size = _batch_size(batch_size)
        most = min(images.shape[2:]) - 1  # an image has no more than that to reflect
        pad = whole_number(pad, f"pad must be from 0 to {most} for these images", 0, most)
        device = usable_device(device)
        if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
            raise TypeError(f"labels must be whole numbers, given {labels.dtype}: convert them with .long()")
        if labels.amin() < 0:
            raise ValueError(f"labels must be from 0, given {labels.amin().item()}: remap or leave out such images")
        self.mean, self.std = normalisation(mean, std, images.shape[1], device)
        self.images, self.labels = images.to(device).contiguous(), labels.to(device, torch.int64)
        self.batch_size, self.augment, self.pad, self.flip = batch_size, augment, pad, flip
        self._layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format

    def __len__(self):
        return -(-len(self.images) // self.batch_size)

    def __iter__(self):
        order = (torch.randperm if self.augment else torch.arange)(len(self.images), device=self.images.device)
        for chosen in order.split(self.batch_size):
            yield self._batch(self.images[chosen]), self.labels[chosen]  # no name here keeps a batch past its step

    def _batch(self, images):
        if self.augment and (self.pad or self.flip):
            n, device = len(images), images.device
            top, left = torch.randint(2 * self.pad + 1, (2, n), device=device)
            mirrored = torch.rand(n, device=device) < (0.5 if self.flip else 0)
            images = crop_and_flip(images, top, left, mirrored, self.pad)
        images = images.to(torch.float32, memory_format=self._layout)
        mean, std = (255 * values.view(-1, 1, 1) for values in (self.mean, self.std))
        return images.sub_(mean).div_(std)


def _check_bytes(images):
    if not isinstance(images, torch.Tensor):
        raise TypeError(f"images must be a tensor, given {type(images).__name__}: see images_in_memory")
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise ValueError(f"images must be (N, C, H, W) bytes, given {tuple(images.shape)} of {images.dtype}")
    if not images.numel():
        raise ValueError(f"images must be at least one, and of at least one pixel, given shape {tuple(images.shape)}")


def _batch_size(value):
    return whole_number(whole_number(value, "batch_size must be a whole number"), "batch_size must be at least 1", 1)


def crop_and_flip(images, top, left, mirrored, pad):
    """Crops of the images' own size out of the images with `pad` pixels reflected around them.

    Args:
        images: (N, C, H, W), of any dtype; pad is less than H and W.
        top, left: (N,), int64, from 0 to 2 * pad: where the crop begins in the padded image.
        mirrored: (N,), bool: which crops are flipped left to right.
    """
    channels, height, width = images.shape[1:]
    rows = torch.arange(height, device=images.device) + top[:, None] - pad
    columns = torch.arange(width, device=images.device)
    columns = torch.where(mirrored[:, None], width - 1 - columns, columns) + left[:, None] - pad
    # Pixels are picked where the padded image would have them from: no padded image is made.
    picked = _reflected(rows, height)[:, :, None] * width + _reflected(columns, width)[:, None, :]
    return images.flatten(2).gather(2, picked.flatten(1)[:, None].expand(-1, channels, -1)).view_as(images)


def _reflected(index, size):
    """Positions in a row of `size`, those beyond its ends reflected by them."""
    return size - 1 - (size - 1 - index.abs()).abs()


def mean_and_std(images):
    """(C,) and (C,): mean and deviation of each channel of images (N, C, H, W), uint8, scaled to 0..1."""
    _check_bytes(images)
    values = torch.arange(256, dtype=torch.float64) / 255
    # By counting, a channel at a time: exact, and no image becomes float.
    shares = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    shares /= shares.sum(1, keepdim=True)
    mean = shares @ values
    std = (shares * (values - mean[:, None]) ** 2).sum(1).sqrt()
    return mean.float(), std.clamp_min(1e-3).float()


def images_in_memory(dataset, progress=False):
    """Reads a dataset once, for a DeviceLoader.

    Args:
        dataset: with len(dataset), and dataset[i] an (image, label), as torchvision's CIFAR10, SVHN, STL10, ImageFolder
            and the like: the image a PIL image or a (C, H, W) tensor of bytes, all of one size; the label a whole
            number from 0. A transform that the dataset has is applied once. PIL's palettes become colours, 16-bit grey
            becomes 8-bit.
        progress: a progress bar.

    Returns:
        (N, C, H, W) uint8 images, (N,) int64 labels.

    Raises:
        ValueError, TypeError: naming the image that does not fit, or cannot be read.
    """
    torchvision = import_torchvision("reading images")  # and with it PIL
    to_tensor = torchvision.transforms.v2.functional.pil_to_tensor
    if not len(dataset):
        raise ValueError("the dataset is empty: it must have at least one image")
    images, labels = None, torch.empty(len(dataset), dtype=torch.int64)
    title = f"reading {getattr(dataset, 'root', type(dataset).__name__)}"
    for index in tqdm(range(len(dataset)), title, unit="image", leave=False, disable=not progress):
        try:
            image, label = dataset[index]
        except _image_errors() as error:
            raise _unreadable(_name(dataset, index), error) from error
        expected = f"labels must be whole numbers from 0 to 2**63 - 1, as {_name(dataset, index)} must have one"
        label = whole_number(label, expected, 0, 2**63 - 1)
        if _is_pil(image):
            image = to_tensor(_in_bytes(image, _name(dataset, index)))
        if not isinstance(image, torch.Tensor):
            raise TypeError(
                f"images must be PIL images or (C, H, W) bytes, given a {type(image).__name__} in "
                f"{_name(dataset, index)}"
            )
        if image.dtype != torch.uint8 or image.dim() != 3 or not image.numel():
            raise TypeError(
                f"images must be PIL images or (C, H, W) bytes, given {tuple(image.shape)} of {image.dtype} in "
                f"{_name(dataset, index)}: leave scaling and normalising to DeviceLoader"
            )
        if images is None:
            images = torch.empty((len(dataset), *image.shape), dtype=torch.uint8)
        if image.shape != images.shape[1:]:
            raise ValueError(
                f"images held in memory must all have one size, given {_size(image)} in {_name(dataset, index)} after "
                f"{_size(images[0])}: resize them"
            )
        images[index], labels[index] = image, label
    return images, labels


def _is_pil(image):
    from PIL import Image

    return isinstance(image, Image.Image)


def _image_errors():
    """What a file that is no image, or one that is too large to be meant, makes PIL raise."""
    from PIL import Image

    return OSError, SyntaxError, Image.DecompressionBombError


def _in_bytes(image, name, colours=False):
    """A PIL image whose numbers are 8-bit pixels: palettes in their colours, black and white as 0 and 255, 16-bit grey
    scaled. PIL itself would take the number in the palette for a pixel, and cut 16 bits off at 255.

    Args:
        colours: makes it RGB.

    Raises:
        UnreadableImage: it has floating-point numbers, or whole ones beyond 16 bits; names the image.
    """
    try:
        if image.mode == "F":
            raise ValueError("its pixels are floating-point numbers, whose range is not known, not 8 or 16 bits")
        if image.mode in ("P", "PA"):
            image = image.convert("RGB")
        elif image.mode == "1":
            image = image.convert("L")
        elif image.mode == "I" or image.mode.startswith("I;16"):
            image = _scaled(image)
        return image.convert("RGB") if colours else image
    except (*_image_errors(), ValueError) as error:  # ValueError: PIL's too, of a mode that it has no way from
        raise _unreadable(name, error) from error


def _scaled(image):
    """A grey image of whole numbers from 0 to 65535 with 8 bits."""
    import numpy
    from PIL import Image

    pixels = numpy.asarray(image).astype(numpy.int64)
    low, high = pixels.min(), pixels.max()
    if low < 0 or high > 65535:
        raise ValueError(f"its pixels go from {low} to {high}, expected 0 to 65535 at most")
    return Image.fromarray(((pixels + 128) // 257).astype(numpy.uint8))


def _name(dataset, index):
    """Of an image, for a message: its file where the dataset tells."""
    return dataset.samples[index][0] if hasattr(dataset, "samples") else f"image {index}"


def _size(image):
    channels, height, width = image.shape
    return (height, width) if channels == 3 else (channels, height, width)


class UnreadableImage(ValueError):
    """Names the file. From a DataLoader's worker it comes with the worker's traceback, whose last line is ours."""

    def __init__(self, message):
        super().__init__(message.strip().splitlines()[-1].removeprefix(f"{__name__}.{type(self).__name__}: "))


def load(
    source,
    batch_size,
    *,
    device="cpu",
    workers=0,
    download=False,
    progress=False,
    augmentation=AUGMENTATIONS["cifar10"],
):
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
    batch_size = _batch_size(batch_size)
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
    if max(_read(folders[0].samples[0][0]).size) > SMALL:
        return large_images(*folders, batch_size, classes, workers=workers)
    parts = [images_in_memory(folder, progress) for folder in folders]
    return _in_memory(*parts, batch_size, device, classes, **augmentation)


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
    from PIL import Image

    try:
        with Image.open(path) as image:
            return _in_bytes(image, path, colours=True)
    except _image_errors() as error:
        raise _unreadable(path, error) from error


def _unreadable(path, error):
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UnreadableImage(f"cannot read the image {path}: replace or remove it ({reason})")


def large_images(train, test, batch_size, classes, *, workers=0):
    """Data of large images, as in torchvision's ImageNet recipes: for training a random part of each resized to 224x224
    and half of them mirrored, for testing the middle 224x224 of the image resized to 256; ImageNet's normalisation.

    Args:
        train, test: datasets of (PIL image, label), for instance `image_folders(ROOT)`.
        classes: their names.
        workers: processes that read and transform.
    """
    v2 = import_torchvision("large images").transforms.v2
    batch_size = _batch_size(batch_size)
    workers = whole_number(workers, "workers must be a whole number of at least 0", 0)
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
        if _is_pil(image):
            image = _in_bytes(image, _name(self.dataset, index), colours=True)
        return self.transform(image), label
