"""The command line, `auglocal`; also `python -m auglocal_ext`.

Commands are imported when they run, so that their help does not wait for torch.
"""

from argparse import SUPPRESS
from importlib import import_module
from pathlib import Path

from .. import __version__
from .errors import run
from .options import Parser, whole
from .training_options import add_cut, add_run

__all__ = ["main"]


def main(arguments=None):
    """Runs the command line; returns the exit status: see `errors`."""

    def command():
        options = _parser().parse_args(arguments)
        module, name = options.run
        del options.run
        return getattr(import_module(module, __package__), name)(options)

    return run("auglocal", command)


def _parser():
    parser = Parser("auglocal", description="Trains CNN backbones by supervised local learning (AugLocal).")
    parser.add_argument("--version", action="version", version=f"auglocal_ext {__version__}")
    commands = parser.add_subparsers(required=True, metavar="train|resume|plan")
    _add_train(commands)
    _add_resume(commands)
    _add_plan(commands)
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
        "--device, --workers, --download, --max-seconds, --patience, --checkpoint-minutes, --quiet.",
    )
    resuming.set_defaults(run=(".train", "resume_command"))
    resuming.add_argument("run_folder", type=Path, metavar="RUN", help="its folder, runs/NAME")
    add_run(resuming)


def _add_plan(commands):
    planning = commands.add_parser("plan", help="show how a model is cut", description="Shows how a model is cut.")
    planning.set_defaults(run=(".plan", "plan_command"))
    add = planning.add_argument
    add("--image-size", type=whole(1, 10_000), default=32, help="pixels along a side (default: %(default)s)")
    add("--batch-size", "-b", type=whole(1), default=128, help="images in a step (default: %(default)s)")
    add("--num-classes", type=whole(1), default=10, help="outputs of the model (default: %(default)s)")
    add("--brief", action="store_true", help="in a few lines")
    add("--picture", type=Path, metavar="FILE", help="draw live memory over the step, as PNG, PDF or SVG")
    add("--front", type=Path, metavar="FILE", help="with --budget: draw memory against arithmetic for every K")
    planning.set_defaults(**add_cut(planning))
