"""What train_cifar.py and train_imagenet.py share: their options, what is checked first, and how they end."""

import json
from pathlib import Path

import records
import torch

from auglocal_ext import rules
from auglocal_ext.cli import errors
from auglocal_ext.cli.checks import check_cut
from auglocal_ext.cli.options import device, number, seed, whole
from auglocal_ext.common.checks import PRECISIONS
from auglocal_ext.common.files import check_writable, save_model


def add_options(parser, batch_size_help, lr_help, **defaults):
    """Adds the options of every recipe; defaults: of model, depth, epochs, and of others where they differ."""
    add = parser.add_argument
    add(
        "--model",
        help="a CIFAR ResNet, resnet20 ... resnet110, or a classifier of torchvision's (default: %(default)s)",
    )
    add("--rule", choices=list(rules.RULES), default="auglocal", help="(default: %(default)s)")
    add("--depth", type=whole(2), help="of AugLocal's aux nets, with their classifier (default: %(default)s)")
    add("--modules", type=whole(1), metavar="K", help="cut into K local modules instead of one per unit")
    add("--batch-size", type=whole(2), help=batch_size_help)
    add("--lr", type=number(above=0), help=lr_help)
    epochs = whole(1, expected="a whole number of at least 1")
    add("--epochs", type=epochs, help="times through the images (default: %(default)s)")
    add("--precision", choices=PRECISIONS, default="fp32", help="of the features (default: %(default)s)")
    here = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=device, default=here, help="cpu, cuda or cuda:N (default here: %(default)s)")
    add("--seed", type=seed, default=0, help="of weights, order and augmentation (default: %(default)s)")
    add("--save", type=Path, metavar="FILE", help="write the model's state_dict there after every epoch")
    add("--results", type=Path, default=Path("results.jsonl"), help="where to add the record (default: %(default)s)")
    add("--quiet", action="store_true", help="no progress bar, no line per epoch")
    parser.set_defaults(**defaults)


def check(options):
    """Raises for what would else be found out after the reading or the training; returns the model, on the meta
    device."""
    model = check_cut(options)
    check_writable(options.results, "--results")
    if options.save:
        check_writable(options.save, "--save")
    return model


def saver(options, model):
    """The `on_epoch` that does what --save says; None without it."""
    return (lambda entry: save_model(options.save, model)) if options.save else None


def add_record(options, made):
    """Adds the record to options.results; where that fails after all, prints it, so that it is not lost."""
    try:
        records.append(options.results, made)
    except OSError:
        print(json.dumps(made))
        raise


def main(program, parse, train, summary):
    """Trains, and prints what came of it.

    Args:
        program: its name, for errors.
        parse: () -> options of the command line.
        train: options -> record, which it has added to options.results.
        summary: options, record -> a sentence.

    Returns:
        The exit status, see `auglocal_ext.cli.errors`.
    """

    def command():
        options = parse()
        made = train(options)
        print(f"{summary(options, made)}; record in {options.results}")
        return 0

    return errors.run(program, command, lost=": no record")
