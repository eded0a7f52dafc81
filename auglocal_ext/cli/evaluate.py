"""`auglocal evaluate`"""

import argparse
import re
import warnings
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

__all__ = ["check_classes", "evaluate_command", "trained"]

_MOST_ROWS = 20  # of the table of classes


def evaluate_command(given):
    """Evaluates a run's model.pt, or a state_dict, on test images; leaves evaluation.json and the picture."""
    run = given.weights.is_dir()
    if not given.weights.exists():
        raise FileNotFoundError(f"{given.weights} does not exist: give a run's folder, runs/NAME, or a file of weights")
    if run == (given.model is not None):
        raise ValueError(
            f"--model tells what a file of weights is of, and no run, which knows its own, given {given.weights}: "
            f"{'leave it out' if run else 'add --model, for instance --model resnet20'}"
        )
    settings = read_settings(given.weights) if run else None
    options = _options(given, settings)
    out = given.out or (given.weights if run else Path("."))
    where = given.data or options.data
    # Those of other images stand beside those of the run's own.
    other = run and not given.out and where != settings["options"]["data"]
    other = "-" + re.sub(r"[^A-Za-z0-9]+", "-", where).strip("-") if other else ""
    result, picture = out / f"evaluation{other}.json", out / f"confusion_matrix{other}.png"
    for path in (result, picture):
        check_writable(path, "--out")
    if run:
        source = load_data(options, where, normalisation=(settings["mean"], settings["std"]))
        check_classes(source, settings, given.weights, where)
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
    write_json(result, kept | {"confusion": found.confusion.tolist()})
    title = f"{options.model} on {where.split(':')[0]}, top-1 {found.top1:.2%}"
    report.confusion_picture(found.confusion, classes, picture, title)
    print(f"saved {result}, {picture}")
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


def check_classes(source, settings, folder, where):
    """ValueError unless the Data at `where` has as many classes as the run in the folder; warns where names differ."""
    if source.num_classes != settings["num_classes"]:
        raise ValueError(
            f"the model of {folder} has {settings['num_classes']} classes, given {source.num_classes} in {where}: give "
            f"data of the same classes"
        )
    theirs, ours = ([str(name) for name in names] for names in (source.description["classes"], settings["classes"]))
    if theirs != ours:
        differing = next((a, b) for a, b in zip(theirs, ours, strict=True) if a != b)
        warnings.warn(f"{where} calls a class {differing[0]!r} that the model learnt as {differing[1]!r}", stacklevel=2)


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
