"""A step's batch: what it must be, and which of its images count."""

from ..common import checks
from ..common.checks import is_soft

__all__ = ["checked", "counted", "raise_refused", "right_answers"]


def checked(trainer, images, labels):
    """The batch as a step takes it; see `LocalTrainer.step`.

    Returns:
        (images, labels, refused): refused is None, or where values are not at hand a bool (), whether the batch is to
        be refused, which `raise_refused` does; then what would do harm is replaced.
    """
    classes, ignored, soft = trainer.num_classes, trainer.criterion.ignore_index, is_soft(labels)
    options = {"channels": trainer.image_channels, "half": trainer.precision != "fp32", "soft_classes": classes}
    checks.check_batch(images, labels, trainer.device, trainer.dtype, **options)
    if soft and ignored is not None and ignored >= 0:
        raise ValueError(f"labels must be class numbers with ignore_index={ignored}, given soft ones: leave it out")
    if len(images) < 2:
        raise ValueError(f"a step needs at least 2 images for its batch statistics, given {len(images)}")
    not_finite = checks.not_finite(images, trainer.dtype)
    bad_labels = checks.not_finite(labels, trainer.dtype) if soft else checks.out_of_range(labels, classes, ignored)
    if trainer._values_are_at_hand:
        if not_finite:
            raise checks.bad_images()
        if bad_labels:
            raise checks.bad_soft_labels() if soft else checks.bad_labels(classes, labels, ignored=ignored)
        return images, labels, None
    # Reading the flags would wait for the device, and a label out of range would end its context: keep the
    # flags, and take the step on values that harm nothing.
    trainer._refused[0] |= not_finite
    trainer._refused[2 if soft else 1] |= bad_labels
    if soft:
        harmless = labels.nan_to_num(0, 0, 0)
    else:
        harmless = labels.clamp(0, classes - 1)
        if ignored is not None:
            harmless = harmless.where(labels != ignored, ignored)
    return images.nan_to_num(0, 0, 0), harmless, not_finite | bad_labels


def raise_refused(trainer):
    """Raises ValueError if a batch since the last call was refused on the device. Waits for the device."""
    images, labels, soft_labels = trainer._refused.tolist()
    trainer._refused.zero_()
    if labels:
        raise checks.bad_labels(trainer.num_classes)
    if soft_labels:
        raise checks.bad_soft_labels()
    if images:
        raise checks.bad_images()


def right_answers(logits, labels, ignored):
    """(), int64: how many images are taken for their class, of soft labels the one of the largest share; of none with
    the label `ignored`."""
    answers = logits.argmax(1)
    if is_soft(labels):
        return (answers == labels.argmax(1)).sum()
    right = answers == labels
    if ignored is not None and ignored >= 0:
        right &= labels != ignored
    return right.sum()


def counted(labels, ignored):
    """How many images `right_answers` is out of: all but those with the label `ignored`; a number, or int64 ()."""
    return len(labels) if ignored is None or is_soft(labels) else (labels != ignored).sum()
