"""CIFAR-10, SVHN and STL-10 by the paper's recipe; adds one line to a file of results.

    python python/train_cifar.py --dataset cifar10 --download --model resnet32 --rule auglocal --depth 4
    python python/train_cifar.py --dataset svhn --data imagefolder:ROOT --rule bp --epochs 40

SGD with Nesterov momentum 0.9, weight decay 1e-4 on every parameter; CIFAR-10 and SVHN batch 1024, learning rate 0.8;
STL-10, 96x96 images, batch 128, learning rate 0.1; 400 epochs, which the paper gives for the first two and is assumed
for STL-10; the learning rate as `auglocal_ext.optim.paper` says, in trainings of less than 100 epochs as `cosine`
there, which goes to 0 at the end of the last epoch and not before it. Images from a folder are padded, cropped and
flipped as those of --dataset.
"""

import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import recipes
import records

from auglocal_ext import data
from auglocal_ext.cli.job import make_model, read_data
from auglocal_ext.cli.options import Parser
from auglocal_ext.cli.training_options import settled
from auglocal_ext.common.memory import format_bytes
from auglocal_ext.common.messages import plural

DATASETS = ("cifar10", "svhn", "stl10")


def run(options):
    """Trains as told, and adds the record to options.results; returns it."""
    cuttable = recipes.check(options)
    source = read_data(options, cuttable)
    if not isinstance(source.train, data.DeviceLoader):
        raise ValueError(
            f"images must be of up to {data.SMALL} pixels, given larger ones in {options.data}: train on these with "
            f"train_imagenet.py"
        )
    model = make_model(options, source, options.weights)
    result = recipes.train(options, model, source)
    if result is None:
        return None
    auglocal, one_module = options.rule == "auglocal", options.rule in ("bp", "checkpoint")
    settings = {
        "dataset": options.dataset,
        "data": options.data,
        "model": options.model,
        "rule": options.rule,
        "depth": options.depth if auglocal else None,  # None: no choice of this rule, whatever was given
        "modules": None if one_module else options.modules,
        "form": options.form if auglocal else None,
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "lr": options.lr,
        "precision": options.precision,
        "seed": options.seed,
        "train_images": len(source.train.images),
        "test_images": len(source.test.images),
    }
    made = records.record(settings, options.device, result)
    return recipes.add_record(options, made, model, source)


def parse(arguments=None):
    """The options of `run`."""
    parser = Parser("train_cifar", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    _add_options(parser)
    given = vars(parser.parse_args(arguments))
    return settled(given, _add_options, preset=given["dataset"])


def _add_options(parser):
    what = "the recipe, and the images (default: %(default)s)"
    parser.add_argument("--dataset", choices=DATASETS, default="cifar10", help=what)
    recipes.add_options(parser, "cifar10", "where they are, as imagefolder:ROOT or fake:N (default: DATASET:data)")


def main(arguments=None):
    """Runs the program; returns the exit status."""

    def summary(options, made):
        accuracy = made["accuracy"]
        return (
            f"{options.model} on {options.dataset}, rule {options.rule}, {made['local_modules']} local modules: test "
            f"accuracy {accuracy['last']:.2%}, best {accuracy['best']:.2%}, "
            f"after {plural(len(made['history']), 'epoch')} in {made['seconds']:.1f} s of training, "
            f"peak memory {format_bytes(made['peak_bytes'])}"
        )

    return recipes.main("train_cifar", lambda: parse(arguments), run, summary)


if __name__ == "__main__":
    sys.exit(main())
