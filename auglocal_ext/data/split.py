"""Images that are held out of the training ones, for validation; images drawn from all, to look at; a rank's part."""

import torch

__all__ = ["drawn", "hold_out", "hold_out_share", "images_of_part", "part_of"]


def hold_out_share(labels, count, share):
    """`hold_out` of a share of `count` images, rounded, and at least one; held is empty for 0.

    Raises:
        ValueError: fewer than two images are left to train on.
    """
    if not share:
        return torch.arange(count), torch.arange(0)
    held = max(1, round(count * share))
    if count - held < 2:
        raise ValueError(
            f"val_split {share:g} leaves {count - held} of {count} training images, expected at least 2: give less"
        )
    return hold_out(labels, count, held)


def hold_out(labels, count, held):
    """(kept, held): ascending indices of `count` images, int64, of which so many are held out, the same ones each time.

    Args:
        labels: (count,), by which they are drawn: of each class its share, where that leaves and gives at least one of
            each. None: they are drawn from all.
    """
    from sklearn.model_selection import train_test_split

    if labels is not None:
        sizes = torch.bincount(torch.as_tensor(labels))
        sizes = sizes[sizes > 0]
        if sizes.min() < 2 or min(held, count - held) < len(sizes):
            labels = None
    parts = train_test_split(torch.arange(count).numpy(), test_size=held, stratify=labels, random_state=0)
    return tuple(torch.from_numpy(part).sort().values for part in parts)


def part_of(order, part, pad):
    """Those of the indices that are one rank's, as torch's DistributedSampler deals them.

    Args:
        order: (N,), the same on all ranks.
        part: (rank, ranks).
        pad: with the first ones again at the end, so that every rank has as many.
    """
    rank, ranks = part
    if pad and (missing := -len(order) % ranks):
        order = torch.cat([order, order.repeat(-(-missing // len(order)))[:missing]])
    return order[rank::ranks]


def images_of_part(count, part, pad):
    """How many of so many images `part_of` gives."""
    rank, ranks = part
    return -(-count // ranks) if pad else len(range(rank, count, ranks))


def drawn(total, count, seed):
    """Indices, int64, of `count` of `total` images in random order, the same ones for a seed; of fewer all."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]
