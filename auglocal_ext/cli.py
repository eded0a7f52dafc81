"""The command line: `auglocal train` and `auglocal plan`; also `python -m auglocal_ext`."""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

import torch

from . import data, models, report
from .loop import TrainingInterrupted, train
from .memory import format_bytes
from .optim import sgd
from .plan import plan
from .rules import FORMS, RULES
from .trainer import PRECISIONS

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
    formatter = argparse.ArgumentDefaultsHelpFormatter

    training = commands.add_parser("train", help="train a model", formatter_class=formatter)
    training.set_defaults(run=_train)
    training.add_argument("--data", default="digits", help="digits, cifar10:ROOT, imagefolder:ROOT or fake:N")
    training.add_argument("--download", action="store_true", help="fetch CIFAR-10 if it is not at ROOT")
    training.add_argument("--epochs", type=int, default=15)
    training.add_argument("--batch-size", type=int, default=128)
    training.add_argument("--lr", type=float, help="learning rate (default: 0.1 x batch size / 128)")
    training.add_argument("--precision", choices=PRECISIONS, default="fp32")
    training.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--workers", type=int, default=0, help="processes that read large images")
    training.add_argument("--name", help="of the run's folder (default: made of the settings and the time)")
    training.add_argument("--runs", type=Path, default=Path("runs"), help="where runs' folders go")
    training.add_argument("--quiet", action="store_true", help="no progress bar, no line per epoch")

    planning = commands.add_parser("plan", help="show how a model is cut", formatter_class=formatter)
    planning.set_defaults(run=_plan)
    planning.add_argument("--image-size", type=int, default=32, help="pixels along a side")
    planning.add_argument("--batch-size", type=int, default=128)
    planning.add_argument("--num-classes", type=int, default=10)

    for command in (training, planning):
        command.add_argument("--model", default="resnet20", help="resnet20 ... resnet110, or a torchvision ResNet")
        command.add_argument("--rule", choices=RULES, default="auglocal")
        command.add_argument("--depth", type=int, default=4, help="layers of an auxiliary net, its classifier counted")
        command.add_argument("--form", choices=FORMS, help="of the AugLocal rule (default: by model)")
        command.add_argument("--modules", type=int, metavar="K", help="cut into K local modules (default: by form)")
    return parser


def _plan(options):
    model = models.create(options.model, options.num_classes)
    shape = (options.batch_size, 3, options.image_size, options.image_size)
    print(plan(model, shape, options.depth, rule=options.rule, form=options.form, modules=options.modules))
    return 0


def _train(options):
    if options.batch_size < 2:
        raise ValueError(f"--batch-size must be at least 2, given {options.batch_size}")
    torch.manual_seed(options.seed)
    reading = {"workers": options.workers, "download": options.download, "progress": not options.quiet}
    source = data.load(options.data, options.batch_size, **reading)
    model = models.create(options.model, source.num_classes)
    folder, created = _new_folder(options)
    history = []

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
            rule=options.rule,
            form=options.form,
            modules=options.modules,
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
            for path in created:
                path.rmdir()
    title = f"{options.model} on {options.data.split(':')[0]}, rule {options.rule}"
    if options.rule != "bp":
        title += f", depth {options.depth}, {len(result.plan.modules)} local modules"
    report.learning_curve(history, folder / "learning_curve.png", title)
    print(
        f"{title}: test accuracy {history[-1]['val_accuracy']:.2%} after {len(history)} epochs in "
        f"{time.perf_counter() - started:.1f} s, peak memory {format_bytes(result.peak_bytes)}\n"
        f"saved to {folder}: model.pt (a plain state_dict), history.json, learning_curve.png"
    )
    return status


def _new_folder(options):
    """Makes the run's folder, before anything is trained; returns it and every folder that was made."""
    name = options.name
    if not name:
        cut = (
            "bp" if options.rule == "bp" else f"d{options.depth}" + (f"-K{options.modules}" if options.modules else "")
        )
        name = f"{options.model}-{options.data.split(':')[0]}-{cut}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = options.runs / name
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise ValueError(f"{folder} exists already: choose another --name") from None
    return folder, created
