"""The command line: `auglocal train`, `plan` and `resume`; also `python -m auglocal_ext`.

Commands are imported when they run, so that their help does not wait for torch.
"""

from importlib import import_module
from pathlib import Path

from .errors import run
from .names import FORMS, PRECISIONS, RULES
from .options import Parser, device, number, seed, size, whole

__all__ = ["main"]


def main(arguments=None):
    """Runs the command line; returns the exit status: see `errors`."""

    def command():
        options = _parser().parse_args(arguments)
        module, name = options.run
        return getattr(import_module(module, __package__), name)(options)

    return run("auglocal", command)


def _parser():
    parser = Parser(prog="auglocal", description="Trains CNN backbones by supervised local learning (AugLocal).")
    commands = parser.add_subparsers(required=True, metavar="train|plan|resume")

    for command in (_add_train(commands), _add_plan(commands)):
        _add_cut(command)
    _add_resume(commands)
    return parser


def _add_train(commands):
    training = commands.add_parser("train", help="train a model", description="Trains a model; leaves runs/NAME/.")
    training.set_defaults(run=(".train", "train_command"))
    add = training.add_argument
    add(
        "--data",
        default="digits",
        help="digits, cifar10:ROOT, svhn:ROOT, stl10:ROOT, imagefolder:ROOT or fake:N (default: %(default)s)",
    )
    add("--download", action="store_true", help="fetch CIFAR-10, SVHN or STL-10 if it is not at ROOT")
    epochs = whole(1, expected="a whole number of at least 1")
    add("--epochs", type=epochs, default=15, help="times through the training data (default: %(default)s)")
    add("--batch-size", type=whole(2), default=128, help="images in a step (default: %(default)s)")
    add("--lr", type=number(0), help="learning rate (default: 0.1 x batch size / 128)")
    add("--device", type=device, help="cpu, cuda or cuda:N (default: cuda where there is one, else cpu)")
    add("--seed", type=seed, default=0, help="of weights, order and augmentation (default: %(default)s)")
    add("--workers", type=whole(0, 1024), default=0, help="processes that read large images (default: %(default)s)")
    add("--name", help="of the run's folder (default: made of the settings and the time)")
    add("--runs", type=Path, default=Path("runs"), help="where runs' folders go (default: %(default)s)")
    add("--quiet", action="store_true", help="no progress bar, no line per epoch")
    return training


def _add_plan(commands):
    planning = commands.add_parser("plan", help="show how a model is cut", description="Shows how a model is cut.")
    planning.set_defaults(run=(".plan", "plan_command"))
    add = planning.add_argument
    add("--image-size", type=whole(1, 10_000), default=32, help="pixels along a side (default: %(default)s)")
    add("--batch-size", type=whole(1), default=128, help="images in a step (default: %(default)s)")
    add("--num-classes", type=whole(1), default=10, help="outputs of the model (default: %(default)s)")
    add("--picture", type=Path, metavar="FILE", help="draw live memory over the step, as PNG, PDF or SVG")
    add("--front", type=Path, metavar="FILE", help="with --budget: draw memory against arithmetic for every K")
    return planning


def _add_resume(commands):
    resuming = commands.add_parser(
        "resume", help="go on with a run", description="Goes on with a run from its last whole epoch, by its settings."
    )
    resuming.set_defaults(run=(".train", "resume_command"))
    add = resuming.add_argument
    add("run_folder", type=Path, metavar="RUN", help="its folder, runs/NAME")
    add("--epochs", type=whole(1), help="times through the training data in all (default: as the run was begun)")
    add("--device", type=device, help="cpu, cuda or cuda:N (default: as the run was begun)")
    add("--quiet", action="store_true", help="no progress bar, no line per epoch")


def _add_cut(command):
    """What is trained, and how it is cut."""
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
        type=whole(2, words=("auto",)),
        default=4,
        help="layers of an auxiliary net and its classifier; auto: what --budget allows (default: %(default)s)",
    )
    add(
        "--form",
        choices=FORMS,
        help="cifar: aux nets less deep toward the output, the last DEPTH units one module; imagenet: one module "
        "per unit, aux nets of one depth (default: cifar for resnet20 ... resnet110, else imagenet)",
    )
    add("--modules", type=whole(1), metavar="K", help="cut into K local modules instead")
    add("--precision", choices=PRECISIONS, default="fp32", help="of the features (default: %(default)s)")
    add("--recompute", action="store_true", help="run convolutions again in the backward instead of keeping theirs")
    add(
        "--budget",
        type=size,
        metavar="SIZE",
        help="bytes a step may take, such as 6GB: cut where it fits at the least work",
    )
