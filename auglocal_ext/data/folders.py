"""Large images: folders of classes, read by torchvision's ImageFolder and a DataLoader."""

from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from ..common.checks import whole_number
from ..common.torchvision import import_torchvision
from .arguments import check_image_size, check_normalisation, check_part, check_share, whole_batch_size
from .data import Data
from .images import image_errors, in_bytes, is_pil, name_of, unreadable
from .resumable import Resumable, seed_at
from .split import drawn, hold_out_share, images_of_part, part_of

__all__ = ["LARGE_SIDE", "image_folders", "large_images", "read_image"]


LARGE_SIDE = 224  # what larger ones are cropped to

IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # mean and std of its images


def image_folders(root):
    """Two folders of images as datasets: the training and the test images.

    Args:
        root: the folder ROOT. ROOT/train and ROOT/test or ROOT/val have a folder of images per class.

    Returns:
        [train, test]: torchvision's ImageFolders, of (RGB PIL image, label). Where a file cannot be read they raise a
        ValueError that names it.

    Raises:
        FileNotFoundError: there are no such folders, or no images in them.
        ValueError: the two have different classes.
        ImportError: torchvision does not import.
    """
    torchvision, root = import_torchvision("data 'imagefolder:ROOT'"), Path(root)
    train_root, test_root = root / "train", next((root / d for d in ("test", "val") if (root / d).is_dir()), None)
    if not train_root.is_dir() or test_root is None:
        raise FileNotFoundError(f"no image folder at {root}: expected {root}/train and {root}/test (or val)")
    try:
        folders = [torchvision.datasets.ImageFolder(part, loader=read_image) for part in (train_root, test_root)]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no images under {root}: expected a folder of images per class ({error})") from error
    if folders[0].classes != folders[1].classes:
        raise ValueError(
            f"{train_root} and {test_root} must have the same classes, given {folders[0].classes} and "
            f"{folders[1].classes}"
        )
    return folders


def read_image(path):
    """One image, or an error that names its file."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return in_bytes(image, path, colours=True)
    except image_errors() as error:
        raise unreadable(path, error) from error


def large_images(
    train,
    test,
    batch_size,
    classes,
    *,
    workers=0,
    image_size=LARGE_SIDE,
    val_split=0.0,
    normalisation=None,
    seed=None,
    part=(0, 1),
):
    """Data of large images, as in torchvision's ImageNet recipes: for training a random part of each resized to 224x224
    and half of them mirrored, for testing the middle 224x224 of the image resized to 256.

    Args:
        train, test: datasets of (PIL image, label), for instance `image_folders(ROOT)`.
        batch_size: images in a batch. Where an epoch would end in a batch of one, that is left out in training.
        classes: their names.
        workers: processes that read and transform. What is drawn does not depend on their number.
        image_size: pixels along a side, from 8 to 4096, instead of 224; for testing images are resized to 8/7 of it.
        val_split: the share of the training images that is held out as `Data.val` and seen as those for testing: of
            each class where the dataset has `targets`, as an ImageFolder has, and each class enough images.
        normalisation: (mean, std) of images scaled to 0..1; None: ImageNet's.
        seed: of the order and the augmentation; None: torch.initial_seed() where epoch 0 begins.
        part: see `DeviceLoader`.

    Returns:
        Data, whose loaders have `set_epoch`, `state_dict` and `load_state_dict`; see `Resumable`. Only the images that
        are still to come are read where one goes on. Batches are on the CPU, pinned where there is CUDA.

    Raises:
        ValueError: an argument is out of its range, or val_split leaves too few images.
        ImportError: torchvision does not import.
    """
    v2 = import_torchvision("large images").transforms.v2
    batch_size = whole_batch_size(batch_size)
    workers = whole_number(workers, "workers must be a whole number of at least 0", 0)
    image_size, val_split = check_image_size(image_size), check_share(val_split)
    mean, std = check_normalisation(IMAGENET if normalisation is None else normalisation, 3)
    to_tensor = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean, std),
    ]
    train_transform = v2.Compose([v2.RandomResizedCrop(image_size), v2.RandomHorizontalFlip(), *to_tensor])
    test_transform = v2.Compose([v2.Resize(image_size * 8 // 7), v2.CenterCrop(image_size), *to_tensor])
    part = check_part(part)
    options = {"batch_size": batch_size, "workers": workers, "seed": seed, "part": part}
    kept, held = hold_out_share(getattr(train, "targets", None), len(train), val_split)
    val = Subset(train, held.tolist()) if len(held) else None
    train = train if val is None else Subset(train, kept.tolist())
    one_left = images_of_part(len(train), part, True) % batch_size == 1  # which BatchNorm cannot train on
    as_they_are = partial(_LargeImages, shuffle=False, drop_last=False, **options)
    return Data(
        _LargeImages(_Transformed(train, train_transform, test_transform), shuffle=True, drop_last=one_left, **options),
        as_they_are(_Transformed(test, test_transform, test_transform)),
        len(classes),
        {"mean": mean, "std": std, "image_size": [image_size, image_size], "classes": classes},
        None if val is None else as_they_are(_Transformed(val, test_transform, test_transform)),
    )


class _LargeImages(Resumable, DataLoader):  # type: ignore[misc]  # torch names its iterator
    """A DataLoader whose order follows from (seed, epoch), and each image's augmentation from (seed, epoch, index)."""

    def __init__(self, dataset, batch_size, workers, seed, *, shuffle, drop_last, part=(0, 1)):
        self.part, places = part, _Places(len(dataset), shuffle, part)
        Resumable.__init__(self, seed, len(dataset), batch_size, drop_last, len(places))
        DataLoader.__init__(
            self,
            dataset,
            batch_size,
            sampler=places,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            drop_last=drop_last,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # else each pass would draw from the default one
        )

    def sample(self, count, seed=0):
        """See `DeviceLoader.sample`."""
        given = self.dataset
        chosen = Subset(given.dataset, drawn(len(given), count, seed).tolist())
        made = {"batch_size": self.batch_size, "workers": self.num_workers, "seed": self._own_seed}
        return _LargeImages(_Transformed(chosen, given.plain, given.plain), shuffle=False, drop_last=False, **made)

    def _batches(self, seed, epoch, first):
        self.sampler.start = seed, epoch, first * self.batch_size
        return DataLoader.__iter__(self)


class _Places(Sampler):
    """(seed, epoch, index) of the images of one epoch, in its order, from `start`: (seed, epoch, images to skip)."""

    def __init__(self, count, shuffle, part):
        self.count, self.shuffle, self.part, self.start = count, shuffle, part, (0, 0, 0)

    def __len__(self):
        return images_of_part(self.count, self.part, self.shuffle)

    def __iter__(self):
        seed, epoch, skipped = self.start
        order = torch.arange(self.count)
        if self.shuffle:
            order = torch.randperm(self.count, generator=torch.Generator().manual_seed(seed_at(seed, epoch)))
        order = part_of(order, self.part, self.shuffle)
        return iter([(seed, epoch, index) for index in order[skipped:].tolist()])


class _Transformed(Dataset):
    """The images of a dataset of (image, label), transformed; an index of it is a place, (seed, epoch, index).

    plain: the transform without augmentation.
    """

    def __init__(self, dataset, transform, plain):
        self.dataset, self.transform, self.plain = dataset, transform, plain

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, place):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_at(*place))  # which the transforms draw from
            *_, index = place
            image, label = self.dataset[index]
            if is_pil(image):
                image = in_bytes(image, name_of(self.dataset, index), colours=True)
            return self.transform(image), label
