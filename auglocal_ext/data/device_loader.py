"""Batches from images that are held as bytes on a device, and made there."""

from collections.abc import Iterable, Iterator

import torch

from ..common.checks import normalisation, whole_number
from ..common.device import usable_device
from .arguments import check_part, whole_batch_size
from .resumable import Resumable, seed_at
from .split import drawn, images_of_part, part_of

__all__ = ["DeviceLoader", "check_bytes", "crop_and_flip", "mean_and_std"]


class DeviceLoader(Resumable):
    """Batches from images held as bytes on a device, and made there; nothing in its loop waits for the device.

    An iterable of (images, labels): images (N, C, H, W), float32, normalised, channels_last; labels (N,), int64. With
    `augment` shuffled, cropped after padding, and flipped: the order follows from (seed, epoch), and what happens to
    the images of batch i from (seed, epoch, i); on the CPU and on a GPU they differ. See `Resumable` for `set_epoch`,
    `state_dict` and `load_state_dict`.

    Args:
        images: (N, C, H, W), uint8.
        labels: (N,), integers from 0.
        batch_size: images in a batch; the last one of an epoch has what is left.
        mean: (C,), of images scaled to 0..1, finite.
        std: likewise, above 0.
        augment: for training. `pad` pixels are reflected around an image before it is cropped to its size at
            random; `flip` mirrors half of the images.
        device: where the images lie, and the batches are made.
        seed: of all that is drawn; None: torch.initial_seed() where epoch 0 begins, which torch.manual_seed and train's
            `seed` set.
        part: (rank, ranks), of several that train one model: the loader gives its part of the images, every ranks-th of
            the epoch's order, which is the same on all ranks; with `augment` the first ones again at the end, so that
            every rank has as many.

    Attributes:
        images, labels: on the device, uint8 and int64.
        mean, std: on the device, (C,), float32.

    Raises:
        ValueError, TypeError: naming the argument that is none of this.
    """

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        batch_size: int,
        mean: Iterable[float] | torch.Tensor,
        std: Iterable[float] | torch.Tensor,
        *,
        augment: bool,
        pad: int = 0,
        flip: bool = False,
        device: str | torch.device = "cpu",
        seed: int | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        check_bytes(images)
        if not isinstance(labels, torch.Tensor):
            raise TypeError(f"labels must be a tensor, given {type(labels).__name__}")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"labels must be ({len(images)},), one per image, given shape {tuple(labels.shape)}")
        batch_size = whole_batch_size(batch_size)
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
        self.part = check_part(part)
        super().__init__(seed, len(images), batch_size, own=images_of_part(len(images), self.part, augment))

    def _batches(self, seed: int, epoch: int, first: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        count, device = len(self.images), self.images.device
        if self.augment:
            order = torch.randperm(count, device=device, generator=self._generator(seed, epoch))
        else:
            order = torch.arange(count, device=device)
        order, rank = part_of(order, self.part, self.augment), self.part[0]
        of_rank = (rank,) if rank else ()  # what is drawn for batches of one number differs between ranks
        for index, chosen in enumerate(order.split(self.batch_size)[first:], first):
            yield self._batch_of(self.images[chosen], (seed, epoch, index, *of_rank)), self.labels[chosen]

    def _batch_of(self, images, place):
        if self.augment and (self.pad or self.flip):
            n, device, generator = len(images), images.device, self._generator(*place)
            top, left = torch.randint(2 * self.pad + 1, (2, n), device=device, generator=generator)
            mirrored = torch.rand(n, device=device, generator=generator) < (0.5 if self.flip else 0)
            images = crop_and_flip(images, top, left, mirrored, self.pad)
        images = images.to(torch.float32, memory_format=torch.channels_last)
        mean, std = (255 * values.view(-1, 1, 1) for values in (self.mean, self.std))
        return images.sub_(mean).div_(std)

    def sample(self, count: int, seed: int = 0) -> "DeviceLoader":
        """A loader of some of the images, not augmented, each time in the same random order: of which a batch shows all
        classes, and not one folder's.

        Args:
            count: how many images; all where there are fewer.
            seed: of which, and of their order.
        """
        chosen = drawn(len(self.images), count, seed).to(self.images.device)
        images, labels, device = self.images[chosen], self.labels[chosen], self.images.device
        given = self.batch_size, self.mean, self.std
        return DeviceLoader(images, labels, *given, augment=False, device=device, seed=self._own_seed)

    def _generator(self, *place):
        return torch.Generator(self.images.device).manual_seed(seed_at(*place))


def check_bytes(images):
    if not isinstance(images, torch.Tensor):
        raise TypeError(f"images must be a tensor, given {type(images).__name__}: see images_in_memory")
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise ValueError(f"images must be (N, C, H, W) bytes, given {tuple(images.shape)} of {images.dtype}")
    if not images.numel():
        raise ValueError(f"images must be at least one, and of at least one pixel, given shape {tuple(images.shape)}")


def crop_and_flip(images, top, left, mirrored, pad):
    """Crops of the images' own size out of the images with `pad` pixels reflected around them.

    Args:
        images: (N, C, H, W), of any dtype; pad is less than H and W.
        top, left: (N,), int64, from 0 to 2 * pad: where the crop begins in the padded image.
        mirrored: (N,), bool: which crops are flipped left to right.
        pad: pixels, at least 0.

    Returns:
        (N, C, H, W), new, contiguous.
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


def mean_and_std(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of each channel of images, as `DeviceLoader` takes them.

    Args:
        images: (N, C, H, W), uint8.

    Returns:
        (mean, std): (C,), float32, of the images scaled to 0..1; std at least 0.001. Exact: by counting.

    Raises:
        TypeError: images is no tensor.
        ValueError: of another shape or dtype, or without a pixel.
    """
    check_bytes(images)
    values = torch.arange(256, dtype=torch.float64) / 255
    # By counting, a channel at a time: exact, and no image becomes float.
    shares = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    shares /= shares.sum(1, keepdim=True)
    mean = shares @ values
    std = (shares * (values - mean[:, None]) ** 2).sum(1).sqrt()
    return mean.float(), std.clamp_min(1e-3).float()
