"""The command line, `auglocal`; also `python -m auglocal_ext`.

Commands are imported when they run, so that their help does not wait for torch.
"""

import os
import re
import sys
from argparse import SUPPRESS
from importlib import import_module
from pathlib import Path

from .. import __version__
from .errors import run
from .names import FREE, PRECISIONS
from .options import Parser, device, duration, rate, whole
from .training_options import add_cut, add_run

__all__ = ["main", "parser_of_all"]


def main(arguments=None):
    """Runs the command line; returns the exit status: see `errors`."""

    if sys.stderr is None:  # closed: what would go there is lost, and nothing else
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115

    def command():
        options = parser_of_all().parse_args(arguments)
        module, name = options.run
        del options.run
        return getattr(import_module(module, __package__), name)(options)

    return run("auglocal", command)


def parser_of_all():
    """The parser of all commands."""
    parser = Parser("auglocal", description="Trains image classifiers by supervised local learning (AugLocal).")
    parser.add_argument("--version", action="version", version=f"auglocal_ext {__version__}")
    names = "train|resume|evaluate|analyze|plan|calibrate|models|export"
    commands = parser.add_subparsers(required=True, metavar=names)
    _add_train(commands)
    _add_resume(commands)
    _add_evaluate(commands)
    _add_analyze(commands)
    _add_plan(commands)
    _add_calibrate(commands)
    _add_models(commands)
    _add_export(commands)
    return parser


def _add_train(commands):
    training = commands.add_parser("train", help="train a model", description="Trains a model; leaves runs/NAME/.")
    training.set_defaults(run=(".train", "train_command"))
    add_run(training)
    resume = "go on with this run, by its settings: as `auglocal resume RUN`"
    training.add_argument("--resume", type=Path, metavar="RUN", default=SUPPRESS, help=resume)


def _add_resume(commands):
    resuming = commands.add_parser(
        "resume",
        help="go on with a run",
        description="Goes on with a run from its last checkpoint, by its settings. What may be set anew: --epochs, "
        "these options.",
    )
    resuming.set_defaults(run=(".train", "resume_command"))
    resuming.add_argument("run_folder", type=Path, metavar="RUN", help="its folder, runs/NAME")
    add_run(resuming)
    for action in resuming._actions:  # taken, but only as the run has it
        if action.dest not in ("help", "run_folder", *FREE):
            action.help = SUPPRESS
        elif action.help and "(default: " in action.help:
            action.help = re.sub(r" \(default: .*\)", "", action.help) + " (default: as the run has it)"


def _add_evaluate(commands):
    evaluating = commands.add_parser(
        "evaluate",
        help="test a trained model",
        description="Prints a trained model's loss and accuracies on test images, normalised as those that it was "
        "trained on, and leaves evaluation.json and confusion_matrix.png in the run's folder.",
    )
    evaluating.set_defaults(run=(".evaluate", "evaluate_command"))
    add = evaluating.add_argument
    add("weights", type=Path, metavar="RUN", help="a run's folder, or a file with a state_dict, with --model")
    add("--model", help="what a file of weights is of, as --model of auglocal train")
    add("--data", metavar="SOURCE", help="as of auglocal train (default: what the run was trained on; else digits)")
    add("--download", action="store_true", help="fetch the images if they are not at ROOT")
    add("--batch-size", "-b", type=whole(1), help="images at a time (default: as in training)")
    add("--workers", "-j", type=whole(0, 1024), help="processes that read large images (default: as in training)")
    add("--precision", choices=PRECISIONS, help="of the features (default: as in training)")
    add("--device", type=device, help="cpu, cuda or cuda:N (default: cuda where there is one, else cpu)")
    add("--out", type=Path, metavar="FOLDER", help="where the files go (default: the run's; else here)")
    add("--quiet", action="store_true", help="no progress bar")


