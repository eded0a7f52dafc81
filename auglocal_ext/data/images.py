"""Reading images: any dataset into memory, PIL's many kinds of pixels as bytes."""

import torch
import torch.nn.functional as F
from torch.utils.data import Subset
from tqdm import tqdm

from ..common.checks import whole_number
from ..common.messages import first_line
from ..common.torchvision import import_torchvision
from .arguments import check_image_size

__all__ = [
    "name_of",
    "UnreadableImage",
    "image_errors",
    "images_in_memory",
    "in_bytes",
    "is_pil",
    "resized",
    "unreadable",
]


def images_in_memory(dataset, progress=False, image_size=None):
    """Reads a dataset once, for a DeviceLoader.

    Args:
        dataset: with len(dataset), and dataset[i] an (image, label), as torchvision's CIFAR10, SVHN, STL10, ImageFolder
            and the like: the image a PIL image or a (C, H, W) tensor of bytes, all of one size; the label a whole
            number from 0. A transform that the dataset has is applied once. PIL's palettes become colours, 16-bit grey
            becomes 8-bit.
        progress: a progress bar.
        image_size: pixels along a side that each image is resized to, which may then be of different sizes; None: they
            stay as they are.

    Returns:
        (images, labels): (N, C, H, W), uint8, and (N,), int64, on the CPU.

    Raises:
        ValueError: the dataset is empty, image_size is not from 8 to 4096, or an image, which is named, cannot be read
            or has another size, or its label is no whole number from 0.
        TypeError: an image, which is named, is neither PIL's nor a (C, H, W) tensor of bytes.
        ImportError: torchvision does not import.
    """
    torchvision = import_torchvision("reading images")  # and with it PIL
    image_size = None if image_size is None else check_image_size(image_size)
    to_tensor = torchvision.transforms.v2.functional.pil_to_tensor
    if not len(dataset):
        raise ValueError("the dataset is empty: it must have at least one image")
    images, labels = None, torch.empty(len(dataset), dtype=torch.int64)
    title = f"reading {getattr(dataset, 'root', type(dataset).__name__)}"
    for index in tqdm(range(len(dataset)), title, unit="image", leave=False, disable=None if progress else True):
        try:
            image, label = dataset[index]
        except image_errors() as error:
            raise unreadable(name_of(dataset, index), error) from error
        expected = f"labels must be whole numbers from 0 to 2**63 - 1, as {name_of(dataset, index)} must have one"
        label = whole_number(label, expected, 0, 2**63 - 1)
        if is_pil(image):
            image = to_tensor(in_bytes(image, name_of(dataset, index)))
        if not isinstance(image, torch.Tensor):
            raise TypeError(
                f"images must be PIL images or (C, H, W) bytes, given a {type(image).__name__} in "
                f"{name_of(dataset, index)}"
            )
        if image.dtype != torch.uint8 or image.dim() != 3 or not image.numel():
            raise TypeError(
                f"images must be PIL images or (C, H, W) bytes, given {tuple(image.shape)} of {image.dtype} in "
                f"{name_of(dataset, index)}: leave scaling and normalising to DeviceLoader"
            )
        image = resized(image, image_size)
        if images is None:
            images = torch.empty((len(dataset), *image.shape), dtype=torch.uint8)
        if image.shape != images.shape[1:]:
            raise ValueError(
                f"images held in memory must all have one size, given {_size(image)} in {name_of(dataset, index)} "
                f"after {_size(images[0])}: give image_size, or resize them"
            )
        images[index], labels[index] = image, label
    return images, labels


def resized(images, size):
    """Images of bytes, (N, C, H, W) or (C, H, W), antialiased with (size, size) pixels; None: as they are."""
    if size is None or images.shape[-2:] == (size, size):
        return images
    batched = images if images.dim() == 4 else images[None]
    return F.interpolate(batched, (size, size), mode="bilinear", antialias=True).view(*images.shape[:-2], size, size)


def is_pil(image):
    from PIL import Image

    return isinstance(image, Image.Image)


def image_errors():
    """What a file that is no image, or one that is too large to be meant, makes PIL raise."""
    from PIL import Image

    return OSError, SyntaxError, Image.DecompressionBombError


def in_bytes(image, name, colours=False):
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
    except (*image_errors(), ValueError) as error:  # ValueError: PIL's too, of a mode that it has no way from
        raise unreadable(name, error) from error


def _scaled(image):
    """A grey image of whole numbers from 0 to 65535 with 8 bits."""
    import numpy
    from PIL import Image

    pixels = numpy.asarray(image).astype(numpy.int64)
    low, high = pixels.min(), pixels.max()
    if low < 0 or high > 65535:
        raise ValueError(f"its pixels go from {low} to {high}, expected 0 to 65535 at most")
    return Image.fromarray(((pixels + 128) // 257).astype(numpy.uint8))


def name_of(dataset, index):
    """Of an image, for a message: its file where the dataset tells."""
    if isinstance(dataset, Subset):
        return name_of(dataset.dataset, dataset.indices[index])
    return dataset.samples[index][0] if hasattr(dataset, "samples") else f"image {index}"


def _size(image):
    channels, height, width = image.shape
    return (height, width) if channels == 3 else (channels, height, width)


class UnreadableImage(ValueError):
    """Names the file. From a DataLoader's worker it comes with the worker's traceback, whose last line is ours."""

    def __init__(self, message):
        super().__init__(message.strip().splitlines()[-1].removeprefix(f"{__name__}.{type(self).__name__}: "))


def unreadable(path, error):
    return UnreadableImage(f"cannot read the image {path}: replace or remove it ({first_line(error)})")
