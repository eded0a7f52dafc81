"""A training made of options: its data, its model, and the call of `auglocal_ext.train`."""

import contextlib
from functools import partial

import torch

from .. import data, models
from ..common.device import usable_device
from ..optim import SCHEDULES, cosine, named_optimizer, paper
from ..rules.by_name import for_images
from ..training.loop import train
from .checks import check_cut, check_image_size
from .freeze import freeze
from .parts import part_of
from .ranks import device_of_rank, first_of_machine
from .training_options import stepping_of
from .weights import begin_with, check_weights

__all__ = ["check", "load_data", "make_model", "read_data", "schedule_of", "train_as_told", "train_stages_as_told"]


def check(options, weights=None):
    """What can be told before data are read; returns the model on the meta device, for `read_data`.

    weights: what it is to begin with, see `weights.check_weights`.
    """
    if weights:
        check_weights(weights, options.model)
    return check_cut(options)


def read_data(options, cuttable):
    """The Data that the options name, whose images go through the model; of several ranks each one's part."""
    part = {"part": part_of(options)}
    with first_of_machine() if options.download else contextlib.nullcontext():
        source = load_data(options, options.data, **part)
    check_image_size(cuttable, *source.description["image_size"], "--model, or larger images")
    return source


def load_data(options, where, **more):
    """The Data at a source, as the options read data; more: what else `data.load` is given."""
    if options.preset in data.AUGMENTATIONS:
        more["augmentation"] = data.AUGMENTATIONS[options.preset]
    return data.load(
        where,
        options.batch_size,
        device=device_of_rank(options.device),
        workers=options.workers,
        download=options.download,
        progress=not options.quiet,
        image_size=options.image_size,
        val_split=options.val_split,
        **more,
    )


def make_model(options, source, weights=None):
    """A new model for the data, by the options' seed, frozen as they say; weights: what it begins with."""
    torch.manual_seed(options.seed)
    model = models.create(options.model, source.num_classes)
    said = begin_with(model, weights, options.model, source.num_classes) if weights else None
    if said and not options.quiet:
        print(said)
    if options.freeze:
        freeze(model, options.freeze, options.freeze_norms, options.model)
    return model


def train_as_told(options, model, source, **more):
    """Trains the model on the Data, as `auglocal_ext.train` with what the options say; more: what else it is given."""
    return train(
        model,
        _batches(options, source),
        options.depth,
        memory_budget=options.budget,
        prefer=options.prefer,
        device=device_of_rank(options.device),
        **_arguments(options, source),
        **more,
    )


def train_stages_as_told(options, model, source, **more):
    """As `train_as_told`, by `auglocal_ext.train_stages`."""
    from ..stages.train import train_stages  # here, as torch takes half a second to import what that needs

    model.to(usable_device(device_of_rank(options.device)))
    given = _arguments(options, source)
    return train_stages(model, _batches(options, source), options.depth, stages=options.stages, **given, **more)


def _batches(options, source):
    if options.mixup or options.cutmix:
        return data.Mixed(source.train, source.num_classes, options.mixup, options.cutmix)
    return source.train


def _arguments(options, source):
    """Of both trainings."""
    return {
        "val_loader": source.val if options.val_split else source.test,
        "epochs": options.epochs,
        "criterion": torch.nn.CrossEntropyLoss(label_smoothing=options.label_smoothing),
        "rule": for_images(options.rule, source.description["mean"], source.description["std"]),
        "form": options.form,
        "auxiliary": options.auxiliary,
        "modules": options.modules,
        "units": options.units,
        "recompute": options.recompute,
        "sync_batch_norm": options.sync_bn,
        "optimizer": named_optimizer(
            options.optimizer,
            options.lr,
            options.momentum,
            options.weight_decay,
            options.norm_weight_decay,
            options.bias_weight_decay,
        ),
        "schedule": schedule_of(options),
        "precision": options.precision,
        "seed": options.seed,
        "progress": not options.quiet,
        "nonfinite": options.nonfinite,
        "patience": options.patience,
        "max_seconds": options.max_seconds,
        **stepping_of(options),
    }


def schedule_of(options):
    """(epoch, epochs) -> factor. The paper's goes to 0 at the end of the last epoch but one, which a short training has
    no epoch to spare for: under 100 epochs it is `cosine`."""
    if options.schedule == "paper":
        return paper(options.lr) if options.epochs >= 100 else cosine
    schedule = SCHEDULES[options.schedule]
    return schedule if options.warmup is None else partial(schedule, warmup=options.warmup)
