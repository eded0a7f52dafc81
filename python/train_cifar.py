"""CIFAR-10, SVHN and STL-10 by the paper's recipe; adds one line to a file of results.

    python python/train_cifar.py --dataset cifar10 --download --model resnet32 --rule auglocal --depth 4
    python python/train_cifar.py --dataset svhn --data imagefolder:ROOT --rule bp --epochs 40

SGD with Nesterov momentum 0.9, weight decay 1e-4 on every parameter; CIFAR-10 and SVHN batch 1024, learning rate 0.8;
STL-10, 96x96 images, batch 128, learning rate 0.1; 400 epochs, which the paper gives for the first two and is assumed
for STL-10; the learning rate as `schedule` says, in trainings of less than 100 epochs as `auglocal_ext.optim.cosine`,
which goes to 0 at the end of the last epoch and not before it. Images from a folder are padded, cropped and flipped as
those of --dataset.
"""

import math
import sys
from argparse import RawDescriptionHelpFormatter
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import recipes
import records

import auglocal_ext
from auglocal_ext import data, models, rules
from auglocal_ext.cli.checks import check_image_size
from auglocal_ext.cli.options import Parser
from auglocal_ext.common.memory import format_bytes
from auglocal_ext.optim import cosine, sgd

BATCH_SIZES = {"cifar10": 1024, "svhn": 1024, "stl10": 128}


def schedule(lr):
    """The paper's: cosine per epoch, with a warm-up of w = min(10, epochs // 10) epochs.

    In epoch e = 1..w the learning rate is 0.5 lr (1 + cos(pi e / E)) (e - 1) / w + 0.01 (w + 1 - e) / w, where 0.01 is
    a learning rate, not a share of one; then 0.5 lr (1 + cos(pi e / E)), which is 0 in the last epoch, E.

    Args:
        lr: the learning rate that the factor is of.

    Returns:
        (epoch, epochs) -> factor, for `auglocal_ext.train`.
    """

    def factor(epoch, epochs):
        e, w = int(epoch) + 1, min(10, epochs // 10)
        share = 0.5 * (1 + math.cos(math.pi * e / epochs))
        return share if e > w else share * (e - 1) / w + 0.01 / lr * (w + 1 - e) / w

    return factor


def run(options):
    """Trains as told, and adds the record to options.results; returns it."""
    batch_size = BATCH_SIZES[options.dataset] if options.batch_size is None else options.batch_size
    lr = 0.1 * batch_size / 128 if options.lr is None else options.lr
    cuttable = recipes.check(options)
    torch.manual_seed(options.seed)
    where = options.data or f"{options.dataset}:data"
    source = data.load(
        where,
        batch_size,
        device=options.device,
        download=options.download,
        progress=not options.quiet,
        augmentation=data.AUGMENTATIONS[options.dataset],
    )
    if not isinstance(source.train, data.DeviceLoader):
        raise ValueError(
            f"images must be of up to {data.SMALL} pixels, given larger ones in {where}: train on these with "
            f"train_imagenet.py"
        )
    check_image_size(cuttable, *source.description["image_size"], "--model, or larger images")
    model = models.create(options.model, source.num_classes)
    result = auglocal_ext.train(
        model,
        source.train,
        options.depth,
        val_loader=source.test,
        epochs=options.epochs,
        rule=rules.for_images(options.rule, source.description["mean"], source.description["std"]),
        form=options.form,
        modules=options.modules,
        optimizer=partial(sgd(batch_size), lr=lr),
        schedule=schedule(lr) if options.epochs >= 100 else cosine,
        precision=options.precision,
        device=options.device,
        seed=options.seed,
        progress=not options.quiet,
        on_epoch=recipes.saver(options, model),
    )
    auglocal, one_module = options.rule == "auglocal", options.rule in ("bp", "checkpoint")
    settings = {
        "dataset": options.dataset,
        "data": where,
        "model": options.model,
        "rule": options.rule,
        "depth": options.depth if auglocal else None,  # None: no choice of this rule, whatever was given
        "modules": None if one_module else options.modules,
        "form": options.form if auglocal else None,
        "epochs": options.epochs,
        "batch_size": batch_size,
        "lr": lr,
        "precision": options.precision,
        "seed": options.seed,
        "train_images": len(source.train.images),
        "test_images": len(source.test.images),
    }
    held = sum(loader.images.nbytes + loader.labels.nbytes for loader in (source.train, source.test))
    on_cuda = torch.device(options.device).type == "cuda"
    made = records.record(settings, options.device, result, data_bytes=held if on_cuda else 0)
    recipes.add_record(options, made)
    return made


def parse(arguments=None):
    """The options of `run`."""
    parser = Parser("train_cifar", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", choices=BATCH_SIZES, default="cifar10", help="the recipe, and the images (default: %(default)s)")
    add("--data", metavar="SOURCE", help="where they are, as imagefolder:ROOT or fake:N (default: DATASET:data)")
    add("--download", action="store_true", help="fetch the images if they are not there")
    add("--form", choices=rules.FORMS, help="of AugLocal's cut (default: what its authors used for the network)")
    about = "(default: 1024, for stl10 128)", "learning rate (default: 0.1 x batch size / 128)"
    recipes.add_options(parser, *about, model="resnet32", depth=4, epochs=400)
    return parser.parse_args(arguments)


def main(arguments=None):
    """Runs the program; returns the exit status."""

    def summary(options, made):
        accuracy = made["accuracy"]
        return (
            f"{options.model} on {options.dataset}, rule {options.rule}, {made['local_modules']} local modules: test "
            f"accuracy {accuracy['last']:.2%}, best {accuracy['best']:.2%}, after {options.epochs} epochs in "
            f"{made['seconds']:.1f} s of training, peak memory {format_bytes(made['peak_bytes'])}"
        )

    return recipes.main("train_cifar", lambda: parse(arguments), run, summary)


if __name__ == "__main__":
    sys.exit(main())
