"""Does each of torchvision's families learn? Short trainings of two local modules with light nets on real images.

    python python/train_backbones.py --data ROOT [--json FILE] [NAME ...]

ROOT has one folder of images per class, of which 2,000 are taken, as many of each, resized where a network needs it.
AdamW, two epochs of batches of 25, or what SETTINGS tells. Each local module's accuracy in the last epoch has to be
above chance by three standard errors. FILE gets a line a network; those that are there already are left out.
"""

import json
import math
import sys
import time
import warnings
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

import torch

import auglocal_ext
from auglocal_ext.cli import errors
from auglocal_ext.cli.options import Parser
from auglocal_ext.common.files import check_writable
from auglocal_ext.common.torchvision import import_torchvision
from auglocal_ext.data import DeviceLoader, mean_and_std
from auglocal_ext.data.images import resized

sys.path.insert(0, str(Path(__file__).parent))
import records

IMAGES, CLASSES = 2000, 10
USUAL = {"lr": 1e-3, "epochs": 2, "batch": 25}
SETTINGS = {
    # Those with dropout before or between the classifier's layers learn slowly at first.
    "squeezenet1_1": {"lr": 3e-4, "batch": 10},
    "alexnet": {"lr": 2e-4},
    "vgg11_bn": {"lr": 2e-4},
    "vit_b_32": {"lr": 3e-4},
    "maxvit_t": {"lr": 3e-4},
}
# The smallest of each family, and pixels along a side.
SIDES = {
    "resnet18": 32,
    "vgg11_bn": 32,
    "alexnet": 64,
    "squeezenet1_1": 96,
    "googlenet": 64,
    "densenet121": 32,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "mnasnet0_5": 64,
    "shufflenet_v2_x0_5": 64,
    "regnet_x_400mf": 64,
    "regnet_y_400mf": 64,
    "efficientnet_b0": 64,
    "convnext_tiny": 64,
    "swin_t": 64,
    "swin_v2_t": 64,
    "vit_b_32": 64,
    "inception_v3": 107,
    "maxvit_t": 64,
}
# With which they take images that small: Inception without heads of its own, MaxViT with windows of 4 x 4 instead of 7.
MAXVIT = {"stem_channels": 64, "block_channels": [64, 128, 256, 512], "block_layers": [2, 2, 5, 2], "head_dim": 32}
FOR_SMALL_IMAGES = {"vit_b_32": {"image_size": 64}, "inception_v3": {"aux_logits": False, "init_weights": True}}


def images_of(root):
    """(images, uint8, labels): the first of each class in turn."""
    torchvision = import_torchvision("training on a folder of images")
    dataset = torchvision.datasets.ImageFolder(root)
    if len(dataset.classes) != CLASSES:
        raise ValueError(f"--data must be a folder of {CLASSES} classes, given {root} of {len(dataset.classes)}")
    places, taken = [[i for i, (_, c) in enumerate(dataset.samples) if c == k] for k in range(CLASSES)], []
    for of_class in places:
        taken += of_class[: IMAGES // CLASSES]
    pixels = [torchvision.transforms.functional.pil_to_tensor(dataset[i][0].convert("RGB")) for i in taken]
    return torch.stack(pixels), torch.tensor([dataset.samples[i][1] for i in taken])


def made(name):
    """A new model of CLASSES, for images of SIDES."""
    models = import_torchvision("training torchvision's models").models
    if name == "maxvit_t":
        sizes = {"input_size": (SIDES[name],) * 2, "partition_size": 2, "stochastic_depth_prob": 0.2}
        return models.MaxVit(num_classes=CLASSES, **sizes, **MAXVIT)
    options = FOR_SMALL_IMAGES.get(name)
    if options is None:
        return auglocal_ext.models.create(name, CLASSES)
    return models.get_model(name, num_classes=CLASSES, **options)


def row(name, images, labels):
    """Trains one network, and tells what came out."""
    torch.manual_seed(0)
    side, settings = SIDES[name], USUAL | SETTINGS.get(name, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = made(name)
        images = resized(images, side)
        loader = DeviceLoader(
            images, labels, settings["batch"], *mean_and_std(images), augment=True, pad=side // 8, flip=True
        )
        started = time.perf_counter()
        result = auglocal_ext.train(
            model,
            loader,
            modules=2,
            auxiliary="light",
            epochs=settings["epochs"],
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=settings["lr"]),
            progress=False,
        )
    last, chance = result.history[-1], 1 / CLASSES
    return {
        "model": name,
        "side": side,
        **settings,
        "module_accuracies": last["module_accuracies"],
        "least": chance + 3 * math.sqrt(chance * (1 - chance) / IMAGES),
        "seconds": time.perf_counter() - started,
        "peak_bytes": result.peak_bytes,
        "machine": records.machine("cpu"),
    }


def parse(arguments=None):
    parser = Parser("train_backbones", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("names", nargs="*", default=list(SIDES), metavar="NAME", choices=list(SIDES))
    add("--data", required=True, metavar="ROOT")
    add("--json", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


def run(options):
    if options.json:
        check_writable(options.json, "--json")
    there = set()
    if options.json and options.json.exists():
        there = {json.loads(line)["model"] for line in options.json.read_text().splitlines()}
    images, labels = images_of(options.data)
    failed = 0
    for name in options.names:
        if name in there:
            continue
        made = row(name, images, labels)
        if options.json:
            records.append(options.json, made)
        learns = min(made["module_accuracies"]) > made["least"]
        failed += not learns
        accuracies = ", ".join(f"{100 * accuracy:.1f}" for accuracy in made["module_accuracies"])
        verdict = "" if learns else f", not above {100 * made['least']:.1f}"
        print(f"{name}: {accuracies} %, {made['seconds']:.0f} s{verdict}", flush=True)
    return int(failed > 0)


def main(arguments=None):
    """Runs the program; returns the exit status."""
    options = parse(arguments)
    return errors.run("train_backbones", lambda: run(options), lost="; the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main())