def _add_analyze(commands):
    analyzing = commands.add_parser(
        "analyze",
        help="compare what trained models' units have learnt",
        description="Compares the units of trained models: how alike their features are on test images (linear CKA, "
        "unbiased), of each run with the reference and with itself; what a linear probe reads there; how accurate each "
        "local module is. Leaves report.html, its pictures and analysis.json.",
    )
    analyzing.set_defaults(run=(".analyze", "analyze_command"))
    add = analyzing.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder")
    add("--data", metavar="SOURCE", help="as of auglocal train (default: what the first run was trained on)")
    add("--download", action="store_true", help="fetch the images if they are not at ROOT")
    images = "use so many test images and so many training images, drawn at random (default: 10,000)"
    add("--images", type=whole(4, 10**9), default=10_000, metavar="N", help=images)
    batch = "images at a time; CKA holds B x B numbers for every unit (default: %(default)s)"
    add("--batch-size", "-b", type=whole(4), default=128, metavar="B", help=batch)
    add("--reference", type=Path, metavar="RUN", help="what the runs are compared with (default: the first one)")
    add("--no-probes", action="store_true", help="no linear probes, which take longest")
    add("--workers", "-j", type=whole(0, 1024), help="processes that read large images (default: as in training)")
    add("--device", type=device, help="cpu, cuda or cuda:N (default: cuda where there is one, else cpu)")
    add("--out", type=Path, metavar="FOLDER", help="where the files go (default: analysis in the first run's folder)")
    add("--quiet", action="store_true", help="no progress bars")


def _add_models(commands):
    listing = commands.add_parser(
        "models",
        help="list the models that can be cut",
        description="Lists the CIFAR ResNets and the classifiers of torchvision that can be cut, or with a PATTERN of "
        "timm:NAME those of timm, with their units (the most local modules) and their parameters with 1,000 "
        "classes, of a CIFAR ResNet with 10.",
    )
    listing.set_defaults(run=(".models", "models_command"))
    patterns = "of names, as 'resnet*' or 'timm:resnet*'"
    listing.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help=patterns)


def _add_export(commands):
    exporting = commands.add_parser(
        "export",
        help="write a trained model as ONNX",
        description="Writes a run's model as ONNX, for batches of any size of images (N, 3, H, W), normalised by mean "
        "and std of the run's settings.json.",
    )
    exporting.set_defaults(run=(".export", "export_command"))
    exporting.add_argument("run_folder", type=Path, metavar="RUN", help="its folder, runs/NAME")
    exporting.add_argument("--out", type=Path, metavar="FILE", help="(default: model.onnx in the run's folder)")


def _add_plan(commands):
    text = "how a model is cut, and what a step needs in memory and arithmetic"
    planning = commands.add_parser("plan", help=f"show {text}", description=f"Shows {text}.")
    planning.set_defaults(run=(".plan", "plan_command"))
    add = planning.add_argument
    add("--image-size", type=whole(1, 10_000), default=32, help="pixels along a side (default: %(default)s)")
    add("--batch-size", "-b", type=whole(1), default=128, help="images in a step (default: %(default)s)")
    add("--num-classes", type=whole(1), default=10, help="outputs of the model (default: %(default)s)")
    add("--brief", action="store_true", help="in a few lines")
    picture = "draw live memory over the step, as PNG, PDF or SVG; with --stages what each rank does when"
    add("--picture", type=Path, metavar="FILE", help=picture)
    add("--front", type=Path, metavar="FILE", help="with --budget: draw memory against arithmetic for every K")
    stages = "predict trainings by up to so many ranks: local learning, and pipelines of backpropagation"
    add("--stages", type=whole(2, 256), metavar="N", help=stages)
    bandwidth = "with --stages: bytes a second from one rank to another, such as 25GB/s (the default)"
    add("--bandwidth", type=rate, metavar="RATE", help=bandwidth)
    latency = "with --stages: what a message takes at least, such as 5us (the default)"
    add("--latency", type=duration, metavar="TIME", help=latency)
    speed = "with --stages: of a rank, its multiply-accumulates and its memory's bytes a second, such as 60T 2TB/s "
    speed += "(default: as this machine's)"
    add("--speed", type=rate, nargs=2, metavar=("MACS", "RATE"), help=speed)
    planning.set_defaults(**add_cut(planning))


def _add_calibrate(commands):
    calibrating = commands.add_parser(
        "calibrate",
        help="measure what steps take here",
        description="Measures for about a minute what the instructions of a training step take on this machine, by "
        "which plans predict its time. Leave the machine idle meanwhile. The figures stay in the user's cache folder; "
        "they hold for this device, number of threads, precision and version of torch.",
    )
    calibrating.set_defaults(run=(".calibrate", "calibrate_command"))
    add = calibrating.add_argument
    add("--device", type=device, help="cpu, cuda or cuda:N (default: cuda where there is one, else cpu)")
    add("--precision", choices=PRECISIONS, default="fp32", help="of the features (default: %(default)s)")
