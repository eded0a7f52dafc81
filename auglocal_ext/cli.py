"""The command line: `auglocal train` and `auglocal plan`; also `python -m auglocal_ext`."""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

import torch

from . import __version__, data, models, report
from .loop import TrainingInterrupted, train
from .memory import format_bytes
from .optim import sgd
from .plan import PRECISIONS, plan
from .rules import FORMS, RULES, for_images

__all__ = ["main"]


def main(arguments=None):
    """Runs the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, TypeError, ImportError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        print(f"auglocal: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"\nauglocal: {str(stopped) or 'interrupted'}", file=sys.stderr)
        return 130


def _parser():
    parser = argparse.ArgumentParser(
        prog="auglocal", description="Trains CNN backbones by supervised local learning (AugLocal)."
    )
    commands = parser.add_subparsers(required=True, metavar="train|plan")

    training = commands.add_parser("train", help="train a model", description="Trains a model; leaves runs/NAME/.")
    training.set_defaults(run=_train)
    add = training.add_argument
    add(
        "--data",
        default="digits",
        help="digits, cifar10:ROOT, svhn:ROOT, stl10:ROOT, imagefolder:ROOT or fake:N (default: %(default)s)",
    )
    add("--download", action="store_true", help="fetch CIFAR-10, SVHN or STL-10 if it is not at ROOT")
    add("--epochs", type=int, default=15, help="times through the training data (default: %(default)s)")
    add("--batch-size", type=int, default=128, help="images in a step (default: %(default)s)")
    add("--lr", type=float, help="learning rate (default: 0.1 x batch size / 128)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default here: %(default)s)")
    add("--seed", type=int, default=0, help="of weights, order and augmentation (default: %(default)s)")
    add("--workers", type=int, default=0, help="processes that read large images (default: %(default)s)")
    add("--name", help="of the run's folder (default: made of the settings and the time)")
    add("--runs", type=Path, default=Path("runs"), help="where runs' folders go (default: %(default)s)")
    add("--quiet", action="store_true", help="no progress bar, no line per epoch")

    planning = commands.add_parser("plan", help="show how a model is cut", description="Shows how a model is cut.")
    planning.set_defaults(run=_plan)
    add = planning.add_argument
    add("--image-size", type=int, default=32, help="pixels along a side (default: %(default)s)")
    add("--batch-size", type=int, default=128, help="images in a step (default: %(default)s)")
    add("--num-classes", type=int, default=10, help="outputs of the model (default: %(default)s)")
    add("--picture", type=Path, metavar="FILE", help="draw live memory over the step, as PNG, PDF or SVG")
    add("--front", type=Path, metavar="FILE", help="with --budget: draw memory against arithmetic for every K")

    for command in (training, planning):
        add = command.add_argument
        add(
            "--model",
            default="resnet20",
            help="resnet20 ... resnet110, or a ResNet or VGG of torchvision (default: %(default)s)",
        )
        add(
            "--rule",
            choices=RULES,
            default="auglocal",
            help="learning rule; bp: plain backpropagation (default: %(default)s)",
        )
        add(
            "--depth",
            type=lambda text: text if text == "auto" else int(text),
            default=4,
            help="layers of an auxiliary net and its classifier; auto: what --budget allows (default: %(default)s)",
        )
        add(
            "--form",
            choices=FORMS,
            help="cifar: aux nets less deep toward the output, the last DEPTH units one module; imagenet: one module "
            "per unit, aux nets of one depth (default: cifar for resnet20 ... resnet110, else imagenet)",
        )
        add("--modules", type=int, metavar="K", help="cut into K local modules instead")
        add("--precision", choices=PRECISIONS, default="fp32", help="of the features (default: %(default)s)")
        add("--recompute", action="store_true", help="run convolutions again in the backward instead of keeping theirs")
        add("--budget", metavar="SIZE", help="bytes a step may take, such as 6GB: cut where it fits at the least work")
    return parser


def _plan(options):
    if options.num_classes < 1:
        raise ValueError(f"--num-classes must be at least 1, given {options.num_classes}")
    model = models.create(options.model, options.num_classes)
    shape = (options.batch_size, 3, options.image_size, options.image_size)
    if options.front and options.budget is None:
        raise ValueError("--front draws the search under a budget: give --budget too, for instance --budget 6GB")
    cutting = {"rule": options.rule, "form": options.form, "modules": options.modules, "recompute": options.recompute}
    planned = plan(model, shape, options.depth, precision=options.precision, memory_budget=options.budget, **cutting)
    print(planned)
    for path, save in ((options.picture, planned.save_picture), (options.front, planned.save_front)):
        if path:
            save(path)
            print(f"saved {path}")
    return 0


def _train(options):
    if options.batch_size < 2:
        raise ValueError(f"--batch-size must be at least 2, given {options.batch_size}")
    if options.workers < 0:
        raise ValueError(f"--workers must be at least 0, given {options.workers}")
    if options.name and Path(options.name).name != options.name:
        raise ValueError(f"--name must be a plain folder name, given {options.name!r}: choose the place with --runs")
    torch.manual_seed(options.seed)
    reading = {
        "workers": options.workers,
        "download": options.download,
        "device": options.device,
        "progress": not options.quiet,
    }
    source = data.load(options.data, options.batch_size, **reading)
    model = models.create(options.model, source.num_classes)
    folder, created = _new_folder(options)
    history = []
    (folder / "settings.json").write_text(json.dumps(_settings(options, source), indent=1) + "\n")

    def save(entry):
        # After every epoch, so that no interruption costs more than one.
        history.append(entry)
        (folder / "history.json").write_text(json.dumps(history, indent=1) + "\n")
        torch.save(model.state_dict(), folder / "model.pt")

    optimizer = partial(sgd(options.batch_size), lr=options.lr) if options.lr is not None else None
    started, status = time.perf_counter(), 0
    try:
        result = train(
            model,
            source.train,
            options.depth,
            val_loader=source.test,
            epochs=options.epochs,
            rule=for_images(options.rule, source.description["mean"], source.description["std"]),
            form=options.form,
            modules=options.modules,
            memory_budget=options.budget,
            recompute=options.recompute,
            optimizer=optimizer,
            precision=options.precision,
            device=options.device,
            seed=options.seed,
            progress=not options.quiet,
            on_epoch=save,
        )
    except TrainingInterrupted as stop:
        if not history:
            raise
        result, status = stop.result, 130
        print(f"\nauglocal: {stop}", file=sys.stderr)
    finally:
        if not history:  # a run that did not get to its first result leaves nothing behind
            (folder / "settings.json").unlink(missing_ok=True)
            for path in created:
                path.rmdir()
    title = f"{options.model} on {options.data.split(':')[0]}, rule {options.rule}"
    if result.plan.depth:
        title += f", depth {result.plan.depth}"
    if len(result.plan.modules) > 1:
        title += f", {len(result.plan.modules)} local modules"
    report.learning_curve(history, folder / "learning_curve.png", title)
    print(
        f"{title}: test accuracy {history[-1]['val_accuracy']:.2%} after {len(history)} epochs in "
        f"{time.perf_counter() - started:.1f} s, peak memory {format_bytes(result.peak_bytes)}\n"
        f"saved to {folder}: model.pt (a plain state_dict), settings.json, history.json, learning_curve.png"
    )
    return status


def _settings(options, source):
    """What is needed to use model.pt: the options, the versions, the classes and the images' normalisation."""
    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    given.pop("run")
    versions = {"torch": torch.__version__, "auglocal_ext": __version__}
    return {"options": given, "versions": versions, **source.description, "num_classes": source.num_classes}


def _new_folder(options):
    """Makes the run's folder, before anything is trained; returns it and every folder that was made."""
    name = options.name
    if not name:
        cut = f"d{options.depth}" if options.rule == "auglocal" else options.rule
        cut += f"-K{options.modules}" if options.modules else ""
        name = f"{options.model}-{options.data.split(':')[0]}-{cut}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = options.runs / name
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise ValueError(f"{folder} exists already: choose another --name") from None
    return folder, created
