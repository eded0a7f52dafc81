"""Checks of what data is asked for."""

import math
import numbers

from ..common.checks import normalisation, whole_number

__all__ = ["check_image_size", "check_normalisation", "check_part", "check_share", "whole_batch_size"]


def whole_batch_size(value):
    return whole_number(whole_number(value, "batch_size must be a whole number"), "batch_size must be at least 1", 1)


def check_image_size(value):
    """Pixels along a side."""
    return whole_number(value, "image_size must be a whole number of pixels from 8 to 4096", 8, 4096)


def check_part(value):
    """(rank, ranks) as ints."""
    try:
        rank, ranks = value
    except (TypeError, ValueError):
        raise ValueError(f"part must be (rank, ranks), (0, 1) for all images, given {value!r}") from None
    ranks = whole_number(ranks, "part must be (rank, ranks), ranks a whole number of at least 1", 1)
    return whole_number(rank, f"part must be (rank, ranks), rank from 0 to {ranks - 1}", 0, ranks - 1), ranks


def check_share(value):
    """val_split as a float; ValueError unless it is from 0 to below 1."""
    number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    if not 0 <= number < 1:
        raise ValueError(
            f"val_split must be the share of the training images to hold out, from 0 to below 1, given {value!r}"
        )
    return number


def check_normalisation(given, channels):
    """(mean, std), each a list of floats, one per channel; ValueError unless they are finite and std above 0."""
    try:
        mean, std = given
    except (TypeError, ValueError):
        raise ValueError(
            f"normalisation must be (mean, std), {channels} numbers each, of images scaled to 0..1, given {given!r}"
        ) from None
    normalisation(mean, std, channels)
    return [float(value) for value in mean], [float(value) for value in std]
