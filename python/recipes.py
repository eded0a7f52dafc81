"""What train_cifar.py and train_imagenet.py share: their options, what is checked first, and how they end."""

import json
from pathlib import Path

import records

import auglocal_ext
from auglocal_ext.cli import errors, job
from auglocal_ext.cli.options import number, whole
from auglocal_ext.cli.presets import defaults_of
from auglocal_ext.cli.training_options import add_training, told
from auglocal_ext.common.files import check_writable, save_model

# What decides the outcome too; in a record where it is not as the recipe has it.
MORE_SETTINGS = (
    "optimizer",
    "momentum",
    "weight_decay",
    "norm_weight_decay",
    "bias_weight_decay",
    "schedule",
    "warmup",
    "label_smoothing",
    "mixup",
    "cutmix",
    "weights",
    "val_split",
    "image_size",
    "budget",
    "recompute",
    "auxiliary",
    "prefer",
    "patience",
    "nonfinite",
    "accumulate",
    "clip_grad_norm",
    "clip_grad_value",
    "clip",
    "model_ema",
    "model_ema_decay",
    "freeze",
    "freeze_norms",
)


def add_options(parser, preset, data):
    """Adds the options of every recipe; preset: whose values are the defaults; data: the help of --data."""
    add_training(parser, depth=whole(2), lr=number(above=0), data=data, preset=preset)
    add = parser.add_argument
    add("--save", type=Path, metavar="FILE", help="write the model's state_dict there after every epoch")
    add("--checkpoint", type=Path, metavar="FOLDER", help="go on from the checkpoint there, and keep one there")
    add("--results", type=Path, default=Path("results.jsonl"), help="where to add the record (default: %(default)s)")


def check(options):
    """Raises for what would else be found out after the reading or the training; returns the model, on the meta
    device."""
    model = job.check(options, options.weights)
    check_writable(options.results, "--results")
    if options.save:
        check_writable(options.save, "--save")
    return model


def train(options, model, source):
    """Trains as told, with what --save and --checkpoint say; returns the TrainResult, or None where --max-seconds
    stopped it: what is not whole is no record."""
    on_epoch = (lambda entry: save_model(options.save, model)) if options.save else None
    result = job.train_as_told(options, model, source, on_epoch=on_epoch, checkpoint=options.checkpoint)
    return None if result.stopped == "max_seconds" else result


def add_record(options, made, model, source):
    """Adds the record to options.results, and returns it; where that fails after all, prints it, so that it is not
    lost. What the recipe has otherwise is added to its settings, and with --val-split the accuracy on the test images.
    """
    usual, given = defaults_of(options.preset), vars(options)
    changed = {name: given[name] for name in MORE_SETTINGS if given[name] != usual[name]}
    changed = {name: str(value) if isinstance(value, Path) else value for name, value in changed.items()}
    made["settings"] = changed | made["settings"]
    if options.val_split:
        made["test_accuracy"] = auglocal_ext.evaluate(model, source.test, precision=options.precision)
    try:
        records.append(options.results, made)
    except OSError:
        print(json.dumps(made))
        raise
    return made


def main(program, parse, train, summary):
    """Trains, and prints what came of it.

    Args:
        program: its name, for errors.
        parse: () -> options of the command line.
        train: options -> record, which it has added to options.results, or None: see `train`.
        summary: options, record -> a sentence.

    Returns:
        The exit status, see `auglocal_ext.cli.errors`.
    """

    def command():
        options = parse()
        if not options.quiet:
            print(told(options))
        made = train(options)
        if made is None:
            goes_on = f"the same command goes on, from {options.checkpoint}"
            remedy = goes_on if options.checkpoint else "with --checkpoint FOLDER it could be gone on with"
            print(f"stopped after --max-seconds, no record: {remedy}")
            return 0
        print(f"{summary(options, made)}; record in {options.results}")
        return 0

    return errors.run(program, command, lost=": no record")
