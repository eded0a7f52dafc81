"""Data sources by name, and a loader as fast as the device: digits, cifar10:ROOT, cifar100:ROOT, svhn:ROOT, stl10:ROOT,
mnist:ROOT, fashionmnist:ROOT, imagefolder:ROOT, fake:N.

Each gives a training and a test loader of (images, labels), float32 images normalised by the training set's
own mean and deviation. Small images are held as bytes on the device, and shuffled, augmented and normalised there a
batch at a time; large ones are read by torchvision's ImageFolder and a DataLoader.

With any dataset of small images:

    images, labels = images_in_memory(torchvision.datasets.CIFAR100("data"))
    loader = DeviceLoader(images, labels, 128, *mean_and_std(images), augment=True, pad=4, flip=True, device="cuda")
"""

from .data import Data
from .device_loader import DeviceLoader, crop_and_flip, mean_and_std
from .folders import LARGE_SIDE, image_folders, large_images
from .images import images_in_memory
from .mixed import Mixed
from .sources import AUGMENTATIONS, SMALL, load

__all__ = [
    "AUGMENTATIONS",
    "Data",
    "DeviceLoader",
    "LARGE_SIDE",
    "Mixed",
    "SMALL",
    "crop_and_flip",
    "image_folders",
    "images_in_memory",
    "large_images",
    "load",
    "mean_and_std",
]
