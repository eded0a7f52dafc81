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
    except (ValueError, TypeError, ImportError, FileNotFoundError, FloatingPointError) as error:
        print(f"auglocal: error: {error}", file=sys.stderr)
        return 2


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
    source = data.load(options.data, options.batch_size, workers=options.workers, download=options.download)
    model = models.create(options.model, source.num_classes)
    folder = _folder(options)
    history = []

    def save(entry):
        # After every epoch, so that no interruption costs more than one.
        folder.mkdir(parents=True, exist_ok=True)
        history.append(entry)
        (folder / "history.json").write_text(json.dumps(history, indent=1) + "\n")
        torch.save(model.state_dict(), folder / "model.pt")

    optimizer = partial(sgd(options.batch_size), lr=options.lr) if options.lr else None
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
        result, status = stop.result, 130
        print(f"\n{stop}", file=sys.stderr)
    if not history:
        return status
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


def _folder(options):
    name = options.name
    if not name:
        cut = (
            "bp" if options.rule == "bp" else f"d{options.depth}" + (f"-K{options.modules}" if options.modules else "")
        )
        name = f"{options.model}-{options.data.split(':')[0]}-{cut}-{time.strftime('%Y%m%d-%H%M%S')}"
    if (options.runs / name).exists():
        raise ValueError(f"{options.runs / name} exists already: choose another --name")
    return options.runs / name
