"""What an epoch of several stages came to, put together from what each of them has."""

import math
from dataclasses import dataclass

from ..distributed.agree import exchange
from ..distributed.collectives import gathered
from ..distributed.group import among
from ..training.divergence import NotFinite, check_values

__all__ = ["StagesEpoch", "check_all_values", "entry_of_all"]


@dataclass(frozen=True)
class StagesEpoch:
    """What an epoch came to, the same on every rank.

    Attributes:
        loss: the classifier's, the mean over the images that its criterion does not ignore.
        train_accuracy: from 0 to 1, of the training batches, as they were seen.
        module_losses, module_accuracies: of each local module's own head; None of one whose units are all frozen.
        images_per_second: of the last stage, all pipelines together, from its first batch to its last.
        seconds: from the first rank's first batch to the last rank's end.
        lr: the learning rate of the last step.
        skipped_steps: how many steps of a local module were left out, with nonfinite="skip".
    """

    loss: float
    train_accuracy: float
    module_losses: list[float | None]
    module_accuracies: list[float | None]
    images_per_second: float
    seconds: float
    lr: float
    skipped_steps: int


def check_all_values(trainer, title):
    """NotFinite, on every rank, of the first step and its first local module whose loss was not finite, or of a weight
    or buffer that is not."""
    stage, ours = trainer.stage, None
    try:
        check_values(trainer, stage.watch, stage.sums, trainer.odd, title)
    except NotFinite as error:
        ours = (*(stage.watch.first() or (math.inf, stage.span.start)), str(error))
    told = gathered(ours, "the end of an epoch")  # a long wait, in which a rank that is killed is noticed at once
    if found := [one for one in told if one]:
        exchange("", "the end of a training")  # so that none ends the groups while another one is still in them
        raise NotFinite(min(found)[-1])


def entry_of_all(stage, grid, seconds):
    """The StagesEpoch of all ranks; seconds: of this one's epoch."""
    with among(grid.copies):
        ours = stage.sums.entry(0, 0)
    found = gathered((ours, seconds), "what an epoch came to")
    entries = [entry for entry, _ in found[: grid.stages]]  # in all pipelines they are the same
    losses = [loss for entry in entries for loss in entry["module_losses"]]
    accuracies = [accuracy for entry in entries for accuracy in entry["module_accuracies"]]
    return StagesEpoch(
        entries[-1]["loss"],
        entries[-1]["train_accuracy"],
        losses,
        accuracies,
        entries[-1]["images_per_second"],
        max(seconds for _, seconds in found),
        entries[0]["lr"],
        sum(entry["skipped_steps"] for entry in entries),
    )
