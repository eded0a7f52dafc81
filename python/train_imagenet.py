"""ImageNet by the paper's recipe, or any folder of large images; adds one line to a file of results.

    python python/train_imagenet.py --data ROOT --model resnet34 --rule auglocal --depth 5 --precision bf16 --workers 16
    python python/train_imagenet.py --data fake:512 --epochs 1 --batch-size 32       without data: does it run, how fast

Images: a random part resized to 224x224 and flipped for training, resized to 256 and cropped to 224 for testing. SGD
with Nesterov momentum 0.9, weight decay 1e-4; 200 epochs, batch 1024, learning rate 0.4 (in proportion for another
batch), cosine. The paper gives this for ResNet-34. What it leaves open is chosen the same: a warm-up as in its CIFAR
recipe (`auglocal_ext.optim.cosine`), and ResNet-101 and VGG13 trained as ResNet-34 is.
"""

import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import recipes
import records

from auglocal_ext import data
from auglocal_ext.cli.job import make_model
from auglocal_ext.cli.options import Parser
from auglocal_ext.cli.training_options import settled
from auglocal_ext.common.memory import format_bytes
from auglocal_ext.common.messages import plural
from auglocal_ext.common.torchvision import import_torchvision

MOST_FAKE = 10_000_000  # they are made one by one, but their order is held in memory


def load(source, batch_size, **options):
    """Data of ROOT, which has train/ and val/ (or test/) with a folder of images per class, or of fake:N: N training
    images of noise, 224x224 in 1,000 classes, and a fifth as many for testing. options: see `data.large_images`."""
    kind, _, count = source.partition(":")
    if kind != "fake":
        folders = data.image_folders(source)
        return data.large_images(*folders, batch_size, folders[0].classes, **options)
    if not count.isdecimal() or (len(count) < 20 and int(count) < 10):
        raise ValueError(f"--data must be a folder or fake:N (N at least 10), given {source!r}")
    if len(count) > 8 or int(count) > MOST_FAKE:
        raise ValueError(f"--data fake:N must have at most {MOST_FAKE:,} images, given {source!r}")
    fake, total = import_torchvision("data 'fake:N'").datasets.FakeData, int(count)
    image = {"image_size": (3, data.LARGE_SIDE, data.LARGE_SIDE), "num_classes": 1000}
    parts = fake(total, **image), fake(total // 5, **image, random_offset=total)
    return data.large_images(*parts, batch_size, [str(label) for label in range(1000)], **options)


def train(options):
    """Trains as told; returns the record."""
    recipes.check(options)
    side = options.image_size or data.LARGE_SIDE
    more = {"workers": options.workers, "image_size": side, "val_split": options.val_split}
    source = load(options.data, options.batch_size, **more)
    model = make_model(options, source, options.weights)
    result = recipes.train(options, model, source)
    if result is None:
        return None
    settings = {
        "dataset": "imagenet",
        "data": options.data,
        "model": options.model,
        "rule": options.rule,
        "depth": options.depth if options.rule == "auglocal" else None,
        "modules": options.modules,
        "budget": options.budget,
        "recompute": options.recompute,
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "lr": options.lr,
        "precision": options.precision,
        "seed": options.seed,
        "train_images": len(source.train.dataset),
        "test_images": len(source.test.dataset),
        "image_size": side,
    }
    made = records.record(settings, options.device, result)
    return recipes.add_record(options, made, model, source)


def parse(arguments=None):
    """The options of `train`."""
    parser = Parser("train_imagenet", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    _add_options(parser)
    given = vars(parser.parse_args(arguments))
    if not given.keys() & {"data", "config"}:
        parser.error("--data must be given: a folder with train/ and val/, or fake:N")
    return settled(given, _add_options, preset="imagenet")


def _add_options(parser):
    data = "ROOT with train/ and val/ or test/, a folder of images per class; or fake:N"
    recipes.add_options(parser, "imagenet", data)


def main(arguments=None):
    """Runs the program; returns the exit status."""

    def summary(options, made):
        top5 = f", top-5 {made['top5']['last']:.2%}" if "top5" in made else ""
        return (
            f"{options.model}, rule {options.rule}, {made['local_modules']} local modules: top-1 "
            f"{made['accuracy']['last']:.2%}{top5} after {plural(len(made['history']), 'epoch')} in "
            f"{made['seconds']:.1f} s of training, peak memory {format_bytes(made['peak_bytes'])}"
        )

    return recipes.main("train_imagenet", lambda: parse(arguments), train, summary)


if __name__ == "__main__":
    sys.exit(main())
