"""What arguments and batches must be: the checks that training, validation and data share.

What only the values of a batch tell (`not_finite`, `out_of_range`) comes as a tensor: reading it on the CPU costs
nothing, elsewhere it waits for the device, so there the caller gathers such flags and reads them now and then.
"""

import math
import numbers
import operator

import torch

__all__ = [
    "AUTOCAST",
    "PRECISIONS",
    "at_least_0",
    "bad_images",
    "bad_labels",
    "bad_soft_labels",
    "check_batch",
    "check_device",
    "check_images",
    "check_labels",
    "check_pair",
    "autocasting",
    "check_precision",
    "check_seed",
    "check_soft_labels",
    "check_tensors",
    "is_soft",
    "learning_rate_factor",
    "normalisation",
    "not_finite",
    "out_of_range",
    "whole_number",
]


# Precisions of features, and what autocast is told of them; None: they are of the parameters' dtype.
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = tuple(AUTOCAST)


def check_precision(precision):
    """ValueError unless it is one of PRECISIONS."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, given {precision!r}")


def autocasting(device, precision):
    """The context of a forward pass in a precision."""
    dtype = AUTOCAST[precision]
    return torch.autocast(device.type, dtype or torch.bfloat16, dtype is not None)


def whole_number(value, expected, least=None, most=None):
    """A value as an int, of whatever integer kind it is, numpy's for instance.

    Args:
        value: no bool and no float, whole or not: they are mistakes more often than numbers.
        expected: the error's beginning, as in "epochs must be a whole number of at least 1".
        least, most: its range, both inclusive.

    Raises:
        ValueError: it is none, or outside of the range.
    """
    try:
        is_bool = isinstance(value, bool) or getattr(value, "dtype", None) is torch.bool
        number = None if is_bool else operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least) or (most is not None and number > most):
        raise ValueError(f"{expected}, given {value!r}")
    return number


def check_seed(seed):
    """The seed as an int; ValueError unless torch.manual_seed takes it as it is."""
    return whole_number(seed, "seed must be a whole number from -2**63 to 2**64 - 1", -(2**63), 2**64 - 1)


def at_least_0(value, name):
    """The value as a float; ValueError unless it is a finite number of at least 0."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number of at least 0, given {value!r}")
    return float(value)


def learning_rate_factor(value, expected):
    """The value as a float; ValueError, beginning with `expected`, unless it is a finite number of at least 0."""
    number = math.nan
    if isinstance(value, numbers.Real | torch.Tensor) and not isinstance(value, bool):
        single = not isinstance(value, torch.Tensor) or value.numel() == 1
        number = float(value) if single else math.nan
    if not 0 <= number < math.inf:
        raise ValueError(f"{expected} a finite number of at least 0 to multiply the learning rate by, given {value!r}")
    return number


def normalisation(mean, std, channels, device="cpu"):
    """mean and std as float32 tensors of shape (channels,); ValueError unless they are so many finite numbers, and
    those of std above 0."""
    tensors = []
    for name, values in (("mean", mean), ("std", std)):
        try:
            values = torch.as_tensor(values, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"{name} must be {channels} numbers, one per channel, given {values!r}") from None
        if values.shape != (channels,):
            raise ValueError(
                f"{name} must be of shape ({channels},), one number per channel, given shape {tuple(values.shape)}"
            )
        if not values.isfinite().all() or (name == "std" and not (values > 0).all()):
            wanted = "finite" if name == "mean" else "finite and above 0, for images are divided by it"
            raise ValueError(f"{name} must be {wanted}, given {values.tolist()}")
        tensors.append(values.to(device))
    return tuple(tensors)


def check_pair(batch, name):
    """TypeError unless a batch of the loader of that name is a pair of tensors."""
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not all(isinstance(t, torch.Tensor) for t in batch):
        raise TypeError(f"{name} must give pairs of tensors (images, labels), given {_describe(batch)}")


def _describe(batch):
    if isinstance(batch, tuple | list):
        return f"a {type(batch).__name__} of {', '.join(type(part).__name__ for part in batch) or 'nothing'}"
    return f"a {type(batch).__name__}"


def check_device(batch, device, prefix):
    """ValueError unless a batch can be moved to the model's device: it is there, or on the CPU."""
    for name, tensor in zip(("images", "labels"), batch, strict=True):
        if tensor.device.type not in ("cpu", device.type):
            raise ValueError(
                f"the model is on {device}, {prefix}{name} on {tensor.device}: pass device='{tensor.device}', or let "
                f"the loader give CPU tensors"
            )


