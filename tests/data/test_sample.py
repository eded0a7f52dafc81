"""Images drawn from a loader: so many, of all classes, as they are, the same ones each time."""

import torch

from auglocal_ext.data.folders import large_images
from auglocal_ext.data.sources import load


def test_of_small_images():
    train = load("digits", 100).train
    assert train.augment
    sample = train.sample(150)
    (images, labels), (_, rest) = sample
    assert len(images) == 100 and len(rest) == 50 and len(labels.unique()) == 10
    again = [images for images, _ in train.sample(150)]
    assert torch.equal(images, again[0]) and torch.equal(images, next(iter(sample))[0])  # nothing is drawn anew
    assert not torch.equal(images, next(iter(train.sample(150, seed=1)))[0])
    plain = torch.cat([batch for batch, _ in train.sample(10**6)])
    assert len(plain) == len(train.images)
    levels = (train.images.float() / 255 - train.mean.view(3, 1, 1)) / train.std.view(3, 1, 1)
    plain, levels = (images.sum((1, 2, 3)).sort().values for images in (plain, levels))
    torch.testing.assert_close(plain, levels, rtol=0, atol=1e-3)


def test_of_large_images(torchvision):
    """Those for training are seen as those for testing are."""
    from PIL import Image

    half = Image.new("RGB", (448, 448))
    half.paste((255, 255, 255), (224, 0, 448, 448))
    classes = [str(index) for index in range(8)]
    images = [(half, index) for index in range(8)]
    source = large_images(images, images, 3, classes, val_split=0.25, image_size=32)
    for part, count in ((source.train, 6), (source.test, 8)):
        sample = part.sample(5)
        seen, labels = (torch.cat(parts) for parts in zip(*sample, strict=True))
        assert len(labels.unique()) == 5 and labels.tolist() != sorted(labels.tolist())
        assert torch.equal(seen, seen[:1].expand_as(seen)) and (seen[0, 0, :, 0] < seen[0, 0, :, -1]).all()
        assert torch.equal(seen, torch.cat([images for images, _ in sample]))
        assert sum(len(labels) for _, labels in part.sample(100)) == count
