"""`auglocal evaluate`"""

import argparse
from pathlib import Path

from .. import models, report
from ..common.files import check_writable, write_json
from ..training.evaluate import evaluation
from .checks import check_image_size, on_meta
from .job import load_data
from .options import default_device
from .presets import DEFAULTS
from .runs import options_of, read_settings
from .weights import load_weights

__all__ = ["evaluate_command", "trained"]

_MOST_ROWS = 20  # of the table of classes


def evaluate_command(given):
    """Evaluates a run's model.pt, or a state_dict, on test images; leaves evaluation.json and the picture."""
    run = given.weights.is_dir()
    if run == (given.model is not None):
        raise ValueError(
            f"--model tells what a file of weights is of, and no run, which knows its own, given {given.weights}: "
            f"{'leave it out' if run else 'add --model, for instance --model resnet20'}"
        )
    settings = read_settings(given.weights) if run else None
    options = _options(given, settings)
    out = given.out or (given.weights if run else Path("."))
    for name in ("evaluation.json", "confusion_matrix.png"):
        check_writable(out / name, "--out")
    where = given.data or options.data
    if run:
        source = load_data(options, where, normalisation=(settings["mean"], settings["std"]))
        _check_classes(source, settings, given)
        model = trained(given.weights, settings)
    else:
        source = load_data(options, where)
        model = models.create(options.model, source.num_classes)
        load_weights(model, given.weights, f"{options.model} with {source.num_classes} classes", option="RUN")
    check_image_size(on_meta(options.model, source.num_classes), *source.description["image_size"], "--data")
    model.to(options.device)
    found = evaluation(model, source.test, precision=options.precision, progress=not options.quiet)
    classes = [str(name) for name in source.description["classes"]]
    print(f"{options.model} on the test images of {where}, {found}")
    print("\n".join(_table(found, classes)))
    kept = {"data": where, "model": options.model, "loss": found.loss, "top1": found.top1, "top5": found.top5}
    kept |= {"images": found.images, "classes": classes, "per_class": found.per_class}
    write_json(out / "evaluation.json", kept | {"confusion": found.confusion.tolist()})
    title = f"{options.model} on {where.split(':')[0]}, top-1 {found.top1:.2%}"
    report.confusion_picture(found.confusion, classes, out / "confusion_matrix.png", title)
    print(f"saved {out / 'evaluation.json'}, {out / 'confusion_matrix.png'}")
    return 0


def _options(given, settings):
    """The options by which data are read and the model is run: the run's, where it is one, below what was given."""
    if settings is None:
        options = argparse.Namespace(**DEFAULTS | {"model": given.model})
    else:
        options = options_of(given.weights, settings, leave_out=("device",))
    for name in ("batch_size", "device", "precision", "workers"):
        if getattr(given, name) is not None:
            setattr(options, name, getattr(given, name))
    options.device = options.device or default_device()
    options.quiet, options.download = given.quiet, given.download
    return options


def _check_classes(source, settings, given):
    if source.num_classes != settings["num_classes"]:
        raise ValueError(
            f"the model of {given.weights} has {settings['num_classes']} classes, given {source.num_classes} in "
            f"--data {given.data}: give data of the same classes"
        )


def trained(folder, settings):
    """The model of a run, with the weights of its model.pt, on the CPU; settings: of `read_settings`."""
    name, classes = settings["options"]["model"], settings["num_classes"]
    model = models.create(name, classes)
    if not (folder / "model.pt").exists():
        raise FileNotFoundError(
            f"{folder} has no model.pt, which a run writes after its first epoch: `auglocal resume`"
        )
    load_weights(model, folder / "model.pt", f"{name} with {classes} classes", option="the weights")
    return model.eval()


def _table(found, classes):
    """The lines of a table of classes and their accuracies: of many the lowest ones."""
    rows = list(zip(classes, found.per_class, found.confusion.sum(1).tolist(), strict=True))
    title = "class"
    if len(rows) > _MOST_ROWS:
        rows = sorted((row for row in rows if row[1] is not None), key=lambda row: row[1])[: _MOST_ROWS // 2]
        title = f"the {len(rows)} lowest of {len(classes)} classes"
    width = max(len(title), *(len(name) for name, _, _ in rows))
    yield f"{title:{width}}  accuracy  images"
    for name, accuracy, images in rows:
        yield f"{name:{width}}  {'-' if accuracy is None else f'{accuracy:.2%}':>8}  {images:>6,}"