def check_batch(images, labels, device, dtype, *, channels=None, half=False, soft_classes=None, prefix=""):
    """Everything about a batch that its values do not tell; see the functions it is made of.

    Args:
        soft_classes: None, or of how many classes labels may be shares.
        prefix: of the names in messages, for instance "validation ".
    """
    check_tensors(images, labels, device, prefix)
    check_images(images, dtype, channels=channels, half=half, name=f"{prefix}images")
    if soft_classes is not None and is_soft(labels):
        check_soft_labels(labels, images, dtype, soft_classes)
    else:
        check_labels(labels, images, f"{prefix}labels")


def check_tensors(images, labels, device, prefix=""):
    """TypeError or ValueError unless both are tensors on the model's device."""
    for name, value in ((f"{prefix}images", images), (f"{prefix}labels", labels)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, given {type(value).__name__}")
        if value.device != device:
            raise ValueError(
                f"{name} must be on the model's device, {device}, given {value.device}: move one of them with .to()"
            )


def check_images(images, dtype, *, channels=None, half=False, name="images"):
    """ValueError or TypeError unless the images' shape and dtype fit the model.

    Args:
        dtype: of the model's parameters.
        channels: (N, channels, H, W) is expected; None: of any shape with a batch dimension.
        half: float16 and bfloat16 will do too, as for precisions "bf16" and "fp16".
    """
    if channels is not None and (images.dim() != 4 or images.shape[1] != channels or min(images.shape[2:]) < 1):
        raise ValueError(f"{name} must be (N, {channels}, H, W) for this model, given shape {tuple(images.shape)}")
    if not images.dim():
        raise ValueError(f"{name} must have a dimension for the batch, given a single number")
    if not images.is_floating_point():
        raise TypeError(f"{name} must be floating point, given {images.dtype}: scale them with .float() / 255")
    if images.dtype != dtype and not (half and images.dtype.itemsize == 2):
        raise TypeError(f"{name} must be {dtype} like the model, given {images.dtype}: call .to({dtype})")


def check_labels(labels, images, name="labels"):
    """ValueError or TypeError unless labels are one int64 number per image."""
    if labels.shape != images.shape[:1]:
        remedy = ": take their .argmax(1)" if labels.dim() == 2 and labels.shape[1] > 1 else ""
        raise ValueError(f"{name} must be ({len(images)},), one per image, given shape {tuple(labels.shape)}{remedy}")
    if labels.dtype != torch.int64:
        raise TypeError(f"{name} must be int64 class numbers, given {labels.dtype}: convert them with .long()")


def is_soft(labels):
    """Whether labels are (N, classes), shares of classes, as MixUp and CutMix make them."""
    return labels.dim() == 2 and labels.is_floating_point()


def check_soft_labels(labels, images, dtype, classes):
    """ValueError or TypeError unless labels that `is_soft` are of the images and of the model's classes and dtype."""
    if labels.shape != (len(images), classes):
        raise ValueError(
            f"soft labels must be ({len(images)}, {classes}), a share of each class per image, given shape "
            f"{tuple(labels.shape)}"
        )
    if labels.dtype != dtype:
        raise TypeError(f"soft labels must be {dtype} like the model, given {labels.dtype}: call .to({dtype})")


def not_finite(values, dtype):
    """(), bool: whether a value is NaN or infinite; dtype is what they are summed in, the model's."""
    return ~values.sum(dtype=dtype).isfinite()


def out_of_range(labels, classes, ignored=None):
    """(), bool: whether a label is neither from 0 to classes - 1 nor `ignored`."""
    outside = (labels < 0) | (labels >= classes)
    return (outside if ignored is None else outside & (labels != ignored)).any()


def bad_images(prefix=""):
    """The ValueError of images that are `not_finite`."""
    return ValueError(
        f"{prefix}images must be finite, given NaN or infinite values: look at the data and its normalisation"
    )


def bad_soft_labels():
    """The ValueError of soft labels that are `not_finite`."""
    return ValueError("soft labels must be finite, given NaN or infinite values: look at how they are made")


def bad_labels(classes, labels=None, prefix="", ignored=None):
    """The ValueError of labels that are `out_of_range`; labels: where their values are at hand."""
    labels = labels if labels is None or ignored is None else labels[labels != ignored]
    given = "values outside it" if labels is None else f"{labels.min().item()} to {labels.max().item()}"
    return ValueError(
        f"{prefix}labels must be from 0 to {classes - 1} for this model of {classes} classes, given {given}: remap the "
        f"labels, or make the model with num_classes= to fit them"
    )
