"""A validation by several stages: each runs its units forward, and hands features on as in training."""

import torch

from ..backbone.eval_mode import evaluating, unlike
from ..common import checks
from ..common.messages import first_line
from ..distributed.collectives import gathered
from ..distributed.group import among, on_its_own
from ..engine.tensors import dense
from ..training.divergence import NotFinite
from ..training.evaluate import Evaluation, Validation, check_any
from .link import Batch, Receiver, Sender

__all__ = ["evaluated", "unlike_in_parts", "validation_of"]

BUFFERS = 2


@on_its_own()
def unlike_in_parts(trainer, images):
    """Why the local modules of a LocalTrainer, one after another, do not compute what the model does in eval mode, as a
    sentence; None: they do. Nothing is raised: who validates nothing needs not know."""
    model, modules = trainer.model, trainer.local_modules
    try:
        with torch.no_grad(), evaluating([model, *modules]), checks.autocasting(trainer.device, trainer.precision):
            return unlike(model, _through(modules, images, True), model(images))
    except Exception as error:
        return f"{type(model).__name__} cannot be run in eval mode: {first_line(error)}"


def _through(modules, features, is_last):
    """Features behind local modules, or logits."""
    for module in modules:
        features = module.body(features)
    return modules[-1].head(features) if is_last else features


def validation_of(trainer, prefix="validation "):
    """A Validation of what a StageTrainer's batches are to be."""
    modules = torch.nn.ModuleList(trainer.stage.local_modules)
    return Validation(modules, trainer.precision, trainer.image_channels, trainer.num_classes, prefix)


def evaluated(trainer, loader) -> Evaluation:
    """The Evaluation of a StageTrainer's model on the loaders of the first stages, of all pipelines together; on every
    rank.

    Raises:
        NotFinite: on every rank: outputs are not.
    """
    grid, stage, validation, spoilt = trainer.grid, trainer.stage, validation_of(trainer), None
    last = grid.stage == grid.stages - 1
    receiver = None if grid.stage == 0 else Receiver(grid.border(grid.stage - 1), BUFFERS, trainer.device)
    sender = None if last else Sender(grid.border(grid.stage), BUFFERS, trainer.device)
    batches = _read(validation, loader) if receiver is None else iter(receiver.receive, None)
    with evaluating(stage.local_modules):
        for batch in batches:
            with torch.inference_mode(), checks.autocasting(trainer.device, trainer.precision):
                features = _through(stage.local_modules, batch.features, last)
                try:
                    if last:
                        validation.judge(features, batch.labels)
                except NotFinite as error:
                    spoilt = spoilt or str(error)
            if sender is not None:
                sender.send(Batch(dense(features), batch.labels))
            if receiver is not None:
                receiver.release()
    if sender is not None:
        sender.end()
    return _of_all(grid, validation, spoilt, last)


def _read(validation, loader):
    """The first stage's batches."""
    for given in loader:
        checks.check_pair(given, "the validation loader")
        images, labels = validation.check(given)
        if len(images):
            yield Batch(dense(images), labels.contiguous())


def _of_all(grid, validation, spoilt, last):
    """What all last stages have counted."""
    try:
        validation.raise_faults()
    except NotFinite as error:
        spoilt = spoilt or str(error)
    if found := [one for one in gathered(spoilt, "a validation") if one]:
        raise NotFinite(found[0])
    evaluation = None
    if last:
        with among(grid.copies):
            validation.sum_up()
        check_any(validation)
        evaluation = validation.evaluation()
    return gathered(evaluation, "a validation")[-1]
