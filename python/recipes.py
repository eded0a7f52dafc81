"""What train_cifar.py and train_imagenet.py share: their options, what is checked first, and how they end."""

import sys
from pathlib import Path

import records
import torch

from auglocal_ext import rules
from auglocal_ext.plan import PRECISIONS


def add_options(parser, **defaults):
    """Adds the options of every recipe; defaults: of model, depth, epochs, and of others where they differ."""
    add = parser.add_argument
    add(
        "--model",
        help="a CIFAR ResNet, resnet20 ... resnet110, or a classifier of torchvision's (default: %(default)s)",
    )
    add("--rule", choices=list(rules.RULES), default="auglocal", help="(default: %(default)s)")
    add("--depth", type=int, help="of AugLocal's aux nets, with their classifier (default: %(default)s)")
    add("--modules", type=int, metavar="K", help="cut into K local modules instead of one per unit")
    add("--epochs", type=int, help="times through the images (default: %(default)s)")
    add("--precision", choices=PRECISIONS, default="fp32", help="of the features (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default here: %(default)s)")
    add("--seed", type=int, default=0, help="of weights, order and augmentation (default: %(default)s)")
    add("--save", type=Path, metavar="FILE", help="write the model's state_dict there after every epoch")
    add("--results", type=Path, default=Path("results.jsonl"), help="where to add the record (default: %(default)s)")
    add("--quiet", action="store_true", help="no progress bar, no line per epoch")
    parser.set_defaults(**defaults)


def check(options, batch_size, lr):
    """Raises for what would else be found out after the training, or not at all."""
    if batch_size < 2:
        raise ValueError(f"--batch-size must be at least 2, given {batch_size}")
    if not lr > 0:
        raise ValueError(f"--lr must be above 0, given {lr}")
    records.check_writable(options.results, "--results")
    if options.save:
        records.check_writable(options.save, "--save")


def saver(options, model):
    """The `on_epoch` that does what --save says; None without it."""
    return (lambda entry: torch.save(model.state_dict(), options.save)) if options.save else None


def main(program, train, options, summary):
    """Trains, and prints what came of it.

    Args:
        program: its name, for errors.
        train: options -> record, which it has added to options.results.
        options: of the command line.
        summary: record -> a sentence.

    Returns:
        The exit status.
    """
    try:
        made = train(options)
    except (ValueError, TypeError, ImportError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"\n{program}: {str(stopped) or 'interrupted'}: no record", file=sys.stderr)
        return 130
    print(f"{summary(made)}; record in {options.results}")
    return 0
